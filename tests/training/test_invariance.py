"""Loss, gradient norm and every metric are those of one process, however the steps are split.

From the same weights, over three updates and one evaluation of each algorithm: tensor, pipeline, context and
data parallelism, sequence parallelism, micro-batches, order of rows, recomputation, shared places.
"""

import json
import math

import pytest

from tests.support.launch import fork_ranks
from tests.support.parity_data import BETA

pytestmark = pytest.mark.slow

CASES = {
    1: [
        dict(family="llama", micro_batch_tokens=400),
        dict(family="llama", micro_batch_tokens=50),
        dict(family="llama", micro_batch_size=1),
        dict(family="llama", micro_batch_size=2),
        dict(family="llama", reverse=True),
        dict(family="llama", recompute="selective"),
        dict(family="llama", recompute="full"),
        dict(family="qwen3", recompute="full", reverse=True),
        dict(family="mistral", micro_batch_size=3),
        dict(family="nemotron", micro_batch_size=2, reverse=True, recompute="full"),
        dict(family="llama", algorithm="dpo", sharing=False),
        dict(family="llama", algorithm="dpo", micro_batch_tokens=400, swap=True),
        dict(family="llama", algorithm="dpo", micro_batch_size=1, reverse=True, recompute="full"),
        dict(family="mistral", algorithm="dpo", sharing=False, swap=True),
        dict(family="llama", algorithm="ranking", sharing=False),
        dict(family="llama", algorithm="ranking", micro_batch_tokens=400),
        dict(family="llama", algorithm="ranking", micro_batch_size=1, reverse=True, recompute="selective"),
        dict(family="mistral", algorithm="ranking", sharing=False),
        dict(family="llama", algorithm="regression", micro_batch_size=1, reverse=True, recompute="full"),
    ],
    2: [
        dict(family="llama", tp=2),
        dict(family="llama", tp=2, sequence_parallel=True),
        dict(family="llama", pp=2),
        dict(family="llama", pp=2, micro_batch_size=1, reverse=True),
        dict(family="llama", pp=2, vp=2, micro_batch_size=1),
        dict(family="llama_tied", pp=2, vp=2, recompute="full"),
        dict(family="llama", algorithm="dpo", pp=2, vp=2, swap=True),
        dict(family="llama", algorithm="ranking", pp=2, vp=2, reverse=True),
        dict(family="llama", cp=2),
        dict(family="llama"),
        dict(family="llama", micro_batch_tokens=50, recompute="full"),
        dict(family="llama_tied", pp=2),
        dict(family="llama_tied", tp=2, sequence_parallel=True, recompute="full"),
        dict(family="qwen3", tp=2, sequence_parallel=True, recompute="selective"),
        dict(family="qwen2", cp=2, micro_batch_size=2),
        dict(family="mistral", cp=2, micro_batch_tokens=400),
        dict(family="stablelm", tp=2, sequence_parallel=True),
        dict(family="stablelm", pp=2),
        dict(family="nemotron", tp=2, sequence_parallel=True, recompute="selective"),
        dict(family="nemotron", cp=2, micro_batch_tokens=400),
        dict(family="llama", algorithm="dpo"),
        dict(family="llama", algorithm="dpo", tp=2, swap=True),
        dict(family="llama", algorithm="dpo", pp=2, micro_batch_size=1),
        dict(family="llama_tied", algorithm="dpo", pp=2, swap=True, recompute="full"),
        dict(family="mistral", algorithm="dpo", cp=2, micro_batch_tokens=400),
        dict(family="llama", algorithm="dpo", cp=2, sharing=False),
        dict(family="llama", algorithm="ranking"),
        dict(family="llama", algorithm="ranking", tp=2),
        dict(family="llama_tied", algorithm="ranking", tp=2, sequence_parallel=True, recompute="full"),
        dict(family="llama_tied", algorithm="ranking", pp=2, micro_batch_size=2),
        dict(family="mistral", algorithm="ranking", cp=2),
        dict(family="llama", algorithm="ranking", cp=2, sharing=False),
        dict(family="llama", algorithm="regression"),
        dict(family="llama", algorithm="regression", tp=2, sequence_parallel=True),
        dict(family="llama", algorithm="regression", pp=2),
        dict(family="llama", algorithm="regression", cp=2, micro_batch_tokens=100),
    ],
    4: [
        dict(family="llama", tp=2, pp=2),
        dict(family="llama", tp=2, pp=2, vp=2, sequence_parallel=True, recompute="selective"),
        dict(family="qwen3", pp=2, vp=2, micro_batch_tokens=50),
        dict(family="llama", tp=2, pp=2, sequence_parallel=True, micro_batch_size=1),
        dict(family="llama", tp=2, sequence_parallel=True),
        dict(family="llama", pp=2, reverse=True),
        dict(family="llama", cp=2, micro_batch_tokens=100),
        dict(family="llama", tp=2, cp=2, sequence_parallel=True),
        dict(family="llama", cp=4),
        dict(family="mistral", algorithm="dpo", cp=4, micro_batch_tokens=400),
        dict(family="llama"),
        dict(family="llama", tp=4),
        dict(family="llama_tied", tp=2, pp=2, recompute="full"),
        dict(family="qwen3", pp=2, cp=2),
        dict(family="stablelm", tp=4, sequence_parallel=True),
        dict(family="nemotron", tp=2, pp=2),
        dict(family="llama", algorithm="dpo", tp=2, pp=2, sequence_parallel=True, micro_batch_size=1),
        dict(family="llama", algorithm="dpo", tp=2, cp=2, sequence_parallel=True, swap=True),
        dict(family="llama", algorithm="dpo", pp=2, reverse=True),
        dict(family="llama", algorithm="dpo"),
        dict(family="llama", algorithm="ranking", tp=2, pp=2, sequence_parallel=True, micro_batch_size=1),
        dict(family="llama", algorithm="ranking", cp=2, micro_batch_tokens=100),
        dict(family="llama", algorithm="ranking", tp=4, reverse=True),
        dict(family="llama", algorithm="regression", tp=2, cp=2, sequence_parallel=True),
        dict(family="llama", algorithm="regression", pp=2),
    ],
}


def run(models, output, processes: int, cases: list[dict]) -> list:
    """The metrics of each case: every rank must report the same."""
    fork_ranks(processes, "tests/workers/invariance.py", models, output, json.dumps(cases))
    ranks = [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(processes)]
    assert all(rank == ranks[0] for rank in ranks)
    return ranks[0]


def trained(case: dict) -> tuple[str, str]:
    """The settings that the metrics of a case may depend on."""
    return case["family"], case.get("algorithm", "sft")


@pytest.fixture(scope="module")
def one_process(models, tmp_path_factory):
    """{what a case trains: its metrics in the plainest run}, and the results of CASES[1]."""
    plain = sorted({trained(case) for cases in CASES.values() for case in cases})
    cases = [dict(family=family, algorithm=algorithm) for family, algorithm in plain]
    results = run(models, tmp_path_factory.mktemp("one"), 1, cases + CASES[1])
    return dict(zip(plain, results, strict=False)), results[len(plain) :]


@pytest.fixture(scope="module", params=CASES)
def metrics(request, models, one_process, tmp_path_factory):
    """Each case of one number of processes with its metrics: one dictionary for each step."""
    cases = CASES[request.param]
    if request.param == 1:
        return list(zip(cases, one_process[1], strict=True))
    return list(zip(cases, run(models, tmp_path_factory.mktemp("more"), request.param, cases), strict=True))


def tolerance(name: str, expected: dict[str, float]) -> float:
    """Tolerance of a metric of a step: 1e-5 of the expected value, and 1e-8 at 0.

    Means of rewards have terms of both signs and may come out anywhere near 0: theirs is 1e-5 of the root
    mean square of the rewards. Rewards and log-ratios of dpo are differences of log-probs, and float32 gives
    the difference no more digits than those have: theirs is 1e-6 of the log-probs.
    """
    if "logprobs_chosen_mean" in expected and name.startswith(("rewards", "logratio")):
        nats = max(abs(expected[f"logprobs_{side}_mean"]) for side in ("chosen", "rejected"))
        return 1e-6 * nats * (BETA if name.startswith("rewards") else 1)
    if name.startswith("rewards"):
        return 1e-5 * math.hypot(expected["rewards_all_mean"], expected["rewards_all_std"])
    return max(1e-5 * abs(expected[name]), 1e-8)


def test_invariance(metrics, one_process):
    for case, steps in metrics:
        for step, expected in enumerate(one_process[0][trained(case)]):
            assert steps[step].keys() == expected.keys()
            for name, value in expected.items():
                allowed = tolerance(name, expected)
                assert abs(steps[step][name] - value) <= allowed, (case, step, name, steps[step][name], value)


def test_dpo_starts_at_its_reference(metrics):
    """The policy is its own reference then, so every log-ratio is 0 to the last bit."""
    starts = [steps[0] for case, steps in metrics if case.get("algorithm") == "dpo"]
    assert starts
    for start in starts:
        assert abs(start["loss"] - math.log(2)) <= 1e-15
        assert start["logratio_abs_mean"] == start["rewards_all_std"] == start["acc"] == 0.0
