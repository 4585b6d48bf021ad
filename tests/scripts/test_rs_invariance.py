"""Rejection sampling samples, keeps and learns the same, however its ranks share the work.

Three steps from the same weights with the same seeds: rollout, scores, choice, updates, and the next rollout
from the updated weights. The score of --reward-fn depends on each character of an answer, so that equal mean
rewards mean equal answers.
"""

import json
from pathlib import Path

import pytest

from tests.support.files import read_jsonl, reproducible_metrics
from tests.support.launch import fork_ranks

pytestmark = pytest.mark.slow

STEPS = 3
BY_RULE, BY_MODEL = "--reward-fn tests.support.rewards:reward", "--reward-model {rm}"
CASES = {  # by number of processes: judge and layout
    1: [
        (BY_RULE, "--micro-batch-tokens 64"),
        (BY_RULE, "--micro-batch-size 1 --recompute full"),
        (BY_RULE, "--rollout-slots 5"),
        (BY_MODEL, "--micro-batch-tokens 64"),
    ],
    2: [
        (BY_RULE, ""),
        (BY_RULE, "--deterministic --rollout-slots 3"),
        (BY_RULE, "--rollout-layout reshard --rollout-tp 2"),
        (BY_RULE, "--tp 2"),
        (BY_RULE, "--tp 2 --rollout-layout same --rollout-slots 9"),
        (BY_RULE, "--tp 2 --sequence-parallel"),
        (BY_RULE, "--pp 2 --rollout-slots 9"),
        (BY_RULE, "--pp 2 --rollout-layout same"),
        (BY_RULE, "--pp 2 --rollout-tp 2"),
        (BY_RULE, "--cp 2"),
        (BY_MODEL, ""),
        (BY_MODEL, "--tp 2"),
    ],
    4: [
        (BY_RULE, ""),
        (BY_RULE, "--tp 2"),
        (BY_RULE, "--tp 2 --rollout-layout same --sequence-parallel --micro-batch-tokens 64"),
    ],
}


def run(toy_models: Path, output: Path, processes: int, cases: list[tuple[str, str]]) -> list[dict]:
    """Run all cases; returns their metrics without times, and their tables of samples."""
    common = (
        f"train_rs.py --model {toy_models}/sft/hf --train-data {toy_models}/data/train.jsonl "
        f"--val-data {toy_models}/data/val.jsonl --prompts-per-step 8 --samples-per-prompt 4 --keep-top 2 "
        "--global-batch-size 8 --max-prompt-len 48 --max-new-tokens 10 --temperature 0.8 --lr 5e-4 "
        f"--max-steps {STEPS} --val-interval {STEPS} --save-interval 0"
    )
    outputs = [output / str(i) for i in range(len(cases))]
    commands = [
        f"{common} --output {path} {judge.format(rm=toy_models / 'rm/hf')} {layout}".split()
        for path, (judge, layout) in zip(outputs, cases, strict=True)
    ]
    fork_ranks(processes, "tests/workers/resume.py", json.dumps(commands))
    return [
        {"metrics": reproducible_metrics(path), "samples": read_jsonl(path / "samples.jsonl")}
        for path in outputs
    ]


@pytest.fixture(scope="module")
def one_process(toy_models, tmp_path_factory) -> tuple[dict[str, dict], list[dict]]:
    """{judge: the plainest run of one process}, and those of CASES[1]."""
    plain = [(BY_RULE, ""), (BY_MODEL, "")]
    results = run(toy_models, tmp_path_factory.mktemp("one"), 1, plain + CASES[1])
    return {judge: result for (judge, _), result in zip(plain, results, strict=False)}, results[len(plain) :]


def test_the_run_has_all_that_could_differ(one_process):
    """Answers of both ends, some equal, both kinds of updates, and other samples after them than before."""
    for result in one_process[0].values():
        steps = result["metrics"][1:]
        assert len(steps) == STEPS
        for name in ("dropped_truncated", "dropped_duplicates"):
            assert sum(step[f"train_rollouts/{name}"] for step in steps) > 0
        assert all(0.5 < step["train_rollouts/ended"] < 1 for step in steps)
        assert all(step["train_optim/updates"] == 2 for step in steps)
        before, after = (
            [
                row["response"]
                for row in result["samples"]
                if row["step"] == step and row["table"] == "val_rollouts"
            ]
            for step in (0, STEPS)
        )
        assert len(before) == len(after) == 4 and before != after


@pytest.mark.parametrize("processes", CASES)
def test_every_layout_gives_the_same(processes, toy_models, one_process, tmp_path):
    plain, results = one_process
    if processes > 1:
        results = run(toy_models, tmp_path, processes, CASES[processes])
    for case, result in zip(CASES[processes], results, strict=True):
        assert_same(result, plain[case[0]], exact=case[0] == BY_RULE, case=case)


def assert_same(result: dict, expected: dict, exact: bool, case: tuple[str, str]) -> None:
    """The same samples and choices, losses to 1e-5; rewards bit for bit if `exact`, else to 1e-5."""
    assert len(result["metrics"]) == len(expected["metrics"])
    for row, wanted in zip(result["metrics"], expected["metrics"], strict=True):
        assert row == {name: close(name, wanted[name], exact) for name in wanted}, case
    for row, wanted in zip(result["samples"], expected["samples"], strict=True):
        assert row | {"reward": 0} == wanted | {"reward": 0}, case
        assert row["reward"] == close("rewards", wanted["reward"], exact), case


def close(name: str, value: float, exact: bool) -> object:
    """Tolerance of a metric: losses and gradients to 1e-5, counts of responses exact.

    A reward model's scores are some units apart, and their mean may be near 0: they are compared to 1e-5 of
    a unit. The audit's errors are nothing but rounding, which each layout has of its own.
    """
    if name.startswith("audit/"):
        return pytest.approx(0.0, abs=1e-5)
    if "rewards" in name and not exact:
        return pytest.approx(value, rel=1e-5, abs=1e-5)
    return pytest.approx(value, rel=1e-5) if name.startswith("train_optim/") else value
