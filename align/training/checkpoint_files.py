"""The files of a checkpoint: checksums, and a check that no pickle in them can run code.

Megatron loads `.metadata`, `common.pt` and the random states as pickles, which may call any function. An
unpickler that allows only the classes of torch's checkpoints loads them first.
"""

import io
import json
import mmap
import pickle
import re
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from align.distributed import parallel
from align.errors import UserError, summary
from align.files import read_object

METADATA = "torch.distributed.checkpoint"
CLASSES = {  # of `.metadata`
    f"{METADATA}.metadata": {
        *"BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta".split(),
        *"TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING".split(),
    },
    f"{METADATA}.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    f"{METADATA}.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}
BACKENDS = {"sharded_backend": "torch_dist", "common_backend": "torch"}
BLOCK = 1 << 26  # bytes that are hashed at a time
STATE = "state.json"  # which holds the checksums
ERRORS = (  # of pickles that are truncated, or of another kind
    *(OSError, EOFError, pickle.UnpicklingError, RuntimeError, zipfile.BadZipFile),
    *(AttributeError, IndexError, KeyError, TypeError, ValueError, MemoryError),
)


class MetadataUnpickler(pickle.Unpickler):
    """Unpickler of a checkpoint's metadata; raises UnpicklingError for any other class or function."""

    def find_class(self, module: str, name: str) -> object:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def check_pickles(directory: Path) -> None:
    """Raise UserError if a pickle of a checkpoint would run code, or cannot be read."""
    for path in sorted(directory.rglob(".metadata")):  # one in each of Megatron's folders
        folder = path.parent
        backends = read_object(folder / "metadata.json")
        # Megatron-Core 0.19 has no common_backend, nor common.pt
        if changed := [name for name, value in BACKENDS.items() if backends.get(name, "torch") != value]:
            raise UserError(f"{folder}/metadata.json: {changed[0]} must be {BACKENDS[changed[0]]!r}")
        try:
            metadata = MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
            if (path := folder / "common.pt").exists() or "common_backend" in backends:
                torch.load(path, map_location="cpu", weights_only=True)
            for index, place in metadata.storage_data.items():
                if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
                    path = folder / place.relative_path
                    with open(path, "rb") as file:
                        file.seek(place.offset)
                        content = file.read(place.length)
                    torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except ERRORS as error:
            raise UserError(f"{path} is damaged, or not of a checkpoint: {summary(error)}") from error


def write_state(directory: Path, state: dict) -> None:
    """Write the state.json of a checkpoint, with a checksum of itself."""
    (directory / STATE).write_text(json.dumps(state | {"xxh3": digest(state)}, indent=2) + "\n")


def read_state(directory: Path) -> dict:
    """Read the state.json of a checkpoint. Raises UserError if it is missing or damaged."""
    path = directory / STATE
    if not path.is_file():
        raise UserError(f"damaged checkpoint: {path} is missing")
    state = read_object(path)
    if missing := {"step", "layout", "metrics"} - set(state):
        raise UserError(f"{path}: no {min(missing)!r} in it")
    if state.pop("xxh3", None) not in (None, digest(state)):  # an earlier version did not write it
        raise UserError(f"damaged checkpoint: {path} has other values than were written")
    return state


def digest(state: dict) -> str:
    """XXH3 of a JSON object."""
    return xxhash.xxh3_64(json.dumps(state, sort_keys=True).encode()).hexdigest()


def checksums(path: Path, own: dict[Path, list]) -> dict[str, list]:
    """Size and XXH3 of all files of a checkpoint except `STATE`. Collective.

    `own`: those that this rank has read already; of the others each is read by one rank.
    """
    names = [sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())]
    dist.broadcast_object_list(names, src=0)
    parts = parallel.gather({name: own.get(path / name) or checksum(path / name) for name in share(names[0])})
    return {name: value for part in parts for name, value in sorted(part.items()) if name != STATE}


def share(names: list[str]) -> list[str]:
    """This rank's share of the files: those it wrote, by their names, and a part of the others."""
    rank, world = dist.get_rank(), dist.get_world_size()
    writers = [re.search(r"__(\d+)_\d+\.distcp$", name) for name in names]
    owners = [int(writer[1]) if writer else i for i, writer in enumerate(writers)]
    return [name for name, owner in zip(names, owners, strict=True) if owner % world == rank]


def checksum(file: Path) -> list:
    """[size, XXH3] of a file."""
    digest, size = xxhash.xxh3_64(), file.stat().st_size
    with open(file, "rb") as opened:
        for start in range(0, size, BLOCK):  # mapped, since reading would copy all of it
            length = min(BLOCK, size - start)
            with mmap.mmap(opened.fileno(), length, access=mmap.ACCESS_READ, offset=start) as block:
                digest.update(block)
    return [size, digest.hexdigest()]


def damage(file: Path, expected: list) -> str:
    """A message for a damaged file; "" for an intact one."""
    if not file.is_file():
        return f"{file} is missing"
    if (size := file.stat().st_size) != expected[0]:
        return f"{file} has {size} bytes, {expected[0]} were written"
    return "" if checksum(file) == expected else f"{file} has other bytes than were written"


def start_hashing(path: Path) -> Future[list[str]]:
    """Compare this rank's share of a checkpoint's files with their checksums, in a thread without the GIL.

    The future has a line for each file, "" for a whole one.
    """
    expected = read_state(path).get("files", {})  # an earlier version did not store them
    names = share(sorted(expected))
    executor = ThreadPoolExecutor(max_workers=1)
    damages = executor.submit(lambda: [damage(path / name, expected[name]) for name in names])
    executor.shutdown(wait=False)
    return damages


def verify(path: Path, damages: Future[list[str]] | None = None) -> None:
    """Raise UserError if a checkpoint is damaged, or if something in it would run code. Collective.

    `damages`: from `start_hashing`, if that has been called.
    """
    own_damages = (damages or start_hashing(path)).result()
    if damaged := sorted(line for part in parallel.gather(own_damages) for line in part if line):
        raise UserError(f"damaged checkpoint: {damaged[0]}")
    parallel.on_main(lambda: check_pickles(path))
