"""Rows to micro-batches, and numbers of the model for each example or token."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model
from torch import nn

from align.data import packing
from align.data.packing import Batch, BatchConfig, Example
from align.distributed import parallel
from align.model.config import FP8_MULTIPLE
from align.training import engine


def micro_batches(
    model: DistributedDataParallel,
    rows: Sequence[Sequence[Example]],
    config: BatchConfig,
    values: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> list[Batch]:
    """This data parallel rank's share of some rows, packed for the model, on its device.

    Args:
        rows: each one or several examples, such as a pair, which stay together in one micro-batch and share
            the places of their common beginning.
        values: by name, an array [k, ...] for each row. A micro-batch has those of its rows end to end in
            `extra`, in the order of its rows.
    """
    shares = not unwrap_model(model).te  # Transformer Engine's attention knows no shared places
    lengths = [
        packing.num_places(row) if shares else sum(example.num_inputs for example in row) for row in rows
    ]
    plan = packing.plan(lengths, parallel.dp_size(), config.micro_batch_tokens, config.micro_batch_size)
    batches = []
    for chosen in plan[parallel.dp_rank()]:
        groups = [rows[i] for i in chosen] if shares else [[example] for i in chosen for example in rows[i]]
        batch = packing.collate(groups, alignment(model))
        for name, arrays in (values or {}).items():
            parts = [arrays[i] for i in chosen] or [arrays[0][:0]]
            batch.extra[name] = torch.from_numpy(np.concatenate(parts))
        batches.append(batch.to(parallel.device()))
    return batches


def answer_rows(
    model: DistributedDataParallel, prompts: Sequence[Sequence[Example]], config: BatchConfig
) -> list[list[Example]]:
    """The answers to each prompt as rows, in their order: as many in a row as one micro-batch takes."""
    shares, rows = not unwrap_model(model).te, []
    for answers in prompts:
        room = 0
        for example in answers:
            own = example.num_inputs
            if room and shares:  # what it adds to the row, whose first example holds the prompt
                own -= packing.shared_places([rows[-1][0], example])[1]
            if own > room:
                rows.append([])
                own, room = example.num_inputs, config.micro_batch_tokens
            rows[-1].append(example)
            room -= own
    return rows


def per_example(
    model: DistributedDataParallel, rows: Sequence[Sequence[Example]], config: BatchConfig
) -> list[np.ndarray]:
    """Output of the last stage for each example's trained targets, [trained, ...], on every rank. Collective.

    The examples follow one another as in the rows. Of rows that are then trained on, in micro-batches of the
    same rows, the numbers have the same bits as in training.
    """
    ends = np.cumsum([0, *map(len, rows)])
    values = {
        "number": [np.arange(*span) for span in zip(ends, ends[1:], strict=False)],
        "trained": [np.array([example.trained.sum() for example in row]) for row in rows],
    }
    batches, mine = micro_batches(model, rows, config, values), {}
    found = engine.outputs(model, batches, lambda batch, output: output[batch.mask.bool()])
    for batch, made in zip(batches, found, strict=True):
        parts = made.cpu().split(batch.extra["trained"].tolist())
        mine |= dict(zip(batch.extra["number"].tolist(), (part.numpy() for part in parts), strict=True))
    everyone = {number: part for rank in parallel.gather_over_dp(mine) for number, part in rank.items()}
    return [everyone[number] for number in range(ends[-1])]


def alignment(model: nn.Module) -> int:
    """Number that divides the length of every micro-batch.

    Each rank of a split gets an equal part, which is a size of 8-bit products if there are any.
    """
    config = unwrap_model(model).config
    split = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return config.context_parallel_size * split * (FP8_MULTIPLE if config.fp8 else 1)
