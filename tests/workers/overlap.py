"""Run by test_optim.py on every rank: gradients that are summed during the backward pass, or after it."""

import functools
import json
import os
import sys
from pathlib import Path

import torch

from align.data import packing
from align.distributed import parallel
from align.model import architecture, gpt, huggingface
from align.model.config import ModelConfig, overlaps_gradients
from align.training import batching, engine, optim
from tools.conformance.losses import LOSSES, SEED
from tools.conformance.rows import data_set

ROWS = (5, 1, 4)  # of each step, one a micro-batch: first one rank has an empty micro-batch, then only that


def train(directory: Path, overlap: bool) -> dict[str, object]:
    """The norms of the gradient, the number of buckets, the weights as sums of bits; buckets are small."""
    gpt.overlaps_gradients = lambda: overlap
    arch, config = architecture.read_config(directory), ModelConfig(str(directory), "fp32")
    policy = gpt.build_policy(arch, config, parallel.ParallelConfig())
    huggingface.load(policy, huggingface.open_source(directory, arch, SEED))
    policy = gpt.distributed(policy)
    optimizer = optim.build(
        policy, optim.OptimConfig(clip_grad=0.0)
    )  # a clipped step has the norm's rounding
    norms, batches = [], packing.BatchConfig(micro_batch_size=1)
    for step, rows in enumerate(ROWS):
        data = data_set("sft", step, rows)
        micro_batches = batching.micro_batches(policy, data.rows, batches, data.values)
        engine.forward_backward(policy, micro_batches, LOSSES["sft"], sum(data.counts))
        norms.append(optim.step(optimizer, 1e-3))
    bits = [int(weight.view(torch.int32).long().sum()) for weight in policy.parameters()]
    return {"norms": norms, "buckets": len(policy.buffers[0].buckets), "bits": bits}


def main(directory: Path, output: Path) -> None:
    small = functools.partial(gpt.DistributedDataParallelConfig, bucket_size=20_000)
    gpt.DistributedDataParallelConfig = small
    with parallel.start(parallel.ParallelConfig()):
        default = overlaps_gradients()
        results = {"default": default, "after": train(directory, False), "during": train(directory, True)}
    (output / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
