"""Comparison, report and command line of tools.conformance, on numbers worked by hand."""

import json
import math

import numpy as np
import pytest
import torch

from align.data import packing, toy
from align.errors import UserError
from tests.support.files import ROOT
from tests.support.launch import fork_python
from tests.support.models import random_tiny
from tools.conformance import compare, report
from tools.conformance.__main__ import Config
from tools.conformance.cases import CASES, Case, describe, of_model, quick
from tools.conformance.compare import Cell
from tools.conformance.grid import Row
from tools.conformance.planted import BUGS
from tools.conformance.rows import PAIRED, RANDOM, ROWS, STEPS, StoredRows, data_set, record, store
from tools.conformance.worker import Result

# ---- comparison ----------------------------------------------------------------------------------


def test_a_cell_has_the_largest_error_and_the_first_place_above_the_bound():
    named = [("a", 1e-7), ("b", 2e-5), ("c", 1e-3)]
    assert compare.cell(named) == Cell(1e-3, "b")
    assert compare.cell(named[:1]) == Cell(1e-7, "a")
    assert compare.cell([("a", 1e-7), ("b", math.nan)]) == Cell(math.inf, "b")


def test_tensors_are_compared_by_their_norms():
    expected = {"first": torch.tensor([3.0, 4.0]), "second": torch.tensor([1.0])}
    assert compare.tensors(expected, expected) == Cell(0.0, "first")
    other = {"first": torch.tensor([3.0, 4.0]), "second": torch.tensor([1.5])}
    assert compare.tensors(other, expected) == Cell(0.5, "second")
    other["first"] = torch.tensor([0.0, 8.0])  # a difference of norm 5
    assert compare.tensors(other, expected) == Cell(1.0, "first")


def test_a_bias_is_as_large_as_a_column_of_its_matrix():
    """Norm 8 over 16 columns: 2. The bias of a norm is compared with itself."""
    expected = {"k.weight": torch.ones(4, 16), "k.bias": torch.full((4,), 1e-3)}
    actual = expected | {"k.bias": torch.full((4,), 2e-3)}
    assert compare.tensors(actual, expected).error == pytest.approx(1e-3)
    expected["k.bias"], actual["k.bias"] = torch.full((4,), 3.0), torch.full((4,), 4.5)
    assert compare.tensors(actual, expected) == Cell(0.5, "k.bias")
    norm = {"norm.weight": torch.ones(4), "norm.bias": torch.full((4,), 1e-3)}
    assert compare.tensors(norm | {"norm.bias": torch.full((4,), 2e-3)}, norm).error == pytest.approx(1.0)


def test_a_tensor_that_is_absent_is_named():
    cell = compare.tensors({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)})
    assert cell == Cell(math.inf, "b, absent or unknown")


def test_outputs_are_compared_by_row_and_token():
    expected = [np.array([3.0, -3.0]), np.array([[3.0]])]
    actual = [np.array([3.0, -3.3]), np.array([[3.0]])]
    cell = compare.outputs(actual, expected)
    assert cell.place == "row 1, token 2" and cell.error == pytest.approx(0.1)


def test_metrics_are_compared_in_every_step():
    expected = [{"loss": 2.0, "acc": 0.0}, {"loss": 4.0, "acc": 0.5}]
    actual = [{"loss": 2.0, "acc": 1e-4}, {"loss": 5.0, "acc": 0.5}]
    assert compare.metrics(actual, expected, ["loss"]) == Cell(0.25, "loss, step 2")
    assert compare.metrics(actual, expected) == Cell(0.25, "acc, step 1")  # 1e-4 of 1e-3, and above the bound


def test_sizes_of_metrics_that_cancel():
    pairs = {"logprobs_chosen_mean": -20.0, "logprobs_rejected_mean": -30.0, "rewards_all_mean": 0.0}
    assert compare.size("rewards_all_mean", pairs) == pytest.approx(0.3)  # beta 0.1, a tenth of 30 nats
    assert compare.size("logratio_abs_mean", pairs | {"logratio_abs_mean": 0.0}) == pytest.approx(3.0)
    assert compare.size("rewards_all_mean", {"rewards_all_mean": 3.0, "rewards_all_std": 4.0}) == 5.0
    assert compare.size("loss", {"loss": 1e-6, "ppo_ratio": 1.0}) == 1.0
    assert compare.size("loss", {"loss": 1e-6}) == 1e-3


# ---- rows and cases ------------------------------------------------------------------------------


def test_pairs_have_places_to_share():
    """Else the cases without sharing would try nothing."""
    for step in range(STEPS):
        rows = data_set("dpo", step).rows
        assert sum(map(packing.num_places, rows)) < sum(side.num_inputs for row in rows for side in row)


def test_stored_rows_are_the_rows(tmp_path):
    pairs = [pair for step in range(STEPS + 1) for pair in RANDOM.pairs(step)]
    store(pairs, tmp_path / "rows.json")
    source = StoredRows(tmp_path / "rows.json")
    assert source.are_pairs and len(source.rows) == STEPS * ROWS + 1
    for step, size in enumerate([ROWS] * STEPS + [1]):
        for actual, expected in zip(source.pairs(step, size), RANDOM.pairs(step, size), strict=True):
            assert actual.margin == expected.margin
            for own, side in zip(actual.examples, expected.examples, strict=True):
                assert (own.ids == side.ids).all() and (own.trained == side.trained).all()
                assert own.ids.dtype == np.int32


def test_a_recorded_rollout_clips_some_tokens():
    values = [np.zeros(30), np.zeros(20)]
    rollout = record("grpo", 0, values)
    assert {name: [len(x) for x in arrays] for name, arrays in rollout.items()} == dict.fromkeys(
        ("old", "ref", "advantages"), [30, 20]
    )
    clipped = np.abs(np.exp(-np.concatenate(rollout["old"])) - 1) > 0.2
    assert 0 < clipped.mean() < 1
    assert (np.concatenate(rollout["advantages"]) > 0).any() and (rollout["advantages"][0] < 0).any()
    assert set(record("critic", 0, values)) == {"values", "returns"}


def test_every_algorithm_is_in_every_kind_of_layout():
    for kind in ("tp", "pp", "cp", "sequence_parallel"):
        cases = [
            case for cases in CASES.values() for case in cases if getattr(case, kind) > 1 - (kind[0] == "s")
        ]
        assert {case.algorithm for case in cases} == {*PAIRED, "sft", "regression", "ppo", "critic"}, kind


def test_cases_in_words():
    assert describe(Case(), 1) == "one process"
    assert describe(Case(tp=2, sequence_parallel=True, reverse=True), 4) == (
        "tp 2, dp 2, sequence parallel, reversed rows"
    )
    assert describe(Case(micro_batch_size=1, micro_batch_tokens=400, recompute="full"), 2) == (
        "dp 2, 1 rows a micro-batch, recompute full"
    )


def test_quick_cases_have_every_algorithm_and_layout():
    chosen = quick(CASES[4])
    assert len(chosen) < len(CASES[4])
    assert {(x.algorithm, x.sizes) for x in chosen} == {(x.algorithm, x.sizes) for x in CASES[4]}


def test_cases_of_a_model_fit_its_rows():
    chosen = of_model(CASES[2], "mine", are_pairs=True, scale=3)
    assert {case.algorithm for case in chosen} == set(PAIRED) and len(set(chosen)) == len(chosen)
    assert {case.family for case in chosen} == {"mine"}
    assert {case.micro_batch_tokens for case in chosen} == {3 * 64, 3 * 400}


# ---- report --------------------------------------------------------------------------------------

CELLS = dict.fromkeys(report.COLUMNS[:6], (1e-7, "x")) | {"resume": (0.0, "x")}


def summary(*rows: Row) -> dict:
    """A report as it is read from its file."""
    cells = {"loss": Cell(2e-5, "loss, step 1"), "outputs": Cell(1e-7, "row 1, token 1")}
    cells |= dict.fromkeys(("gradients", "gradient norm", "weights"), Cell(1e-6, "x"))
    return json.loads(json.dumps(report.about(rows, {("sft", "llama"): cells}, 1.0)))


def test_failures_are_named_in_the_order_of_a_step():
    late = {"loss": (1.0, "loss, step 2"), "weights": (1e-4, "model.norm.weight"), "resume": (1e-9, "y")}
    seen = report.above(CELLS | late, {"backend": "gloo", "bound": 1e-5})
    assert seen == ["weights", "resume", "loss"]  # the loss of step 2 comes after the update of step 1
    assert report.above(CELLS | late, {"backend": "nccl", "bound": 1e-5}) == ["weights", "loss"]


def test_failures_of_a_report():
    bug = next(iter(BUGS))
    clean, wrong = Result(cells=CELLS), Result(cells=CELLS | {"gradients": (math.inf, "model.norm.weight")})
    rows = [Row(2, Case("dpo", tp=2), wrong), Row(1, Case(), clean), Row(2, Case(cp=2), clean, bug)]
    assert report.failures(summary(*rows)) == [
        "dpo, llama, tp 2: gradients inf at model.norm.weight",
        "sft, llama, float64: loss 2e-5 at loss, step 1",
        f"no cell shows the planted bug: {bug}",
    ]
    stopped = Row(2, Case(cp=2), Result(refused="RuntimeError: shapes: /tmp/x is damaged"), bug)
    assert len(report.failures(summary(stopped))) == 1  # float64 alone: the bug shows as an error
    assert report.planted_lines(summary(stopped))[0][3] == "RuntimeError: shapes"


def test_numbers_are_short():
    assert [report.number(x) for x in (0.0, 2.4e-7, 3e-12, 0.5, math.inf)] == [
        "0",
        "2e-7",
        "3e-12",
        "5e-1",
        "inf",
    ]


def test_a_page_keeps_its_text_and_the_other_versions(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Mine\n\ntext\n\n{report.RESULTS}\n\nold\n")
    first, second = (
        summary(Row(2, Case(tp=2), Result(cells=CELLS))),
        summary(Row(1, Case(), Result(refused="no"))),
    )
    report.write_page(first | {"megatron": "0.1"}, page)
    report.write_page(second | {"megatron": "0.2"}, page)
    text = page.read_text()
    assert text.startswith("# Mine\n\ntext\n\n<!--") and "old" not in text
    assert text.index("## Megatron-Core 0.1") < text.index("## Megatron-Core 0.2")
    assert "| 2 | tp 2 | llama | sft | 1e-7 |" in text and "not possible: no" in text
    assert "**2e-5 at loss, step 1**" in text
    report.write_page(second | {"megatron": "0.1"}, page)
    assert "tp 2" not in page.read_text()
    assert "sft" in report.terminal(first)


# ---- command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(processes=(3,)), "--processes 3"),
        (dict(model=ROOT), "--model and --data belong together"),
        (dict(model=ROOT, data=ROOT, planted=True), "--planted and --page are for the random models"),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(UserError, match=message):
        Config(**flags)


@pytest.mark.slow
def test_a_model_and_rows_of_the_user(tmp_path):
    model = random_tiny(tmp_path / "model")
    (data,), _ = toy.write(tmp_path / "data", num_train=24, num_val=2)
    flags = ["--model", model, "--data", data, "--processes", 1, "--quick", "--output", tmp_path / "out"]
    done = fork_python("tools/conformance/__main__.py", *flags)
    assert "all cells are within their bounds" in done.stdout
    result = json.loads((tmp_path / "out/results.json").read_text())
    assert {row["case"].get("algorithm", "sft") for row in result["cases"]} == {
        "sft",
        "regression",
        "ppo",
        "critic",
    }
    assert {row["case"]["family"] for row in result["cases"]} == {"model"}
    assert len(result["float64"]) == 4 and "| one process" not in (tmp_path / "out/results.md").read_text()
