"""SFT files: what is cut or dropped, counts, files without rows.

With the tiny tokenizer a token is a byte; 257, 258 are <|im_start|> (BOS) and <|im_end|> (EOS).
"""

from pathlib import Path

import pytest

from align.data import display, formats, packing, sft
from align.errors import UserError
from tests.support.files import write_rows
from tests.support.rows import chat

BOS = 257
DEFAULT = formats.FormatConfig()


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


def test_files_without_rows(tiny, tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("\n  \n")
    with pytest.raises(UserError, match="empty.jsonl: no rows in this file"):
        sft.load_sft([tmp_path / "empty.jsonl"], tiny, DEFAULT)
    for name in ("absent.jsonl", "."):
        with pytest.raises(UserError, match="cannot be read|is a directory: give its files"):
            sft.load_sft([tmp_path / name], tiny, DEFAULT)
