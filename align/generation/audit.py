"""Audits of a rollout and its first update: sampler against trainer, advantages and loss against their sums.

Both have the same weights then, so the sampling log-prob of a token and its training log-prob must agree. A
mask or position off by one, stale weights, dropout, another temperature, a wrong cache: any difference stops
the run. All ranks have all responses, so they come to the same result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from align.errors import UserError
from align.flags import BOUND, above, check_ranges
from align.generation.rollout import Rollout, Sample
from align.generation.sampling import SamplingConfig

# Default bounds on differences of log-probs in nats: on their mean, and on a quantile of them. For
# SmolLM2-135M, whose logits reach 37, rounding alone makes the mean 4e-6 and the maximum 4e-5 in fp32. In
# bf16 23,274 tokens had a mean of 0.037, a 0.9999 quantile of 0.45 and a maximum of 0.51: the maximum grows
# with the number of tokens, the quantile does not.
BOUNDS = {torch.float32: (5e-5, 1e-3, 1.0), torch.bfloat16: (0.1, 2.0, 0.9999)}
# Rounding has no direction: over a rollout the signed differences average to nearly 0, so a share of the
# bound on the mean, and the standard errors of this average, bound them.
BIAS_SHARE, STANDARD_ERRORS = 0.2, 4.0
FALSE_ALARM = 1e-9  # probability that `check_surprise` stops a right rollout
RATIO_BOUND = 1e-5  # if two passes over the same micro-batches have the same bits
RATIO_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # else


@dataclass(frozen=True)
class AuditConfig:
    """Bounds of the audit; at a --temperature below 1, which enlarges rounding, they are divided by it."""

    audit_mean: float | None = None
    """bound on the mean |sampling log-prob - training log-prob| over the tokens of a rollout, in nats; the
    run stops beyond it; a fifth of it, and its standard errors, bound the signed mean (default: 5e-5 in fp32,
    0.1 in bf16; inf: no bound)"""
    audit_tail: float | None = None
    """bound on the --audit-quantile of these differences, in nats (default: 1e-3 in fp32, 2 in bf16)"""
    audit_quantile: float | None = None
    """quantile that --audit-tail bounds, from 0 to 1, the maximum (default: 1 in fp32, 0.9999 in bf16, where
    the maximum of the rounding errors grows with the number of tokens)"""

    def __post_init__(self):
        check_ranges(self, audit_mean=BOUND, audit_tail=BOUND, audit_quantile=above(0, 1))

    def bounds(self, dtype: torch.dtype) -> tuple[float, float, float]:
        """Bound on the mean, bound on the quantile, and the quantile, for weights of a precision."""
        flags = zip((self.audit_mean, self.audit_tail, self.audit_quantile), BOUNDS[dtype], strict=True)
        mean, tail, quantile = (default if flag is None else flag for flag, default in flags)
        return mean, tail, quantile


def check_whole_distribution(sampling: SamplingConfig) -> None:
    """Refuse flags that make the sampler's distribution another than the policy's at --temperature."""
    for name in ("top_k", "top_p", "min_p", "repetition_penalty", "greedy"):
        if getattr(sampling, name) != getattr(SamplingConfig, name):
            raise UserError(
                f"--{name.replace('_', '-')}: PPO's log-probs are those of the whole distribution at "
                "--temperature; tokens drawn from another one would be weighed wrongly"
            )


def compare(
    places: Sequence[tuple[int, int]],
    sampled: Sequence[np.ndarray],
    trained: Sequence[np.ndarray],
    dtype: torch.dtype,
    temperature: float = 1.0,
    config: AuditConfig = AuditConfig(),
) -> dict[str, float]:
    """Compare the sampling and the training log-probs of responses.

    Args:
        places: row and number of each response, for the message.
        sampled: [n] sampling log-probs of each response.
        trained: [n] log-probs of training's forward pass, with the weights of the sampler.
        dtype: of the weights.
        temperature: of both.

    Returns:
        Mean, quantile and maximum of |sampled - trained|, and the mean of sampled - trained, over all tokens,
        in nats.

    Raises:
        RuntimeError: a bound is exceeded; the message names the token with the largest difference.
    """
    for (row, number), logprobs, training_logprobs in zip(places, sampled, trained, strict=True):
        if len(logprobs) != len(training_logprobs):
            raise RuntimeError(
                f"audit: response {number} to row {row} was sampled with {len(logprobs)} tokens, training "
                f"has {len(training_logprobs)}"
            )
    differences = [a.astype(np.float64) - b for a, b in zip(sampled, trained, strict=True)]
    errors = [abs(difference) for difference in differences]
    all_errors = np.concatenate(errors)
    most_mean, most_tail, q = config.bounds(dtype)
    most_mean, most_tail = (bound / min(temperature, 1.0) for bound in (most_mean, most_tail))
    mean, tail, maximum = float(all_errors.mean()), quantile(all_errors, q), float(all_errors.max())
    if not (mean <= most_mean and tail <= most_tail):  # true for NaN too
        worst = int(np.argmax([error.max() for error in errors]))  # of NaN, the first
        token, (row, number) = int(errors[worst].argmax()), places[worst]
        name = "maximum" if q == 1 else f"{q:g} quantile"
        raise RuntimeError(
            f"audit: token {token} of response {number} to row {row} was sampled with log-prob "
            f"{sampled[worst][token]:.6f}, training computes {trained[worst][token]:.6f}. They differ by "
            f"{errors[worst][token]:.2g}. Of all {len(all_errors)} tokens the mean difference is {mean:.2g} "
            f"(--audit-mean {most_mean:.2g}), the {name} {tail:.2g} (--audit-tail {most_tail:.2g}): "
            "the sampler and the trainer do not compute the same model"
        )
    bias = check_bias([row for row, _ in places], differences, most_mean)
    return {
        "audit/logprob_error": mean,
        "audit/logprob_error_quantile": tail,
        "audit/logprob_error_max": maximum,
        "audit/logprob_bias": bias,
    }


def check_bias(rows: Sequence[int], differences: Sequence[np.ndarray], most_mean: float) -> float:
    """Mean of sampled - trained over all tokens; RuntimeError beyond a share of the bound on their size."""
    bias, standard_error = clustered_mean(rows, differences)
    most_bias = BIAS_SHARE * most_mean + STANDARD_ERRORS * standard_error
    if not abs(bias) <= most_bias:
        raise RuntimeError(
            f"audit: sampling log-probs are {bias:+.2g} nats off training's on average over "
            f"{sum(map(len, differences))} tokens, in one direction, which rounding has not (bound "
            f"{most_bias:.2g}, by --audit-mean {most_mean:.2g}): the sampler and the trainer do not compute "
            "the same model"
        )
    return bias


def clustered_mean(rows: Sequence[int], values: Sequence[np.ndarray]) -> tuple[float, float]:
    """Mean over all tokens, and its standard error if tokens of different rows are independent.

    Tokens of one row are not: responses to a prompt share its hidden states, and so its rounding.

    Args:
        rows: row of each response.
        values: [n] of each response.

    Returns:
        The standard error is infinite for a single row.
    """
    count, total = sum(map(len, values)), float(sum(value.sum() for value in values))
    mean = total / count
    sums: dict[int, float] = {}
    for row, value in zip(rows, values, strict=True):
        sums[row] = sums.get(row, 0.0) + float((value - mean).sum())
    if len(sums) == 1:
        return mean, math.inf
    variance = sum(x * x for x in sums.values()) * len(sums) / (len(sums) - 1)
    return mean, math.sqrt(variance) / count


def check_surprise(
    logprobs: np.ndarray,
    entropies: np.ndarray,
    vocab_size: int,
    dtype: torch.dtype,
    temperature: float = 1.0,
    config: AuditConfig = AuditConfig(),
) -> dict[str, float]:
    """Check that sampled tokens are as improbable as the policy's entropies predict.

    A token drawn from p has -log p(y) = H(p) on average, whatever was drawn before it. The differences of a
    rollout are bounded by Bernstein's inequality with their empirical variance (Maurer and Pontil 2009,
    theorem 4), at a probability of FALSE_ALARM, beside a share of --audit-mean for rounding.

    Args:
        logprobs, entropies: [N] of training's forward pass, in nats, for all tokens of a rollout.
        vocab_size: of the model.

    Returns:
        The mean of -log p(y) - H(p).

    Raises:
        RuntimeError: beyond the bound: tokens come from another distribution than their log-probs say.
    """
    count = len(logprobs)
    differences = -logprobs - entropies
    mean, variance = float(differences.mean()), float(np.square(differences).mean())
    log_inverse = math.log(2 / FALSE_ALARM)
    largest = math.log(vocab_size) + log_inverse  # a less probable token is drawn less often than FALSE_ALARM
    sampling_error = math.sqrt(2 * variance * log_inverse / count) + 7 * largest * log_inverse / (3 * count)
    rounding = BIAS_SHARE * config.bounds(dtype)[0] / min(temperature, 1.0)
    if not abs(mean) <= rounding + sampling_error:
        raise RuntimeError(
            f"audit: sampled tokens have -log p of {mean:+.2g} nats beside the entropy of their "
            f"distributions, on average over {count} (bound {rounding + sampling_error:.2g}): the sampler "
            "draws from another distribution than its log-probs are of"
        )
    return {"audit/surprise": mean}


def check_sampler(
    rollout: Rollout,
    logprobs: Sequence[Tensor],
    entropies: Tensor,
    vocab_size: int,
    dtype: torch.dtype,
    temperature: float,
    config: AuditConfig,
) -> dict[str, float]:
    """`compare` and `check_surprise` for a rollout.

    Args:
        logprobs: of training's forward pass, [n] of each response.
        entropies: [N] of it, for all tokens.
    """
    trained = [part.numpy() for part in logprobs]
    sampled = [sample.logprobs for sample in rollout.responses]
    metrics = compare(rollout.places, sampled, trained, dtype, temperature, config)
    drawn = np.concatenate(trained), entropies.numpy()
    return metrics | check_surprise(*drawn, vocab_size, dtype, temperature, config)


def check_first_update(
    update: dict[str, float], terms: Tensor, count: float, bound: float
) -> dict[str, float]:
    """`check_ratio` and `check_update` for the metrics of a policy's first update."""
    metrics = check_ratio(update["ratio_error"], bound)
    return metrics | check_update(update["loss"], terms, count, bound, update["ppo_ratio"])


def first_terms(
    objective: str, advantages: Tensor, old_logprobs: Tensor, tau_positive: float, tau_negative: float
) -> Tensor:
    """[N] terms of an objective of train_grpo.py at a ratio of 1, without its function in losses/rl.py."""
    if objective == "cispo":
        return -advantages * old_logprobs
    if objective == "sapo":  # 4 / tau sigmoid(0)
        tau = torch.full_like(advantages, tau_negative).masked_fill(advantages > 0, tau_positive)
        return -2 * advantages / tau
    return -advantages


def check_update(
    loss: float, terms: Tensor, count: float, bound: float, mean_ratio: float = 1.0
) -> dict[str, float]:
    """Check the loss of a rollout's first update, where the policy is still pi_old.

    Args:
        loss: of that update, from the engine.
        terms: [n] the loss of each token of its minibatch at a ratio of 1, computed before they are packed.
        count: number of trained tokens of the minibatch.
        bound: on the difference, as a share of mean |terms|, and on mean_ratio - 1.
        mean_ratio: of the policy, from the engine as well: the mean of pi / pi_old.

    Raises:
        RuntimeError: beyond the bound: a term has another sign or denominator, or tokens of another rollout.
    """
    expected, size = float(terms.sum()) / count, float(terms.abs().sum()) / count
    error = max(abs(loss - expected) / (size or 1.0), abs(mean_ratio - 1))
    error = math.nan if math.isnan(loss) else error
    if not error <= bound:
        raise RuntimeError(
            f"audit: the first update of a rollout has the loss {loss:.6g}, its advantages and KL give "
            f"{expected:.6g} for a ratio of 1, which is {mean_ratio:.6g} (--audit-ratio {bound:.2g}): "
            "a term has another sign, denominator or order of tokens"
        )
    return {"audit/loss_error": error}


def check_groups(places: Sequence[tuple[int, int]], advantages: Tensor, counted: Tensor) -> None:
    """Raise RuntimeError unless advantages relative to a prompt's responses add up to 0 for each prompt.

    Args:
        places: row and number of each response.
        advantages, counted: [A]; those not counted are left out.
    """
    sums: dict[int, tuple[float, float]] = {}
    for (row, _), value in zip(places, torch.where(counted, advantages, 0.0).tolist(), strict=True):
        total, size = sums.get(row, (0.0, 0.0))
        sums[row] = total + value, size + abs(value)
    for row, (total, size) in sums.items():
        if not abs(total) <= 1e-6 * size:  # rounding of large rewards that differ little
            raise RuntimeError(
                f"audit: the advantages of the responses to row {row} add up to {total:.2g}, not to 0: they "
                "were compared with responses to another prompt, or with some that are left out"
            )


def quantile(values: np.ndarray, q: float) -> float:
    """The smallest value with at least a share q of the values at or below it; NaN if one is NaN.

    Of fewer than 1 / (1 - q) values it is the maximum.
    """
    return float(np.quantile(values, q, method="inverted_cdf"))


def check_ends(
    places: Sequence[tuple[int, int]], responses: Sequence[Sample], stop_ids: set[int], stop: tuple[str, ...]
) -> None:
    """Raise RuntimeError if a response that is not truncated lacks its stop token.

    Training on such responses never teaches the model to end. With stop strings a response may end without a
    stop token.
    """
    for (row, number), sample in zip(places, responses, strict=True):
        if sample.finish == "stop" and not stop and int(sample.ids[-1]) not in stop_ids:
            raise RuntimeError(
                f"audit: response {number} to row {row} ended, but its last token {sample.ids[-1]} is none "
                "that ends a response: the stop token was lost"
            )


def ratio_bound(flag: float | None, dtype: torch.dtype, is_exact: bool) -> float:
    """--audit-ratio or its default; `is_exact`: two passes over the same micro-batches have the same bits."""
    if flag is not None:
        return flag
    return RATIO_BOUND if is_exact else RATIO_BOUNDS[dtype]


def check_ratio(error: float, bound: float) -> dict[str, float]:
    """Check that PPO's ratio is 1 at the first update of a rollout, before the policy changes.

    Args:
        error: mean over its tokens of |pi / pi_old - 1|.

    Raises:
        RuntimeError: it is above the bound.
    """
    if not error <= bound:
        raise RuntimeError(
            f"audit: at the first update of a rollout the policy's ratio is off 1 by {error:.2g} on average "
            f"(--audit-ratio {bound:.2g}): training and the pass for the old log-probs compute different "
            "numbers. On GPUs try --deterministic"
        )
    return {"audit/ratio_error": error}
