"""SFT loss, and the losses of reward models: numbers worked by hand, gradients, and what TRL computes."""

import math

import numpy as np
import torch

from align.losses import supervised
from tests.support.tensors import f64


def test_sft_loss_by_hand():
    logprobs = torch.tensor([math.log(0.5), math.log(0.1), math.log(0.25), 0.0])
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(
        supervised.sft_loss(logprobs, mask), torch.tensor(math.log(8))
    )  # -log(1/2 1/4 1)


def test_sft_loss_is_a_sum_not_a_mean():
    logprobs, mask = torch.full((5,), -2.0), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    assert supervised.sft_loss(logprobs, mask).item() == 6.0
    assert supervised.sft_loss(logprobs.repeat(2), mask.repeat(2)).item() == 12.0


def test_sft_loss_without_trained_tokens_is_zero_and_differentiable():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = supervised.sft_loss(logprobs, torch.zeros(2))
    loss.backward()
    assert loss.item() == 0.0
    assert logprobs.grad.tolist() == [0.0, 0.0]


def test_sft_loss_gradient_is_minus_the_mask():
    logprobs = torch.randn(4, requires_grad=True)
    supervised.sft_loss(logprobs, torch.tensor([1.0, 0.0, 0.0, 1.0])).backward()
    assert logprobs.grad.tolist() == [-1.0, 0.0, 0.0, -1.0]


def test_ranking_by_hand():
    """s(2 - 0 - 2) = 1/2, so ln 2; s(ln 3 - 0 - 0) = 3/4, so ln 4/3."""
    rows = ([2.0, math.log(3)], [0.0, 0.0], [2.0, 0.0])
    value = supervised.ranking(*(torch.tensor(row, dtype=torch.float64) for row in rows))
    np.testing.assert_allclose(value.numpy(), [math.log(2), math.log(4 / 3)], rtol=1e-14)


def test_ranking_equals_trl():
    """TRL 1.16.0, RewardTrainer.compute_loss with a margin, one pair at a time, float64."""
    chosen, rejected, margin = (
        torch.tensor(x, dtype=torch.float64)
        for x in ([1.5, 0.0, 30.0, 0.25], [-0.5, 2.0, -20.0, 0.25], [1.0, 0.0, 3.0, 0.5])
    )
    recorded = [0.31326168751822286, 2.1269280110429727, 3.873997628687187e-21, 0.9740769841801067]
    np.testing.assert_allclose(supervised.ranking(chosen, rejected, margin).numpy(), recorded, rtol=1e-12)


def test_ranking_is_finite_at_extremes_and_passes_gradcheck():
    chosen = torch.tensor([1e4, -1e4, 0.3], dtype=torch.float64, requires_grad=True)
    value = supervised.ranking(chosen, -chosen.detach(), torch.zeros(3))
    np.testing.assert_allclose(value.detach().numpy(), [0.0, 2e4, math.log1p(math.exp(-0.6))], rtol=1e-14)
    value.sum().backward()
    np.testing.assert_allclose(chosen.grad.numpy(), [0.0, -1.0, -1 / (1 + math.exp(0.6))], rtol=1e-14)
    pair = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda c, r: supervised.ranking(c, r, torch.full((5,), 0.5)), pair)


def test_centering_by_hand():
    """(3 - 1)^2, (-0.5 - 1)^2, (2 - 2)^2; of the first the gradient is 2 (3 - 1) for both rewards."""
    chosen, rejected = f64(3.0, -0.5, 2.0).requires_grad_(), f64(-1.0, -1.0, -2.0).requires_grad_()
    penalties = supervised.centering(chosen, rejected)
    assert penalties.tolist() == [4.0, 2.25, 0.0]
    penalties.sum().backward()
    assert chosen.grad.tolist() == rejected.grad.tolist() == [4.0, -3.0, 0.0]


def test_regression_by_hand():
    """Errors 1, (missing), -2 / (missing), 0.5, (missing): 1 + 4 + 0.25 over 3 attributes."""
    missing = supervised.MISSING
    assert missing == -100.0
    scores = torch.tensor([[3.0, 7.0, 1.0], [9.0, 0.5, 4.0]], requires_grad=True)
    labels = torch.tensor([[2.0, missing, 3.0], [missing, 0.0, missing]])
    total, present = supervised.regression(scores, labels)
    assert (total.item(), present.item()) == (5.25, 3)
    total.backward()
    assert scores.grad.tolist() == [[2.0, 0.0, -4.0], [0.0, 1.0, 0.0]]  # 2 (score - label)


def test_regression_without_labels_is_zero_and_differentiable():
    scores = torch.randn(2, 3, requires_grad=True)
    total, present = supervised.regression(scores, torch.full((2, 3), supervised.MISSING))
    total.backward()
    assert (total.item(), present.item()) == (0.0, 0)
    assert scores.grad.abs().max().item() == 0.0
