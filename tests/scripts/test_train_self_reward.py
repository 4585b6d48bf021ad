"""Self-rewarding's flags: what is refused, how steps make iterations and rollouts, what each iteration takes.

More whole runs: tests/scripts/test_self_reward_step.py, test_self_reward_invariance.py and test_resume.py.
"""

import inspect
import json
import shutil
from pathlib import Path

import pytest

import train_self_reward
from align.data import toy
from align.data.formats import FormatConfig
from align.data.packing import BatchConfig
from align.errors import UserError
from align.generation.sampling import SamplingConfig
from align.judging.judge import JudgeConfig
from align.judging.meta_judge import MetaJudgeConfig
from align.training.config import LoopConfig
from tests.support.launch import fork_ranks
from train_self_reward import Config, of_iteration

# ---- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *(
            (
                {name: values, "iterations": iterations},
                f"--{name.replace('_', '-')} has {len(values)} values: give one, or one for each of the "
                f"{iterations} --iterations",
            )
            for name in ("length_control", "beta")
            for values, iterations in (((0.1,) * 2, 3), ((0.1,) * 4, 3), ((), 3), ((0.1,) * 2, 1))
        ),
        (
            {"first_iteration_sft": True, "iterations": 1},
            "--first-iteration-sft with --iterations 1 is fine-tuning alone: use train_sft.py",
        ),
        (
            {"true_reward_fn": "rules:score", "train_data": (Path("rows.jsonl"),)},
            "--true-reward-fn has no effect without --val-data: give both",
        ),
        (
            {"judge": JudgeConfig(judge_template=Path("my.txt"))},
            "--judge-template without --train-data: the toy task has a template of its own",
        ),
        (
            {"meta": MetaJudgeConfig(True, meta_judge_template=Path("my.txt"))},
            "--meta-judge-template without --train-data: the toy task has a template of its own",
        ),
        (
            {"meta": MetaJudgeConfig(True, 0.15), "batch": BatchConfig(global_batch_size=6)},
            "--meta-judge-fraction 0.15 of --global-batch-size 6 is no whole pair: raise one",
        ),
        (
            {"meta": MetaJudgeConfig(True), "judge": JudgeConfig(judgements=1)},
            "--meta-judge compares judgements of one response: give --judgements 2 or more",
        ),
        (
            {"sampling": SamplingConfig(greedy=True)},
            "--greedy gives the same response every time: leave it out",
        ),
        (
            {"val_data": (Path("rows.jsonl"),)},
            "--val-data without --train-data: give both, or none for the toy task",
        ),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(UserError) as error:
        Config(**flags)
    assert str(error.value) == message


def test_flags_that_go_together():
    config = Config(length_control=(0.0, 1.0, 0.5), beta=(0.2, 0.1, 1e-6), samples_per_prompt=2)
    assert config.iterations == 3 and config.beta[2] == 1e-6
    assert Config(iterations=1, length_control=(1.0,), sft_weight=0.0).length_control == (1.0,)
    for loss in ("scale", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq"):
        assert Config(loss=loss, reward_scale=2.0).reward_scale == 2.0
    assert Config(loop=LoopConfig(max_epochs=2)).steps_per_iteration is None
    assert Config(meta=MetaJudgeConfig(True, 0.25), batch=BatchConfig(global_batch_size=4)).meta.meta_judge
    assert Config(judge=JudgeConfig(judgements=1), batch=BatchConfig(global_batch_size=1)).iterations == 3
    assert Config(format=FormatConfig(loss_on="all"), first_iteration_sft=True).first_iteration_sft


def test_losses_that_take_the_gap_of_the_scores():
    for name, loss in train_self_reward.LOSSES.items():
        assert ("gap" in inspect.signature(loss).parameters) == (name in train_self_reward.WITH_GAP)


# ---- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "flags", "loop", "of_iteration", "total"),
    [
        (40, {}, {}, 5, 15),  # of 8 rows each, three times
        (47, {}, {}, 5, 15),  # the last 7 make no step
        (40, {}, {"max_epochs": 2}, 10, 30),
        (47, {"iterations": 2}, {"max_epochs": 3}, 15, 30),
        (40, {"steps_per_iteration": 3}, {}, 3, 9),
        (40, {"steps_per_iteration": 7, "iterations": 2}, {}, 7, 14),  # more than there are rows for
        (40, {}, {"max_steps": 12}, 5, 12),  # the last iteration is a part
        (40, {}, {"max_steps": 4}, 5, 4),
        (40, {}, {"max_steps": 16}, 5, 15),
        (8, {"iterations": 1}, {}, 1, 1),
    ],
)
def test_steps_by_hand(rows, flags, loop, of_iteration, total):
    config = Config(batch=BatchConfig(global_batch_size=8), loop=LoopConfig(**loop), **flags)
    assert (config.iteration_steps(rows), config.total_steps(rows)) == (of_iteration, total)


@pytest.mark.parametrize(
    ("ahead", "starts"),
    [
        (1, [0, 1, 2, 3, 4] + [5, 6, 7, 8, 9] + [10, 11]),
        (2, [0, 0, 2, 2, 4] + [5, 5, 7, 7, 9] + [10, 10]),
        (3, [0, 0, 0, 3, 3] + [5, 5, 5, 8, 8] + [10, 10]),
        (5, [0, 0, 0, 0, 0] + [5, 5, 5, 5, 5] + [10, 10]),
        (99, [0, 0, 0, 0, 0] + [5, 5, 5, 5, 5] + [10, 10]),
    ],
)
def test_steps_that_are_sampled_together(ahead, starts):
    """Iterations of 5 steps: none is sampled with steps of another, whose reference is another."""
    config = Config(rollout_ahead=ahead)
    assert [config.rollout_start(step, 5) for step in range(12)] == starts


# ---- what an iteration takes ---------------------------------------------------------------------


def test_values_by_iteration():
    assert [of_iteration((0.0, 0.0, 0.1), iteration) for iteration in range(3)] == [0.0, 0.0, 0.1]
    assert [of_iteration((0.3,), iteration) for iteration in range(3)] == [0.3] * 3
    assert of_iteration((0.3,), 0) == 0.3


def test_values_of_each_step():
    """Steps and rollouts of 3 iterations of 2 steps."""
    config = Config(length_control=(0.0, 0.2, 0.1), beta=(0.3, 0.2, 0.1), steps_per_iteration=2)
    steps = range(config.total_steps(100))
    for values, expected in (
        (config.length_control, [0.0, 0.0, 0.2, 0.2, 0.1, 0.1]),
        (config.beta, [0.3, 0.3, 0.2, 0.2, 0.1, 0.1]),
    ):
        assert [of_iteration(values, step // config.iteration_steps(100)) for step in steps] == expected


# ---- lengths -------------------------------------------------------------------------------------


def lengths(prompt: int, answer: int, micro_batch: int) -> Config:
    return Config(
        format=FormatConfig(max_seq_len=prompt),
        sampling=SamplingConfig(max_new_tokens=answer),
        batch=BatchConfig(micro_batch_tokens=micro_batch),
    )


def test_lengths_that_just_fit():
    """The tutorial's 4096 and 2048 too: a long prompt leaves its response less, the judge prompt is cut."""
    lengths(60, 40, 200).check_lengths(100)
    lengths(100, 99, 200).check_lengths(100)
    lengths(4096, 2048, 8192).check_lengths(4096)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lengths(101, 40, 202),
            "--max-seq-len 101 is beyond the model's context of 100 tokens: lower it",
        ),
        (
            lengths(60, 100, 202),
            "--max-new-tokens 100 leaves a prompt no token of the model's context of 100: lower it",
        ),
        (
            lengths(60, 30, 179),
            "--max-seq-len 60 and --max-new-tokens 30 make sequences of 90 tokens, of which a pair has two: "
            "raise --micro-batch-tokens 179",
        ),
        (
            lengths(4096, 2048, 8191),
            "--max-seq-len 4096 and --max-new-tokens 2048 make sequences of 4096 tokens, of which a pair has "
            "two: raise --micro-batch-tokens 8191",
        ),
    ],
)
def test_lengths_that_are_refused(config, message):
    with pytest.raises(UserError) as error:
        config.check_lengths(4096 if config.format.max_seq_len == 4096 else 100)
    assert str(error.value) == message


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """plain: without data; sft: a first iteration of fine-tuning, then one of the random tiny model's own."""
    folder = tmp_path_factory.mktemp("runs")
    small = "--global-batch-size 4 --max-new-tokens 4 --val-batches 1 --save-interval 0 --lr 1e-2"
    commands = [
        f"train_self_reward.py --output {folder}/plain --max-steps 2 {small}",
        f"train_self_reward.py --output {folder}/sft --first-iteration-sft --iterations 2 "
        f"--steps-per-iteration 3 --max-seq-len 64 {small}",
    ]
    fork_ranks(1, "tests/workers/resume.py", json.dumps([command.split() for command in commands]))
    return folder


@pytest.mark.slow
def test_without_arguments_the_tiny_model_runs(runs):
    """It is random: no judgement has a score, so no step learns, and the log says so."""
    rows = [json.loads(line) for line in (runs / "plain/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [row["train/bad_few"] for row in rows[1:]] == [1.0, 1.0]
    assert not any("loss" in name for name in rows[1] if name.startswith("train/"))
    log = (runs / "plain/log.txt").read_text()
    assert "step 2: no prompt gave a pair, so nothing was learnt" in log
    assert (runs / "plain/data/judge.txt").read_text() == toy.JUDGE_TEMPLATE


@pytest.mark.slow
def test_first_iteration_sft(runs):
    """Fine-tuning on the rows lowers their loss; then the model is its own judge, from where it has come."""
    rows = [json.loads(line) for line in (runs / "sft/metrics.jsonl").read_text().splitlines()]
    assert [row.get("train/iteration") for row in rows] == [None, 0, 0, 0, 1, 1, 1]
    assert rows[3]["train/loss"] < rows[1]["train/loss"]
    assert "train/bad_few" not in rows[3] and rows[4]["train/bad_few"] == 1.0
    data_loss = [row["val/data_loss"] for row in rows if "val/data_loss" in row]
    assert len(data_loss) == 3 and data_loss[1] < data_loss[0] - 0.1
    assert data_loss[2] == data_loss[1]  # nothing was learnt since


@pytest.mark.slow
def test_prompts_and_responses_beyond_the_context(toy_judge, tmp_path):
    """64 + 38 tokens on a context of 83: of 45 left to a judge prompt some need more, and are shortened.

    The row of 62 tokens leaves its responses 21.
    """
    shutil.copytree(toy_judge / "hf", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 83}))
    rows = (toy_judge / "data" / "train.jsonl").read_text().splitlines()[:3]
    question = {"role": "user", "content": "sort: " + " ".join("cabdefghijcabdef")}
    rows.append(json.dumps({"messages": [question, {"role": "assistant", "content": "a"}]}))
    (tmp_path / "rows.jsonl").write_text("".join(row + "\n" for row in rows))
    command = (
        f"train_self_reward.py --model {tmp_path}/model --train-data {tmp_path}/rows.jsonl "
        f"--output {tmp_path}/run --judge-template {toy_judge}/data/judge.txt --judgements 1 "
        "--iterations 1 --global-batch-size 4 --max-seq-len 64 --max-new-tokens 38 --micro-batch-tokens 166 "
        "--save-interval 0"
    )
    fork_ranks(1, "tests/workers/resume.py", json.dumps([command.split()]))
    [row] = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < row["train/judge_shortened"] < 1 and 0 < row["train/judge_asked"] <= 1, row
    assert "judge prompts of more than 45 tokens are shortened" in (tmp_path / "run" / "log.txt").read_text()
