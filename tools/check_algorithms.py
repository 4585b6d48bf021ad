"""The stages of each algorithm's step, for `tools.check`: rewards, advantages, losses and gradients."""

import copy
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.data import hub
from tools import check_causes, reference
from tools.check_stages import (
    Outcome,
    Stage,
    Step,
    at_trained,
    check_data,
    check_logprobs,
    check_lr,
    check_update,
    outcomes,
)


def check_sft(step: Step, used: Sequence[int]) -> None:
    """Log-probs, loss and gradient of supervised fine-tuning on some sequences of the step."""
    sequences = [step.sequences[i] for i in used]
    total = sum(sum(x.trained) for x in sequences)
    step.sequences, step.numbers = sequences, [step.numbers[i // step.per_row] for i in used]

    def terms(model: Any) -> Iterator:
        for x in sequences:
            logprobs = reference.token_logprobs(model, x.ids, 1.0, step.vocab_size)
            yield [logprobs], reference.sft(logprobs, x.trained) / total

    computed = outcomes(step, step.policy, 0, terms)
    check_logprobs(step, "log-probs", "logprobs", computed)
    means = [
        -x.numpy()[np.array(y.trained[1:])].mean()
        for x, y in zip(computed[0].outputs, sequences, strict=True)
    ]
    sums = computed[0].loss * total
    causes = {
        check_causes.PER_SEQUENCE: sums / len(sequences),
        check_causes.MEAN_OF_MEANS: float(np.mean(means)),
    }
    causes[check_causes.ALL_TOKENS] = sums / sum(len(x.ids) - 1 for x in sequences)
    check_update(step, "policy", computed, causes)


def forward(step: Step, directory: Path, temperature: float = 1.0) -> list[Outcome]:
    """Log-probs of the step's sequences under a model, without a gradient."""

    @torch.no_grad()
    def terms(model: Any) -> Iterator:
        for x in step.sequences:
            yield [reference.token_logprobs(model, x.ids, temperature, step.vocab_size)], None

    return outcomes(step, directory, 0, terms)


def sums(step: Step, outcome: Outcome, average: bool) -> list[float]:
    """Log-prob of each sequence."""
    pairs = zip(outcome.outputs, step.sequences, strict=True)
    return [float(reference.sequence_logprob(x, y.trained, average)) for x, y in pairs]


def loss_options(step: Step, ref: Sequence[float], average: bool) -> dict[str, float]:
    """Numbers that --loss takes beside the log-ratios and beta, but for the gap of a pair."""
    flags = {name: getattr(step.config, name, None) for name in reference.FLAGS}
    options = {name: value for name, value in flags.items() if value is not None}
    if step.config.loss == "kto_pair":
        ratios = np.array(sums(step, forward(step, step.policy)[0], average)) - ref
        kl = ratios.reshape(-1, 2).mean(0).clip(min=0).tolist()
        options |= dict(zip(("kl_chosen", "kl_rejected"), kl, strict=True))
    return options


def check_dpo(step: Step, gaps: Sequence[float], beta: float, average: bool, sft_average: bool) -> None:
    """Log-probs, reference, loss and gradient of a preference loss."""
    config = step.config
    loss, is_free = reference.PREFERENCE[config.loss], "ref_logprobs" not in step.arrays
    of_reference = [] if is_free else forward(step, config.model.path)
    ref = [0.0] * len(step.sequences) if is_free else sums(step, of_reference[0], average)
    options = loss_options(step, ref, average)
    sft_weight = (1.0 if config.loss == "orpo" else 0.0) if config.sft_weight is None else config.sft_weight

    def terms(model: Any) -> Iterator:
        for i, gap in enumerate(gaps):
            own, logprobs = [], []
            for number in (2 * i, 2 * i + 1):
                x = step.sequences[number]
                logprobs.append(reference.token_logprobs(model, x.ids, 1.0, step.vocab_size))
                own.append(reference.sequence_logprob(logprobs[-1], x.trained, average) - ref[number])
            nll = -reference.sequence_logprob(logprobs[0], step.sequences[2 * i].trained, sft_average)
            needs_gap = config.loss in ("scale", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")
            more = {"gap": (config.reward_scale or 1.0) * gap} if needs_gap else {}
            yield logprobs, (loss(*own, beta, **options, **more) + sft_weight * nll) / len(gaps)

    computed = outcomes(step, step.policy, 0, terms)
    check_logprobs(step, "log-probs", "logprobs", computed)
    if not is_free:
        check_reference(step, of_reference, average)
    check_update(step, "policy", computed, {})


def check_reference(step: Step, computed: list[Outcome], average: bool) -> None:
    """A stage of the reference's log-probs, by response or by token."""
    actual = step.arrays["ref_logprobs"]
    if len(actual) != len(step.sequences):
        return check_logprobs(step, "reference", "ref_logprobs", computed)
    exact, rounded = (sums(step, outcome, average) for outcome in computed)
    other = sums(step, computed[0], not average)
    cause = lambda i: check_causes.reference(actual, exact, other)  # noqa: E731
    step.compare("reference", actual, exact, rounded, step.label, cause)


def check_rm(step: Step, targets: list[list[float]]) -> None:
    """Scores, loss and gradient of a reward model."""
    config, labels = step.config, step.config.num_attributes
    ids = [x.ids[:-1] for x in step.sequences]  # without the id behind the last token
    total = len(targets) if config.loss == "ranking" else sum(y != -100 for row in targets for y in row)

    def terms(model: Any) -> Iterator:
        if config.loss == "regression":
            for x, target in zip(ids, targets, strict=True):
                scores = reference.values(model, x)[-1]
                yield [scores], reference.regression(scores, target) / total
            return
        for i, [margin] in enumerate(targets):
            sides = [reference.values(model, x)[-1] for x in ids[2 * i : 2 * i + 2]]
            loss = reference.ranking(sides[0][0], sides[1][0], margin, config.center_rewards_coef)
            yield sides, loss / total

    computed = outcomes(step, step.policy, labels, terms)
    exact, rounded = (torch.cat(outcome.outputs).numpy() for outcome in computed)
    place = lambda i: step.token(i // labels, len(ids[i // labels]) - 1)  # noqa: E731
    cause = lambda i: check_causes.scores(step, i // labels, float(step.arrays["scores"].reshape(-1)[i]))  # noqa: E731
    step.compare("scores", step.arrays["scores"], exact, rounded, place, cause)
    flat = [x for row in targets for x in row]
    target_place = lambda i: step.label(i * step.per_row // len(targets[0]))  # noqa: E731
    step.compare("targets", step.arrays["targets"], flat, None, target_place, lambda i: check_causes.TARGETS)
    check_update(
        step, "policy", computed, {check_causes.PER_SEQUENCE: computed[0].loss * total / len(step.sequences)}
    )


def call_reward(step: Step) -> tuple[np.ndarray, np.ndarray | None]:
    """Rewards of the responses: reward model's plus function's; and in the run's precision."""
    config = step.config
    reward = config.reward.resolved(is_toy=not config.train_data)
    total, rounded = np.zeros(len(step.sequences)), None
    if reward.reward_model:
        directory = hub.local_model(reward.reward_model)

        def terms(model: Any) -> Iterator:
            for x in step.sequences:
                with torch.no_grad():
                    yield [reference.values(model, x.ids)[-1]], None

        scores = [torch.cat(x.outputs).numpy() for x in outcomes(step, directory, 1, terms)]
        exact, rounded = ((x - reward.reward_mean) / reward.reward_std for x in scores)
        total = total + exact
    if reward.reward_fn:
        function = call_function(step, reward.reward_fn)
        total, rounded = total + function, None if rounded is None else rounded + function
    return total, rounded


def call_function(step: Step, name: str) -> np.ndarray:
    """Rewards of the user's function, called with prompt, response and row as texts."""
    module, _, function = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    reward, tokenizer = getattr(importlib.import_module(module), function), step.renderer.tokenizer
    rewards = []
    for i, x in enumerate(step.sequences):
        start = x.trained.index(True)
        ids = x.ids[start:-1] if x.ids[-1] in step.renderer.stops else x.ids[start:]
        text = tokenizer.decode(ids)
        for stop in step.config.sampling.stop:
            text = text.partition(stop)[0]
        row = copy.deepcopy(step.rows[step.numbers[i // step.per_row]].fields)
        rewards.append(float(reward(tokenizer.decode(x.ids[:start]), text, row)))
    return np.array(rewards)


def check_scores(step: Step) -> None:
    """Stages of the ends of responses and of their rewards."""
    ids, most = [x.ids for x in step.sequences], step.config.sampling.max_new_tokens
    if not step.config.sampling.stop:
        ended = [float(x[-1] in step.renderer.stops) for x in ids]
        step.compare(
            "ends", step.arrays["ended"], ended, None, step.label, lambda i: check_causes.ENDS.format(most)
        )
    expected, rounded = call_reward(step)
    actual = step.arrays["scores"]
    place = step.label
    step.compare(
        "rewards", actual, expected, rounded, place, lambda i: check_causes.rewards(actual, expected, step)
    )


# ---- rollouts ------------------------------------------------------------------------------------


def first_minibatch(step: Step, signal: np.ndarray) -> list[int]:
    """Responses of the first update: those of the first minibatch with a gradient."""
    size, parts = step.config.batch.global_batch_size, np.split(signal, np.cumsum(lengths(step))[:-1])
    for first in range(0, len(parts), size):
        if any(part.any() for part in parts[first : first + size]):
            return list(range(first, first + size))
    return []


def lengths(step: Step) -> list[int]:
    """Tokens of each response."""
    return [sum(x.trained) for x in step.sequences]


def kl_flags(step: Step) -> tuple[str, str]:
    """Place and estimator of the KL penalty, without "auto"."""
    config = step.config
    place = config.kl.kl_in
    if place == "auto":
        place = "loss" if config.advantages == "grpo" else "reward"
    return place, {"auto": "k3" if place == "loss" else "k1"}.get(config.kl.kl, config.kl.kl)


def first_objective(config: Any, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Terms of the loss [n] of a response in the first update, where all ratios are 1, within any bounds."""
    name = getattr(config, "objective", "ppo")
    if name == "cispo":
        return reference.reinforce_loss(logprobs, advantages)
    if name == "sapo":
        tau = config.tau_positive, config.tau_negative
        return reference.sapo_loss(logprobs, old_logprobs, advantages, tau)
    return reference.policy_loss(logprobs, old_logprobs, advantages, config.clip)


def divisors(step: Step, used: Sequence[int]) -> dict[int, float]:
    """Number by which the loss of each response of an update is divided (--aggregate)."""
    counted = {i: int(step.array("counted")[i].sum()) for i in used}
    aggregate, num_responses = (
        getattr(step.config, "aggregate", "token"),
        sum(n > 0 for n in counted.values()),
    )
    if aggregate == "token":
        return dict.fromkeys(used, float(sum(counted.values())))
    longest = step.config.sampling.max_new_tokens
    return {i: num_responses * (n or 1 if aggregate == "response" else longest) for i, n in counted.items()}


def check_rl(step: Step) -> None:
    """PPO, GRPO, RLOO and REINFORCE: from the rewards of the responses to the first update."""
    config, arrays = step.config, step.arrays
    check_scores(step)
    kept = np.repeat(step.arrays["ended"] | (config.truncation.truncated != "mask"), lengths(step))
    places, cause = step.places(), lambda i: "truncated responses are trained, or whole ones are not"
    step.compare("counted", arrays["counted"], kept, None, lambda i: step.token(*places[i]), cause)
    place, estimator = kl_flags(step)
    in_loss = config.kl.kl_coef if place == "loss" else 0.0
    signal = arrays["counted"] * (arrays["advantages"] if in_loss == config.entropy_coef == 0 else 1.0)
    used = first_minibatch(step, signal)
    divisor = divisors(step, used)
    parts = {name: step.array(name) for name in ("old_logprobs", "ref_logprobs", "advantages", "counted")}

    def terms(model: Any) -> Iterator:
        for i, x in enumerate(step.sequences):
            with torch.set_grad_enabled(i in used):
                logprobs = reference.token_logprobs(
                    model, x.ids, config.sampling.temperature, step.vocab_size
                )
            if i not in used:
                yield [logprobs], None
                continue
            trained = torch.tensor(x.trained[1:])
            own = logprobs.cpu()[trained]
            old, ref, advantages, counted = (torch.from_numpy(part[i]) for part in parts.values())
            loss = first_objective(config, own, old, advantages)
            if in_loss:
                loss = loss + in_loss * reference.kl(estimator, own, ref)
            if config.entropy_coef:
                entropies = reference.token_entropies(
                    model, x.ids, config.sampling.temperature, step.vocab_size
                )
                loss = loss - config.entropy_coef * entropies.cpu()[trained]
            yield [logprobs], (loss * counted).sum() / divisor[i]

    computed = outcomes(step, step.policy, 0, terms)
    check_logprobs(step, "log-probs", "old_logprobs", computed, config.sampling.temperature)
    check_logprobs(step, "sampler", "sampler_logprobs", computed, config.sampling.temperature)
    if config.kl.kl_coef:
        of_reference = forward(step, config.model.path, config.sampling.temperature)
        check_logprobs(step, "reference", "ref_logprobs", of_reference, config.sampling.temperature)
    critic = check_values(step) if step.script == "train_ppo" and step.number == 1 else None
    check_token_rewards(step, estimator, 0.0 if in_loss else config.kl.kl_coef)
    check_advantages(step)
    if critic:
        check_update(step, "critic", critic, {})
    elif step.script == "train_ppo":
        step.skip("values", "the critic before a later step is in no file")
    if used:
        is_token_mean = len(set(divisor.values())) == 1
        by_sequence = {check_causes.PER_SEQUENCE: computed[0].loss * divisor[used[0]] / len(used)}
        check_update(step, "policy", computed, by_sequence if is_token_mean else {})
    else:
        step.skip("loss", "no response has a gradient in this step")


def check_values(step: Step) -> list[Outcome]:
    """A stage of the critic's values; returns its outcomes."""
    config = step.config
    reward = config.reward.resolved(is_toy=not config.train_data)
    start = config.critic or reward.reward_model
    directory = hub.local_model(start) if start else config.model.path
    is_scorer = "SequenceClassification" in (directory / "config.json").read_text(encoding="utf-8")
    mean, std = (reward.reward_mean, reward.reward_std) if is_scorer else (0.0, 1.0)
    used, total = range(config.batch.global_batch_size), sum(lengths(step)[: config.batch.global_batch_size])
    old, returns = step.array("values"), step.array("returns")

    def terms(model: Any) -> Iterator:
        for i, x in enumerate(step.sequences):
            values = (reference.values(model, x.ids[:-1])[:, 0].cpu() - mean) / std
            own = values[torch.tensor(x.trained[1:])]
            targets = torch.from_numpy(old[i]), torch.from_numpy(returns[i])
            loss = reference.value_loss(own, *targets, config.value_clip).sum() / total
            yield [values], loss if i in used else None

    computed = outcomes(step, directory, 1, terms, std=0.0)
    exact, rounded = (at_trained(step, outcome.outputs) for outcome in computed)
    places, actual = step.places(), step.arrays["values"]
    cause = lambda i: check_causes.values(actual, exact, mean, std)  # noqa: E731
    step.compare("values", actual, exact, rounded, lambda i: step.token(*places[i]), cause)
    return computed


def check_token_rewards(step: Step, estimator: str, kl_coef: float) -> None:
    """A stage of the rewards of tokens, from the recorded scores and log-probs."""
    penalty = step.config.truncation.truncated_penalty * (step.config.truncation.truncated == "penalise")
    scores = (step.arrays["scores"] - penalty * ~step.arrays["ended"]).tolist()
    if buffer := step.config.truncation.overlong_buffer:
        start = step.config.sampling.max_new_tokens - buffer
        overlong = [min(max(length - start, 0) / buffer, 1.0) for length in lengths(step)]
        scores = [score - penalty for score, penalty in zip(scores, overlong, strict=True)]
    old, ref = (step.array(name) for name in ("old_logprobs", "ref_logprobs"))

    def rewards(coef: float, name: str = estimator) -> np.ndarray:
        parts = []
        for score, x, y in zip(scores, old, ref, strict=True):
            kl = reference.kl(name, torch.from_numpy(x), torch.from_numpy(y)).tolist()
            parts.append(reference.token_rewards(score, kl, coef))
        return np.concatenate(parts)

    expected, places = rewards(kl_coef), step.places()
    others = {f"the KL estimator {name}": rewards(kl_coef, name) for name in ("k1", "abs", "k2", "k3")}
    others |= {"the KL penalty with the wrong sign": rewards(-kl_coef), "no KL penalty": rewards(0.0)}
    actual = step.arrays["rewards"]
    cause = lambda i: check_causes.named(actual, others, check_causes.TOKEN_REWARDS)  # noqa: E731
    step.compare("token rewards", actual, expected, None, lambda i: step.token(*places[i]), cause)


def estimate(step: Step, gamma: float, gae_lambda: float, whiten: bool, correction: int = 1) -> np.ndarray:
    """Advantages of all tokens, from the recorded rewards and values."""
    config, rewards = step.config, [part.tolist() for part in step.array("rewards")]
    if step.script == "train_ppo":
        values = [part.tolist() for part in step.array("values")]
        parts = [reference.gae(x, y, gamma, gae_lambda) for x, y in zip(rewards, values, strict=True)]
    elif config.advantages == "reinforce":
        parts = [reference.rewards_to_go(x, gamma) for x in rewards]
    else:
        returns = [sum(x) for x in rewards]
        counted = [bool(part.any()) for part in step.array("counted")]
        compare: Callable = partial(reference.grpo, correction=correction, divisor=scale(step, returns))
        if config.advantages == "rloo":
            compare = reference.rloo
        size, parts = step.per_row, []
        for first in range(0, len(returns), size):
            group = slice(first, first + size)
            of_group = zip(compare(returns[group], counted[group]), rewards[group], strict=True)
            parts += [[advantage] * len(x) for advantage, x in of_group]
    flat = [x for part in parts for x in part]
    return np.array(reference.whiten(flat) if whiten else flat)


def scale(step: Step, returns: Sequence[float]) -> float | None:
    """Divisor of all advantages (--advantage-scale); None: each prompt has its own."""
    if step.config.advantage_scale == "prompt":
        return None
    counted = [x for x, part in zip(returns, step.array("counted"), strict=True) if part.any()]
    return 1.0 if step.config.advantage_scale == "none" else float(np.std(counted, ddof=1)) + 1e-4


def check_advantages(step: Step) -> None:
    """A stage of the advantages, and of the critic's returns."""
    config = step.config
    is_grouped = step.script == "train_grpo" and config.advantages != "reinforce"
    gae_lambda = getattr(config, "gae_lambda", 1.0)
    gamma, whiten = getattr(config, "gamma", 1.0), config.whiten_advantages and not is_grouped
    counted = step.arrays["counted"]
    expected, actual, places = (
        estimate(step, gamma, gae_lambda, whiten),
        step.arrays["advantages"],
        step.places(),
    )
    if is_grouped:
        biased = estimate(step, gamma, gae_lambda, False, correction=0)
        others = {"the variance of a prompt's rewards is divided by G, not by G - 1": biased}
    else:
        others = {"advantages that are not whitened": estimate(step, gamma, gae_lambda, False)}
    if step.script == "train_ppo":
        for other in (0.0, 0.9, 0.95, 0.99, 1.0):
            others[f"GAE lambda {other:g} in place of {gae_lambda:g}"] = estimate(step, gamma, other, whiten)
            others[f"gamma {other:g} in place of {gamma:g}"] = estimate(step, other, gae_lambda, whiten)
    cause = lambda i: check_causes.named(actual, others, check_causes.ADVANTAGES)  # noqa: E731
    weights = np.ones(len(counted)) if not is_grouped else counted  # the others are not trained
    step.compare(
        "advantages", actual * weights, expected * weights, None, lambda i: step.token(*places[i]), cause
    )
    if step.script == "train_ppo":
        returns = estimate(step, gamma, gae_lambda, False) + step.arrays["values"]
        cause = lambda i: "the critic's targets are not advantages + values"  # noqa: E731
        step.compare(
            "returns", step.arrays["returns"], returns, None, lambda i: step.token(*places[i]), cause
        )


def check_rejection_sampling(step: Step) -> None:
    """Rewards, selection, and fine-tuning on the selected responses."""
    config = step.config
    check_scores(step)
    selected = step.arrays["selected"].tolist()
    expected: list[int] = []
    for first in range(0, len(step.sequences), step.per_row):
        expected += best_of(step, range(first, first + step.per_row))
    cause = lambda i: "the responses selected are not the best ones of each prompt"  # noqa: E731
    step.compare("selection", selected, expected, None, lambda i: f"selected response {i}", cause)
    if not selected:
        return step.skip("training", "no response was selected")
    check_sft(step, selected[: config.batch.global_batch_size])


def best_of(step: Step, numbers: Sequence[int]) -> list[int]:
    """The responses to a prompt that rejection sampling keeps, best first."""
    config, kept, seen = step.config, [], set()
    for i in numbers:
        ids = tuple(step.sequences[i].ids)
        if config.truncated == "keep" or step.arrays["ended"][i]:
            if config.duplicates == "keep" or ids not in seen:
                kept.append(i)
            seen.add(ids)
    best = sorted(kept, key=lambda i: (-step.arrays["scores"][i], i))[: config.keep_top]
    least = -np.inf if config.min_reward is None else config.min_reward
    return [i for i in best if step.arrays["scores"][i] >= least]


def check_self_reward(step: Step) -> None:
    """The loss on the pairs, or rows, that a step of self-rewarding trains on."""
    config = step.config
    if "gaps" not in step.arrays:
        return check_sft(step, range(len(step.sequences)))
    average = config.average_logprobs
    sft_average = average if config.sft_average_logprobs is None else config.sft_average_logprobs
    check_dpo(step, step.arrays["gaps"].tolist(), config.beta[0], average, sft_average)


# ---- all -----------------------------------------------------------------------------------------


def run(step: Step) -> list[Stage]:
    """All stages of a step."""
    config = step.config
    check_data(step)
    if not step.sequences:
        step.skip("training", "the step has no row to train on")
        return step.stages
    rate = "train_optim/lr" if "train_optim/lr" in step.metrics else "train/lr"
    if step.script == "train_sft":
        check_sft(step, range(len(step.sequences)))
    elif step.script == "train_dpo":
        free = config.loss in ("simpo", "orpo")
        average = free if config.average_logprobs is None else config.average_logprobs
        sft_average = average if config.sft_average_logprobs is None else config.sft_average_logprobs
        beta = config.beta or (2.0 if config.loss == "simpo" else 0.1)
        gaps = [step.rows[number].numbers[0] for number in step.numbers]
        check_dpo(step, gaps, beta, average, sft_average)
    elif step.script == "train_rm":
        check_rm(step, [step.rows[number].numbers for number in step.numbers])
    else:
        checks = {"train_self_reward": check_self_reward, "train_rs": check_rejection_sampling}
        checks.get(step.script, check_rl)(step)
    check_lr(step, rate, config.optim.lr, config.optim.min_lr)
    if step.script == "train_ppo":
        check_lr(step, "train_optim/critic_lr", config.critic_lr, config.critic_min_lr)
    return step.stages
