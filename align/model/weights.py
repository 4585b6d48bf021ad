"""The safetensors files of a Hugging Face directory: one, or several behind an index."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from align.errors import UserError
from align.files import read_object, shown

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16")
ROWS = 1024  # of a matrix that are compared at a time


class WeightFiles:
    """Tensors by name, whole or in part. Every mistake is a UserError that names the file."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.opened: dict[str, safe_open] = {}
        index, single = self.directory / INDEX, self.directory / SINGLE
        if index.is_file():
            self.files = read_weight_map(index)
            if single.is_file() and SINGLE not in self.files.values():
                raise UserError(
                    f"--model {directory}: two sets of weights, {SINGLE} and {min(self.files.values())} with "
                    f"the others of {INDEX}: move one of them away"
                )
        elif single.is_file():
            self.files = dict.fromkeys(self.open(SINGLE).keys(), SINGLE)
        else:
            raise UserError(f"--model {directory}: no {SINGLE} there (other weight formats are not read)")

    def open(self, file: str) -> safe_open:
        """Open a file by its name in the directory, once."""
        if file not in self.opened:
            try:
                self.opened[file] = safe_open(self.directory / file, "pt")
            except (OSError, SafetensorError) as error:  # missing, or cut short
                raise UserError(f"--model: {self.directory / file} cannot be read: {error}") from error
        return self.opened[file]

    def tensor(self, name: str) -> Any:
        """A lazy slice of a tensor, which is read when indexed."""
        path = self.directory / self.files[name]
        try:
            tensor = self.open(self.files[name]).get_slice(name)
        except SafetensorError as error:
            raise UserError(f"--model: {path} has no {name}, which {INDEX} says it has") from error
        if tensor.get_dtype() not in FLOATS:
            raise UserError(
                f"--model: {path}: {name} is stored as {tensor.get_dtype()}; known: {', '.join(FLOATS)}"
            )
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensor(name).get_shape())

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        tensor = self.tensor(name)
        return tensor[rows] if columns is None else tensor[rows, columns]

    def has_own_head(self) -> bool:
        """True for an output embedding with other values than the input embedding."""
        if not {EMBEDDING, HEAD} <= set(self.files):
            return False
        shape = self.shape(EMBEDDING)
        if shape != self.shape(HEAD) or len(shape) != 2:
            return True
        parts = (slice(start, start + ROWS) for start in range(0, shape[0], ROWS))
        return any((self.read(EMBEDDING, rows) != self.read(HEAD, rows)).any() for rows in parts)


def read_weight_map(index: Path) -> dict[str, str]:
    """Read {tensor: file} of an index."""
    files = read_object(index).get("weight_map")
    if not isinstance(files, dict):
        raise UserError(f"{index}: weight_map must be an object, not {shown(files)}")
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(
                f"{index}: weight_map: {name}: {shown(file)} must be the name of a file beside it"
            )
    return files


def has_own_head(directory: Path) -> bool:
    """True if the weights of a directory have an untied output embedding, whatever config.json says."""
    exists = any((Path(directory) / name).is_file() for name in (SINGLE, INDEX))
    return exists and WeightFiles(directory).has_own_head()
