"""Run by test_invariance.py on every rank: the same steps in several layouts of one size, to a file."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel

from align.data import packing
from align.distributed import parallel
from align.model import architecture, gpt, huggingface
from align.model.config import ModelConfig
from align.tracking.metrics import with_std
from align.training import batching, engine, optim, reference
from tests.support import grids
from tests.support.parity_data import LABELS, LOSSES, LR, ROWS, SEED, STEPS, data_set, sequence_logprobs

# Adam divides a gradient by its own size: with the usual 1e-8 it makes whole steps of gradients that are
# nothing but rounding, and one bit of a weight moves metrics by 1e-4.
ADAM_EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """An algorithm, and one way to split its steps."""

    algorithm: str = "sft"
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vp: int = 1
    sequence_parallel: bool = False
    micro_batch_tokens: int = 64
    micro_batch_size: int | None = None
    reverse: bool = False
    recompute: str = "none"
    sharing: bool = True  # do the examples of a row share the places of their common beginning?
    swap: bool = False  # dpo: the reference's weights are swapped in, not its log-probs computed before

    @property
    def layout(self) -> parallel.ParallelConfig:
        return parallel.ParallelConfig(
            tp=self.tp, pp=self.pp, vp=self.vp, cp=self.cp, sequence_parallel=self.sequence_parallel
        )


def build(directory: Path, case: Case) -> gpt.Decoder:
    """This rank's shard of the model that the case trains, with its weights."""
    start, labels = architecture.read_config(directory), LABELS[case.algorithm]
    arch = replace(start, labels=labels)
    config = ModelConfig(model=str(directory), precision="fp32", recompute=case.recompute)
    source = huggingface.open_source(directory, start, SEED)
    if labels == 0:
        model = gpt.build_policy(arch, config, case.layout)
    else:
        model = gpt.build_scorer(arch, config, case.layout, (1 / labels,) * labels)
        source = source if start.labels else huggingface.FreshHead(source, arch, SEED)
    huggingface.load(model, source)
    return model


def make_batches(policy: DistributedDataParallel, case: Case, step: int, rows: int) -> list[packing.Batch]:
    """This rank's micro-batches of a step."""
    data, order = data_set(case.algorithm, step, rows), range(rows)[:: -1 if case.reverse else 1]
    examples, values = [data.rows[i] for i in order], {name: x[order] for name, x in data.values.items()}
    if not case.sharing:
        return [unshared(policy, examples, values)]
    config = packing.BatchConfig(
        micro_batch_tokens=case.micro_batch_tokens, micro_batch_size=case.micro_batch_size
    )
    return batching.micro_batches(policy, examples, config, values)


def unshared(
    policy: DistributedDataParallel,
    examples: list[tuple[packing.Example, ...]],
    values: dict[str, np.ndarray],
) -> packing.Batch:
    """This rank's rows in one micro-batch, in which every example has all its places itself."""
    own_rows = slice(parallel.dp_rank(), None, parallel.dp_size())
    batch = packing.collate(
        [[example] for row in examples[own_rows] for example in row], batching.alignment(policy)
    )
    assert sum(batch.lengths) > sum(
        map(packing.num_places, examples[own_rows])
    )  # else there is nothing to share
    for name, arrays in values.items():
        batch.extra[name] = torch.from_numpy(arrays[own_rows].reshape(-1, *arrays.shape[2:]))
    return batch


def attach_reference(
    policy: DistributedDataParallel, case: Case, sizes: list[int], path: Path
) -> Callable[[list[packing.Batch]], None]:
    """Attach the reference's log-probs to micro-batches of "dpo"; sizes: rows of each step."""
    if case.swap:
        return partial(reference.Swapped(policy, sequence_logprobs).attach, name="train")
    precomputed = reference.Precomputed(
        policy,
        sequence_logprobs,
        lambda name, rows: make_batches(policy, case, rows[0] // ROWS, len(rows)),
        {"train": [range(step * ROWS, step * ROWS + size) for step, size in enumerate(sizes)]},
        path,
        repr((path, case)),
    )
    return partial(precomputed.attach, name="train")


def train(directory: Path, case: Case, path: Path, adam_eps: float | None = None) -> list[dict[str, float]]:
    """Every metric of each update, and of one evaluation after them; `path` is for reference log-probs.

    adam_eps: in place of the project's, which parity with torch.optim.AdamW needs.
    """
    policy = gpt.distributed(build(directory, case))
    optimizer = optim.build(policy, optim.OptimConfig(weight_decay=0.1))
    for adam in optim.adams(optimizer) if adam_eps else ():
        for group in adam.optimizer.param_groups:
            group["eps"] = adam_eps
    sizes = [ROWS] * STEPS + [1]  # the evaluation has fewer rows than there are data parallel ranks
    history = []
    attach = attach_reference(policy, case, sizes, path) if case.algorithm == "dpo" else lambda batches: None
    for step, rows in enumerate(sizes):
        batches = make_batches(policy, case, step, rows)
        attach(batches)
        count = sum(data_set(case.algorithm, step, rows).counts)
        if step < STEPS:
            metrics = engine.forward_backward(policy, batches, LOSSES[case.algorithm], count)
            metrics["grad_norm"] = optim.step(optimizer, LR[case.algorithm])
        else:
            metrics = engine.evaluate(policy, batches, LOSSES[case.algorithm], count)
        history.append(with_std(metrics))
    return history


def main(models: Path, output: Path, cases: list[dict]) -> None:
    """The metrics of each case, by every rank into a file of its own."""
    results = []
    with parallel.start(parallel.ParallelConfig()):
        for number, flags in enumerate(cases):
            directory, case = models / flags.pop("family"), Case(**flags)
            grids.change(case.layout)
            results.append(train(directory, case, output / f"reference{number}.safetensors", ADAM_EPS))
    (output / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    grids.use_small_buckets()
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
