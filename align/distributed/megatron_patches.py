"""Repairs of Megatron-Core 0.16 and 0.19 on every device. megatron_on_cpu.py has what only CPUs need."""

import itertools
import queue
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.resharding.refit import CopyService, NCCLCopyService, get_or_create_service
from megatron.core.tensor_parallel import layers
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor

from align.kernels.matmul import add_product

VERSION = tuple(map(int, version("megatron-core").split(".")[:2]))
# By default 0.19 writes in the background by an extension of NVIDIA's; 0.16 has no such choice.
ASYNC_SAVE = {"async_strategy": "mcore"} if VERSION >= (0, 19) else {}


def keep_step_through_loading() -> None:
    """Keep the "step" of torch's AdamW through loading: Megatron drops it and then asks for it."""
    original = DistributedOptimizer._set_main_param_and_optimizer_states
    if original.__name__ == "with_step":
        return

    def with_step(self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict) -> None:
        group, index = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
        original(self, model_param, {**tensors, "step": state["step"]} if "step" in state else tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = with_step


def save_without_padding_of_buckets() -> None:
    """Find each parameter's state where Megatron gathers it for a checkpoint.

    It gathers the buckets of a buffer without the padding at their ends, and then looks for the parameters
    where they are in the padded buffer: after the first padded bucket all are shifted.
    """
    original = DistributedOptimizer.sharded_param_state_fully_reshardable
    if original.__name__ == "unpadded":
        return

    def unpadded(self: DistributedOptimizer, *args: object, **kwargs: object) -> object:
        places = [buffer.param_index_map for buffer in self.buffers]
        for buffer in self.buffers:
            buffer.param_index_map = without_padding(buffer)
        try:
            return original(self, *args, **kwargs)
        finally:
            for buffer, padded in zip(self.buffers, places, strict=True):
                buffer.param_index_map = padded

    DistributedOptimizer.sharded_param_state_fully_reshardable = unpadded


def without_padding(buffer: _ParamAndGradBuffer) -> dict[torch.nn.Parameter, tuple[int, int, int]]:
    """Start, end and bucket of each parameter in a buffer whose buckets have no padding at their ends."""
    padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
    shifts = [0, *itertools.accumulate(padding)]
    return {
        parameter: (start - shifts[bucket], end - shifts[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


def read_common_state_of_later_versions() -> None:
    """Load the checkpoints of Megatron-Core 0.19 with 0.16: their common state is an object among the shards.

    0.16 reads it from a file of its own, common.pt; 0.19 reads both.
    """
    if VERSION >= (0, 19) or common.TorchCommonLoadStrategy.load_common.__name__ == "load_either":
        return
    strategy = common.TorchCommonLoadStrategy
    original = strategy.load_common

    def load_either(self: object, checkpoint_dir: str | Path) -> dict:
        if (Path(checkpoint_dir) / common.COMMON_STATE_FNAME).exists():
            return original(self, checkpoint_dir)
        state = ShardedObject("common_state", None, (1,), (0,))
        return TorchDistLoadShardedStrategy().load({"common": state}, Path(checkpoint_dir))["common"]

    strategy.load_common = load_either


def use_thread_queue() -> None:
    """Collect the results of a save in this process.

    Megatron would start a process to hold this queue, which imports the whole script again; saving in the
    foreground needs no such thing.
    """
    filesystem_async._results_queue = queue.Queue()


def fuse_gradient_accumulation() -> None:
    """Add the gradients of weights to Megatron's fp32 buffer by `add_product`.

    Megatron has this from a CUDA extension of apex only, and calls one of its functions. On a GPU the product
    is never rounded to bf16, nor written as a tensor of its own.
    """

    def accumulate(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        add_product(main_grad, grad_output.t(), inputs)

    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    layers._grad_accum_fusion_available = True


def measure_gradients_at_once() -> None:
    """Measure and clip the gradients of all weights in a few kernels, where there is no extension for it.

    Megatron's own loop waits for the GPU at each weight, and scales through a temporary tensor: 16 bytes of
    memory traffic a weight in place of 8. The bits are the same.
    """

    def norm(chunk: int, flag: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
        return torch.nn.utils.get_total_norm(lists[0])[None], None

    def scale(chunk: int, flag: Tensor, lists: list[list[Tensor]], factor: float) -> None:
        assert lists[0] is lists[1]  # in place
        torch._foreach_mul_(lists[0], factor)

    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:  # not apex's, nor Transformer Engine's
        clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = norm, scale


def copy_service() -> CopyService:
    """Copy service that moves weights from one layout to another, on the current stream.

    A stream of its own would not wait for the parts that Megatron cuts out of the weights on the current one.
    """
    if not torch.cuda.is_available():
        return get_or_create_service("gloo")
    service = NCCLCopyService()
    service._copy_stream = torch.cuda.current_stream()
    return service
