"""Kernels and buffers of the fused functions in the code that torch.compile writes for an H100."""

import math

import pytest
import torch

from align.generation import sampling
from align.kernels import fused
from align.model import layers, logprobs
from tests.support.lowering import lower

pytest.importorskip("triton")

BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64
T, H = 8192, 2048  # tokens, hidden size
C, V = 2048, 128256  # tokens of a chunk of logits, vocabulary
X, LOGITS, COLUMN, TARGETS = ((T, H), BF16), ((C, V), BF16), ((C, 1), FP32), ((C, 1), INT64)


def test_norm_is_one_kernel():
    done = lower(layers.norm_and_scale.__wrapped__, X, ((H,), BF16), 1e-6)
    assert len(done.kernels) == 1
    assert sorted(done.buffers) == sorted([((T, H), BF16), ((T, 1), FP32)])


@pytest.mark.parametrize("tokens", [1000, 4095, 8192])
def test_the_gradient_of_a_norm_reads_its_inputs_once(tokens):
    """One kernel and the sum of its parts, for a micro-batch of any size."""
    fused.configure()
    x = ((tokens, H), BF16)
    done = lower(layers.norm_gradient.__wrapped__, x, x, ((H,), BF16), ((tokens, 1), FP32))
    assert len(done.kernels) == 2
    assert [buffer for buffer in done.buffers if buffer[0] == (tokens, H)] == [x]


@pytest.mark.parametrize(
    ("function", "width"), [("swiglu", 2), ("squared_relu", 1)], ids=["swiglu", "squared_relu"]
)
def test_activations_are_one_kernel_each_way(function, width):
    x = ((T, width * H), BF16)
    forward = lower(getattr(layers, function).__wrapped__, x)
    backward = lower(getattr(layers, f"{function}_gradient").__wrapped__, X, x)
    assert (len(forward.kernels), forward.buffers) == (1, [X])
    assert (len(backward.kernels), backward.buffers) == (1, [x])


def test_a_pass_of_top_p_reads_the_weights_once():
    rows, width = 256, 128256
    weights = ((rows, width), FP32)
    done = lower(sampling._mass_from.__wrapped__, weights, ((rows, 1), FP32))
    sizes = [math.prod(shape) for shape, _ in done.buffers]
    assert len(done.kernels) <= 2 and max(sizes) <= rows * width // sampling.BLOCK


@pytest.mark.parametrize("entropy", [False, True])
def test_no_fp32_logits_are_written_forward(entropy):
    maxima = lower(logprobs.row_max.__wrapped__, LOGITS, 0.7, V)
    assert (len(maxima.kernels), maxima.buffers) == (1, [COLUMN])
    sums = lower(logprobs.partial_sums_.__wrapped__, LOGITS, COLUMN, TARGETS, 0, entropy, 0.7, V)
    assert all(shape[-1] != V for shape, _ in sums.buffers)
    assert len(sums.kernels) == 2  # the second for the targets


@pytest.mark.parametrize("entropy", [False, True])
def test_the_gradient_of_logits_is_written_in_bf16_only(entropy):
    columns = [COLUMN] * 3 + [COLUMN if entropy else None]
    done = lower(logprobs.logits_grad_.__wrapped__, LOGITS, TARGETS, *columns, 0, BF16, 0.7, V)
    assert [buffer for buffer in done.buffers if buffer[0] == (C, V)] == [LOGITS]
    assert len(done.kernels) == 2
