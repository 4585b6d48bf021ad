"""Forward and backward passes over micro-batches, with Megatron's schedules.

A script passes a list of packed micro-batches and a loss function

    loss_fn(batch, output) -> loss, metrics

of one micro-batch and the output of the model's last stage (a policy: log-probs [T], or with entropy [T, 2];
a reward model: values [T, A]). It returns **sums**: the loss to minimise, a scalar, and metrics, scalars by
name. The engine divides all of them by one denominator, that of the whole step over all ranks (trained
tokens, pairs, sequences), before the backward pass. So neither the gradient nor a metric depends on the split
of the step.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from align.data import context_slices
from align.data.packing import Batch, to_device
from align.distributed import parallel, watchdog
from align.model import attention, gpt

LossFn = Callable[[Batch, Tensor], tuple[Tensor, dict[str, Tensor]]]


def forward_backward(
    model: DistributedDataParallel, batches: list[Batch], loss_fn: LossFn, denominator: float
) -> dict[str, float]:
    """Compute the gradient of one step, in the model's buffers, and its metrics.

    Args:
        batches: this data parallel rank's micro-batches, equally many on every rank.
        denominator: of the whole step, over all data parallel ranks, equal on every rank.

    Returns:
        "loss" and the loss function's metrics: sums over all micro-batches and ranks, divided by denominator.

    Raises FloatingPointError with the ranks whose data make the loss infinite or NaN.
    """
    model.zero_grad_buffer()
    return run(model, batches, loss_fn, denominator, forward_only=False)


@torch.no_grad()
def evaluate(
    model: DistributedDataParallel, batches: list[Batch], loss_fn: LossFn, denominator: float
) -> dict[str, float]:
    """Compute the metrics of forward_backward without the gradient."""
    model.eval()
    metrics = run(model, batches, loss_fn, denominator, forward_only=True)
    model.train()
    return metrics


@torch.no_grad()
def outputs(
    model: DistributedDataParallel, batches: list[Batch], compute: Callable[[Batch, Tensor], Tensor]
) -> list[Tensor]:
    """Compute `compute(batch, output)` of each micro-batch, without a gradient, on every stage.

    The output is a loss function's: for the same micro-batch it has the same bits as in training.
    """

    def finish(batch: Batch, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return output.new_zeros(()), torch.zeros((), dtype=torch.int), compute(batch, output)

    model.eval()
    results = schedule(model, batches, finish, forward_only=True)
    model.train()
    return parallel.list_from_last_stage(results)


def run(
    model: DistributedDataParallel,
    batches: list[Batch],
    loss_fn: LossFn,
    denominator: float,
    forward_only: bool,
) -> dict[str, float]:
    """Loss and metrics of the micro-batches, and their gradient unless `forward_only`."""

    def finish(batch: Batch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, sums = loss_fn(batch, output)
        no_tokens = torch.zeros((), dtype=torch.int)  # "0 tokens" tells Megatron not to divide the gradient
        sums = {"loss": total, **sums}
        return total / denominator, no_tokens, {name: value.detach().double() for name, value in sums.items()}

    return reduce_metrics(schedule(model, batches, finish, forward_only), denominator)


def schedule(
    model: DistributedDataParallel, batches: list[Batch], finish: Callable, forward_only: bool
) -> list:
    """Run Megatron's schedule; returns a result per micro-batch on the last stage, none on the others.

    `finish(batch, output)` runs on the last stage and returns the loss, "0 tokens", and a result.
    """
    stages = gpt.stages(model)
    vp = len(stages) if len(stages) > 1 else None
    run_schedule = get_forward_backward_func(mpu.get_pipeline_model_parallel_world_size(), vp)
    return run_schedule(
        forward_step_func=functools.partial(forward_step, finish=finish),
        data_iterator=[iter(batches) for _ in stages],
        model=list(stages),
        num_microbatches=len(batches),
        seq_length=1,  # unused: stages exchange the length of each micro-batch
        micro_batch_size=1,
        forward_only=forward_only,
    )


def forward_step(batches: Iterator[Batch], model: gpt.Decoder, finish: Callable) -> tuple[Tensor, Callable]:
    """Run one micro-batch through this stage; the schedule calls the returned function on the last stage."""
    watchdog.tick("forward and backward" if torch.is_grad_enabled() else "forward")
    batch = next(batches)
    return forward(model, batch), lambda output: finish(batch, whole_sequence(output))


def forward(model: gpt.Decoder, batch: Batch) -> Tensor:
    """Run one micro-batch through this stage: hidden states, on the last stage log-probs or values."""
    tokens = len(batch.tokens)
    layout = mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size()
    own = functools.partial(context_slices.take, spans=context_slices.spans_of_rank(tokens, *layout))
    trained = torch.from_numpy(own(torch.from_numpy(batch.is_trained)).numpy().nonzero()[0])
    qkv_format = "thd" if model.te else None
    return model(
        input_ids=own(batch.tokens)[None],
        position_ids=own(batch.positions)[None],
        attention_mask=None,
        labels=own(batch.targets)[None],
        loss_mask=to_device(trained, batch.tokens.device),  # places, in place of Megatron's mask
        packed_seq_params=attention.packed_params(
            batch.lengths, batch.prefixes, tokens, qkv_format, batch.tokens.device
        ),
    )


def whole_sequence(output: Tensor) -> Tensor:
    """Gather [T/cp, ...] of context parallel ranks to [T, ...]; the gradient of a rank is its own part."""
    ranks = mpu.get_context_parallel_world_size()
    if ranks == 1:
        return output
    output = gather_from_sequence_parallel_region(
        output, tensor_parallel_output_grad=False, group=mpu.get_context_parallel_group()
    )
    return context_slices.in_pack_order(output, ranks)


def reduce_metrics(parts: list[dict[str, Tensor]], denominator: float) -> dict[str, float]:
    """Sum over micro-batches and data parallel ranks, divide, and broadcast to every stage."""
    result: list[dict[str, float]] = [{}]
    local_loss = 0.0
    if mpu.is_pipeline_last_stage():
        names = list(parts[0])
        sums = torch.stack([torch.stack([part[name] for part in parts]).sum() for name in names])
        local_loss = float(sums[names.index("loss")])
        result = [dict(zip(names, (parallel.sum_over_dp(sums) / denominator).tolist(), strict=True))]
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        group = mpu.get_pipeline_model_parallel_group()
        dist.broadcast_object_list(result, mpu.get_pipeline_model_parallel_last_rank(), group=group)
    if not math.isfinite(result[0]["loss"]):
        losses = parallel.gather(local_loss)
        ranks = ", ".join(str(rank) for rank, loss in enumerate(losses) if not math.isfinite(loss))
        source = ranks or "none (only the sum overflows)"
        raise FloatingPointError(f"the loss is {result[0]['loss']}, from the data of rank {source}")
    return result[0]


@contextlib.contextmanager
def during(label: str) -> Iterator[None]:
    """Prefix the message of a FloatingPointError: "step 12: the loss is nan, ..."."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{label}: {error}") from error
