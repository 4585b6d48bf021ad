"""Self-rewarding answers, judges and learns the same, however its ranks share the work.

Two iterations of two steps from the same weights with the same seeds: answers, judgements, verdicts on them,
log-probs of policy and reference, updates; then the policy becomes the reference, and Adam starts anew. All
judgements and verdicts of training are in samples.jsonl, with the answers that they are about.
"""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from align.judging import judge
from tests.support.files import read_jsonl, reproducible_metrics
from tests.support.launch import fork_ranks
from tests.support.rounding import close_self_reward

pytestmark = pytest.mark.slow

STEPS = 4
META = (
    "--meta-judge --meta-judge-template {trained}/data/meta_judge.txt --meta-judge-fraction 0.4 --loss scale"
)
ANSWERS = "--loss rpo_bwd_kl --sft-weight 0.2 --length-control 0 0.2 --beta 0.1 0.3"
CASES = {  # by number of processes: what is learnt and layout
    1: [
        (META, "--micro-batch-size 1"),
        (META, "--offload on --rollout-slots 5"),
        (ANSWERS, "--rollout-ahead 1"),
    ],
    2: [
        (META, ""),
        (META, "--tp 2 --offload on"),
        (META, "--pp 2"),
        (META, "--cp 2"),
        (META, "--deterministic"),
    ],
    4: [(META, "--tp 2 --pp 2")],
}
# of the rollout that a step begins with, whose length is --rollout-ahead
OF_ROLLOUT = ("ledger/tokens_sampled", "ledger/tokens_judgements", "ledger/tokens_waiting")


def run(trained: Path, output: Path, processes: int, cases: list[tuple[str, str]]) -> list[dict]:
    """Run all cases; returns their metrics without times and memory, and their tables of samples."""
    common = (
        f"train_self_reward.py --model {trained}/hf --train-data {trained}/data/train.jsonl "
        f"--val-data {trained}/data/val.jsonl --val-batches 1 --val-interval {STEPS} "
        f"--true-reward-fn align.data.toy:reward --judge-template {trained}/data/judge.txt --judgements 2 "
        "--samples-per-prompt 3 --temperature 0.8 --max-seq-len 36 --max-new-tokens 38 "
        "--global-batch-size 6 --micro-batch-tokens 256 --iterations 2 --steps-per-iteration 2 "
        "--rollout-ahead 2 --lr 2e-4 --min-lr 1e-4 --warmup-steps 0 --save-interval 0"
    )
    outputs = [output / str(i) for i in range(len(cases))]
    commands = [
        f"{common} --output {path} {kind.format(trained=trained)} {layout}".split()
        for path, (kind, layout) in zip(outputs, cases, strict=True)
    ]
    fork_ranks(processes, "tests/workers/resume.py", json.dumps(commands))
    return [
        {"metrics": reproducible_metrics(path), "samples": read_jsonl(path / "samples.jsonl")}
        for path in outputs
    ]


@pytest.fixture(scope="module")
def one_process(toy_judge, tmp_path_factory) -> tuple[dict[str, dict], list[dict]]:
    """{what is learnt: the plainest run of one process}, and those of CASES[1]."""
    plain = [(META, ""), (ANSWERS, "")]
    results = run(toy_judge, tmp_path_factory.mktemp("one"), 1, plain + CASES[1])
    return {kind: result for (kind, _), result in zip(plain, results, strict=False)}, results[len(plain) :]


def test_the_run_has_all_that_could_differ(one_process):
    """Judgements with scores of all kinds and without, verdicts, prompts without a pair, another policy."""
    without = []
    for kind, result in one_process[0].items():
        steps = result["metrics"][1:]
        assert len(steps) == STEPS and [step["train/iteration"] for step in steps] == [0, 0, 1, 1]
        assert sum(step["train/bad_ends_per_GBS"] for step in steps) > 0
        without += [why for step in steps for why in judge.REASONS if step[f"train/bad_{why}"] > 0]
        assert all(step["train/bad_samples_per_GBS"] < 1 for step in steps)
        unparsed = [step["train/judge_unparsed"] for step in steps]
        assert max(unparsed) > 0 and sum(unparsed) / STEPS < 0.5
        scores = Counter(row["score"] for row in result["samples"] if row["table"] == "train_judgements")
        assert len(scores) > 3 and scores.most_common(1)[0][1] < 0.7 * scores.total()
        # one cosine over both iterations, whatever becomes of Adam between them
        rates = [1e-4 + 1e-4 * (1 + math.cos(math.pi * i / STEPS)) / 2 for i in range(STEPS)]
        assert [step["train/lr"] for step in steps] == pytest.approx(rates, rel=1e-12)
        moved = [step["train/logratio_abs_mean"] for step in steps]
        assert moved[0] == moved[2] == 0 and min(moved[1], moved[3]) > 0.1
        before, after = (
            [row["judgement"] for row in result["samples"] if (row["step"], row["table"]) == place]
            for place in ((0, "val_judgements"), (STEPS, "val_judgements"))
        )
        assert min(len(before), len(after)) > 20 and before != after
        winners = [row["winner"] for row in result["samples"] if row["table"] == "train_comparisons"]
        assert (Counter(winners).total() > 20 and winners.count(None) < len(winners) / 2) == (kind == META)
        learnt = sum(step["train/meta_samples_per_GBS"] > 0 for step in steps)
        assert learnt > 2 if kind == META else learnt == 0
    assert len(without) > 1


@pytest.mark.parametrize("processes", CASES)
def test_every_layout_gives_the_same(processes, toy_judge, one_process, tmp_path):
    plain, results = one_process
    if processes > 1:
        results = run(toy_judge, tmp_path, processes, CASES[processes])
    for case, result in zip(CASES[processes], results, strict=True):
        expected = plain[case[0]]
        assert result["samples"] == expected["samples"], case
        assert len(result["metrics"]) == len(expected["metrics"])
        skipped = OF_ROLLOUT if "--rollout-ahead" in case[1] else ()
        for row, wanted in zip(result["metrics"], expected["metrics"], strict=True):
            close = {name: close_self_reward(name, wanted[name]) for name in wanted if name not in skipped}
            assert row == close | {name: row[name] for name in skipped if name in row}, case
        for name in OF_ROLLOUT[:2]:
            assert total(result, name) == total(expected, name) > 0, (case, name)


def total(result: dict, name: str) -> float:
    """The sum of a metric over all steps."""
    return sum(row.get(name, 0) for row in result["metrics"])
