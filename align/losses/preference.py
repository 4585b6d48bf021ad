"""Preference losses: DPO and 16 variants, as pure functions of tensors.

A loss is `name(chosen, rejected, ref_chosen, ref_rejected, beta, ...)` and returns one value per pair, [P];
the script takes the mean over the pairs of the whole step. The first four arguments are [P] log-probabilities
of the responses in nats, of the policy (log pi) and of the reference (log pi_ref); `beta` is the strength of
the penalty on leaving the reference; the loss's own parameters follow, with their defaults here only.
In the docstrings w is the chosen and l the rejected response, s the logistic function, and

    r_w = log pi(w) - log pi_ref(w),   r_l = log pi(l) - log pi_ref(l),   h = r_w - r_l

`gap` [P] is g = eta (R_w - R_l), R the rewards; `label_smoothing` is e, the probability of a flipped label.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from align.errors import UserError


def sequence_logprobs(logprobs: Tensor, mask: Tensor, lengths: list[int], average: bool = False) -> Tensor:
    """Log-probability of each sequence's trained tokens, summed in float64.

        log pi(y) = sum_t mask_t log p(targets_t),   or that sum / sum_t mask_t

    A preference is the small difference of two large sums, and float32 would lose it.

    Args:
        logprobs: [T] log-probabilities of the targets, in nats.
        mask: [T] 1 where the target is trained, else 0.
        lengths: [N] places of each sequence, 0 allowed. T may exceed their sum: the rest is padding.
        average: take the mean over the trained tokens, not the sum.

    Returns:
        [N] float64, in nats (per token if `average`). A sequence without trained tokens gives 0.
    """
    pieces = [*lengths, len(mask) - sum(lengths)]  # the padding is one more piece, so that N = 0 works too
    sums = torch.stack([piece.sum() for piece in (logprobs.double() * mask).split(pieces)])[:-1]
    if not average:
        return sums
    counts = torch.stack([piece.sum() for piece in mask.double().split(pieces)])[:-1]
    return sums / counts.clamp(min=1)


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

    e lies in [0, 0.5), else UserError.
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

    Its expectation over flipped labels is DPO's loss on right labels. The loss has no lower bound.
    e lies in [0, 0.5), else UserError.
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
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float, gap: Tensor
) -> Tensor:
    """DPO weighted by the gap of rewards: L = -|g| log s(beta h).

    DPO's form of the scaled Bradley-Terry loss of HelpSteer2-Preference (arXiv 2410.01257).
    """
    return gap.abs() * dpo(chosen, rejected, ref_chosen, ref_rejected, beta)


def rpo_bwd_kl(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float, gap: Tensor
) -> Tensor:
    """RPO (Nemotron-4 340B, arXiv 2406.11704; arXiv 2502.00203): L = KL(Bern(s(g)) || Bern(s(beta h)))."""
    return _bernoulli_kl(gap, beta * _gap(chosen, rejected, ref_chosen, ref_rejected))


def rpo_fwd_kl(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float, gap: Tensor
) -> Tensor:
    """RPO with the roles swapped (arXiv 2502.00203): L = KL(Bern(s(beta h)) || Bern(s(g)))."""
    return _bernoulli_kl(beta * _gap(chosen, rejected, ref_chosen, ref_rejected), gap)


def rpo_sq(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float, gap: Tensor
) -> Tensor:
    """RPO with the squared distance (arXiv 2502.00203): L = (beta h - g)^2."""
    return (beta * _gap(chosen, rejected, ref_chosen, ref_rejected) - gap).square()


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
    whole step, detached. Each response is compared with the z of the other kind. Half of the sum, so that the
    mean over P pairs is the mean over 2 P responses.
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
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | None, ref_rejected: Tensor | None, beta: float
) -> Tensor:
    """The odds-ratio term of ORPO (arXiv 2403.07691, eq. 7): L = -beta log s(log odds(w) - log odds(l)).

        odds(y) = pi(y) / (1 - pi(y))

    beta is the paper's lambda; the script adds the paper's SFT term. `chosen` and `rejected` are averages per
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

    e lies in (0, 0.5), else UserError: at e = 0 the divergence is infinite.
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
    of x. A probability of 1 has infinite odds: x = 0 is replaced by the next number below, with gradient 0,
    so that a response of probability 1 does not turn the step into NaN.
    """
    x = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    return x - torch.log(-torch.expm1(x))


def check_label_smoothing(value: float, zero_allowed: bool) -> None:
    """Raise UserError unless `value` can be the probability of a wrong label."""
    if not (0 <= value < 0.5 and (zero_allowed or value > 0)):
        bracket = "[" if zero_allowed else "("
        raise UserError(
            f"--label-smoothing {value}: must be in {bracket}0, 0.5), a wrong label's probability"
        )
