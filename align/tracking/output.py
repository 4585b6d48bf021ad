"""Checks of --output before anything is written, so that no file of the user's is overwritten."""

import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from align.errors import UserError
from align.files import ROOT, check_path, read_object
from align.flags import flag_of

WRITTEN = (  # names of a run's files in OUTPUT, beside the script; weights: OUTPUT is a model
    "config.json log.txt metrics.jsonl samples.jsonl metrics.tmp samples.tmp prompt_format.json "
    "reference.txt base.txt wandb_id.txt checkpoints hf hf.tmp adapter adapter.tmp plots rollouts "
    "*.safetensors pytorch_model*.bin".split()
)


def check_run(output: Path, flags: dict, script: Path) -> None:
    """Refuse an OUTPUT in which a run, or its export, would overwrite or delete files of others."""
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
            raise UserError(f"{flag} {path} is in --output {output}, where a run writes: give another")
    if (output / "hf").is_symlink():
        raise UserError(f"--output {output}: hf in it is a link, which the export cannot replace: remove it")
    names = [path.name for name in (*WRITTEN, script.name) for path in output.glob(name)]
    if names and not is_run(output):  # in this order: rank 0 may be writing, the flags first
        raise UserError(f"--output {output} holds {names[0]}, and no config.json of a run: give another")


def lock(output: Path, say: Callable[[str], None]) -> IO[str]:
    """Lock OUTPUT until the file is closed. Raises UserError if it is in use; logs that locks are missing."""
    file = open(output / ".lock", "a+", encoding="utf-8")
    try:
        # unlike flock's, the lock is not inherited by a fork of this process
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    """True if a directory has the flags or a checkpoint of a run."""
    config = output / "config.json"
    has_flags = config.is_file() and "flags" in read_object(config)
    return has_flags or bool(complete_checkpoints(output / "checkpoints"))


def complete_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a directory, oldest first."""
    return sorted(path for path in directory.glob("step_????????") if path.is_dir())


def delete_checkpoint(path: Path) -> None:
    """Rename a checkpoint, then delete it, so that a kill leaves no half of it under its name."""
    shutil.rmtree(path.rename(path.with_suffix(".tmp")))


def inputs(flags: dict) -> Iterator[tuple[str, Path]]:
    """Yield flag and path of the models and data sets on this machine."""
    for name, value in flags.items():
        if name in ("model", "adapter", "reward_model", "critic") or name.endswith("_data"):
            for path in value if isinstance(value, tuple | list) else [value]:
                if path and Path(path).exists():
                    yield flag_of(name), Path(path)
