"""Named arrays in a safetensors file, with the fingerprint of their inputs and a checksum."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from align.errors import UserError

KEY = "fingerprint, xxh3"  # of the metadata
OLD_KEY = "made_of, xxh3"  # in files of release 0.1


def write(path: Path, fingerprint: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays; the file appears by one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    # in one entry: safetensors writes several in any order, and equal files should have equal bytes
    save_file(dict(arrays), unfinished, metadata={KEY: f"{fingerprint}, {digest(arrays)}"})
    unfinished.rename(path)


def read(path: Path, fingerprint: str) -> dict[str, np.ndarray] | None:
    """Arrays of a file; None if missing, or of another fingerprint. Raises UserError if it is damaged."""
    if not path.is_file():
        return None
    advice = "remove it, and it is made again"
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dictionary
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged: {error}; {advice}") from error
    stored, _, checksum = metadata.get(KEY, metadata.get(OLD_KEY, "")).rpartition(", ")
    if checksum != digest(arrays):
        raise UserError(f"{path} is damaged: it has other values than were written; {advice}")
    return arrays if stored == fingerprint else None


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """XXH3 of arrays and their names, types and shapes."""
    checksum = xxhash.xxh3_64()
    for name, array in sorted(arrays.items()):
        checksum.update(repr((name, str(array.dtype), array.shape)).encode())
        checksum.update(np.ascontiguousarray(array).tobytes())
    return checksum.hexdigest()
