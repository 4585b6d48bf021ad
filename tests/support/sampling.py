"""Settings of the sampler, and the distributions that its draws must have."""

import itertools
import math

import torch

from align.generation.sampling import SamplingConfig

CHI_SQUARE_999 = (  # 99.9 % quantiles for 1, 2, ... degrees of freedom
    (10.828, 13.816, 16.266, 18.467, 20.515, 22.458, 24.322, 26.124, 27.877, 29.588)
    + (31.264, 32.909, 34.528, 36.123, 37.697, 39.252, 40.790, 42.312, 43.820, 45.315)
)
CONFIGS = {
    "plain": SamplingConfig(),
    "cold": SamplingConfig(temperature=0.7),
    "hot": SamplingConfig(temperature=1.5),
    "top_k": SamplingConfig(top_k=5),
    "top_p": SamplingConfig(top_p=0.8),
    "min_p": SamplingConfig(min_p=0.15),
    "penalty": SamplingConfig(repetition_penalty=1.8),
    "reward": SamplingConfig(repetition_penalty=0.7),
    "top_k_top_p": SamplingConfig(top_k=6, top_p=0.8),
    "cold_top_p_min_p": SamplingConfig(temperature=0.7, top_p=0.95, min_p=0.05),
    "all": SamplingConfig(temperature=1.5, top_k=9, top_p=0.9, min_p=0.1, repetition_penalty=1.3),
}


def exact(logits: torch.Tensor, seen: torch.Tensor, config: SamplingConfig) -> list[float]:
    """The distribution that a row is drawn from, in Python's floats. No two logits are equal."""
    scores = logits.tolist()
    for token in seen.nonzero()[:, 0].tolist():
        penalty = config.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    scores = [score / config.temperature for score in scores]
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    order = order[: config.top_k or None]
    mass = [math.exp(scores[token] - scores[order[0]]) for token in order]
    running = list(itertools.accumulate(mass))
    count = next((n for n, sum_ in enumerate(running, 1) if sum_ >= config.top_p * running[-1]), len(order))
    kept = {
        token: weight
        for token, weight in zip(order[:count], mass[:count], strict=True)
        if weight >= config.min_p * mass[0]
    }
    return [kept.get(token, 0.0) / math.fsum(kept.values()) for token in range(len(scores))]
