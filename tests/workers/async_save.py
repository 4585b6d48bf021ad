"""Run by test_async_save.py on every rank: a script whose checkpoints are written late, or not at all.

    async_save.py STEP HOLD script flags...

The files of the checkpoint after STEP steps are written once the file HOLD is gone; with HOLD "full" they
meet a full disk.
"""

import functools
import importlib
import sys
import time
from pathlib import Path

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from align.distributed import launch
from align.training import checkpoint_writer
from align.training.checkpoint_writer import Bucket

write_files = checkpoint_writer.write_files


def write_late(step: int, hold: str, request: AsyncRequest, buckets: list[Bucket]) -> dict[Path, list]:
    """`write_files`, held back."""
    if any(f"step_{step:08d}" in path for path, _, _ in buckets):
        if hold == "full":
            raise OSError(28, "No space left on device", buckets[0][0])
        while Path(hold).exists():
            time.sleep(0.01)
    return write_files(request, buckets)


if __name__ == "__main__":
    _, step, hold, *sys.argv = sys.argv
    checkpoint_writer.write_files = functools.partial(write_late, int(step), hold)
    script = importlib.import_module(sys.argv[0].removesuffix(".py"))
    launch.run(script.main, script.Config)
