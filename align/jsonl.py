"""jsonl files: rows with their file and line, and fields that must be there."""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def read_jsonl(path: Path) -> list[tuple[str, dict]]:
    """Rows of a .jsonl or .jsonl.gz file as ("file:line", row); blank lines are skipped.

    Raises ValueError naming file and line for what is not a JSON object, and for a file without rows.
    """
    rows = []
    for number, line in enumerate(read_lines(Path(path)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # bad JSON, or bytes that are not UTF-8
            raise ValueError(f"{path}:{number}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: a row must be a JSON object, this is a {type(row).__name__}")
        rows.append((f"{path}:{number}", row))
    if not rows:
        raise ValueError(f"{path}: no rows in this file")
    return rows


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file, unzipped if its name ends in .gz. Raises ValueError if it cannot be read."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:  # missing, a directory, not gzip, or cut short
        raise ValueError(f"{path}: cannot be read: {error}") from error


def at(where: str, make: Callable, *args: object) -> Any:
    """`make(*args)`; a ValueError of it is given its place, "file:line"."""
    try:
        return make(*args)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def text_field(row: dict, field: str) -> str:
    """`row[field]`, which must be there and must be a string (ValueError)."""
    if field not in row:
        raise ValueError(f"no field {field!r} (the row has: {', '.join(map(repr, row)) or 'nothing'})")
    if not isinstance(row[field], str):
        raise ValueError(f"field {field!r} must be a string, not {type(row[field]).__name__}")
    if re.search("[\ud800-\udfff]", row[field]):
        raise ValueError(f"field {field!r} holds half of a surrogate pair, which is not a character")
    return row[field]


def turns_field(row: dict, field: str) -> list[dict]:
    """`row[field]`, which must be a list of objects and not empty (ValueError)."""
    turns = row[field]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"field {field!r} must be a list of at least one object")
    return turns
