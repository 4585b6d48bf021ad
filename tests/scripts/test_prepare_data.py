"""Raw data sets to jsonl, and the toy task."""

import gzip
import hashlib
import json
import random
import re
import socket
import struct
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import prepare_data
from align.data import download, formats, preferences, sft, toy
from align.data.tokenizer import load_tokenizer
from align.errors import UserError
from align.judging import render
from align.judging.judge import parse_score
from tests.support.files import TINY, read_jsonl, write_rows


def loads(*paths: Path) -> int:
    """Number of training examples in these files, whose rows must all be accepted."""
    return len(sft.load_sft(list(paths), load_tokenizer(TINY), formats.FormatConfig())[0])


# ---- dolly -------------------------------------------------------------------------------------------------


def dolly_row(i: int, context: str = "") -> dict:
    return {"instruction": f"do {i}", "context": context, "response": f"done {i}", "category": "closed_qa"}


def test_dolly(tmp_path: Path):
    raw = [dolly_row(i, "" if i % 2 else f" given {i}\n") for i in range(200)]
    prepare_data.dolly(write_rows(tmp_path / "raw.jsonl", raw), tmp_path / "out", val_fraction=0.1)
    train, val = read_jsonl(tmp_path / "out/train.jsonl"), read_jsonl(tmp_path / "out/val.jsonl")
    assert (len(train), len(val)) == (180, 20)
    orders = {"instruction first": 0, "context first": 0}
    rows = sorted(train + val, key=lambda row: int(row["output"].split()[1]))
    for i, row in enumerate(rows):
        assert (row["output"], row["category"]) == (f"done {i}", "closed_qa")
        if i % 2:
            assert row["input"] == f"do {i}"
        else:
            assert row["input"] in (f"do {i}\n\ngiven {i}", f"given {i}\n\ndo {i}")
            orders["instruction first" if row["input"].startswith("do") else "context first"] += 1
    assert min(orders.values()) > 25  # of 100
    assert loads(tmp_path / "out/train.jsonl", tmp_path / "out/val.jsonl") == 200


def test_dolly_depends_on_the_seed_alone(tmp_path: Path):
    raw = write_rows(tmp_path / "raw.jsonl", [dolly_row(i, "c") for i in range(50)])
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare_data.dolly(raw, tmp_path / name, seed=seed)
    texts = [(tmp_path / name / "train.jsonl").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_dolly_names_the_bad_line(tmp_path: Path):
    raw = write_rows(tmp_path / "raw.jsonl", [dolly_row(0), {"instruction": "x", "context": ""}])
    with pytest.raises(UserError, match="raw.jsonl:2: no field 'response'"):
        prepare_data.dolly(raw, tmp_path / "out")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 2.0])
def test_split_must_leave_both_parts(fraction: float, tmp_path: Path):
    raw = write_rows(tmp_path / "raw.jsonl", [dolly_row(i) for i in range(4)])
    with pytest.raises(UserError, match="--val-fraction .* of 4 must leave some"):
        prepare_data.dolly(raw, tmp_path / "out", val_fraction=fraction)


# ---- oasst -------------------------------------------------------------------------------------------------


def message(role: str, text: str, *replies: dict, **labels: float) -> dict:
    values = {name: {"value": value, "count": 3} for name, value in labels.items()}
    return {"message_id": "m", "role": role, "text": text, "replies": list(replies), "labels": values}


def tree(root: dict) -> dict:
    return {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": root}


def test_oasst_threads():
    root = message(
        "prompter",
        "q1",
        message("assistant", "a1", message("prompter", "q2", message("assistant", "a3"), quality=0.9)),
        message("assistant", "a2", quality=0.75, toxicity=0.1, humor=0.49, creativity=0.51, spam=1.0),
        quality=0.9,
    )
    first, second = prepare_data.oasst_rows(tree(root))
    assert [(turn["from"], turn["value"]) for turn in first["conversations"]] == [
        ("User", "q1"),
        ("Assistant", "a1"),
        ("User", "q2"),
        ("Assistant", "a3"),
    ]
    assert [turn["label"] for turn in first["conversations"]] == [None] * 4  # users' labels are left out
    label = "quality:3,toxicity:0,humor:2,creativity:2"
    assert second["conversations"][1] == {"from": "Assistant", "value": "a2", "label": label}
    assert (second["mask"], second["type"]) == ("User", "VALUE_TO_TEXT")
    assert second["system"].startswith("A chat between a curious user")


def test_oasst_threads_of_one_message_are_left_out():
    assert prepare_data.oasst_rows(tree(message("prompter", "q"))) == []


def test_oasst_splits_by_tree(tmp_path: Path):
    trees = [
        tree(message("prompter", f"q{i}", message("assistant", "a"), message("assistant", "b")))
        for i in range(40)
    ]
    raw = tmp_path / "trees.jsonl.gz"
    raw.write_bytes(gzip.compress("".join(json.dumps(t) + "\n" for t in trees).encode()))
    prepare_data.oasst(raw, tmp_path / "out")
    train, val = read_jsonl(tmp_path / "out/train.jsonl"), read_jsonl(tmp_path / "out/val.jsonl")
    assert (len(train), len(val)) == (76, 4)  # 38 and 2 trees of two threads
    prompts = [{row["conversations"][0]["value"] for row in rows} for rows in (train, val)]
    assert [len(part) for part in prompts] == [38, 2] and not prompts[0] & prompts[1]
    assert loads(tmp_path / "out/train.jsonl") == 76


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": None}, "field 'prompt' must be the object at the root"),
        (tree(message("user", "q")), "role 'user' is not one of prompter, assistant"),
        (tree({"role": "prompter", "text": None}), "field 'text' must be a string"),
        (tree(message("prompter", "q") | {"replies": ["a"]}), "field 'replies' must be a list"),
        (tree(message("assistant", "a") | {"labels": {"quality": 1}}), "label 'quality' must hold a number"),
    ],
)
def test_oasst_names_the_bad_line(bad: dict, reason: str, tmp_path: Path):
    raw = write_rows(tmp_path / "trees.jsonl", [tree(message("prompter", "q")), bad])
    with pytest.raises(UserError, match=f"trees.jsonl:2: {reason}"):
        prepare_data.oasst(raw, tmp_path / "out")


def test_oasst_without_any_thread(tmp_path: Path):
    raw = write_rows(tmp_path / "trees.jsonl", [tree(message("prompter", f"q{i}")) for i in range(20)])
    with pytest.raises(UserError, match="0 rows to train on and 0 to validate on"):
        prepare_data.oasst(raw, tmp_path / "out")


# ---- gsm8k -------------------------------------------------------------------------------------------------


def test_gsm8k(tmp_path: Path):
    raw = tmp_path / "raw.jsonl.gz"
    answers = ["#### 1", "<<1+1>>\n#### 2", "####-1,234,567 ", "#### 4", "no answer, not read"]
    lines = [json.dumps({"question": f"{n} + 1?", "answer": answer}) for n, answer in enumerate(answers)]
    raw.write_bytes(gzip.compress("\n".join(lines).encode()))
    prepare_data.gsm8k(raw, tmp_path / "out.jsonl", limit=3)
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert rows[1] == {
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "<<1+1>>\n#### 2"},
        ],
        "answer": "2",
    }
    assert [row["answer"] for row in rows] == ["1", "2", "-1234567"]
    assert loads(tmp_path / "out.jsonl") == 3
    examples, _ = sft.load_sft([tmp_path / "out.jsonl"], load_tokenizer(TINY), formats.FormatConfig())
    for row, example in zip(rows, examples, strict=True):  # the field `answer` is not read in training
        alone = formats.format_sft(
            {"messages": row["messages"]}, load_tokenizer(TINY), formats.FormatConfig()
        )[0]
        assert example.ids.tolist() == alone.ids.tolist()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (3, "must be a string, not int"),
        ("2 and 2 are 4", "must end with '####' and the final answer"),
        ("2 and 2 are #### ,", "must end with '####' and the final answer"),
    ],
)
def test_gsm8k_names_the_bad_line(answer: object, message: str, tmp_path: Path):
    rows = [{"question": "q", "answer": "#### 1"}, {"question": "q", "answer": answer}]
    raw = write_rows(tmp_path / "raw.jsonl", rows)
    with pytest.raises(UserError, match=f"raw.jsonl:2: field 'answer' {message}"):
        prepare_data.gsm8k(raw, tmp_path / "out.jsonl")


def test_gsm8k_instruction_follows_the_question(tmp_path: Path):
    raw = tmp_path / "raw.jsonl"
    raw.write_text(json.dumps({"question": "How many?", "answer": "Two.\n#### 2"}) + "\n")
    prepare_data.gsm8k(raw, tmp_path / "out.jsonl", instruction="Be brief.")
    [row] = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert row["messages"][0]["content"] == "How many?\n\nBe brief."
    assert row["answer"] == "2"


@pytest.mark.parametrize("limit", [0, -1])
def test_gsm8k_limit_must_leave_rows(limit: int, tmp_path: Path):
    raw = write_rows(tmp_path / "raw.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(UserError, match=f"--limit {limit} must be at least 1"):
        prepare_data.gsm8k(raw, tmp_path / "out.jsonl", limit=limit)


# ---- hh ----------------------------------------------------------------------------------------------------


def hh_text(*turns: str) -> str:
    """A text of HH-RLHF: Human and Assistant by turns."""
    names = ("Human", "Assistant") * len(turns)
    return "".join(f"\n\n{name}: {turn}" for name, turn in zip(names, turns, strict=False))


def hh_raw(*turns: str, rejected: str = "bad") -> dict:
    return {"chosen": hh_text(*turns), "rejected": hh_text(*turns[:-1], rejected)}


def hh_outputs(directory: Path) -> dict[str, list[dict]]:
    names = ("train_comparisons", "train_prompts", "test_comparisons", "test_prompts")
    return {name: read_jsonl(directory / f"{name}.jsonl") for name in names}


def test_hh_styles(tmp_path: Path):
    raw = write_rows(tmp_path / "raw.jsonl", [hh_raw("q1 ", "\n a1", "q2", "a2\n\nmore")])
    other = write_rows(tmp_path / "test.jsonl", [hh_raw("q", "a", rejected="")])
    prepare_data.hh((raw,), tmp_path / "chat", (other,))
    user, earlier = {"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}
    prompt = [user, earlier, {"role": "user", "content": "q2"}]
    good = {"role": "assistant", "content": "a2\n\nmore"}
    bad = {"role": "assistant", "content": "bad"}
    written = hh_outputs(tmp_path / "chat")
    assert written["train_comparisons"] == [{"prompt": prompt, "chosen": [good], "rejected": [bad]}]
    assert written["train_prompts"] == [{"prompt": prompt}]

    prepare_data.hh((raw,), tmp_path / "text", (other,), style="text")
    prompt = "User: q1\n\nAssistant: a1\n\nUser: q2\n\nAssistant:"
    assert hh_outputs(tmp_path / "text") == {
        "train_comparisons": [{"prompt": prompt, "chosen": " a2\n\nmore", "rejected": " bad"}],
        "train_prompts": [{"prompt": prompt}],
        "test_comparisons": [{"prompt": "User: q\n\nAssistant:", "chosen": " a", "rejected": ""}],
        "test_prompts": [{"prompt": "User: q\n\nAssistant:"}],
    }


FLAWED = {  # rows that are dropped, and the reason that is printed
    "two answers": (
        {"chosen": hh_text("q", "a") + "\n\nAssistant: b", "rejected": hh_text("q", "c")},
        "in which turns do not alternate",
    ),
    "rejected by two": (
        {"chosen": hh_text("q", "a"), "rejected": hh_text("q", "c") + "\n\nAssistant: b"},
        "in which turns do not alternate",
    ),
    "no answer": (
        {"chosen": hh_text("q", "a"), "rejected": hh_text("q", "a", "q")},
        "in which turns do not alternate",
    ),
    "answer first": (
        {"chosen": "\n\nAssistant: a" + hh_text("q", "a"), "rejected": hh_text("q", "b")},
        "in which turns do not alternate",
    ),
    "text first": (
        {"chosen": "Hello" + hh_text("q", "a"), "rejected": "Hello" + hh_text("q", "b")},
        "in which turns do not alternate",
    ),
    "no turns": ({"chosen": "", "rejected": "a"}, "in which turns do not alternate"),
    "other question": (
        {"chosen": hh_text("q", "a"), "rejected": hh_text("r", "b")},
        "with different prompts",
    ),
    "other depth": (
        {"chosen": hh_text("q", "a"), "rejected": hh_text("q", "a", "r", "b")},
        "with different prompts",
    ),
    "empty question": (hh_raw("q", "a", " ", "b"), "with an empty question"),
    "identical": (hh_raw("q", "a", rejected=" a\n"), "with identical answers"),
}


@pytest.mark.parametrize("name", FLAWED)
def test_hh_drops_and_counts(name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    flawed, reason = FLAWED[name]
    raw = write_rows(tmp_path / "raw.jsonl", [hh_raw("u", "a"), flawed, hh_raw("v", "a"), flawed])
    prepare_data.hh((raw,), tmp_path, test_fraction=0.5)
    written = hh_outputs(tmp_path)
    openings = {row["prompt"][0]["content"] for name in written for row in written[name]}
    assert openings == {"u", "v"} and [len(rows) for rows in written.values()] == [1, 1, 1, 1]
    assert f"{raw}: 4 pairs, dropped: 2 {reason}\n" in capsys.readouterr().out


def test_hh_splits_by_conversation(tmp_path: Path):
    raw = []
    for i in range(40):  # each conversation at three depths, the last with two pairs of answers
        turns = [f"q{i}", f"a{i}", "more", "b", "and?", "c"]
        raw += [hh_raw(*turns[:2]), hh_raw(*turns[:4]), hh_raw(*turns), hh_raw(*turns, rejected="worse")]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare_data.hh(
            (write_rows(tmp_path / "raw.jsonl", raw),), tmp_path / name, test_fraction=0.2, seed=seed
        )
    a, b, c = (hh_outputs(tmp_path / name) for name in "abc")
    assert a == b and a != c
    train, test = (
        {row["prompt"][0]["content"] for row in a[f"{part}_comparisons"]} for part in ("train", "test")
    )
    assert (len(train), len(test)) == (32, 8) and not train & test
    assert [len(rows) for rows in a.values()] == [128, 96, 32, 24]  # a prompt with two pairs is one prompt
    for part in ("train", "test"):
        prompts = [row["prompt"] for row in a[f"{part}_comparisons"]]
        assert [row["prompt"] for row in a[f"{part}_prompts"]] == [
            prompt for i, prompt in enumerate(prompts) if prompt not in prompts[:i]
        ]


def test_hh_holds_out_a_tenth_by_itself(tmp_path: Path):
    raw = write_rows(tmp_path / "raw.jsonl", [hh_raw(f"q{i}", "a") for i in range(30)])
    prepare_data.hh((raw,), tmp_path)
    assert [len(rows) for rows in hh_outputs(tmp_path).values()] == [27, 27, 3, 3]


def test_hh_with_a_test_set(tmp_path: Path, capsys: pytest.CaptureFixture):
    first = write_rows(tmp_path / "1.jsonl", [hh_raw("q", "a"), hh_raw("q", "a", "deeper", "b")])
    second = write_rows(tmp_path / "2.jsonl", [hh_raw("r", "a"), hh_raw("s", "a")])
    held_out = write_rows(tmp_path / "t.jsonl", [hh_raw(" q", "a", "other", "b"), hh_raw("t", "a")])
    prepare_data.hh((first, second), tmp_path, (held_out,))
    written = hh_outputs(tmp_path)
    openings = {name: [row["prompt"][0]["content"] for row in rows] for name, rows in written.items()}
    assert openings["train_comparisons"] == openings["train_prompts"] == ["r", "s"]
    assert openings["test_comparisons"] == openings["test_prompts"] == ["q", "t"]
    assert "dropped from --input: 2 that open like a row of --test-input" in capsys.readouterr().out


def test_hh_refuses(tmp_path: Path):
    raw = write_rows(tmp_path / "raw.jsonl", [hh_raw("q", "a"), hh_raw("q", "b")])
    with pytest.raises(UserError, match="--test-fraction 0.1: --test-input or --download is the test set"):
        prepare_data.hh((raw,), tmp_path, (raw,), test_fraction=0.1)
    with pytest.raises(UserError, match="--test-fraction 0.1 of 1 must leave some"):
        prepare_data.hh((raw,), tmp_path)
    with pytest.raises(UserError, match="0 pairs to train on and 2 to test"):
        prepare_data.hh((raw,), tmp_path, (raw,))
    bad = write_rows(tmp_path / "bad.jsonl", [hh_raw("q", "a"), {"chosen": hh_text("q", "a")}])
    with pytest.raises(UserError, match="bad.jsonl:2: no field 'rejected'"):
        prepare_data.hh((bad,), tmp_path)


def test_hh_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = [write_rows(tmp_path / f"{name}.jsonl", [hh_raw(name, "a"), hh_raw(name, "b")]) for name in "uvt"]
    command = ["prepare_data.py", "hh", "--input", *paths[:2], "--test-input", paths[2]]
    command += ["--output", tmp_path / "out", "--style", "text"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    prepare_data.main()
    assert [len(rows) for rows in hh_outputs(tmp_path / "out").values()] == [4, 2, 2, 1]
    assert read_jsonl(tmp_path / "out/test_prompts.jsonl") == [{"prompt": "User: t\n\nAssistant:"}]


# ---- downloads ---------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Files over HTTP on the loopback device, with connections that break."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []  # path, Range
        self.breaks: list[int] = []  # bytes after which the next connections break
        self.resets = False  # they break with a reset, not with an end
        self.ranges = True  # Range is honoured
        self.lengths = True  # and Content-Length sent

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers["Range"]
        server.requests.append((self.path, asked))
        if self.path.startswith("/moved/"):  # as huggingface.co does
            return self.answer(302, Location=f"{server.url}/{self.path.removeprefix('/moved/')}")
        if self.path not in server.files:
            return self.send_error(404)
        body, start = server.files[self.path], 0
        if server.ranges and asked:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self.send_error(416)
            self.answer(206, Content_Length=len(body) - start)
        else:
            self.answer(200, **({"Content_Length": len(body)} if server.lengths else {}))
        if server.breaks:
            self.wfile.write(body[start:][: server.breaks.pop(0)])
            if server.resets:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
        else:
            self.wfile.write(body[start:])

    def answer(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server, reached without the proxy that this machine may have."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it has read the environment
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


BODY = random.Random(0).randbytes(700_000)  # three blocks


def publish(
    server: Server, monkeypatch: pytest.MonkeyPatch, name: str = "f", body: bytes = BODY, path: str = "/f"
) -> None:
    """Serve `body` and list it as the public file `name`."""
    server.files[path.replace("/moved/", "/")] = body
    digest = hashlib.sha256(body).hexdigest()
    monkeypatch.setitem(download.PUBLIC, name, (server.url + path, digest))


def test_download_once(server, tmp_path: Path, monkeypatch, capsys):
    publish(server, monkeypatch)
    path = download.fetch("f", tmp_path / "a/raw")
    assert path == tmp_path / "a/raw/f" and path.read_bytes() == BODY
    assert capsys.readouterr().out == f"{path}: downloaded 0.7 MB, sha256 as expected\n"
    assert download.fetch("f", tmp_path / "a/raw") == path
    assert capsys.readouterr().out == f"{path}: already there, sha256 as expected\n"
    assert server.requests == [("/f", None)] and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("lengths", "of_total"), [(True, " of 0.7"), (False, "")])
def test_download_shows_progress_on_a_terminal(
    server, lengths: bool, of_total: str, tmp_path: Path, monkeypatch, capsys
):
    publish(server, monkeypatch)
    server.lengths = lengths
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert download.fetch("f", tmp_path).read_bytes() == BODY
    shown = [f"f: {done}{of_total} MB" for done in ("0.3", "0.5", "0.7", "0.7")]  # blocks of 2^18 bytes
    assert capsys.readouterr().err == "".join(f"\r{line}" for line in shown) + "\n"


@pytest.mark.parametrize(
    ("ranges", "resets", "lengths"),
    [(True, False, True), (False, False, True), (True, True, True), (False, True, False)],
)
def test_download_continues_after_a_break(
    server, ranges: bool, resets: bool, lengths: bool, tmp_path: Path, monkeypatch
):
    publish(server, monkeypatch)
    server.ranges, server.resets, server.lengths = ranges, resets, lengths
    server.breaks = [300_000, 0, 100_000]
    assert download.fetch("f", tmp_path).read_bytes() == BODY
    asked = [asked for _, asked in server.requests]
    assert len(asked) == 4 and asked[0] is None
    if not resets:  # a reset may lose bytes that were sent
        continued = [300_000, 300_000, 400_000] if ranges else [300_000, None, 100_000]
        assert asked[1:] == [start and f"bytes={start}-" for start in continued]


def test_download_continues_the_part_of_an_earlier_run(server, tmp_path: Path, monkeypatch):
    publish(server, monkeypatch, path="/moved/f")  # the second request has the Range of the first
    server.breaks = [100_000] * 5
    part = tmp_path / "f.part"
    with pytest.raises(
        download.DownloadError, match=f"broke 5 times; .* continue {part}, 0.5 MB; fetch this"
    ):
        download.fetch("f", tmp_path)
    assert part.read_bytes() == BODY[:500_000]
    assert download.fetch("f", tmp_path).read_bytes() == BODY
    assert server.requests[-2:] == [("/moved/f", "bytes=500000-"), ("/f", "bytes=500000-")]
    (tmp_path / "f").rename(part)  # stopped before it was renamed
    assert download.fetch("f", tmp_path).read_bytes() == BODY and not part.exists()


def test_download_with_the_wrong_sha256(server, tmp_path: Path, monkeypatch):
    publish(server, monkeypatch)
    server.files["/f"] = other = BODY[:-1] + b"\0"
    actual, expected = (hashlib.sha256(body).hexdigest() for body in (other, BODY))
    with pytest.raises(
        download.DownloadError, match=f"{server.url}/f: sha256 {actual}, expected {expected}; it"
    ):
        download.fetch("f", tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "f").write_bytes(other)  # and one that is there: it may be of use, so it stays
    with pytest.raises(
        download.DownloadError, match=f"{tmp_path}/f: sha256 {actual}, expected {expected}; rem"
    ):
        download.fetch("f", tmp_path)
    assert (tmp_path / "f").read_bytes() == other
    (tmp_path / "f").unlink()
    (tmp_path / "f.part").write_bytes(b"of another version")
    with pytest.raises(download.DownloadError, match="it is deleted: try again"):
        publish(server, monkeypatch)
        download.fetch("f", tmp_path)
    assert download.fetch("f", tmp_path).read_bytes() == BODY


def test_download_without_a_published_sha256(server, tmp_path: Path, monkeypatch, capsys):
    publish(server, monkeypatch)
    monkeypatch.setitem(download.PUBLIC, "f", (f"{server.url}/f", None))
    for state in ("downloaded 0.7 MB", "already there"):
        path = download.fetch("f", tmp_path)
        message = f"{path}: {state}, sha256 {hashlib.sha256(BODY).hexdigest()} not checked: no published one"
        assert capsys.readouterr().out.startswith(message)
    assert path.read_bytes() == BODY and len(server.requests) == 1


def test_download_through_a_proxy(server, tmp_path: Path, monkeypatch):
    publish(server, monkeypatch, path="/f")
    server.files["http://data.invalid/f"] = BODY  # a proxy is asked for the whole address
    monkeypatch.setitem(download.PUBLIC, "f", ("http://data.invalid/f", download.PUBLIC["f"][1]))
    monkeypatch.setenv("http_proxy", server.url)
    assert download.fetch("f", tmp_path).read_bytes() == BODY


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, words)])
    prepare_data.main()


def test_download_fails_with_one_line(server, tmp_path: Path, monkeypatch, capsys):
    name = "databricks-dolly-15k.jsonl"
    with socket.socket() as closed:  # bound, and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{closed.getsockname()[1]}/dolly"
        for url, reason in ((refused, "Connection refused"), (f"{server.url}/absent", "404: Not Found")):
            monkeypatch.setitem(download.PUBLIC, name, (url, "0" * 64))
            with pytest.raises(SystemExit) as stopped:
                command(
                    monkeypatch,
                    "dolly",
                    "--download",
                    "--output",
                    tmp_path / "out",
                    "--download-dir",
                    tmp_path,
                )
            line = capsys.readouterr().err
            assert stopped.value.code == 2 and line.count("\n") == 1
            assert line.startswith(f"error: {url}: ") and reason in line
            by_hand = (
                f"fetch this address by hand and save it as {tmp_path}/{name}, or give the file as --input"
            )
            assert by_hand in line
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_commands_download(server, tmp_path: Path, monkeypatch):
    """Each command writes what it writes of the same file by --input; raw files are in data/raw."""
    monkeypatch.chdir(tmp_path)
    trees = [tree(message("prompter", f"q{i}", message("assistant", "a"))) for i in range(20)]
    raw = {
        "databricks-dolly-15k.jsonl": jsonl([dolly_row(i, "c") for i in range(20)]),
        "2023-04-12_oasst_all.trees.jsonl.gz": gzip.compress(jsonl(trees)),
        "gsm8k_train.jsonl": jsonl([{"question": f"q{i}", "answer": f"#### {i}"} for i in range(5)]),
        "gsm8k_test.jsonl": jsonl([{"question": f"t{i}", "answer": f"#### {i}"} for i in range(3)]),
    }
    for name, body in raw.items():
        publish(server, monkeypatch, name, body, f"/{name}")
    for words in ("dolly --seed 3", "oasst --val-fraction 0.2", "gsm8k --limit 4 --instruction Briefly."):
        name = words.split()[0]
        command(monkeypatch, *words.split(), "--download", "--output", f"data/{name}")
    assert sorted(path.name for path in Path("data/raw").iterdir()) == sorted(raw)
    prepare_data.dolly(Path("data/raw/databricks-dolly-15k.jsonl"), Path("by_hand/dolly"), seed=3)
    trees = Path("data/raw/2023-04-12_oasst_all.trees.jsonl.gz")
    prepare_data.oasst(trees, Path("by_hand/oasst"), val_fraction=0.2)
    for part in ("train", "test"):
        output = Path(f"by_hand/gsm8k/{part}.jsonl")
        prepare_data.gsm8k(Path(f"data/raw/gsm8k_{part}.jsonl"), output, 4, "Briefly.")
    written = sorted(path.relative_to("by_hand") for path in Path("by_hand").glob("*/*"))
    assert [str(path) for path in written] == [
        *("dolly/train.jsonl", "dolly/val.jsonl", "gsm8k/test.jsonl", "gsm8k/train.jsonl"),
        *("oasst/train.jsonl", "oasst/val.jsonl"),
    ]
    for path in written:
        assert ("data" / path).read_text() == ("by_hand" / path).read_text()
    assert [len(read_jsonl(tmp_path / f"data/gsm8k/{part}.jsonl")) for part in ("train", "test")] == [4, 3]


HH_NAMES = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")


def test_hh_downloads_its_sets(server, tmp_path: Path, monkeypatch):
    for i, name in enumerate(HH_NAMES):
        for part, rows in (("train", 3), ("test", 1)):
            pairs = [hh_raw(f"{name} {part} {row}", "a") for row in range(rows + i)]
            file = f"hh_{name}_{part}.jsonl.gz"
            publish(server, monkeypatch, file, gzip.compress(jsonl(pairs)), f"/{file}")
    flags = ("--output", tmp_path / "two", "--download-dir", tmp_path, "--sets", *HH_NAMES[:2])
    command(monkeypatch, "hh", "--download", *flags)
    assert [len(rows) for rows in hh_outputs(tmp_path / "two").values()] == [7, 7, 3, 3]
    assert len(server.requests) == 4
    command(monkeypatch, "hh", "--download", "--output", tmp_path / "all", "--download-dir", tmp_path)
    written = hh_outputs(tmp_path / "all")
    assert [len(rows) for rows in written.values()] == [18, 18, 10, 10]
    assert len(server.requests) == 8
    for part in ("train", "test"):
        openings = {row["prompt"][0]["content"] for row in written[f"{part}_prompts"]}
        assert {opening.rsplit(" ", 1)[0] for opening in openings} == {f"{name} {part}" for name in HH_NAMES}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("dolly", "give either --input FILE or --download"),
        ("oasst --input a --download", "give either --input FILE or --download"),
        ("gsm8k --input a --download-dir raw", "--download-dir has no effect without --download"),
        ("gsm8k --download --output a.jsonl", "--output a.jsonl: with --download it is the directory"),
        ("hh --input a --sets harmless-base", "--sets has no effect without --download"),
        ("hh --download --test-input a", "--test-input: --download fetches the test set too"),
        ("hh --download --test-fraction 0.1", "--test-fraction 0.1: --test-input or --download is"),
    ],
)
def test_download_flags_are_checked_first(words: str, message: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, "fetch", lambda *_: pytest.fail("it downloads"))
    output = [] if "--output" in words else ["--output", "out"]
    with pytest.raises(SystemExit):
        command(monkeypatch, *words.split(), *output)
    assert capsys.readouterr().err.startswith("error: ") and list(tmp_path.iterdir()) == []


def test_public_addresses_are_of_one_commit():
    names = [f"hh_{name}_{part}.jsonl.gz" for name in HH_NAMES for part in ("train", "test")]
    names += ["gsm8k_train.jsonl", "gsm8k_test.jsonl", "databricks-dolly-15k.jsonl"]
    assert set(download.PUBLIC) == {*names, "2023-04-12_oasst_all.trees.jsonl.gz"}
    for name, (url, digest) in download.PUBLIC.items():
        assert re.fullmatch(r"https://(huggingface\.co|raw\.githubusercontent\.com)/.+/[0-9a-f]{40}/.+", url)
        assert url.rsplit("/", 1)[1] in name and url.endswith(name.rsplit("_", 1)[-1])
        assert re.fullmatch("[0-9a-f]{64}", digest or "0" * 64)
    digests = [digest for _, digest in download.PUBLIC.values() if digest]
    assert len(set(digests)) == len(digests) == len(download.PUBLIC) - 1


# ---- the toy task ------------------------------------------------------------------------------------------


def scores(rows: list[dict]) -> list[float]:
    chats = [row["messages"] for row in rows]
    return [toy.toy_score(user["content"], assistant["content"]) for user, assistant in chats]


def test_toy_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    command = ["prepare_data.py", "toy", "--output", str(tmp_path), "--train-rows", "500", "--val-rows", "50"]
    monkeypatch.setattr(sys, "argv", command)
    prepare_data.main()
    train, val = read_jsonl(tmp_path / "train.jsonl"), read_jsonl(tmp_path / "val.jsonl")
    assert (len(train), len(val)) == (500, 50)
    assert sum(score < 1 for score in scores(train)) == 200  # 40 % of 500
    assert scores(val) == [1.0] * 50
    prompts = [row["messages"][0]["content"] for row in train + val]
    assert len(set(prompts)) == 550
    assert loads(tmp_path / "train.jsonl") == 500
    assert f"{tmp_path}/train.jsonl: 500 rows" in capsys.readouterr().out


def test_toy_comparisons_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    numbers = ["--train-rows", "4500", "--train-comparisons", "300", "--val-comparisons", "20"]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "toy", "--output", str(tmp_path), *numbers])
    prepare_data.main()
    chats = [row for name in ("train", "val") for row in read_jsonl(tmp_path / f"{name}.jsonl")]
    files = [tmp_path / f"{name}_comparisons.jsonl" for name in ("train", "val")]
    rows = [row for path in files for row in read_jsonl(path)]
    assert [len(read_jsonl(path)) for path in files] == [300, 20]
    prompts = [row["messages"][0]["content"] for row in chats]
    prompts += [row["prompt"][0]["content"] for row in rows]
    assert len(set(prompts)) == 4500 + 200 + 300 + 20
    tokenizer = load_tokenizer(TINY)
    assert len(preferences.load_pairs(files, tokenizer, preferences.PreferenceFormat())[0]) == 320


def test_toy_comparisons_are_as_described():
    train, val = toy.comparisons(300, 100, seed=3, after=50)
    for row in train + val:
        [user], [right], [wrong] = row["prompt"], row["chosen"], row["rejected"]
        assert [message["role"] for message in (user, right, wrong)] == ["user", "assistant", "assistant"]
        assert toy.toy_score(user["content"], right["content"]) == 1
        length = len(right["content"].split())
        assert toy.toy_score(user["content"], wrong["content"]) == pytest.approx(1 - 2 / length)
        assert sorted(wrong["content"].split()) == right["content"].split()
    assert toy.comparisons(300, 100, seed=3, after=50) == (train, val)
    assert toy.comparisons(300, 100, seed=4, after=50) != (train, val)
    prompts = [row["prompt"][0]["content"] for row in train + val]
    earlier = [row["messages"][0]["content"] for row in toy.toy_rows(40, 10, mistakes=0.5, seed=3)[0]]
    assert len({*prompts, *earlier}) == 300 + 100 + 40


def test_toy_files_as_they_come_share_no_prompt(tmp_path: Path):
    rows = [row for paths in toy.write(tmp_path) for path in paths for row in read_jsonl(path)]
    train, val = toy.write_comparisons(tmp_path)
    pairs = [row for path in (*train, *val) for row in read_jsonl(path)]
    assert [path.name for path in (*train, *val)] == ["train_comparisons.jsonl", "val_comparisons.jsonl"]
    prompts = [row["messages"][0]["content"] for row in rows]
    prompts += [row["prompt"][0]["content"] for row in pairs]
    assert len(set(prompts)) == len(prompts) == 4000 + 200 + 2000 + 200


def test_toy_rows_are_as_described():
    train, val = toy.toy_rows(300, 100, mistakes=1.0, seed=3)
    for row in train + val:
        user, assistant = (message["content"] for message in row["messages"])
        letters = user.removeprefix("sort: ").split(" ")
        assert 3 <= len(set(letters)) == len(letters) <= 6 and set(letters) <= set("abcdefghij")
        assert sorted(assistant.split(" ")) == sorted(letters)
    for row, score in zip(train, scores(train), strict=True):  # two letters of n are in the wrong place
        assert score == pytest.approx(1 - 2 / len(row["messages"][1]["content"].split()))
    assert toy.toy_rows(300, 100, mistakes=1.0, seed=3) == (train, val)
    assert toy.toy_rows(300, 100, mistakes=1.0, seed=4) != (train, val)
    assert all(score == 1 for score in scores(toy.toy_rows(50, 0, mistakes=0.0, seed=3)[0]))


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("a b c d", 1.0),
        ("  a b\nc d ", 1.0),
        ("b a c d", 0.5),
        ("a b c", 0.75),
        ("a b c d e f g h", 0.5),
        ("d c b a", 0.0),
        ("", 0.0),
        ("abcd", 0.0),
    ],
)
def test_toy_score(answer: str, score: float):
    assert toy.toy_score("sort: d b a c", answer) == score
    assert (
        toy.toy_score("<|im_start|>user\nsort: d b a c<|im_end|>\n<|im_start|>assistant\n", answer) == score
    )


def test_toy_refuses():
    with pytest.raises(UserError, match="is no toy task"):
        toy.toy_score("sort of", "a")
    with pytest.raises(UserError, match="--train-rows 100000 and --val-rows 0: the toy task has prompts for"):
        toy.toy_rows(100000, 0, mistakes=0.0, seed=0)
    with pytest.raises(
        UserError,
        match="--train-comparisons 90000 and --val-comparisons 10 after 4200 rows: the toy task has prompts",
    ):
        toy.comparisons(90000, 10, seed=0)
    with pytest.raises(UserError, match="--mistakes 1.5 must be between 0 and 1"):
        toy.toy_rows(10, 10, mistakes=1.5, seed=0)


# ---- judge -------------------------------------------------------------------------------------------------


def test_judge(tmp_path: Path):
    """Each judgement is right: the answer is what the judgement says of it."""
    chats = [
        [("user", f"What is {i} + {i}?"), ("assistant", f"It is {i} and {i} more, {2 * i}.")]
        for i in range(400)
    ]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    template = tmp_path / "judge.txt"
    template.write_text("{{ prompt }} | {{ response }}\n")
    raw, out = write_rows(tmp_path / "raw.jsonl", rows), tmp_path / "out.jsonl"
    prepare_data.judge(raw, out, template)
    written, scores = read_jsonl(out), Counter()
    for i, row in enumerate(written):
        asked, judgement = (message["content"] for message in row["messages"])
        question, _, response = asked.removesuffix("\n").partition(" | ")
        assert question == f"What is {i} + {i}?"
        own = f"It is {i} and {i} more, {2 * i}."
        score = parse_score(judgement, 0, 5)
        scores[score] += 1
        shape = [len(word) for word in response.split()]
        assert {
            5: response == own,
            2: response == f"It is {i}",
            1: response != own and shape == [len(word) for word in own.split()],
            0: response != own and response in [chat[1][1] for chat in chats],
        }[score], (response, judgement)
    assert len(written) == 400 and min(scores[score] for score in (0, 1, 2, 5)) > 70
    assert loads(out) == 400
    prepare_data.judge(raw, tmp_path / "again.jsonl", template, limit=7)
    assert len(read_jsonl(tmp_path / "again.jsonl")) == 7


def test_judge_of_several_turns_and_of_an_answer_without_numbers(tmp_path: Path):
    """An answer of one word has no half, one without a digit no other numbers."""
    chat = [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Bye"),
        ("assistant", "Bye"),
    ]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]}] * 20
    rows += [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}] * 20
    prepare_data.judge(write_rows(tmp_path / "raw.jsonl", rows), tmp_path / "out.jsonl")
    first, *_ = written = read_jsonl(tmp_path / "out.jsonl")
    assert (
        "<question>\nUser: Hi\n\nAssistant: Hello\n\nUser: Bye\n</question>"
        in first["messages"][0]["content"]
    )
    assert {parse_score(row["messages"][1]["content"], 0, 5) for row in written} == {0.0, 5.0}


def test_judge_of_conversations(tmp_path: Path):
    """In the format of the input, asked as train_self_reward.py asks; the label of the answer is left out."""
    answer = {"from": "Bob", "value": "It is 2.", "label": "quality:4"}
    turns = [{"from": "Ann", "value": "1 + 1?"}, answer, {"from": "Ann", "value": "Thanks."}]
    row = {"system": "S", "mask": "Ann", "type": "VALUE_TO_TEXT", "conversations": turns}
    template = tmp_path / "judge.txt"
    template.write_text("{{ prompt }} | {{ response }}")
    raw, out = write_rows(tmp_path / "raw.jsonl", [row] * 40), tmp_path / "out.jsonl"
    prepare_data.judge(raw, out, template)
    tiny, fmt = load_tokenizer(TINY), formats.FormatConfig()
    counts = Counter()
    for judgement in read_jsonl(out):
        asked, score = judgement["conversations"]
        assert (judgement["mask"], asked["from"], score["from"]) == (["Ann"], "Ann", "Bob")
        counts[asked["value"], parse_score(score["value"], 0, 5)] += 1
        ids = render.one_turn(row, asked["value"], tiny, fmt).tolist()
        assert formats.format_sft(judgement, tiny, fmt)[0].ids[: len(ids)].tolist() == ids
    own = [key for key in counts if key[0] == "1 + 1? | It is 2."]
    half = [key for key in counts if key[0] == "1 + 1? | It"]
    assert own == [("1 + 1? | It is 2.", 5)] and half == [("1 + 1? | It", 2)]
    assert counts.total() == 40 and {score for _, score in counts} == {5, 2, 1}
    raw = write_rows(raw, [row | {"type": "TEXT_TO_VALUE"}])
    with pytest.raises(UserError, match=r"raw.jsonl:1: field 'type'"):
        prepare_data.judge(raw, out)


def test_judge_refuses(tmp_path: Path):
    asked = {"messages": [{"role": "user", "content": "x"}]}
    raw = write_rows(tmp_path / "raw.jsonl", [asked])
    with pytest.raises(UserError, match=r"raw.jsonl:1: no prompt: the row has no response"):
        prepare_data.judge(raw, tmp_path / "out.jsonl")
    raw = write_rows(raw, [{"prompt": "x"}])
    with pytest.raises(UserError, match=r"raw.jsonl:1: a row must have 'messages'"):
        prepare_data.judge(raw, tmp_path / "out.jsonl")
    raw = write_rows(raw, [{"messages": [*asked["messages"], {"role": "assistant", "content": "y"}]}])
    with pytest.raises(UserError, match="has 1 rows: a response is judged beside another row's"):
        prepare_data.judge(raw, tmp_path / "out.jsonl")
