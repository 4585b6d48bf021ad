"""Run by test_resume.py on every rank: several commands, [[script, flag, ...], ...], one after the other."""

import functools
import importlib
import json
import sys

import torch
import tyro

from align.distributed import parallel
from align.tracking import run
from tests.support import grids


def main(commands: list[list[str]]) -> None:
    """Run the commands in this process."""
    run.Run.close = functools.partialmethod(run.Run.close, plots=False)  # curves take long
    scripts = {script: importlib.import_module(script.removesuffix(".py")) for script, *_ in commands}
    with parallel.start(parallel.ParallelConfig()):  # after the imports, as in the scripts
        for script, *flags in commands:
            config = tyro.cli(scripts[script].Config, args=flags, config=(tyro.conf.OmitArgPrefixes,))
            torch.use_deterministic_algorithms(config.parallel.deterministic)
            grids.change(config.parallel)
            scripts[script].main(config)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
