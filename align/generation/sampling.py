"""Logits to tokens: repetition penalty, temperature, top-k, top-p, min-p, and one random number per token.

Penalty, temperature and filters are defined and ordered as in transformers. A filter keeps every token that
ties, in float32, with the least likely token that it keeps: the order of the ids has no effect. transformers
does so for top-k and min-p; for top-p its sort decides.

A token is drawn by inverting the cumulative distribution, in the order of the ids, with one random number.
Running sums are float64. A difference of 1e-6 in the logits, as between two parallel layouts, moves the
bounds between tokens by at most 5e-7: a draw changes only if its random number is that close to a bound.

On a GPU nothing here synchronises with the device, and no shape depends on a value: a CUDA graph can capture
it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from align.errors import UserError
from align.flags import COUNT_OR_0, above, below, check_ranges, number, refuse_unused, whole
from align.kernels.fused import fused

BLOCK = 64  # columns of a partial sum: no cumulative sum runs over the whole vocabulary


@dataclass(frozen=True)
class SamplingConfig:
    """Length of responses and the distribution that they are drawn from."""

    max_new_tokens: int = 256
    """maximum response length in tokens"""
    temperature: float = 1.0
    """sampling temperature: logits are divided by it; in place of 0 give --greedy"""
    top_k: int = 0
    """top-k sampling: draw from the k likeliest tokens; 0: from all"""
    top_p: float = 1.0
    """nucleus sampling: draw from the fewest likeliest tokens with this probability mass, after top-k; 1:
    from all"""
    min_p: float = 0.0
    """min-p sampling: draw from tokens at least this times as likely as the likeliest; 0: from all"""
    repetition_penalty: float = 1.0
    """repetition penalty: positive logits of tokens in prompt and response are divided by it, negative ones
    multiplied; 1: none"""
    greedy: bool = False
    """greedy decoding: take the likeliest token; temperature and filters have no effect"""
    stop: tuple[str, ...] = ()
    """stop strings: texts that end a response, besides the end-of-turn tokens of the model"""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            max_new_tokens=whole(1, 10**7),
            temperature=number(1e-3, 1e3),
            top_k=COUNT_OR_0,
            top_p=above(0, 1),
            min_p=below(0, 1),
            repetition_penalty=number(1e-3, 1e3),
        )
        if "" in self.stop:
            raise UserError('--stop "": a stop string of zero length would end every response at once')
        if self.greedy:
            refuse_unused(self, SamplingConfig, "temperature top_k top_p min_p", "with --greedy")


def pick(
    logits: Tensor, uniforms: Tensor, config: SamplingConfig, seen: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token for each row; each result depends on its own row only.

    Args:
        logits: [B, V] float32, not changed; a token at -inf (padding of the vocabulary) is never drawn
        uniforms: [B] float64 in [0, 1), on any device: the token is the i of cdf(i - 1) <= u < cdf(i)
        seen: [B, V] bool, tokens of prompt and response so far, for the repetition penalty

    Returns:
        ids [B] int64; with `greedy` the likeliest, and of tied ones the lowest
        logprobs [B] float32, under the distribution that the token was drawn from; 0 with `greedy`
        model_logprobs [B] float32, under softmax(logits): no penalty, no temperature, no filter; NaN for a
            row with NaN or +inf, or with -inf only, whose id is meaningless, see `check_draws`
    """
    top = logits.amax(-1, keepdim=True)
    scores = _penalised(logits, seen, config.repetition_penalty)
    if config.greedy:
        ids, mass = scores.argmax(-1), _mass(_weights(logits, top, 1.0))
        return ids, torch.zeros_like(logits[:, 0]), _logprobs(logits, top, ids, 1.0, mass)
    highest = top if scores is logits else scores.amax(-1, keepdim=True)
    weights = _weights(scores, highest, config.temperature)
    mass = _mass(weights)
    _filter(weights, config)
    ids, kept = _draw(weights, uniforms)
    logprobs = _logprobs(scores, highest, ids, config.temperature, kept)
    if scores is not logits or config.temperature != 1:  # else the mass before the filter is the model's
        mass = _mass(_weights(logits, top, 1.0))
    return ids, logprobs, _logprobs(logits, top, ids, 1.0, mass)


def check_draws(model_logprobs: np.ndarray) -> None:
    """Raise FloatingPointError for invalid logits, by the `model_logprobs` [B] of `pick`."""
    if rows := np.flatnonzero(~np.isfinite(model_logprobs)).tolist():
        raise FloatingPointError(f"logits of rows {rows} hold NaN or +inf, or -inf only")


def _penalised(logits: Tensor, seen: Tensor | None, penalty: float) -> Tensor:
    """Penalise the logits [B, V] of seen tokens (CTRL, arXiv:1909.05858, section 4.1).

    A negative logit is multiplied, as in transformers. Returns the same tensor if the penalty is 1.
    """
    if penalty == 1:
        return logits
    if seen is None:
        raise UserError(f"--repetition-penalty {penalty} needs the tokens seen so far")
    # Above 1, a negative logit's product and a positive one's quotient are each the lower of the two.
    either = torch.minimum if penalty > 1 else torch.maximum
    product = logits * penalty
    return torch.where(seen, either(product, logits / penalty, out=product), logits)


def _weights(scores: Tensor, top: Tensor, temperature: float) -> Tensor:
    """exp((score - top) / temperature), [B, V] float32, with zeros up to a multiple of BLOCK.

    top: [B, 1] largest score of each row.
    """
    weights = scores - top
    if temperature != 1:
        weights /= temperature
    weights.exp_()
    missing = -weights.shape[1] % BLOCK
    return functional.pad(weights, (0, missing)) if missing else weights


def _block_sums(weights: Tensor) -> Tensor:
    """Sums over BLOCK neighbours, [B, V / BLOCK] float64 with the accuracy of float32, 1e-7 of each."""
    return weights.view(len(weights), -1, BLOCK).sum(-1).double()


def _mass(weights: Tensor) -> Tensor:
    """The sum of each row of weights, [B] float64; NaN for invalid logits."""
    return _block_sums(weights).sum(-1)


def _filter(weights: Tensor, config: SamplingConfig) -> None:
    """Set to 0 the weights [B, V] outside top-k, top-p and min-p."""
    if config.top_k:
        count = min(config.top_k, weights.shape[1])
        _drop_below(weights, weights.topk(count).values[:, -1:])
    if config.top_p < 1:
        floor = _top_p_floor_by_bisection if weights.is_cuda else _top_p_floor
        _drop_below(weights, floor(weights, config.top_p))
    if config.min_p:  # the largest weight is exactly 1
        _drop_below(weights, torch.full_like(weights[:, :1], config.min_p))


def _drop_below(weights: Tensor, floor: Tensor) -> None:
    """Set to 0 the weights [B, V] below their row's floor [B, 1]."""
    kept = torch.empty_like(weights)  # 0 or 1 in float32: several times as fast as bool on the CPU
    weights.mul_(torch.ge(weights, floor, out=kept))


def _top_p_floor(weights: Tensor, top_p: float) -> Tensor:
    """[B, 1] lowest weight of the nucleus, the fewest largest weights with top_p of the row's sum.

    arXiv:1904.09751, 3.1. A sort of 49,152 takes 3 ms a row, and 64 tokens mostly suffice, so only the other
    rows are searched further.
    """
    needed = top_p * _block_sums(weights).sum(-1, keepdim=True)
    floor = torch.zeros_like(weights[:, :1])
    rows = torch.arange(len(weights), device=weights.device)
    for count in (64, 1024, weights.shape[1]):
        largest = weights.topk(min(count, weights.shape[1])).values
        before = (largest.cumsum(-1, dtype=torch.float64) < needed).sum(-1, keepdim=True)
        floor[rows] = largest.gather(-1, before.clamp(max=largest.shape[1] - 1))
        short = before[:, 0] == largest.shape[1]
        if not short.any():
            break
        rows, weights, needed = rows[short], weights[short], needed[short]
    return floor


def _top_p_floor_by_bisection(weights: Tensor, top_p: float) -> Tensor:
    """`_top_p_floor` in 30 passes over the weights, for any weights.

    The floor is the highest number t such that the weights of at least t sum to top_p of their row. Positive
    floats are ordered like their bits, and weights are at most 1: each pass determines one bit.
    """
    needed = top_p * _block_sums(weights).sum(-1, keepdim=True)
    low = torch.zeros_like(weights[:, :1], dtype=torch.int32)  # invariant: weights of at least low suffice
    for bit in reversed(range(30)):
        higher = low + (1 << bit)
        low = torch.where(_mass_from(weights, higher.view(torch.float32)) >= needed, higher, low)
    return low.view(torch.float32)


@fused
def _mass_from(weights: Tensor, floor: Tensor) -> Tensor:
    """Sum of each row's weights [B, V] that are at least its floor [B, 1], [B, 1] float64."""
    return _block_sums(weights * (weights >= floor)).sum(-1, keepdim=True)


def _draw(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [B] drawn in proportion to the weights [B, V], and the sums of the weights, [B] float64."""
    sums = _block_sums(weights)
    total = sums.sum(-1)
    block, rest = _first_beyond(sums, uniforms.to(total) * total)
    rows = torch.arange(len(weights), device=weights.device)
    inner = weights.view(len(weights), -1, BLOCK)[rows, block].double()
    column, _ = _first_beyond(inner, rest)
    return block * BLOCK + column, total


def _first_beyond(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first index of positive weight whose running sum exceeds the target, and the rest of the target.

    Args:
        weights: [B, n] float64, at least one of each row positive
        target: [B] float64; at the sum of all, by rounding, the last positive weight is taken

    Returns:
        [B] int64, and [B] float64: the target less the sum of the weights before
    """
    sums = torch.where(weights > 0, _running_sums(weights), -1.0)  # below any target, also rounded below 0
    target = torch.minimum(target, torch.nextafter(sums.amax(-1), torch.zeros_like(target)))
    index = (sums > target[:, None]).int().argmax(-1, keepdim=True)  # of equal ones the first
    before = sums.gather(-1, index) - weights.gather(-1, index)
    return index[:, 0], target - before[:, 0]


def _running_sums(weights: Tensor) -> Tensor:
    """Cumulative sums of [B, n] float64; with --deterministic torch refuses its own on GPUs."""
    by_product = weights.is_cuda and torch.are_deterministic_algorithms_enabled()
    return _sums_by_product(weights) if by_product else weights.cumsum(-1)


def _sums_by_product(weights: Tensor) -> Tensor:
    """Cumulative sums of [B, n] as a product with a triangle of ones."""
    return weights @ weights.new_ones(weights.shape[1], weights.shape[1]).triu()


def _logprobs(scores: Tensor, top: Tensor, ids: Tensor, temperature: float, mass: Tensor) -> Tensor:
    """Log of the id's weight over the mass [B], [B] float32.

    From the scores [B, V] with their maximum top [B, 1], so that it is finite if the weight is 0 in float32.
    """
    drawn = scores.gather(-1, ids[:, None])[:, 0].double()
    return ((drawn - top[:, 0].double()) / temperature - mass.log()).float()
