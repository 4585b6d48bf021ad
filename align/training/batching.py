"""Rows to micro-batches, and outputs of the model by example or token."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model
from torch import nn

from align.data import packing
from align.data.packing import Batch, BatchConfig, Example
from align.distributed import parallel
from align.model import gpt
from align.model.config import FP8_MULTIPLE
from align.training import engine


def micro_batches(
    model: DistributedDataParallel,
    rows: Sequence[Sequence[Example]],
    config: BatchConfig,
    values: Mapping[str, Sequence[np.ndarray] | np.ndarray] | None = None,
) -> list[Batch]:
    """Pack this data parallel rank's share of some rows, on its device.

    Args:
        rows: one or several examples each, such as a pair, which stay in one micro-batch and share the places
            of their common beginning.
        values: by name, an array [k, ...] for each row. `extra` of a micro-batch has the arrays of its rows
            end to end, in the order of its rows.
    """
    shares = not unwrap_model(model).te  # Transformer Engine's attention has no shared places
    lengths = [
        packing.num_places(row) if shares else sum(example.num_inputs for example in row) for row in rows
    ]
    limits = config.micro_batch_tokens, config.micro_batch_size
    # the interleaved schedule takes the micro-batches in groups of as many as there are pipeline ranks
    multiple = mpu.get_pipeline_model_parallel_world_size() if len(gpt.stages(model)) > 1 else 1
    plan = packing.plan_micro_batches(lengths, parallel.dp_size(), *limits, multiple)
    batches = []
    for chosen in plan[parallel.dp_rank()]:
        groups = [rows[i] for i in chosen] if shares else [[example] for i in chosen for example in rows[i]]
        batch = packing.collate(groups, alignment(model))
        for name, arrays in (values or {}).items():
            parts = [arrays[i] for i in chosen] or [arrays[0][:0]]
            batch.extra[name] = torch.from_numpy(np.concatenate(parts))
        batches.append(batch.to(parallel.device()))
    return batches


def pack_responses(
    model: DistributedDataParallel, prompts: Sequence[Sequence[Example]], config: BatchConfig
) -> list[list[Example]]:
    """Group the responses to each prompt, in their order, in rows that fill a micro-batch."""
    shares = not unwrap_model(model).te
    rows: list[list[Example]] = []
    for responses in prompts:
        room = 0
        for example in responses:
            places = example.num_inputs
            if room and shares:  # the first example of the row holds the prompt
                places -= packing.shared_places([rows[-1][0], example])[1]
            if places > room:
                rows.append([])
                places, room = example.num_inputs, config.micro_batch_tokens
            rows[-1].append(example)
            room -= places
    return rows


def per_example_outputs(
    model: DistributedDataParallel, rows: Sequence[Sequence[Example]], config: BatchConfig
) -> list[np.ndarray]:
    """Outputs at each example's trained targets, [trained, ...], in the order of the rows. Collective.

    If the same rows are trained next, in micro-batches of their own, the numbers have the bits of training.
    """
    ends = np.cumsum([0, *map(len, rows)])
    values = {
        "number": [np.arange(*span) for span in zip(ends, ends[1:], strict=False)],
        "trained": [np.array([example.trained.sum() for example in row]) for row in rows],
    }
    batches = micro_batches(model, rows, config, values)
    outputs = engine.outputs(model, batches, lambda batch, output: output.index_select(0, batch.trained))
    own_outputs: dict[int, np.ndarray] = {}
    for batch, output in zip(batches, outputs, strict=True):
        parts = [part.numpy() for part in output.cpu().split(batch.extra["trained"].tolist())]
        own_outputs |= dict(zip(batch.extra["number"].tolist(), parts, strict=True))
    by_number = {n: part for of_rank in parallel.gather_over_dp(own_outputs) for n, part in of_rank.items()}
    return [by_number[number] for number in range(ends[-1])]


def alignment(model: nn.Module) -> int:
    """Divisor of a micro-batch's length: context and sequence parallel parts are equal, and sizes of fp8."""
    config = unwrap_model(model).config
    split = config.tensor_model_parallel_size if config.sequence_parallel else 1
    cp = config.context_parallel_size
    slices = 1 if cp == 1 else 2 * cp  # align.data.context_slices
    return math.lcm(slices, cp * split * (FP8_MULTIPLE if config.fp8 else 1))
