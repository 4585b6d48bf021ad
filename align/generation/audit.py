"""Audit of the sampler against the trainer, after every rollout and before its first update.

Both have the same weights then, so the sampling log-prob of a token and its training log-prob must agree. A
mask or position off by one, stale weights, dropout, another temperature, a wrong cache: any difference stops
the run. All ranks have all responses, so they come to the same result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from align.errors import UserError
from align.flags import BOUND, above, check_ranges
from align.generation.rollout import Sample
from align.generation.sampling import SamplingConfig

# Default bounds on differences of log-probs in nats: on their mean, and on a quantile of them. For
# SmolLM2-135M, whose logits reach 37, rounding alone makes the mean 4e-6 and the maximum 4e-5 in fp32. In
# bf16 23,274 tokens had a mean of 0.037, a 0.9999 quantile of 0.45 and a maximum of 0.51: the maximum grows
# with the number of tokens, the quantile does not.
BOUNDS = {torch.float32: (5e-5, 1e-3, 1.0), torch.bfloat16: (0.1, 2.0, 0.9999)}
RATIO_BOUND = 1e-5  # if two passes over the same micro-batches have the same bits
RATIO_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # else


@dataclass(frozen=True)
class AuditConfig:
    """Bounds of the audit; at a --temperature below 1, which enlarges rounding, they are divided by it."""

    audit_mean: float | None = None
    """bound on the mean |sampling log-prob - training log-prob| over the tokens of a rollout, in nats; the
    run stops beyond it (default: 5e-5 in fp32, 0.1 in bf16; inf: no bound)"""
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
        Mean, quantile and maximum of |sampled - trained| over all tokens, in nats.

    Raises:
        RuntimeError: a bound is exceeded; the message names the token with the largest difference.
    """
    for (row, number), logprobs, training_logprobs in zip(places, sampled, trained, strict=True):
        if len(logprobs) != len(training_logprobs):
            raise RuntimeError(
                f"audit: response {number} to row {row} was sampled with {len(logprobs)} tokens, training "
                f"has {len(training_logprobs)}"
            )
    errors = [abs(a.astype(np.float64) - b) for a, b in zip(sampled, trained, strict=True)]
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
    return {
        "audit/logprob_error": mean,
        "audit/logprob_error_quantile": tail,
        "audit/logprob_error_max": maximum,
    }


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
