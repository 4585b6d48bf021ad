"""Log-probabilities of targets against log_softmax in float64: values, gradients, split over ranks."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from align.logprobs import CHUNK, target_logprobs
from tests.conftest import torchrun
from tests.logprobs_worker import HIDDEN, PADDED, VOCAB, inputs

ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)  # all that is asked of a group of one rank


def oracle(
    hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor, vocab: int = VOCAB
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, gradient of hidden, gradient of weight) by log_softmax and autograd in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logprobs = (hidden @ weight[:vocab].T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    logprobs.backward(grad.double())
    return logprobs.detach(), hidden.grad, weight.grad


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor, vocab: int = VOCAB) -> tuple:
    """The same three by target_logprobs."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    logprobs = target_logprobs(hidden, weight, targets, vocab, ALONE)
    logprobs.backward(grad)
    return logprobs.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_values_and_gradients(tokens):
    given = inputs(tokens)
    for found, expected in zip(ours(*given), oracle(*given), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_by_hand():
    """Logits (0, log 3) give probabilities 1/4 and 3/4."""
    weight = torch.tensor([[0.0], [torch.tensor(3.0).log()]])
    found = target_logprobs(torch.ones(2, 1), weight, torch.tensor([0, 1]), 2, ALONE)
    torch.testing.assert_close(found.exp(), torch.tensor([0.25, 0.75]))


def test_zero_tokens():
    hidden, weight, targets, grad = inputs(0)
    logprobs, grad_hidden, grad_weight = ours(hidden, weight, targets, grad)
    assert logprobs.shape == (0,) and grad_hidden.shape == (0, HIDDEN)
    assert torch.equal(grad_weight, torch.zeros(PADDED, HIDDEN))


def test_rows_past_the_vocabulary_get_no_probability_and_no_gradient():
    hidden, weight, _, _ = inputs(5)
    total = sum(
        target_logprobs(hidden, weight, torch.full((5,), v), VOCAB, ALONE).exp() for v in range(VOCAB)
    )
    torch.testing.assert_close(total, torch.ones(5))
    grad_weight = ours(*inputs(5))[2]
    assert torch.equal(grad_weight[VOCAB:], torch.zeros(PADDED - VOCAB, HIDDEN))
    assert grad_weight[:VOCAB].any()


def test_large_logits_do_not_overflow():
    hidden, weight, targets, grad = inputs(7)
    given = (hidden * 1e4, weight, targets, grad)
    found, expected = ours(*given)[0], oracle(*given)[0]
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-1)


def test_bf16_computes_the_softmax_in_fp32():
    """Against float64 on the same bf16 logits: their rounding is the only difference to exact arithmetic."""
    hidden, weight, targets, _ = inputs(CHUNK + 9)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    logprobs = target_logprobs(hidden, weight, targets, VOCAB, ALONE)
    expected = (hidden @ weight[:VOCAB].T).double().log_softmax(1).gather(1, targets[:, None])[:, 0]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)


def test_bf16_sums_the_gradient_of_many_chunks_in_fp32():
    """Summed in bf16 the weight's gradient would be off by 0.4 %."""
    hidden, weight, targets, grad = inputs(16 * CHUNK)
    given = hidden.bfloat16(), weight.bfloat16(), targets, grad.abs()
    _, grad_hidden, grad_weight = ours(*given)
    _, exact_hidden, exact_weight = oracle(*given)
    assert grad_hidden.dtype == grad_weight.dtype == torch.bfloat16
    assert (grad_hidden.double() - exact_hidden).norm() < 0.005 * exact_hidden.norm()
    assert (grad_weight.double() - exact_weight).norm() < 0.003 * exact_weight.norm()


def test_vocabulary_split_over_two_ranks(tmp_path):
    """Once with padding rows on the second rank, once with nothing but padding there."""
    torchrun(2, "tests/logprobs_worker.py", tmp_path)
    for vocab in (VOCAB, PADDED // 4):
        ranks = [torch.load(tmp_path / f"{vocab}-{rank}.pt") for rank in range(2)]
        logprobs, grad_hidden, grad_weight = oracle(*inputs(CHUNK + 9, vocab), vocab)
        for found in ranks:  # both ranks know the whole answer
            torch.testing.assert_close(found["logprobs"].double(), logprobs, rtol=1e-5, atol=1e-5)
        parts = ranks[0]["grad_hidden"] + ranks[1]["grad_hidden"]  # copy_to's backward sums them
        torch.testing.assert_close(parts.double(), grad_hidden, rtol=1e-5, atol=1e-4)
        rows = torch.cat([found["grad_weight"] for found in ranks])
        torch.testing.assert_close(rows.double(), grad_weight, rtol=1e-5, atol=1e-4)
