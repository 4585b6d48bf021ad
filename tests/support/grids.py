"""Megatron's process groups for workers that go through many layouts: those of a layout are made once.

A grid has some 30 groups. Made anew for each case, they and their threads are still there at the end of the
worker, in their thousands, and take longer than the small cases themselves.

And buckets of gradients as small as their models are beside real ones.
"""

import functools
from unittest import mock

from megatron.core import parallel_state as mpu

from align.distributed import parallel
from align.model import gpt

NAMES = [name for name in vars(mpu) if name.isupper() or name == "_global_process_group_list"]
FRESH = {name: vars(mpu)[name] for name in NAMES}  # before there are any groups
make = mpu.initialize_model_parallel
MADE: dict[str, dict[str, object]] = {}  # by sizes: all that Megatron knows of a grid


def change(config: parallel.ParallelConfig) -> None:
    """Take up this layout's grid and its seeds, as `parallel.make_grid` does in a new process. Collective."""
    with mock.patch.object(mpu, "initialize_model_parallel", take_up):
        parallel.make_grid(config)


def take_up(**sizes: object) -> None:
    """The groups of these sizes, which are made where there are none yet."""
    key = repr(sorted(sizes.items()))
    vars(mpu).update(MADE.get(key, FRESH))
    if key not in MADE:
        make(**sizes)
        MADE[key] = {name: vars(mpu)[name] for name in NAMES}


def use_small_buckets() -> None:
    """Divide Megatron's buffers into padded buckets, as for models of more than 40 million weights."""
    config = gpt.DistributedDataParallelConfig
    gpt.DistributedDataParallelConfig = functools.partial(config, bucket_size=3000)
