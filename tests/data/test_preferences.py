"""Preference data: ids worked by hand, what is dropped, what is refused, where a score is read.

With the tiny tokenizer a token is a byte; 257, 258 are <|im_start|> (BOS) and <|im_end|> (EOS).
"""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from align.data import jsonl, packing, preferences, row_counts
from align.data.hf_tokenizer import HuggingFaceTokenizer
from align.data.preferences import Pair, PreferenceFormat
from align.data.tokenizer import Tokenizer, load_tokenizer
from align.errors import UserError
from tests.support.files import TINY, write_rows

BOS, EOS = 257, 258
DEFAULT = PreferenceFormat()
TEXT = {"prompt": "Q:", "chosen": " b", "rejected": " cd"}
USER = {"role": "user", "content": "a"}
GOOD, BAD = {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "cd"}
PROMPT_IDS = [BOS, *b"user\na", EOS, 10, BOS, *b"assistant\n"]  # of USER


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    """The tiny tokenizer with three merges: 259 is two line ends, 260 is " a", 261 is ": "."""
    directory = tmp_path_factory.mktemp("bpe") / "model"
    shutil.copytree(TINY, directory)
    spec = json.loads((directory / "tokenizer.json").read_text())
    special = {token["content"]: token["id"] for token in spec["added_tokens"]}
    spec["model"]["vocab"] |= {**special, "ĊĊ": 259, "Ġa": 260, ":Ġ": 261}
    spec["model"]["merges"] = [["Ċ", "Ċ"], ["Ġ", "a"], [":", "Ġ"]]
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    return load_tokenizer(directory)


def load(
    rows: list[dict], tokens: Tokenizer, path: Path, fmt: PreferenceFormat = DEFAULT
) -> tuple[list[Pair], dict[str, int]]:
    """The pairs of a file of these rows, {"text"} lines among them."""
    return preferences.load_pairs([write_rows(path / "d.jsonl", rows)], tokens, fmt, text_lines=True)


def split_ids(example: packing.Example) -> tuple[list[int], list[int]]:
    """Ids before and of the response, which must be trained in one piece up to the end."""
    start = len(example.ids) - int(example.trained.sum())
    assert example.trained[start:].all() and (example.ids.dtype, example.trained.dtype) == (np.int32, bool)
    return example.ids[:start].tolist(), example.ids[start:].tolist()


def one(row: dict, tokens: Tokenizer, path: Path, fmt: PreferenceFormat = DEFAULT) -> tuple:
    """(prompt ids, chosen ids, rejected ids) of a row with both sides."""
    [pair], _ = load([row], tokens, path, fmt)
    (prompt, chosen), (again, rejected) = map(split_ids, pair.examples)
    assert prompt == again
    return prompt, chosen, rejected


# ---- ids, by hand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", "_response"])
def test_text_row(suffix: str, tiny, tmp_path: Path):
    row = {"prompt": "Q:", f"chosen{suffix}": " b", f"rejected{suffix}": " cd", "source": "x"}
    assert one(row, tiny, tmp_path) == ([*b"Q:"], [*b" b", EOS], [*b" cd", EOS])


def test_text_is_taken_as_it_is(tiny, tmp_path: Path):
    row = {"prompt": " Q \n", "chosen": "  b ", "rejected": ""}
    assert one(row, tiny, tmp_path) == ([*b" Q \n"], [*b"  b ", EOS], [EOS])


def test_eos_once_or_not_at_all(tiny, tmp_path: Path):
    row = {"prompt": "Q:", "chosen": "b<|im_end|>", "rejected": "c"}
    assert one(row, tiny, tmp_path)[1:] == ([ord("b"), EOS], [ord("c"), EOS])
    assert one(row, tiny, tmp_path, PreferenceFormat(append_eos=False))[1:] == ([ord("b"), EOS], [ord("c")])
    other_stop = copy.copy(tiny)
    other_stop.stop_ids = {EOS, ord("!")}
    row = {"prompt": "Q:", "chosen": "b!", "rejected": "c!?"}
    assert one(row, other_stop, tmp_path)[1:] == ([*b"b!"], [*b"c!?", EOS])


def test_bos_of_text(tiny, tmp_path: Path):
    adding = copy.copy(tiny)
    adding.adds_bos = True
    assert one(TEXT, adding, tmp_path)[0] == [BOS, *b"Q:"]
    assert one(TEXT, tiny, tmp_path, PreferenceFormat(add_bos=True))[0] == [BOS, *b"Q:"]
    assert one(TEXT, adding, tmp_path, PreferenceFormat(add_bos=False))[0] == [*b"Q:"]
    [pair], _ = load([{"text": "a"}, {"text": "b"}], adding, tmp_path)
    assert pair.rejected.ids.tolist() == [BOS, ord("b"), EOS]


def test_a_prompt_is_tokenised_without_its_response(bpe, tmp_path: Path):
    assert bpe.encode("\n\n") == [259] and bpe.encode(": a") == [ord(":"), 260]
    row = {"prompt": "Q\n", "chosen": "\nb", "rejected": "c"}
    assert one(row, bpe, tmp_path) == ([ord("Q"), 10], [10, ord("b"), EOS], [ord("c"), EOS])
    row = {"prompt": "Q:", "chosen": " a", "rejected": " b"}
    assert one(row, bpe, tmp_path) == ([ord("Q"), ord(":")], [260, EOS], [*b" b", EOS])


def test_no_dummy_prefix_inside(llama, tmp_path: Path):
    row = {"prompt": "User: Hi\n\nAssistant:", "chosen": " Hello", "rejected": "Hello"}
    pieces = [[llama.sp.id_to_piece(i) for i in ids] for ids in one(row, llama, tmp_path)]
    assert pieces[0] == ["▁User", ":", "▁Hi", "<0x0A>", "<0x0A>", "Ass", "istant", ":"]
    assert pieces[1:] == [["▁Hello", "</s>"], ["Hello", "</s>"]]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen_response": GOOD, "rejected_response": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "a", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 7.5},
    ],
)
def test_messages_end_at_the_stop_token(row: dict, tiny, tmp_path: Path):
    assert one(row, tiny, tmp_path) == (PROMPT_IDS, [ord("b"), EOS], [*b"cd", EOS])


def test_only_the_last_answer_is_trained(tiny, tmp_path: Path):
    row = {"prompt": [USER, BAD, USER], "chosen": GOOD, "rejected": BAD}
    before = [*PROMPT_IDS, *b"cd", EOS, 10, *PROMPT_IDS]
    assert one(row, tiny, tmp_path) == (before, [ord("b"), EOS], [*b"cd", EOS])


def test_flags_of_text_leave_messages_alone(tiny, tmp_path: Path):
    adding = copy.copy(tiny)
    adding.adds_bos = True
    row = {"prompt": [USER], "chosen": GOOD, "rejected": BAD}
    assert one(row, adding, tmp_path, PreferenceFormat(append_eos=False)) == one(row, tiny, tmp_path)


def test_text_lines(tiny, tmp_path: Path):
    rows = [{"text": "Q: b", "margin": 2}, {"text": "Q: cd"}, TEXT, {"text": "x"}, {"text": "y"}]
    pairs, counts = load(rows, tiny, tmp_path)
    assert [pair.chosen.ids.tolist() for pair in pairs] == [[*b"Q: b", EOS]] * 2 + [[ord("x"), EOS]]
    assert [pair.rejected.ids.tolist() for pair in pairs] == [[*b"Q: cd", EOS]] * 2 + [[ord("y"), EOS]]
    assert [pair.chosen.trained.any() for pair in pairs] == [False, True, False]
    assert [pair.margin for pair in pairs] == [2.0, 0.0, 0.0]
    assert counts == {
        "pairs": 3,
        "with_rewards": 0,
        "dropped_too_long": 0,
        "dropped_identical": 0,
        "tokens": 5 + 6 + 5 + 6 + 2 + 2,
        "response_tokens": 3 + 4,
    }
    plain, _ = load(rows[:2], tiny, tmp_path, PreferenceFormat(append_eos=False))
    assert plain[0].chosen.ids.tolist() == [*b"Q: b"]


def test_numbers_beside_a_pair(tiny, tmp_path: Path):
    rewards = {"chosen_reward": 3.5, "rejected_reward": -1}
    rows = [TEXT, TEXT | {"margin": 0.25}, TEXT | rewards, TEXT | {"margin": 0} | rewards]
    pairs, _ = load(rows, tiny, tmp_path)
    assert [(pair.margin, pair.reward_gap) for pair in pairs] == [(0, 1), (0.25, 1), (0, 4.5), (0, 4.5)]


# ---- the same prompt ids in comparisons and in generation --------------------------------------------------

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
    [("tiny", "messages"), ("bpe", "messages"), ("llama_chat", "messages")]
    + [("tiny", "text"), ("bpe", "text"), ("llama", "text"), ("llama_chat", "text")],
)
def test_prompt_ids_are_those_of_generation(
    name: str, style: str, request: pytest.FixtureRequest, tmp_path: Path
):
    tokens = request.getfixturevalue(name)
    raw = write_rows(
        tmp_path / "hh.jsonl", [{"chosen": chosen, "rejected": rejected} for chosen, rejected in HH]
    )
    prepare_data.hh((raw,), tmp_path, test_fraction=0.5, style=style)
    for part in ("train", "test"):
        pairs, _ = preferences.load_pairs([tmp_path / f"{part}_comparisons.jsonl"], tokens, DEFAULT)
        prompts = [row["prompt"] for _, row in jsonl.read_jsonl(tmp_path / f"{part}_prompts.jsonl")]
        rendered = [p if style == "text" else tokens.render(p, add_generation_prompt=True) for p in prompts]
        expected = [tokens.encode(text) for text in rendered]
        for side in (side for pair in pairs for side in pair.examples):
            assert split_ids(side)[0] in expected
        assert len(pairs) == len(expected) == len(set(map(tuple, expected)))


def test_template_with_its_own_bos(llama_chat, tmp_path: Path):
    row = {"prompt": [USER], "chosen": GOOD, "rejected": BAD}
    prompt, chosen, _ = one(row, llama_chat, tmp_path)
    assert prompt == llama_chat.encode("<s>[INST] a [/INST]") and prompt.count(llama_chat.bos_id) == 1
    assert llama_chat.hf.convert_ids_to_tokens(chosen) == ["▁b", "▁", "</s>"]


# ---- what is dropped ---------------------------------------------------------------------------------------


def test_long_and_identical_pairs_are_dropped_never_cut(tiny, tmp_path: Path):
    rows = [
        {"prompt": "Q:", "chosen": "b" * 5, "rejected": "c"},  # 2 + 5 + EOS: fits
        {"prompt": "Q:", "chosen": "b" * 6, "rejected": "c"},  # one too long
        {"prompt": "Q:", "chosen": "b", "rejected": "c" * 6},
        {"prompt": "Q:", "chosen": "b", "rejected": "b"},
        {"prompt": "Q:", "chosen": "b", "rejected": "b<|im_end|>"},  # other text, equal ids
        {"text": "x"},
        {"text": "x" * 8},  # with EOS one too long
        {"text": "x"},
        {"text": "x"},
    ]
    pairs, counts = load(rows, tiny, tmp_path, PreferenceFormat(max_seq_len=8))
    assert [side.ids.tolist() for pair in pairs for side in pair.examples] == [
        [*b"Q:bbbbb", EOS],
        [*b"Q:c", EOS],
    ]
    assert counts == {
        "pairs": 7,
        "with_rewards": 0,
        "dropped_too_long": 3,
        "dropped_identical": 3,
        "tokens": 12,
        "response_tokens": 8,
        row_counts.SPECIAL[1]: 1,
    }


def test_nothing_left(tiny, tmp_path: Path):
    short = PreferenceFormat(max_seq_len=4)
    with pytest.raises(UserError, match="d.jsonl: nothing is left, 2 of 2 .* --max-seq-len 4: raise it"):
        load([TEXT, TEXT], tiny, tmp_path, short)
    same = {"prompt": "Q", "chosen": "b", "rejected": "b"}
    with pytest.raises(UserError, match="nothing is left, 1 of 2 .*, the sides of the other 1 are identical"):
        load([TEXT, same], tiny, tmp_path, short)


def test_several_files(tiny, tmp_path: Path):
    first = write_rows(tmp_path / "1.jsonl", [TEXT])
    second = write_rows(tmp_path / "2.jsonl", [TEXT | {"prompt": "R:"}, TEXT])
    pairs, counts = preferences.load_pairs([first, second], tiny, DEFAULT)
    assert [chr(pair.chosen.ids[0]) for pair in pairs] == ["Q", "R", "Q"] and counts["pairs"] == 3


# ---- what is refused ---------------------------------------------------------------------------------------

CHAT = {"prompt": [USER], "chosen": GOOD, "rejected": BAD}
WHOLE = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
BROKEN = {  # a bad third line of a file, and what the message must say
    "both names": (TEXT | {"chosen_response": "x"}, "both 'chosen' and 'chosen_response'"),
    "both names, other side": (TEXT | {"rejected_response": "x"}, "both 'rejected' and 'rejected_response'"),
    "no rejected": ({"prompt": "Q", "chosen": "b"}, "fields 'prompt', 'chosen': accepted are"),
    "no chosen": ({"prompt": "Q", "rejected": "b"}, "fields 'prompt', 'rejected': accepted are"),
    "nothing": ({}, "fields none: accepted are"),
    "a labelled text": (
        {"text": "x", "label": [1.0]},
        "a labelled text is no side of a pair: train_rm.py --loss regression reads labelled texts",
    ),
    "an SFT row": ({"messages": [USER, GOOD]}, "fields 'messages': accepted are"),
    "text and sides": (TEXT | {"text": "x"}, "fields 'prompt', 'chosen', 'rejected', 'text': accepted are"),
    "text and prompt": ({"prompt": "Q", "text": "x"}, "fields 'prompt', 'text': accepted are"),
    "strings without prompt": (
        {"chosen": "b", "rejected": "c"},
        "'prompt': NoneType, 'chosen': str, 'rejected': str: accepted are",
    ),
    "messages and a string": (CHAT | {"rejected": "c"}, "'rejected': str: accepted are"),
    "a message after a string": (CHAT | {"prompt": "Q"}, "'prompt': str, 'chosen': dict, .*accepted are"),
    "prompt is a number": (WHOLE | {"prompt": 3}, "'prompt': int, .*accepted are"),
    "answer is null": (TEXT | {"chosen": None}, "'chosen': NoneType, .*accepted are"),
    "empty prompt": (TEXT | {"prompt": ""}, "field 'prompt' is empty"),
    "empty list of messages": (CHAT | {"prompt": []}, "field 'prompt' must be a list of at least one"),
    "half a character": ('{"prompt": "\\ud83d", "chosen": "b", "rejected": "c"}', "half of a surrogate"),
    "two answers": (CHAT | {"chosen": [USER, GOOD]}, "field 'chosen' must be one message, .*, not 2"),
    "answer by the user": (CHAT | {"rejected": USER}, "field 'rejected' ends with the role 'user'"),
    "conversation without answer": (WHOLE | {"chosen": [USER]}, "field 'chosen' ends with the role 'user'"),
    "answer alone": (WHOLE | {"chosen": [GOOD]}, "field 'chosen': message 0: the first message must not"),
    "no content": (CHAT | {"chosen": {"role": "assistant"}}, "field 'chosen': message 1: no field 'content'"),
    "unknown role": (CHAT | {"prompt": [{"role": "human", "content": "a"}]}, "message 0: role 'human'"),
    "other conversations": (
        WHOLE | {"rejected": [USER | {"content": "other"}, BAD]},
        "conversations must be equal but for their last message",
    ),
    "longer conversation": (WHOLE | {"rejected": [USER, BAD, USER, BAD]}, "conversations must be equal"),
    "two BOS": (TEXT | {"prompt": "<|im_start|><|im_start|>Q"}, "two BOS at the start"),
    "margin below 0": (TEXT | {"margin": -0.5}, "field 'margin' is -0.5, it must not be negative"),
    "margin is text": (TEXT | {"margin": "1"}, "field 'margin' must be a number, not str"),
    "margin is a truth value": (TEXT | {"margin": True}, "field 'margin' must be a number, not bool"),
    "margin is not a number": (TEXT | {"margin": float("nan")}, "field 'margin' must be a finite number"),
    "margin without end": (TEXT | {"margin": float("inf")}, "field 'margin' must be a finite number"),
    "margin beyond float32": (TEXT | {"margin": 10**400}, "field 'margin' must be a finite number"),
    "one reward": (TEXT | {"chosen_reward": 1.0}, "field 'chosen_reward' stands alone"),
    "other reward": (TEXT | {"rejected_reward": 1.0}, "field 'rejected_reward' stands alone"),
    "reward is null": (
        TEXT | {"chosen_reward": 1.0, "rejected_reward": None},
        "field 'rejected_reward' must be a number, not NoneType",
    ),
    "empty text": ({"text": ""}, "field 'text' is empty"),
    "text is a list": ({"text": ["x"]}, "field 'text' must be a string, not list"),
    "two BOS in text": ({"text": "<|im_start|><|im_start|>Q"}, "two BOS at the start"),
    "alone among pairs": ({"text": "x"}, "a chosen 'text' line must be followed by .*d.jsonl:4 is not"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_row_is_named_by_file_and_line(name: str, tiny, tmp_path: Path):
    line, message = BROKEN[name]
    lines = [json.dumps(TEXT), "", line if isinstance(line, str) else json.dumps(line), json.dumps(TEXT)]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=f"(?s)^{path}:3: .*{message}"):
        preferences.load_pairs([path], tiny, DEFAULT, text_lines=True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}] * 3, "d.jsonl:3: a chosen 'text' line .* which the end of the file is not"),
        ([{"text": "a"}, {"text": ""}], "d.jsonl:2: field 'text' is empty"),
        ([{"text": "a"}, {"text": "b", "margin": 1}], "d.jsonl:2: .*'margin' belongs to the chosen one"),
        (
            [{"text": "a"}, {"text": "b", "rejected_reward": 1}],
            "d.jsonl:2: .*'rejected_reward' belongs to the chosen one",
        ),
    ],
)
def test_broken_text_lines(rows: list[dict], message: str, tiny, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        load(rows, tiny, tmp_path)


def test_lines_of_two_files_are_no_pair(tiny, tmp_path: Path):
    paths = [write_rows(tmp_path / f"{i}.jsonl", [{"text": "a"}]) for i in range(2)]
    with pytest.raises(UserError, match="0.jsonl:1: a chosen 'text' line"):
        preferences.load_pairs(paths, tiny, DEFAULT, text_lines=True)


def test_text_lines_where_a_response_must_be_known(tiny, tmp_path: Path):
    path = write_rows(tmp_path / "d.jsonl", [TEXT, {"text": "a"}, {"text": "b"}])
    with pytest.raises(UserError, match="d.jsonl:2: 'text' does not say .*'prompt', 'chosen' and 'rejected'"):
        preferences.load_pairs([path], tiny, DEFAULT)


def test_what_the_format_refuses(tiny, llama, tmp_path: Path):
    with pytest.raises(UserError, match="a response is empty, and --no-append-eos"):
        load([TEXT | {"chosen": ""}], tiny, tmp_path, PreferenceFormat(append_eos=False))
    adding = PreferenceFormat(add_bos=True)
    with pytest.raises(UserError, match="d.jsonl:1: two BOS at the start.*--add-bos False"):
        load([CHAT], tiny, tmp_path, adding)
    without = copy.copy(tiny)
    without.bos_id = None
    with pytest.raises(UserError, match="d.jsonl:1: --add-bos True: this tokenizer has no BOS"):
        load([TEXT], without, tmp_path, adding)
    with pytest.raises(UserError, match="d.jsonl:1: .*has no chat template"):
        load([CHAT], llama, tmp_path)
    with pytest.raises(UserError, match="d.jsonl:1: field 'prompt' is empty"):  # no token is left of it
        load([TEXT | {"prompt": ""}], llama, tmp_path, adding)


def test_answer_without_a_stop_token(tmp_path: Path):
    shutil.copytree(TINY, tmp_path / "model")
    template = (TINY / "chat_template.jinja").read_text().replace("<|im_end|>", "")
    (tmp_path / "model/chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="d.jsonl:1: end of turn not trained: .* message 1 "):
        load([CHAT], load_tokenizer(tmp_path / "model"), tmp_path)


def test_token_across_the_start_of_an_answer(bpe, tmp_path: Path):
    rows = [CHAT, CHAT | {"rejected": {"role": "assistant", "content": "\nc"}}]
    with pytest.raises(UserError, match="d.jsonl:2: the tokens of a prefix .* a token reaches across"):
        load(rows, bpe, tmp_path)


# ---- where a score is read ---------------------------------------------------------------------------------


def test_as_scored_through_collate(tiny, tmp_path: Path):
    pairs, _ = load([TEXT, {"text": "abc"}, {"text": "d"}], tiny, tmp_path)
    examples = [side for pair in pairs for side in pair.examples]
    batch = packing.collate([[preferences.as_scored(example)] for example in examples], multiple=8)
    assert batch.lengths == [len(example.ids) for example in examples] == [5, 6, 4, 2]
    assert batch.tokens[:17].tolist() == [*b"Q: b", EOS, *b"Q: cd", EOS, *b"abc", EOS, ord("d"), EOS]
    assert np.flatnonzero(batch.mask).tolist() == [4, 10, 14, 16] == batch.trained.tolist()
    assert len(batch.tokens) == 24  # the rest is padding
    first = preferences.as_scored(examples[0])
    assert (first.ids.dtype, first.trained.dtype) == (np.int32, np.bool_)
    assert examples[0].trained.sum() == 3  # the pair is left as it was


def test_labelled(tiny, tmp_path: Path):
    rows = [
        {"text": "Q: b", "label": [1, -100, 0.5]},
        {"text": "x" * 8, "label": [1, 2, 3]},
        {"text": "x" * 7, "label": [-2, 2, -100.0], "id": 3},
    ]
    path = write_rows(tmp_path / "d.jsonl", rows)
    texts, counts = preferences.load_labelled([path], tiny, PreferenceFormat(max_seq_len=8), 3)
    examples, labels = [text.example for text in texts], np.array([text.label for text in texts])
    assert [example.ids.tolist() for example in examples] == [[*b"Q: b", EOS, 0], [*b"x" * 7, EOS, 0]]
    assert [np.flatnonzero(example.trained).tolist() for example in examples] == [[5], [8]]
    assert labels.tolist() == [[1, -100, 0.5], [-2, 2, -100]] and labels.dtype == np.float32
    assert counts == {"texts": 3, "dropped_too_long": 1, "tokens": 5 + 8, "rows with 'id' (not used)": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "field 'label' must be a list of 2 numbers, not NoneType"),
        ({"text": "a", "label": 1.0}, "field 'label' must be a list of 2 numbers, not float"),
        ({"text": "a", "label": [1]}, "field 'label' must be a list of 2 numbers, not a list of 1"),
        ({"text": "a", "label": [1, 2, 3]}, "field 'label' must be a list of 2 numbers, not a list of 3"),
        ({"text": "a", "label": [1, None]}, "field 'label', number 1 must be a number, not NoneType"),
        ({"text": "a", "label": [float("nan"), 1]}, "field 'label', number 0 must be a finite number"),
        ({"text": "a", "label": [1, float("-inf")]}, "field 'label', number 1 must be a finite number"),
        ({"text": "a", "label": [-100, -100.0]}, "field 'label': all 2 attributes are missing"),
        ({"text": "", "label": [1, 2]}, "field 'text' is empty"),
        ({"input": "Q", "label": [1, 2]}, "no field 'text'"),
    ],
)
def test_broken_label(row: dict, message: str, tiny, tmp_path: Path):
    path = write_rows(tmp_path / "d.jsonl", [{"text": "a", "label": [1, 2]}, row])
    with pytest.raises(UserError, match=f"(?s)^{path}:2: .*{message}"):
        preferences.load_labelled([path], tiny, DEFAULT, 2)


def test_no_labelled_text_left(tiny, tmp_path: Path):
    path = write_rows(tmp_path / "d.jsonl", [{"text": "abc", "label": [1]}])
    with pytest.raises(UserError, match="d.jsonl: nothing is left, 1 of 1 .* --max-seq-len 3: raise it"):
        preferences.load_labelled([path], tiny, PreferenceFormat(max_seq_len=3), 1)


# ---- what the user is shown --------------------------------------------------------------------------------


def test_show(tiny, llama, tmp_path: Path):
    for tokens, end in ((tiny, "<|im_end|>"), (llama, "</s>")):
        [pair, lines], _ = load(
            [{"prompt": "a\nb:", "chosen": " c", "rejected": ""}, {"text": "a b"}, {"text": "a\tc"}],
            tokens,
            tmp_path,
        )
        expected = {"prompt": "a\nb:", "chosen": f" c{end}", "rejected": end}
        assert preferences.texts(pair, tokens) == expected
        assert preferences.show(pair, tokens) == f"prompt: a↵\nb:\nchosen: ⟦ c{end}⟧\nrejected: ⟦{end}⟧"
        assert preferences.texts(lines, tokens)["prompt"] == ""
        assert preferences.show(lines, tokens) == f"chosen: a b{end}\nrejected: a\\tc{end}"
