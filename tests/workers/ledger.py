"""Run by test_ledger.py on every rank: scripts, each with a bug or none, and the errors that stop them."""

import functools
import importlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from align import command_line
from align.distributed import parallel
from align.tracking import run
from tests.support import grids
from tests.support.seeded_bugs import Bug, seeded


def attempt(script: str, flags: list[str], bug: Bug) -> str | None:
    """The error with which a script ends, None if it runs to its end."""
    module = importlib.import_module(script)
    config = command_line.parse(module.Config, flags)
    torch.use_deterministic_algorithms(config.parallel.deterministic)
    grids.change(config.parallel)
    try:
        with seeded(bug):
            module.main(config)
    except RuntimeError as error:
        return str(error)
    return None


if __name__ == "__main__":
    run.Run.close = functools.partialmethod(run.Run.close, plots=False)  # curves take long
    folder = Path(sys.argv[1])
    with parallel.start(parallel.ParallelConfig()):
        errors = [attempt(*case) for case in json.loads((folder / "cases.json").read_text())]
        (folder / f"errors{dist.get_rank()}.json").write_text(json.dumps(errors))
