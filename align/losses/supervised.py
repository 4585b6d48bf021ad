"""Losses of supervised fine-tuning and of reward models, pure functions of tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor

MISSING = -100.0  # label of an unrated attribute


def sft_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Supervised fine-tuning: the negative log-likelihood of the trained tokens.

        L = - sum_t mask_t log p(targets_t | tokens_<=t)

    Args:
        logprobs: [T] log-probabilities of the targets, in nats.
        mask: [T] 1 where the target is trained, else 0.

    Returns:
        The sum over trained tokens, a scalar in nats.
    """
    return -(logprobs * mask).sum()


def ranking(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """Bradley-Terry with a margin (arXiv 2203.02155, 3.5; margin: 2307.09288, eq. 2).

        L = -log s(R(w) - R(l) - m)

    Args:
        chosen, rejected: [P] rewards R(w), R(l).
        margin: [P] required difference m of rewards; 0 without one in the data.

    Returns:
        [P], in nats.
    """
    return -F.logsigmoid(chosen - rejected - margin)


def centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Centering of rewards (Eisenstein et al., arXiv 2312.09244, eq. 2): L = (R(w) + R(l))^2.

    The ranking loss depends on differences only; added to it with a weight, this draws the mean reward to 0.
    Arguments and result are [P].
    """
    return (chosen + rejected).square()


def regression(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error over the rated attributes (SteerLM, arXiv 2310.05344).

        L = sum_na present_na (score_na - label_na)^2,   present_na = 1 where label_na is not MISSING

    Args:
        scores: [N, A] the model's values.
        labels: [N, A] ratings, or MISSING.

    Returns:
        The sum of squared errors, a scalar, and the number of present attributes, an int64 scalar.
    """
    present = labels != MISSING
    errors = torch.where(present, scores - labels, 0.0)
    return errors.square().sum(), present.sum()
