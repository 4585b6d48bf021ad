"""Layouts of workers that go through many of them, and small buckets of gradients for small models."""

import functools

from align.distributed.grids import change
from align.model import gpt

__all__ = ["change", "use_small_buckets"]


def use_small_buckets() -> None:
    """Divide Megatron's buffers into padded buckets, as for models of more than 40 million weights."""
    config = gpt.DistributedDataParallelConfig
    gpt.DistributedDataParallelConfig = functools.partial(config, bucket_size=3000)
