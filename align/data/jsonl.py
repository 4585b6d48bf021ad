"""Files of rows: each row with its location, and required fields."""

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
    """Wrong rows left out, up to a limit (--skip-bad-rows)."""

    limit: int
    errors: list[str] = field(default_factory=list)

    def add(self, error: ValueError) -> None:
        """Leave a row out. Raises the error beyond the limit."""
        if len(self.errors) >= self.limit:
            raise error
        self.errors.append(str(error))

    def counts(self) -> dict[str, int]:
        """Number of rows left out, under the first error and the locations of the next ones."""
        if not self.errors:
            return {}
        others = [error.partition(": ")[0] for error in self.errors[1:10]]
        more = f"; {', '.join(others)}" if others else ""
        return {f"bad rows left out ('{self.errors[0]}'{more})": len(self.errors)}


def read_jsonl(path: Path, bad: BadRows | None = None) -> Iterator[tuple[str, dict]]:
    """Yield rows as ("file:line", row): JSON lines or one JSON array, plain or .gz, Parquet, or of the Hub.

    Blank lines are skipped, and null fields of Parquet rows. `bad` collects lines that are no JSON object.
    Raises UserError naming file and line for the others, and for a file without rows.
    """
    path, bad, is_empty = Path(path), bad or BadRows(0), True
    for location, value in read_values(path):
        try:
            row = parse(location, value)
        except ValueError as error:
            bad.add(error)
            continue
        is_empty = False
        yield location, row
    if is_empty:
        raise UserError(f"{path}: no rows in this file")


def read_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("file:line", line) or, from arrays, Parquet and the Hub, ("file: row 3", value)."""
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


def parse(location: str, value: object) -> dict:
    """Parse a line, or check an item of an array, as a row. Raises UserError."""
    row = parse_json(location, value) if isinstance(value, bytes) else value
    if not isinstance(row, dict):
        raise UserError(f"{location}: a row must be a JSON object, this is a {type(row).__name__}")
    return row


def parse_json(location: str, text: bytes) -> Any:
    """Parse JSON. Raises UserError for anything else, also for values that are nested too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # bad JSON, or bytes that are not UTF-8
        raise UserError(f"{location}: not valid JSON: {error}") from error


def read_parquet(path: Path) -> Iterator[dict]:
    """Yield rows of a Parquet file without null fields: its schema has fields that a row has not."""
    import pyarrow.parquet  # only where such a file is read

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from map(without_nulls, batch.to_pylist())
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def without_nulls(value: Any) -> Any:
    """Drop null fields of objects, except the content of a message."""
    if isinstance(value, dict):
        fields = [(name, item) for name, item in value.items() if item is not None or name == "content"]
        return {name: without_nulls(item) for name, item in fields}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield lines of a file, unzipped if its name ends in .gz. Raises UserError if it cannot be read."""
    if path.is_dir():
        raise UserError(f"{path} is a directory: give its files")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:  # missing, a directory, not gzip, or cut short
        raise UserError(f"{path}: cannot be read: {error.args[-1] if error.args else error}") from error


def write_object(path: Path, value: dict) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def located(location: str, make: Callable, *args: object) -> Any:
    """Call `make(*args)`; the message of a ValueError gets the location in front, "file:line"."""
    try:
        return make(*args)
    except ValueError as error:
        raise UserError(f"{location}: {error}") from error


def text_field(row: dict, field: str) -> str:
    """`row[field]`, a required string (UserError)."""
    if field not in row:
        raise UserError(f"no field {field!r} (the row has: {', '.join(map(repr, row)) or 'nothing'})")
    if not isinstance(row[field], str):
        raise UserError(f"field {field!r} must be a string, not {type(row[field]).__name__}")
    if re.search("[\ud800-\udfff]", row[field]):
        raise UserError(f"field {field!r} holds half of a surrogate pair, which is not a character")
    return row[field]


def turns_field(row: dict, field: str) -> list[dict]:
    """`row[field]`, a list of at least one object (UserError)."""
    turns = row[field]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"field {field!r} must be a list of at least one object")
    return turns
