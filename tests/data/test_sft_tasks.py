"""Prompts from SFT rows: where the last answer begins, a text as the only turn, what a judge is told.

With the tiny tokenizer a token is a byte; 257, 258 are <|im_start|> (BOS) and <|im_end|> (EOS).
"""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from align.data import formats, jsonl, prompts, sft, sft_tasks
from align.data.formats import FormatConfig
from align.data.marker_chat import RowFormats
from align.data.sft_tasks import Task
from align.data.tokenizer import Tokenizer, load_tokenizer
from align.errors import UserError
from align.judging import render
from tests.support.files import TINY, write_rows

BOS, EOS = 257, 258
DEFAULT = FormatConfig()
LOSS_ON_ALL = FormatConfig(loss_on="all")
SYSTEM = {"role": "system", "content": "s"}
ASKED = [BOS, *b"assistant\n"]  # where an answer begins
HEADER = "\x00System\n"
TEXTS = ["Q", " Q \n", "User: où?\n\nAssistant:", "a\tb  c", "\n"]


def chat(*contents: str) -> dict:
    """A messages row: user and assistant by turns."""
    turns = zip(("user", "assistant") * len(contents), contents, strict=False)
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def conversation(*turns: tuple, **fields: object) -> dict:
    """A conversations row of (from, value) or (from, value, label) turns."""
    named = [dict(zip(("from", "value", "label"), turn, strict=False)) for turn in turns]
    return {"system": "S", "conversations": named, **fields}


def said(role: str, content: str) -> list[int]:
    """The ids of a message."""
    return [BOS, *f"{role}\n{content}".encode(), EOS, 10]


def load(
    rows: list[dict], tokens: Tokenizer, path: Path, fmt: FormatConfig = DEFAULT
) -> tuple[list[Task], dict[str, int]]:
    """The tasks of a file of these rows."""
    return sft_tasks.load_tasks([write_rows(path / "d.jsonl", rows)], tokens, fmt)


def sft_prompt(row: dict, tokens: Tokenizer, fmt: FormatConfig = DEFAULT) -> list[int]:
    """The ids before the only answer of a row, in the example that SFT trains on."""
    example, cut = formats.format_sft(row, tokens, fmt)
    start = int(example.trained.argmax())
    assert example.trained[start:].sum() == example.trained.sum() and not cut
    return example.ids[:start].tolist()


# ---- prompts of rows, by hand ------------------------------------------------------------------------------

ROWS = {  # a row, and the ids before its last answer
    "messages": (chat("a", "b"), [*said("user", "a"), *ASKED]),
    "system": (
        {"messages": [SYSTEM, *chat("a", "b")["messages"]]},
        [*said("system", "s"), *said("user", "a"), *ASKED],
    ),
    "several answers": (
        chat("a", "b", "c", "d") | {"id": 7},
        [*said("user", "a"), *said("assistant", "b"), *said("user", "c"), *ASKED],
    ),
    "a question at the end": (
        chat("a", "b", "c", "d", "e"),
        [*said("user", "a"), *said("assistant", "b"), *said("user", "c"), *ASKED],
    ),
    "conversations": (
        conversation(("User", "a"), ("Bot", "b")),
        [*f"{HEADER}S\n\x11User\na\n\x11Bot\n".encode()],
    ),
    "several spans": (
        conversation(("User", "a"), ("Bot", "b"), ("User", "c"), ("Bot", "d"), ("User", "e")),
        [*f"{HEADER}S\n\x11User\na\n\x11Bot\nb\n\x11User\nc\n\x11Bot\n".encode()],
    ),
    "label before": (
        conversation(("User", "a"), ("Bot", "b", "x:4"), type="VALUE_TO_TEXT"),
        [*f"{HEADER}S\n\x11User\na\n\x11Bot\n\x12x:4\n".encode()],
    ),
    "label after": (
        conversation(("User", "a"), ("Bot", "b", "x:4"), type="TEXT_TO_VALUE"),
        [*f"{HEADER}S\n\x11User\na\n\x11Bot\nb\n\x12".encode()],
    ),
    "template": ({"input": " a: ", "output": "b", "extra": 3}, [*b"a:"]),
}


@pytest.mark.parametrize("fmt", [DEFAULT, LOSS_ON_ALL], ids=["answer", "all"])
@pytest.mark.parametrize("name", ROWS)
def test_prompt_ends_where_the_last_answer_begins(name: str, fmt: FormatConfig, tiny, tmp_path: Path):
    row, expected = ROWS[name]
    [task], counts = load([row], tiny, tmp_path, fmt)
    assert task.prompt.ids.tolist() == expected and task.prompt.ids.dtype == np.int32
    assert task.prompt.row == row
    whole, _ = formats.format_sft(row, tiny, fmt)
    assert task.example.ids.tolist() == whole.ids.tolist()
    assert task.example.trained.tolist() == whole.trained.tolist()
    if fmt.loss_on == "all":
        assert task.example.trained.tolist() == [False] + [True] * (len(whole.ids) - 1)
    unused = {f"rows with {name!r} (not used)": 1 for name in ("id", "extra") if name in row}
    assert counts == unused | {
        "rows": 1,
        "cut_prompts": 0,
        "cut_answers": 0,
        "dropped": 0,
        "dropped_without_prompt": 0,
        "tokens": len(whole.ids),
        "trained_tokens": int(whole.trained.sum()),
        "longest_prompt": len(expected),
    }


@pytest.mark.parametrize("name", ["tiny", "llama_chat"])
def test_prompts_are_those_of_generation(name: str, request: pytest.FixtureRequest, tmp_path: Path):
    tokens = request.getfixturevalue(name)
    rows = [chat("Q", "b"), chat("où?\n\n", "b"), chat("a", "b", "c", "d"), chat("a\tb  c", "")]
    tasks, _ = load(rows, tokens, tmp_path)
    for task, row in zip(tasks, rows, strict=True):
        expected = prompts.format_prompt(row, tokens, prompts.PromptFormat())
        assert task.prompt.ids.tolist() == expected.tolist()


@pytest.mark.parametrize("loss_on", ["answer", "all"])
@pytest.mark.parametrize("row", [{"input": "a", "output": "b"}, conversation(("User", "a"), ("Bot", "b"))])
def test_bos_is_of_the_prompt(row: dict, loss_on: str, tiny, tmp_path: Path):
    without, _ = load([row], tiny, tmp_path, FormatConfig(loss_on=loss_on))
    [task], _ = load([row], tiny, tmp_path, FormatConfig(loss_on=loss_on, add_bos=True))
    assert task.prompt.ids.tolist() == [BOS, *without[0].prompt.ids.tolist()]


# ---- what is cut and what is dropped -----------------------------------------------------------------------

CUT = [  # with 24 tokens; a prompt of one user message of n letters has n + 19
    ({"input": "q", "output": "a"}, [*b"q"]),
    ({"input": "q" * 40, "output": "a" * 10}, [*b"q" * 12]),  # the prompt gives way
    ({"input": "q", "output": "a" * 40}, None),  # nothing is left of the prompt
    (chat("a", "b" * 9), [*said("user", "a"), *ASKED]),  # 4 tokens of the answer are left
    (chat("abcd", "b"), [*said("user", "abcd"), *ASKED]),  # one
    (chat("abcde", "b"), None),  # none
    (chat("a", "b", "c", "d"), None),  # all of the first answer, none of the second
]


def test_what_is_cut_and_dropped(tiny, tmp_path: Path):
    fmt = FormatConfig(max_seq_len=24)
    tasks, counts = load([row for row, _ in CUT], tiny, tmp_path, fmt)
    kept = [(row, ids) for row, ids in CUT if ids is not None]
    assert [task.prompt.ids.tolist() for task in tasks] == [ids for _, ids in kept]
    assert [task.prompt.row for task in tasks] == [row for row, _ in kept]
    assert counts == {
        "rows": 7,
        "cut_prompts": 2,
        "cut_answers": 4,
        "dropped": 1,
        "dropped_without_prompt": 2,
        "tokens": 4 + 24 + 24 + 24,
        "trained_tokens": 3 + 12 + 4 + 1,
        "longest_prompt": 23,
    }
    examples, _ = sft.load_sft([write_rows(tmp_path / "kept.jsonl", [row for row, _ in kept])], tiny, fmt)
    for task, example in zip(tasks, examples, strict=True):
        assert task.example.ids.tolist() == example.ids.tolist()
        assert task.example.trained.tolist() == example.trained.tolist()


def test_the_same_prompts_with_loss_on_all(tiny, tmp_path: Path):
    """The row without any of its answer is one that SFT would train on."""
    rows, fmt = [row for row, _ in CUT], FormatConfig(max_seq_len=24)
    tasks, counts = load(rows, tiny, tmp_path, replace(fmt, loss_on="all"))
    expected, _ = load(rows, tiny, tmp_path, fmt)
    assert [task.prompt.ids.tolist() for task in tasks] == [task.prompt.ids.tolist() for task in expected]
    assert (counts["dropped"], counts["dropped_without_prompt"], counts["cut_answers"]) == (0, 3, 5)
    assert counts["trained_tokens"] == 3 + 23 + 23 + 23


@pytest.mark.parametrize("loss_on", ["answer", "all"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_nothing_before_the_answer(add_bos: bool, loss_on: str, tiny, tmp_path: Path):
    """Neither BOS alone nor the first token of an answer is a prompt; one token is."""
    rows = [{"input": "", "output": "abc"}, {"input": "x", "output": "abc"}, {"input": " ", "output": ""}]
    fmt = FormatConfig(add_bos=add_bos, loss_on=loss_on)
    if not add_bos:  # EOS alone is no row
        rows.pop()
    [task], counts = load(rows, tiny, tmp_path, fmt)
    assert task.prompt.ids.tolist() == [BOS] * add_bos + [ord("x")]
    assert counts["dropped_without_prompt"] == len(rows) - 1
    alone = replace(fmt, prompt_template="{output}", truncation_field="output")
    with pytest.raises(UserError, match="d.jsonl: no prompt is left, in all .* or nothing comes before it"):
        load(rows[:2], tiny, tmp_path, alone)


def test_no_prompt_left(tiny, tmp_path: Path):
    rows = [chat("a", "b", "c", "d")] * 3
    with pytest.raises(UserError, match="d.jsonl: no prompt is left, in all 3 .*--max-seq-len 30"):
        load(rows, tiny, tmp_path, FormatConfig(max_seq_len=30))
    with pytest.raises(UserError, match="d.jsonl: no row is left, all 3 .*--max-seq-len 20: raise it"):
        load(rows, tiny, tmp_path, FormatConfig(max_seq_len=20))


@pytest.mark.parametrize("fmt", [DEFAULT, LOSS_ON_ALL], ids=["answer", "all"])
@pytest.mark.parametrize(
    "row", [chat("a"), conversation(("User", "a")), conversation(("Bot", "a"), ("User", "b"))]
)
def test_a_row_without_an_answer_is_named(row: dict, fmt: FormatConfig, tiny, tmp_path: Path):
    with pytest.raises(UserError, match="d.jsonl:2: no .*: the row has no response"):
        load([chat("a", "b"), row], tiny, tmp_path, fmt)


def test_a_template_that_hides_where_answers_begin(tmp_path: Path):
    """With --loss-on all SFT takes it, but there is no prompt to sample from."""
    shutil.copytree(TINY, tmp_path / "model")
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "model/chat_template.jinja").write_text(template)
    tokens = load_tokenizer(tmp_path / "model")
    assert sft.load_sft([write_rows(tmp_path / "d.jsonl", [chat("a", "b")])], tokens, LOSS_ON_ALL)
    with pytest.raises(UserError, match="d.jsonl:1: .*is not a prefix of the whole"):
        load([chat("a", "b")], tokens, tmp_path, LOSS_ON_ALL)


# ---- sets --------------------------------------------------------------------------------------------------


def test_sets(tiny, tmp_path: Path, monkeypatch):
    opened, lines = [], []
    read_lines = jsonl.read_lines
    monkeypatch.setattr(jsonl, "read_lines", lambda path: opened.append(path.name) or read_lines(path))
    first = write_rows(tmp_path / "1.jsonl", [chat("a", "b"), chat("c", "d")])
    second = write_rows(tmp_path / "2.jsonl", [{"input": "Q", "output": "b"}])
    paths_of_sets = {"train": [second, first], "val": [first]}
    sets = sft_tasks.load_sft_sets(paths_of_sets, tiny, DEFAULT, 259, lines.append, RowFormats())
    asked = [[*said("user", letter), *ASKED] for letter in "ac"]
    prompt_ids = {name: [task.prompt.ids.tolist() for task in tasks] for name, tasks in sets.items()}
    assert prompt_ids == {"train": [[ord("Q")], *asked], "val": asked}
    assert opened == ["2.jsonl", "1.jsonl", "1.jsonl"]
    assert lines == [
        "train data: 3 rows, 50 tokens, 7 trained tokens, 20 longest prompt",
        "val data: 2 rows, 46 tokens, 4 trained tokens, 20 longest prompt",
        "first prompt:\nQ",
    ]


def test_a_set_may_be_empty(tiny, tmp_path: Path):
    lines, path = [], write_rows(tmp_path / "1.jsonl", [chat("a", "b")])
    sets = sft_tasks.load_sft_sets(
        {"train": [path], "val": []}, tiny, DEFAULT, 259, lines.append, RowFormats()
    )
    assert len(sets["train"]) == 1 and sets["val"] == [] and len(lines) == 2
    assert lines[-1] == "first prompt:\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["train", "val"])
def test_ids_of_answers_are_checked(name: str, tiny, tmp_path: Path):
    """A model of 258 tokens has no EOS, which is in no prompt of template rows."""
    paths = {key: [write_rows(tmp_path / f"{key}.jsonl", [{"input": "a", "output": "b"}])] for key in [name]}
    sft_tasks.load_sft_sets(paths, tiny, DEFAULT, 259, print, RowFormats())
    with pytest.raises(UserError, match="gives token 258, the model has 258"):
        sft_tasks.load_sft_sets(paths, tiny, DEFAULT, 258, print, RowFormats())


# ---- one turn ----------------------------------------------------------------------------------------------


def one_turn(row: dict, text: str, tokens: Tokenizer, fmt: FormatConfig = DEFAULT) -> list[int]:
    ids = render.one_turn(row, text, tokens, fmt)
    assert ids.dtype == np.int32 and ids.ndim == 1
    return ids.tolist()


MANY = conversation(
    ("Bot", "hi"), ("Tool", "t"), ("User", "a"), ("Bot", "b", "x"), ("User", "c"), mask=["User", "Tool"]
)


def test_one_turn_by_hand(tiny):
    row = {"messages": [SYSTEM, *chat("a", "b", "c", "d")["messages"]]}
    before = copy.deepcopy((row, MANY))
    assert one_turn(row, "é\n", tiny) == [*said("user", "é\n"), *ASKED]  # the line end after the role, too
    expected = f"{HEADER}\n\x11Tool\né\n\n\x11Bot\n"
    assert one_turn(MANY, "é\n", tiny) == [*expected.encode()]
    assert one_turn({"input": "a", "output": "b"}, " é\n", tiny) == [*"é\n".encode()]
    fmt = FormatConfig(r"Q: {input}\nA:{output}")
    assert one_turn({"input": "a", "output": "b"}, " é ", tiny, fmt) == [*"Q: é\nA:".encode()]
    assert (row, MANY) == before


def test_labels_are_left_out(tiny):
    turns = ("User", "a"), ("Bot", "b", "x:4")
    for kind in ("VALUE_TO_TEXT", "TEXT_TO_VALUE"):
        row = conversation(*turns, type=kind)
        assert one_turn(row, "q", tiny) == [*f"{HEADER}\n\x11User\nq\n\x11Bot\n".encode()]


def test_who_answers_last(tiny):
    row = conversation(("User", "a"), ("One", "b"), ("Two", "c"), ("User", "d"), mask="User")
    assert one_turn(row, "q", tiny) == [*f"{HEADER}\n\x11User\nq\n\x11Two\n".encode()]


def test_nothing_gives_way_in_one_turn(tiny):
    fmt = FormatConfig(max_seq_len=4)
    for row, extra in ((chat("a", "b"), 19), ({"input": "a", "output": "b"}, 0)):
        assert len(one_turn(row, "q" * 50, tiny, fmt)) == 50 + extra


def rows_of(kind: str, text: str) -> tuple[dict, dict]:
    """A row of several turns, and one of `text` alone that is answered "x"."""
    if kind == "messages":
        return {"messages": [SYSTEM, *chat("a", "b", "c", "d")["messages"]]}, chat(text, "x")
    if kind == "template":
        return {"input": "a", "output": "b"}, {"input": text, "output": "x"}
    alone = conversation(("Tool", text), ("Bot", "x"), mask=["User", "Tool"])
    return MANY, alone | {"system": ""}


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("tiny", "messages"), ("tiny", "conversations"), ("tiny", "template")]
    + [("llama", "conversations"), ("llama", "template")]
    + [("llama_chat", "messages"), ("llama_chat", "conversations"), ("llama_chat", "template")],
)
def test_one_turn_is_what_sft_sees(
    name: str, kind: str, add_bos: bool | None, request: pytest.FixtureRequest
):
    tokens = request.getfixturevalue(name)
    if kind == "messages" and add_bos:
        add_bos = None  # the template brings its own
    for loss_on in ("answer", "all"):
        fmt = FormatConfig(add_bos=add_bos, prompt_template="Q:{input} A: {output}", loss_on=loss_on)
        for text in TEXTS:
            row, alone = rows_of(kind, text)
            expected = sft_prompt(alone, tokens, replace(fmt, loss_on="answer"))
            assert one_turn(row, text, tokens, fmt) == expected


def test_bos_as_the_tokenizer_does(tiny):
    adding = copy.copy(tiny)
    adding.adds_bos = True
    for row in (MANY, {"input": "a", "output": "b"}):
        assert one_turn(row, "q", adding) == [BOS, *one_turn(row, "q", tiny)]
    assert one_turn(chat("a", "b"), "q", adding) == one_turn(chat("a", "b"), "q", tiny)


def test_chat_tokens_of_the_format(tiny):
    fmt = FormatConfig(chat_tokens=("<S>", "<T>", "<L>", r"\n", r"\n"))
    row = conversation(("User", "a"), ("Bot", "b"))
    assert one_turn(row, "q", tiny, fmt) == [*b"<S>System\n\n<T>User\nq\n<T>Bot\n"]


@pytest.mark.parametrize(
    ("template", "field", "number"),
    [("{output}", "output", 0), ("Q {output}", "output", 0), ("{system} {input} {output}", "input", 2)],
)
def test_a_template_must_have_one_field_for_the_text(template: str, field: str, number: int, tiny):
    fmt = FormatConfig(template, truncation_field=field)
    with pytest.raises(UserError, match=rf"--prompt-template '{template}' has {number} fields before the"):
        render.one_turn({"input": "a", "output": "b"}, "q", tiny, fmt)


def test_a_template_may_name_its_field_twice(tiny):
    fmt = FormatConfig("{input} {input}: {output}")
    row = {"input": "a", "output": "b"}
    assert one_turn(row, "q", tiny, fmt) == sft_prompt(row | {"input": "q"}, tiny, fmt) == [*b"q q:"]


def test_what_one_turn_refuses(tiny, llama):
    with pytest.raises(UserError, match="the prompt is empty"):
        render.one_turn({"input": "a", "output": "b"}, " ", tiny, FormatConfig(add_bos=True))
    for row in (chat("a", "b"), {"input": "a", "output": "b"}):
        with pytest.raises(UserError, match="two BOS at the start"):
            render.one_turn(row, "q", tiny, FormatConfig("<|im_start|>{input} {output}", add_bos=True))
    with pytest.raises(UserError, match="no prompt: the row has no response"):
        render.one_turn(conversation(("User", "a")), "q", tiny, DEFAULT)
    with pytest.raises(UserError, match="has no chat template"):
        render.one_turn(chat("a", "b"), "q", llama, DEFAULT)


# ---- what a judge is told ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "whole", "last"),
    [
        (chat(" a\n", "b"), " a\n", " a\n"),
        ({"messages": [SYSTEM, *chat("a", "b")["messages"]]}, "a", "a"),
        (chat("a", "b", "c", "d"), "User: a\n\nAssistant: b\n\nUser: c", "c"),
        (chat("a", "b", "c", "d", "e"), "User: a\n\nAssistant: b\n\nUser: c", "c"),
        (
            {"messages": [SYSTEM, chat("a")["messages"][0], SYSTEM, *chat("b", "c")["messages"]]},
            "User: a\n\nUser: b",
            "b",
        ),
        (
            {
                "messages": [
                    *chat("a")["messages"],
                    {"role": "tool", "content": "t"},
                    *chat("", "b")["messages"][1:],
                ]
            },
            "User: a\n\nTool: t",
            "t",
        ),
        ({"messages": [SYSTEM, {"role": "assistant", "content": "b"}]}, "s", "s"),
        (conversation(("User", "a"), ("Bot", "b")), "a", "a"),
        (
            conversation(
                ("user", "a"), ("Bot", "b", "x"), ("user", "c"), ("Bot", "d"), ("user", "e"), mask="user"
            ),
            "user: a\n\nBot: b\n\nuser: c",
            "c",
        ),
        (MANY, "Bot: hi\n\nTool: t\n\nUser: a", "a"),
        (
            conversation(("User", "a"), ("Bot", "b", "x"), type="TEXT_TO_VALUE"),
            "User: a\n\nBot: b",
            "b",
        ),
        (conversation(("Bot", "b", "x"), ("User", "a"), type="TEXT_TO_VALUE"), "b", "b"),
        (conversation(("Bot", "b"), ("User", "a"), type="TEXT_TO_VALUE"), "S", "S"),
        ({"input": "  a\tb\n ", "output": "c"}, "a\tb", "a\tb"),
    ],
)
def test_question(row: dict, whole: str, last: str, tiny):
    before = copy.deepcopy(row)
    assert render.question(row, tiny, DEFAULT) == (whole, last)
    assert row == before


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("name", ["tiny", "llama", "llama_chat"])
def test_question_of_a_template_row(name: str, add_bos: bool, request: pytest.FixtureRequest):
    """BOS is no part of it, and the text is that of the template."""
    tokens = request.getfixturevalue(name)
    fmt = FormatConfig(r"\nQ: {context} {input}\nA: {output}", add_bos=add_bos)
    row = {"context": "so,", "input": " où? ", "output": "x"}
    assert render.question(row, tokens, fmt) == ("Q: so, où?\nA:", "Q: so, où?\nA:")


def test_a_cut_prompt_is_judged_as_the_model_reads_it(tiny, tmp_path: Path):
    row, fmt = {"input": "abcdefgh", "output": "xyz"}, FormatConfig(max_seq_len=9)
    [task], _ = load([row], tiny, tmp_path, fmt)
    assert task.prompt.ids.tolist() == [*b"abcd"]
    assert render.question(row, tiny, fmt) == ("abcd", "abcd")


@pytest.mark.parametrize("row", [chat("a"), conversation(("User", "a"))])
def test_nothing_was_answered(row: dict, tiny):
    with pytest.raises(UserError, match="no prompt: the row has no response"):
        render.question(row, tiny, DEFAULT)
