"""Bugs of parallel training, each a few words of this project or of Megatron-Core replaced in memory.

Most have the kind of a finding of Megatron-LM issue 7452 (September 2026), moved to a place that this project
runs through.
"""

import contextlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tools.conformance.cases import Case

Changes = dict[str, list[tuple[str, str]]]  # module.function or module.Class.method: [(words, others), ...]


def plain(thing: Any) -> Any:
    """The function of a method, or within decorators."""
    return inspect.unwrap(getattr(thing, "__func__", thing))


def mutant(thing: Any, changes: list[tuple[str, str]]) -> Any:
    """A function or a method with words of its source replaced; LookupError unless each occurs there once."""
    function = plain(thing)
    source = textwrap.dedent(inspect.getsource(function))
    for words, others in changes:
        times = source.count(words)
        if times != 1:
            raise LookupError(f"{function.__qualname__} has {words!r} {times} times: seed this bug anew")
        source = source.replace(words, others)
    namespace: dict[str, Callable] = {}
    exec(source, function.__globals__, namespace)
    return namespace[function.__name__]


@contextlib.contextmanager
def seeded(bug: Changes) -> Iterator[None]:
    """Seed a bug for the time of a block, in the code of functions, so that tables of them have it, too."""
    with contextlib.ExitStack() as stack:
        for place, changes in bug.items():
            owner, name = pkgutil.resolve_name(place.rpartition(".")[0]), place.rpartition(".")[2]
            thing = inspect.getattr_static(owner, name)
            function, clear_cache = plain(thing), getattr(thing, "cache_clear", lambda: None)
            stack.callback(clear_cache)
            code = plain(mutant(thing, changes)).__code__
            stack.callback(setattr, function, "__code__", function.__code__)
            function.__code__ = code
            clear_cache()
        yield


@dataclass(frozen=True)
class Bug:
    """A bug, the finding of issue 7452 that has its kind, and a case that shows it."""

    changes: Changes
    processes: int
    case: Case
    finding: int | None = None


RUN, WHOLE = "align.training.engine.run", "align.training.engine.whole_sequence"
FORWARD, DIVIDED = "align.training.engine.forward", "return total / denominator,"
CP, OWN_CP = "mpu.get_context_parallel_world_size()", "mpu.get_context_parallel_rank()"
OWN_MASK = (
    f"context_slices.take(batch.mask, context_slices.spans_of_rank(len(batch.mask), {OWN_CP}, {CP})).sum()"
)
DDP = "megatron.core.distributed.DistributedDataParallel"
BUCKET_GROUP = "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup"
BUCKETS = "in self.bucket_groups + self.expert_parallel_bucket_groups:"
FINALIZE = "megatron.core.distributed.finalize_model_grads"
REGION = "megatron.core.tensor_parallel.mappings._CopyToModelParallelRegion.backward"

BUGS = {
    "context parallel ranks divide their part of a masked loss by their own number of tokens": Bug(
        {RUN: [(DIVIDED, f"return total / denominator * batch.mask.sum() / ({CP} * {OWN_MASK}),")]},
        2,
        Case("sft", cp=2, micro_batch_tokens=400),
        finding=9,
    ),
    "data parallel ranks divide the loss by their own number of tokens": Bug(
        {RUN: [(DIVIDED, "return total / (batch.mask.sum() * parallel.dp_size()),")]},
        2,
        Case("sft", micro_batch_tokens=400),
        finding=3,
    ),
    "the loss is averaged over micro-batches and ranks, not summed": Bug(
        {"align.model.gpt.transformer_config": [("per_token_loss=True", "per_token_loss=False")]},
        2,
        Case("dpo", micro_batch_size=1),
        finding=3,
    ),
    "hidden states are gathered over the context parallel group in place of the tensor parallel one": Bug(
        {
            "align.model.gpt.Policy._postprocess": [
                ("(hidden_states, group=group)", "(hidden_states, group=self.pg_collection.cp)")
            ]
        },
        4,
        Case("sft", tp=2, cp=2, sequence_parallel=True),
        finding=7,
    ),
    "gradients of norms are not summed over tensor parallel ranks with sequence parallelism": Bug(
        {f"{FINALIZE}._allreduce_non_tensor_model_parallel_grads": [("tp_group.size() <= 1", "True")]},
        2,
        Case("sft", tp=2, sequence_parallel=True),
        finding=11,
    ),
    "gradients of a tied embedding are not summed over the first and the last stage": Bug(
        {f"{FINALIZE}._allreduce_word_embedding_grads": [("if embd_group is None:", "return\n    if 0:")]},
        2,
        Case("sft", "llama_tied", pp=2),
    ),
    "the gradient norm counts one tensor parallel rank's part of each matrix": Bug(
        {
            "align.model.gpt.mark_tensor_parallel": [  # 0.19 sets the marks by itself
                (
                    'not hasattr(weight, "tensor_model_parallel")',
                    'not setattr(weight, "tensor_model_parallel", False)',
                ),
                ("set_tensor_model_parallel_attributes(weight, True, dim, stride)", "pass"),
            ]
        },
        2,
        Case("sft", tp=2),
        finding=8,
    ),
    "a stage loads layers by their number within the stage": Bug(
        {
            "align.model.huggingface_names.named_parameters": [
                ("layer = model.decoder.layers[int(match[1])].layer_number - 1", "layer = int(match[1])")
            ]
        },
        2,
        Case("sft", pp=2),
        finding=12,
    ),
    "gradients are not reduced over data parallel ranks": Bug(
        {f"{DDP}.finish_grad_sync": [(BUCKETS, "in []:")]}, 2, Case("grpo")
    ),
    "updated weights are not gathered over data parallel ranks": Bug(
        {f"{BUCKET_GROUP}.start_param_sync": [("in enumerate(self.buckets):", "in []:")]}, 2, Case("sft")
    ),
    "no sum over tensor parallel ranks in the backward pass": Bug(
        {REGION: [("_reduce(grad_output, ctx.group)", "grad_output")]}, 2, Case("ppo", tp=2)
    ),
    "each context parallel rank adds the gradient of the whole loss": Bug(
        {WHOLE: [("output, tensor_parallel_output_grad=False,", "output,")]}, 2, Case("critic", cp=2)
    ),
    "each tensor parallel rank adds the gradient of the same scores": Bug(
        {
            "align.model.gpt.Scorer._postprocess": [
                ("hidden_states, tensor_parallel_output_grad=False,", "hidden_states,")
            ]
        },
        2,
        Case("regression", tp=2, sequence_parallel=True),
    ),
    "gradients of whole adapters are not summed over ranks with sequence parallelism": Bug(
        {"align.model.lora.mark_partial": [("= module.sequence_parallel", "= False")]},
        2,
        Case("sft", tp=2, sequence_parallel=True, lora=4),
    ),
    "the gradient of x A^T is that of one tensor parallel rank's rows": Bug(
        {
            "align.model.lora.AdaptedColumn.delta": [
                ("copy_to_tensor_model_parallel_region(low, group=self.tp_group)", "low")
            ]
        },
        2,
        Case("sft", tp=2, lora=4),
    ),
    "slices of context parallel ranks are put together in the order of the ranks": Bug(
        {WHOLE: [("context_slices.in_pack_order(output, ranks)", "output")]}, 2, Case("sft", cp=2)
    ),
    "each context parallel rank counts positions from the beginning of the pack": Bug(
        {FORWARD: [("own(batch.positions)", "batch.positions[: len(own(batch.tokens))]")]},
        2,
        Case("dpo", "mistral", cp=2, micro_batch_tokens=400),
    ),
    "each rank draws its own random head": Bug(
        {
            "align.model.huggingface.RandomSource.read": [
                ("{self.seed} {name}", "{self.seed} {name} {dist.get_rank()}")
            ]
        },
        2,
        Case("ranking"),
    ),
    "metrics of the last micro-batch stand for all": Bug(
        {
            "align.training.engine.reduce_metrics": [
                ("for part in parts]).sum()", "for part in parts[-1:]]).sum()")
            ]
        },
        1,
        Case("ranking", micro_batch_size=1),
    ),
    "Adam's moments are lost when a checkpoint is loaded": Bug(
        {
            "align.training.checkpoint.load": [
                (
                    'optimizer.load_state_dict(state["optimizer"])',
                    'optimizer.load_state_dict(state["optimizer"]); optim.reset(optimizer)',
                )
            ]
        },
        2,
        Case("sft", tp=2),
    ),
    "a checkpoint counts the padding of buckets (Megatron-Core 0.16 without our repair)": Bug(
        {
            "align.distributed.megatron_patches.without_padding": [
                ("(start - shifts[bucket], end - shifts[bucket], bucket)", "(start, end, bucket)")
            ]
        },
        2,
        Case("sft"),
    ),
}
