"""A decode step as GPUs do it, by stand-ins: CUDA graphs, and the kernels of
align/kernels/decode_attention.py."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from align.generation.sampling import pick
from align.generation.slots import Graphs, graph_size
from tests.support.generation import GREEDY, SAMPLED, SAMPLES, prompts
from tests.support.launch import fork_ranks, torchrun
from tests.support.sampling import CONFIGS
from tests.workers.graphs import Graph, graphs

# tensors made of weights: none, normed queries and keys, norms, B of adapters
KEPT = ("llama", "qwen3", "nemotron", "stablelm-lora")
INTERPRETED = ("mistral", "qwen3")  # with a window, with normed queries and keys


def run(
    folder: Path, cases: dict[str, dict], start: Callable = fork_ranks, processes: int = 1
) -> dict[str, dict]:
    """Results of workers/graphs.py by case."""
    cases_path, results_path = folder / "cases.json", folder / "results.json"
    cases_path.write_text(json.dumps(cases))
    start(processes, "tests/workers/graphs.py", cases_path, results_path)
    return json.loads(results_path.read_text())


# ---- CUDA graphs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replayed(models, tmp_path_factory) -> dict[str, dict]:
    llama = {"model": str(models / "llama"), "prompts": prompts(), "samples": SAMPLES, "sampling": SAMPLED}
    cases = {
        "many slots": llama,
        "few slots": llama | {"rollout": {"rollout_slots": 5}},
        # two or more are replaced at a time: ended ones wait in their slots
        "waiting": llama | {"rollout": {"rollout_slots": 40}},
        "one slot": llama | {"prompts": prompts()[:6], "rollout": {"rollout_slots": 1}},
        "greedy": llama | {"samples": 1, "sampling": {**GREEDY, "repetition_penalty": 1.3}},
        "mistral": llama | {"model": str(models / "mistral"), "sampling": {"max_new_tokens": 40}},
        "tail": llama | {"prompts": prompts()[:32], "samples": 1, "sampling": {"max_new_tokens": 150}},
        "one token": llama | {"samples": 1, "sampling": {"max_new_tokens": 1}},
        "context": llama | {"samples": 1, "prompts": [[5] * 250, [6] * 255, [7] * 3]},
        # the first fills the context, and waits there in its slot for three others to end
        "waiting at the end": llama
        | {
            "prompts": [np.random.default_rng(4).integers(3, 131, 250).tolist(), *prompts()[:63]],
            "samples": 1,
            "sampling": GREEDY,
        },
        # Two end after 3 tokens. Of the next two one waits for the first 30, which end after 12 tokens; the
        # other one ends then, after 12 tokens, and waits for those that took their slots.
        "waiting with all tokens": llama
        | {
            "prompts": [[5] * 253, [5] * 253, *[[5]] * 30, [5], [5] * 251, *[[5]] * 31],
            "samples": 1,
            "sampling": GREEDY,
            "rollout": {"rollout_slots": 32},
        },
        # the second needs more room than there is, before a step of it
        "longer later": llama
        | {
            "prompts": [[5] * 3, [6] * 70, [7] * 3],
            "samples": 1,
            "sampling": {"max_new_tokens": 8},
            "rollout": {"rollout_slots": 1},
        },
    }
    for family in KEPT:  # two rollouts, with the same weights in place or moved
        name, _, has_adapters = family.partition("-")
        case = {"model": str(models / name), "prompts": prompts()[:9], "sampling": GREEDY, "keep": True}
        case |= {"lora": 4} if has_adapters else {}
        cases |= {
            f"{family} once": case,
            f"{family} kept": case | {"rounds": 2, "change": True},
            f"{family} moved": case | {"rounds": 2, "change": True, "move": True},
            f"{family} freed": case | {"rounds": 2, "rollout": {"rollout_layout": "reshard"}},
        }
    return run(tmp_path_factory.mktemp("graphs"), cases)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "many slots",
        "few slots",
        "waiting",
        "one slot",
        "greedy",
        "mistral",
        "tail",
        "one token",
        "context",
        "waiting at the end",
        "waiting with all tokens",
        "longer later",
    ],
)
def test_answers_by_graphs_are_the_same(name, replayed):
    """To the last bit, and on_token sees the same: though a step is done before the last one is looked at,
    sequences end and others take their slots, and keys and values move to a larger place."""
    plain, gpu = replayed[name]["plain"], replayed[name]["gpu"]
    assert all(gpu[key] == plain[key] for key in ("answers", "tokens"))  # prompts may be read in other passes


@pytest.mark.slow
@pytest.mark.parametrize("family", KEPT)
def test_graphs_are_kept_while_the_weights_stay_in_place(family, replayed):
    """A second rollout captures none, and samples from the weights as they are by then."""
    results = {name: replayed[f"{family} {name}"] for name in ("once", "kept", "moved", "freed")}
    for result in results.values():
        assert result["gpu"]["answers"] == result["plain"]["answers"]
    assert results["kept"]["gpu"]["answers"] != results["once"]["gpu"]["answers"]
    captures = {name: len(result["replays"]) for name, result in results.items()}
    once = captures["once"]
    assert once > 0 and captures == {"once": once, "kept": once, "moved": 2 * once, "freed": 2 * once}


@pytest.mark.slow
def test_keys_and_values_are_gone_after_a_rollout(replayed):
    """By themselves: without the collector of circles, which comes when it likes."""
    assert {result["left"] for name, result in replayed.items() if name != "broken"} == {0}


@pytest.mark.slow
def test_most_steps_are_replays(replayed):
    """Each size of graph is captured once for each place of keys and values, if it is used there."""
    replays = {name: result["replays"] for name, result in replayed.items() if name != "broken"}
    assert len(replays["few slots"]) == 2 and sum(replays["few slots"]) > 300
    assert len(replays["one slot"]) == 1 and sum(replays["one slot"]) > 150
    assert len(replays["tail"]) == 1 and sum(replays["tail"]) > 100  # room for all tokens from the start
    assert replays["one token"] == []


@pytest.mark.slow
def test_random_numbers_suffice_for_a_response_that_waits(replayed):
    """After its 12 tokens one step is under way, and each step until its slot is filled draws a 14th."""
    answers = [answer for [answer] in replayed["waiting with all tokens"]["gpu"]["answers"]]
    assert [len(ids) for ids, *_ in answers] == [3, 3, *[12] * 30, 12, 5, *[12] * 31]
    assert {finish for *_, finish in answers} == {"length"}


@pytest.mark.slow
def test_keys_and_values_have_room_for_a_response_that_waits(replayed):
    """A sequence has ended with 256 tokens, and 3 more must end before one of 64 slots is filled anew.

    The steps until then append a 257th key; there is room for it from the start, so none is captured anew.
    """
    result = replayed["waiting at the end"]
    lengths = [len(ids) for [(ids, *_)] in result["gpu"]["answers"]]
    assert lengths[0] == 6 and sum(length <= 7 for length in lengths) < 4
    assert len(result["replays"]) == 1


# ---- several ranks -------------------------------------------------------------------------------

TP, PP, SAME = {"parallel": {"tp": 2}}, {"parallel": {"pp": 2}}, {"rollout_layout": "same"}
RANKS = {  # name: layouts of two ranks, and why a GPU's steps are no graphs
    "tp": (TP | {"rollout": SAME | {"rollout_tp_graphs": True}}, None),
    "tp of a copy": (PP | {"rollout": {"rollout_tp": 2, "rollout_tp_graphs": True}}, None),
    "copies": (TP | {"rollout": {}}, None),
    "tp without graphs": (TP | {"rollout": SAME}, "tp 2 without --rollout-tp-graphs"),
    "pp": (PP | {"rollout": SAME | {"rollout_tp_graphs": True}}, "pp 2"),
    "deterministic": ({"parallel": {"deterministic": True}, "rollout": {}}, "--deterministic"),
}


@pytest.fixture(scope="module")
def by_ranks(models, tmp_path_factory) -> dict[str, dict]:
    llama = {"model": str(models / "llama"), "prompts": prompts()[:20], "samples": 2, "sampling": SAMPLED}
    cases = {name: llama | case for name, (case, _) in RANKS.items()}
    for case in cases.values():
        case["rollout"] = case["rollout"] | {"rollout_slots": 9}
    return run(tmp_path_factory.mktemp("ranks"), cases, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS)
def test_graphs_of_several_ranks(name, by_ranks):
    """The collectives are in them, and the answers are the same to the last bit."""
    result, reason = by_ranks[name], RANKS[name][1]
    assert result["gpu"]["answers"] == result["plain"]["answers"]
    assert (sum(result["replays"]) > 20) if reason is None else result["replays"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS)
def test_the_log_says_why_there_are_no_graphs(name, by_ranks):
    """On a CPU only where --rollout-tp-graphs asks for them."""
    (case, reason), result = RANKS[name], by_ranks[name]
    expected = "steps as CUDA graphs" if reason is None else f"steps without CUDA graphs: {reason}"
    assert result["gpu"]["described"].endswith(f" x 9 sequences at a time, {expected}")
    asked = ", steps without CUDA graphs: no GPU" if "rollout_tp_graphs" in case["rollout"] else ""
    assert result["plain"]["described"].endswith(f" x 9 sequences at a time{asked}")


@pytest.mark.slow
def test_a_model_whose_logits_are_not_numbers_is_refused(replayed):
    assert replayed["broken"].startswith("logits of rows [0, 1, 2")


def test_a_graph_works_on_the_tensors_of_its_capture():
    total, addend, calls = torch.zeros(4), torch.zeros(4), []

    def step(rows: int) -> Tensor:
        calls.append(rows)
        total[:rows] += addend[:rows]
        return total[:rows] * 10

    with graphs():
        captured, totals = Graphs(), []
        for rows, value in ((4, 1.0), (4, 2.0), (2, 3.0), (4, 4.0), (2, 5.0)):
            addend.fill_(value)
            totals.append(captured(step, rows, 32).tolist())
        assert totals == [[10.0] * 4, [30.0] * 4, [60.0] * 2, [100.0] * 2 + [70.0] * 2, [150.0] * 2]
        assert calls == [4, 4, 2, 2], "twice for each size: once for itself, once to be captured"
        assert [graph.replays for graph in Graph.captured] == [2, 1]
        assert captured(step, 4, 64).tolist() == [200.0] * 2 + [120.0] * 2
        assert calls == [4, 4, 2, 2, 4, 4]


@pytest.mark.parametrize("config", CONFIGS)
def test_sampling_can_be_captured(config):
    """No value goes to the host, no shape depends on one."""
    logits, seen = torch.randn(3, 200), torch.rand(3, 200) < 0.1
    with graphs():
        sample = Graphs()

        def drawn() -> Tensor:
            step = lambda rows: torch.stack(pick(logits, torch.full((3,), 0.4), CONFIGS[config], seen))  # noqa: E731
            return sample(step, 3, 32).clone()

        first = drawn()
        assert torch.equal(drawn(), first)
        logits.copy_(torch.randn(3, 200))
        assert not torch.equal(drawn(), first)


def test_the_stand_in_refuses_what_a_cuda_graph_cannot_hold():
    x = torch.arange(4.0)
    for step in (lambda n: x[x > 1], lambda n: x.nonzero(), lambda n: x if x.sum() > 1 else -x):
        with graphs(), pytest.raises(RuntimeError, match="cannot wait for the host"):
            Graphs()(step, 1, 32)


@pytest.mark.parametrize(
    ("slots", "sizes"),
    [
        (1, {1: 1}),
        (3, {1: 3, 2: 3, 3: 3}),
        (5, {1: 1, 2: 5, 5: 5}),
        (64, {64: 64, 17: 64, 16: 16, 5: 16, 4: 4, 2: 4, 1: 1}),
        (250, {250: 250, 63: 250, 62: 62, 16: 62, 15: 15, 4: 15, 3: 3, 1: 3}),
    ],
)
def test_the_number_of_rows_of_a_graph(slots, sizes):
    assert {count: graph_size(count, slots) for count in sizes} == sizes


# ---- the kernels ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted(models, tmp_path_factory) -> dict[str, dict]:
    """Answers by the kernels of align/kernels/decode_attention.py, in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is for Linux: tests/requirements.txt")
    case = {"prompts": prompts()[:5], "sampling": {"max_new_tokens": 5}, "rollout": {"rollout_slots": 3}}
    cases = {name: case | {"model": str(models / name)} for name in INTERPRETED}
    with mock.patch.dict("os.environ", TRITON_INTERPRET="1"):  # before the import of Triton: no fork
        return run(tmp_path_factory.mktemp("kernels"), cases, torchrun)


@pytest.mark.slow
@pytest.mark.parametrize("family", INTERPRETED)
def test_answers_by_the_kernels_are_the_same(family, interpreted):
    """Up to rounding of the log-probs."""
    plain, gpu = (interpreted[family][name]["answers"] for name in ("plain", "gpu"))
    for [(ids, *logprobs, finish)], [(wanted, *expected, end)] in zip(gpu, plain, strict=True):
        assert (ids, finish) == (wanted, end)
        np.testing.assert_allclose(logprobs, expected, rtol=0, atol=2e-5)
    assert sum(len(ids) for [(ids, *_)] in gpu) > 15
