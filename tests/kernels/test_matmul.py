"""Matrix products against float64: odd shapes, and Megatron's linear layers, which take them on a CPU."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from align.kernels import matmul
from align.kernels.matmul import BLOCK, STEP, Linear, add_product, linear, padded, product
from tests.support.launch import fork_ranks
from tests.workers.matmul import DTYPES, cases, inputs

K, N = 37, 21  # no multiples of a vector's width
SHAPES = [(0, K), (1, K), (2, K), (STEP, K), (300, K), (0, 4, K), (5, 4, K), (75, 4, K), (K,)]
"""Shapes of x: no row, one row, some, many; three and one dimensions."""

MEGATRONS_FUNCTION = "LinearWithGradAccumulationAndAsyncCommunicationBackward"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for fp32's rounding, relative to the largest value: bf16 or TF32 would be 100 times off."""
    assert actual.dtype == torch.float32 and expected.dtype == torch.float64
    scale = max(expected.abs().max().item(), 1e-9) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6 * scale)


def views(matrix: Tensor) -> dict[str, Tensor]:
    """The same matrix [r, c] in different orders and with gaps in memory."""
    wide = torch.full((2 * matrix.shape[0], matrix.shape[1] + 9), float("nan"))
    wide[::2, 5:-4] = matrix
    tall = torch.full((2 * matrix.shape[1], matrix.shape[0]), float("nan"))
    tall[::2] = matrix.t()
    return {
        "plain": matrix,
        "transposed": matrix.t().contiguous().t(),
        "slice": wide[::2, 5:-4],
        "transposed slice": tall[::2].t(),
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape, bias):
    x, weight, b = random(*shape), random(N, K, seed=1), random(N, seed=2) if bias else None
    actual = linear(x, weight, b)
    assert actual.shape == (*shape[:-1], N)
    same(actual, F.linear(x.double(), weight.double(), None if b is None else b.double()))


@pytest.mark.parametrize("how", views(torch.zeros(2, 2)))
def test_views(how):
    x, weight = random(30, K), random(N, K, seed=1)
    expected = x.double() @ weight.double().t()
    same(linear(views(x)[how], weight), expected)
    same(linear(x, views(weight)[how]), expected)
    same(product(views(x)[how], weight.t()), expected)
    same(product(x, views(weight.t())[how]), expected)


def test_rows_that_are_one_row_in_memory():
    weight = random(1, K, seed=1).expand(N, K)
    for x in (random(30, K), random(1, K).expand(30, K)):
        same(linear(x, weight), x.double() @ weight.double().t())


def test_sums_of_no_terms_are_the_bias():
    assert torch.equal(product(torch.ones(3, 0), torch.ones(0, 2)), torch.zeros(3, 2))
    assert linear(torch.ones(2, 0), torch.ones(2, 0), torch.tensor([1.0, 2.0])).tolist() == [[1.0, 2.0]] * 2


def test_by_hand():
    x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    assert linear(x, weight, torch.tensor([0.5, 0.0, 0.0])).tolist() == [[11.5, 17.0, 23.0]]
    assert product(x, weight.t()).tolist() == [[11.0, 17.0, 23.0]]


def test_bf16_is_left_to_torch():
    x, weight, bias = (t.bfloat16() for t in (random(30, K), random(N, K, seed=1), random(N, seed=2)))
    assert not matmul.uses_onednn(x) and not matmul.uses_onednn(random(3, 3).double())
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(product(x, weight.t()), x @ weight.t())


def test_packed_weights_of_bf16_have_kernels_on_every_cpu():
    x, weight = random(30, K).bfloat16(), random(N, K, seed=1).bfloat16()
    torch.testing.assert_close(linear(x, matmul.pack(weight)), F.linear(x, weight), rtol=0.02, atol=0.02)


@pytest.mark.skipif(not matmul.ONEDNN, reason="this torch has no oneDNN")
def test_fp32_goes_to_onednn():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        linear(random(30, K), random(N, K))
    assert "mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_add_product(dtype):
    """In fp32 over more than one block, the last one not full; in bf16 to a sum in fp32."""
    a, b = random(2 * BLOCK + 3, 5).to(dtype), random(5, 7, seed=1).to(dtype)
    total = random(len(a), 7, seed=2)
    expected = total.double() + a.double() @ b.double()
    add_product(total, a, b)
    if dtype == torch.float32:
        same(total, expected)
    else:
        assert (total.double() - expected).norm() < 0.003 * expected.norm()


def test_add_product_on_gpus_is_an_overload_of_this_torch():
    """It exists for CUDA alone: a CPU can show only that the call reaches it."""
    total, a, b = random(3, 7), random(3, 5).bfloat16(), random(5, 7, seed=1).bfloat16()
    with pytest.raises(NotImplementedError, match="addmm.dtype_out.*CPU"):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def test_padded_by_hand():
    """Zeros after the rows, none where they are few or fit."""
    x = random(STEP + 1, 3)
    assert torch.equal(padded(x)[: len(x)], x) and not padded(x)[len(x) :].any()
    assert [len(padded(random(n, 3))) for n in (0, 1, STEP, STEP + 1, 2 * STEP)] == [
        0,
        1,
        STEP,
        *[2 * STEP] * 2,
    ]
    assert padded(torch.arange(STEP + 2)).tolist() == [*range(STEP + 2), *[0] * (STEP - 2)]


@pytest.mark.skipif(not matmul.ONEDNN, reason="this torch has no oneDNN")
def test_few_shapes_reach_onednn():
    """Products for 65 to 128 tokens have the same three shapes: output, gradient of x, gradient of weight."""
    shapes = set()
    for tokens in (STEP + 1, STEP + 30, 2 * STEP):
        x, weight = random(tokens, 192).requires_grad_(), random(64, 192).requires_grad_()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
        ) as profile:
            Linear.apply(x, weight, None).sum().backward()
        shapes |= {
            str(event.input_shapes[:2]) for event in profile.events() if "_linear_pointwise" in event.name
        }
    assert shapes == {"[[128, 192], [64, 192]]", "[[128, 64], [192, 64]]", "[[64, 128], [192, 128]]"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_gradients(shape, bias):
    tensors = [random(*shape), random(N, K, seed=1), *([random(N, seed=2)] if bias else [])]
    grad = random(N, *shape[:-1], seed=3).movedim(0, -1)  # strided, as a transposed view's gradient is
    ours = [t.clone().requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    Linear.apply(*ours, *([] if bias else [None])).backward(grad)
    F.linear(*exact).backward(grad.double())
    for gradient, expected in zip(ours, exact, strict=True):
        same(gradient.grad, expected.grad)


def assembled(directory: Path, name: str, tp: int, split: dict[str, int]) -> dict[str, Tensor]:
    """The ranks' parts of `matmul_worker.run` put together; what is not split must agree."""
    ranks = [torch.load(directory / f"{name}-{rank}.pt") for rank in range(tp)]
    whole = {}
    for key in ("output", "x", "first", "bias", "second"):
        parts = [rank[key] for rank in ranks]
        assert key in split or all(torch.equal(part, parts[0]) for part in parts)
        whole[key] = torch.cat(parts, split[key]) if key in split else parts[0]
    return whole


def exact(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients of the two layers, by autograd in float64."""
    x, first, bias, second = (tensors[k].double().requires_grad_() for k in ("x", "first", "bias", "second"))
    output = F.linear(F.linear(x, first, bias), second)
    output.backward(tensors["grad"].double())
    grads = {"x": x.grad, "first": first.grad, "bias": bias.grad, "second": second.grad}
    return {"output": output.detach(), **grads}


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_linear_layers_of_megatron(tmp_path, tp):
    """In fp32 by our function, in bf16 by Megatron's, with the tokens split over ranks and not."""
    fork_ranks(tp, "tests/workers/matmul.py", tmp_path)
    for precision, sequence_parallel in cases(tp):
        name = f"{precision}-{sequence_parallel}"
        ours = precision == "fp32" and matmul.ONEDNN
        function = torch.load(tmp_path / f"{name}-0.pt")["function"]
        assert function == ("LinearBackward" if ours else MEGATRONS_FUNCTION)
        split = {"first": 0, "bias": 0, "second": 1} | ({"output": 0, "x": 0} if sequence_parallel else {})
        actual, expected = assembled(tmp_path, name, tp, split), exact(inputs(DTYPES[precision]))
        for key in expected:
            if precision == "fp32":
                same(actual[key], expected[key])
            else:
                error = (actual[key].double() - expected[key]).norm()
                assert error < 0.01 * expected[key].norm(), (name, key)
