"""The gradient of a step by name in the files, whole, whichever ranks hold its parts."""

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from align.model import adapter_files, gpt, huggingface


def by_name(model: DistributedDataParallel) -> dict[str, Tensor]:
    """Gather the fp32 gradient of every trained weight, in CPU memory. Collective.

    By Hugging Face name, with adapters by the names of peft's files.

    Call it between `engine.forward_backward` and the optimizer step. The gradient is that of the whole step,
    before clipping, and equal on every rank.
    """
    gather_shards(model)
    whole = adapter_files.whole if gpt.stages(model)[0].adapters else huggingface.whole_tensors
    gradients = whole(model.module, main_gradient)
    return {name: tensor.to("cpu", copy=True) for name, tensor in gradients}


def main_gradient(parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient in Megatron's buffer."""
    return parameter.main_grad  # type: ignore[attr-defined]


def gather_shards(model: DistributedDataParallel) -> None:
    """Complete the gradient buffers: after a step's reduction a data parallel rank has its shard only."""
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    for bucket_group in model.bucket_groups:
        for bucket in bucket_group.buckets:
            shards = bucket.grad_data.view(group.size(), -1)
            dist.all_gather_into_tensor(bucket.grad_data, shards[group.rank()].clone(), group=group)
