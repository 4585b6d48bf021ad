"""Are the sampler and the trainer the same model? Asked after every rollout, before its first update.

Both have the same weights then, so the log-prob that a token was sampled with and the one that training
computes of it must agree. A mask or position that is off by one, stale weights, dropout, another temperature,
a wrong cache: whatever makes the two differ shows here, and stops the run. All ranks know all answers, so
each of them comes to the same verdict.
"""

from collections.abc import Sequence

import numpy as np
import torch

from align.generate import Sample

# Most that the log-probs may differ by, in nats: on average, and at one token. For SmolLM2-135M, whose logits
# reach 37, rounding alone makes it 4e-6 and 4e-5 in fp32, and 0.03 and 0.3 in bf16.
BOUND = {torch.float32: (5e-5, 1e-3), torch.bfloat16: (0.1, 2.0)}
RATIO_BOUND = 1e-5  # same weights, same micro-batches: on one machine the two passes have the same bits


def compare(
    places: Sequence[tuple[int, int]],
    sampled: Sequence[np.ndarray],
    trained: Sequence[np.ndarray],
    dtype: torch.dtype,
    temperature: float = 1.0,
) -> dict[str, float]:
    """How much sampled and trained log-probs of answers differ, on average and at most, in nats.

    Args:
        places: of each answer its row of the data and its number, for the message.
        sampled: of each answer [n], what the sampler said.
        trained: of each answer [n], what training's forward pass says, with the weights of the sampler.
        dtype: of the weights.
        temperature: that of both; below 1 it makes rounding larger, and the bound with it.

    Raises:
        RuntimeError: they differ by more than BOUND; the message names the token where they do so most.
    """
    for place, said, computed in zip(places, sampled, trained, strict=True):
        if len(said) != len(computed):
            raise RuntimeError(
                f"audit: answer {place[1]} to row {place[0]} was sampled with {len(said)} tokens, training "
                f"has {len(computed)}"
            )
    errors = [abs(a.astype(np.float64) - b) for a, b in zip(sampled, trained, strict=True)]
    mean, largest = float(np.concatenate(errors).mean()), float(np.concatenate(errors).max())
    most_mean, most = (bound / min(temperature, 1.0) for bound in BOUND[dtype])
    if not (mean <= most_mean and largest <= most):  # so written, NaN is refused too
        answer = int(np.argmax([error.max() for error in errors]))  # of NaN, the first
        token, (row, number) = int(errors[answer].argmax()), places[answer]
        raise RuntimeError(
            f"audit: token {token} of answer {number} to row {row} was sampled with log-prob "
            f"{sampled[answer][token]:.6f}, training says {trained[answer][token]:.6f}. They differ by "
            f"{errors[answer][token]:.2g} (bound {most:.2g}), on average by {mean:.2g} "
            f"(bound {most_mean:.2g}): the sampler and the trainer do not compute the same model"
        )
    return {"audit/logprob_error": mean, "audit/logprob_error_max": largest}


def check_ends(
    places: Sequence[tuple[int, int]], answers: Sequence[Sample], stop_ids: set[int], stop: tuple[str, ...]
) -> None:
    """Raises RuntimeError if an answer that ended by itself does not hold the token that ended it.

    Such a model is never taught to end. With stop strings an answer may end without such a token.
    """
    for (row, number), sample in zip(places, answers, strict=True):
        if sample.finish == "stop" and not stop and int(sample.ids[-1]) not in stop_ids:
            raise RuntimeError(
                f"audit: answer {number} to row {row} ended, but its last token {sample.ids[-1]} is none "
                "that ends an answer: the stop token was lost"
            )


def check_ratio(error: float) -> dict[str, float]:
    """At the first update of a rollout the ratio of PPO is 1: the policy is the one that sampled.

    Args:
        error: mean over its tokens of |pi / pi_old - 1|.

    Raises:
        RuntimeError: it is above RATIO_BOUND.
    """
    if not error <= RATIO_BOUND:
        raise RuntimeError(
            f"audit: at the first update of a rollout the policy's ratio is off 1 by {error:.2g} on average "
            f"(bound {RATIO_BOUND:.2g}): training does not compute what the pass for the old log-probs did. "
            "On GPUs try --deterministic"
        )
    return {"audit/ratio_error": error}
