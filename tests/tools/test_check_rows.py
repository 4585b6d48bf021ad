"""Rows as tools.check renders them by transformers are those that the scripts read, or unknown."""

import numpy as np
import pytest

import train_dpo
import train_grpo
import train_rm
import train_sft
from align.command_line import parse
from align.data import preferences, prompts, sft
from align.data.tokenizer import load_tokenizer
from tests.support.files import TINY, write_rows
from tests.support.rows import chat, comparisons
from tools import check_rows

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
SFT = [
    chat("sort: b a", "a b", "again", "a b"),
    chat("long", "x" * 90, "never", "seen"),
    {"messages": [*TURNS, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
    {"input": "one two ", "output": "three"},
    {"input": "no answer", "output": ""},
    {"prompt": "continue ", "completion": "this"},
]
PAIRS = [
    *comparisons(3, 1, margin=0.5),
    {"prompt": "same", "chosen": "a", "rejected": "a"},
    {"prompt": "ended", "chosen": "a<|im_end|>", "rejected": "b", "chosen_reward": 3, "rejected_reward": 1},
    {"prompt": TURNS[:1], "chosen": [TURNS[1]], "rejected": {"role": "assistant", "content": "z" * 90}},
    {"prompt": TURNS[:1], "chosen": [TURNS[1]], "rejected": {"role": "assistant", "content": "z"}},
    {"chosen": chat("q", "good")["messages"], "rejected": chat("q", "bad")["messages"], "prompt": "q"},
]
PROMPTS = [{"prompt": "text"}, {"text": "another", "answer": 3}, {"prompt": TURNS[:1]}, chat("q", "left out")]


def rendered(config, read, rows, tmp_path):
    """Rows by the reference, and the file and tokenizer that the scripts read them by."""
    path = write_rows(tmp_path / "rows.jsonl", rows)
    renderer = check_rows.Renderer(TINY, config)
    return list(read(renderer, [path])), [path], load_tokenizer(TINY)


def assert_equal(rows: list[check_rows.Row], examples: list[tuple]) -> None:
    assert all(row.sequences is not None for row in rows)
    own = [(x.ids, x.trained) for row in rows for x in row.sequences]
    assert own == [(x.ids.tolist(), x.trained.tolist()) for row in examples for x in row]


@pytest.mark.parametrize("words", ["", "--turns each", "--turns last", "--loss-on all"])
def test_sft_rows(words, tmp_path):
    config = parse(train_sft.Config, ["--max-seq-len", "80", *words.split()], "train_sft.py")
    rows, paths, tokenizer = rendered(config, check_rows.sft_rows, SFT, tmp_path)
    assert_equal(rows, [(x,) for x in sft.load_sft(paths, tokenizer, config.format)[0]])


@pytest.mark.parametrize("words", ["", "--no-append-eos"])
def test_pairs(words, tmp_path):
    config = parse(train_dpo.Config, ["--max-seq-len", "80", *words.split()], "train_dpo.py")
    for gaps in (True, False):
        read = lambda renderer, paths, gaps=gaps: check_rows.pair_rows(renderer, paths, gaps)  # noqa: E731
        rows, paths, tokenizer = rendered(config, read, PAIRS, tmp_path)
        pairs = preferences.load_pairs(paths, tokenizer, config.format)[0]
        assert_equal(rows, [pair.examples for pair in pairs])
        assert [row.numbers for row in rows] == [[x.reward_gap if gaps else x.margin] for x in pairs]
    assert [row.place.split(":")[1] for row in rows] == ["1", "2", "3", "5", "7", "8"]


def test_texts_and_labels(tmp_path):
    config = parse(train_rm.Config, ["--max-seq-len", "80"], "train_rm.py")
    lines = [{"text": text} for text in ("good text", "bad text<|im_end|>", "better", "worse")]
    read = lambda renderer, paths: check_rows.pair_rows(renderer, paths, gaps=False)  # noqa: E731
    rows, paths, tokenizer = rendered(config, read, lines, tmp_path)
    pairs = preferences.load_pairs(paths, tokenizer, config.format, text_lines=True)[0]
    assert_equal(rows, [pair.examples for pair in pairs])
    labelled = [{"text": "fine", "label": [1, 2]}, chat("q", "a") | {"label": [3, -100]}]
    rows, paths, tokenizer = rendered(config, check_rows.labelled_rows, labelled, tmp_path)
    texts = preferences.load_labelled(paths, tokenizer, config.format, 2)[0]
    assert [x.ids for row in rows for x in row.sequences] == [x.example.ids[:-1].tolist() for x in texts]
    assert np.array_equal([row.numbers for row in rows], [x.label for x in texts])


def test_prompts(tmp_path):
    config = parse(train_grpo.Config, ["--max-prompt-len", "60"], "train_grpo.py")
    rows, paths, tokenizer = rendered(
        config, check_rows.prompt_rows, [*PROMPTS, {"prompt": "p" * 61}], tmp_path
    )
    expected = prompts.load_prompts(paths, tokenizer, config.format)[0]
    assert [row.sequences[0].ids for row in rows] == [prompt.ids.tolist() for prompt in expected]
    assert [row.fields for row in rows] == [prompt.row for prompt in expected] and len(rows) == 4


def test_bos(tmp_path):
    config = parse(train_grpo.Config, ["--add-bos", "True"], "train_grpo.py")
    rows, paths, tokenizer = rendered(config, check_rows.prompt_rows, PROMPTS[:2], tmp_path)
    expected = prompts.load_prompts(paths, tokenizer, config.format)[0]
    assert [row.sequences[0].ids for row in rows] == [prompt.ids.tolist() for prompt in expected]
    assert {row.sequences[0].ids[0] for row in rows} == {tokenizer.bos_id}


def test_other_forms_are_unknown(tmp_path):
    config = parse(train_sft.Config, ["--max-seq-len", "20"], "train_sft.py")
    others = [
        {"instruction": "a", "output": "b"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"input": "x" * 30, "output": "cut"},
        chat("a", "b") | {"tools": []},
    ]
    rows, _, _ = rendered(config, check_rows.sft_rows, others, tmp_path)
    assert [row.sequences for row in rows] == [None] * 4
    assert "rows.jsonl:3: a row of --prompt-template beyond --max-seq-len" in rows[2].place
