"""Norm, gate and rotation against plain formulas and autograd in float64; what bf16 computes in.

What torch.compile makes of them for GPUs is compared here, on the CPU, with the functions as they are.
"""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from align.kernels import fused
from align.model import layers
from tests.support.layer_formulas import EPS, centred_norm, counting, gate, norm, turned

CONFIG = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False)


def test_norm_by_hand():
    """(3, 4) has the root mean square sqrt(12.5)."""
    normed = layers.RMSNormFunction.apply(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(normed, torch.tensor([3.0, 8.0]) / 12.5**0.5)


@pytest.mark.parametrize("shape", [(5, 8), (5, 1, 3, 8)], ids=str)
def test_norm_and_its_gradient(shape):
    torch.manual_seed(0)
    x, weight, grad = torch.randn(shape) * 3, torch.randn(8), torch.randn(shape)
    inputs = [t.clone().requires_grad_() for t in (x, weight)]
    exact = [t.double().requires_grad_() for t in (x, weight)]
    y, expected = layers.RMSNormFunction.apply(*inputs, EPS), norm(*exact)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    y.backward(grad)
    expected.backward(grad.double())
    for ours, theirs in zip(inputs, exact, strict=True):
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


@pytest.mark.parametrize("kind, added", [("layer", 0), ("layer_1p", 1)])
def test_layer_norm_and_its_gradient(kind, added):
    """1P multiplies by weight + 1."""
    torch.manual_seed(0)
    module, x, grad = layers.NORMS[kind](CONFIG, 8, EPS), torch.randn(5, 1, 8) * 3 + 2, torch.randn(5, 1, 8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(8))
    exact = [t.detach().double().requires_grad_() for t in (x, module.weight, module.bias)]
    x.requires_grad_()
    y, expected = module(x), centred_norm(exact[0], exact[1] + added, exact[2])
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    y.backward(grad)
    expected.backward(grad.double())
    for ours, theirs in zip((x, module.weight, module.bias), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, start", [("layer", 1.0), ("layer_1p", 0.0)])
def test_layer_norms_start_as_the_plain_norm_and_tell_megatron_of_sequence_parallelism(kind, start):
    split = SimpleNamespace(params_dtype=torch.bfloat16, sequence_parallel=True)
    for config in (CONFIG, split):
        module = layers.NORMS[kind](config, 8)
        assert (module.weight.tolist(), module.bias.tolist()) == ([start] * 8, [0.0] * 8)
        for parameter in module.parameters():
            assert parameter.dtype == config.params_dtype
            assert parameter.sequence_parallel == config.sequence_parallel


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


def test_squared_relu_and_its_gradient():
    """By hand, and it leaves its input."""
    x = torch.tensor([-2.0, 0.0, 3.0]).bfloat16().requires_grad_()
    y = layers.SquaredReLUFunction.apply(x)
    y.backward(torch.tensor([1.0, 1.0, 0.5]).bfloat16())
    assert (y.tolist(), x.grad.tolist(), x.tolist()) == ([0.0, 0.0, 9.0], [0.0, 0.0, 3.0], [-2.0, 0.0, 3.0])
    assert y.dtype == x.grad.dtype == torch.bfloat16
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layers.SquaredReLUFunction.apply, x)


def test_rotation_by_hand():
    """A quarter turn takes (1, 0) to (0, 1) and (0, 1) to (-1, 0)."""
    cos, sin = layers.rotary_cos_sin(torch.tensor([0, 1, 2]), torch.tensor([torch.pi / 2]), torch.float32)
    assert cos.shape == sin.shape == (3, 1, 1)
    x = torch.tensor([1.0, 0.0]).expand(3, 1, 2).contiguous()
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])[:, None]
    torch.testing.assert_close(layers.rotary_embedding(x, cos, sin), expected, rtol=0, atol=1e-6)


def test_rotation_and_its_gradient():
    torch.manual_seed(0)
    angles = torch.rand(5, 3, dtype=torch.float64) * 7
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    x = torch.randn(5, 2, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layers.rotary_embedding(x, cos, sin), turned(x, angles))
    assert torch.autograd.gradcheck(layers.rotary_embedding, (x, cos, sin))


def test_rotation_of_a_strided_gradient():
    """Attention hands back gradients with swapped strides."""
    cos, sin = layers.rotary_cos_sin(torch.arange(4), torch.tensor([1.0, 0.1]), torch.float32)
    x = torch.randn(4, 3, 4, requires_grad=True)
    grad = torch.randn(3, 4, 4).transpose(0, 1)
    layers.rotary_embedding(x, cos, sin).backward(grad)
    torch.testing.assert_close(x.grad, layers.rotary_embedding(grad.contiguous(), cos, -sin))


def test_angles_of_far_positions_are_fp32_before_they_are_rounded():
    cos, _ = layers.rotary_cos_sin(torch.tensor([777]), torch.tensor([1.0]), torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    assert cos.item() == pytest.approx(math.cos(777), rel=2**-8)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


FUSED = {
    layers.norm_and_scale: lambda n, dtype: (random((n, 1, 16), dtype, 0), random((16,), dtype, 1), EPS),
    layers.norm_gradient: lambda n, dtype: (
        *(random((n, 1, 16), dtype, seed) for seed in (0, 1)),
        *(random((16,), dtype, 2), random((n, 1, 1), torch.float32, 3).abs()),
    ),
    layers.swiglu: lambda n, dtype: (random((n, 1, 32), dtype, 0),),
    layers.swiglu_gradient: lambda n, dtype: (random((n, 1, 16), dtype, 0), random((n, 1, 32), dtype, 1)),
    layers.squared_relu: lambda n, dtype: (random((n, 1, 16), dtype, 0),),
    layers.squared_relu_gradient: lambda n, dtype: tuple(random((n, 1, 16), dtype, seed) for seed in (0, 1)),
    layers.apply_rotary: lambda n, dtype: (
        *(random((n, 3, 8), dtype, 0), random((n, 1, 4), dtype, 1), random((n, 1, 4), dtype, 2), -1),
    ),
}
"""Every fused function with arguments for n rows."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", FUSED, ids=lambda f: f.__name__)
def test_one_kernel_serves_every_number_of_rows(function, dtype):
    """There is one more for a single row. 16 rows are as many as the norm is wide. No step is left out."""
    backend, seen = counting("aot_eager")
    kernel = fused.compiled(function.__wrapped__, backend)
    for n in (16, 5, 9, 1, 300, 1, 16):
        arguments = [
            x.requires_grad_(n == 5) if isinstance(x, Tensor) else x for x in FUSED[function](n, dtype)
        ]
        same_to_rounding(kernel(*arguments), function(*arguments), dtype)
    assert len(seen) == 2


def same_to_rounding(actual: Tensor | tuple, expected: Tensor | tuple, dtype: torch.dtype) -> None:
    """One rounding to dtype apart; a kernel may leave out those between the steps. Without a gradient."""
    for ours, theirs in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert not ours.requires_grad
        error = (ours.double() - theirs.detach().double()).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * theirs.detach().abs().max()


def as_tuple(x: Tensor | tuple) -> tuple:
    return x if isinstance(x, tuple) else (x,)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_what_the_compiler_makes_of_two_reductions():
    """torch.compile's own backend, here by way of C++, against float64."""
    arguments = FUSED[layers.norm_gradient](37, torch.float32)
    kernel = fused.compiled(layers.norm_gradient.__wrapped__)
    exact = layers.norm_gradient(*(x.double() for x in arguments))
    for ours, theirs in zip(kernel(*arguments), exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_on_a_cpu_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    x = torch.ones(2, 4)
    assert torch.equal(fused.fused(torch.add)(x, x), x + x)
    layers.rms_norm(x, torch.ones(4), EPS)


def test_gate_without_a_gradient_is_that_with_one():
    x = random((3, 8), torch.bfloat16, 0)
    assert torch.equal(layers.swiglu(x), layers.SwiGLUFunction.apply(x))
