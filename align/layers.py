"""The small layers between the matrix products: norm, gate, rotation, with their gradients written out.

Each saves its input and nothing else for the backward pass. Left to autograd, they would save every step of
their arithmetic: two thirds more activation memory, and as much more traffic to and from it.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from align.parallel import device


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension; in fp32 inside."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device()))
        # Under sequence parallelism each rank sees some of the tokens: Megatron sums the marked gradients.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return RMSNormFunction.apply(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What RMSNorm computes, without a gradient; weight may be [..., H]."""
    return (x * rms_scale(x, eps)).to(x.dtype) * weight


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) in fp32, [..., 1]."""
    return (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()


class RMSNormFunction(torch.autograd.Function):
    """With n = x / rms(x), y = n w:  dw = sum dy n,  dx = (dy w - n mean(dy w n)) / rms(x)."""

    @staticmethod
    def forward(ctx, x, weight, eps):  # noqa: ANN001
        scale = rms_scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad_normed = (grad * weight).float()
        along = (grad_normed * normed).mean(-1, keepdim=True)
        grad_x = grad_normed.addcmul_(normed, along, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class SwiGLU(MegatronModule):  # Megatron's type, because checkpoints ask each part of an MLP for its weights
    """silu(gate) * up for an input [..., gate; up] (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)

    def forward(self, x: Tensor) -> Tensor:
        return SwiGLUFunction.apply(x)


class SwiGLUFunction(torch.autograd.Function):
    """d gate = dy up silu'(gate),  d up = dy silu(gate)."""

    @staticmethod
    def forward(ctx, x):  # noqa: ANN001
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, -1)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        torch.mul(F.silu(gate), grad, out=grad_up)
        return grad_x


def rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles of some tokens, each [T, 1, d/2], for all heads and layers."""
    angles = torch.outer(positions.float(), frequencies)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864), pairs being dimensions i and i + d/2.

    Args:
        x: [T, heads, d] queries or keys.
        cos, sin: [T, 1, d/2] from `rotation`.
    """
    return RotateFunction.apply(x, cos, sin)


class RotateFunction(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx, x, cos, sin):  # noqa: ANN001
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001
        return turn(grad, *ctx.saved_tensors, -1), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """(a, b) -> (a cos - s b sin, b cos + s a sin) for the halves a, b of the last dimension and s = sign."""
    a, b = x.chunk(2, -1)
    out = torch.empty_like(x)
    first, second = out.chunk(2, -1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=second).addcmul_(a, sin, value=sign)
    return out
