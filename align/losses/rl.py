"""Losses, advantages and KL estimators of PPO, GRPO, RLOO and REINFORCE, as pure functions of tensors.

The responses of a rollout lie end to end: [N] response tokens, `lengths[i]` (1 or more) of response i. [A] is
one number per response, [P, G] the same by prompt. The two losses are sums over tokens. Dtypes are those of
the inputs; callers pass float64 for all values of a rollout.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(pi || pi_ref) from a sample of pi (joschu.net/blog/kl-approx.html): d = log pi - log pi_ref.

    All four take [N] log-probs in nats and return [N]. k1 is unbiased. Its expected gradient is 0, so it is
    no loss.
    """
    return logprobs - ref_logprobs


def kl_abs(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """|d|: a penalty on any change of a token's log-probability, not an estimate of KL."""
    return (logprobs - ref_logprobs).abs()


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d^2 / 2: never negative, less noisy than k1, biased; in a loss it has the gradient of the KL."""
    return (logprobs - ref_logprobs).square() / 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d: never negative and unbiased; the KL term of GRPO's loss (arXiv 2402.03300)."""
    d = logprobs - ref_logprobs
    return torch.expm1(-d) + d  # exp(-d) - 1 would lose all digits of a small d


def token_rewards(scores: Tensor, kl: Tensor, lengths: list[int], kl_coef: float) -> Tensor:
    """The reward of each token (arXiv 2203.02155, 3.5): R_t = -c kl_t, plus the score at a response's end.

    Args:
        scores: [A] one per response, added at its last token.
        kl: [N] an estimate of KL(pi || pi_ref), in nats.
        lengths: tokens of each response.
        kl_coef: c, in units of the score per nat.

    Returns:
        [N].
    """
    rewards = -kl_coef * kl
    rewards[torch.tensor(lengths, device=kl.device).cumsum(0) - 1] += scores
    return rewards


def overlong_penalty(lengths: list[int], max_length: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, 3.4), subtracted from the scores.

        p = clip((length - (max_length - buffer)) / buffer, 0, 1)

    Args:
        lengths: tokens of each response, at most max_length.
        max_length: where the penalty is 1, in tokens.
        buffer: tokens over which it rises from 0; 1 or more.

    Returns:
        [A] float64.
    """
    excess = torch.tensor(lengths, dtype=torch.float64) - (max_length - buffer)
    return (excess / buffer).clamp(0, 1)


def gae(
    rewards: Tensor, values: Tensor, lengths: list[int], gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16), separately for each response.

        A_t = sum_l (gamma lambda)^l D_{t+l},   D_t = R_t + gamma V_{t+1} - V_t

    V after a response's last token is 0. With values 0 and lambda 1 it is the reward to go,
    sum_l gamma^l R_{t+l}; whitened, that is the advantage of REINFORCE++ (arXiv 2501.03262).

    Args:
        rewards: [N] R.
        values: [N] V, the critic's prediction before the token is drawn.
        lengths: tokens of each response; one response or more.
        gamma: discount per token.
        gae_lambda: lambda, 0 for the TD error D only, 1 for Monte Carlo returns.

    Returns:
        Advantages [N] and returns [N] = A + V, the critic's targets.
    """
    reward, value = (pad_sequence(x.split(lengths), batch_first=True) for x in (rewards, values))
    errors = reward + gamma * F.pad(value, (0, 1))[:, 1:] - value  # [A, longest], 0 in the padding
    advantages = torch.zeros_like(errors)
    later = torch.zeros_like(errors[:, 0])
    for t in reversed(range(max(lengths))):
        later = advantages[:, t] = errors[:, t] + gamma * gae_lambda * later
    inside = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    unpadded = advantages[inside.to(advantages.device)]
    return unpadded, unpadded + values


def whiten(x: Tensor) -> Tensor:
    """[N] whitened to mean 0 and variance 1: (x - mean) / sqrt(var + 1e-8), var divided by N.

    Exactly 0 if all are equal, where the rounding of their mean would be scaled up.
    """
    if (x == x[0]).all():
        return torch.zeros_like(x)
    return (x - x.mean()) * torch.rsqrt(x.var(correction=0) + 1e-8)


def rloo(returns: Tensor, counted: Tensor) -> Tensor:
    """REINFORCE leave-one-out (arXiv 2402.14740): A_i = R_i - mean of the other counted R_j of the prompt.

    The divisor is (number counted - 1) for a response that is not counted, too; its advantage is not trained.

    Args:
        returns: [P, G] R of G responses to each prompt.
        counted: [P, G] bool, False for a response left out, for instance a truncated one.

    Returns:
        [P, G] advantages, exactly 0 for a prompt whose counted R are all equal, or fewer than 2.
    """
    number = counted.sum(1, keepdim=True)
    own = torch.where(counted, returns, 0.0)
    baseline = (own.sum(1, keepdim=True) - own) / (number - 1).clamp(min=1)
    return torch.where(has_spread(returns, counted), returns - baseline, 0.0)


def grpo(returns: Tensor, counted: Tensor, scale: str = "prompt") -> Tensor:
    """GRPO (arXiv 2402.03300, 4.1.2): A_i = (R_i - mean) / (std + 1e-4) over the counted R of the prompt.

    The paper leaves the std open; here its divisor is (number counted - 1).

    Args:
        returns: [P, G] R of G responses to each prompt.
        counted: [P, G] bool, False for a response left out.
        scale: std of the counted R of the "prompt", of the "batch" (all prompts; arXiv 2508.08221), or
            "none": A_i = R_i - mean (Dr. GRPO, arXiv 2503.20783).

    Returns:
        [P, G] advantages, exactly 0 where not counted, and for a prompt whose counted R are all equal, or
        fewer than 2.
    """
    number = counted.sum(1, keepdim=True)
    mean = torch.where(counted, returns, 0.0).sum(1, keepdim=True) / number.clamp(min=1)
    deviations = torch.where(counted & has_spread(returns, counted), returns - mean, 0.0)
    if scale == "none":
        return deviations
    if scale == "batch":
        return deviations / (returns[counted].std() + 1e-4) if counted.sum() > 1 else deviations
    variance = deviations.square().sum(1, keepdim=True) / (number - 1).clamp(min=1)
    return deviations / (variance.sqrt() + 1e-4)


def has_spread(returns: Tensor, counted: Tensor) -> Tensor:
    """[P, 1] bool, True for a prompt with two different counted returns; both arguments [P, G].

    The mean of equal returns may be off by one rounding, and Adam takes a full step for any gradient.
    """
    low = torch.where(counted, returns, math.inf).amin(1, keepdim=True)
    return low < torch.where(counted, returns, -math.inf).amax(1, keepdim=True)


def adapted_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, num_responses: int) -> float:
    """Next KL coefficient of a controller towards a target KL (arXiv 1909.08593, 2.2): c (1 + K e).

        e = clip((kl - target) / target, -0.2, 0.2),   K = num_responses / horizon

    Args:
        kl_coef: c, the present coefficient.
        kl: measured with it, in nats per token or per response, like the target.
        target: above 0.
        horizon: in responses; above num_responses / 5, or c could fall to 0 and stay there.
        num_responses: number of responses of the measurement.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_responses / horizon)


# An objective: ratio, log pi and advantages [N] -> terms of the loss [N], the ratio within its bounds [N],
# and where it is out of them [N] bool.
Objective = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def ppo(
    ratio: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped objective (arXiv 1707.06347, eq. 7).

        l_t = max(-A_t r_t, -A_t clip(r_t, 1 - clip, 1 + clip_high)),   for A_t < 0 at most -A_t dual_clip

    A higher upper bound is DAPO's (arXiv 2503.14476, 3.1); dual_clip, above 1, that of arXiv 1912.09729,
    eq. 5. By default clip_high is clip, and there is no dual_clip.
    """
    clamped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    unclipped_loss, clipped_loss = -advantages * ratio, -advantages * clamped
    terms, is_clipped = torch.maximum(unclipped_loss, clipped_loss), clipped_loss > unclipped_loss
    if dual_clip is not None:
        is_beyond = (advantages < 0) & (ratio > dual_clip)
        terms, is_clipped = torch.where(is_beyond, -advantages * dual_clip, terms), is_clipped | is_beyond
    return terms, clamped, is_clipped


def cispo(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, clip: float, clip_high: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """CISPO (arXiv 2506.13585, 3.1): REINFORCE with a bounded importance weight. No token loses its gradient.

    l_t = -sg(clip(r_t, 1 - clip, 1 + clip_high)) A_t log pi(t)
    """
    clamped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high)).detach()
    return -clamped * advantages * logprobs, clamped, clamped != ratio.detach()


def sapo(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, tau_positive: float, tau_negative: float
) -> tuple[Tensor, Tensor, Tensor]:
    """SAPO (arXiv 2511.20347): a soft gate in place of clipping. At r = 1 its gradient is that of PPO.

    l_t = -A_t sigmoid(tau (r_t - 1)) 4 / tau,   tau = tau_positive where A_t > 0, else tau_negative
    """
    tau = torch.full_like(advantages, tau_negative).masked_fill(advantages > 0, tau_positive)
    terms = -advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    return terms, ratio, torch.zeros_like(ratio, dtype=torch.bool)


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor, responses: Tensor | None = None) -> Tensor:
    """Ratio of the policy to the one that sampled, [N]: r_t = pi(t) / pi_old(t), or that of whole responses.

    With `responses`, [N] the number of each token's response, it is GSPO-token's (arXiv 2507.18071, eq. 13):
    the geometric mean of r over the response, with the gradient of the token's log pi. For advantages that
    are equal within a response it has GSPO's value and gradient.
    """
    log_ratio = logprobs - old_logprobs
    if responses is None:
        return log_ratio.exp()
    starts = responses[1:] != responses[:-1]
    index = F.pad(starts, (1, 0)).cumsum(0)  # numbers from 0, below N: without a wait for the GPU
    zeros = torch.zeros_like(log_ratio)
    sums = zeros.index_add(0, index, log_ratio.detach())
    counts = zeros.index_add(0, index, torch.ones_like(log_ratio))
    mean = sums[index] / counts[index]
    return mean.exp() * (logprobs - logprobs.detach()).exp()


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    objective: Objective,
    responses: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy's loss, L = sum_t w_t l_t, with the terms l of an objective.

    Args:
        logprobs: [N] log pi, in nats.
        old_logprobs: [N] log pi_old, of the policy that sampled the responses.
        advantages: [N] A.
        weights: [N] w, 0 where the token is not trained; the other arguments have no effect there.
        objective: `ppo`, `cispo` or `sapo` with their bounds.
        responses: [N] number of each token's response, for ratios of whole responses; see `importance_ratio`.

    Returns:
        The loss, a scalar, and sums over the trained tokens without gradients: ratio, ratio within its
        bounds, number of tokens that the bounds change, k3 of KL(pi_old || pi) in nats, and |r - 1|.
    """
    logprobs, old_logprobs, advantages = only_where(weights, logprobs, old_logprobs, advantages)
    ratio = importance_ratio(logprobs, old_logprobs, responses)
    terms, clamped, is_clipped = objective(ratio, logprobs, advantages)
    is_trained = (weights != 0).double()
    statistics = {
        "ppo_ratio": (ratio.detach() * is_trained).sum(),
        "ppo_ratio_clamped": (clamped.detach() * is_trained).sum(),
        "clip_fraction": (is_clipped * is_trained).sum(),
        "approx_kl": kl_k3(old_logprobs, logprobs.detach()).sum(),
        "ratio_error": (ratio.detach() - 1).abs().sum(),
    }
    return (weights * terms).sum(), statistics


def aggregation_weights(counted: Tensor, lengths: list[int], aggregate: str, max_length: int) -> Tensor:
    """Weights [N] of the tokens of an update, whose weighted sum by the number of counted tokens is the loss.

        token:     the mean over all counted tokens (DAPO, arXiv 2503.14476, 3.3): w = 1
        response:  the mean over responses of their tokens' means (GRPO, arXiv 2402.03300)
        constant:  the sum over tokens by max_length, mean over responses (Dr. GRPO, arXiv 2503.20783)

    Args:
        counted: [N] 1 for tokens that are trained, else 0; the same for all tokens of a response.
        lengths: tokens of each response.
        max_length: the largest number of tokens of a response, for "constant".
    """
    if aggregate == "token":
        return counted
    size = torch.tensor(lengths, dtype=counted.dtype)
    num_responses = (counted / per_token(size, lengths)).sum()
    divisor = per_token(size, lengths) if aggregate == "response" else torch.full_like(counted, max_length)
    return counted * (counted.sum() / num_responses.clamp(min=1)) / divisor


def only_where(mask: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Set [N] inputs to 0 where the mask is 0: their ratio is then 1 and their KL 0, with gradients of 0.

    Multiplied by 0, an infinite ratio would turn into NaN; selecting by the mask would wait for the GPU.
    """
    return [x.where(mask.bool(), 0.0) for x in inputs]


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The critic's squared error, with the clipping of PPO's first implementation (see arXiv 2005.12729).

        L = sum_t max((V_t - R_t)^2, (clip(V_t, V_old_t - c, V_old_t + c) - R_t)^2) / 2

    Args:
        values: [N] V.
        old_values: [N] V_old, of the critic at the time of the rollout.
        returns: [N] R.
        value_clip: c; 0 for the plain squared error.

    Returns:
        The loss, a scalar, and the number of tokens whose gradient is clipped.
    """
    clamped = values.clamp(old_values - value_clip, old_values + value_clip) if value_clip else values
    error, clamped_error = (values - returns).square(), (clamped - returns).square()
    statistics = {"value_clip_fraction": (clamped_error > error).double().sum()}
    return torch.maximum(error, clamped_error).sum() / 2, statistics


def per_token(x: Tensor, lengths: list[int]) -> Tensor:
    """[A] numbers of responses as [N] of their tokens."""
    return x.repeat_interleave(torch.tensor(lengths))
