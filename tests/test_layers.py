"""Norm, gate and rotation against plain formulas and autograd in float64; what bf16 computes in."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from align import layers

EPS = 1e-5
CONFIG = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def gate(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return first / (1 + (-first).exp()) * second


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Each pair (i, i + d/2) as a complex number, multiplied by exp(i angle); angles [T, d/2]."""
    pairs = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([pairs.real, pairs.imag], -1)


def test_norm_by_hand():
    """(3, 4) has the root mean square sqrt(12.5)."""
    found = layers.RMSNormFunction.apply(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(found, torch.tensor([3.0, 8.0]) / 12.5**0.5)


@pytest.mark.parametrize("shape", [(5, 8), (5, 1, 3, 8)], ids=str)
def test_norm_and_its_gradient(shape):
    torch.manual_seed(0)
    x, weight, grad = torch.randn(shape) * 3, torch.randn(8), torch.randn(shape)
    found = [t.clone().requires_grad_() for t in (x, weight)]
    exact = [t.double().requires_grad_() for t in (x, weight)]
    y, expected = layers.RMSNormFunction.apply(*found, EPS), norm(*exact)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    y.backward(grad)
    expected.backward(grad.double())
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


def test_norm_in_bf16_is_fp32_inside():
    """The result differs from exact arithmetic by two roundings to bf16, however long the row."""
    torch.manual_seed(0)
    x = (torch.randn(4, 2048) * 50).bfloat16().requires_grad_()
    weight = torch.randn(2048).bfloat16().requires_grad_()
    y = layers.RMSNormFunction.apply(x, weight, EPS)
    y.backward(torch.randn(4, 2048).bfloat16())
    assert y.dtype == x.grad.dtype == weight.grad.dtype == torch.bfloat16
    exact = norm(x.detach().double(), weight.detach().double())
    torch.testing.assert_close(y.detach().double(), exact, rtol=2 * 2**-8, atol=0)


def test_norm_module_starts_at_one_and_tells_megatron_of_sequence_parallelism():
    module = layers.RMSNorm(CONFIG, 8)
    assert module.weight.tolist() == [1.0] * 8 and not module.weight.sequence_parallel
    split = SimpleNamespace(params_dtype=torch.bfloat16, sequence_parallel=True)
    module = layers.RMSNorm(split, 8)
    assert module.weight.sequence_parallel and module.weight.dtype == torch.bfloat16


def test_gate_and_its_gradient():
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layers.SwiGLUFunction.apply(x), gate(x))
    assert torch.autograd.gradcheck(layers.SwiGLUFunction.apply, x)


def test_gate_leaves_its_input_and_keeps_bf16():
    x = torch.randn(3, 8).bfloat16().requires_grad_()
    before = x.detach().clone()
    y = layers.SwiGLUFunction.apply(x)
    y.sum().backward()
    assert torch.equal(x.detach(), before)
    assert y.dtype == x.grad.dtype == torch.bfloat16
    gate_half, up = x.detach().chunk(2, -1)
    assert torch.equal(y.detach(), F.silu(gate_half) * up)  # as transformers computes it, bit for bit


def test_rotation_by_hand():
    """A quarter turn takes (1, 0) to (0, 1) and (0, 1) to (-1, 0)."""
    cos, sin = layers.rotation(torch.tensor([0, 1, 2]), torch.tensor([torch.pi / 2]), torch.float32)
    assert cos.shape == sin.shape == (3, 1, 1)
    x = torch.tensor([1.0, 0.0]).expand(3, 1, 2).contiguous()
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])[:, None]
    torch.testing.assert_close(layers.rotate(x, cos, sin), expected, rtol=0, atol=1e-6)


def test_rotation_and_its_gradient():
    torch.manual_seed(0)
    angles = torch.rand(5, 3, dtype=torch.float64) * 7
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    x = torch.randn(5, 2, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layers.rotate(x, cos, sin), turned(x, angles))
    assert torch.autograd.gradcheck(layers.rotate, (x, cos, sin))


def test_rotation_of_a_strided_gradient():
    """Attention hands back gradients with swapped strides."""
    cos, sin = layers.rotation(torch.arange(4), torch.tensor([1.0, 0.1]), torch.float32)
    x = torch.randn(4, 3, 4, requires_grad=True)
    grad = torch.randn(3, 4, 4).transpose(0, 1)
    layers.rotate(x, cos, sin).backward(grad)
    torch.testing.assert_close(x.grad, layers.rotate(grad.contiguous(), cos, -sin))


def test_angles_of_far_positions_are_fp32_before_they_are_rounded():
    cos, _ = layers.rotation(torch.tensor([777]), torch.tensor([1.0]), torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    assert cos.item() == pytest.approx(math.cos(777), rel=2**-8)
