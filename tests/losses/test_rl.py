"""The mathematics of PPO: numbers worked by hand, gradients, and the equations as loops over tokens."""

import math
import random
from functools import partial

import numpy as np
import pytest
import torch

from align.losses import rl
from align.losses.statistics import explained_variance
from tests.support.tensors import f64


def ragged(seed: int, *kinds: str) -> tuple[list[int], list[torch.Tensor]]:
    """11 lengths of 1 to 9 tokens, both among them, and a random float64 tensor for each kind.

    A kind is "token" ([N]) or "answer" ([A]).
    """
    lengths = [random.Random(seed).randint(1, 9) for _ in range(9)] + [9, 1]
    generator = torch.Generator().manual_seed(seed)
    sizes = {"token": sum(lengths), "answer": len(lengths)}
    return lengths, [torch.randn(sizes[kind], generator=generator, dtype=torch.float64) for kind in kinds]


def rows(x: torch.Tensor, lengths: list[int]) -> list[list[float]]:
    """The numbers of each answer."""
    flat = iter(x.tolist())
    return [[next(flat) for _ in range(length)] for length in lengths]


def close(ours: torch.Tensor | float, expected: object, atol: float = 1e-12) -> None:
    """Equal to 12 digits, in float64 and in shape."""
    expected = np.asarray(expected, dtype=np.float64)
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == torch.float64 and ours.shape == expected.shape
        ours = ours.detach().numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=atol)


# Estimators of the KL divergence


def test_kl_estimators_by_hand():
    """d = ln 2 and -ln 2: exp(-d) = 1/2 and 2."""
    logprobs, reference = f64(-1.0, -1.0), f64(-1.0 - math.log(2), -1.0 + math.log(2))
    ln2 = math.log(2)
    close(rl.kl_k1(logprobs, reference), [ln2, -ln2])
    close(rl.kl_abs(logprobs, reference), [ln2, ln2])
    close(rl.kl_k2(logprobs, reference), [ln2**2 / 2, ln2**2 / 2])
    close(rl.kl_k3(logprobs, reference), [0.5 - 1 + ln2, 2 - 1 - ln2])


def test_kl_estimators_against_a_loop():
    _, (logprobs, reference) = ragged(0, "token", "token")
    pairs = list(zip(logprobs.tolist(), reference.tolist(), strict=True))
    close(rl.kl_k1(logprobs, reference), [p - q for p, q in pairs])
    close(rl.kl_abs(logprobs, reference), [p - q if p > q else q - p for p, q in pairs])
    close(rl.kl_k2(logprobs, reference), [0.5 * (p - q) ** 2 for p, q in pairs])
    ratios = [math.exp(q) / math.exp(p) for p, q in pairs]
    close(rl.kl_k3(logprobs, reference), [r - 1 - math.log(r) for r in ratios])


def test_kl_means_over_all_outcomes():
    """Five outcomes, each weighted by its probability: k1 and k3 are exact, k2 is only near."""
    policy = f64(0.3, 0.25, 0.2, 0.15, 0.1)
    reference = f64(0.27, 0.26, 0.22, 0.14, 0.11)
    true = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    k1, k2, k3, distance = (
        (policy * estimator(policy.log(), reference.log())).sum().item()
        for estimator in (rl.kl_k1, rl.kl_k2, rl.kl_k3, rl.kl_abs)
    )
    assert abs(k1 - true) < 1e-12 and abs(k3 - true) < 1e-12
    assert 1e-12 < abs(k2 - true) < 0.05 * true
    assert distance > 5 * true  # first order in the difference, where KL is second: another quantity


def test_kl_k3_is_never_negative_and_accurate_near_zero():
    """d = +-1e-9: exp(-d) - 1 + d = d^2 / 2 to nine digits, 5e-19, where 1 - 1e-9 has an error of 1e-16."""
    near = rl.kl_k3(f64(-1e-9, 1e-9), f64(0.0, 0.0))
    np.testing.assert_allclose(near.numpy(), 5e-19, rtol=1e-6)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-12, 1e-8, 1e-4, 1.0, 30.0):
        d = torch.randn(10_000, generator=generator, dtype=torch.float64) * size
        assert (rl.kl_k3(d, torch.zeros_like(d)) >= 0).all()
    assert rl.kl_k3(f64(-3.0), f64(-3.0)).item() == 0.0


def test_gradients_of_kl():
    """d k1 = 1, d |d| = sign d, d k2 = d, d k3 = 1 - exp(-d), with d = log pi - log pi_ref = 1/2, -2."""
    expected = {
        rl.kl_k1: [1.0, 1.0],
        rl.kl_abs: [1.0, -1.0],
        rl.kl_k2: [0.5, -2.0],
        rl.kl_k3: [1 - math.exp(-0.5), 1 - math.exp(2.0)],
    }
    for estimator, slopes in expected.items():
        logprobs = f64(-1.0, -3.0).requires_grad_()
        estimator(logprobs, f64(-1.5, -1.0)).sum().backward()
        close(logprobs.grad, slopes)


# Rewards of tokens


def test_ppo_golden_vector():
    """Three response tokens, c = 0.02, gamma 1, lambda 0.95, score 1.5, printed to six decimals.

    R = [-0.02 0.2, -0.02 0.3, -0.02 0.05 + 1.5]; backwards A = 1.499 - 0.4 = 1.099,
    (-0.006 + 0.4 + 0.1) + 0.95 1.099 = 1.53805, (-0.004 - 0.1 - 0.2) + 0.95 1.53805 = 1.1571475.
    """
    rewards = rl.token_rewards(f64(1.5), f64(0.2, 0.3, 0.05), [3], 0.02)
    close(rewards, [-0.004, -0.006, 1.499])
    advantages, returns = rl.gae(rewards, f64(0.2, -0.1, 0.4), [3], 1.0, 0.95)
    close(advantages, [1.1571475, 1.53805, 1.099])
    np.testing.assert_allclose(returns.numpy(), [1.357148, 1.438050, 1.499], atol=6e-7, rtol=0)
    whitened = rl.whiten(advantages).numpy()
    np.testing.assert_allclose(whitened, [-0.552519, 1.403664, -0.851145], atol=6e-7, rtol=0)


def test_token_rewards_against_a_loop():
    lengths, (scores, kl) = ragged(1, "answer", "token")
    expected = []
    for score, answer in zip(scores.tolist(), rows(kl, lengths), strict=True):
        for t, penalty in enumerate(answer):
            expected.append(-0.3 * penalty + (score if t == len(answer) - 1 else 0.0))
    before = kl.clone()
    close(rl.token_rewards(scores, kl, lengths, 0.3), expected)
    assert torch.equal(kl, before)  # the estimates are logged afterwards


def test_the_score_is_on_the_last_token_and_nowhere_else():
    """Without a penalty nothing but the scores is left; with one, an answer's sum is score - c sum kl."""
    for seed in range(5):
        lengths, (scores, kl) = ragged(seed, "answer", "token")
        alone = rows(rl.token_rewards(scores, kl, lengths, 0.0), lengths)
        both = rows(rl.token_rewards(scores, kl, lengths, 0.7), lengths)
        for i, score in enumerate(scores.tolist()):
            assert alone[i][-1] == score and not any(alone[i][:-1])
            close(sum(both[i]), score - 0.7 * sum(rows(kl, lengths)[i]))


# Advantages


def test_gae_golden_vector():
    """gamma 1/2, lambda 0: A_t = R_t + V_{t+1} / 2 - V_t = 1/2 - 0, 1 - 1, 1 + 3/2 - 2, 0 - 3."""
    advantages, returns = rl.gae(f64(0.0, 0.0, 1.0, 0.0), f64(0.0, 1.0, 2.0, 3.0), [4], 0.5, 0.0)
    close(advantages, [0.5, 0.0, 0.5, -3.0])
    close(returns, [0.5, 1.0, 2.5, 0.0])


def gae_by_its_sum(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Eq. 16 as it stands, a sum over all later tokens of one answer."""
    following = [*values[1:], 0.0]
    errors = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [
        sum((gamma * lam) ** k * errors[t + k] for k in range(len(errors) - t)) for t in range(len(errors))
    ]


def test_gae_against_its_sum():
    lengths, (rewards, values) = ragged(2, "token", "token")
    for gamma, lam in ((1.0, 0.95), (0.9, 0.7), (0.8, 1.0), (0.7, 0.0)):
        advantages, returns = rl.gae(rewards, values, lengths, gamma, lam)
        expected = []
        for answer in zip(rows(rewards, lengths), rows(values, lengths), strict=True):
            expected += gae_by_its_sum(*answer, gamma, lam)
        close(advantages, expected)
        close(returns, [a + v for a, v in zip(expected, values.tolist(), strict=True)])


def test_gae_with_lambda_one_returns_the_reward_to_go():
    """Whatever the critic says, the returns are sum_l gamma^l R_{t+l}; with V = 0 so are the advantages."""
    lengths, (rewards, values) = ragged(3, "token", "token")
    to_go = []
    for answer in rows(rewards, lengths):
        to_go += [sum(0.9**k * r for k, r in enumerate(answer[t:])) for t in range(len(answer))]
    close(rl.gae(rewards, values, lengths, 0.9, 1.0)[1], to_go)
    for part in rl.gae(rewards, torch.zeros_like(values), lengths, 0.9, 1.0):
        close(part, to_go)


def test_gae_does_not_look_across_answers():
    """Another last answer, and another longest one, leave the first one's numbers alone to the last bit."""
    first, other = [f64(1.0, 2.0, 3.0), f64(0.5, -0.5, 0.25)], [f64(7.0, 8.0), f64(-3.0, 40.0)]
    alone = rl.gae(*first, [3], 0.9, 0.8)
    for parts in ((first, other), (first, other, other, other)):
        lengths = [len(part[0]) for part in parts]
        together = rl.gae(*(torch.cat(x) for x in zip(*parts, strict=True)), lengths, 0.9, 0.8)
        assert all(torch.equal(a, b[:3]) for a, b in zip(alone, together, strict=True))


def test_whiten_has_mean_zero_and_variance_one():
    """x is large, so that the 1e-8 under the root does not show; a shift and a scale change nothing then."""
    _, (x,) = ragged(4, "token")
    white = rl.whiten(1e3 * x)
    assert abs(white.mean().item()) < 1e-12
    assert abs((white**2).mean().item() - 1) < 1e-12  # divided by N, not by N - 1
    close(rl.whiten(2e3 * x - 500.0), white.tolist(), atol=1e-11)
    close(rl.whiten(-1e3 * x), (-white).tolist())


def test_whiten_against_a_loop():
    _, (x,) = ragged(5, "token")
    numbers = x.tolist()
    mean = sum(numbers) / len(numbers)
    variance = sum((number - mean) ** 2 for number in numbers) / len(numbers)
    close(rl.whiten(x), [(number - mean) / math.sqrt(variance + 1e-8) for number in numbers])


def test_whiten_next_to_a_constant():
    """x = 0.5 +- 1e-4 has variance 1e-8, as large as what is added: +-1 / sqrt(2). A constant gives 0."""
    half = math.sqrt(0.5)
    close(rl.whiten(f64(0.4999, 0.5001)), [-half, half], atol=1e-11)
    assert rl.whiten(f64(0.5, 0.5, 0.5, 0.5)).tolist() == [0.0] * 4


def test_equal_rewards_have_advantages_of_exactly_0():
    """Three times 0.1 has a mean of 0.10000000000000002; Adam makes a full step of the difference."""
    same = f64(0.1, 0.1, 0.1)
    assert float(same.sum() / 3) != 0.1
    assert rl.whiten(same).tolist() == [0.0] * 3
    returns = torch.stack([f64(0.1, 0.1, 0.1, 0.1), f64(0.1, 0.1, 0.1, 0.9), f64(0.1, 0.1, 0.1, 0.4)])
    counted = torch.tensor([[True] * 4, [True, True, True, False], [True] * 4])
    for compare in (rl.rloo, rl.grpo):
        advantages = compare(returns, counted)
        assert advantages[:2, :3].tolist() == [[0.0] * 3] * 2 and advantages[0, 3] == 0.0
        assert (advantages[2] != 0).all()


def test_rloo_golden_vector():
    """Rewards [1, 0, 2, -3, 5, 7, -1, 0] of prompts A A B A A B B B, by prompt; the last is not counted.

    Baselines of A, whose sum is 3: (3 - R) / 3. Of B, whose counted sum is 8: (8 - R) / 2, and 8 / 2 for the
    last, by the rule that its divisor is that of the others.
    """
    returns = torch.stack([f64(1.0, 0.0, -3.0, 5.0), f64(2.0, 7.0, -1.0, 0.0)])
    counted = torch.tensor([[True] * 4, [True, True, True, False]])
    baselines = returns - rl.rloo(returns, counted)
    close(baselines, [[2 / 3, 1.0, 2.0, -2 / 3], [3.0, 0.5, 4.5, 4.0]])


def test_rloo_by_hand():
    """Two answers: the other one is the baseline. Fewer than two counted: nothing to compare with."""
    returns = torch.stack([f64(3.0, 1.0, 50.0), f64(3.0, 1.0, 50.0), f64(3.0, 1.0, 50.0)])
    counted = torch.tensor([[True, True, False], [False, True, False], [False, False, False]])
    close(rl.rloo(returns, counted), [[2.0, -2.0, 46.0], [0.0] * 3, [0.0] * 3])  # 46 = 50 - 4 / 1


def test_grpo_by_hand():
    """1, 2, 6 counted: mean 3, deviations -2, -1, 3, variance (4 + 1 + 9) / 2 = 7. Then 5 and 5; 9 alone."""
    returns = torch.stack([f64(1.0, 50.0, 2.0, 6.0), f64(5.0, 5.0, -8.0, 4.0), f64(7.0, 8.0, 9.0, 1.0)])
    counted = torch.tensor(
        [[True, False, True, True], [True, True, False, False], [False, False, True, False]]
    )
    std = math.sqrt(7) + 1e-4
    close(rl.grpo(returns, counted), [[-2 / std, 0.0, -1 / std, 3 / std], [0.0] * 4, [0.0] * 4])
    assert rl.grpo(returns, torch.zeros(3, 4, dtype=torch.bool)).tolist() == [[0.0] * 4] * 3


def test_group_advantages_against_loops():
    """Seven prompts with six answers each, 0 to 6 of them counted."""
    generator = torch.Generator().manual_seed(6)
    returns = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    counted = torch.stack([torch.randperm(6, generator=generator) < number for number in range(7)])
    leave_one_out, normalised = [], []
    for group, kept in zip(returns.tolist(), counted.tolist(), strict=True):
        good = [r for r, k in zip(group, kept, strict=True) if k]
        for i, r in enumerate(group):
            others = [x for j, x in enumerate(group) if kept[j] and j != i]
            leave_one_out.append(r - sum(others) / (len(good) - 1) if len(good) >= 2 else 0.0)
            if kept[i] and len(good) >= 2:
                mean = sum(good) / len(good)
                std = math.sqrt(sum((x - mean) ** 2 for x in good) / (len(good) - 1))
                normalised.append((r - mean) / (std + 1e-4))
            else:
                normalised.append(0.0)
    close(rl.rloo(returns, counted), np.reshape(leave_one_out, (7, 6)))
    close(rl.grpo(returns, counted), np.reshape(normalised, (7, 6)))


def test_group_advantages_ignore_what_is_not_counted():
    """A judge's NaN for an answer left out stays out of the others' advantages."""
    returns, counted = f64(1.0, math.nan, 4.0)[None], torch.tensor([[True, False, True]])
    assert rl.rloo(returns, counted)[0, [0, 2]].tolist() == [-3.0, 3.0]
    ours = rl.grpo(returns, counted)
    std = math.sqrt(4.5) + 1e-4  # 1 and 4: mean 2.5, 2 * 1.5^2 / 1
    close(ours, [[-1.5 / std, 0.0, 1.5 / std]])


def test_adapted_kl_coef_by_hand():
    """Target 6: a KL of 6.6 is 0.1 too much; 60 and 0 are clipped to +-0.2. K = 64 / 640 = 0.1."""
    for kl, factor in ((6.6, 1.01), (60.0, 1.02), (0.0, 0.98), (6.0, 1.0), (5.4, 0.99), (-6.0, 0.98)):
        close(rl.adapted_kl_coef(0.2, kl, 6.0, 640.0, 64), 0.2 * factor)
    close(rl.adapted_kl_coef(0.2, 60.0, 6.0, 64.0, 128), 0.2 * 1.4)  # K = 2
    assert isinstance(rl.adapted_kl_coef(0.2, 6.6, 6.0, 640.0, 64), float)


# The policy's loss

PPO = partial(rl.ppo, clip=0.2)
POLICY_STATISTICS = {"ppo_ratio", "ppo_ratio_clamped", "clip_fraction", "approx_kl", "ratio_error"}


def policy_loss_by_loop(
    logprobs: list[float], old: list[float], advantages: list[float], mask: list[float], clip: float
) -> tuple[float, dict[str, float]]:
    """Eq. 7 with its minimum, token by token."""
    loss, statistics = 0.0, dict.fromkeys(POLICY_STATISTICS, 0.0)
    for new, before, a, m in zip(logprobs, old, advantages, mask, strict=True):
        if m == 0:
            continue
        r = math.exp(new) / math.exp(before)
        bounded = 1 - clip if r < 1 - clip else 1 + clip if r > 1 + clip else r
        loss -= min(r * a, bounded * a)
        statistics["ppo_ratio"] += r
        statistics["ppo_ratio_clamped"] += bounded
        statistics["clip_fraction"] += (a > 0 and r > 1 + clip) or (a < 0 and r < 1 - clip)
        statistics["approx_kl"] += r - 1 - math.log(r)
        statistics["ratio_error"] += abs(r - 1)
    return loss, statistics


def test_policy_loss_against_a_loop():
    for seed in range(4):
        _, (old, change, advantages, chance) = ragged(seed, "token", "token", "token", "token")
        logprobs, mask = old + 0.4 * change, (chance > -0.5).double()
        assert 0 < mask.sum() < len(mask)
        expected, sums = policy_loss_by_loop(*(x.tolist() for x in (logprobs, old, advantages, mask)), 0.2)
        assert 0 < sums["clip_fraction"] < mask.sum()
        loss, statistics = rl.policy_loss(logprobs, old, advantages, mask, PPO)
        close(loss, expected)
        assert statistics.keys() == POLICY_STATISTICS
        for name, value in statistics.items():
            close(value, sums[name])


def four_cases() -> list[torch.Tensor]:
    """Ratios 1.5, 0.5, 1.75, 0.5, 1.1 and advantages 2, 2, -2, -2, 2."""
    old = f64(-1.0, -2.0, -1.5, -0.75, -3.0)
    return [old + f64(1.5, 0.5, 1.75, 0.5, 1.1).log(), old, f64(2.0, 2.0, -2.0, -2.0, 2.0), torch.ones(5)]


def test_policy_loss_four_cases_by_hand():
    """clip 0.2. The gain is bounded where the ratio went the way the advantage asks, and only there.

    -min(3, 2.4) = -2.4, -min(1, 1.6) = -1, -min(-3.5, -2.4) = 3.5, -min(-1, -1.6) = 1.6, -2.2: -0.5 in all.
    The gradient in log pi is -A r, exactly 0 where cut off.
    """
    logprobs, old, advantages, mask = four_cases()
    logprobs.requires_grad_()
    loss, statistics = rl.policy_loss(logprobs, old, advantages, mask, PPO)
    loss.backward()
    close(loss, -0.5)
    close(logprobs.grad, [0.0, -1.0, 3.5, 0.0, -2.2])
    assert logprobs.grad[0] == 0 and logprobs.grad[3] == 0
    sums = {"ppo_ratio": 5.35, "ppo_ratio_clamped": 5.1, "clip_fraction": 2.0, "ratio_error": 2.35}
    for name, value in sums.items():
        close(statistics[name], value)
    # r - 1 - ln r, summed: 5.35 - 5 - ln(1.5 0.5 1.75 0.5 1.1)
    close(statistics["approx_kl"], 0.35 - math.log(0.721875))
    for advantage, at in ((2.0, 0), (2.0, 1), (-2.0, 2), (-2.0, 3)):  # each alone, so none hides another
        one = [x[at : at + 1] for x in four_cases()]
        assert one[2].item() == advantage
        assert rl.policy_loss(*one, PPO)[1]["clip_fraction"].item() == (1.0 if at in (0, 3) else 0.0)


def terms_and_gradients(objective, responses=None, weights=None) -> tuple[torch.Tensor, list[float]]:
    """Loss of `four_cases` and its gradient in log pi."""
    logprobs, old, advantages, mask = four_cases()
    loss, _ = rl.policy_loss(
        logprobs.requires_grad_(), old, advantages, mask if weights is None else weights, objective, responses
    )
    loss.backward()
    return loss.detach(), logprobs.grad


def test_clip_high_and_dual_clip_by_hand():
    """Ratios 1.5, 0.5, 1.75, 0.5, 1.1 and advantages 2, 2, -2, -2, 2.

    clip 0.2, clip_high 0.6: the gain of 1.5 is whole: -3 - 1 + 3.5 + 1.6 - 2.2. With dual_clip 1.6 the cost
    of 1.75 is that of 1.6: 3.2 in place of 3.5, without a gradient.
    """
    loss, grad = terms_and_gradients(partial(rl.ppo, clip=0.2, clip_high=0.6))
    close(loss, -1.1)
    close(grad, [-3.0, -1.0, 3.5, 0.0, -2.2])
    loss, grad = terms_and_gradients(partial(rl.ppo, clip=0.2, clip_high=0.6, dual_clip=1.6))
    close(loss, -1.4)
    close(grad, [-3.0, -1.0, 0.0, 0.0, -2.2])
    statistics = rl.policy_loss(*four_cases(), partial(rl.ppo, clip=0.2, clip_high=0.6, dual_clip=1.6))[1]
    assert statistics["clip_fraction"] == 2


def test_cispo_by_hand():
    """The factor of log pi is -A times the ratio within [0.8, 1.6], and no gradient is lost."""
    loss, grad = terms_and_gradients(partial(rl.cispo, clip=0.2, clip_high=0.6))
    close(grad, [-3.0, -1.6, 3.2, 1.6, -2.2])
    close(loss, sum(g * x for g, x in zip(grad.tolist(), four_cases()[0].tolist(), strict=True)))
    _, statistics = rl.policy_loss(*four_cases(), partial(rl.cispo, clip=0.2, clip_high=0.6))
    assert statistics["clip_fraction"] == 3
    close(statistics["ppo_ratio_clamped"], 1.5 + 0.8 + 1.6 + 0.8 + 1.1)


def test_sapo_by_a_loop():
    tau = {True: 1.0, False: 2.0}
    terms, slopes = [], []
    for ratio, advantage in zip((1.5, 0.5, 1.75, 0.5, 1.1), (2, 2, -2, -2, 2), strict=True):
        t = tau[advantage > 0]
        gate = 1 / (1 + math.exp(-t * (ratio - 1)))
        terms.append(-advantage * gate * 4 / t)
        slopes.append(-advantage * 4 * gate * (1 - gate) * ratio)
    loss, grad = terms_and_gradients(partial(rl.sapo, tau_positive=1.0, tau_negative=2.0))
    close(loss, sum(terms))
    close(grad, slopes)


OBJECTIVES = [PPO, partial(rl.cispo, clip=0.2), partial(rl.sapo, tau_positive=1.0, tau_negative=1.05)]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("by_response", [False, True])
def test_the_first_update_of_every_objective_is_reinforce(objective, by_response):
    lengths, (old, advantages) = ragged(3, "token", "token")
    logprobs = old.clone().requires_grad_()
    responses = rl.per_token(torch.arange(len(lengths)), lengths) if by_response else None
    rl.policy_loss(logprobs, old, advantages, torch.ones_like(old), objective, responses)[0].backward()
    torch.testing.assert_close(logprobs.grad, -advantages, rtol=1e-13, atol=0)


def test_ratio_of_responses():
    """Of one token each: PPO. Of ratios 1.5 0.5 | 1.75 0.5 1.1: the roots of 0.75 and 0.9625; GSPO's gradient
    of a response's mean is -A s / n at each of its tokens, unless it is clipped."""
    assert torch.equal(terms_and_gradients(PPO, torch.arange(5))[1], terms_and_gradients(PPO)[1])
    logprobs, old, _, mask = four_cases()
    advantages, responses = f64(2.0, 2.0, -1.0, -1.0, -1.0), torch.tensor([0, 0, 4, 4, 4])
    first, second = 0.75 ** (1 / 2), 0.9625 ** (1 / 3)
    weights = rl.aggregation_weights(mask.double(), [2, 3], "response", 9)
    close(weights, [5 / 4, 5 / 4, 5 / 6, 5 / 6, 5 / 6])
    loss, statistics = rl.policy_loss(
        logprobs.requires_grad_(), old, advantages, weights, partial(rl.ppo, clip=0.2), responses
    )
    (loss / 5).backward()
    close(loss / 5, (-2 * first + second) / 2)
    close(logprobs.grad, [-first / 2] * 2 + [second / 6] * 3)
    close(statistics["ppo_ratio"], 2 * first + 3 * second)
    tight = partial(rl.ppo, clip=0.1, clip_high=0.1)  # 0.866 is below 0.9: a gain, not cut; -1 is not, either
    assert rl.policy_loss(logprobs, old, -advantages, mask, tight, responses)[1]["clip_fraction"] == 2


def test_overlong_penalty_by_hand():
    """8 tokens at most, the last 4 of them penalised."""
    close(rl.overlong_penalty([1, 4, 5, 6, 8], 8, 4), [0, 0, 0.25, 0.5, 1])
    close(rl.overlong_penalty([7, 8], 8, 1), [0, 1])


def test_aggregation_weights_by_hand():
    """Responses of 1, 2 and 3 tokens, the second one not counted: 4 tokens, 2 responses."""
    counted = f64(1, 0, 0, 1, 1, 1)
    assert rl.aggregation_weights(counted, [1, 2, 3], "token", 8) is counted
    close(rl.aggregation_weights(counted, [1, 2, 3], "response", 8), [2, 0, 0, 2 / 3, 2 / 3, 2 / 3])
    close(rl.aggregation_weights(counted, [1, 2, 3], "constant", 8), [1 / 4, 0, 0, 1 / 4, 1 / 4, 1 / 4])
    nothing = rl.aggregation_weights(torch.zeros(3).double(), [1, 2], "response", 8)
    assert nothing.tolist() == [0.0] * 3


def test_scales_of_grpo_advantages_by_hand():
    """Rewards 0 2 | 1 1 | 0 4, the last one not counted: deviations -1 1 | 0 0 | 0 0; std of 0 2 1 1 0."""
    returns, counted = f64([0, 2], [1, 1], [0, 4]), torch.tensor([[1, 1], [1, 1], [1, 0]]).bool()
    close(rl.grpo(returns, counted, "none"), [[-1, 1], [0, 0], [0, 0]])
    std = math.sqrt((0.64 + 1.44 + 0.04 + 0.04 + 0.64) / 4) + 1e-4
    close(rl.grpo(returns, counted, "batch"), [[-1 / std, 1 / std], [0, 0], [0, 0]])
    assert not rl.grpo(returns, torch.zeros(3, 2).bool(), "batch").any()


def test_policy_loss_on_the_policy_that_drew_the_answers():
    """r = 1: the loss is -sum A, its gradient -A at once, and nothing is clipped."""
    _, (old, advantages) = ragged(7, "token", "token")
    logprobs = old.clone().requires_grad_()
    loss, statistics = rl.policy_loss(logprobs, old, advantages, torch.ones_like(old), PPO)
    loss.backward()
    close(loss, -advantages.sum().item())
    assert torch.equal(logprobs.grad, -advantages)
    n = len(old)
    sums = {name: value.item() for name, value in statistics.items()}
    assert sums == {
        "ppo_ratio": n,
        "ppo_ratio_clamped": n,
        "clip_fraction": 0,
        "approx_kl": 0,
        "ratio_error": 0,
    }


@pytest.mark.parametrize("estimator", [rl.kl_k1, rl.kl_abs, rl.kl_k2, rl.kl_k3])
def test_kl_only_where_the_mask_is_1(estimator):
    """The sum and its gradient are those of the tokens inside, beside log-ratios of +-infinity and NaN."""
    inside, inside_ref = f64(-1.0, -2.0), f64(-1.5, -0.25)
    logprobs = torch.cat([inside, f64(-1.0, -math.inf, math.nan)]).requires_grad_()
    ref = torch.cat([inside_ref, f64(-math.inf, -1.0, -1.0)])
    kl = estimator(*rl.only_where(f64(1.0, 1.0, 0.0, 0.0, 0.0), logprobs, ref)).sum()
    kl.backward()
    alone = inside.requires_grad_()
    expected = estimator(alone, inside_ref).sum()
    expected.backward()
    assert torch.equal(kl, expected) and torch.equal(logprobs.grad, torch.cat([alone.grad, torch.zeros(3)]))


def test_policy_loss_is_a_sum():
    four = four_cases()
    once, twice = rl.policy_loss(*four, PPO), rl.policy_loss(*(x.repeat(2) for x in four), PPO)
    close(twice[0], 2 * once[0].item())
    for name, value in once[1].items():
        close(twice[1][name], 2 * value.item())


def test_policy_loss_gradcheck():
    """Ratios of e^+-0.05 and e^+-0.5 with advantages of both signs, away from the kinks; two are masked."""
    old = f64(*[-1.0 - 0.25 * k for k in range(10)])
    advantages = f64(1.5, 1.5, 1.5, 1.5, -0.7, -0.7, -0.7, -0.7, 2.0, -2.0)
    logprobs = old + f64(*[0.05, -0.05, 0.5, -0.5] * 2, 0.05, 0.5)
    mask = f64(*[1.0] * 8, 0.0, 0.0)
    assert torch.autograd.gradcheck(
        lambda x: rl.policy_loss(x, old, advantages, mask, PPO)[0], logprobs.requires_grad_()
    )


def test_policy_loss_does_not_look_at_masked_tokens():
    """Log-ratios of +-1000 (a ratio of infinity), infinities and NaN: loss, statistics and gradient are
    those of the trained tokens alone, and exactly 0 at the others."""
    logprobs, old, advantages, _ = four_cases()
    alone, sums = rl.policy_loss(logprobs, old, advantages, torch.ones(5), PPO)
    bad = f64(-1.0, -1001.0, -1.0, -1.0, -1.0, math.nan, -math.inf, -1.0)
    bad_old = f64(-1001.0, -1.0, -1001.0, math.nan, -math.inf, -1.0, -math.inf, -1.0)
    bad_advantages = f64(1.0, 1.0, -1.0, 1.0, 1.0, 1.0, 1.0, math.nan)
    for kind in (torch.float64, torch.float32, torch.bool):
        mixed = torch.cat([bad, logprobs]).requires_grad_()
        mask = torch.cat([torch.zeros(8), torch.ones(5)]).to(kind)
        loss, statistics = rl.policy_loss(
            mixed, torch.cat([bad_old, old]), torch.cat([bad_advantages, advantages]), mask, PPO
        )
        loss.backward()
        close(loss, alone.item())
        for name, value in sums.items():
            close(statistics[name], value.item())
        assert (mixed.grad[:8] == 0).all()
        close(mixed.grad[8:], [0.0, -1.0, 3.5, 0.0, -2.2])


def test_policy_loss_without_trained_tokens_is_zero_and_differentiable():
    """So that a process all of whose answers are left out stays in step with the others."""
    logprobs = f64(-1.0, -2.0).requires_grad_()
    loss, statistics = rl.policy_loss(logprobs, f64(-3.0, -1.0), f64(1.0, 1.0), f64(0.0, 0.0), PPO)
    loss.backward()
    assert loss.item() == 0.0 and logprobs.grad.tolist() == [0.0, 0.0]
    assert all(value.item() == 0.0 for value in statistics.values())


def test_statistics_have_no_gradient():
    logprobs, *rest = four_cases()
    _, statistics = rl.policy_loss(logprobs.requires_grad_(), *rest, PPO)
    _, of_values = rl.value_loss(f64(1.0).requires_grad_(), f64(0.0), f64(2.0), 0.2)
    assert not any(value.requires_grad for value in [*statistics.values(), *of_values.values()])


# The critic's loss


def test_value_loss_against_a_loop():
    _, (old, change, returns) = ragged(8, "token", "token", "token")
    values = old + 0.4 * change
    for clip in (0.2, 0.5, 0.0):
        loss = clipped = 0.0
        for v, before, target in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True):
            bounded = min(max(v, before - clip), before + clip) if clip else v
            loss += 0.5 * max((v - target) ** 2, (bounded - target) ** 2)
            clipped += (bounded - target) ** 2 > (v - target) ** 2
        ours, statistics = rl.value_loss(values, old, returns, clip)
        close(ours, loss)
        assert statistics.keys() == {"value_clip_fraction"}
        close(statistics["value_clip_fraction"], clipped)
        assert (clipped > 0) == (clip > 0)


def test_value_loss_four_cases_by_hand():
    """V_old = 0, c = 0.2; V = 0.5, -0.5 with R = 1, -1. A step towards R counts only up to 0.2.

    (0.2 - 1)^2 = 0.64 > 0.25: cut; (0.5 + 1)^2 = 2.25 > 1.44; (-0.5 - 1)^2 = 2.25; (-0.2 + 1)^2 = 0.64: cut.
    In reach: V = 0.1, R = 1: 0.81. Half of the sum is (0.64 + 2.25 + 2.25 + 0.64 + 0.81) / 2 = 3.295.
    """
    values = f64(0.5, 0.5, -0.5, -0.5, 0.1).requires_grad_()
    returns = f64(1.0, -1.0, 1.0, -1.0, 1.0)
    loss, statistics = rl.value_loss(values, torch.zeros_like(returns), returns, 0.2)
    loss.backward()
    close(loss, 3.295)
    close(values.grad, [0.0, 1.5, -1.5, 0.0, -0.9])  # V - R
    assert values.grad[0] == 0 and values.grad[3] == 0
    close(statistics["value_clip_fraction"], 2.0)


def test_value_loss_without_clipping():
    """value_clip 0: half the squared error, whatever the old values; the gradient is V - R."""
    values = f64(0.5, -3.0).requires_grad_()
    loss, statistics = rl.value_loss(values, f64(100.0, -100.0), f64(1.0, 1.0), 0.0)
    loss.backward()
    close(loss, (0.25 + 16.0) / 2)
    close(values.grad, [-0.5, -4.0])
    close(statistics["value_clip_fraction"], 0.0)


def test_value_loss_gradcheck():
    """The four cases of the clip and two tokens in reach, away from the kinks; and no clip."""
    old, returns = f64(0.0, 0.1, -0.2, 0.3, 0.0, 0.5), f64(1.0, -1.0, 1.0, -1.0, 1.0, -1.0)
    values = (old + f64(0.5, 0.5, -0.5, -0.5, 0.1, -0.1)).requires_grad_()
    for clip in (0.2, 0.0):
        assert torch.autograd.gradcheck(lambda v, clip=clip: rl.value_loss(v, old, returns, clip)[0], values)


def test_value_clip_counts_no_rounding_errors():
    """Within reach clip(V, ...) is V itself, not V_old + (V - V_old), which rounds digits of a small V."""
    _, (old, values, returns) = ragged(9, "token", "token", "token")
    _, statistics = rl.value_loss(0.01 * values.tanh(), 0.18 * old.tanh(), returns, 0.2)
    assert statistics["value_clip_fraction"].item() == 0.0


def test_explained_variance_by_hand():
    """R = 0, 2, 4 has variance 8/3. V = 0, 2, 1: R - V = 0, 0, 3 has variance (1 + 1 + 4) / 3."""
    returns = f64(0.0, 2.0, 4.0)
    close(explained_variance(f64(0.0, 2.0, 1.0), returns), 1 - 2 / (8 / 3))
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(returns + 5.0, returns) == 1.0  # a constant error explains all of it
    close(explained_variance(f64(2.0, 2.0, 2.0), returns), 0.0)
    close(explained_variance(-returns, returns), -3.0)  # R - V = 2 R: 1 - 4
    assert isinstance(explained_variance(returns, returns), float)


def test_explained_variance_of_equal_returns_is_zero():
    """The computed variance of 1000 times 0.1 is not 0, which would give a number like 1e30."""
    _, (values,) = ragged(10, "token")
    assert explained_variance(values, torch.full_like(values, 0.1)) == 0.0
    assert explained_variance(torch.randn(1000).double(), torch.full((1000,), 0.1).double()) == 0.0
    assert explained_variance(f64(2.0), f64(3.0)) == 0.0


def test_explained_variance_against_a_loop():
    _, (values, noise) = ragged(11, "token", "token")
    returns = values + 0.3 * noise

    def variance(numbers: list[float]) -> float:
        mean = sum(numbers) / len(numbers)
        return sum((x - mean) ** 2 for x in numbers) / len(numbers)

    expected = 1 - variance((returns - values).tolist()) / variance(returns.tolist())
    close(explained_variance(values, returns), expected)
