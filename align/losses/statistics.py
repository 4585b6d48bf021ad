"""Metrics of pairs and of rollouts, as pure functions of tensors: logged, not trained on.

[P] is one number per pair, [N] one per response token of a rollout, the responses end to end, `lengths[i]` of
them of response i; [A] is one number per response.
"""

import torch
from torch import Tensor


def pair_statistics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Metrics of rewards [P], as sums over P pairs; the engine divides them by P.

    "acc" (chosen above rejected; a tie is a mistake), means of rewards and of their difference, and the mean
    square of all rewards.
    """
    return {
        "acc": (chosen > rejected).double().sum(),
        "rewards_chosen_mean": chosen.sum(),
        "rewards_rejected_mean": rejected.sum(),
        "rewards_margin_mean": (chosen - rejected).sum(),
        "rewards_all_mean": (chosen + rejected).sum() / 2,
        "rewards_all_square": (chosen.square() + rejected.square()).sum() / 2,
    }


def log_ratio_statistics(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> dict[str, Tensor]:
    """Metrics of log-probs [P], as sums over P pairs.

    pair_statistics of the rewards beta (log pi - log pi_ref), the means of the policy's log-probs, and
    "logratio_abs_mean", the mean |log pi - log pi_ref| of a response, in nats.
    """
    ratio_chosen, ratio_rejected = chosen - ref_chosen, rejected - ref_rejected
    return {
        **pair_statistics(beta * ratio_chosen, beta * ratio_rejected),
        "logprobs_chosen_mean": chosen.sum(),
        "logprobs_rejected_mean": rejected.sum(),
        "logratio_abs_mean": (ratio_chosen.abs() + ratio_rejected.abs()).sum() / 2,
    }


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(R - V) / Var(R) of values V and returns R, both [N]: 1 is perfect, a constant V gives 0.

    0 if all returns are equal, whose computed variance need not be 0.
    """
    if (returns == returns[0]).all():
        return 0.0
    return (1 - (returns - values).var(correction=0) / returns.var(correction=0)).item()


def per_response(x: Tensor, lengths: list[int]) -> Tensor:
    """[A] means over the tokens of each response, of [N]."""
    return torch.stack([part.mean() for part in x.split(lengths)])


def moments(name: str, x: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation, divided by N, of numbers of tokens."""
    return {f"{name}_mean": x.mean(), f"{name}_std": x.std(correction=0)}
