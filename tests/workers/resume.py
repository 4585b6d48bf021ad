"""Run by test_resume.py on every rank: several commands, [[script, flag, ...], ...], one after the other."""

import functools
import importlib
import json
import sys
import zlib

import torch
import tyro

from align.data import toy
from align.distributed import parallel
from align.tracking import run
from tests.support import grids


def reward(prompt: str, response: str, row: dict) -> float:
    """For --reward-fn: the toy's score, and up to 1 that each answer has of its own.

    So answers of a random model differ in what they are worth, and one that differs shows in the mean reward.
    """
    return toy.reward(prompt, response, row) + zlib.crc32(response.encode("utf-8", "replace")) / 2**32


if __name__ == "__main__":
    run.Run.close = functools.partialmethod(run.Run.close, plots=False)  # curves take long
    commands = json.loads(sys.argv[1])
    scripts = {script: importlib.import_module(script.removesuffix(".py")) for script, *_ in commands}
    with parallel.start(parallel.ParallelConfig()):  # after the imports, as in the scripts
        for script, *flags in commands:
            config = tyro.cli(scripts[script].Config, args=flags, config=(tyro.conf.OmitArgPrefixes,))
            torch.use_deterministic_algorithms(config.parallel.deterministic)
            grids.change(config.parallel)
            scripts[script].main(config)
