"""Files: atomic writes, JSON objects, and checks of output paths."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from align.errors import UserError

ROOT = Path(__file__).parent.parent  # of the repository
ASSETS = ROOT / "assets"


def read_object(path: Path, required: bool = True) -> dict:
    """Read the object in a JSON file, {} if missing and not `required`. Raises UserError for all else."""
    if not required and not Path(path).is_file():
        return {}
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, not {shown(value)}")
    return value


def shown(value: object) -> str:
    """The repr of a value, cut to one short line for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_files(paths: Iterable[Path], *sources: Path) -> None:
    """Refuse output files that cannot be written, or that are among the `sources`."""
    for path in paths:
        check_path(path)
        if path.is_dir():
            raise UserError(f"--output {path} is a directory: give a file")
        if path.exists() and any(source.exists() and path.samefile(source) for source in sources):
            raise UserError(f"--output {path} is --input: give another file")


def check_path(path: Path) -> None:
    """Refuse an output path that is too long, below a file, a dangling link, or read-only."""
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    try:
        for place in (path, *(Path(part) for part in path.parts)):
            place.exists()  # raises OSError for a name that is too long
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}") from error
    if not nearest.exists():
        raise UserError(f"--output {path}: {nearest} is a link to nothing: remove it, or give another")
    if nearest != path and not nearest.is_dir():
        raise UserError(f"--output {path}: {nearest} is a file: give a path below a directory")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"--output {path}: {nearest} is read-only: give another")


def write_own(path: Path, text: str) -> None:
    """Write a file of constant content, unless it exists. Raises UserError for one of other content."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return write_atomically(path, text)
        is_own = path.read_bytes() == text.encode()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    if not is_own:
        raise UserError(f"{path} has another content than the toy task, which would overwrite it: move it")


def write_atomically(path: Path, text: str) -> None:
    """Write a file by one rename: complete or absent."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
