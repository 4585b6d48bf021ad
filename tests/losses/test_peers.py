"""The objectives of train_grpo.py give the losses and gradients that TRL 1.16.0 and verl 0.9.1 gave.

Recorded from GRPOTrainer._compute_loss of TRL, with log-probs and advantages in place of a model's, and from
the losses of verl's core_algos.py, in float64. verl adds 1e-8 to the number of tokens of a response.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from align.losses import rl

LENGTHS, LONGEST = [5, 2, 3, 4], 8
N = torch.arange(sum(LENGTHS), dtype=torch.float64)
NEW, OLD, REF = -(0.2 + N * 7 % 11 / 8), -(0.2 + N * 5 % 13 / 10), -(0.3 + N * 3 % 7 / 6)
ADVANTAGES = rl.per_token(torch.tensor([1, -1, 0.5, -0.25], dtype=torch.float64), LENGTHS)
RESPONSES = rl.per_token(torch.arange(4.0), LENGTHS)
PPO = partial(rl.ppo, clip=0.2)
CASES = {  # loss_type of TRL, with its flags, or loss of verl: objective, aggregation, sequence ratio, beta
    "grpo": (PPO, "response", False, 0.0),
    "grpo, beta 0.04": (PPO, "response", False, 0.04),
    "dapo": (PPO, "token", False, 0.0),
    "dapo, epsilon_high 0.28": (partial(rl.ppo, clip=0.2, clip_high=0.28), "token", False, 0.0),
    "dapo, delta 1.5": (partial(rl.ppo, clip=0.2, dual_clip=1.5), "token", False, 0.0),
    "dr_grpo": (PPO, "constant", False, 0.0),
    "grpo, sequence, epsilon 0.03 and 0.04": (
        partial(rl.ppo, clip=0.03, clip_high=0.04),
        "response",
        True,
        0.0,
    ),
    "cispo, epsilon_high 1.5": (partial(rl.cispo, clip=1.0, clip_high=0.5), "token", False, 0.0),  # r <= 1.5
    "verl: cispo, clip_ratio_high 0.5": (
        partial(rl.cispo, clip=0.2, clip_high=0.5),
        "token",
        False,
        0.0,
    ),
    "verl: sapo": (partial(rl.sapo, tau_positive=1.0, tau_negative=1.05), "response", False, 0.0),
}
RECORDED = {  # loss; its gradient at the first, second, sixth and ninth token
    "grpo": (0.17178111197336687, [-0.05, -0.0343644639, 0.3232137074, -0.040637913]),
    "grpo, beta 0.04": (0.17603473047112028, [-0.0498096748, -0.0349975253, 0.3232963501, -0.0393775299]),
    "dapo": (-0.0714736784675154, [-0.0714285714, -0.0490920913, 0.1846935471, -0.0348324969]),
    "dapo, epsilon_high 0.28": (
        -0.08004510703894398,
        [-0.0714285714, -0.0490920913, 0.1846935471, -0.0348324969],
    ),
    "dapo, delta 1.5": (-0.15477648985419204, [-0.0714285714, -0.0490920913, 0.0, -0.0348324969]),
    "dr_grpo": (-0.03126973432953799, [-0.03125, -0.02147779, 0.0808034269, -0.0152392174]),
    "grpo, sequence, epsilon 0.03 and 0.04": (
        0.019890198073558796,
        [-0.0421832408, -0.0421832408, 0.1398840321, -0.0396345594],
    ),
    "cispo, epsilon_high 1.5": (
        0.1658078975624553,
        [-0.0714285714, -0.0490920913, 0.1071428571, -0.0348324969],
    ),
    "verl: cispo, clip_ratio_high 0.5": (
        0.19560005107382694,
        [-0.0714285714, -0.0571428571, 0.1071428571, -0.0348324969],
    ),
    "verl: sapo": (-0.03377780505919992, [-0.0499999999, -0.0335378607, 0.1729608888, -0.0406317203]),
}


def loss_of(
    logprobs: Tensor, objective: rl.Objective, aggregate: str, is_sequence: bool, beta: float
) -> Tensor:
    """The loss of one update of all tokens, as train_grpo.py computes it."""
    counted = torch.ones_like(N)
    weights = rl.aggregation_weights(counted, LENGTHS, aggregate, LONGEST)
    responses = RESPONSES if is_sequence else None
    loss, _ = rl.policy_loss(logprobs, OLD, ADVANTAGES, weights, objective, responses)
    return (loss + beta * (weights * rl.kl_k3(logprobs, REF)).sum()) / counted.sum()


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_library(name):
    """verl gave TRL's losses for grpo, dapo, delta, dr_grpo and the sequence ratio as well, to 1e-8."""
    logprobs = NEW.clone().requires_grad_()
    loss = loss_of(logprobs, *CASES[name])
    loss.backward()
    assert logprobs.grad is not None
    assert float(loss) == pytest.approx(RECORDED[name][0], abs=1e-8 if "verl" in name else 1e-14)
    assert logprobs.grad[[0, 1, 5, 8]].tolist() == pytest.approx(RECORDED[name][1], abs=1e-9)
