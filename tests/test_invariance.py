"""Loss, gradient norm and every metric are those of one process, however the steps are split.

From the same weights, over three updates and one evaluation: tensor, pipeline, context and data parallelism,
sequence parallelism, micro-batches, order of rows, recomputation.
"""

import json

import pytest

from tests.conftest import torchrun

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
    ],
    2: [
        dict(family="llama", tp=2),
        dict(family="llama", tp=2, sequence_parallel=True),
        dict(family="llama", pp=2),
        dict(family="llama", pp=2, micro_batch_size=1, reverse=True),
        dict(family="llama", cp=2),
        dict(family="llama"),
        dict(family="llama", micro_batch_tokens=50, recompute="full"),
        dict(family="llama_tied", pp=2),
        dict(family="llama_tied", tp=2, sequence_parallel=True, recompute="full"),
        dict(family="qwen3", tp=2, sequence_parallel=True, recompute="selective"),
        dict(family="qwen2", cp=2, micro_batch_size=2),
        dict(family="mistral", cp=2, micro_batch_tokens=400),
    ],
    4: [
        dict(family="llama", tp=2, pp=2),
        dict(family="llama", tp=2, pp=2, sequence_parallel=True, micro_batch_size=1),
        dict(family="llama", tp=2, sequence_parallel=True),
        dict(family="llama", pp=2, reverse=True),
        dict(family="llama", cp=2, micro_batch_tokens=100),
        dict(family="llama", tp=2, cp=2, sequence_parallel=True),
        dict(family="llama"),
        dict(family="llama", tp=4),
        dict(family="llama_tied", tp=2, pp=2, recompute="full"),
        dict(family="qwen3", pp=2, cp=2),
    ],
}


def run(models, output, processes: int, cases: list[dict]) -> list:
    """The metrics of each case: every rank must report the same."""
    torchrun(processes, "tests/invariance_worker.py", models, output, json.dumps(cases))
    ranks = [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(processes)]
    assert all(rank == ranks[0] for rank in ranks)
    return ranks[0]


@pytest.fixture(scope="module")
def one_process(models, tmp_path_factory):
    families = sorted({case["family"] for cases in CASES.values() for case in cases})
    output = tmp_path_factory.mktemp("one")
    return dict(
        zip(families, run(models, output, 1, [dict(family=family) for family in families]), strict=True)
    )


@pytest.mark.parametrize("processes", CASES)
def test_invariance(processes, models, one_process, tmp_path):
    for case, found in zip(CASES[processes], run(models, tmp_path, processes, CASES[processes]), strict=True):
        for step, expected in enumerate(one_process[case["family"]]):
            for name, value in expected.items():
                assert found[step][name] == pytest.approx(value, rel=1e-5), (case, step, name)
