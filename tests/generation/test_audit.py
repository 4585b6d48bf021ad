"""The audit of log-probs: it passes what agrees, and names the token that does not.

As a script this file is its own worker: what the audit says of each case, on two processes, to a file.
"""

import contextlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from align.data.packing import BatchConfig
from align.data.prompts import Prompt
from align.distributed import parallel
from align.distributed.parallel import ParallelConfig
from align.generation import audit, inference, rollout
from align.generation.audit import AuditConfig
from align.generation.generator import Generator, RolloutConfig
from align.generation.rollout import Sample
from align.generation.sampling import SamplingConfig
from align.model import architecture, gpt, huggingface, layers
from align.model.config import ModelConfig
from align.training import batching
from tests.support import grids
from tests.support.launch import fork_ranks
from tests.support.tokenizers import Letters

LAYOUTS = {"dp2": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "cp2": {"cp": 2}}
NUM_PROMPTS, ANSWERS, NEW_TOKENS = 16, 2, 12
FIRST_ROW = 100  # rows of the data are not numbered as they come
SAMPLING = SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=0.8)
DEFAULT = AuditConfig()
MEAN, MOST, _ = audit.BOUNDS[torch.float32]

Answers = list[tuple[int, int, Sample]]  # row, number of the answer, answer


# ---- worker --------------------------------------------------------------------------------------


def prompts() -> list[np.ndarray]:
    """Random prompts of 3 to 20 tokens."""
    rng = np.random.default_rng(5)
    return [rng.integers(3, 131, rng.integers(3, 21)).astype(np.int32) for _ in range(NUM_PROMPTS)]


class Setting:
    """A policy in a layout, and answers that it sampled."""

    def __init__(self, directory: Path, flags: dict[str, int]):
        layout, config = ParallelConfig(**flags), ModelConfig(model=str(directory), precision="fp32")
        grids.change(layout)
        arch = architecture.read_config(directory)
        policy = gpt.build_policy(arch, config, layout)
        huggingface.load(policy, huggingface.open_source(directory, arch, layout.seed))
        self.policy: DistributedDataParallel = gpt.distributed(policy)
        # Training's softmax leaves out the ids that this tokenizer lacks, as the sampler's does.
        letters = Letters(vocab_size=100)
        self.generator = Generator(self.policy, RolloutConfig(), SAMPLING, config, layout, letters)

    def sample(self) -> Answers:
        """Answers to all prompts, with the numbers of their rows. Collective."""
        streams = [(0, i) for i in range(NUM_PROMPTS)]
        groups = self.generator.generate(prompts(), streams, ANSWERS)
        return [
            (FIRST_ROW + row, k, answer)
            for row, answers in enumerate(groups)
            for k, answer in enumerate(answers)
        ]

    def check(self, answers: Answers, config: AuditConfig = DEFAULT) -> dict[str, float] | str:
        """The audit's metrics, or its message."""
        ids = prompts()
        rows = [
            [rollout.response_example(Prompt(ids[row - FIRST_ROW], {}), sample)] for row, _, sample in answers
        ]
        trained = batching.per_example_outputs(self.policy, rows, BatchConfig(micro_batch_tokens=200))
        places = [(row, number) for row, number, _ in answers]
        sampled = [sample.model_logprobs for *_, sample in answers]
        try:
            return audit.compare(places, sampled, trained, torch.float32, config=config)
        except RuntimeError as error:
            return str(error)


def altered(answers: Answers, place: tuple[int, int], change: Callable[[np.ndarray], np.ndarray]) -> Answers:
    """The answers, with other log-probs in one of them, that of (row, number)."""
    return [
        (
            row,
            k,
            replace(sample, model_logprobs=change(sample.model_logprobs)) if (row, k) == place else sample,
        )
        for row, k, sample in answers
    ]


def everywhere(answers: Answers, change: Callable[[Sample], np.ndarray]) -> Answers:
    """The answers with other log-probs in each."""
    return [(row, k, replace(sample, model_logprobs=change(sample))) for row, k, sample in answers]


def at(token: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    """Adds a value at one token."""

    def change(logprobs: np.ndarray) -> np.ndarray:
        logprobs = logprobs.copy()
        logprobs[token] += value
        return logprobs

    return change


@contextlib.contextmanager
def other_weights(policy: DistributedDataParallel) -> Iterator[None]:
    """Weights that are a little different, as after a small update."""
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1 + 1e-3 * torch.sin(1e4 * parameter))
    yield
    with torch.no_grad():
        for parameter, kept in zip(policy.parameters(), before, strict=True):
            parameter.copy_(kept)


def shifted_prefill(right: Callable) -> Callable:
    """A prefill that counts the positions of prompts from 1 instead of 0."""
    rotation = layers.rotary_cos_sin

    def prefill(self: inference.InferenceModel, prompts: list[Tensor]) -> list[inference.PrefilledPrompt]:
        with mock.patch.object(
            inference, "rotary_cos_sin", lambda places, *rest: rotation(places + 1, *rest)
        ):
            return right(self, prompts)

    return prefill


def shifted_decode(right: Callable) -> Callable:
    """A decode that puts each token one place too far."""

    def decode(self: inference.InferenceModel, tokens: Tensor, positions: Tensor) -> Tensor:
        self.reserve(int(positions.max()) + 2)
        return right(self, tokens, positions + 1)

    return decode


def wrong_samplers(setting: Setting) -> dict[str, dict[str, float] | str]:
    """The audit's results for samplers with something wrong in them."""
    shifted = shifted_prefill(inference.InferenceModel.prefill)
    ahead = shifted_decode(inference.InferenceModel.decode)
    results = {}
    with mock.patch.object(inference.InferenceModel, "prefill", shifted):
        results["rotation off by one"] = setting.check(setting.sample())
    with mock.patch.object(inference.InferenceModel, "decode", ahead):
        results["position off by one"] = setting.check(setting.sample())
    answers = setting.sample()
    with other_weights(setting.policy):
        results["stale weights"] = setting.check(answers)
        results["fresh weights"] = setting.check(setting.sample())
    results["weights of before"] = setting.check(answers)
    return results


def wrong_values(setting: Setting, answers: Answers) -> dict[str, dict[str, float] | str]:
    """The audit's results for wrong log-probs beside right responses."""
    places = [answers[i][:2] for i in (3, -4)]
    results = {
        "all by 1e-4": setting.check(everywhere(answers, lambda sample: sample.model_logprobs + 1e-4)),
        "shifted": setting.check(everywhere(answers, lambda sample: np.roll(sample.model_logprobs, 1))),
        "tempered": setting.check(everywhere(answers, lambda sample: sample.logprobs)),
        "one by 5e-4": setting.check(altered(answers, places[0], at(4, 5e-4))),
    }
    for i, place in enumerate(places):
        results[f"one by 0.01 {i} {place}"] = setting.check(altered(answers, place, at(4, 0.01)))
        results[f"one by -0.01 {i} {place}"] = setting.check(altered(answers, place, at(0, -0.01)))
        results[f"nan {i} {place}"] = setting.check(altered(answers, place, at(6, float("nan"))))
    return results


def cases(models: Path) -> Iterator[tuple[str, dict | str]]:
    """All cases, (name, what the audit says), the same on every rank but for what goes wrong."""
    for name, flags in LAYOUTS.items():
        setting = Setting(models / "llama", flags)
        answers = [item for item in setting.sample() if len(item[2].ids) == NEW_TOKENS]
        yield f"{name} right", setting.check(answers)
        yield f"{name} one answer", setting.check(answers[:1])
        count = sum(len(sample.ids) for *_, sample in answers)
        for outliers in (2, 3):
            wrong = answers
            for row, number, _ in (answers[0], answers[-1], answers[7])[:outliers]:
                wrong = altered(wrong, (row, number), at(5, 0.002))
            config = AuditConfig(audit_quantile=1 - 2.5 / count)
            yield f"{name} {outliers} wrong of {count}", setting.check(wrong, config)
        for case, result in (wrong_values(setting, answers) | wrong_samplers(setting)).items():
            yield f"{name} {case}", result


# ---- tests ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(models, tmp_path_factory) -> dict[str, list[dict | str]]:
    """The audit's results on each of two ranks, by case."""
    output = tmp_path_factory.mktemp("audit")
    fork_ranks(2, "tests/generation/test_audit.py", models, output)
    ranks = [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert list(ranks[0]) == list(ranks[1])
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def of(results: dict[str, list], pattern: str) -> dict[str, dict | str]:
    """Results of the cases whose whole name matches the pattern; equal on all ranks."""
    matching = {name: texts for name, texts in results.items() if re.fullmatch(pattern, name)}
    assert matching
    for name, (first, second) in matching.items():
        assert first == second, name
    return {name: first for name, (first, _) in matching.items()}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["right", "one answer", "fresh weights", "weights of before"])
def test_what_agrees_passes(layout, case, results):
    """Also with fewer answers than data parallel ranks, and after the weights have changed, and back."""
    [metrics] = of(results, f"{layout} {case}").values()
    names = {f"audit/logprob_{part}" for part in ("error", "error_quantile", "error_max", "bias")}
    assert set(metrics) == names, metrics
    assert 0 <= metrics["audit/logprob_error"] < MEAN / 10
    assert metrics["audit/logprob_error_quantile"] == metrics["audit/logprob_error_max"]  # in fp32
    assert metrics["audit/logprob_error"] <= metrics["audit/logprob_error_max"] < MOST / 10


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_token_within_the_bound_passes(layout, results):
    [metrics] = of(results, f"{layout} one by 5e-4").values()
    assert metrics["audit/logprob_error_max"] == pytest.approx(5e-4, rel=0.05)


NAMED = re.compile(
    r"audit: token (\d+) of response (\d+) to row (\d+) was sampled with log-prob (\S+), "
    r"training computes (\S+)\. They differ by (\S+)\. Of all (?:\d+) tokens the mean difference is (\S+) "
    r"\(--audit-mean 5e-05\), the maximum (?:\S+) \(--audit-tail 0\.001\): "
    r"the sampler and the trainer do not compute the same model"
)


def named(message: dict | str) -> tuple[tuple[int, int, int], tuple[float, ...]]:
    """(row, answer, token) of a message, and its numbers: sampled, trained, largest and mean difference."""
    assert isinstance(message, str), message
    token, number, row, *values = NAMED.fullmatch(message).groups()
    return (int(row), int(number), int(token)), tuple(map(float, values))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "token"), [(0.01, 4), (-0.01, 0)])
def test_one_wrong_token_is_named(layout, size, token, results):
    """By its largest error alone: the mean stays within its bound."""
    matching = of(results, rf"{layout} one by {size} .*")
    assert len(matching) == 2
    for name, message in matching.items():
        row, number = map(int, re.search(r"\((\d+), (\d+)\)", name).groups())
        place, (sampled, trained, largest, mean) = named(message)
        assert place == (row, number, token), name
        assert sampled - trained == pytest.approx(size, abs=1e-4)
        assert largest == pytest.approx(0.01, rel=0.01) and mean < MEAN


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_is_named(layout, results):
    matching = of(results, rf"{layout} nan .*")
    assert len(matching) == 2
    for name, message in matching.items():
        row, number = map(int, re.search(r"\((\d+), (\d+)\)", name).groups())
        place, (sampled, trained, *_) = named(message)
        assert place == (row, number, 6), name
        assert np.isnan(sampled) and np.isfinite(trained)


def test_a_ratio_that_is_not_1_is_refused():
    bound = audit.ratio_bound(None, torch.bfloat16, is_exact=True)
    assert bound == audit.ratio_bound(None, torch.float32, is_exact=True) == 1e-5
    assert [audit.ratio_bound(None, dtype, is_exact=False) for dtype in audit.BOUNDS] == [1e-4, 0.1]
    for error in (0.0, 9e-6):
        assert audit.check_ratio(error, bound) == {"audit/ratio_error": error}
    for error in (1.1e-5, 0.3, math.nan):
        words = rf"ratio is off 1 by {error:.2g} on average \(--audit-ratio 1e-05\)"
        with pytest.raises(RuntimeError, match=words):
            audit.check_ratio(error, bound)


# ---- bounds ----------------------------------------------------------------------------------------


def differing(count: int, outliers: int, size: float) -> tuple[list, list[np.ndarray], list[np.ndarray]]:
    """Answers of up to 100 of `count` tokens, of which some differ by `size`, the others by 0.03 to 0.04."""
    rng = np.random.default_rng(count)
    errors = rng.uniform(0.03, 0.04, count) * rng.choice([-1, 1], count)
    errors[rng.permutation(count)[:outliers]] = size
    trained = np.split(rng.uniform(-9, 0, count), range(100, count, 100))
    sampled = [a + b for a, b in zip(trained, np.split(errors, range(100, count, 100)), strict=True)]
    return [(row, 0) for row in range(len(trained))], sampled, trained


@pytest.mark.parametrize(
    ("count", "forgiven"),
    [(23_274, 2), (20_000, 2), (19_999, 1), (10_001, 1), (10_000, 1), (9_999, 0), (500, 0), (1, 0)],
)
def test_bf16_forgives_one_token_in_10_000(count, forgiven):
    """The 0.9999 quantile of n differences is the largest but floor(n / 10,000): below 10,000 the maximum."""
    for outliers in range(forgiven + 2):
        logprobs = differing(count, min(outliers, count), 7.0)
        if outliers <= forgiven:
            metrics = audit.compare(*logprobs, torch.bfloat16)
            assert metrics["audit/logprob_error_quantile"] < 0.04 + 1e-9
            assert metrics["audit/logprob_error_max"] == pytest.approx(7.0 if outliers else 0.04, rel=0.25)
        elif count > 1:
            words = rf"differ by 7\. Of all {count} tokens .* the 0\.9999 quantile 7 \(--audit-tail 2\)"
            with pytest.raises(RuntimeError, match=words):
                audit.compare(*logprobs, torch.bfloat16)
    if forgiven:  # in fp32 nothing is
        with pytest.raises(RuntimeError, match=r"the maximum 0\.01 \(--audit-tail 0\.001\)"):
            audit.compare(*altered_by(differing(count, 0, 0.0), 0.01), torch.float32)
    logprobs = differing(count, 0, 0.0)
    logprobs[1][0][0] = math.nan  # whose quantile is no number, wherever it stands
    with pytest.raises(
        RuntimeError, match="audit: token 0 of response 0 to row 0 was sampled with log-prob nan"
    ):
        audit.compare(*logprobs, torch.bfloat16)


def altered_by(logprobs: tuple[list, list[np.ndarray], list[np.ndarray]], size: float) -> tuple:
    """Answers whose log-probs agree but for one token."""
    places, _, trained = logprobs
    sampled = [part.copy() for part in trained]
    sampled[-1][-1] += size
    return places, sampled, trained


def test_bounds_of_flags():
    """Those of the precision unless given; at a temperature below 1 divided by it, above 1 as they are."""
    assert AuditConfig().bounds(torch.bfloat16) == (0.1, 2.0, 0.9999)
    assert AuditConfig().bounds(torch.float32) == (5e-5, 1e-3, 1.0)
    own = AuditConfig(audit_mean=0.5, audit_tail=math.inf, audit_quantile=0.9)
    assert own.bounds(torch.float32) == (0.5, math.inf, 0.9)
    logprobs = altered_by(differing(100, 0, 0.0), 0.0015)  # a mean of 1.5e-5
    for temperature, config, passes in (
        (1.0, AuditConfig(), False),
        (2.0, AuditConfig(), False),
        (0.5, AuditConfig(), True),
        (1.0, AuditConfig(audit_tail=0.002), True),
        (1.0, AuditConfig(audit_tail=0.002, audit_mean=1e-5), False),
        (1.0, AuditConfig(audit_quantile=0.99), True),
        (1.0, AuditConfig(audit_tail=math.inf), True),
    ):
        if passes:
            audit.compare(*logprobs, torch.float32, temperature, config)
        else:
            with pytest.raises(RuntimeError, match="do not compute the same model"):
                audit.compare(*logprobs, torch.float32, temperature, config)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_quantile_is_over_the_tokens_of_all_ranks(layout, results):
    """One that leaves out two tokens of all: two wrong ones, on several ranks, pass; three do not."""
    [(name, metrics)] = of(results, rf"{layout} 2 wrong of \d+").items()
    assert metrics["audit/logprob_error_quantile"] < MOST < metrics["audit/logprob_error_max"], name
    [message] = of(results, rf"{layout} 3 wrong of \d+").values()
    assert isinstance(message, str) and "(--audit-tail 0.001)" in message


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_small_error_at_every_token_is_caught(layout, results):
    """By the mean alone."""
    [message] = of(results, f"{layout} all by 1e-4").values()
    (row, number, token), (_, _, largest, mean) = named(message)
    assert FIRST_ROW <= row < FIRST_ROW + NUM_PROMPTS and number < ANSWERS and token < NEW_TOKENS
    assert mean == pytest.approx(1e-4, rel=0.1) and largest < MOST


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case", ["stale weights", "shifted", "tempered", "rotation off by one", "position off by one"]
)
def test_a_wrong_sampler_is_caught(layout, case, results):
    """Weights that changed since, log-probs of the token before, of another temperature, positions."""
    [message] = of(results, f"{layout} {case}").values()
    (row, number, token), (sampled, trained, largest, mean) = named(message)
    assert FIRST_ROW <= row < FIRST_ROW + NUM_PROMPTS and number < ANSWERS and token < NEW_TOKENS
    assert largest > MOST and mean > MEAN
    assert abs(sampled - trained) == pytest.approx(largest, rel=0.1)


# ---- sums over many tokens -------------------------------------------------------------------------


def test_clustered_mean_by_hand():
    """Rows 7 and 9 with sums 1 + 2 + 3 and 6 + 8 of 5 tokens: mean 4, deviations -6 and 6.

    The standard error is sqrt((36 + 36) 2 / 1) / 5 = 12 / 5; of one row there is none.
    """
    parts = [np.array([1.0, 2.0]), np.array([6.0, 8.0]), np.array([3.0])]
    assert audit.clustered_mean([7, 9, 7], parts) == (4.0, pytest.approx(2.4))
    assert audit.clustered_mean([7, 7, 7], parts) == (4.0, math.inf)


def noisy(bias: float, rows: int = 40, seed: int = 0) -> tuple[list, list[np.ndarray], list[np.ndarray]]:
    """Responses of 50 tokens whose two log-probs differ by noise of 0.05 nats and a bias."""
    rng = np.random.default_rng(seed)
    trained = list(rng.uniform(-9, 0, (rows, 50)))
    return [(row, 0) for row in range(rows)], [x + rng.normal(bias, 0.05, 50) for x in trained], trained


def test_a_bias_within_the_bound_on_the_mean_is_caught():
    """bf16: of 0.1 nats on the mean a fifth, 0.02, is for the bias; its error is 0.05 / sqrt(2000)."""
    for seed in range(20):
        metrics = audit.compare(*noisy(0.0, seed=seed), torch.bfloat16)
        assert abs(metrics["audit/logprob_bias"]) < 0.005
        audit.compare(*noisy(0.015, seed=seed), torch.bfloat16)
        for sign in (1, -1):
            words = rf"log-probs are [{'-+'[sign > 0]}]0\.0[23]\d* nats off .* in one direction"
            with pytest.raises(RuntimeError, match=words):
                audit.compare(*noisy(0.03 * sign, seed=seed), torch.bfloat16)
    audit.compare(*noisy(0.03), torch.bfloat16, config=AuditConfig(audit_mean=0.2))  # the flag widens it
    audit.compare(*noisy(0.03, rows=1), torch.bfloat16)  # a single row tells nothing of its own noise


def draws(probabilities: np.ndarray, drawn_from: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs under one distribution of tokens drawn from another, and entropies of the first."""
    tokens = np.random.default_rng(1).choice(len(probabilities), count, p=drawn_from)
    entropy = -(probabilities * np.log(probabilities)).sum()
    return np.log(probabilities)[tokens], np.full(count, entropy)


def test_tokens_of_another_distribution_are_caught():
    """p with H = 1.28; tokens of p^2 / Z have -log p of 1.14 on average, 0.14 nats less."""
    p = np.array([0.4, 0.3, 0.2, 0.1])
    sharper = p**2 / (p**2).sum()
    right = audit.check_surprise(*draws(p, p, 20_000), 4, torch.float32)
    assert abs(right["audit/surprise"]) < 0.02
    with pytest.raises(RuntimeError, match=r"have -log p of -0\.1\d nats beside the entropy .* over 20000 "):
        audit.check_surprise(*draws(p, sharper, 20_000), 4, torch.float32)
    audit.check_surprise(*draws(p, sharper, 100), 4, torch.float32)  # too few tokens to tell


def test_rare_tokens_are_no_false_alarm():
    """p = 0.99 and 0.01: of 200 tokens the rare one may be missing, which no empirical variance shows."""
    p = np.array([0.99, 0.01])
    for count in (200, 5000):
        audit.check_surprise(
            np.full(count, math.log(0.99)), np.full(count, -(p * np.log(p)).sum()), 2, torch.float32
        )


def test_the_loss_of_a_first_update():
    """-1 + 3 - 4 over 2 tokens is -1, of a mean size of 4; half of it, or its negative, is another loss."""
    terms = torch.tensor([-1.0, 3.0, -4.0])
    assert audit.check_update(-1.0, terms, 2.0, 1e-5) == {"audit/loss_error": 0.0}
    assert audit.check_update(-1.0 + 3e-5, terms, 2.0, 1e-5)["audit/loss_error"] == pytest.approx(7.5e-6)
    assert audit.check_update(0.0, torch.zeros(2), 2.0, 1e-5) == {"audit/loss_error": 0.0}
    with pytest.raises(
        RuntimeError, match=r"give -0\.5 for a ratio of 1, which is 0\.49 \(--audit-ratio 1e-05\)"
    ):
        audit.check_update(-0.5, terms, 4.0, 1e-5, mean_ratio=0.49)
    for loss in (-0.5, 1.0, math.nan):
        with pytest.raises(RuntimeError, match=rf"has the loss {loss:g}, its advantages and KL give -1 "):
            audit.check_update(loss, terms, 2.0, 1e-5)


def test_advantages_of_a_prompt_add_up_to_0():
    """Wherever its responses stand; those that are left out do not count."""
    places, advantages = [(5, 0), (8, 0), (5, 1), (8, 1)], torch.tensor([1.0, 2.0, -1.0, -2.0])
    counted = torch.ones(4, dtype=torch.bool)
    audit.check_groups(places, advantages, counted)
    audit.check_groups(places, 1e6 + advantages - 1e6, counted)
    audit.check_groups(places, torch.tensor([1.0, 9.0, -1.0, 0.0]), torch.tensor([True, False, True, True]))
    for wrong in ([1.0, 2.0, -1.0, -2.1], [1.0, -1.0, 2.0, -2.0], [math.nan, 0.0, 0.0, 0.0]):
        with pytest.raises(RuntimeError, match=r"responses to row [58] add up to \S+, not to 0"):
            audit.check_groups(places, torch.tensor(wrong), counted)


if __name__ == "__main__":
    models, output = map(Path, sys.argv[1:])
    with parallel.start(ParallelConfig()):
        results = dict(cases(models))
        (output / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
