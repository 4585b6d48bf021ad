"""The losses: numbers worked by hand, and their gradients."""

import math

import torch

from align import losses


def test_sft_loss_by_hand():
    logprobs = torch.tensor([math.log(0.5), math.log(0.1), math.log(0.25), 0.0])
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(losses.sft_loss(logprobs, mask), torch.tensor(math.log(8)))  # -log(1/2 1/4 1)


def test_sft_loss_is_a_sum_not_a_mean():
    logprobs, mask = torch.full((5,), -2.0), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    assert losses.sft_loss(logprobs, mask).item() == 6.0
    assert losses.sft_loss(logprobs.repeat(2), mask.repeat(2)).item() == 12.0


def test_sft_loss_without_trained_tokens_is_zero_and_differentiable():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = losses.sft_loss(logprobs, torch.zeros(2))
    loss.backward()
    assert loss.item() == 0.0
    assert logprobs.grad.tolist() == [0.0, 0.0]


def test_sft_loss_gradient_is_minus_the_mask():
    logprobs = torch.randn(4, requires_grad=True)
    losses.sft_loss(logprobs, torch.tensor([1.0, 0.0, 0.0, 1.0])).backward()
    assert logprobs.grad.tolist() == [-1.0, 0.0, 0.0, -1.0]
