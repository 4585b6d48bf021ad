"""Norms, activations and rotary embedding, the layers between the matrix products, with explicit gradients.

Each saves its input and little else for the backward pass. Autograd would save every step of the arithmetic:
two thirds more activation memory, and as much more memory traffic.

The arithmetic is in the functions marked `fused`: plain torch on a CPU, one compiled kernel each on a GPU
(the norm's gradient: two). LayerNorm is torch's own kernel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from align.distributed.parallel import device
from align.kernels.fused import fused


def norm_parameter(config: TransformerConfig, hidden_size: int, value: float) -> nn.Parameter:
    """A norm's weight or bias [H]."""
    parameter: Any = nn.Parameter(
        torch.full((hidden_size,), value, dtype=config.params_dtype, device=device())
    )
    # Under sequence parallelism each rank sees some of the tokens: Megatron sums the marked gradients.
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension; in fp32 inside."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps, self.weight = eps, norm_parameter(config, hidden_size, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return RMSNormFunction.apply(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm without a gradient; weight may be [..., H]."""
    return norm_and_scale(x, weight, eps)[0]


@fused
def norm_and_scale(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of x, and 1 / rms(x) = 1 / sqrt(mean(x^2) + eps) in fp32, [..., 1]."""
    scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x * scale).to(x.dtype) * weight, scale


@fused
def norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight.

    With n = x / rms(x), y = n w:  dw = sum dy n,  dx = (dy w - n mean(dy w n)) / rms(x).
    """
    normed = x * scale
    grad_weight = (grad * normed).flatten(0, -2).sum(0)
    grad_normed = (grad * weight).float()
    along = (grad_normed * normed).mean(-1, keepdim=True)
    grad_x = grad_normed.addcmul_(normed, along, value=-1).mul_(scale)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


class RMSNormFunction(torch.autograd.Function):
    """norm_and_scale for autograd, which calls norm_gradient."""

    @staticmethod
    def forward(ctx, x, weight, eps):  # noqa: ANN001
        y, scale = norm_and_scale(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001
        return *norm_gradient(grad, *ctx.saved_tensors), None


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias, over the last dimension; torch's own kernel."""

    initial_weight = 1.0

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps, self.weight = eps, norm_parameter(config, hidden_size, self.initial_weight)
        self.bias = norm_parameter(config, hidden_size, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class LayerNorm1P(LayerNorm):
    """LayerNorm with the factor weight + 1, added in the weight's precision (NeMo's layernorm1p)."""

    initial_weight = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight + 1, self.bias, self.eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm with a factor and a bias [H]."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


NORMS = {"rms": RMSNorm, "layer": LayerNorm, "layer_1p": LayerNorm1P}  # by Architecture.norm


class SwiGLU(MegatronModule):  # Megatron's type, because checkpoints ask each part of an MLP for its weights
    """silu(gate) * up for an input [..., gate; up] (https://arxiv.org/abs/2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        return SwiGLUFunction.apply(x)


@fused
def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of [..., gate; up], without a gradient."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate).mul_(up)


@fused
def swiglu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x:  d gate = dy up silu'(gate),  d up = dy silu(gate)."""
    gate, up = x.chunk(2, -1)
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat([grad_gate, F.silu(gate).mul_(grad)], -1)


class SwiGLUFunction(torch.autograd.Function):
    """swiglu for autograd, which calls swiglu_gradient."""

    @staticmethod
    def forward(ctx, x):  # noqa: ANN001
        ctx.save_for_backward(x)
        return swiglu(x)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001
        return swiglu_gradient(grad, *ctx.saved_tensors)


class SquaredReLU(MegatronModule):
    """relu(x)^2 (https://arxiv.org/abs/2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        return SquaredReLUFunction.apply(x)


@fused
def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, without a gradient."""
    return F.relu(x).square_()


@fused
def squared_relu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x:  dx = 2 dy relu(x)."""
    return F.relu(x).mul_(2).mul_(grad)


class SquaredReLUFunction(torch.autograd.Function):
    """squared_relu for autograd, which calls squared_relu_gradient."""

    @staticmethod
    def forward(ctx, x):  # noqa: ANN001
        ctx.save_for_backward(x)
        return squared_relu(x)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001
        return squared_relu_gradient(grad, *ctx.saved_tensors)


ACTIVATIONS = {"swiglu": SwiGLU, "relu2": SquaredReLU}  # by Architecture.activation


def rotary_cos_sin(
    positions: Tensor, frequencies: Tensor, dtype: torch.dtype, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles of tokens, each [T, 1, d/2], for all heads and layers.

    Args:
        positions: [T].
        frequencies: [d/2].
        scale: [d/2], factor of cosines and sines (YaRN's attention factor); None: 1.
    """
    angles = torch.outer(positions.float(), frequencies)[:, None]
    cos, sin = angles.cos(), angles.sin()
    if scale is not None:
        cos, sin = cos * scale, sin * scale
    return cos.to(dtype), sin.to(dtype)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864), pairs being dimensions i and i + d/2.

    Args:
        x: [T, heads, d] queries or keys.
        cos, sin: [T, 1, d/2] from `rotary_cos_sin`.
    """
    return RotaryFunction.apply(x, cos, sin)


class RotaryFunction(torch.autograd.Function):
    """The gradient of a rotation is the rotation back; a factor in cos and sin stays the same."""

    @staticmethod
    def forward(ctx, x, cos, sin):  # noqa: ANN001
        ctx.save_for_backward(cos, sin)
        return apply_rotary(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001
        return apply_rotary(grad, *ctx.saved_tensors, -1), None, None


@fused
def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """(a, b) -> (a cos - s b sin, b cos + s a sin) for the halves a, b of the last dimension and s = sign."""
    a, b = x.chunk(2, -1)
    first, second = (a * cos).addcmul_(b, sin, value=-sign), (b * cos).addcmul_(a, sin, value=sign)
    return torch.cat([first, second], -1)
