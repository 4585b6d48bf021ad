"""Log-probabilities, entropies and their gradients: ours, and by log_softmax in float64."""

from types import SimpleNamespace

import torch
from torch import Tensor

from align.model.logprobs import target_logprobs
from tests.workers.logprobs import (
    VOCAB,
)

ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)  # all that is asked of a group of one rank


def oracle(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    grad: Tensor,
    vocab: int = VOCAB,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, gradient of hidden, gradient of weight) by log_softmax and autograd in float64.

    With a gradient [n, 2] log-probs and entropies, [n, 2].
    """
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    every = (hidden @ weight[:vocab].T / temperature).log_softmax(1)
    values = every.gather(1, targets[:, None])[:, 0]
    if grad.dim() == 2:
        values = torch.stack([values, -(every.exp() * every).sum(1)], 1)
    values.backward(grad.double())
    return values.detach(), hidden.grad, weight.grad


def ours(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    grad: Tensor,
    vocab: int = VOCAB,
    temperature: float = 1.0,
) -> tuple:
    """The same three by the function that the shape of the gradient asks for."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    values = target_logprobs(hidden, weight, targets, vocab, ALONE, temperature, entropy=grad.dim() == 2)
    values.backward(grad)
    return values.detach(), hidden.grad, weight.grad
