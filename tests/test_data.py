"""Data: masks worked by hand, the gate for broken files, order, packing.

With the tiny tokenizer a token is a byte; 257, 258 are <|im_start|> (BOS) and <|im_end|> (EOS).
"""

import copy
import gzip
import json
import random
import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from align.data import display, formats, jsonl, packing, sft
from align.data.hf_tokenizer import HuggingFaceTokenizer
from align.data.sentencepiece_tokenizer import SentencePieceTokenizer
from align.data.tokenizer import Tokenizer, load_tokenizer
from align.errors import UserError

TINY = Path(__file__).parent.parent / "assets" / "tiny"
BOS, EOS = 257, 258
DEFAULT = formats.FormatConfig()
GOOD = {"input": "What?", "output": "That."}


@pytest.fixture(scope="module")
def tiny() -> HuggingFaceTokenizer:
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    """A real SentencePiece model, which puts a dummy prefix in front of every text."""
    directory = tmp_path_factory.mktemp("llama")
    shutil.copy(files("mistral_common") / "data" / "tokenizer.model.v1", directory / "tokenizer.model")
    return load_tokenizer(directory)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def example(row: dict, tokens: Tokenizer, fmt: formats.FormatConfig = DEFAULT) -> packing.Example:
    return formats.format_sft(row, tokens, fmt)[0]


def spans(row: dict, tokens: Tokenizer, fmt: formats.FormatConfig = DEFAULT) -> str:
    """The row with its trained parts in brackets, control characters and all."""
    return display.show(example(row, tokens, fmt), tokens)


def chat(*contents: str) -> dict:
    """A messages row: user and assistant by turns."""
    roles = ("user", "assistant") * len(contents)
    turns = zip(roles, contents, strict=False)
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def conversation(*turns: tuple, **fields: object) -> dict:
    """A conversations row of (from, value) or (from, value, label) turns."""
    named = [dict(zip(("from", "value", "label"), turn, strict=False)) for turn in turns]
    return {"system": "S", "conversations": named, **fields}


# ---- masks, token by token ---------------------------------------------------------------------------------


def test_template_row(tiny):
    row = example({"input": "a", "output": "b"}, tiny)
    assert row.ids.tolist() == [ord("a"), ord(" "), ord("b"), EOS]
    assert row.trained.tolist() == [False, True, True, True]
    assert (row.ids.dtype, row.trained.dtype) == (np.int32, np.bool_)


def test_messages_row(tiny):
    row = example(chat("a", "b"), tiny)
    assert row.ids.tolist() == [BOS, *b"user\na", EOS, 10, BOS, *b"assistant\n", ord("b"), EOS, 10]
    assert np.flatnonzero(row.trained).tolist() == [20, 21]
    assert row.ids[[20, 21]].tolist() == [ord("b"), EOS]


def test_conversations_row(tiny):
    row = example(conversation(("User", "a"), ("Assistant", "b")), tiny)
    assert row.ids.tolist() == list(b"\x00System\nS\n\x11User\na\n\x11Assistant\nb\n\x11")
    assert np.flatnonzero(row.trained).tolist() == [29, 30, 31]
    assert bytes(row.ids[[29, 30, 31]].tolist()) == b"b\n\x11"


def test_every_answer_of_a_long_chat_is_trained_with_its_end(tiny):
    row = {"messages": [{"role": "system", "content": "s"}, *chat("a", "b", "c", "d", "e")["messages"]]}
    assert spans(row, tiny) == (
        "<|im_start|>system↵\ns<|im_end|>↵\n<|im_start|>user↵\na<|im_end|>↵\n"
        "<|im_start|>assistant↵\n⟦b<|im_end|>⟧↵\n<|im_start|>user↵\nc<|im_end|>↵\n"
        "<|im_start|>assistant↵\n⟦d<|im_end|>⟧↵\n<|im_start|>user↵\ne<|im_end|>↵\n"
    )


def test_conversation_trains_the_turn_start_that_ends_an_answer(tiny):
    row = conversation(("User", "a"), ("Assistant", "b"), ("User", "c"), ("Assistant", "d"), ("User", "e"))
    assert spans(row, tiny) == (
        r"\x00System↵|S↵|\x11User↵|a↵|\x11Assistant↵|⟦b↵|\x11⟧User↵|c↵|\x11Assistant↵|⟦d↵|\x11⟧User↵|e↵|"
    ).replace("|", "\n")


def test_value_to_text_shows_labels_and_trains_answers(tiny):
    turns = [("User", "a", None), ("Assistant", "b", "q:4"), ("User", "c"), ("Assistant", "d")]
    row = conversation(*turns, type="VALUE_TO_TEXT", mask="User")
    assert spans(row, tiny) == (
        r"\x00System↵|S↵|\x11User↵|a↵|\x11Assistant↵|\x12q:4↵|⟦b↵|\x11⟧User↵|c↵|\x11Assistant↵|⟦d↵|\x11⟧"
    ).replace("|", "\n")


def test_text_to_value_trains_labels(tiny):
    turns = [("User", "a"), ("Assistant", "b", "q:4"), ("User", "c"), ("Assistant", "d", "q:0")]
    row = conversation(*turns, type="TEXT_TO_VALUE")
    assert spans(row, tiny) == (
        r"\x00System↵|S↵|\x11User↵|a↵|\x11Assistant↵|b↵|\x12⟦q:4↵|\x11⟧User↵|c↵|\x11Assistant↵|d↵|\x12⟦q:0↵|\x11⟧"
    ).replace("|", "\n")
    first = conversation(("Assistant", "b", "q:4"), ("User", "c"), type="TEXT_TO_VALUE")
    assert spans(first, tiny) == "\\x00System↵\nS↵\n\\x11Assistant↵\nb↵\n\\x12⟦q:4↵\n\\x11⟧User↵\nc↵\n"


def test_without_a_type_labels_are_left_out(tiny):
    labelled = conversation(("User", "a"), ("Assistant", "b", "q:4"), type=None)
    plain = conversation(("User", "a"), ("Assistant", "b"))
    assert spans(labelled, tiny) == spans(plain, tiny)


def test_first_turn_answers_nothing(tiny):
    row = conversation(("Assistant", "a"), ("User", "b"), ("Assistant", "c"))
    assert spans(row, tiny).count("⟦") == 1
    assert "⟦c↵\n\\x11⟧" in spans(row, tiny)


def test_mask_names_one_role_or_several(tiny):
    turns = [("User", "a"), ("Tool", "b"), ("Assistant", "c")]
    both = spans(conversation(*turns, mask=["User", "Tool"]), tiny)
    assert both.endswith("\\x11User↵\na↵\n\\x11Tool↵\nb↵\n\\x11Assistant↵\n⟦c↵\n\\x11⟧")
    one = spans(conversation(*turns, mask="User"), tiny)
    assert one.endswith("\\x11Tool↵\n⟦b↵\n\\x11⟧Assistant↵\n⟦c↵\n\\x11⟧")
    other = spans(conversation(*turns, mask="Assistant"), tiny)
    assert other.endswith("\\x11Tool↵\n⟦b↵\n\\x11⟧Assistant↵\nc↵\n")


def test_chat_tokens_as_typed(tiny):
    fmt = formats.FormatConfig(chat_tokens=("<s>", "<t>", "<l>", r"\n\n", ":"))
    row = conversation(("User", "a"), ("Assistant", "b", "q"), type="VALUE_TO_TEXT")
    expected = "<s>System:S\n\n<t>User:a\n\n<t>Assistant:<l>q:⟦b\n\n<t>⟧"
    assert spans(row, tiny, fmt) == expected.replace("\n", "↵\n")


def test_loss_on_all_trains_every_token_but_the_first(tiny):
    fmt = formats.FormatConfig(loss_on="all")
    for row in (GOOD, chat("a", "b"), chat("a"), conversation(("User", "a"), ("Assistant", "b"))):
        trained = example(row, tiny, fmt).trained
        assert not trained[0] and trained[1:].all()


def test_bos_where_asked_for(tiny):
    fmt = formats.FormatConfig(add_bos=True)
    row = example({"input": "a", "output": "b"}, tiny, fmt)
    assert row.ids.tolist() == [BOS, *b"a b", EOS]
    assert row.trained.tolist() == [False, False, True, True, True]
    assert example(conversation(("User", "a"), ("Assistant", "b")), tiny, fmt).ids[0] == BOS
    assert example({"input": "", "output": "b"}, tiny, fmt).trained.tolist() == [False, True, True]


def test_bos_as_the_tokenizer_does(tiny):
    adding = copy.copy(tiny)
    adding.adds_bos = True
    assert example(GOOD, adding).ids[0] == BOS
    assert example(GOOD, adding, formats.FormatConfig(add_bos=False)).ids[0] == ord("W")
    assert example(chat("a", "b"), adding).ids[:2].tolist() == [BOS, ord("u")]  # the template's own


def test_answer_joins_as_in_running_text(llama):
    question, answer = "What is the capital of France?", "Paris, of course"
    row = example({"input": question, "output": answer}, llama)
    assert row.ids.tolist() == [*llama.encode(f"{question} {answer}"), llama.eos_id]
    assert llama.sp.id_to_piece(row.ids[row.trained].tolist()[0]) == "▁Paris"
    assert (~row.trained).sum() == len(llama.encode(question))


def test_conversation_with_a_dummy_prefix(llama):
    row = example(conversation(("User", "Hi there"), ("Assistant", "Hello")), llama)
    assert row.ids.tolist() == llama.encode("\x00System\nS\n\x11User\nHi there\n\x11Assistant\nHello\n\x11")
    trained = [llama.sp.id_to_piece(i) for i in row.ids[row.trained].tolist()]
    assert trained == ["Hello", "<0x0A>", "\x11"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{input} {output}", "q⟦ a<|im_end|>⟧"),
        ("Q: {input} A: {output}", "Q: q A:⟦ a<|im_end|>⟧"),
        (r"{input}\n{output}", "q⟦↵\na<|im_end|>⟧"),
        (r"{input}\n### Answer:\n{output}", "q↵\n### Answer:↵\n⟦a<|im_end|>⟧"),
        ("{{x}} {input}{output}", "{x} q⟦a<|im_end|>⟧"),
        ("{input}/{input}: {output}", "q/q:⟦ a<|im_end|>⟧"),
    ],
)
def test_prompt_templates(template: str, expected: str, tiny):
    assert spans({"input": " q ", "output": "  a "}, tiny, formats.FormatConfig(template)) == expected


def test_fields_are_those_of_the_template(tiny):
    fmt = formats.FormatConfig("{question}={answer}", truncation_field="question")
    assert spans({"question": "q", "answer": "a", "n": 3}, tiny, fmt) == "q=⟦a<|im_end|>⟧"


def test_empty_answer_is_eos_alone(tiny):
    assert spans({"input": "q", "output": " "}, tiny) == "q⟦<|im_end|>⟧"


def test_rows_are_not_changed(tiny):
    turns = [("User", " a "), ("Assistant", "b", "q:4")]
    rows = [
        GOOD,
        chat("a", "b"),
        conversation(*turns, type="VALUE_TO_TEXT"),
        {"input": " a" * 99, "output": "b"},
    ]
    before = copy.deepcopy(rows)
    first = [example(row, tiny, formats.FormatConfig(max_seq_len=40)).ids.tolist() for row in rows]
    again = [example(row, tiny, formats.FormatConfig(max_seq_len=40)).ids.tolist() for row in rows]
    assert rows == before
    assert first == again


def test_pad_may_be_eos(tiny):
    same = copy.copy(tiny)
    same.pad_id = same.eos_id
    for row in (GOOD, chat("a", "b", "c", "d")):
        assert spans(row, same) == spans(row, tiny)
    batch = packing.collate([[example(GOOD, same)]], multiple=16)
    assert batch.mask.sum() == len(" That.") + 1
    assert batch.targets[batch.mask > 0][-1] == EOS


# ---- rows that are too long --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "expected"), [("right", "abcd⟦ xyz<|im_end|>⟧"), ("left", "fghi⟦ xyz<|im_end|>⟧")]
)
def test_prompt_gives_way(side: str, expected: str, tiny):
    fmt = formats.FormatConfig(truncation_side=side, max_seq_len=9)
    row, cut = formats.format_sft({"input": "abcdefghi", "output": "xyz"}, tiny, fmt)
    assert display.show(row, tiny) == expected
    assert cut
    whole, cut = formats.format_sft({"input": "abcd", "output": "xyz"}, tiny, fmt)
    assert (len(whole.ids), cut) == (9, False)


def test_fields_share_the_cut(tiny):
    fmt = formats.FormatConfig("{a}|{b}|{c}|{output}", truncation_field="a, b", max_seq_len=16)
    row = {"a": "aaaaaaaa", "b": "bbbbbbbb", "c": "cc", "output": "xyz"}  # 25 tokens, so 9 must go
    assert spans(row, tiny, fmt) == "aaa|bbbb|cc|⟦xyz<|im_end|>⟧"
    short = row | {"a": "a", "b": "b" * 15}  # a has 1 of the 9 to give
    assert spans(short, tiny, fmt) == "|bbbbbbb|cc|⟦xyz<|im_end|>⟧"


def test_a_cut_leaves_no_half_character(tiny):
    row = {"input": "é" * 10, "output": "x"}  # two tokens each
    assert spans(row, tiny, formats.FormatConfig(max_seq_len=10)) == "ééé⟦ x<|im_end|>⟧"
    left = formats.FormatConfig(max_seq_len=10, truncation_side="left")
    assert spans(row, tiny, left) == "ééé⟦ x<|im_end|>⟧"


def test_cut_with_a_dummy_prefix(llama):
    words = " ".join(["capital", "France", "Paris"] * 20)
    row = example({"input": words, "output": "London"}, llama, formats.FormatConfig(max_seq_len=12))
    assert llama.decode(row.ids.tolist()) == " ".join(words.split()[:10]) + " London</s>"


def test_long_rows_are_cut_on_the_right_or_dropped(tiny, tmp_path: Path):
    fmt = formats.FormatConfig(max_seq_len=24)
    rows = [
        {"input": "q", "output": "a"},  # fits
        {"input": "q" * 40, "output": "a" * 10},  # the prompt gives way
        {"input": "q", "output": "a" * 40},  # no prompt is enough: prompt gone, answer cut, EOS lost
        chat("a", "b" * 9),  # 22 tokens before the answer: 2 of it are left
        chat("abcde", "b"),  # nothing trained is left
    ]
    examples, counts = sft.load_sft([write_rows(tmp_path / "d.jsonl", rows)], tiny, fmt)
    assert counts == {
        "rows": 5,
        "cut_prompts": 2,
        "cut_answers": 2,
        "dropped": 1,
        "tokens": 4 + 24 + 24 + 24,
        "trained_tokens": 3 + 12 + 23 + 4,
    }
    shown = [display.show(row, tiny) for row in examples]
    assert shown[1] == "q" * 12 + "⟦ " + "a" * 10 + "<|im_end|>⟧"
    assert shown[2] == "a⟦" + "a" * 23 + "⟧"
    assert shown[3].endswith("assistant↵\n⟦bbbb⟧")


def test_counts_and_order_of_files(tiny, tmp_path: Path):
    first = write_rows(tmp_path / "1.jsonl", [{"input": "a", "output": "b"}, chat("a", "b")])
    second = write_rows(tmp_path / "2.jsonl", [{"input": "c", "output": "d"}])
    examples, counts = sft.load_sft([first, second], tiny, DEFAULT)
    assert [row.ids[0] for row in examples] == [ord("a"), BOS, ord("c")]
    assert counts["rows"] == 3
    assert counts["tokens"] == 4 + 23 + 4
    assert counts["trained_tokens"] == 3 + 2 + 3 == packing.num_trained(examples)


def test_only_dropped_rows(tiny, tmp_path: Path):
    path = write_rows(tmp_path / "d.jsonl", [chat("a" * 99, "b")] * 3)
    with pytest.raises(UserError, match="d.jsonl: no row is left.*all 3 .*--max-seq-len 50: raise it"):
        sft.load_sft([path], tiny, formats.FormatConfig(max_seq_len=50))


# ---- the gate ----------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
BROKEN = {  # a bad third line of a file, and what the message must say
    "malformed JSON": ('{"input": "a", ', "not valid JSON"),
    "text after the object": ('{"input": "a"} x', "not valid JSON"),
    "not UTF-8": (b'{"input": "\xff", "output": "b"}', "not valid JSON"),
    "a list": ('["a", "b"]', "must be a JSON object, this is a list"),
    "no answer field": ({"input": "a"}, "no field 'output' .*the row has: 'input'"),
    "other fields": ({"question": "a", "answer": "b"}, "fields 'question', 'answer': a row has 'messages', "),
    "number as field": ({"input": 3, "output": "b"}, "field 'input' must be a string, not int"),
    "null as field": ({"input": "a", "output": None}, "field 'output' must be a string, not NoneType"),
    "half a character": (
        '{"input": "\\ud83d", "output": "b"}',
        "field 'input' holds half of a surrogate pair",
    ),
    "nothing at all": ({"input": "", "output": ""}, "no trained token"),
    "messages are text": ({"messages": "a"}, "field 'messages' must be a list of at least one object"),
    "messages are empty": ({"messages": []}, "field 'messages' must be a list of at least one object"),
    "a message is text": (
        {"messages": [USER, "b"]},
        "field 'messages' must be a list of at least one object",
    ),
    "no role": ({"messages": [USER, {"content": "b"}]}, "message 1: no field 'role'"),
    "unknown role": ({"messages": [USER, ANSWER | {"role": "gpt"}]}, "message 1: role 'gpt' is not one of"),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, "message 1: no field 'content'"),
    "content in parts": (
        {"messages": [USER | {"content": [{"type": "image_url"}]}, ANSWER]},
        "message 0: field 'content' has a part that is not text",
    ),
    "no answer": ({"messages": [USER, USER]}, "no trained token: the row has no response"),
    "answer first": (
        {"messages": [ANSWER, USER]},
        "message 0: the first message must not be the assistant's",
    ),
    "no system": ({"conversations": [{"from": "User", "value": "a"}]}, "no field 'system'"),
    "no value": (conversation(("User", "a"), ("Assistant",)), "turn 1: no field 'value'"),
    "no from": (conversation(("User", "a")) | {"conversations": [{"value": "a"}]}, "turn 0: no field 'from'"),
    "label is a number": (
        conversation(("User", "a"), ("Assistant", "b", 4)),
        "turn 1: field 'label' must be a",
    ),
    "no turns": (conversation(), "field 'conversations' must be a list of at least one object"),
    "unknown type": (
        conversation(("User", "a"), type="TTV"),
        "field 'type' must be VALUE_TO_TEXT, .*not 'TTV'",
    ),
    "mask is a number": (
        conversation(("User", "a"), mask=1),
        "field 'mask' must be a role or a list .*not 1",
    ),
    "masked role absent": (
        conversation(("Human", "a"), ("Bot", "b")),
        "field 'mask' excludes User, but no turn",
    ),
    "only masked turns": (conversation(("User", "a"), ("User", "b")), "no trained token"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_row_is_named_by_file_and_line(name: str, tiny, tmp_path: Path):
    line, message = BROKEN[name]
    raw = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + raw + b"\n" + json.dumps(GOOD).encode() + b"\n")
    with pytest.raises(UserError, match=f"^{path}:3: .*{message}"):
        sft.load_sft([path], tiny, DEFAULT)


CHATML = (TINY / "chat_template.jinja").read_text()
BAD_TEMPLATES = {  # chat templates that spoil any training, and what the message must say
    "forgets early answers": (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}",
        "the chat template's rendering of a prefix is not a prefix of the whole",
    ),
    "counts the messages": (
        "{{ messages | length }}" + CHATML,
        "rendering of a prefix is not a prefix of the whole",
    ),
    "ends no turn": (
        CHATML.replace("<|im_end|>", ""),
        "end of turn not trained: .* message 1 .*eos_token_id",
    ),
    "starts twice": ("<|im_start|>" + CHATML, "two BOS at the start"),
    "wants turns to alternate": (
        "{{ raise_exception('alternate!') }}",
        "the chat template refuses .*alternate!",
    ),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_bad_chat_template_is_refused(name: str, tmp_path: Path):
    template, message = BAD_TEMPLATES[name]
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(template)
    path = write_rows(tmp_path / "d.jsonl", [GOOD, chat("a", "b", "c", "d")])
    with pytest.raises(UserError, match=f"^{path}:2: .*{message}"):
        sft.load_sft([path], load_tokenizer(tmp_path / "model"), DEFAULT)


def test_messages_need_a_chat_template(llama, tmp_path: Path):
    path = write_rows(tmp_path / "d.jsonl", [chat("a", "b")])
    with pytest.raises(UserError, match=f"^{path}:1: .*no chat template"):
        sft.load_sft([path], llama, DEFAULT)


def test_token_across_the_start_of_an_answer(tmp_path: Path):
    shutil.copytree(TINY, tmp_path / "model")
    spec = json.loads((tmp_path / "model/tokenizer.json").read_text())
    spec["model"]["vocab"]["ĊĊ"] = 259  # two line ends as one token, as real vocabularies have it
    spec["model"]["merges"] = [["Ċ", "Ċ"]]
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(spec))
    tokens = load_tokenizer(tmp_path / "model")
    assert tokens.encode("\n\n") == [259]
    path = write_rows(tmp_path / "d.jsonl", [chat("a", "b"), chat("a", "\nb")])
    with pytest.raises(UserError, match=f"^{path}:2: the tokens of a prefix .* a token reaches across"):
        sft.load_sft([path], tokens, DEFAULT)


def test_two_bos(tiny, tmp_path: Path):
    fmt = formats.FormatConfig("<|im_start|>{input} {output}", add_bos=True)
    for row in (chat("a", "b"), {"input": "a", "output": "b"}):
        path = write_rows(tmp_path / "d.jsonl", [row])
        with pytest.raises(UserError, match=f"^{path}:1: two BOS at the start.*--add-bos False"):
            sft.load_sft([path], tiny, fmt)


def test_bos_that_the_tokenizer_lacks(tiny):
    without = copy.copy(tiny)
    without.bos_id = None
    with pytest.raises(UserError, match="--add-bos True: this tokenizer has no BOS"):
        example(GOOD, without, formats.FormatConfig(add_bos=True))


def test_files_without_rows(tiny, tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("\n  \n")
    with pytest.raises(UserError, match="empty.jsonl: no rows in this file"):
        sft.load_sft([tmp_path / "empty.jsonl"], tiny, DEFAULT)
    for name in ("absent.jsonl", "."):
        with pytest.raises(UserError, match="cannot be read|is a directory: give its files"):
            sft.load_sft([tmp_path / name], tiny, DEFAULT)


def test_broken_gzip(tmp_path: Path):
    whole = gzip.compress(b"".join(json.dumps({"n": n}).encode() + b"\n" for n in range(1000)))
    spoilt = whole[:200] + bytes(200) + whole[400:]
    for content in (b'{"not": "gzip"}', whole[: len(whole) // 2], spoilt):
        (tmp_path / "d.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match="d.jsonl.gz: cannot be read"):
            jsonl.read_jsonl(tmp_path / "d.jsonl.gz")


def test_read_jsonl(tmp_path: Path):
    text = '{"n": 1}\n\n  \n{"n": "\\u00e9é"}'
    (tmp_path / "d.jsonl").write_text(text)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("d.jsonl", "d.jsonl.gz"):
        path = tmp_path / name
        assert jsonl.read_jsonl(path) == [(f"{path}:1", {"n": 1}), (f"{path}:4", {"n": "éé"})]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            dict(prompt_template="{input}: {output}."),
            "--prompt-template .* must end with the field of the response",
        ),
        (dict(prompt_template="plain"), "--prompt-template 'plain' must end with the field"),
        (dict(prompt_template=""), "--prompt-template '' must end with the field"),
        (dict(prompt_template="{input} {"), "--prompt-template .*write braces that are text twice"),
        (dict(prompt_template="{input!r} {output}"), "braces must hold the name of a field"),
        (dict(prompt_template="{} {output}"), "braces must hold the name of a field"),
        (dict(prompt_template="{input}\\"), "--prompt-template .*backslash that starts no escape"),
        (dict(truncation_field="context"), "--truncation-field 'context' is not in --prompt-template"),
        (dict(truncation_field="input,"), "--truncation-field '' is not in"),
        (dict(chat_tokens=("a", "", "c", "d", "e")), "--chat-tokens: the second"),
    ],
)
def test_flags_that_cannot_be(flags: dict, message: str):
    with pytest.raises(UserError, match=message):
        formats.FormatConfig(**flags)


def test_check_size():
    packing.check_size(8, 8, "--train-data")
    with pytest.raises(UserError, match="--train-data has 7 usable rows.*--global-batch-size 8"):
        packing.check_size(7, 8, "--train-data")


def test_check_budget():
    def budget(tokens: int) -> packing.BatchConfig:
        return packing.BatchConfig(micro_batch_tokens=tokens)

    packing.check_budget(512, budget(512), 512)
    packing.check_budget(256, budget(512), 512, per_row=2)
    with pytest.raises(UserError, match="--max-seq-len 513 is beyond the model's context of 512"):
        packing.check_budget(513, budget(1024), 512)
    with pytest.raises(UserError, match="--max-seq-len 512 is above --micro-batch-tokens 511"):
        packing.check_budget(512, budget(511), 1024)
    with pytest.raises(UserError, match="257, of which a row has 2, is above --micro-batch-tokens 512"):
        packing.check_budget(257, budget(512), 1024, per_row=2)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"\x11\n\t", "\x11\n\t"),
        ("\x11\n", "\x11\n"),
        ("é日😀<extra_id_1>", "é日😀<extra_id_1>"),
        (r"é\n日\u00e9", "é\n日é"),
        (r"a\\n", r"a\n"),
    ],
)
def test_unescape(typed: str, meant: str):
    assert formats.unescape(typed) == meant


# ---- order and packing -------------------------------------------------------------------------------------


def test_global_batch_is_a_permutation_per_epoch():
    epochs = [
        [packing.global_batch(23, 4, seed=7, step=5 * epoch + i) for i in range(5)] for epoch in range(3)
    ]
    for batches in epochs:
        rows = [row for batch in batches for row in batch]
        assert len(set(rows)) == 20 and set(rows) <= set(range(23))  # the tail of 3 is left out
        assert [len(batch) for batch in batches] == [4] * 5
    assert epochs[0] != epochs[1] != epochs[2]
    left_out = [set(range(23)) - {row for batch in batches for row in batch} for batches in epochs]
    assert left_out[0] != left_out[1]  # another tail each time


def test_global_batch_depends_on_its_arguments_alone():
    forward = [packing.global_batch(100, 8, seed=1, step=step) for step in range(40)]
    backward = [packing.global_batch(100, 8, seed=1, step=step) for step in reversed(range(40))]
    assert forward == backward[::-1]
    assert forward != [packing.global_batch(100, 8, seed=2, step=step) for step in range(40)]
    assert all(type(row) is int for row in forward[0])
    assert packing.global_batch(5, 5, seed=0, step=3) != packing.global_batch(5, 5, seed=0, step=4)


def test_plan_by_hand():
    # 8 + 2, 5 + 5: two micro-batches of 10 hold all; each of two ranks gets one
    assert packing.plan_micro_batches([5, 8, 5, 2], ranks=2, max_tokens=10, max_rows=None) == [
        [[1, 3]],
        [[0, 2]],
    ]
    assert packing.plan_micro_batches([5, 8, 5, 2], ranks=1, max_tokens=10, max_rows=None) == [
        [[1, 3], [0, 2]]
    ]
    assert packing.plan_micro_batches([5, 8, 5, 2], ranks=1, max_tokens=20, max_rows=None) == [[[0, 1, 2, 3]]]
    # 19 tokens would fit twice into 10, these four rows do not
    assert packing.plan_micro_batches([7, 4, 4, 4], ranks=1, max_tokens=10, max_rows=None) == [
        [[1, 3], [0], [2]]
    ]
    assert packing.plan_micro_batches([3], ranks=2, max_tokens=10, max_rows=None) == [[[0]], [[]]]
    assert packing.plan_micro_batches([], ranks=2, max_tokens=10, max_rows=None) == [[[]], [[]]]


@pytest.mark.parametrize("seed", range(40))
def test_plan_properties(seed: int):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 300) for _ in range(rng.randint(1, 80))]
    ranks, max_tokens = rng.randint(1, 5), rng.randint(300, 1200)
    max_rows = rng.choice([None, 1, 3])
    planned = packing.plan_micro_batches(lengths, ranks, max_tokens, max_rows)
    micro_batches = [rows for rank in planned for rows in rank]
    assert sorted(row for rows in micro_batches for row in rows) == list(range(len(lengths)))
    assert all(rows == sorted(rows) for rows in micro_batches)
    assert all(sum(lengths[row] for row in rows) <= max_tokens for rows in micro_batches)
    assert all(len(rows) <= (max_rows or len(lengths)) for rows in micro_batches)
    assert len(planned) == ranks and len({len(rank) for rank in planned}) == 1
    assert planned == packing.plan_micro_batches(lengths, ranks, max_tokens, max_rows)
    loads = [sum(lengths[row] for rows in rank for row in rows) for rank in planned]
    assert max(loads) - min(loads) <= max(lengths)


@pytest.mark.parametrize("seed", range(20))
def test_plan_needs_few_and_even_micro_batches(seed: int):
    rng = random.Random(seed)
    lengths = [rng.randint(20, 250) for _ in range(128)]
    planned = packing.plan_micro_batches(lengths, ranks=4, max_tokens=1024, max_rows=None)
    least = -(-sum(lengths) // (4 * 1024))
    assert least <= len(planned[0]) <= least + 1
    loads = [sum(lengths[row] for row in rows) for rank in planned for rows in rank]
    assert max(loads) <= 1.1 * sum(loads) / len(loads)


def test_plan_refuses_a_row_above_the_budget():
    with pytest.raises(UserError, match="--micro-batch-tokens 10 is too few for a row of 11"):
        packing.plan_micro_batches([3, 11], ranks=2, max_tokens=10, max_rows=None)


def make_example(ids: list[int], trained: list[int]) -> packing.Example:
    return packing.Example(np.array(ids, np.int32), np.array(trained, bool))


def test_collate_by_hand():
    examples = [make_example([5, 6, 7, 8], [0, 0, 1, 1]), make_example([9, 10, 11], [0, 1, 0])]
    batch = packing.collate([[row] for row in examples], multiple=4)
    assert batch.tokens.tolist() == [5, 6, 7, 9, 10, 0, 0, 0]
    assert batch.targets.tolist() == [6, 7, 8, 10, 11, 0, 0, 0]
    assert batch.mask.tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.lengths == [3, 2] == [row.num_inputs for row in examples]
    types = [batch.tokens.dtype, batch.targets.dtype, batch.mask.dtype, batch.positions.dtype]
    assert types == [torch.int64, torch.int64, torch.float32, torch.int64]
    assert batch.cu_seqlens.dtype == torch.int32


def test_collate_pads_only_where_it_must():
    row = make_example([1, 2, 3, 4, 5], [0, 1, 1, 1, 1])
    assert len(packing.collate([[row]]).tokens) == 4
    assert len(packing.collate([[row]], multiple=4).tokens) == 4
    assert len(packing.collate([[row]], multiple=3).tokens) == 6


def test_collate_of_nothing_is_padding():
    batch = packing.collate([], multiple=8)
    assert batch.tokens.tolist() == [0] * 8
    assert batch.positions.tolist() == list(range(8))
    assert batch.mask.sum() == 0
    assert (batch.cu_seqlens.tolist(), batch.lengths) == ([0], [])
    assert len(packing.collate([]).tokens) == 1


def test_collate_keeps_every_trained_token(tiny):
    rows = [example(chat("a" * n, "b" * (2 * n)), tiny) for n in range(1, 9)]
    batch = packing.collate([[row] for row in rows], multiple=64)
    assert batch.mask.sum() == packing.num_trained(rows) == sum(2 * n + 1 for n in range(1, 9))
    for i, row in enumerate(rows):
        part = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
        assert batch.targets[part][batch.mask[part] > 0].tolist() == row.ids[row.trained].tolist()


def test_collate_shares_the_common_beginning():
    """By hand: the second answer repeats the prompt's last token, which has another target there."""
    first = make_example([5, 6, 7, 8, 9], [0, 0, 0, 1, 1])
    second = make_example([5, 6, 7, 10, 11, 12], [0, 0, 0, 1, 1, 1])
    other = make_example([5, 6], [0, 1])  # a row of its own
    batch = packing.collate([[first, second], [other]], multiple=5)
    assert batch.tokens.tolist() == [5, 6, 7, 8, 7, 10, 11, 5, 0, 0]
    assert batch.targets.tolist() == [6, 7, 8, 9, 10, 11, 12, 6, 0, 0]
    assert batch.mask.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2, 3, 4, 0, 0, 1]
    assert batch.lengths == [4, 3, 1]
    assert batch.prefixes == [(0, 0), (0, 2), (7, 0)]
    assert packing.num_places([first, second]) == 7


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        (([1, 2, 3, 4], [0, 0, 1, 1]), ([1, 2, 5, 6], [0, 0, 1, 1]), 1),
        (([1, 2, 3, 4], [0, 0, 1, 1]), ([1, 2, 3, 6], [0, 0, 1, 1]), 1),  # 3 is trained: it stays its own
        (([1, 2, 3, 4], [0, 0, 0, 1]), ([1, 2, 3, 6], [0, 0, 0, 1]), 2),
        (
            ([1, 2, 3, 0], [0, 0, 0, 1]),
            ([1, 2, 3, 9, 0], [0, 0, 0, 0, 1]),
            3,
        ),  # scored: one continues the other
        (([1, 2, 3, 9, 0], [0, 0, 0, 0, 1]), ([1, 2, 3, 0], [0, 0, 0, 1]), 2),  # its score is its own
        (([1, 2], [0, 1]), ([3, 2], [0, 1]), 0),
        (([1, 2], [0, 1]), ([1, 3], [0, 1]), 0),
    ],
)
def test_shared_places(first, second, shared):
    assert packing.shared_places([make_example(*first), make_example(*second)]) == [0, shared]


def test_batch_moves():
    batch = packing.collate([[make_example([1, 2, 3], [0, 1, 1])]]).to("meta")
    assert all(
        x.is_meta for x in (batch.tokens, batch.targets, batch.mask, batch.positions, batch.cu_seqlens)
    )
    assert batch.lengths == [2]


# ---- what the user is shown --------------------------------------------------------------------------------


def test_show_keeps_spaces_and_marks(tiny, llama):
    assert spans({"input": "a b", "output": "c d"}, tiny) == "a b⟦ c d<|im_end|>⟧"
    assert spans({"input": "a b", "output": "c d"}, llama) == "a b⟦ c d</s>⟧"
    row = example({"input": "a", "output": "b\n\x11\tc"}, tiny)
    assert display.show(row, tiny) == "a⟦ b↵\n\\x11\\tc<|im_end|>⟧"
    assert display.show(replace(row, trained=np.zeros(len(row.ids), bool)), tiny).count("⟦") == 0
