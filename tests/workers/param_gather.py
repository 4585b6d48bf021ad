"""Run by test_param_gather.py on every rank: commands with small buckets, and NaN for weights not gathered.

After each optimizer step the shards of other ranks become NaN where their gather is yet to come, so that
whatever reads weights too early fails.
"""

import json
import sys

import torch
from megatron.core.optimizer import MegatronOptimizer

from align.training import optim
from tests.support import grids
from tests.workers import resume

step = optim.step


@torch.no_grad()
def step_and_poison(optimizer: MegatronOptimizer, lr: float) -> float:
    """An optimizer step, then NaN in the shards of other ranks."""
    norm = step(optimizer, lr)
    for model in (adam.model_chunks[0] for adam in optim.adams(optimizer)):
        if not model.ddp_config.overlap_param_gather:
            continue
        for group in model.bucket_groups:
            assert not group.param_gather_dispatched  # else NaN would be gathered over, or not be
            rank, size = (
                group.intra_distributed_optimizer_instance_rank,
                group.intra_distributed_optimizer_instance_size,
            )
            for bucket in group.buckets:
                for owner, shard in enumerate(bucket.param_data.chunk(size)):
                    if owner != rank:
                        shard.fill_(torch.nan)
        assert len(model.bucket_groups) > 3 or model.pp_group.rank() > 0
    return norm


if __name__ == "__main__":
    grids.use_small_buckets()
    optim.step = step_and_poison
    resume.main(json.loads(sys.argv[1]))
