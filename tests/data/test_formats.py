"""Rows as tokens: masks worked by hand, long rows, rows and templates that are refused.

With the tiny tokenizer a token is a byte; 257, 258 are <|im_start|> (BOS) and <|im_end|> (EOS).
"""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from align.data import display, formats, packing, sft
from align.data.tokenizer import Tokenizer, load_tokenizer
from align.errors import UserError
from tests.support.files import TINY, write_rows
from tests.support.rows import chat

BOS, EOS = 257, 258
DEFAULT = formats.FormatConfig()
GOOD = {"input": "What?", "output": "That."}


def example(row: dict, tokens: Tokenizer, fmt: formats.FormatConfig = DEFAULT) -> packing.Example:
    return formats.format_sft(row, tokens, fmt)[0]


def spans(row: dict, tokens: Tokenizer, fmt: formats.FormatConfig = DEFAULT) -> str:
    """The row with its trained parts in brackets, control characters and all."""
    return display.show(example(row, tokens, fmt), tokens)


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


# ---- what the user is shown --------------------------------------------------------------------------------


def test_show_keeps_spaces_and_marks(tiny, llama):
    assert spans({"input": "a b", "output": "c d"}, tiny) == "a b⟦ c d<|im_end|>⟧"
    assert spans({"input": "a b", "output": "c d"}, llama) == "a b⟦ c d</s>⟧"
    row = example({"input": "a", "output": "b\n\x11\tc"}, tiny)
    assert display.show(row, tiny) == "a⟦ b↵\n\\x11\\tc<|im_end|>⟧"
    assert display.show(replace(row, trained=np.zeros(len(row.ids), bool)), tiny).count("⟦") == 0
