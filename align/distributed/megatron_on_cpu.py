"""Run Megatron-Core 0.16 and 0.19 without CUDA.

Megatron names CUDA in many places: `device="cuda"` in its schedules and optimizers,
`torch.cuda.current_device()`, the CUDA random state. `enable()` replaces `torch` in Megatron's own modules by
a look-alike in which those names mean the CPU. Every other module keeps the real torch: replacing
`torch.tensor` and the like globally breaks `with torch.device("meta")`, and transformers then loads wrong
weights without an error.
"""

import ctypes
import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.tensor_parallel import layers, mappings, random
from torch import Tensor

from align.kernels import matmul

# Imported before the exchange: Megatron's modules imported later would keep the real torch.
MODULES = (
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.strategies.state_dict_saver",
    "dist_checkpointing.strategies.torch",
    "distributed",
    "models.gpt",
    "optimizer",
    "pipeline_parallel",
    "resharding.refit",
    "tensor_parallel.random",
    "transformer",
)
FACTORIES = ("tensor", "zeros", "ones", "empty", "empty_like")


class Stream(torch.cpu.Stream):
    """A CPU stream with the CUDA stream's signatures: checkpointing, and transfers of weights (0.19)."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__()

    def record_event(self, event: object = None) -> Any:
        return torch.cpu.Event()

    def synchronize(self) -> None:
        pass


@functools.cache  # once
def enable() -> None:
    """Replace the `torch` of all Megatron modules, before the first Megatron object is made."""
    if torch.cuda.is_available():
        raise RuntimeError("align.distributed.megatron_on_cpu is for machines without CUDA")
    for name in MODULES:
        importlib.import_module(f"megatron.core.{name}")
    cpu = torch.device("cpu")
    cuda = look_alike(
        torch.cuda,
        current_device=lambda: cpu,
        set_device=nothing,
        synchronize=nothing,
        empty_cache=nothing,
        Event=torch.cpu.Event,
        Stream=Stream,
        stream=torch.cpu.stream,
        current_stream=Stream,
        default_stream=Stream,
        manual_seed=torch.manual_seed,
        get_rng_state=lambda *_: torch.get_rng_state(),
        set_rng_state=lambda state, *_: torch.set_rng_state(state),
    )
    factories = {name: on_cpu(getattr(torch, name)) for name in FACTORIES}
    fake = look_alike(torch, cuda=cuda, **factories)
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            vars(module)["torch"] = fake
    # One generator serves both "devices": Megatron's tracker forks it for dropout and recomputation.
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # gloo copies a whole buffer onto itself where a group has one rank.
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(param_and_grad_buffer, name, unless_alone(getattr(param_and_grad_buffer, name)))
    # Megatron multiplies by torch's fp32 product, slow on some processors: see align/kernels/matmul.py.
    for name in ("linear_with_grad_accumulation_and_async_allreduce", "linear_with_frozen_weight"):
        setattr(layers, name, linear_by_onednn(getattr(layers, name)))
    keep_memory()
    methods = {  # without CUDA Tensor.cuda could only raise
        "cuda": lambda self, *_, **__: self,
        "type": cuda_type_names(Tensor.type),
    }
    for name, method in methods.items():
        setattr(Tensor, name, method)


def nothing(*_: object, **__: object) -> None:
    pass


def look_alike(module: types.ModuleType, **changed: object) -> types.ModuleType:
    """Copy a module's dictionary with some names changed, so that attribute access is as fast as before."""
    copy = types.ModuleType(module.__name__)
    late = {"__getattr__": lambda name: getattr(module, name)}  # names that torch loads late
    vars(copy).update(vars(module) | late | changed)
    return copy


def on_cpu(make: Callable) -> Callable:
    """A tensor factory for which device="cuda" means the CPU, without pinned memory.

    0.19 pins the buffers of weights in transfer, which raises without CUDA.
    """

    def make_on_cpu(*args: object, **kwargs: object) -> Tensor:
        kwargs.pop("pin_memory", None)
        if kwargs.get("device") == "cuda":
            kwargs["device"] = torch.device("cpu")
        return make(*args, **kwargs)

    return make_on_cpu


def unless_alone(collective: Callable) -> Callable:
    """Skip a collective between a buffer and this rank's part of it if the group has one rank."""

    def call(output: Tensor, input: Tensor, *, group: dist.ProcessGroup, **kwargs: object) -> object:
        return None if group.size() == 1 else collective(output, input, group=group, **kwargs)

    return call


def linear_by_onednn(megatrons: Callable) -> Callable:
    """Compute Megatron's parallel linear layers in fp32 by align.kernels.matmul.

    Communication as in Megatron's function: input gathered or copied, its gradient scattered or summed. The
    gathered input is kept for the backward pass and not gathered again.
    """

    @functools.wraps(megatrons)  # with its attribute `warned`, which it reads by its own name
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None, **flags: object) -> Tensor:
        if not matmul.uses_onednn(input):
            return megatrons(input, weight, bias, **flags)
        if flags["sequence_parallel"]:
            input = mappings.gather_from_sequence_parallel_region(input, group=flags["tp_group"])
        elif flags["allreduce_dgrad"]:
            input = mappings.copy_to_tensor_model_parallel_region(input, group=flags["tp_group"])
        return matmul.Linear.apply(input, weight, bias)

    return linear


def keep_memory() -> None:
    """Make glibc keep freed memory for the next step, like the caching allocator of GPUs.

    Otherwise every tensor of some megabytes is mapped anew, and touching new pages takes longer than most of
    the arithmetic on them. Other C libraries have no mallopt.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        mmap_max, trim_threshold = -4, -1  # glibc's numbers for these parameters
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def cuda_type_names(plain: Callable) -> Callable:
    """Tensor.type with the names that Megatron's optimizers compare with: 'torch.cuda.FloatTensor'."""

    def type(self: Tensor, *args: object, **kwargs: object) -> object:
        result = plain(self, *args, **kwargs)
        if isinstance(result, str) and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron."):
            return result.replace("torch.", "torch.cuda.")
        return result

    return type
