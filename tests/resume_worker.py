"""Run by test_resume.py under torchrun: train_sft.py with several lists of flags, one run after the other."""

import json
import sys

import tyro
from megatron.core import parallel_state as mpu

import train_sft
from align import parallel

if __name__ == "__main__":
    with parallel.start(parallel.ParallelConfig()):
        for flags in json.loads(sys.argv[1]):
            config = tyro.cli(train_sft.Config, args=flags, config=(tyro.conf.OmitArgPrefixes,))
            mpu.destroy_model_parallel()
            parallel.make_grid(config.parallel)
            train_sft.main(config)
