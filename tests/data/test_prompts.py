"""Prompts: ids worked by hand and equal to those before a pair's response, what is dropped, what is refused.

With the tiny tokenizer a token is a byte; 257, 258 are <|im_start|> (BOS) and <|im_end|> (EOS).
"""

import copy
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from align.data import formats, jsonl, preferences, prompts, row_counts, toy
from align.data.preferences import PreferenceFormat
from align.data.prompts import Prompt, PromptFormat
from align.data.tokenizer import Tokenizer, load_tokenizer
from align.errors import UserError
from tests.support.files import TINY, write_rows

BOS, EOS = 257, 258
DEFAULT = PromptFormat()
SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "a"}
GOOD, BAD = {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "cd"}
USER_IDS = [BOS, *b"user\na", EOS, 10]
ASKED = [BOS, *b"assistant\n"]  # where an answer begins


def load(
    rows: list[dict], tokens: Tokenizer, path: Path, fmt: PromptFormat = DEFAULT
) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts of a file of these rows."""
    return prompts.load_prompts([write_rows(path / "d.jsonl", rows)], tokens, fmt)


def ids(row: dict, tokens: Tokenizer, fmt: PromptFormat = DEFAULT) -> list[int]:
    return prompts.format_prompt(row, tokens, fmt).tolist()


def ids_before_response(row: dict, tokens: Tokenizer, add_bos: bool | None) -> list[int]:
    """The ids before the chosen response, which are those before the rejected one."""
    sides = preferences.format_pair(row, tokens, PreferenceFormat(add_bos=add_bos))
    chosen, rejected = (side.ids[: int(side.trained.argmax())].tolist() for side in sides)
    assert chosen == rejected
    return chosen


# ---- ids, by hand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["prompt", "text"])
def test_text_is_taken_as_it_is(field: str, tiny, llama):
    assert ids({field: " Q \n"}, tiny) == [*b" Q \n"]
    assert ids({field: "Q", "answer": 3, "chosen": "x", "output": "y"}, tiny) == [ord("Q")]
    pieces = [llama.sp.id_to_piece(i) for i in ids({field: "User: Hi\n\nAssistant:"}, llama)]
    assert pieces == ["▁User", ":", "▁Hi", "<0x0A>", "<0x0A>", "Ass", "istant", ":"]


@pytest.mark.parametrize("field", ["prompt", "text"])
def test_bos_of_text(field: str, tiny, llama):
    adding = copy.copy(tiny)
    adding.adds_bos = True
    assert ids({field: "Q"}, adding) == [BOS, ord("Q")]
    assert ids({field: "Q"}, tiny, PromptFormat(add_bos=True)) == [BOS, ord("Q")]
    assert ids({field: "Q"}, adding, PromptFormat(add_bos=False)) == [ord("Q")]
    assert ids({field: "Q"}, llama, PromptFormat(add_bos=True)) == [llama.bos_id, *llama.encode("Q")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [USER]}, [*USER_IDS, *ASKED]),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [*USER_IDS, *ASKED]),
        ({"prompt": [SYSTEM, USER]}, [BOS, *b"system\ns", EOS, 10, *USER_IDS, *ASKED]),
        ({"messages": [USER, GOOD]}, [*USER_IDS, *ASKED]),
        ({"messages": [USER]}, [*USER_IDS, *ASKED]),
        ({"messages": [USER, GOOD], "answer": "b", "text_of": 1}, [*USER_IDS, *ASKED]),
        ({"messages": [USER, BAD, USER, GOOD]}, [*USER_IDS, *ASKED, *b"cd", EOS, 10, *USER_IDS, *ASKED]),
        ({"messages": [USER, BAD, USER]}, [*USER_IDS, *ASKED, *b"cd", EOS, 10, *USER_IDS, *ASKED]),
    ],
)
def test_messages(row: dict, expected: list[int], tiny):
    adding = copy.copy(tiny)
    adding.adds_bos = True  # the template brings its own
    before = copy.deepcopy(row)
    assert ids(row, tiny) == ids(row, adding) == expected
    assert row == before


def test_template_with_its_own_bos(llama_chat):
    expected = llama_chat.encode("<s>[INST] a [/INST]")
    assert ids({"prompt": [USER]}, llama_chat) == ids({"messages": [USER, GOOD]}, llama_chat) == expected
    assert expected[0] == llama_chat.bos_id and expected.count(llama_chat.bos_id) == 1


def test_bos_before_a_template_without(tmp_path: Path):
    shutil.copytree(TINY, tmp_path / "model")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}:"
    (tmp_path / "model/chat_template.jinja").write_text(template)
    tokens = load_tokenizer(tmp_path / "model")
    assert ids({"prompt": [USER]}, tokens) == [*b"a:"]
    assert ids({"prompt": [USER]}, tokens, PromptFormat(add_bos=True)) == [BOS, *b"a:"]


# ---- the ids before the response of a pair -----------------------------------------------------------------

TEXTS = ["Q:", " Q \n", "User: où?\n\nAssistant:", "a\tb  c", "x<|im_end|>\n"]
CHATS = [[USER], [USER, BAD, USER], [{"role": "user", "content": " où:\n"}, GOOD, USER]]


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("name", ["tiny", "llama", "llama_chat"])
def test_text_as_in_pairs(name: str, add_bos: bool | None, request: pytest.FixtureRequest):
    tokens = request.getfixturevalue(name)
    for text in TEXTS:
        row = {"prompt": text, "chosen": " b", "rejected": "cd"}
        expected = ids_before_response(row, tokens, add_bos)
        for prompt in (row, {"text": text}):
            assert ids(prompt, tokens, PromptFormat(add_bos=add_bos)) == expected


@pytest.mark.parametrize("add_bos", [None, False])
@pytest.mark.parametrize("name", ["tiny", "llama_chat"])
def test_messages_as_in_pairs(name: str, add_bos: bool | None, request: pytest.FixtureRequest):
    tokens = request.getfixturevalue(name)
    for chat in CHATS:
        row = {"prompt": chat, "chosen": GOOD, "rejected": [BAD]}
        expected = ids_before_response(row, tokens, add_bos)
        whole = {"chosen": [*chat, GOOD], "rejected": [*chat, BAD]}
        assert expected == ids_before_response(whole, tokens, add_bos)
        for prompt in (row, {"messages": chat}, {"messages": [*chat, BAD]}):
            assert ids(prompt, tokens, PromptFormat(add_bos=add_bos)) == expected


@pytest.mark.parametrize("name", ["tiny", "llama_chat"])
def test_messages_as_in_sft(name: str, request: pytest.FixtureRequest):
    tokens = request.getfixturevalue(name)
    for chat in CHATS:
        row = {"messages": [*chat, BAD]}
        example, _ = formats.format_sft(row, tokens, formats.FormatConfig())
        start = np.flatnonzero(np.diff(example.trained.astype(int)) == 1)[-1] + 1  # of the last trained span
        assert ids(row, tokens) == example.ids[:start].tolist()


# ---- what prepare_data.py writes ---------------------------------------------------------------------------

HH = [  # two conversations, one of them at two depths
    ("\n\nHuman: Hi:\n\nAssistant: a", "\n\nHuman: Hi:\n\nAssistant: b"),
    (
        "\n\nHuman: Hi:\n\nAssistant: a\n\nHuman: : \n\nAssistant: \n\na b",
        "\n\nHuman: Hi:\n\nAssistant: a\n\nHuman: :\n\nAssistant:",
    ),
    ("\n\nHuman: où?\n\nAssistant: ici", "\n\nHuman: où?\n\nAssistant: là"),
]


@pytest.mark.parametrize(
    ("name", "style"),
    [("tiny", "messages"), ("llama_chat", "messages")]
    + [("tiny", "text"), ("llama", "text"), ("llama_chat", "text")],
)
def test_prompts_of_hh_are_those_of_its_comparisons(
    name: str, style: str, request: pytest.FixtureRequest, tmp_path: Path
):
    tokens = request.getfixturevalue(name)
    raw = write_rows(tmp_path / "hh.jsonl", [{"chosen": good, "rejected": bad} for good, bad in HH])
    prepare_data.hh((raw,), tmp_path, test_fraction=0.5, style=style)
    for part in ("train", "test"):
        comparisons, alone = (tmp_path / f"{part}_{kind}.jsonl" for kind in ("comparisons", "prompts"))
        expected = [ids_before_response(row, tokens, None) for _, row in jsonl.read_jsonl(comparisons)]
        for path in (alone, comparisons):
            loaded, _ = prompts.load_prompts([path], tokens, DEFAULT)
            assert [prompt.ids.tolist() for prompt in loaded] == expected


def test_prompts_of_gsm8k_keep_the_answer(tiny, tmp_path: Path):
    raw = write_rows(tmp_path / "raw.jsonl", [{"question": "a", "answer": "1000 + 1\n#### 1,001"}])
    prepare_data.gsm8k(raw, tmp_path / "out.jsonl")
    [prompt], _ = prompts.load_prompts([tmp_path / "out.jsonl"], tiny, DEFAULT)
    assert prompt.ids.tolist() == [*USER_IDS, *ASKED] and prompt.row["answer"] == "1001"


def test_prompts_of_the_toy_task(tiny, tmp_path: Path):
    prepare_data.toy(tmp_path, train_rows=5, val_rows=2, train_comparisons=3, val_comparisons=2)
    paths = [tmp_path / f"{name}.jsonl" for name in ("train", "val", "train_comparisons", "val_comparisons")]
    loaded, counts = prompts.load_prompts(paths, tiny, DEFAULT)
    assert counts["prompts"] == len(loaded) == 5 + 2 + 3 + 2
    for prompt in loaded:
        user = prompt.row.get("prompt", prompt.row.get("messages"))[0]["content"]
        assert prompt.ids.tolist() == [BOS, *f"user\n{user}".encode(), EOS, 10, *ASKED]
        right = " ".join(sorted(user.removeprefix("sort: ").split(" ")))
        assert toy.toy_score(tiny.decode(prompt.ids.tolist()), right) == 1


# ---- files, counts and what is dropped ---------------------------------------------------------------------


def test_counts_and_what_is_too_long(tiny, tmp_path: Path):
    rows = [
        {"text": "x" * 8, "id": 1},
        {"text": "x" * 9},
        {"prompt": "abc", "answer": [1]},
        {"text": "é" * 5},
    ]
    loaded, counts = load(rows, tiny, tmp_path, PromptFormat(max_prompt_len=8))
    assert [prompt.ids.tolist() for prompt in loaded] == [[*b"xxxxxxxx"], [*b"abc"]]
    assert [prompt.row for prompt in loaded] == [rows[0], rows[2]]
    assert all(prompt.ids.dtype == np.int32 for prompt in loaded)
    for_rewards = {"rows with 'id' (for reward functions)": 1, "rows with 'answer' (for reward functions)": 1}
    assert counts == {"prompts": 4, "dropped_too_long": 2, "tokens": 11, "longest": 8} | for_rewards
    unused = ", ".join(f"1 {name}" for name in for_rewards)
    assert row_counts.describe(counts) == f"4 prompts, 2 dropped too long, 11 tokens, 8 longest, {unused}"


def test_bos_counts_as_a_token(tiny, tmp_path: Path):
    fmt = PromptFormat(max_prompt_len=3, add_bos=True)
    loaded, counts = load([{"text": "ab"}, {"text": "abc"}], tiny, tmp_path, fmt)
    assert [prompt.ids.tolist() for prompt in loaded] == [[BOS, *b"ab"]] and counts["dropped_too_long"] == 1


def test_one_token_is_a_prompt(tiny, tmp_path: Path):
    loaded, _ = load([{"text": "a"}], tiny, tmp_path, PromptFormat(max_prompt_len=1))
    assert [prompt.ids.tolist() for prompt in loaded] == [[ord("a")]]


def test_several_files_one_of_them_zipped(tiny, tmp_path: Path):
    first = write_rows(tmp_path / "1.jsonl", [{"prompt": "P"}])
    second = tmp_path / "2.jsonl.gz"
    second.write_bytes(gzip.compress(b'{"text": "Q"}\n\n{"messages": [{"role": "user", "content": "a"}]}\n'))
    loaded, counts = prompts.load_prompts([first, second, first], tiny, DEFAULT)
    expected = [[ord("P")], [ord("Q")], [*USER_IDS, *ASKED], [ord("P")]]
    assert [prompt.ids.tolist() for prompt in loaded] == expected and counts["prompts"] == 4
    second.write_bytes(gzip.compress(b'{"text": "Q"}\n\n{"text": ""}\n'))
    with pytest.raises(UserError, match="2.jsonl.gz:3: field 'text' is empty"):
        prompts.load_prompts([first, second], tiny, DEFAULT)


def test_nothing_left(tiny, tmp_path: Path):
    paths = [write_rows(tmp_path / f"{i}.jsonl", [{"text": "abcd"}, {"prompt": "abc"}]) for i in range(2)]
    with pytest.raises(UserError, match="0.jsonl, .*1.jsonl: no prompt is left, all 4 .*-len 2: raise it"):
        prompts.load_prompts(paths, tiny, PromptFormat(max_prompt_len=2))


# ---- what is refused ---------------------------------------------------------------------------------------

BROKEN = {  # a bad third line of a file, and what the message must say
    "no JSON": ("{", "not valid JSON"),
    "no object": ('["Q"]', "a row must be a JSON object"),
    "nothing": ({}, "fields none: accepted is one of"),
    "prompt-response row": ({"input": "Q", "output": "b"}, "fields 'input', 'output': accepted is one of"),
    "conversations": (
        {"system": "s", "conversations": []},
        "field 'conversations': the model was not trained on such rows",
    ),
    "whole conversations": (
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        "fields 'chosen', 'rejected': a",
    ),
    "prompt and text": ({"prompt": "Q", "text": "Q"}, "both 'prompt' and 'text': a row has one of them"),
    "prompt and messages": (
        {"prompt": "Q", "messages": [USER]},
        "both 'prompt' and 'messages': a row has one",
    ),
    "text and messages": ({"text": "Q", "messages": [USER]}, "both 'text' and 'messages': a row has one"),
    "null beside messages": ({"prompt": None, "messages": [USER]}, "both 'prompt' and 'messages'"),
    "null": ({"prompt": None}, "field 'prompt' is of type NoneType; accepted is one of"),
    "prompt is a message": ({"prompt": USER}, "field 'prompt' is of type dict; accepted is one of"),
    "text is a number": ({"text": 3}, "field 'text' is of type int; accepted is one of"),
    "text is messages": ({"text": [USER]}, "field 'text' is of type list; accepted is one of"),
    "messages is text": ({"messages": "Q"}, "field 'messages' is of type str; accepted is one of"),
    "empty prompt": ({"prompt": ""}, "field 'prompt' is empty"),
    "empty text": ({"text": ""}, "field 'text' is empty"),
    "half a character": ('{"text": "\\ud83d"}', "field 'text' holds half of a surrogate pair"),
    "no message": ({"prompt": []}, "field 'prompt' must be a list of at least one"),
    "no messages": ({"messages": []}, "field 'messages' must be a list of at least one"),
    "list of strings": ({"prompt": ["Q"]}, "field 'prompt' must be a list of at least one object"),
    "prompt with answer": (
        {"prompt": [USER, GOOD]},
        "field 'prompt': the message before the response must not be",
    ),
    "two answers": (
        {"messages": [USER, BAD, GOOD]},
        "field 'messages': the message before the response must not",
    ),
    "answer alone": ({"messages": [GOOD]}, "field 'messages': message 0: the first message must not"),
    "no content": ({"prompt": [{"role": "user"}]}, "field 'prompt': message 0: no field 'content'"),
    "unknown role": ({"messages": [USER, GOOD | {"role": "gpt"}]}, "field 'messages': message 1: role 'gpt'"),
    "broken answer": (
        {"messages": [USER, GOOD | {"content": 3}]},
        "message 1: field 'content' must be a string",
    ),
    "two BOS": ({"prompt": "<|im_start|><|im_start|>Q"}, "two BOS at the start"),
    "pair of conversations": (
        {"prompt": "a", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        "field 'prompt' is a string, but the prompt of these pairs is in the messages of 'chosen'",
    ),
    "the same by the other name": (
        {"prompt": "a", "chosen_response": [USER, GOOD]},
        "field 'prompt' is a string, but the prompt of these pairs is in the messages of 'chosen_response'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_row_is_named_by_file_and_line(name: str, tiny, tmp_path: Path):
    line, message = BROKEN[name]
    good = json.dumps({"prompt": "Q"})
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join([good, "", line if isinstance(line, str) else json.dumps(line), good]))
    with pytest.raises(UserError, match=f"(?s)^{path}:3: .*{message}"):
        prompts.load_prompts([path], tiny, DEFAULT)


def test_what_the_tokenizer_refuses(tiny, llama, llama_chat, tmp_path: Path):
    adding = PromptFormat(add_bos=True)
    with pytest.raises(UserError, match="d.jsonl:1: field 'text' is empty"):  # no token is left of it
        load([{"text": ""}], llama, tmp_path, adding)
    for tokens in (tiny, llama_chat):
        with pytest.raises(UserError, match="d.jsonl:1: two BOS at the start.*--add-bos False"):
            load([{"prompt": [USER]}], tokens, tmp_path, adding)
    with pytest.raises(UserError, match="d.jsonl:1: .*has no chat template"):
        load([{"messages": [USER]}], llama, tmp_path)
    without = copy.copy(tiny)
    without.bos_id = None
    for row in ({"prompt": "Q"}, {"prompt": [USER]}):
        with pytest.raises(UserError, match="d.jsonl:1: --add-bos True: this tokenizer has no BOS"):
            load([row], without, tmp_path, adding)


def test_template_that_says_nothing(tmp_path: Path):
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text("{% for m in messages %}{% endfor %}")
    with pytest.raises(UserError, match="d.jsonl:1: field 'prompt': the chat template renders it as nothing"):
        load([{"prompt": [USER]}], load_tokenizer(tmp_path / "model"), tmp_path, PromptFormat(add_bos=True))
