"""Matrix products with weights: oneDNN for fp32 on a CPU, else torch.

On GPUs fp32 is fp32: TF32 is off by default, and stays off.

torch multiplies fp32 matrices by MKL, which uses half the width of an AMD processor's vector units. oneDNN,
which torch includes and uses for bf16, is 2.3 times as fast there and as exact.

oneDNN compiles and caches kernels for every shape: up to 3 MB each, and gaps between tensors. Micro-batches
differ in length, so that soon takes gigabytes; `padded` leaves few shapes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ONEDNN = torch.backends.mkldnn.is_available()
STEP = 64  # divides the rows of every larger product
BLOCK = 4096  # rows that `add_product` computes at a time
# Before 2.11, addmm with out_dtype required a total in the product's own precision.
ADDS_IN_FP32 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


def uses_onednn(x: Tensor) -> bool:
    """True if `linear` multiplies x and a plain weight by oneDNN."""
    return ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, without a gradient.

    Args:
        x: [..., k].
        weight: [n, k], plain or from `pack`.
        bias: [n].

    Returns:
        [..., n].
    """
    if not weight.is_mkldnn:
        if not uses_onednn(x) or x.shape[-1] == 0:  # oneDNN refuses sums of no terms
            return F.linear(x, weight, bias)
        # oneDNN supports either order in memory; with gaps, as in a slice, it is a hundred times as slow.
        if not (weight.is_contiguous() or weight.t().is_contiguous()):
            weight = weight.contiguous()
    rows = padded(x.reshape(-1, x.shape[-1]))
    y = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return y[: x.shape[:-1].numel()].view(*x.shape[:-1], y.shape[-1])


def padded(x: Tensor) -> Tensor:
    """Pad x [m, ...] on a CPU with zeros to a multiple of STEP rows, if it has more than STEP."""
    missing = -len(x) % STEP if len(x) > STEP and ONEDNN and x.device.type == "cpu" else 0
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, [m, n], of matrices [m, k] and [k, n], without a gradient."""
    return linear(a, b.t())


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b for total [m, n] in a's precision or a higher one, without a gradient."""
    if uses_onednn(a):
        # In blocks: oneDNN's product is a new tensor, as large as its block of total.
        for part, rows in zip(total.split(BLOCK), a.split(BLOCK), strict=True):
            part += product(rows, b)
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and ADDS_IN_FP32:  # in place, and never rounded to bf16
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


class Linear(torch.autograd.Function):
    """`linear` with its gradient.  y = x W^T + b;  dx = dy W, dW = dy^T x, db = sum of dy's rows."""

    @staticmethod
    def forward(ctx, x, weight, bias):  # noqa: ANN001
        rows = padded(x.reshape(-1, x.shape[-1]))
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        ctx.shape = x.shape
        count = x.shape[:-1].numel()
        return linear(rows, weight, bias)[:count].view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001
        rows, weight = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grads = padded(grad)
        grad_x = product(grads, weight)[: len(grad)].view(ctx.shape) if ctx.needs_input_grad[0] else None
        grad_weight = None if rows is None else product(grads.t(), rows)  # None: the weight is frozen
        return grad_x, grad_weight, grad.sum(0) if ctx.needs_input_grad[2] else None


def pack(weight: Tensor) -> Tensor:
    """Copy a weight [n, k] to oneDNN's fastest layout for `linear` with few rows; on GPUs the weight itself.

    With 8 rows `linear` takes 0.6 of the time. Later changes of the weight do not reach the copy. A bf16
    weight is not copied on CPUs without AVX-512, for which oneDNN has no such kernels.
    """
    if ONEDNN and weight.device.type == "cpu" and (weight.dtype != torch.bfloat16 or has_bf16_kernels()):
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)  # fits every number of rows
    return weight


def has_bf16_kernels() -> bool:
    """True if oneDNN multiplies bf16 matrices on this CPU: with AVX-512."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def kernels(dtype: torch.dtype) -> str:
    """Matrix products on this CPU, for the log."""
    if dtype == torch.float32:
        return f"matrix products by {'oneDNN' if ONEDNN else 'torch'}"
    return "bf16 matrix products" if has_bf16_kernels() else "NO BF16 KERNELS ON THIS CPU: fp32 is faster"
