"""Run by test_transformer_engine.py under torchrun: models with torch's layers, and with the stand-in's."""
# ruff: noqa: E402

import hashlib
import json
import os
import sys
from pathlib import Path

from tests.support import stand_ins

stand_ins.install("transformer_engine")  # before anything imports Megatron

import torch
from megatron.core import parallel_state as mpu

from align.data.packing import BatchConfig
from align.distributed import parallel
from align.model import architecture, gpt, huggingface, huggingface_names
from align.model import config as model_config
from align.training import batching, checkpoint, engine, optim
from tools.conformance.losses import LOSSES, SEED
from tools.conformance.rows import data_set

STEPS = 2


def build(directory: Path, layout: parallel.ParallelConfig, te: bool) -> gpt.Decoder:
    """A policy, its weights loaded."""
    model_config.uses_te = gpt.uses_te = lambda config: te
    arch, config = architecture.read_config(directory), model_config.ModelConfig(str(directory), "fp32")
    policy = gpt.build_policy(arch, config, layout)
    huggingface.load(policy, huggingface.open_source(directory, arch, SEED))
    return policy


def train(trained: tuple, steps: range) -> list[tuple[float, float]]:
    """Loss and norm of the gradient of each step."""
    policy, optimizer = trained
    history = []
    for step in steps:
        data = data_set("sft", step, 5)
        batches = batching.micro_batches(policy, data.rows, BatchConfig(micro_batch_tokens=100), data.values)
        loss = engine.forward_backward(policy, batches, LOSSES["sft"], sum(data.counts))["loss"]
        history.append((loss, optim.step(optimizer, 1e-3)))
    return history


def logprobs(policy: torch.nn.Module) -> list[float]:
    """Log-probs of all trained tokens of some rows that share micro-batches."""
    rows = data_set("sft", 9, 5).rows
    return [float(x) for part in batching.per_example_outputs(policy, rows, BatchConfig()) for x in part]


def describe(directory: Path, layout: parallel.ParallelConfig, te: bool, output: Path) -> dict[str, object]:
    """Results of training that is saved, and goes on with the other kind of layers."""
    policy = gpt.distributed(build(directory, layout, te))
    optimizer = optim.build(policy, optim.OptimConfig())
    huggingface.save(policy, directory, output / "hf")
    files = sorted((output / "hf").glob("*.safetensors"))
    first = logprobs(policy)
    history = train((policy, optimizer), range(STEPS))
    saved = output / "checkpoint"
    checkpoint.write(saved, STEPS, policy, optimizer)
    shards = policy.module.sharded_state_dict(metadata=checkpoint.sharding_metadata())
    other = gpt.distributed(build(directory, layout, not te))
    other = other, optim.build(other, optim.OptimConfig())
    checkpoint.load(saved, *other, same_layout=True)
    again = logprobs(other[0])
    history += train(other, range(STEPS, 2 * STEPS))
    names = [type(module).__name__ for module in policy.modules()]
    return {
        "te": names.count("TEAttention"),
        "weights": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
        "names": [hf_name for _, _, hf_name in huggingface_names.named_parameters(policy.module)],
        "shards": sorted((shard.key, *shard.data.shape) for shard in shards.values()),
        "logprobs": first,
        "moved": [logprobs(policy), again],
        "history": history,
    }


def main(models: Path, output: Path, cases: list[dict]) -> None:
    results = []
    with parallel.start(parallel.ParallelConfig()):
        for number, flags in enumerate(cases):
            directory = models / flags.pop("family")
            layout = parallel.ParallelConfig(**flags)
            mpu.destroy_model_parallel()
            parallel.make_grid(layout)
            outputs = [output / f"{number}_{te}" for te in (False, True)]
            results.append([describe(directory, layout, te, outputs[te]) for te in (False, True)])
    (output / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
