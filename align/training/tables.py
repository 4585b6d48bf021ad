"""Arrays by name in a safetensors file that says what they were made of, and notices damage."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from align.errors import UserError


def write(path: Path, made_of: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays; the file appears by one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    # in one entry: safetensors writes several in any order, and equal files should have equal bytes
    save_file(dict(arrays), unfinished, metadata={"made_of, xxh3": f"{made_of}, {digest(arrays)}"})
    unfinished.rename(path)


def read(path: Path, made_of: str) -> dict[str, np.ndarray] | None:
    """Arrays of a file; None if there is none, or if they were made of something else.

    Raises UserError if the file is damaged.
    """
    if not path.is_file():
        return None
    advice = "remove it, and it is made again"
    try:
        with safe_open(path, "np") as file:
            described = (file.metadata() or {}).get("made_of, xxh3", "")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dictionary
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged: {error}; {advice}") from error
    found, _, checksum = described.rpartition(", ")
    if checksum != digest(arrays):
        raise UserError(f"{path} is damaged: it has other values than were written; {advice}")
    return arrays if found == made_of else None


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """XXH3 of arrays and their names, types and shapes."""
    found = xxhash.xxh3_64()
    for name, array in sorted(arrays.items()):
        found.update(repr((name, str(array.dtype), array.shape)).encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
