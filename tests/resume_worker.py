"""Run by test_resume.py under torchrun: several commands, [[script, flag, ...], ...], one after the other."""

import functools
import importlib
import json
import sys

import tyro
from megatron.core import parallel_state as mpu

from align import metrics, parallel

if __name__ == "__main__":
    metrics.Run.close = functools.partialmethod(metrics.Run.close, plots=False)  # curves take long
    with parallel.start(parallel.ParallelConfig()):
        for script, *flags in json.loads(sys.argv[1]):
            module = importlib.import_module(script.removesuffix(".py"))
            config = tyro.cli(module.Config, args=flags, config=(tyro.conf.OmitArgPrefixes,))
            mpu.destroy_model_parallel()
            parallel.make_grid(config.parallel)
            module.main(config)
