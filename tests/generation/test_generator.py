"""Generation against transformers, in every layout; what a sample may depend on, and what not."""

import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from transformers.generation import logits_process

from align.data import packing
from align.distributed import parallel
from align.distributed.parallel import ParallelConfig
from align.errors import UserError
from align.generation import generator
from align.generation.generator import Queue, RolloutConfig, check_model_logprobs, check_rollout_tp
from align.generation.rollout import Sample
from align.generation.sampling import SamplingConfig
from tests.support.generation import (
    BF16,
    FP32,
    GREEDY,
    NEW_TOKENS,
    SAMPLED,
    SAMPLES,
    WARPED,
    network,
    prompts,
    sample,
    transformers_greedy,
)
from tests.support.sampling import CHI_SQUARE_999, exact
from tests.support.tokenizers import Letters
from tests.workers.generator import change

LAYOUTS = {  # name: processes, training layout, rollout flags
    "one": (1, {}, {}),
    "one-few-slots": (1, {}, {"rollout_slots": 5}),
    "tp2-same": (2, {"tp": 2}, {"rollout_layout": "same", "rollout_slots": 16}),
    "tp2-reshard": (2, {"tp": 2}, {"rollout_slots": 16}),
    "pp2-same": (2, {"pp": 2}, {"rollout_layout": "same", "rollout_slots": 16}),
    "pp2-reshard": (2, {"pp": 2}, {"rollout_slots": 16}),
    "pp2-to-tp2": (2, {"pp": 2}, {"rollout_tp": 2, "rollout_slots": 16}),
    "dp2": (2, {}, {"rollout_slots": 16}),
    "dp2-fixed": (2, {"deterministic": True}, {"rollout_slots": 7}),
    "cp2": (2, {"cp": 2}, {}),
    "tp4-same": (4, {"tp": 4}, {"rollout_layout": "same"}),  # two ranks share a key-value head
    "tp2-pp2-same": (4, {"tp": 2, "pp": 2}, {"rollout_layout": "same"}),
    "tp2-pp2-reshard": (4, {"tp": 2, "pp": 2}, {}),
    "tp2-sp-dp2": (4, {"tp": 2, "sequence_parallel": True}, {"rollout_slots": 9}),
    "dp4-to-tp2": (4, {}, {"rollout_layout": "reshard", "rollout_tp": 2}),
}
FOUR = ("qwen2", "nemotron")  # families that are tried in the layouts of four processes, which take long
PENALTY = 1.3  # repetition penalty of greedy answers
LIKELIHOOD = ("llama", "qwen3", "mistral")  # families whose log-probs are compared
DRAWS = {"max_new_tokens": 2, "temperature": 1.4, "top_k": 4, "top_p": 0.95}
NUM_DRAWS = 4000
KNOWN = 40  # ids of a tokenizer with fewer than the model has


Answer = tuple[list[int], list[float], list[float], str]  # ids, logprobs, model_logprobs, finish
Run = Callable[[int], dict[str, dict]]  # number of processes -> what workers/generator.py found, by case


def long_prompts() -> list[list[int]]:
    """Random prompts that leave less room than NEW_TOKENS in the tiny models' context of 256."""
    rng = np.random.default_rng(4)
    return [rng.integers(3, 131, length).tolist() for length in (246, 250, 255)]


# ---- transformers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def greedy(models) -> dict[str, list[list[int]]]:
    """transformers' greedy answers of each family."""
    return {name: transformers_greedy(network(models / name), prompts(), NEW_TOKENS) for name in families(1)}


def families(processes: int) -> tuple[str, ...]:
    two = ("llama", "qwen3", "mistral")
    return {1: ("llama3", "stablelm", *two, *FOUR), 2: two, 4: FOUR}[processes]


# ---- the cases of each number of processes -------------------------------------------------------


def layouts(processes: int) -> dict[str, dict]:
    """Flags of each layout of so many processes."""
    return {
        name: {"parallel": layout, "rollout": rollout}
        for name, (count, layout, rollout) in LAYOUTS.items()
        if count == processes
    }


def shared_cases(processes: int, models: Path) -> dict[str, dict]:
    """Greedy answers of all families and sampled ones of one, in each layout."""
    cases = {}
    for name, flags in layouts(processes).items():
        for family in families(processes):
            case = {"model": str(models / family), "prompts": prompts(), "sampling": GREEDY, **flags}
            # the copy is freed and filled again
            cases[f"greedy {family} {name}"] = case | {"rounds": 2 if name == "tp2-reshard" else 1}
        case = {"model": str(models / "llama"), "prompts": prompts(), "samples": SAMPLES, **flags}
        cases[f"sampled {name}"] = case | {"sampling": SAMPLED}
    return cases


def cases_of_some_layouts(processes: int, models: Path, greedy: dict[str, list]) -> dict[str, dict]:
    """Repetition penalty, stop strings and changed weights, in layouts of one and two processes."""
    cases = {}
    for name, flags in layouts(processes).items():
        case = {"model": str(models / "llama"), "prompts": prompts(), **flags}
        if name in ("one-few-slots", "tp2-same", "pp2-same", "dp2"):
            cases[f"penalty {name}"] = case | {"sampling": {**GREEDY, "repetition_penalty": PENALTY}}
        if name in ("one-few-slots", "pp2-same"):
            cases[f"stop {name}"] = case | {"sampling": {**GREEDY, "stop": stops(greedy["llama"])}}
        if name in ("one", "tp2-same", "tp2-reshard", "pp2-reshard", "pp2-to-tp2"):
            cases[f"changed {name}"] = case | {"sampling": GREEDY, "rounds": 2, "change": True}
    return cases


def cases_of_one(models: Path) -> dict[str, dict]:
    """Cases for which one process is enough."""
    llama = {"model": str(models / "llama"), "samples": SAMPLES, "sampling": SAMPLED}
    greedy = {"model": str(models / "llama"), "sampling": GREEDY}
    order = list(range(64))[::-1]
    cases = {
        "reversed": llama | {"prompts": prompts()[::-1], "streams": [(0, i) for i in order]},
        "alone": llama | {"prompts": prompts()[5:6], "streams": [(0, 5)]},
        "one slot": llama | {"prompts": prompts()[:8], "rollout": {"rollout_slots": 1}},
        "fewer slots than samples": llama | {"prompts": prompts()[:8], "rollout": {"rollout_slots": 2}},
        "other seed": llama | {"prompts": prompts()[:8], "parallel": {"seed": 4321}},
        "other streams": llama | {"prompts": prompts()[:8], "streams": [(1, i) for i in range(8)]},
        "budget": greedy | {"prompts": prompts(), "prefill_tokens": 30},
        "one token": greedy | {"prompts": prompts(), "sampling": {**GREEDY, "max_new_tokens": 1}},
        "context": greedy | {"prompts": long_prompts()},
        "draws": greedy
        | {"prompts": prompts()[:1], "sampling": DRAWS, "samples": NUM_DRAWS}
        | {"rollout": {"rollout_slots": 500}},
        "absent ids": {**llama, "vocab_size": KNOWN, "sampling": DRAWS}
        | {"prompts": [[i % KNOWN for i in ids] for ids in prompts()[:8]], "samples": 20},
        "empty prompt": greedy | {"prompts": [[5], []]},
        "full context": greedy | {"prompts": [[5] * 256]},
    }
    for family, precision in [(name, "fp32") for name in LIKELIHOOD] + [("llama", "bf16")]:
        case = {"model": str(models / family), "precision": precision, "prompts": prompts()[:32]}
        cases[f"likelihood {family} {precision}"] = case | {
            "sampling": {"max_new_tokens": NEW_TOKENS, **WARPED},
            "samples": 2,
        }
    return cases


@pytest.fixture(scope="module")
def ran(models, greedy, tmp_path_factory) -> Run:
    """Samples of all cases of a number of processes, in one start, at the first call."""
    by_processes: dict[int, dict] = {}

    def run(processes: int) -> dict[str, dict]:
        if processes not in by_processes:
            cases = shared_cases(processes, models)
            if processes < 4:
                cases |= cases_of_some_layouts(processes, models, greedy)
            if processes == 1:
                cases |= cases_of_one(models)
            if processes == 2:
                case = {"model": str(models / "llama"), "prompts": [[5]], "sampling": GREEDY}
                cases["rollout tp"] = case | {"rollout": {"rollout_tp": 3}}
            by_processes[processes] = sample(tmp_path_factory.mktemp("generate"), processes, cases)
        return by_processes[processes]

    return run


def first_answers(result: dict) -> list[list[int]]:
    """The ids of the only answer to each prompt."""
    return [ids for [(ids, _, _, _)] in result["answers"]]


def finishes(result: dict) -> list[str]:
    """Finish reason of the only response to each prompt."""
    return [finish for [(_, _, _, finish)] in result["answers"]]


# ---- greedy answers ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_greedy_tokens_are_those_of_transformers(processes, greedy, ran):
    """64 prompts of mixed lengths in every layout; some answers end early, some at the limit."""
    for name in layouts(processes):
        for family in families(processes):
            result, expected = ran(processes)[f"greedy {family} {name}"], greedy[family]
            assert first_answers(result) == expected, (family, name)
            wanted = ["stop" if ids[-1] == 2 else "length" for ids in expected]
            assert finishes(result) == wanted, (family, name)
    assert {"stop", "length"} == set(wanted)


@pytest.mark.slow
def test_one_new_token(greedy, ran):
    result = ran(1)["one token"]
    assert first_answers(result) == [ids[:1] for ids in greedy["llama"]]
    assert set(finishes(result)) <= {"stop", "length"}


@pytest.mark.slow
def test_an_answer_ends_with_the_context(models, ran):
    """Prompts of 246, 250 and 255 tokens in a context of 256."""
    result, expected = ran(1)["context"], transformers_greedy(network(models / "llama"), long_prompts(), 12)
    assert [len(ids) for ids in expected] == [10, 6, 1], "an answer that stops by itself shows nothing"
    assert first_answers(result) == expected
    assert finishes(result) == ["length"] * 3


@pytest.fixture(scope="module")
def penalised(models) -> list[list[int]]:
    policy = network(models / "llama")
    return transformers_greedy(policy, prompts(), NEW_TOKENS, repetition_penalty=PENALTY)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one-few-slots", "tp2-same", "pp2-same", "dp2"])
def test_repetition_penalty_is_that_of_transformers(name, penalised, greedy, ran):
    """Sequences change slots when others end, and with them what they have seen."""
    assert first_answers(ran(LAYOUTS[name][0])[f"penalty {name}"]) == penalised
    assert penalised != greedy["llama"]


# ---- what ends an answer -------------------------------------------------------------------------


def pairs_of(answers: list[list[int]]) -> list[tuple[int, int]]:
    """Two neighbouring tokens of each of the first 12 answers that are long enough, from the middle."""
    return [(ids[4], ids[5]) for ids in answers[:12] if len(ids) > 7]


def stops(answers: list[list[int]]) -> list[str]:
    """`pairs_of` as stop strings, each of two tokens."""
    return [Letters().decode(list(pair)) for pair in pairs_of(answers)]


def cut(ids: list[int], pairs: list[tuple[int, int]]) -> list[int]:
    """The ids up to the end of the first of the pairs."""
    for end in range(2, len(ids) + 1):
        if tuple(ids[end - 2 : end]) in pairs:
            return ids[:end]
    return ids


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one-few-slots", "pp2-same"])
def test_stop_strings_of_two_tokens(name, greedy, ran):
    """Answers are the greedy ones up to the first stop string, and text() leaves that out."""
    pairs, ends = pairs_of(greedy["llama"]), stops(greedy["llama"])
    result = ran(LAYOUTS[name][0])[f"stop {name}"]
    expected = [cut(ids, pairs) for ids in greedy["llama"]]
    assert first_answers(result) == expected
    stopped = [tuple(ids[-2:]) in pairs for ids in expected]
    assert sum(stopped) >= 5 and not all(stopped)
    for ids, finish, by_text in zip(expected, finishes(result), stopped, strict=True):
        assert finish == ("stop" if by_text or ids[-1] == 2 else "length")
        wanted = ids[:-2] if by_text else ids[:-1] if ids[-1] == 2 else ids
        assert sample_of(ids, finish).text(Letters(), tuple(ends)) == Letters().decode(wanted)


def sample_of(ids: list[int], finish: str = "stop") -> Sample:
    zeros = np.zeros(len(ids), np.float32)
    return Sample(np.array(ids, np.int32), zeros, zeros, finish)


class Pieces:
    """A tokenizer whose tokens have several characters; 9 ends an answer."""

    stop_ids = {9}
    stop_strings, chat = (), None
    pieces = {0: "ab", 1: "cd", 2: "\n\nQ", 9: "<end>"}

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


@pytest.mark.parametrize(
    ("ids", "stop", "text"),
    [
        ([0, 1, 9], (), "abcd"),  # the stop token is no text
        ([9], (), ""),
        ([0, 1], (), "abcd"),  # cut off by the limit
        ([0, 1], ("bc",), "a"),  # across tokens
        ([1, 0, 1, 2], ("\n\n",), "cdabcd"),  # what follows it in its token goes as well
        ([1, 0, 1, 2], ("\n\n", "ab", "d\n"), "cd"),  # the first in the text, whatever the order
        ([0, 0, 9], ("cd",), "abab"),
        ([9, 0, 9], (), "<end>ab"),  # only at the end is it what ended the answer
    ],
)
def test_text_of_an_answer(ids, stop, text):
    assert sample_of(ids).text(Pieces(), stop) == text


# ---- sampled answers: what they depend on --------------------------------------------------------


def assert_same(answers: list[list[Answer]], expected: list[list[Answer]], name: str) -> None:
    """The same tokens and ends, and log-probs up to rounding."""
    for samples, wanted in zip(answers, expected, strict=True):
        for (ids, *logprobs, finish), (ids_, *logprobs_, finish_) in zip(samples, wanted, strict=True):
            assert (ids, finish) == (ids_, finish_), name
            assert len(logprobs[0]) == len(logprobs[1]) == len(ids), name
            np.testing.assert_allclose(logprobs, logprobs_, rtol=0, atol=FP32[1], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_sampled_answers_are_the_same_in_every_layout(processes, ran):
    """With --deterministic and without, with few slots and many."""
    expected = ran(1)["sampled one"]["answers"]
    for name in layouts(processes):
        assert_same(ran(processes)[f"sampled {name}"]["answers"], expected, name)
    answers = [tuple(ids) for samples in expected for ids, *_ in samples]
    assert len(answers) == 64 * SAMPLES and len(set(answers)) > 100
    assert {finish for samples in expected for *_, finish in samples} == {"stop", "length"}


@pytest.mark.slow
def test_what_is_sampled_beside_an_answer_does_not_matter(ran):
    """The order of the prompts, a prompt alone, one slot, fewer slots than answers to a prompt."""
    expected = ran(1)["sampled one"]["answers"]
    assert_same(ran(1)["reversed"]["answers"][::-1], expected, "reversed")
    assert_same(ran(1)["alone"]["answers"], expected[5:6], "alone")
    assert_same(ran(1)["one slot"]["answers"], expected[:8], "one slot")
    assert_same(ran(1)["fewer slots than samples"]["answers"], expected[:8], "fewer slots than samples")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["other seed", "other streams"])
def test_other_random_numbers_give_other_answers(name, ran):
    expected, answers = ran(1)["sampled one"]["answers"][:8], ran(1)[name]["answers"]
    same = [a[0] == b[0] for x, y in zip(answers, expected, strict=True) for a, b in zip(x, y, strict=True)]
    assert len(same) == 8 * SAMPLES and sum(same) <= 4
    for samples in answers:  # and the answers to one prompt differ among themselves
        assert len({tuple(ids) for ids, *_ in samples}) > 1


# ---- sampled answers: their log-probs ------------------------------------------------------------


@torch.no_grad()
def transformers_logprobs(
    policy: transformers.PreTrainedModel, prompt: list[int], ids: list[int]
) -> list[list[float]]:
    """Log-probs of an answer under the distribution drawn from, by transformers' warpers, and the model's."""
    warpers = transformers.LogitsProcessorList(
        [
            logits_process.RepetitionPenaltyLogitsProcessor(WARPED["repetition_penalty"]),
            logits_process.TemperatureLogitsWarper(WARPED["temperature"]),
            logits_process.TopKLogitsWarper(WARPED["top_k"]),
            logits_process.TopPLogitsWarper(WARPED["top_p"]),
        ]
    )
    whole = torch.tensor([prompt + ids])
    logits, drawn, plain = policy(whole).logits[0], [], []
    for end, token in enumerate(ids, len(prompt)):
        row = logits[end - 1 : end]
        drawn.append(warpers(whole[:, :end], row.clone()).double().log_softmax(-1)[0, token].item())
        plain.append(row.double().log_softmax(-1)[0, token].item())
    return [drawn, plain]


def logprob_errors(policy: transformers.PreTrainedModel, answers: list[list[Answer]]) -> np.ndarray:
    """Ours less those of transformers, [2, tokens]: under the distribution drawn from, under the model."""
    errors = []
    for prompt, samples in zip(prompts(), answers, strict=False):
        for ids, *logprobs, _ in samples:
            errors.append(np.array(logprobs) - transformers_logprobs(policy, prompt, ids))
    return np.concatenate(errors, 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", LIKELIHOOD)
def test_logprobs_are_those_of_transformers(family, models, ran):
    """Mistral's window of 7 tokens is shorter than most prompts."""
    exact_policy = network(models / family).double()
    errors = np.abs(logprob_errors(exact_policy, ran(1)[f"likelihood {family} fp32"]["answers"]))
    assert errors.shape[1] > 32 * 2 * 6
    assert errors.mean() <= FP32[0] and errors.max() <= FP32[1]


@pytest.mark.slow
def test_logprobs_in_bf16(models, ran):
    """The model's log-probs are those of its bf16 weights. (Those of the distribution drawn from are of
    another set of tokens, where rounding decides which are among the 20 likeliest.)"""
    policy = network(models / "llama").bfloat16().float()
    _, errors = logprob_errors(policy, ran(1)["likelihood llama bf16"]["answers"])
    assert np.abs(errors).mean() <= BF16[0] and np.abs(errors).max() <= BF16[1]


@pytest.mark.slow
def test_ids_without_a_token_have_no_probability(models, ran):
    """transformers' logits of the known ids alone: the same draws, log-probs and answers."""
    policy, drawn = network(models / "llama"), Counter()
    for ids, samples in zip(prompts()[:8], ran(1)["absent ids"]["answers"], strict=True):
        prompt = [i % KNOWN for i in ids]
        with torch.no_grad():
            logits = policy(torch.tensor([prompt])).logits[0, -1, :KNOWN]
        shares = exact(logits, torch.zeros(KNOWN, dtype=torch.bool), SamplingConfig(**DRAWS))
        plain = logits.double().log_softmax(-1)
        for (first, *rest), logprobs, model_logprobs, _ in samples:
            assert max([first, *rest]) < KNOWN
            assert math.exp(logprobs[0]) == pytest.approx(shares[first], abs=1e-5)
            assert model_logprobs[0] == pytest.approx(plain[first].item(), abs=FP32[1])
            drawn[first] += 1
    assert len(drawn) > 5


# ---- sampled answers: their distribution ---------------------------------------------------------


def chances(policy: transformers.PreTrainedModel, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """The exact probability of each answer of two tokens, or of the end token alone."""

    def following(ids: list[int]) -> list[tuple[int, float]]:
        with torch.no_grad():
            logits = policy(torch.tensor([ids])).logits[0, -1]
        shares = exact(logits, torch.zeros(len(logits), dtype=torch.bool), SamplingConfig(**DRAWS))
        return [(token, share) for token, share in enumerate(shares) if share > 0]

    probabilities = {}
    for first, share in following(prompt):
        if first == 2:
            probabilities[first,] = share
            continue
        probabilities |= {(first, second): share * rest for second, rest in following([*prompt, first])}
    return probabilities


def chi_square(counts: Counter, chances: dict) -> tuple[float, int]:
    """The statistic and its degrees of freedom; outcomes expected less than 5 times count as one."""
    total, statistic, rare, cells = sum(counts.values()), 0.0, [0.0, 0], 0
    for outcome, chance in chances.items():
        if chance * total < 5:
            rare = [rare[0] + chance * total, rare[1] + counts[outcome]]
        else:
            statistic += (counts[outcome] - chance * total) ** 2 / (chance * total)
            cells += 1
    if rare[0] > 0:
        statistic += (rare[1] - rare[0]) ** 2 / rare[0]
        cells += 1
    return statistic, cells - 1


@pytest.mark.slow
def test_answers_of_two_tokens_are_drawn_with_their_exact_probabilities(models, ran):
    """4,000 answers to one prompt: chi-square of first tokens and of pairs below the 99.9 % quantiles."""
    expected = chances(network(models / "llama"), prompts()[0])
    assert sum(expected.values()) == pytest.approx(1)
    [answers] = ran(1)["draws"]["answers"]
    counts = Counter(tuple(ids) for ids, *_ in answers)
    assert sum(counts.values()) == NUM_DRAWS and set(counts) <= set(expected)
    firsts, first_chances = Counter(), Counter()
    for outcome, count in counts.items():
        firsts[outcome[0]] += count
    for outcome, chance in expected.items():
        first_chances[outcome[0]] += chance
    assert len(first_chances) >= 3 and len(expected) >= 8
    for observed, wanted in ((firsts, first_chances), (counts, expected)):
        statistic, freedom = chi_square(observed, wanted)
        assert statistic < CHI_SQUARE_999[freedom - 1], (statistic, freedom)


# ---- reading prompts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "budget", "runs"),
    [
        ([], 10, []),
        ([3], 10, [range(0, 1)]),
        ([4, 6, 1], 10, [range(0, 2), range(2, 3)]),  # 10 fit
        ([4, 7, 3, 1], 10, [range(0, 1), range(1, 3), range(3, 4)]),
        ([11, 2, 12, 12, 3], 10, [range(0, 1), range(1, 2), range(2, 3), range(3, 4), range(4, 5)]),
        ([1, 1, 1, 1, 1], 2, [range(0, 2), range(2, 4), range(4, 5)]),
    ],
)
def test_runs_within_a_budget(sizes, budget, runs):
    assert packing.group_by_budget(sizes, budget) == runs


@pytest.mark.slow
def test_prompts_are_read_within_the_budget_unless_one_alone_is_above_it(greedy, ran):
    """Each of 64 prompts of 1 to 40 tokens once, 30 tokens in a pass."""
    result = ran(1)["budget"]
    assert first_answers(result) == greedy["llama"]
    passes = result["passes"]
    assert [length for lengths in passes for length in lengths] == [len(ids) for ids in prompts()]
    assert all(sum(lengths) <= 30 or len(lengths) == 1 for lengths in passes)
    assert any(len(lengths) > 1 for lengths in passes) and any(sum(lengths) > 30 for lengths in passes)


# ---- copies of the weights -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "tp2-same", "tp2-reshard", "pp2-reshard", "pp2-to-tp2"])
def test_answers_follow_the_weights(name, models, greedy, ran):
    """After a rollout the policy's weights change in place, as an update changes them; then come these."""
    policy = network(models / "llama")
    change(policy)
    expected = transformers_greedy(policy, prompts(), NEW_TOKENS)
    assert sum(a != b for a, b in zip(expected, greedy["llama"], strict=True)) > 32
    assert first_answers(ran(LAYOUTS[name][0])[f"changed {name}"]) == expected


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_copies_hold_no_memory_after_a_rollout(processes, ran):
    copied = {name: ran(processes)[f"sampled {name}"]["copy_bytes"] for name in layouts(processes)}
    assert copied == {name: [copies(name)] * processes for name in copied}


def copies(name: str) -> int | None:
    """0 bytes for a layout that copies the weights, None for another."""
    return 0 if "reshard" in name or "-to-" in name or name == "tp2-sp-dp2" else None


# ---- sharing the work ----------------------------------------------------------------------------


def lengths(result: dict) -> list[int]:
    """Tokens of all answers to each prompt."""
    return [sum(len(ids) for ids, *_ in samples) for samples in result["answers"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dp2", "dp2-fixed", "tp2-reshard", "pp2-reshard"])
def test_of_two_copies_each_prompt_is_answered_by_one(name, ran):
    result = ran(2)[f"sampled {name}"]
    first, second = result["tokens"]
    assert [sorted(pair) for pair in zip(first, second, strict=True)] == [[0, n] for n in lengths(result)]
    assert any(first) and any(second)
    if name == "dp2-fixed":
        assert not any(first[1::2]) and not any(second[::2])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp2-same", "pp2-same", "pp2-to-tp2", "cp2"])
def test_ranks_of_one_copy_sample_alike(name, ran):
    result = ran(2)[f"sampled {name}"]
    num_tokens = lengths(result)
    if name == "cp2":  # context parallel ranks hold a whole model each
        assert [sum(pair) for pair in zip(*result["tokens"], strict=True)] == num_tokens
    else:
        assert result["tokens"] == [num_tokens, num_tokens]


def queues(total: int, replicas: int, monkeypatch: pytest.MonkeyPatch, fixed: bool = False) -> list[Queue]:
    """Queues that share a rollout's prompts among copies of the model, in one process."""
    store, queues_ = dist.HashStore(), []
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    for replica in range(replicas):
        monkeypatch.setattr(Queue, "numbers", itertools.count(7))  # as in a process of its own
        group = SimpleNamespace(size=lambda: 1)
        generator = SimpleNamespace(group=group, replica=replica, replicas=replicas, leads=True, fixed=fixed)
        queues_.append(Queue(total, generator))
    return queues_


@pytest.mark.parametrize(("total", "replicas"), [(0, 2), (1, 3), (7, 2), (40, 3), (64, 4)])
@pytest.mark.parametrize("fixed", [False, True])
def test_a_queue_hands_out_each_prompt_once(total, replicas, fixed, monkeypatch):
    rng, numbers_taken = np.random.default_rng(total), []
    left = queues(total, replicas, monkeypatch, fixed)
    while left:
        queue = left[rng.integers(len(left))]
        most = int(rng.integers(1, 9))
        numbers = queue.take(most)
        assert len(numbers) <= most
        numbers_taken += numbers
        if not numbers:
            assert not queue.take(3)
            left.remove(queue)
    assert sorted(numbers_taken) == list(range(total))


def test_a_queue_leaves_something_for_the_others(monkeypatch):
    """9 prompts for 3 copies: the first takes a third of what is there at most, though it has more room."""
    first, second, third = queues(9, 3, monkeypatch)
    assert [first.take(64), second.take(64), third.take(1)] == [range(0, 3), range(3, 5), range(5, 6)]
    assert [first.take(64), first.take(64), second.take(64)] == [range(6, 7), range(7, 8), range(8, 9)]
    assert [queue.take(64) for queue in (first, second, third)] == [range(0)] * 3


def test_a_fixed_queue_deals_the_prompts_out_in_turn(monkeypatch):
    first, second = queues(5, 2, monkeypatch, fixed=True)
    assert [list(first.take(2)), list(first.take(2)), list(first.take(2))] == [[0, 2], [4], []]
    assert list(second.take(9)) == [1, 3]


def test_copies_that_take_at_the_same_time(monkeypatch):
    """Four threads: between looking what is left and taking it another may have taken."""
    numbers_taken: list[list[int]] = []

    def work(queue: Queue) -> None:
        numbers_of_copy: list[int] = []
        while numbers := queue.take(3):
            numbers_of_copy += numbers
        numbers_taken.append(numbers_of_copy)

    threads = [threading.Thread(target=work, args=(q,)) for q in queues(8000, 4, monkeypatch)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(itertools.chain(*numbers_taken)) == list(range(8000))


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_prompts_that_cannot_be_answered_are_refused(ran):
    assert ran(1)["empty prompt"] == {"errors": ["the prompt is empty: there must be a token to continue"]}
    wanted = "the prompt has 256 tokens, the model's context 256: no room for a response"
    assert ran(1)["full context"] == {"errors": [wanted]}


@pytest.mark.slow
def test_a_rollout_tp_that_does_not_divide_the_processes_is_refused(ran):
    assert ran(2)["rollout tp"] == {"errors": ["--rollout-tp 3 does not divide the 2 processes"] * 2}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ffn", "tp", "fits"),
    [(9, 3, 1536, 2, False), (9, 3, 1536, 3, True), (8, 3, 96, 4, False), (8, 2, 96, 4, True)]
    + [(4, 2, 98, 4, False), (4, 4, 96, 2, True)],
)
def test_a_rollout_tp_must_divide_the_model(heads, kv_heads, ffn, tp, fits):
    arch = SimpleNamespace(heads=heads, kv_heads=kv_heads, ffn_size=ffn)
    if fits:
        check_rollout_tp(tp, arch, world=12)
        return
    with pytest.raises(UserError, match=f"--rollout-tp {tp} does not divide the model's {heads} attention"):
        check_rollout_tp(tp, arch, world=12)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"generate_with": "trtllm", "rollout_layout": "reshard"},
            "--rollout-layout reshard has no effect with --generate-with trtllm",
        ),
    ],
)
def test_wrong_rollout_flags(flags, message):
    with pytest.raises(UserError, match=message):
        RolloutConfig(**flags)


def test_an_audit_of_the_models_own_log_probs_needs_temperature_1_of_trtllm():
    trtllm, hot = RolloutConfig(generate_with="trtllm"), SamplingConfig(temperature=0.7)
    check_model_logprobs(trtllm, SamplingConfig(temperature=1.0))
    check_model_logprobs(RolloutConfig(), hot)
    with pytest.raises(UserError, match="--generate-with trtllm with --temperature 0.7"):
        check_model_logprobs(trtllm, hot)


@pytest.mark.parametrize(
    ("flags", "layout", "copies_weights"),
    [
        ({}, {}, False),
        ({}, {"cp": 2}, False),
        ({}, {"tp": 2}, True),
        ({}, {"pp": 2}, True),
        ({"rollout_tp": 2}, {}, True),
        ({"rollout_layout": "same"}, {"tp": 2, "pp": 2}, False),
        ({"rollout_layout": "reshard"}, {}, True),
    ],
)
def test_when_weights_are_copied(flags, layout, copies_weights):
    assert RolloutConfig(**flags).reshards(ParallelConfig(**layout)) == copies_weights


def test_ranks_of_a_copy_wait_as_long_as_all_others():
    """torch gives a new NCCL group 10 minutes, less than a rollout may take."""
    with parallel.start(ParallelConfig()):
        groups = generator.rollout_groups(1)
        for group in (groups.tp, groups.dp, groups.pp):
            backend = group._get_backend(torch.device("cpu"))
            assert backend.options._timeout == parallel.LONGEST_WAIT
