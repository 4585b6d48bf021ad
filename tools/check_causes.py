"""Likely causes of a difference: numbers of usual mistakes, compared with those of the run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools import reference as plain
from tools.check_rows import Tokens

NEAR = 1e-4  # relative: the run's number is the mistake's
ROWS = "another order of the rows, or rows left out: --seed, the files, or the limits of length"
ENDS = "the end of a response: it ends at a stop token, or is cut at --max-new-tokens {}"
PER_SEQUENCE = "the loss is divided by the number of sequences, not of trained tokens"
MEAN_OF_MEANS = "the loss is a mean over sequences of their means, not over all trained tokens"
ALL_TOKENS = "the loss is divided by the number of all tokens, not of trained tokens"
TARGETS = "margins or labels of other rows, or not those of the data"
TOKEN_REWARDS = "the score is not at the last token, or the KL penalty has another coefficient (--kl-coef)"
ADVANTAGES = "the advantage estimator: gamma, lambda, its baseline, or a recursion across responses"
NONE = "no usual mistake gives these numbers"


def near(x: np.ndarray, y: np.ndarray) -> bool:
    """True if all numbers are equal up to rounding."""
    return x.shape == y.shape and bool(
        np.allclose(x, y, rtol=NEAR, atol=NEAR * max(1e-9, float(np.abs(y).max())))
    )


def named(actual: np.ndarray, others: Mapping[str, np.ndarray], default: str) -> str:
    """The name of the first of `others` that the run's numbers are."""
    return next((name for name, x in others.items() if near(actual, np.asarray(x))), default)


def tokens(actual: Tokens, expected: Tokens, others: Mapping[str, Tokens], renderer: Any) -> str:
    """Cause of other token ids."""
    a, e, eos, bos = (
        actual.ids,
        expected.ids,
        renderer.tokenizer.eos_token_id,
        renderer.tokenizer.bos_token_id,
    )
    same = next((name for name, x in others.items() if x.ids == a), None)
    if same is not None:
        return f"this is the sequence of {same}: sides are swapped, or rows are in another order"
    if e == [*a, eos] or (a and e[: len(a)] == a and set(e[len(a) :]) <= renderer.stops):
        return "the end-of-text or end-of-turn token is missing"
    if a == [bos, *e]:
        return "a BOS token in front that the tokenizer does not add (--add-bos)"
    if e == [bos, *a]:
        return "the BOS token in front is missing (--add-bos)"
    if len(a) < len(e) and (e[: len(a)] == a or e[-len(a) :] == a):
        side = "right" if e[: len(a)] == a else "left"
        return f"cut to {len(a)} tokens on the {side}: another limit of length than the flags say"
    decode = renderer.tokenizer.decode
    if decode(a) == decode(e):
        return "the same text in other tokens: pieces of the text are encoded apart, or together"
    return f"another chat template or text: {decode(a)[-60:]!r} in place of {decode(e)[-60:]!r}"


def mask(actual: Tokens, expected: Tokens, others: Mapping[str, Tokens], renderer: Any) -> str:
    """Cause of another mask of trained tokens."""
    a, e = np.array(actual.trained), np.array(expected.trained)
    if (a[1:] == e[:-1]).all() or (a[:-1] == e[1:]).all():
        return f"the mask is shifted by one token, {'late' if (a[1:] == e[:-1]).all() else 'early'}"
    if (a | ~e).all() and (a & ~e)[: int(e.argmax())].sum() >= int(e.argmax()) - 1:
        return "the prompt is trained as well"
    missing = np.flatnonzero(e & ~a)
    if len(missing) and {expected.ids[t] for t in missing} <= renderer.stops:
        return "the end of the response is not trained: the model will not learn to stop"
    return "other tokens are trained: roles, or the start of a response"


def logprobs(step: Any, actual: np.ndarray, number: int, full: Tensor, temperature: float) -> str:
    """Cause of other log-probs of a sequence; `full`: the reference's of all targets [n - 1]."""
    x = step.sequences[number]
    places = np.flatnonzero(x.trained[1:])
    for shift, word in ((1, "late"), (-1, "early")):
        kept = (places + shift >= 0) & (places + shift < len(full))
        if kept.any() and near(actual[kept], full.numpy()[places[kept] + shift]):
            return f"the places of trained tokens are shifted by one, {word}: log-probs of their neighbours"
    dtype, seed = step.config.model.dtype, step.config.parallel.seed
    model = plain.load(step.policy, 0, torch.float64, dtype, seed)

    @torch.no_grad()
    def of(temperature: float = temperature) -> np.ndarray:
        return plain.token_logprobs(model, x.ids, temperature, step.vocab_size).numpy()[places]

    if temperature != 1 and near(actual, of(1.0)):
        return f"the temperature {temperature:g} is left out"
    for other in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0):
        if other != temperature and near(actual, of(other)):
            return f"softmax at temperature {other:g}, not {temperature:g}"
    for name in changed_models(model):
        if near(actual, of()):
            return name
    return f"another model than --model: its weights, layers or precision; {NONE}"


def changed_models(model: Any) -> Any:
    """Change a model in the ways that are usual mistakes; yields the name of each, then restores it."""
    rotary = [module for module in model.modules() if hasattr(module, "inv_freq")]
    dims = 2 * len(rotary[0].inv_freq) if rotary else 0
    right = [module.inv_freq.clone() for module in rotary]
    for theta in (1e4, 1e5, 5e5, 1e6, 1e7) if rotary else ():
        for module in rotary:
            module.inv_freq = (1 / theta ** (torch.arange(0, dims, 2) / dims)).to(module.inv_freq)
        yield f"rotary embedding with base {theta:g} and no scaling, not rope_theta of config.json"
    for module, frequencies in zip(rotary, right, strict=True):
        module.inv_freq = frequencies
    norms = [(m, name) for m in model.modules() for name in ("variance_epsilon", "eps") if hasattr(m, name)]
    before = [getattr(module, name) for module, name in norms]
    for eps in (1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 0.0):
        for module, name in norms:
            setattr(module, name, eps)
        yield f"norms with epsilon {eps:g}, not that of config.json"
    for (module, name), eps in zip(norms, before, strict=True):
        setattr(module, name, eps)


def reference(actual: np.ndarray, sums: Sequence[float], others: Sequence[float]) -> str:
    """Cause of other reference log-probs of responses."""
    swapped = np.asarray(sums).reshape(-1, 2)[:, ::-1].reshape(-1)
    rolled = {"of the pair before or after": np.roll(sums, 2), "of the other pair": np.roll(sums, -2)}
    candidates = {
        "swapped between chosen and rejected": swapped,
        "per token in place of per response": others,
    }
    candidates |= {**rolled, "0": np.zeros(len(sums))}
    name = next((name for name, x in candidates.items() if near(actual, np.asarray(x))), None)
    if name is not None:
        return f"the reference's log-probs are {name}"
    return "the reference is another model than --model, from which training starts (or its weights moved)"


def scores(step: Any, number: int, actual: float) -> str:
    """Cause of another score of a text."""
    x = step.sequences[number].ids[:-1]
    labels, seed = step.config.num_attributes, step.config.parallel.seed
    model = plain.load(step.policy, labels, torch.float64, step.config.model.dtype, seed)
    with torch.no_grad():
        values = plain.values(model, x)[:, 0].numpy()
        for back in (2, 3, 1):
            if (
                back <= len(values)
                and back > 1
                and near(np.array([actual]), values[-back : len(values) - back + 1])
            ):
                return f"the score is read {back - 1} tokens before the last"
        for name in changed_models(model):
            if near(np.array([actual]), plain.values(model, x)[-1:, 0].numpy()):
                return name
    return f"another model or head than --model and --seed give; {NONE}"


def values(actual: np.ndarray, expected: np.ndarray, mean: float, std: float) -> str:
    """Cause of other values of the critic."""
    raw, shifted = expected * std + mean, np.roll(expected, 1)
    others = {
        "values that are not standardised as the rewards are": raw,
        "values of the token before": shifted,
    }
    others["values of the token after"] = np.roll(expected, -1)
    return named(actual, others, "another critic than --critic, --reward-model or --model")


def rewards(actual: np.ndarray, expected: np.ndarray, step: Any) -> str:
    """Cause of other rewards of responses."""
    others = {
        f"the rewards of the response {abs(k)} {'before' if k > 0 else 'after'}": np.roll(expected, k)
        for k in (1, -1, step.per_row, -step.per_row)
    }
    reward = step.config.reward.resolved(is_toy=not step.config.train_data)
    others["scores that are not standardised"] = expected * reward.reward_std + reward.reward_mean
    others["rewards with the wrong sign"] = -expected
    return named(
        actual, others, "other texts are scored, by another function or model, or one that is random"
    )


def loss(actual: float, expected: float, others: Mapping[str, float]) -> str:
    """Cause of another loss."""
    for name, x in {**others, "the loss has the wrong sign": -expected}.items():
        if math.isclose(actual, x, rel_tol=NEAR):
            return name
    ratio = actual / expected if expected else math.inf
    return f"the loss is {ratio:.6g} times the right one: its denominator (a mean of means?), beta, or a term"


def names(extra: Sequence[str], missing: Sequence[str]) -> str:
    """Cause of other names of weights."""
    if any("lm_head" in name for name in extra):
        return "the embeddings are tied in config.json, and here the output layer has weights of its own"
    if any("lm_head" in name for name in missing):
        return "the embeddings are not tied in config.json, and here they are"
    return "another architecture than config.json says"


def gradients(
    wrong: Sequence[str], actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> str:
    """Cause of other gradients; `wrong`: the weights that differ."""
    ratios, rests = [], []
    for name in wrong:
        a, e = actual[name].reshape(-1).astype(np.float64), expected[name].reshape(-1)
        ratios.append(float(a @ e / max(float(e @ e), 1e-300)))
        rests.append(float(np.abs(a - ratios[-1] * e).max()) / max(float(np.abs(e).max()), 1e-300))
    is_scaled = max(rests) < 1e-2 and np.ptp(ratios) < 1e-2 * abs(ratios[0])
    if not is_scaled:
        return "these weights get the gradient of other terms: the loss, or a backward pass"
    where = (
        "all gradients are" if len(wrong) == len(expected) else f"the gradients of {len(wrong)} weights are"
    )
    if abs(ratios[0] + 1) < 1e-2:
        return f"{where} of the wrong sign: chosen and rejected swapped, or the loss maximised"
    why = (
        "beta, label smoothing, or the loss's denominator"
        if len(wrong) == len(expected)
        else "scaled twice, or not"
    )
    return f"{where} {ratios[0]:.6g} times the right ones: {why}"


def learning_rate(actual: float, rates: Sequence[float]) -> str:
    """Cause of another learning rate; `rates`: of the step before, this one, the next two; of the peak."""
    others = {
        "the schedule is one step behind": max(rates[0], 0.0),
        "the schedule is one step ahead": rates[2],
    }
    others |= {"the schedule is two steps ahead": rates[3], "no warm-up": 1.0}
    return next((name for name, x in others.items() if math.isclose(actual, x, rel_tol=NEAR)), "the schedule")
