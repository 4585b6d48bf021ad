"""PPO samples, judges and learns the same, however its ranks share the work.

Three whole steps from the same weights with the same seeds: rollout, scores, log-probs of policy and
reference, values, advantages, and four updates (two of the answers' halves, twice) of policy and critic. The
score of --reward-fn depends on each character of an answer, so that equal mean rewards mean equal answers.
"""

import json
from pathlib import Path

import pytest

from tests.support.files import read_jsonl, reproducible_metrics
from tests.support.launch import fork_ranks
from tests.support.rounding import PPO_CANCELS

pytestmark = pytest.mark.slow

STEPS = 3
BY_RULE = "--reward-fn tests.support.rewards:reward"
MODEL = "train_ppo.py --samples-per-prompt 2 --global-batch-size 8 --reward-model {rm} --critic-lr 1e-3"
RULE = (  # its critic starts as the language model with a head of zeros
    f"train_ppo.py --samples-per-prompt 2 --global-batch-size 8 {BY_RULE} --critic-lr 1e-3"
)
GRPO = f"train_grpo.py --samples-per-prompt 4 --global-batch-size 16 {BY_RULE} --kl-in loss --kl k3"
SEQUENCE = (
    f"train_grpo.py --samples-per-prompt 4 --global-batch-size 16 {BY_RULE} --ratio sequence --clip 0.02 "
    "--clip-high 0.03 --aggregate response --advantage-scale batch --entropy-coef 0.01"
)
CASES = {  # by number of processes: kind of PPO and layout
    1: [
        (MODEL, "--micro-batch-size 1 --recompute full"),
        (RULE, "--micro-batch-tokens 64"),
        (RULE, "--offload on --rollout-slots 5"),
        (GRPO, "--micro-batch-tokens 64 --offload on"),
        (GRPO, "--micro-batch-size 1"),
        (SEQUENCE, "--micro-batch-size 1"),
    ],
    2: [
        (MODEL, ""),
        (MODEL, "--tp 2 --offload on"),
        (MODEL, "--cp 2"),
        (RULE, "--deterministic --offload on"),
        (RULE, "--rollout-layout reshard --rollout-tp 2"),
        (RULE, "--tp 2 --sequence-parallel --rollout-layout same"),
        (RULE, "--pp 2 --vp 2"),
        (GRPO, "--micro-batch-tokens 64"),
        (GRPO, "--tp 2 --recompute selective"),
        (GRPO, "--pp 2 --rollout-layout same --offload on"),
        (GRPO, "--cp 2 --micro-batch-tokens 128"),
        (SEQUENCE, "--cp 2"),
        (SEQUENCE, ""),
    ],
    4: [
        (MODEL, "--tp 2 --pp 2"),
        (RULE, "--tp 2 --rollout-layout same --sequence-parallel --micro-batch-tokens 64"),
        (GRPO, "--pp 2 --cp 2"),
    ],
}
COUNTED = {"train_optim/clip_fraction", "train_optim/critic_value_clip_fraction"}


def run(toy_models: Path, output: Path, processes: int, cases: list[tuple[str, str]]) -> list[dict]:
    """Run all cases; returns their metrics without times and memory, and their tables of samples."""
    common = (
        f"--model {toy_models}/sft/hf --train-data {toy_models}/data/train.jsonl "
        f"--val-data {toy_models}/data/val.jsonl --prompts-per-step 8 --ppo-epochs 2 --kl-coef 0.05 "
        "--max-prompt-len 48 --max-new-tokens 10 --temperature 0.8 --lr 3e-4 "
        f"--max-steps {STEPS} --val-interval {STEPS} --save-interval 0"
    )
    outputs = [output / str(i) for i in range(len(cases))]
    commands = [
        f"{kind.format(rm=toy_models / 'rm/hf')} {common} --output {path} {layout}".split()
        for path, (kind, layout) in zip(outputs, cases, strict=True)
    ]
    fork_ranks(processes, "tests/workers/resume.py", json.dumps(commands))
    return [
        {"metrics": reproducible_metrics(path), "samples": read_jsonl(path / "samples.jsonl")}
        for path in outputs
    ]


@pytest.fixture(scope="module")
def one_process(toy_models, tmp_path_factory) -> tuple[dict[str, dict], list[dict]]:
    """{kind: the plainest run of one process}, and those of CASES[1]."""
    plain = [(kind, "") for kind in (MODEL, RULE, GRPO, SEQUENCE)]
    results = run(toy_models, tmp_path_factory.mktemp("one"), 1, plain + CASES[1])
    return {kind: result for (kind, _), result in zip(plain, results, strict=False)}, results[len(plain) :]


def test_the_run_has_all_that_could_differ(one_process):
    """Answers of both ends, advantages of both signs, a policy that leaves the reference, clips that bind."""
    for kind, result in one_process[0].items():
        steps = result["metrics"][1:]
        assert len(steps) == STEPS
        assert 0.5 < steps[0]["train_rollouts/ended"] < 1
        # whitened, or of a prompt's answers their sum 0: all are 0, or some are on each side of it
        assert all(step["train_rollouts/advantages_std"] > 0.1 for step in steps)
        assert steps[0]["train_rollouts/init_policy_kl"] == 0
        assert all(step["train_rollouts/init_policy_kl"] > 0 for step in steps[1:])
        assert any(step["train_optim/clip_fraction"] > 0 for step in steps)
        if kind == RULE:  # a critic that starts as a language model has values of 0
            for name in ("values_mean", "values_std", "explained_variance"):
                assert steps[0][f"train_rollouts/{name}"] == 0 != steps[1][f"train_rollouts/{name}"]
        critic = [step.get("train_optim/critic_value_clip_fraction", 0.0) for step in steps]
        assert (max(critic) > 0) == (kind in (MODEL, RULE))
        before, after = (
            [row["response"] for row in result["samples"] if (row["step"], row["table"]) == place]
            for place in ((0, "val_rollouts"), (STEPS, "val_rollouts"))
        )
        assert len(before) == len(after) == 4 and before != after


@pytest.mark.parametrize("processes", CASES)
def test_every_layout_gives_the_same(processes, toy_models, one_process, tmp_path):
    plain, results = one_process
    if processes > 1:
        results = run(toy_models, tmp_path, processes, CASES[processes])
    for case, result in zip(CASES[processes], results, strict=True):
        assert_same(result, plain[case[0]], exact=case[0] != MODEL, case=case)


def assert_same(result: dict, expected: dict, exact: bool, case: tuple[str, str]) -> None:
    """The same samples, numbers of training to 1e-5; rewards bit for bit if `exact`, else to 1e-5."""
    assert len(result["metrics"]) == len(expected["metrics"])
    for row, wanted in zip(result["metrics"], expected["metrics"], strict=True):
        assert row == {name: close(name, wanted[name], exact) for name in wanted}, case
    for row, wanted in zip(result["samples"], expected["samples"], strict=True):
        assert row | {"reward": 0} == wanted | {"reward": 0}, case
        assert row["reward"] == close("rewards", wanted["reward"], exact), case


def close(name: str, value: float, exact: bool) -> object:
    """Tolerance of a metric: counts of responses or tokens are exact, the rest to 1e-5 of itself or a unit.

    A reward model's scores are some units apart, and their mean may be near 0, too. The audit's errors are
    nothing but rounding, which each layout has of its own, except for the ratio of the first update: in every
    layout it is 1 to the last bit.
    """
    if name == "audit/ratio_error":
        return 0.0
    if name in PPO_CANCELS or ("rewards" in name and not exact):
        return pytest.approx(value, rel=1e-5, abs=1e-5)
    if name.startswith("audit/"):
        return pytest.approx(0.0, abs=1e-5)
    rounded = name.startswith("train_optim/") or name.endswith(("_std", "/entropy"))
    return pytest.approx(value, rel=1e-5) if rounded and name not in COUNTED else value
