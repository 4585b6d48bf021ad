"""Checks of --output before anything is written, so that nothing of the user's is overwritten."""

import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from align.config_fields import read_object
from align.errors import UserError

ROOT = Path(__file__).parent.parent
WRITTEN = (  # in OUTPUT by a run, beside the script; weights mean that OUTPUT is a model
    "config.json log.txt metrics.jsonl samples.jsonl metrics.tmp samples.tmp prompt_format.json "
    "reference.txt wandb_id.txt checkpoints hf hf.tmp plots rollouts *.safetensors pytorch_model*.bin".split()
)


def check_run(output: Path, flags: dict, script: Path) -> None:
    """Refuse an OUTPUT in which a run would overwrite or delete what no run has written.

    Args:
        flags: name and value of each flag.
        script: copied to OUTPUT.

    Raises:
        UserError: also for data directly in OUTPUT, and for models in it, which the export may replace.
    """
    check_path(output)
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"--output {output} is a file: give a directory")
    code, home = "the directory of the code", Path(os.path.expanduser("~"))
    places = {Path("/"): "the root directory", home: "the home directory", ROOT: code, script.parent: code}
    for place, name in {**places, Path(): "the current directory"}.items():
        if place.exists() and output.samefile(place):
            raise UserError(f"--output {output} is {name}: give a directory of its own")
    for flag, path in inputs(flags):
        folders = [path, *path.resolve().parents] if path.is_dir() else {path.parent, path.resolve().parent}
        if any(folder.samefile(output) for folder in folders):
            raise UserError(
                f"{flag} {path} is in --output {output}, where a run writes: give another --output"
            )
    if (output / "hf").is_symlink():
        raise UserError(f"--output {output}: hf in it is a link, which the export cannot replace: remove it")
    held = [path.name for name in (*WRITTEN, script.name) for path in output.glob(name)]
    if held and not is_run(output):  # in this order: rank 0 may write now, the flags first
        raise UserError(f"--output {output} holds {held[0]}, and no config.json of a run: give another")


def lock(output: Path, say: Callable[[str], None]) -> IO[str]:
    """Hold OUTPUT for this process until the file is closed, or until the process ends, in whatever way.

    Raises UserError if another process holds it. A file system without locks is logged.
    """
    file = open(output / ".lock", "a+", encoding="utf-8")
    try:
        fcntl.lockf(
            file, fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # unlike flock's, no fork of this process inherits it
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(f"--output {output} is in use by another run, {file.read()}: give another") from None
    except OSError as error:
        say(f"WARNING: --output {output} cannot be locked ({error.strerror}): start no second run there")
        return file
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def is_run(output: Path) -> bool:
    """True if a run has left its flags or a checkpoint there."""
    config = output / "config.json"
    has_flags = config.is_file() and "flags" in read_object(config)
    return has_flags or bool(complete_checkpoints(output / "checkpoints"))


def complete_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a directory, oldest first."""
    return sorted(path for path in directory.glob("step_????????") if path.is_dir())


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint so that a kill leaves no half of it under its name; the next save clears up."""
    shutil.rmtree(path.rename(path.with_suffix(".tmp")))


def inputs(flags: dict) -> Iterator[tuple[str, Path]]:
    """Flag and path of the models and data sets that are on this machine."""
    for name, value in flags.items():
        if name in ("model", "reward_model", "critic") or name.endswith("_data"):
            for path in value if isinstance(value, tuple | list) else [value]:
                if path and Path(path).exists():
                    yield f"--{name.replace('_', '-')}", Path(path)


def check_files(paths: Iterable[Path], *sources: Path) -> None:
    """Refuse files that cannot be written, or that are among the `sources`."""
    for path in paths:
        check_path(path)
        if path.is_dir():
            raise UserError(f"--output {path} is a directory: give a file")
        if path.exists() and any(source.exists() and path.samefile(source) for source in sources):
            raise UserError(f"--output {path} is --input: give another file")


def check_path(path: Path) -> None:
    """Refuse a path that is too long, below a file, a dangling link, or read-only."""
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
    """Write a file of constant content, unless it is there. Raises UserError if another is."""
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
    """Write a file that is there as a whole or not at all."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
