"""Raw data sets to jsonl, and the toy task."""

import gzip
import json
import sys
from pathlib import Path

import pytest

import prepare_data
from align import data, tokenizer, toy

TINY = Path(__file__).parent.parent / "assets" / "tiny"


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def loads(*paths: Path) -> int:
    """How many examples training makes of these files: all rows pass the data gate."""
    return len(data.load_sft(list(paths), tokenizer.load(TINY), data.FormatConfig())[0])


# ---- dolly -------------------------------------------------------------------------------------------------


def dolly_row(i: int, context: str = "") -> dict:
    return {"instruction": f"do {i}", "context": context, "response": f"done {i}", "category": "closed_qa"}


def test_dolly(tmp_path: Path):
    raw = [dolly_row(i, "" if i % 2 else f" given {i}\n") for i in range(200)]
    prepare_data.dolly(write_rows(tmp_path / "raw.jsonl", raw), tmp_path / "out", val_fraction=0.1)
    train, val = read_rows(tmp_path / "out/train.jsonl"), read_rows(tmp_path / "out/val.jsonl")
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
    with pytest.raises(ValueError, match="raw.jsonl:2: no field 'response'"):
        prepare_data.dolly(raw, tmp_path / "out")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 2.0])
def test_split_must_leave_both_parts(fraction: float, tmp_path: Path):
    raw = write_rows(tmp_path / "raw.jsonl", [dolly_row(i) for i in range(4)])
    with pytest.raises(ValueError, match="--val-fraction .* of 4 must leave some"):
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
    train, val = read_rows(tmp_path / "out/train.jsonl"), read_rows(tmp_path / "out/val.jsonl")
    assert (len(train), len(val)) == (76, 4)  # 38 and 2 trees of two threads
    prompts = [{row["conversations"][0]["value"] for row in rows} for rows in (train, val)]
    assert [len(part) for part in prompts] == [38, 2] and not prompts[0] & prompts[1]
    assert loads(tmp_path / "out/train.jsonl") == 76


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"prompt": None}, "field 'prompt' must be the object at the root"),
        (tree(message("user", "q")), "role 'user' is not one of prompter, assistant"),
        (tree({"role": "prompter", "text": None}), "field 'text' must be a string"),
        (tree(message("prompter", "q") | {"replies": ["a"]}), "field 'replies' must be a list"),
        (tree(message("assistant", "a") | {"labels": {"quality": 1}}), "label 'quality' must hold a number"),
    ],
)
def test_oasst_names_the_bad_line(bad: dict, said: str, tmp_path: Path):
    raw = write_rows(tmp_path / "trees.jsonl", [tree(message("prompter", "q")), bad])
    with pytest.raises(ValueError, match=f"trees.jsonl:2: {said}"):
        prepare_data.oasst(raw, tmp_path / "out")


def test_oasst_without_any_thread(tmp_path: Path):
    raw = write_rows(tmp_path / "trees.jsonl", [tree(message("prompter", f"q{i}")) for i in range(20)])
    with pytest.raises(ValueError, match="0 rows to train on and 0 to validate on"):
        prepare_data.oasst(raw, tmp_path / "out")


# ---- gsm8k -------------------------------------------------------------------------------------------------


def test_gsm8k(tmp_path: Path):
    raw = tmp_path / "raw.jsonl.gz"
    lines = [json.dumps({"question": f"{n} + 1?", "answer": f"<<{n}+1>>\n#### {n + 1}"}) for n in range(5)]
    raw.write_bytes(gzip.compress("\n".join(lines).encode()))
    prepare_data.gsm8k(raw, tmp_path / "out.jsonl", limit=3)
    rows = read_rows(tmp_path / "out.jsonl")
    assert rows[1] == {
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "<<1+1>>\n#### 2"},
        ]
    }
    assert len(rows) == loads(tmp_path / "out.jsonl") == 3


def test_gsm8k_names_the_bad_line(tmp_path: Path):
    raw = write_rows(
        tmp_path / "raw.jsonl", [{"question": "q", "answer": "a"}, {"question": "q", "answer": 3}]
    )
    with pytest.raises(ValueError, match="raw.jsonl:2: field 'answer' must be a string, not int"):
        prepare_data.gsm8k(raw, tmp_path / "out.jsonl")


@pytest.mark.parametrize("limit", [0, -1])
def test_gsm8k_limit_must_leave_rows(limit: int, tmp_path: Path):
    raw = write_rows(tmp_path / "raw.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(ValueError, match=f"--limit {limit} must be at least 1"):
        prepare_data.gsm8k(raw, tmp_path / "out.jsonl", limit=limit)


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
    train, val = read_rows(tmp_path / "train.jsonl"), read_rows(tmp_path / "val.jsonl")
    assert (len(train), len(val)) == (500, 50)
    assert sum(score < 1 for score in scores(train)) == 200  # 40 % of 500
    assert scores(val) == [1.0] * 50
    prompts = [row["messages"][0]["content"] for row in train + val]
    assert len(set(prompts)) == 550
    assert loads(tmp_path / "train.jsonl") == 500
    assert f"{tmp_path}/train.jsonl: 500 rows" in capsys.readouterr().out


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
    with pytest.raises(ValueError, match="is no toy task"):
        toy.toy_score("sort of", "a")
    with pytest.raises(
        ValueError, match="--train-rows 100000 and --val-rows 0: the toy task has prompts for"
    ):
        toy.toy_rows(100000, 0, mistakes=0.0, seed=0)
    with pytest.raises(ValueError, match="--mistakes 1.5 must be between 0 and 1"):
        toy.toy_rows(10, 10, mistakes=1.5, seed=0)
