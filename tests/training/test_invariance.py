"""Every number of a step is that of one process, however the steps are split, and that of float64.

The grid of `python -m tools.conformance`: three updates and one evaluation of each algorithm from the same
weights, in tensor, pipeline, context and data parallelism, sequence parallelism, micro-batches, order of
rows, recomputation, shared places.
"""

import math

import pytest

from tests.support.launch import fork_ranks
from tools.conformance import grid, report
from tools.conformance.cases import CASES, Case
from tools.conformance.compare import BOUND
from tools.conformance.models import FAMILIES
from tools.conformance.planted import BUGS
from tools.conformance.worker import Job

pytestmark = pytest.mark.slow

SAVED = {
    2: [
        *(Case("sft", tp=2), Case("sft", "llama_tied", pp=2), Case("dpo", cp=2), Case("critic")),
        *(Case("sft", tp=2, sequence_parallel=True, lora=4), Case("ranking", pp=2, lora=4)),
        Case("dpo", "stablelm", lora=4),
    ]
}
FIRST = {  # a planted bug: the first column that differs, or the error that ends the run
    "context parallel ranks divide their part of a masked loss by their own number of tokens": "gradients",
    "gradients of norms are not summed over tensor parallel ranks with sequence parallelism": "gradients",
    "gradients of a tied embedding are not summed over the first and the last stage": "gradients",
    "gradients of whole adapters are not summed over ranks with sequence parallelism": "gradients",
    "the gradient of x A^T is that of one tensor parallel rank's rows": "gradients",
    "the gradient norm counts one tensor parallel rank's part of each matrix": "gradient norm",
    "updated weights are not gathered over data parallel ranks": "UserError: damaged checkpoint",
    "Adam's moments are lost when a checkpoint is loaded": "checkpoint",
}


def job_in(models, folder, checkpoints: bool) -> Job:
    return Job({name: str(models / name) for name in FAMILIES}, str(folder), checkpoints=checkpoints)


@pytest.fixture(scope="module")
def job(models, tmp_path_factory) -> Job:
    return job_in(models, tmp_path_factory.mktemp("grid"), checkpoints=False)


@pytest.fixture(scope="module")
def rows(job) -> list[grid.Row]:
    """The results of all cases."""
    return grid.run(job, CASES, launch=fork_ranks)


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory) -> list[grid.Row]:
    """The results of SAVED with checkpoints, and of planted bugs."""
    job = job_in(models, tmp_path_factory.mktemp("saved"), checkpoints=True)
    return grid.run(job, SAVED, FIRST, fork_ranks)


def wrong(rows: list[grid.Row]) -> list[tuple]:
    """Cells above their bounds: a resume repeats the run to the last bit."""
    return [
        (row.processes, row.case, name, *cell)
        for row in rows
        for name, cell in row.result.cells.items()
        if not cell[0] <= (0.0 if name == "resume" else BOUND)
    ]


def test_invariance(rows):
    assert len(rows) == sum(map(len, CASES.values()))
    for row in rows:
        assert not row.result.refused
        assert row.result.cells.keys() == set(report.COLUMNS) - {"checkpoint", "resume"}
    assert wrong(rows) == []


def test_checkpoints_continue_in_their_own_and_in_another_layout(saved):
    clean = [row for row in saved if not row.planted]
    assert len(clean) == len(SAVED[2])
    assert all(row.result.cells.keys() == set(report.COLUMNS) for row in clean)
    assert wrong(clean) == []


def test_one_process_is_float64(job, rows):
    """The first step of each algorithm and family, by tools/reference.py."""
    compared = grid.against_float64(job, [row.case for row in rows])
    whole = {(row.case.algorithm, row.case.family) for row in rows if not row.case.lora}
    assert compared.keys() == whole
    for case, cells in compared.items():
        assert cells.keys() == set(report.FLOAT64_COLUMNS)
        assert all(cell.error <= BOUND for cell in cells.values()), (case, cells)


def test_dpo_starts_at_its_reference(rows):
    """The policy is its own reference then, so every log-ratio is 0 to the last bit."""
    starts = [row.result.steps[0] for row in rows if row.case.algorithm == "dpo" and not row.case.lora]
    assert starts
    for start in starts:
        assert abs(start["loss"] - math.log(2)) <= 1e-15
        assert start["logratio_abs_mean"] == start["rewards_all_std"] == start["acc"] == 0.0


@pytest.mark.parametrize("name", FIRST)
def test_a_planted_bug_shows(name, saved):
    """In the column whose number it makes wrong, and in none that a step computes before, or by an error."""
    [row] = [row for row in saved if row.planted == name]
    assert row.case == BUGS[name].case
    if ":" in FIRST[name]:
        assert row.result.refused.startswith(FIRST[name])
        return
    assert not row.result.refused
    shown = report.above(row.result.cells, {"backend": "gloo", "bound": BOUND})
    assert shown[0] == FIRST[name], row.result.cells
