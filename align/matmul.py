"""Matrix products with weights. On a CPU in fp32 they are oneDNN's, elsewhere torch's own.

torch multiplies fp32 matrices by MKL, which uses half the width of an AMD processor's vector units: oneDNN,
which torch brings along and uses for bf16, is 2.3 times as fast there and as exact.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ONEDNN = torch.backends.mkldnn.is_available()


def uses_onednn(x: Tensor) -> bool:
    """Does `linear` leave products of x and a plain weight to oneDNN?"""
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
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if not uses_onednn(x) or x.shape[-1] == 0:  # oneDNN refuses sums of no terms
        return F.linear(x, weight, bias)
    # oneDNN takes either order in memory; with gaps, as a slice has, it is a hundred times as slow.
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, [m, n], of matrices [m, k] and [k, n], without a gradient."""
    return linear(a, b.t())


class Linear(torch.autograd.Function):
    """`linear` with its gradient.  y = x W^T + b;  dx = dy W, dW = dy^T x, db = the sum of dy's rows."""

    @staticmethod
    def forward(ctx, x, weight, bias):  # noqa: ANN001
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = product(rows, weight).view_as(x)
        grad_weight = product(rows.t(), x.reshape(-1, x.shape[-1]))
        return grad_x, grad_weight, rows.sum(0) if ctx.biased else None


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight [n, k] as oneDNN reads it fastest, for `linear` with few rows; on GPUs itself.

    With 8 rows `linear` takes 0.6 of the time. The copy does not follow what is done to the weight.
    """
    if ONEDNN and weight.device.type == "cpu":
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)  # serves every number of rows
    return weight


def kernels() -> str:
    """Which library multiplies fp32 matrices on this CPU, for the log's first lines."""
    return "oneDNN" if ONEDNN else "torch"
