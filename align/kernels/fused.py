"""torch.compile of element-wise functions: one kernel each on a GPU, plain torch on a CPU."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


VARIANTS = 64  # kernels of one function, one for each width and data type, and one for a single row


def fused(function: Callable[..., T]) -> Callable[..., T]:
    """Compile an element-wise function to one kernel on GPUs; on a CPU it stays as it is.

    torch.compile makes the kernel at the first call with CUDA tensors, which must precede the capture of a
    CUDA graph. Uncompiled, each step would read and write its tensor in memory.

    The first argument is a tensor [n, ...]. n may vary without a new kernel, in it and in all tensors with
    as many dimensions; every other size and every number is part of the kernel. No gradient passes through.
    """
    kernel = functools.cache(functools.partial(compiled, function))

    @functools.wraps(function)
    def run(x: Tensor, *rest: object) -> T:
        return kernel()(x, *rest) if compiles(x) else function(x, *rest)

    return run


def compiles(x: Tensor) -> bool:
    """True if the compiled kernel runs. Not with --deterministic: its sums may depend on the first size."""
    return x.is_cuda and not torch.are_deterministic_algorithms_enabled()


def compiled(function: Callable[..., T], backend: str | Callable = "inductor") -> Callable[..., T]:
    """Compile a function for any number of rows; `backend` is for tests."""
    configure()
    # dynamic=False: kernels with fixed widths are faster; only the sizes marked below vary.
    kernel = torch.compile(function, dynamic=False, backend=backend)

    def run(x: Tensor, *rest: object) -> T:
        rows = x.dim()
        arguments = [a.detach() if isinstance(a, Tensor) else a for a in (x, *rest)]
        for a in arguments:
            if isinstance(a, Tensor) and a.dim() == rows:
                torch._dynamo.maybe_mark_dynamic(a, 0)
        return kernel(*arguments)

    return run


def configure() -> None:
    """Settings of torch.compile for functions of few shapes and any number of rows."""
    import torch._inductor.config  # here: it takes a second, and CPU runs compile nothing

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    # Else the sums over rows and over columns of a norm's gradient are one kernel from 4,096 rows on only.
    torch._inductor.config.triton.mix_order_reduction_non_strict_mode = True
