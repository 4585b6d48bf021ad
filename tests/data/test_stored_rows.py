"""Stored rows are the rows, from a file that no directory names; a full disk is one line."""

import datetime
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest

from align.data.packing import Example
from align.data.prompts import Prompt
from align.data.stored_rows import StoredRows, store
from align.errors import UserError

ROW = {"answer": {"b": [1, None, 0.1], "a": "é"}, "when": datetime.date(2026, 1, 2), "raw": b"\xff"}


def examples(count: int) -> list[Example]:
    """Examples of 1 to `count` tokens."""
    return [Example(np.arange(n, dtype=np.int32) + n, np.arange(n) > n // 2) for n in range(1, count + 1)]


def assert_equal(some: object, others: object) -> None:
    """Compare examples and the types of their arrays."""
    for example, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(example.ids, other.ids, strict=True)
        np.testing.assert_array_equal(example.trained, other.trained, strict=True)


def test_a_sequence_of_the_rows():
    rows = examples(9)
    stored = store(iter(rows))
    assert len(stored) == 9 and stored and not stored[:0]
    assert_equal(stored, rows)
    assert_equal([stored[-1], stored[3]], [rows[8], rows[3]])
    for part in (slice(4), slice(None), slice(2, 8, 3), slice(-2, None)):
        assert_equal(stored[part], rows[part])
    assert_equal(stored[2:8][1:3], rows[3:5])
    with pytest.raises(IndexError):
        stored[9]


def test_rows_of_prompts_keep_the_order_and_the_types_of_their_fields():
    [prompt] = store([Prompt(np.array([3, 1], np.int32), ROW)])
    assert prompt.row == ROW and list(prompt.row) == list(ROW) and list(prompt.row["answer"]) == ["b", "a"]


def test_a_row_that_is_changed_is_read_again_as_it_was():
    stored = store([Prompt(np.array([3, 1], np.int32), {"n": 1}) for _ in range(2)])
    stored[1].row["n"] = 77
    assert stored[1].row == {"n": 1}


def test_another_process_opens_the_same_file():
    """The rows are not in the pickle; they are there as long as a process has the file."""
    rows = examples(50)
    stored = store(rows)
    data = pickle.dumps(stored[10:])
    assert len(data) < 200
    again: StoredRows[Example] = pickle.loads(data)
    place = os.fstat(stored.file.fileno())
    assert os.fstat(again.file.fileno()).st_ino == place.st_ino and place.st_nlink == 0
    stored.file.close()
    assert_equal(again, rows[10:])


def test_the_file_is_in_the_directory_of_temporary_files_without_a_name(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stored = store(examples(5))
    assert os.readlink(f"/proc/self/fd/{stored.file.fileno()}").startswith(f"{tmp_path}/")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "w+b"))
    with pytest.raises(UserError, match=f"^{tmp_path}: No space left on device: .* TMPDIR .*"):
        store(examples(5))


def test_an_error_of_the_rows_stays_as_it_is():
    def rows():
        yield examples(1)[0]
        raise OSError("of the reader")

    with pytest.raises(OSError, match="^of the reader$"):
        store(rows())
