"""The losses, as pure functions of tensors. No model, no configuration, no process group.

Index t of `logprobs` and `mask` means the prediction of `targets[t]`; a batch is packed, so tensors are [T],
several sequences end to end. `sft_loss` is a sum over tokens and `regression` one over attributes: the script
divides by the denominator of the whole step. Preference losses and `ranking` return one value per pair, [P],
and the script takes the mean over the pairs of the whole step.

A preference loss is `name(chosen, rejected, ref_chosen, ref_rejected, beta, ...)`. Its first four arguments
are [P] log-probabilities of the responses in nats, of the policy (log pi) and of the reference (log pi_ref);
`beta` is the strength of the pull towards the reference; its own parameters follow, and their defaults live
only here.
In the docstrings w is the chosen and l the rejected response, s the logistic function, and

    r_w = log pi(w) - log pi_ref(w),   r_l = log pi(l) - log pi_ref(l),   h = r_w - r_l

In the section PPO the answers of a rollout lie end to end: [N] response tokens, `lengths[i]` of them (1 or
more) of answer i. [A] is one number per answer, [P, G] the same by prompt. The two losses are sums over
tokens. Dtypes are the inputs'; callers give float64 for all that is made of a rollout.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

MISSING = -100.0  # the label of an attribute that nobody rated


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


def sequence_logprobs(logprobs: Tensor, mask: Tensor, lengths: list[int], average: bool = False) -> Tensor:
    """The log-probability of each sequence's trained tokens, summed in float64.

        log pi(y) = sum_t mask_t log p(targets_t),   or that sum / sum_t mask_t

    A preference is the small difference of two large sums, and float32 would lose it.

    Args:
        logprobs: [T] log-probabilities of the targets, in nats.
        mask: [T] 1 where the target is trained, else 0.
        lengths: [N] places of each sequence, 0 allowed. T may exceed their sum: the rest is padding.
        average: the mean over the trained tokens in place of the sum.

    Returns:
        [N] float64, in nats (per token if `average`). A sequence without trained tokens gives 0.
    """
    pieces = [*lengths, len(mask) - sum(lengths)]  # the padding is one more piece, so that N = 0 works too
    sums = torch.stack([piece.sum() for piece in (logprobs.double() * mask).split(pieces)])[:-1]
    if not average:
        return sums
    counts = torch.stack([piece.sum() for piece in mask.double().split(pieces)])[:-1]
    return sums / counts.clamp(min=1)


# Preference losses


def dpo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7): L = -log s(beta h)."""
    return -F.logsigmoid(beta * _gap(chosen, rejected, ref_chosen, ref_rejected))


def cdpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Conservative DPO (Mitchell, ericmitchell.ai/cdpo.pdf): L = -(1 - e) log s(beta h) - e log s(-beta h).

    e = `label_smoothing`, the probability that a label is the wrong way round, in [0, 0.5) (else ValueError).
    """
    check_label_smoothing(label_smoothing, zero_allowed=True)
    x = beta * _gap(chosen, rejected, ref_chosen, ref_rejected)
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def robust(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Robust DPO (arXiv 2403.00409): L = [-(1 - e) log s(beta h) + e log s(-beta h)] / (1 - 2 e).

    Its mean over labels that are wrong with probability e = `label_smoothing` is DPO's loss on right ones.
    e lies in [0, 0.5), else ValueError. The loss has no lower bound.
    """
    check_label_smoothing(label_smoothing, zero_allowed=True)
    x = beta * _gap(chosen, rejected, ref_chosen, ref_rejected)
    loss = -(1 - label_smoothing) * F.logsigmoid(x) + label_smoothing * F.logsigmoid(-x)
    return loss / (1 - 2 * label_smoothing)


def ipo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17): L = (h - 1 / (2 beta))^2, with beta for the paper's tau."""
    return (_gap(chosen, rejected, ref_chosen, ref_rejected) - 1 / (2 * beta)).square()


def hinge(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """Hinge (SLiC-HF, arXiv 2305.10425; on log-ratios in RSO, arXiv 2309.06657): L = max(0, 1 - beta h)."""
    return torch.relu(1 - beta * _gap(chosen, rejected, ref_chosen, ref_rejected))


def scale(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    reward_gap: Tensor,
) -> Tensor:
    """DPO weighted by the gap of rewards: L = -|g| log s(beta h).

    DPO's form of the scaled Bradley-Terry loss of HelpSteer2-Preference (arXiv 2410.01257).
    g = `reward_gap`: [P] eta (R_w - R_l).
    """
    return reward_gap.abs() * dpo(chosen, rejected, ref_chosen, ref_rejected, beta)


def rpo_bwd_kl(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    reward_gap: Tensor,
) -> Tensor:
    """RPO (Nemotron-4 340B, arXiv 2406.11704; arXiv 2502.00203): L = KL(Bern(s(g)) || Bern(s(beta h))).

    g = `reward_gap`: [P] eta (R_w - R_l).
    """
    return _bernoulli_kl(reward_gap, beta * _gap(chosen, rejected, ref_chosen, ref_rejected))


def rpo_fwd_kl(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    reward_gap: Tensor,
) -> Tensor:
    """RPO with the roles swapped (arXiv 2502.00203): L = KL(Bern(s(beta h)) || Bern(s(g))).

    g = `reward_gap`: [P] eta (R_w - R_l).
    """
    return _bernoulli_kl(beta * _gap(chosen, rejected, ref_chosen, ref_rejected), reward_gap)


def rpo_sq(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    reward_gap: Tensor,
) -> Tensor:
    """RPO with the squared distance (arXiv 2502.00203): L = (beta h - g)^2.

    g = `reward_gap`: [P] eta (R_w - R_l).
    """
    return (beta * _gap(chosen, rejected, ref_chosen, ref_rejected) - reward_gap).square()


def kto_pair(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    kl_chosen: Tensor,
    kl_rejected: Tensor,
) -> Tensor:
    """KTO on pairs (arXiv 2402.01306): L = [1 - s(beta (r_w - z_l))] / 2 + [1 - s(beta (z_w - r_l))] / 2.

    z_w = `kl_chosen`, z_l = `kl_rejected`: scalars, max(0, mean of r_w) and max(0, mean of r_l) over the
    whole step, detached. Each response is judged against the z of the other kind. Half of the sum, so that
    the mean over P pairs is the mean over 2 P responses.
    """
    of_chosen = torch.sigmoid(beta * (kl_rejected - (chosen - ref_chosen)))  # 1 - s(x) = s(-x)
    of_rejected = torch.sigmoid(beta * ((rejected - ref_rejected) - kl_chosen))
    return (of_chosen + of_rejected) / 2


def simpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    beta: float,
    simpo_gamma: float = 0.5,
) -> Tensor:
    """SimPO (arXiv 2405.14734): L = -log s(beta (log pi(w) - log pi(l)) - gamma).

    `chosen` and `rejected` are averages per token. The reference tensors are ignored and may be None.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - simpo_gamma)


def orpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    beta: float,
) -> Tensor:
    """The odds-ratio term of ORPO (arXiv 2403.07691, eq. 7): L = -beta log s(log odds(w) - log odds(l)).

        odds(y) = pi(y) / (1 - pi(y))

    beta is the paper's lambda; the paper's SFT term is the script's. `chosen` and `rejected` are averages per
    token. The reference tensors are ignored and may be None.
    """
    return -beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def dpop(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    dpop_lambda: float = 50.0,
) -> Tensor:
    """DPO-Positive (Smaug, arXiv 2402.13228): L = -log s(beta (h - lambda max(0, -r_w))).

    The penalty keeps the chosen response at least as probable as under the reference.
    """
    fall = torch.relu(ref_chosen - chosen)
    return -F.logsigmoid(beta * (_gap(chosen, rejected, ref_chosen, ref_rejected) - dpop_lambda * fall))


def apo_zero(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7): L = 1 - s(beta r_w) + s(beta r_l)."""
    return torch.sigmoid(beta * (ref_chosen - chosen)) + torch.sigmoid(beta * (rejected - ref_rejected))


def sppo_hard(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """SPPO (arXiv 2405.00675) with win rates 1 and 0: L = (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2.

    beta is 1 / eta of the paper.
    """
    half = 1 / (2 * beta)
    return (chosen - ref_chosen - half).square() + (rejected - ref_rejected + half).square()


def exo_pair(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.001,
) -> Tensor:
    """EXO on pairs (arXiv 2402.00856, eq. 16): L = KL(Bern(s(beta h)) || Bern(1 - e)).

    e = `label_smoothing`, in (0, 0.5) (else ValueError): at e = 0 the divergence is infinite.
    """
    check_label_smoothing(label_smoothing, zero_allowed=False)
    x = beta * _gap(chosen, rejected, ref_chosen, ref_rejected)
    target = math.log1p(-label_smoothing) - math.log(label_smoothing)  # s(target) = 1 - e
    return _bernoulli_kl(x, torch.full_like(x, target))


def nca_pair(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """NCA on pairs (arXiv 2402.05369): L = -log s(beta r_w) - [log s(-beta r_w) + log s(-beta r_l)] / 2."""
    r_w, r_l = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return -F.logsigmoid(r_w) - 0.5 * F.logsigmoid(-r_w) - 0.5 * F.logsigmoid(-r_l)


def _gap(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """h [P] = log-ratio of the chosen minus that of the rejected response. Exactly 0 at the reference."""
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def _bernoulli_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(Bern(s(p)) || Bern(s(q))) [P] of logits p, q: s(p) log[s(p) / s(q)] + s(-p) log[s(-p) / s(-q)]."""
    agree = torch.sigmoid(p) * (F.logsigmoid(p) - F.logsigmoid(q))
    return agree + torch.sigmoid(-p) * (F.logsigmoid(-p) - F.logsigmoid(-q))


def _log_odds(logprob: Tensor) -> Tensor:
    """x - log(1 - exp(x)) [P] for x <= 0: the log of the odds p / (1 - p), p = exp(x).

    1 - exp(x) is -expm1(x), accurate near 0; far below, where it rounds to 1, its log is 0 to the precision
    of x. A probability of 1 has infinite odds: x = 0 counts as the number next to it, with gradient 0,
    because one response that the model is sure of must not turn the step into NaN.
    """
    x = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    return x - torch.log(-torch.expm1(x))


def check_label_smoothing(value: float, zero_allowed: bool) -> None:
    """Raise ValueError unless `value` can be the probability of a wrong label."""
    if not (0 <= value < 0.5 and (zero_allowed or value > 0)):
        bracket = "[" if zero_allowed else "("
        raise ValueError(
            f"--label-smoothing {value}: must be in {bracket}0, 0.5), a wrong label's probability"
        )


# Reward model


def ranking(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """Bradley-Terry with a margin (arXiv 2203.02155, 3.5; margin: 2307.09288, eq. 2).

        L = -log s(R(w) - R(l) - m)

    Args:
        chosen: [P] rewards of the chosen responses.
        rejected: [P] rewards of the rejected responses.
        margin: [P] by how much the chosen one should win; 0 where the data has none.

    Returns:
        [P], in nats.
    """
    return -F.logsigmoid(chosen - rejected - margin)


def centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Centering of rewards (Eisenstein et al., arXiv 2312.09244, eq. 2): L = (R(w) + R(l))^2.

    The ranking loss sees differences only; weighted and added to it, this draws the rewards' mean to 0.

    Args:
        chosen: [P] rewards of the chosen responses.
        rejected: [P] rewards of the rejected responses.

    Returns:
        [P].
    """
    return (chosen + rejected).square()


def regression(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error over the attributes that were rated (SteerLM, arXiv 2310.05344).

        L = sum_na present_na (score_na - label_na)^2,   present_na = 1 where label_na is not MISSING

    Args:
        scores: [N, A] the model's values.
        labels: [N, A] ratings, MISSING where there is none.

    Returns:
        The sum of squared errors, a scalar, and the number of present attributes, an int64 scalar.
    """
    present = labels != MISSING
    errors = torch.where(present, scores - labels, 0.0)
    return errors.square().sum(), present.sum()


# What is logged of pairs


def pair_statistics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Sums over P pairs of what is logged of their rewards; divided by P they are what their names say.

    Args:
        chosen: [P] rewards of the chosen responses.
        rejected: [P] rewards of the rejected responses.

    Returns:
        "acc" (chosen above rejected; a tie is a mistake), means of rewards and of their difference, and the
        mean square of all rewards.
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
    """Sums over P pairs of log-probs [P]: pair_statistics of the rewards beta (log pi - log pi_ref).

    And the means of the policy's log-probs, and "logratio_abs_mean": how far a response's log-prob is from
    the reference's, in nats.
    """
    ratio_chosen, ratio_rejected = chosen - ref_chosen, rejected - ref_rejected
    return {
        **pair_statistics(beta * ratio_chosen, beta * ratio_rejected),
        "logprobs_chosen_mean": chosen.sum(),
        "logprobs_rejected_mean": rejected.sum(),
        "logratio_abs_mean": (ratio_chosen.abs() + ratio_rejected.abs()).sum() / 2,
    }


# PPO


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(pi || pi_ref) from a sample of pi (joschu.net/blog/kl-approx.html): d = log pi - log pi_ref.

    All four take [N] log-probs in nats and return [N]. k1 is unbiased. Its gradient averages to 0: no loss.
    """
    return logprobs - ref_logprobs


def kl_abs(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """|d|: no estimate of KL, but a penalty on any change of a token's log-probability."""
    return (logprobs - ref_logprobs).abs()


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d^2 / 2: never negative, less noisy than k1, biased; in a loss it has the gradient of the KL."""
    return (logprobs - ref_logprobs).square() / 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d: never negative and unbiased; what GRPO (arXiv 2402.03300) has in its loss."""
    d = logprobs - ref_logprobs
    return torch.expm1(-d) + d  # exp(-d) - 1 would lose all digits of a small d


def token_rewards(scores: Tensor, kl: Tensor, lengths: list[int], kl_coef: float) -> Tensor:
    """The reward of each token (arXiv 2203.02155, 3.5): R_t = -c kl_t, plus the score at an answer's end.

    Args:
        scores: [A] one per answer, given at its last token.
        kl: [N] an estimate of KL(pi || pi_ref), in nats.
        lengths: tokens of each answer.
        kl_coef: c, in units of the score per nat.

    Returns:
        [N].
    """
    rewards = -kl_coef * kl
    rewards[torch.tensor(lengths, device=kl.device).cumsum(0) - 1] += scores
    return rewards


def gae(
    rewards: Tensor, values: Tensor, lengths: list[int], gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16), on each answer for itself.

        A_t = sum_l (gamma lambda)^l D_{t+l},   D_t = R_t + gamma V_{t+1} - V_t

    V after an answer's last token is 0. The reward to go, sum_l gamma^l R_{t+l}, is this with values 0 and
    lambda 1; whitened, it is the advantage of REINFORCE++ (arXiv 2501.03262).

    Args:
        rewards: [N] R.
        values: [N] V, the critic's prediction before the token is drawn.
        lengths: tokens of each answer; one answer or more.
        gamma: the discount per token.
        gae_lambda: lambda, 0 for the error D alone, 1 for the whole answer.

    Returns:
        Advantages [N] and returns [N] = A + V, what the critic should have predicted.
    """
    now, value = (pad_sequence(x.split(lengths), batch_first=True) for x in (rewards, values))
    errors = now + gamma * F.pad(value, (0, 1))[:, 1:] - value  # [A, longest], 0 in the padding
    advantages = torch.zeros_like(errors)
    later = torch.zeros_like(errors[:, 0])
    for t in reversed(range(max(lengths))):
        later = advantages[:, t] = errors[:, t] + gamma * gae_lambda * later
    inside = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    unpadded = advantages[inside.to(advantages.device)]
    return unpadded, unpadded + values


def whiten(x: Tensor) -> Tensor:
    """[N] shifted and scaled to mean 0 and variance 1: (x - mean) / sqrt(var + 1e-8), var divided by N.

    Exactly 0 where all are equal: the rounding of their mean would be scaled up with them.
    """
    if (x == x[0]).all():
        return torch.zeros_like(x)
    return (x - x.mean()) * torch.rsqrt(x.var(correction=0) + 1e-8)


def rloo(returns: Tensor, counted: Tensor) -> Tensor:
    """REINFORCE leave-one-out (arXiv 2402.14740): A_i = R_i - mean of the other counted R_j of the prompt.

    The divisor is (number counted - 1) for an answer not counted, too: train nothing on its advantage.

    Args:
        returns: [P, G] R of G answers to each prompt.
        counted: [P, G] bool, False for an answer left out, one cut off for instance.

    Returns:
        [P, G] advantages, exactly 0 for a prompt whose counted R are all equal, or fewer than 2.
    """
    number = counted.sum(1, keepdim=True)
    own = torch.where(counted, returns, 0.0)
    baseline = (own.sum(1, keepdim=True) - own) / (number - 1).clamp(min=1)
    return torch.where(has_spread(returns, counted), returns - baseline, 0.0)


def grpo(returns: Tensor, counted: Tensor) -> Tensor:
    """GRPO (arXiv 2402.03300, 4.1.2): A_i = (R_i - mean) / (std + 1e-4) over the counted R of the prompt.

    The paper leaves the std open; here its divisor is (number counted - 1).

    Args:
        returns: [P, G] R of G answers to each prompt.
        counted: [P, G] bool, False for an answer left out.

    Returns:
        [P, G] advantages, exactly 0 where not counted, and for a prompt whose counted R are all equal, or
        fewer than 2.
    """
    number = counted.sum(1, keepdim=True)
    mean = torch.where(counted, returns, 0.0).sum(1, keepdim=True) / number.clamp(min=1)
    deviations = torch.where(counted & has_spread(returns, counted), returns - mean, 0.0)
    variance = deviations.square().sum(1, keepdim=True) / (number - 1).clamp(min=1)
    return deviations / (variance.sqrt() + 1e-4)


def has_spread(returns: Tensor, counted: Tensor) -> Tensor:
    """[P, 1] bool, True for a prompt of which two counted returns differ; both arguments [P, G].

    Of equal returns the mean may be one rounding away, and Adam makes a full step of any gradient.
    """
    low = torch.where(counted, returns, math.inf).amin(1, keepdim=True)
    return low < torch.where(counted, returns, -math.inf).amax(1, keepdim=True)


def adapted_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, num_answers: int) -> float:
    """The next coefficient, so that the KL comes near its target (arXiv 1909.08593, 2.2): c (1 + K e).

        e = clip((kl - target) / target, -0.2, 0.2),   K = num_answers / horizon

    Args:
        kl_coef: c, the present coefficient.
        kl: the KL that was seen with it, in nats, per token or per answer, as the target.
        target: the KL wanted, above 0.
        horizon: in answers; above num_answers / 5, or c could fall to 0 and stay there.
        num_answers: how many answers `kl` was measured on.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_answers / horizon)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped objective (arXiv 1707.06347, eq. 7), as a loss.

        L = sum_t mask_t max(-A_t r_t, -A_t clip(r_t, 1 - clip, 1 + clip)),   r_t = pi(t) / pi_old(t)

    Args:
        logprobs: [N] log pi, in nats.
        old_logprobs: [N] log pi_old, of the policy that drew the answers.
        advantages: [N] A.
        mask: [N] 1 where the token is trained, else 0: what stands there is not even looked at.
        clip: how far the ratio may gain from leaving 1.

    Returns:
        The loss, a scalar, and sums over the mask without gradients: the ratio, the clipped one, where the
        clip cuts off the gradient, k3 of KL(pi_old || pi) in nats, and |r - 1|.
    """
    trained = mask.bool()  # selected, not multiplied by 0, which would turn an infinite ratio into NaN
    logprobs, old_logprobs, advantages = logprobs[trained], old_logprobs[trained], advantages[trained]
    ratio = (logprobs - old_logprobs).exp()
    clamped = ratio.clamp(1 - clip, 1 + clip)
    unclipped_loss, clipped_loss = -advantages * ratio, -advantages * clamped
    statistics = {
        "ppo_ratio": ratio.detach().sum(),
        "ppo_ratio_clamped": clamped.detach().sum(),
        "clip_fraction": (clipped_loss > unclipped_loss).double().sum(),
        "approx_kl": kl_k3(old_logprobs, logprobs.detach()).sum(),
        "ratio_error": (ratio.detach() - 1).abs().sum(),
    }
    return torch.maximum(unclipped_loss, clipped_loss).sum(), statistics


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
        The loss, a scalar, and the number of tokens where the clip cuts off the gradient.
    """
    clamped = values.clamp(old_values - value_clip, old_values + value_clip) if value_clip else values
    error, clamped_error = (values - returns).square(), (clamped - returns).square()
    statistics = {"value_clip_fraction": (clamped_error > error).double().sum()}
    return torch.maximum(error, clamped_error).sum() / 2, statistics


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(R - V) / Var(R) of values V and returns R, both [N]: 1 is perfect, a constant V gives 0.

    0 where all returns are equal, whose computed variance need not be 0.
    """
    if (returns == returns[0]).all():
        return 0.0
    return (1 - (returns - values).var(correction=0) / returns.var(correction=0)).item()
