"""Relative errors of metrics, outputs, gradients and weights, and the first that exceeds the bound."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tools.conformance.losses import BETA

BOUND = 1e-5  # of fp32
Steps = Sequence[Mapping[str, float]]  # metrics of each step


@dataclass(frozen=True)
class Cell:
    """The largest relative error, and its place: the first above the bound if there is one."""

    error: float
    place: str


def cell(errors: Iterable[tuple[str, float]], bound: float = BOUND) -> Cell:
    """Reduce named errors, in the order of computation. NaN counts as infinite."""
    named = [(name, math.inf if math.isnan(error) else error) for name, error in errors]
    largest = max(named, key=lambda item: item[1])
    return Cell(largest[1], next((name for name, error in named if error > bound), largest[0]))


def size(name: str, expected: Mapping[str, float]) -> float:
    """Size of a metric, by which its error is divided: its value, and 1e-3 for values near 0.

    Means of rewards have terms of both signs and may come out anywhere near 0: their size is the root mean
    square of the rewards. Rewards and log-ratios of dpo are differences of log-probs, and float32 gives the
    difference no more digits than those have: their size is a tenth of the log-probs'. In the losses of ppo
    and grpo tokens of both signs meet, each of about unit size, and KLs are differences of log-probs, too.
    """
    if "ppo_ratio" in expected and name in ("loss", "approx_kl", "kl"):
        return max(abs(expected[name]), 1.0)
    if "logprobs_chosen_mean" in expected and name.startswith(("rewards", "logratio")):
        nats = max(abs(expected[f"logprobs_{side}_mean"]) for side in ("chosen", "rejected"))
        return 0.1 * nats * (BETA if name.startswith("rewards") else 1)
    if name.startswith("rewards"):
        return math.hypot(expected["rewards_all_mean"], expected["rewards_all_std"])
    return max(abs(expected[name]), 1e-3)


def metrics(actual: Steps, expected: Steps, names: Collection[str] | None = None) -> Cell:
    """Compare the metrics `names` of every step, by default all."""
    errors = []
    for step, (own, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert own.keys() == wanted.keys(), (sorted(own), sorted(wanted))
        for name in wanted:
            if names is None or name in names:
                place = f"{name}, step {step + 1}"
                errors.append((place, abs(own[name] - wanted[name]) / size(name, wanted)))
    return cell(errors)


def tensors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float = BOUND) -> Cell:
    """Compare tensors by name: the norm of the difference by the norm of the expected tensor.

    The gradient of a key's bias is a sum that cancels, since softmax ignores a shift of all scores. So a bias
    is at least as large as a column of its matrix, by their root mean square: it is one, for inputs of 1.
    """
    errors = [(f"{name}, absent or unknown", math.inf) for name in sorted(actual.keys() ^ expected.keys())]
    for name, wanted in expected.items():
        if name not in actual:
            continue
        difference = float((actual[name].double() - wanted.double()).norm())
        norm = float(wanted.double().norm())
        matrix = expected.get(f"{name.removesuffix('.bias')}.weight")
        if matrix is not None and matrix.dim() == 2:
            norm = max(norm, float(matrix.double().norm()) / matrix.shape[-1] ** 0.5)
        errors.append((name, difference / norm if norm else difference))
    return cell(errors, bound)


def outputs(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> Cell:
    """Compare log-probs or values of trained tokens, by their root mean square over all rows."""
    norm = float(np.sqrt(np.mean(np.concatenate([x.ravel() for x in expected]).astype(float) ** 2)))
    errors = []
    for row, (own, wanted) in enumerate(zip(actual, expected, strict=True)):
        difference = np.abs(own.astype(float) - wanted).reshape(len(wanted), -1).max(1) / norm
        errors += [(f"row {row + 1}, token {token + 1}", float(x)) for token, x in enumerate(difference)]
    return cell(errors)
