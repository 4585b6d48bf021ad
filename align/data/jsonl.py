"""Files of rows: each row with its place, and fields that must be there."""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.data import hub
from align.errors import UserError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class BadRows:
    """Wrong rows that are left out, up to a limit (--skip-bad-rows)."""

    limit: int
    errors: list[str] = field(default_factory=list)

    def add(self, error: ValueError) -> None:
        """Leave a row out. Raises the error if that is one too many."""
        if len(self.errors) >= self.limit:
            raise error
        self.errors.append(str(error))

    def counts(self) -> dict[str, int]:
        """Rows that were left out, for the log: the first error whole, and the places of the next ones."""
        if not self.errors:
            return {}
        others = [error.partition(": ")[0] for error in self.errors[1:10]]
        more = f"; {', '.join(others)}" if others else ""
        return {f"bad rows left out ('{self.errors[0]}'{more})": len(self.errors)}


def read_jsonl(path: Path, bad: BadRows | None = None) -> list[tuple[str, dict]]:
    """Rows of a file as ("file:line", row): lines of JSON or one JSON array, plain or .gz, or Parquet.

    Or a data set of the Hub. Blank lines are skipped, and null fields of Parquet rows. `bad` takes lines that
    are no JSON object.
    Raises UserError naming file and line for the others, and for a file without rows.
    """
    path, bad, rows = Path(path), bad or BadRows(0), []
    for where, text in read_values(path):
        try:
            row = text if isinstance(text, dict) else parse(where, text)
            rows.append((where, row))
        except ValueError as error:
            bad.add(error)
    if not rows:
        raise UserError(f"{path}: no rows in this file")
    return rows


def read_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Values of a file as ("file:line", line) or, of arrays, Parquet and the Hub, ("file: row 3", value)."""
    if path.suffix == ".parquet" or hub.is_data(path):
        rows = read_parquet(path) if path.suffix == ".parquet" else map(without_nulls, hub.data_rows(path))
        yield from ((f"{path}: row {i}", row) for i, row in enumerate(rows, start=1))
        return
    lines = enumerate(read_lines(path), start=1)
    for number, line in lines:
        if line.lstrip(BYTE_ORDER_MARK).lstrip()[:1] == b"[" and number == 1:
            text = line + b"".join(line for _, line in lines)
            rows = parse_json(str(path), text)
            yield from ((f"{path}: row {i}", row) for i, row in enumerate(rows, start=1))
        elif line.strip():
            yield f"{path}:{number}", line


def parse(where: str, text: object) -> dict:
    """The row that a line is, or that stands in an array. Raises UserError."""
    row = parse_json(where, text) if isinstance(text, bytes) else text
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be a JSON object, this is a {type(row).__name__}")
    return row


def parse_json(where: str, text: bytes) -> Any:
    """A JSON text. Raises UserError for anything else, also for what is nested too deep to be read."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # bad JSON, or bytes that are not UTF-8
        raise UserError(f"{where}: not valid JSON: {error}") from error


def read_parquet(path: Path) -> Iterator[dict]:
    """Rows of a Parquet file without their null fields, in which it keeps those that a row has not."""
    import pyarrow.parquet  # only where such a file is read

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from map(without_nulls, batch.to_pylist())
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def without_nulls(value: Any) -> Any:
    """A value without the null fields of the objects in it, but for the content of a message."""
    if isinstance(value, dict):
        return {
            name: without_nulls(one) for name, one in value.items() if one is not None or name == "content"
        }
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file, unzipped if its name ends in .gz. Raises UserError if it cannot be read."""
    if path.is_dir():
        raise UserError(f"{path} is a directory: give its files")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:  # missing, a directory, not gzip, or cut short
        raise UserError(f"{path}: cannot be read: {error.args[-1] if error.args else error}") from error


def at(where: str, make: Callable, *args: object) -> Any:
    """`make(*args)`; a ValueError of it is given its place, "file:line"."""
    try:
        return make(*args)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def text_field(row: dict, field: str) -> str:
    """`row[field]`, which must be there and must be a string (UserError)."""
    if field not in row:
        raise UserError(f"no field {field!r} (the row has: {', '.join(map(repr, row)) or 'nothing'})")
    if not isinstance(row[field], str):
        raise UserError(f"field {field!r} must be a string, not {type(row[field]).__name__}")
    if re.search("[\ud800-\udfff]", row[field]):
        raise UserError(f"field {field!r} holds half of a surrogate pair, which is not a character")
    return row[field]


def turns_field(row: dict, field: str) -> list[dict]:
    """`row[field]`, which must be a list of objects and not empty (UserError)."""
    turns = row[field]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"field {field!r} must be a list of at least one object")
    return turns
