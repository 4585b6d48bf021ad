"""Run by test_invariance.py under torchrun: the same steps in several layouts of one size, to a file."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state as mpu

from align import architecture, engine, huggingface, losses, model, optim, packing, parallel
from tests.parity_data import LR, STEPS, examples


@dataclass(frozen=True)
class Case:
    """One way to split the same steps."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    micro_batch_tokens: int = 64
    micro_batch_size: int | None = None
    reverse: bool = False
    recompute: str = "none"


def train(directory: Path, case: Case) -> list[dict[str, float]]:
    """Every metric of each step."""
    layout = parallel.ParallelConfig(case.tp, case.pp, case.cp, case.sequence_parallel)
    mpu.destroy_model_parallel()
    parallel.make_grid(layout)
    arch = architecture.read_config(directory)
    config = model.ModelConfig(model=str(directory), precision="fp32", recompute=case.recompute)
    policy = model.build_policy(arch, config, layout)
    huggingface.load(policy, huggingface.open_source(directory, arch, 0))
    policy = model.distributed(policy)
    optimizer = optim.build(policy, optim.OptimConfig(lr=LR))

    batch = packing.BatchConfig(
        micro_batch_tokens=case.micro_batch_tokens, micro_batch_size=case.micro_batch_size
    )

    def micro_batches(rows: list[packing.Example]) -> list[packing.Batch]:
        return engine.micro_batches(policy, [[row] for row in rows], batch)

    def loss_fn(batch: packing.Batch, logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert len(logprobs) == len(batch.tokens)
        return losses.sft_loss(logprobs, batch.mask), {"square": (logprobs.square() * batch.mask).sum()}

    history = []
    for step in range(STEPS):
        rows = examples(step)[:: -1 if case.reverse else 1]
        found = engine.forward_backward(policy, micro_batches(rows), loss_fn, packing.num_trained(rows))
        found["grad_norm"] = optim.step(optimizer, LR)
        history.append(found)
    rows = examples(STEPS, rows=1)  # fewer rows than data parallel ranks
    history.append(engine.evaluate(policy, micro_batches(rows), loss_fn, packing.num_trained(rows)))
    return history


if __name__ == "__main__":
    models, output, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    with parallel.start(parallel.ParallelConfig()):
        results = [train(models / case.pop("family"), Case(**case)) for case in cases]
    (output / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))
