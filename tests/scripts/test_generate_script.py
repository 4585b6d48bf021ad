"""generate.py as a user runs it: what it prints and writes, in every layout, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import generate
from align.data.formats import FormatConfig, format_template
from align.data.prompts import PromptFormat
from align.data.tokenizer import load_tokenizer
from align.distributed import parallel
from align.generation.rollout import Sample
from tests.support.files import ROOT, TINY, read_jsonl, write_rows
from tests.support.launch import environment, fork_python, fork_ranks
from tools.conformance.models import FAMILIES

NEW_TOKENS = 12
GREEDY = ("--greedy", "--max-new-tokens", NEW_TOKENS)
CONTEXT = 256


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A random model with tied embeddings, of the tiny model's tokenizer and chat template."""
    directory = tmp_path_factory.mktemp("start") / "model"
    config = FAMILIES["qwen2"].to_dict() | {"vocab_size": 264, "eos_token_id": 258, "bos_token_id": 257}
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**config))
    network.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(TINY / name, directory)
    return directory


@pytest.fixture(scope="module")
def run(start, tmp_path_factory) -> Path:
    """OUTPUT of three steps of SFT on two tensor parallel ranks; they say that they were on messages."""
    folder = tmp_path_factory.mktemp("run")
    rows = [{"instruction": "ab" * i, "input": "", "output": "c" * i} for i in range(1, 13)]
    flags = (
        "--lr",
        1e-3,
        "--warmup-steps",
        1,
        "--global-batch-size",
        4,
        "--max-steps",
        3,
        "--max-seq-len",
        64,
    )
    flags += ("--prompt-template", "Q: {instruction}\\n{input}\\nA: {output}", "--model", start, "--tp", 2)
    train = write_rows(folder / "train.jsonl", rows)
    fork_ranks(2, "train_sft.py", *flags, "--train-data", train, "--output", folder / "out")
    for path in (folder / "out/prompt_format.json", folder / "out/hf/prompt_format.json"):
        formats = json.loads(path.read_text())
        assert formats["rows"] == "template"
        path.write_text(json.dumps(formats | {"rows": "messages"}))
    return folder / "out"


@pytest.fixture(scope="module")
def greedy(run) -> "Greedy":
    return Greedy(run / "hf")


class Greedy:
    """transformers' greedy answers."""

    def __init__(self, directory: Path):
        self.network = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.text = transformers.AutoTokenizer.from_pretrained(TINY)

    def plain(self, text: str, bos: bool = False) -> str:
        """The answer to a text as it stands."""
        return self.decoded([257] * bos + self.text.encode(text, add_special_tokens=False))

    def chat(self, *messages: str, most: int = NEW_TOKENS) -> str:
        """The answer to messages of user and assistant in turn."""
        roles = ("user", "assistant") * len(messages)
        rows = [{"role": role, "content": words} for role, words in zip(roles, messages, strict=False)]
        ids = self.text.apply_chat_template(rows, add_generation_prompt=True, return_dict=False)
        return self.decoded(ids, most)

    def ids(self, prompt: list[int], most: int = NEW_TOKENS) -> list[int]:
        """The answer to token ids, its end token included."""
        inputs = torch.tensor([prompt])
        unknown = list(range(len(self.text), self.network.config.vocab_size))  # ids that the tokenizer lacks
        out = self.network.generate(
            inputs, max_new_tokens=most, do_sample=False, pad_token_id=0, suppress_tokens=unknown
        )
        return out[0, len(prompt) :].tolist()

    def decoded(self, prompt: list[int], most: int = NEW_TOKENS) -> str:
        return self.text.decode([i for i in self.ids(prompt, most) if i != 258])


def chat_ids(message: str) -> list[int]:
    """Ids of a chat of one message."""
    text = f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
    return transformers.AutoTokenizer.from_pretrained(TINY).encode(text, add_special_tokens=False)


def checkpoint_of(run: Path) -> Path:
    [path] = (run / "checkpoints").iterdir()
    return path


def call(*words: object, processes: int = 1, stdin: str = "") -> tuple[str, str]:
    """stdout and stderr of a real command."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *map(str, words)],
        cwd=ROOT,
        env=environment(),
        input=stdin.encode(),
        capture_output=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return done.stdout.decode(), done.stderr.decode()


Printed = dict[str, tuple[str, str]]  # name of a case: stdout and stderr


def call_all(folder: Path, processes: int, cases: dict[str, tuple[tuple, str]]) -> Printed:
    """Output of generate.py with flags and stdin of each case, all in one start of the processes."""
    commands = {name: (list(map(str, flags)), stdin) for name, (flags, stdin) in cases.items()}
    (folder / "commands.json").write_text(json.dumps(commands))
    fork_ranks(processes, "tests/workers/generate_script.py", folder, timeout_s=200)
    return json.loads((folder / "found.json").read_text())


# ---- all cases, in two starts --------------------------------------------------------------------

ROWS = [
    {"prompt": "sort: d b a", "id": 7, "name": "é"},
    {"text": "abc", "response": "an old one"},
    {"messages": [{"role": "user", "content": "sort: c a"}, {"role": "assistant", "content": "a c"}]},
    {
        "prompt": [{"role": role, "content": role[0]} for role in ("user", "assistant", "user")],
        "kept": [1.5, None, "\ud800"],
    },
]
TALK = ["sort: b a", "and c b", "/new", "abc"]
LONG, LONGER = "ab" * 60, "a" * CONTEXT  # LONG fits, but not a second time behind its answer
FULL = "a" * (CONTEXT - 1 - len(chat_ids("")))  # leaves room for one token
SAMPLED = ("--samples-per-prompt", 3, "--max-new-tokens", 8)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> Path:
    """Input files, and where outputs go."""
    folder = tmp_path_factory.mktemp("generate")
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "many.jsonl", ROWS * 3)
    return folder


@pytest.fixture(scope="module")
def one(run, greedy, folder) -> Printed:
    """The cases of one process."""
    hf, abc = ("--model", run / "hf", *GREEDY), ("--prompt", "abc")
    bare = shutil.copytree(run / "hf", folder / "bare", ignore=shutil.ignore_patterns("*.jinja"))
    with_bos = shutil.copytree(bare, folder / "with_bos")
    formats = json.loads((bare / "prompt_format.json").read_text()) | {"add_bos": True}
    (with_bos / "prompt_format.json").write_text(json.dumps(formats))
    of_rows = shutil.copytree(run / "hf", folder / "of_rows")
    (of_rows / "prompt_format.json").write_text(json.dumps(formats | {"rows": "template", "add_bos": None}))
    rows, many = folder / "rows.jsonl", folder / "many.jsonl"
    sampled = ("--model", run / "hf", "--input", many, *SAMPLED)
    cases = {
        "raw": ((*hf, *abc, "--raw"), ""),
        "template": (("--model", bare, *GREEDY, *abc), ""),
        "template beside a chat template": (("--model", of_rows, *GREEDY, *abc), ""),
        "chat of a template": (("--model", of_rows, *GREEDY, "--chat"), "abc"),
        "template, BOS": (("--model", with_bos, *GREEDY, *abc), ""),
        "template, no BOS": (("--model", with_bos, *GREEDY, *abc, "--add-bos", "False"), ""),
        "several": ((*hf, *abc, "--samples-per-prompt", 2), ""),
        "stop": ((*hf, *abc, "--stop", stop_string(greedy)), ""),
        "full": ((*hf, "--prompt", FULL), ""),
        "checkpoint": (("--model", checkpoint_of(run), *GREEDY, *abc), ""),
        "checkpoint, raw": (("--model", checkpoint_of(run), *GREEDY, *abc, "--raw"), ""),
        "file": ((*hf, "--input", rows, "--output", folder / "new" / "greedy.jsonl"), ""),
        "sampled": ((*sampled, "--output", folder / "one.jsonl"), ""),
        "another seed": ((*sampled, "--output", folder / "seed.jsonl", "--seed", 5), ""),
        "talk": ((*hf, "--chat"), "\n".join([*TALK, "", "not read"])),
        "long talk": ((*hf, "--chat"), "\n".join([LONG, LONG, LONGER, "abc"])),
    }
    return call_all(folder, 1, cases)


def stop_string(greedy: Greedy) -> str:
    """One or two characters from inside the answer to abc."""
    return re.search("(?<=.)[^\ufffd\\s-]{1,2}", greedy.chat("abc"), re.DOTALL)[0]


LAYOUTS = {  # flags of two processes, and how many copies of the model they make
    "tp2": (("--tp", 2), 1),
    "pp2": (("--pp", 2), 1),
    "cp2": (("--cp", 2), 2),
    "dp2": ((), 2),
    "tp2-copies": (("--tp", 2, "--rollout-layout", "reshard"), 2),
}


@pytest.fixture(scope="module")
def two(run, folder) -> Printed:
    """The cases of two processes."""
    (folder / "two.jsonl").write_text("what was there before")
    model, abc = ("--model", checkpoint_of(run)), ("--prompt", "abc")
    cases = {name: ((*model, *GREEDY, *abc, *flags), "") for name, (flags, _) in LAYOUTS.items()}
    sampled = ("--input", folder / "many.jsonl", "--output", folder / "two.jsonl", *SAMPLED)
    cases["sampled"] = (("--model", run / "hf", *sampled, "--rollout-slots", 4), "")
    cases["talk"] = (("--model", run / "hf", *GREEDY, "--chat"), "\n".join(TALK))
    return call_all(folder, 2, cases)


# ---- --prompt ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_greedy_answers_are_those_of_transformers_through_the_chat_template(run, greedy):
    out, shown = call("generate.py", "--model", run / "hf", "--prompt", "sort: d b a", *GREEDY)
    assert out == greedy.chat("sort: d b a") + "\n"
    assert re.search(r"\n\((stop|length), \d+ tokens, [\d.,]+ tokens/s\)\n", shown)


@pytest.mark.slow
def test_raw_continues_the_text(one, greedy):
    assert one["raw"][0] == one["checkpoint, raw"][0] == greedy.plain("abc") + "\n"
    assert greedy.plain("abc") != greedy.chat("abc")


@pytest.mark.slow
def test_a_prompt_goes_through_the_template_of_training(one, greedy):
    """With BOS if training put it there, unless --add-bos says otherwise."""
    answer, shown = one["template beside a chat template"]
    assert answer == greedy.plain("Q: abc\n\nA:") + "\n"
    assert "--prompt goes through --prompt-template 'Q: {instruction}" in shown
    assert "WARNING: training rows had --prompt-template" in one["chat of a template"][1]
    assert one["template"][0] == one["template, no BOS"][0] == greedy.plain("Q: abc\n\nA:") + "\n"
    assert one["template, BOS"][0] == greedy.plain("Q: abc\n\nA:", bos=True) + "\n"
    assert one["template, BOS"][0] != one["template"][0]


@pytest.mark.slow
def test_several_answers_come_under_headings(one, greedy):
    expected, ids = greedy.chat("abc"), greedy.ids(chat_ids("abc"))
    finish = "stop" if ids[-1] == 258 else "length"
    heading = "---- answer {} of 2 (" + f"{finish}, {len(ids)} tokens)\n{expected}\n"
    assert one["several"][0] == heading.format(1) + heading.format(2)
    assert f"({2 * len(ids)} tokens, " in one["several"][1]


@pytest.mark.slow
def test_an_answer_ends_with_a_stop_string_that_is_not_shown(one, greedy):
    expected = greedy.chat("abc")
    assert one["stop"][0] == expected[: expected.index(stop_string(greedy))] + "\n"
    assert "\n(stop, " in one["stop"][1]


@pytest.mark.slow
def test_an_answer_fills_the_context_and_no_more(one, greedy):
    """The longest prompt that is not refused."""
    assert one["full"][0] == greedy.chat(FULL, most=1) + "\n" and "(length, 1 tokens, " in one["full"][1]


@pytest.mark.slow
def test_a_checkpoint_answers_as_its_export_in_any_layout(one, two, start, greedy):
    """Trained at tp 2; tokenizer and template are the start's, formats those of the run's flags."""
    expected = greedy.chat("abc") + "\n"
    assert one["checkpoint"][0] == expected
    for name, (_, copies) in LAYOUTS.items():
        assert two[name][0] == expected, name
        assert f": {copies} x 64 sequences" in two[name][1], name
    assert Greedy(start).chat("abc") != greedy.chat("abc"), "training has changed nothing"


# ---- --input, --output ---------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_of_every_format_are_answered_in_order(one, folder, greedy):
    answers = [greedy.plain("sort: d b a"), greedy.plain("abc"), greedy.chat("sort: c a")]
    answers.append(greedy.chat("u", "a", "u"))
    assert len(set(answers)) == 4
    written = folder / "new" / "greedy.jsonl"
    rows = read_jsonl(written)
    assert [row.pop("response") for row in rows] == answers
    assert {row.pop("finish") for row in rows} <= {"stop", "length"}
    assert rows == [{name: value for name, value in row.items() if name != "response"} for row in ROWS]
    assert "é" in written.read_text(), "text that people can read"
    out, shown = one["file"]
    assert out == "" and re.search(r"4 responses, \d+ tokens, [\d.,]+ tokens/s", shown)
    assert [path.name for path in written.parent.iterdir()] == ["greedy.jsonl"]


@pytest.mark.slow
def test_sampled_answers_are_the_same_on_two_copies_of_the_model(one, two, folder):
    """Three answers each, which differ, and do not depend on where and in what company they are decoded."""
    texts = [(folder / f"{name}.jsonl").read_text() for name in ("one", "two", "seed")]
    assert texts[0] == texts[1] != texts[2]
    rows = read_jsonl(folder / "one.jsonl")
    assert [len(row[name]) for row in rows for name in ("response", "finish")] == [3] * 24
    assert len({answer for row in rows for answer in row["response"]}) > 30


# ---- --chat --------------------------------------------------------------------------------------


def talk(greedy: Greedy) -> str:
    """transformers' responses to TALK."""
    first = greedy.chat("sort: b a")
    return "\n".join([first, greedy.chat("sort: b a", first, "and c b"), greedy.chat("abc"), ""])


@pytest.mark.slow
def test_chat_keeps_the_conversation(one, two, greedy):
    """An empty line ends it; in the second case the end of stdin does."""
    assert one["talk"][0] == two["talk"][0] == talk(greedy)
    assert "a new conversation" in one["talk"][1] and one["talk"][1].count("> ") == 5


@pytest.mark.slow
def test_chat_under_torchrun(run, greedy):
    out, _ = call(
        *("generate.py", "--model", run / "hf", "--chat", *GREEDY, "--tp", 2),
        processes=2,
        stdin="\n".join(TALK),
    )
    assert out == talk(greedy)


@pytest.mark.slow
def test_chat_starts_over_when_the_context_is_full(one, greedy):
    """LONG once more does not fit; LONGER would not even alone, and leaves nothing behind."""
    out, shown = one["long talk"]
    assert out == "\n".join([greedy.chat(LONG), greedy.chat(LONG), greedy.chat("abc"), ""])
    notices = re.findall(r"the model's context 256: (starting over|it is not asked)", shown)
    assert notices == ["starting over", "starting over", "it is not asked"]


def test_ranks_meet_while_they_wait_for_the_keyboard(monkeypatch, capsys):
    """Else gloo or NCCL would end a conversation in which nobody types for long."""
    meetings = []

    class Slow:
        class buffer:
            @staticmethod
            def readline() -> bytes:
                enough.wait(10)
                return b" caf\xc3\xa9 \xff\r\n"

    def on_main(make):  # noqa: ANN001, ANN202
        meetings.append(1)
        if len(meetings) == 3:
            enough.set()
        return make()

    enough = threading.Event()
    monkeypatch.setattr(sys, "stdin", Slow)
    monkeypatch.setattr(parallel, "is_main", lambda: True)
    monkeypatch.setattr(parallel, "on_main", on_main)
    monkeypatch.setattr(generate, "POLL_S", 0.02)
    assert generate.read_line() == "café \ufffd"
    assert 3 <= len(meetings) < 100
    assert capsys.readouterr() == ("", "> ")


# ---- text that grows -----------------------------------------------------------------------------


def shown(ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """Text that can be shown after each token, and the rest at the end."""
    tokenizer = load_tokenizer(TINY)
    growing = generate.Shown(tokenizer, stop)
    sample = Sample(np.array(ids), np.zeros(len(ids)), np.zeros(len(ids)), "stop")
    return [growing.add(i) for i in ids] + [sample.text(tokenizer, stop)[growing.length :]]


def test_only_whole_characters_are_shown():
    assert shown([*"aé€😀b".encode(), 258]) == list("a") + [
        "",
        "é",
        "",
        "",
        "€",
        "",
        "",
        "",
        "😀",
        "b",
        "",
        "",
    ]
    assert shown([*b"a\xe2\x82"]) == ["a", "", "", "\ufffd"]  # an answer that ends inside a character
    assert shown([*b"\xe2a"]) == ["", "\ufffda", ""]  # a byte that belongs to none


def test_nothing_of_a_stop_string_is_shown():
    assert shown([*b"aEb"], ("END",)) == ["a", "", "Eb", ""]
    assert shown([*b"aEND"], ("END", "x")) == ["a", "", "", "", ""]
    assert shown([*b"aEN"], ("END",)) == ["a", "", "", "EN"]  # ends for want of room
    assert shown([*b"ab"], ("b", "abc")) == ["", "", "a"]  # the one that ends it begins inside another


def test_what_is_shown_sums_up_to_the_answer():
    """Random bytes, most of them no UTF-8, with stop strings that begin alike."""
    rng, text = np.random.default_rng(0), load_tokenizer(TINY)
    alphabet = [*b"aab\n", 0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80, 257]
    for _ in range(300):
        ids = rng.choice(alphabet, rng.integers(1, 20)).tolist()
        for stop in ((), ("aab", "ab\n")):
            sample = Sample(np.array(ids), np.zeros(len(ids)), np.zeros(len(ids)), "length")
            assert "".join(shown(ids, stop)) == sample.text(text, stop), (ids, stop)


def test_bytes_that_are_decoded_together_lose_nothing():
    """As Llama 2 does it: a run of byte tokens that is not valid as a whole is U+FFFD for each byte."""

    class Runs:
        stop_ids: set[int] = set()
        stop_strings, chat = (), None

        def decode(self, ids: list[int]) -> str:
            try:
                return bytes(ids).decode()
            except UnicodeDecodeError:
                return "\ufffd" * 2 + bytes(ids[2:]).decode() if ids[2:] == [99] else "\ufffd" * len(ids)

    whole = generate.Shown(Runs(), ())
    assert [whole.add(i) for i in "\n😀".encode()] == ["\n", "", "", "", "😀"]
    broken = generate.Shown(Runs(), ())
    assert [broken.add(i) for i in b"\n\xf0c"] == ["\n", "", "\ufffdc"]


# ---- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize(
    "template",
    ["{input} {output}", "Q: {input}\\nA: {output}", "{input}{output}", "{a}\\n{b}\\n{c}", "({a})  {b}"],
)
def test_the_ids_of_a_template_are_those_before_the_answer_in_training(template, add_bos):
    tokenizer = load_tokenizer(TINY)
    names = re.findall(r"\{(\w+)\}", template)
    row = {name: "" for name in names} | {names[0]: " How many days? ", names[-1]: "seven"}
    fmt = FormatConfig(template, names[0], add_bos=add_bos, max_seq_len=100)
    ids, trained, _ = format_template(row, tokenizer, fmt)
    prompt_ids = generate.encode_text(
        row[names[0]], WithoutChat(), PromptFormat(add_bos=add_bos), template, False
    )
    assert prompt_ids.tolist() == ids[: trained.index(True)]
    assert prompt_ids.dtype == np.int32


class WithoutChat:
    """The tiny model's tokenizer without a chat template."""

    chat_template = None

    def __getattr__(self, name: str) -> object:
        return getattr(TEXT, name)


TEXT = load_tokenizer(TINY)


# ---- progress ------------------------------------------------------------------------------------


def test_progress_comes_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(generate.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(parallel, "is_main", lambda: True)
    progress = generate.Progress(9, 2)
    for token in range(12):
        now[0] += 1.0
        progress(token // 3, 0, token)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"{begun} of 9 prompts begun, 1.0 tokens/s by one of 2 copies of the model" for begun in (2, 4)
    ]


# ---- flags and errors ----------------------------------------------------------------------------


def field_names(config: type) -> set[str]:
    """The fields of a configuration and of the configurations in it."""
    kinds = {f.name: type(f.default) for f in fields(config) if is_dataclass(f.default)}
    names = {f.name for f in fields(config)} - set(kinds)
    return names.union(*map(field_names, kinds.values()))


def test_help_shows_every_flag_with_its_text():
    parts = re.split(r"\n  (?=--[a-z])", fork_python("generate.py", "--help").stdout)[1:]
    flags = {re.match("--([a-z0-9-]+)", part)[1]: part for part in parts}
    assert set(flags) == {name.replace("_", "-") for name in field_names(generate.Config)}
    for flag, part in flags.items():
        text = re.sub(r"\(default:.*|\{.*?\}|--\S+", "", part, flags=re.DOTALL)
        assert len(re.findall("[a-z]{2,}", text)) >= 2, f"--{flag} has no text: {part}"


@pytest.mark.slow
def test_what_cannot_work_is_refused_with_flag_and_rule(run, models, tmp_path):
    """All in one process (tests/workers/scripts.py); the first command trains the reward model."""
    bare = shutil.copytree(run / "hf", tmp_path / "bare", ignore=shutil.ignore_patterns("*.jinja"))
    alone = shutil.copytree(checkpoint_of(run), tmp_path / "away" / "checkpoints" / "step_00000003")
    lost = shutil.copytree(run, tmp_path / "lost", ignore=shutil.ignore_patterns("hf"))
    flags = json.loads((lost / "config.json").read_text())
    flags["flags"]["model"] = "no/such/model"
    (lost / "config.json").write_text(json.dumps(flags))
    other_vocabulary = shutil.copytree(models / "llama", tmp_path / "llama")  # of 131
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, other_vocabulary)
    one_field = shutil.copytree(bare, tmp_path / "one_field")
    (one_field / "prompt_format.json").write_text('{"prompt_template": "Say: {output}"}')
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"text": "b"}])
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "a"}, {"prompt": "a" * CONTEXT}])
    empty = write_rows(tmp_path / "empty.jsonl", [{"prompt": ""}])
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "a"}, {"question": "b"}])
    rm = tmp_path / "rm"
    hf, to = ("--model", run / "hf"), ("--output", tmp_path / "out.jsonl")
    hi = ("--prompt", "hi")
    cases = [  # script, flags, what the message says
        ("train_rm.py", ("--max-steps", 1, "--global-batch-size", 4, "--output", rm), None),
        (
            "generate.py",
            (),
            "nothing to do: give one of --prompt TEXT, --chat, and --input FILE with --output",
        ),
        ("generate.py", (*hi, "--chat"), "--prompt and --chat: give one of"),
        ("generate.py", (*hi, "--input", rows, *to), "--prompt and --input: give one of"),
        ("generate.py", ("--input", rows), r"--input .*rows.jsonl and --output None: they go together"),
        ("generate.py", (*hi, *to), "--input None and --output .*: they go together"),
        (
            "generate.py",
            ("--input", rows, "--output", "x.jsonl.gz"),
            "--output x.jsonl.gz is written as plain",
        ),
        ("generate.py", ("--prompt", ""), '--prompt "": there must be a text'),
        ("generate.py", ("--chat", "--raw"), "--raw is about --prompt TEXT and has no effect with --chat"),
        ("generate.py", ("--chat", "--samples-per-prompt", 2), "--samples-per-prompt 2: with --chat"),
        ("generate.py", (*hi, "--stop", ""), '--stop "": a stop string of zero length'),
        (
            "generate.py",
            (*hi, *hf, "--tp", 2),
            "--tp 2 x --pp 1 x --cp 1 = 2 does not divide the 1 processes",
        ),
        (
            "generate.py",
            (*hi, "--model", rm / "checkpoints" / "step_00000001"),
            "checkpoint of a reward model",
        ),
        ("generate.py", (*hi, "--model", rm / "hf"), r"is a reward model \(\*ForSequenceClassification\)"),
        ("generate.py", (*hi, "--model", alone), "away/config.json, which names the model of the"),
        (
            "generate.py",
            (*hi, "--model", checkpoint_of(lost)),
            "began with --model no/such/model, and there is",
        ),
        (
            "generate.py",
            (*hi, "--model", tmp_path),
            "no config.json there; give a Hugging Face model directory",
        ),
        ("generate.py", (*hi, "--model", one_field), "template 'Say: {output}' has no field for a prompt"),
        ("generate.py", ("--chat", "--model", bare), "--chat needs a chat template, .*/bare has none"),
        (
            "generate.py",
            (*hf, "--prompt", FULL + "a"),
            "--prompt: the prompt has 256 tokens, the model's context",
        ),
        (
            "generate.py",
            (*hi, "--model", other_vocabulary),
            "--prompt: the tokenizer gives token 258, the model",
        ),
        (
            "generate.py",
            (*hf, "--input", long, *to),
            r"long.jsonl:2: the prompt has 256 tokens, the model's con",
        ),
        ("generate.py", (*hf, "--input", empty, *to), r"empty.jsonl:1: field 'prompt' is empty"),
        (
            "generate.py",
            (*hf, "--input", other, *to),
            r"other.jsonl:2: fields 'question': accepted is one of",
        ),
        ("generate.py", (*hf, "--input", tmp_path / "no", *to), "no: cannot be read"),
        (
            "generate.py",
            (*hf, "--input", rows, "--output", rows),
            r"rows.jsonl is --input: give another file",
        ),
        ("generate.py", (*hf, "--input", rows, "--output", tmp_path), "is a directory: give a file"),
    ]
    commands = [[script, *map(str, flags)] for script, flags, _ in cases]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    fork_python("tests/workers/scripts.py", tmp_path, timeout_s=200)
    errors = json.loads((tmp_path / "errors.json").read_text())
    for command, (_, _, wanted), error in zip(commands, cases, errors, strict=True):
        assert (error is None) if wanted is None else re.search(wanted, error or ""), (command, error)
    assert not (tmp_path / "out.jsonl").exists()
