"""The rows of a data set in an unnamed file: one copy for all ranks of a machine, none in their memory."""

import contextlib
import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, TypeVar, overload

from align.errors import UserError

T = TypeVar("T")


class StoredRows(Sequence[T]):
    """Rows that are read from a file when they are asked for, each time as new objects.

    The file holds the pickled rows end to end, and after them where each begins and ends, int64. A pickled
    `StoredRows` names the file as one of this process: another process of the machine opens the same file.
    """

    def __init__(self, file: BinaryIO, size: int, numbers: range):
        """`size`: bytes of all pickled rows; `numbers`: of the rows in use."""
        self.file, self.size, self.numbers = file, size, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> "StoredRows[T]": ...

    def __getitem__(self, index: int | slice) -> "T | StoredRows[T]":
        if isinstance(index, slice):
            return StoredRows(self.file, self.size, self.numbers[index])
        file, place = self.file.fileno(), self.size + 8 * self.numbers[index]
        start, end = array("q", os.pread(file, 16, place))
        return pickle.loads(os.pread(file, end - start, start))

    def __reduce__(self) -> tuple:
        return open_rows, (f"/proc/{os.getpid()}/fd/{self.file.fileno()}", self.size, self.numbers)


def open_rows(name: str, size: int, numbers: range) -> StoredRows:
    """Open the file of another process, which must still have it open."""
    return StoredRows(open(name, "rb"), size, numbers)


def store(rows: Iterable[T]) -> StoredRows[T]:
    """Store rows in the directory of temporary files, TMPDIR; no file is left there, however the run ends.

    Raises UserError if that directory cannot hold them.
    """
    bounds = array("q", [0])
    with writing():
        file = tempfile.TemporaryFile()
    for row in rows:
        data = pickle.dumps(row)
        bounds.append(bounds[-1] + len(data))
        with writing():
            file.write(data)
    with writing():
        file.write(bounds)
        file.flush()
    return StoredRows(file, bounds[-1], range(len(bounds) - 1))


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turn an OSError of the body into a UserError that names TMPDIR."""
    try:
        yield
    except OSError as error:
        advice = "the rows as token ids are kept there; let TMPDIR name a directory with room"
        raise UserError(f"{tempfile.tempdir or 'TMPDIR'}: {error.strerror}: {advice}") from error
