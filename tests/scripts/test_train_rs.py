"""Rejection sampling: what is selected, what is refused, and what a run logs, does and says when it fails."""

import json
import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from align.data import toy
from align.errors import UserError
from align.generation.rollout import Sample
from align.generation.sampling import SamplingConfig
from align.rewards.sources import RewardConfig
from tests.support.files import TINY, read_jsonl, without_times, write_rows
from tests.support.generation import sample_of
from tests.support.launch import fork_ranks
from tests.support.models import MEAN, STD, save_reward_model
from train_rs import Config, select

NEW_TOKENS = 5
UNIFORM = math.log(264)  # loss of the random tiny model in nats, nearly: it knows nothing of 264 tokens
LAST_WORDS = "the judge is out of office"
DATA = {"train_data": (Path("rows.jsonl"),)}

# ---- select --------------------------------------------------------------------------------------


def sample(*ids: int, ended: bool = True) -> Sample:
    rated = sample_of(list(ids))
    return Sample(rated.ids, rated.logprobs, rated.model_logprobs, "stop" if ended else "length")


def open_end(*ids: int) -> Sample:
    return sample(*ids, ended=False)


@pytest.mark.parametrize(
    ("samples", "values", "keep_top", "truncated", "duplicates", "expected"),
    [
        ([sample(1), sample(2), sample(3)], [1, 3, 2], 1, "drop", "drop", ([1], 0, 0)),
        ([sample(1), sample(2), sample(3)], [1, 3, 2], 2, "drop", "drop", ([1, 2], 0, 0)),
        ([sample(1), sample(2), sample(3)], [-1, -3, -2], 3, "drop", "drop", ([0, 2, 1], 0, 0)),
        # of equal rewards those sampled first
        ([sample(1), sample(2), sample(3)], [2, 2, 2], 1, "drop", "drop", ([0], 0, 0)),
        ([sample(1), sample(2), sample(3)], [0, 2, 2], 1, "drop", "drop", ([1], 0, 0)),
        ([sample(1), sample(2), sample(3)], [2, 0, 2], 2, "drop", "drop", ([0, 2], 0, 0)),
        # the best did not end
        ([sample(1), open_end(2), sample(3)], [1, 3, 2], 1, "drop", "drop", ([2], 1, 0)),
        ([sample(1), open_end(2), sample(3)], [1, 3, 2], 1, "keep", "drop", ([1], 0, 0)),
        # fewer are left than are wanted
        ([sample(1), open_end(2), sample(3)], [1, 3, 2], 3, "drop", "drop", ([2, 0], 1, 0)),
        # 0 and 1 have the same tokens, 3 begins with them only
        ([sample(7, 8), sample(7, 8), sample(9), sample(7, 8, 9)], [5, 5, 1, 0], 2, "drop", "drop")
        + (([0, 2], 0, 1),),
        ([sample(7, 8), sample(7, 8), sample(9), sample(7, 8, 9)], [5, 5, 1, 0], 2, "drop", "keep")
        + (([0, 1], 0, 0),),
        # twice the same, of which the first did not end: the other one counts, and is no duplicate
        ([open_end(7), sample(7), sample(9)], [5, 5, 1], 2, "drop", "drop", ([1, 2], 1, 0)),
        ([open_end(7), sample(7), sample(9)], [5, 5, 1], 2, "keep", "drop", ([0, 2], 0, 1)),
        # three of a kind
        ([sample(7), sample(7), sample(7)], [1, 1, 1], 3, "drop", "drop", ([0], 0, 2)),
        # nothing is left
        ([open_end(1), open_end(2)], [1, 2], 1, "drop", "drop", ([], 2, 0)),
        ([open_end(1), open_end(2)], [1, 2], 1, "keep", "drop", ([1], 0, 0)),
    ],
)
def test_select(samples, values, keep_top, truncated, duplicates, expected):
    best, fates = select(samples, np.array(values, float), keep_top, truncated, duplicates)
    assert (best, fates.count("truncated"), fates.count("duplicate")) == expected
    assert [k for k, fate in enumerate(fates) if not fate] == sorted(best)


# ---- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"keep_top": 9}, "--keep-top 9 is above --samples-per-prompt 8"),
        (DATA, "no reward: give --reward-model DIR or --reward-fn module:function"),
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
    config = Config(**DATA, reward=RewardConfig(reward_fn="a:b"), prompts_per_step=3, keep_top=8)
    assert config.rows_per_step == 3
    assert Config(sampling=SamplingConfig(greedy=True), samples_per_prompt=1).keep_top == 1


# ---- runs on two processes -----------------------------------------------------------------------


def noted(prompt: str, response: str, row: dict) -> float:
    """A reward of the response's characters, of which it writes down what it was called with."""
    value = sum(map(ord, response)) % 97 / 10
    line = json.dumps([row["kind"], prompt, response, value]) + "\n"
    with Path(row["log"]).open("a") as file:
        file.write(line)
    row.clear()  # its own copy: the next answer to this prompt finds all fields
    return value


def zero(prompt: str, response: str, row: dict) -> float:
    return 0.0


def broken(prompt: str, response: str, row: dict) -> float:
    """Fails on one answer, and so on one rank, which says when."""
    if row["kind"] == "fatal" and not Path(row["log"]).exists():
        Path(row["log"]).write_text(str(time.time()))
        raise ConnectionError(LAST_WORDS)
    return 0.0


def write_prompts(path: Path, kind: str, count: int, log: Path, prompt: str = "say {}: ") -> list[dict]:
    """Prompts in a file, all different."""
    rows = [{"prompt": prompt.format(i), "kind": kind, "log": str(log)} for i in range(count)]
    write_rows(path, rows)
    return rows


def commands(folder: Path) -> dict[str, list[object]]:
    """The command of each run; those with a name of a reward function write their calls to calls.jsonl."""
    write_prompts(folder / "train.jsonl", "train", 8, folder / "calls.jsonl")
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "x" * 200, "kind": "long", "log": "none"}) + "\n")
    write_prompts(folder / "val.jsonl", "val", 3, folder / "calls.jsonl")
    steps = ("--prompts-per-step", 4, "--samples-per-prompt", 4, "--max-steps", 2)
    short = ("--max-new-tokens", NEW_TOKENS, "--max-prompt-len", 64)
    train = ("--train-data", folder / "train.jsonl")
    by_function = ("--reward-fn", "tests.scripts.test_train_rs:noted")
    keep = ("--truncated", "keep", "--duplicates", "keep")
    two = ("--keep-top", 2, "--global-batch-size", 4, "--lr", 1e-3, "--audit-quantile", 0.01)
    flags_of_runs = {
        "function": [*steps, *short, *train, "--val-data", folder / "val.jsonl", *by_function, *keep, *two],
        "model": [*steps, "--max-new-tokens", 1, *keep, "--val-batches", 1, "--tp", 2]
        + ["--reward-model", save_reward_model(folder / "judge"), "--reward-standardise", "auto"],
        "toy": [*steps, *short, "--val-batches", 1],
    }
    return {name: ["train_rs.py", *flags, "--output", folder / name] for name, flags in flags_of_runs.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """OUTPUT of each of the commands under its name, all from one start of two processes."""
    folder = tmp_path_factory.mktemp("train_rs")
    lines = [[str(word) for word in command] for command in commands(folder).values()]
    fork_ranks(2, "tests/workers/resume.py", json.dumps(lines))
    return folder


def metrics(folder: Path, name: str) -> list[dict[str, float]]:
    """Lines of a run's metrics.jsonl, by step."""
    rows = read_jsonl(folder / name / "metrics.jsonl")
    steps = [row["step"] for row in rows]
    assert steps in ([0, 1, 2], [1, 2])
    return rows


STATISTICS = {"rewards", "response_lengths", "prompt_lengths", "ended"}
SELECTION = {"selected", "dropped_low", "dropped_truncated", "dropped_duplicates", "rewards_selected"}


@pytest.mark.slow
def test_names_of_the_metrics(folder):
    before, *steps = metrics(folder, "function")
    val = {f"val_rollouts/{name}" for name in STATISTICS}
    assert set(before) == val | {"step"}
    train = {f"train_rollouts/{name}" for name in STATISTICS | SELECTION | {"prompts_without_spread"}}
    train |= {f"train_optim/{name}" for name in ("loss", "grad_norm", "lr", "updates")}
    train |= {f"audit/logprob_{part}" for part in ("error", "error_quantile", "error_max", "bias")} | {"step"}
    fates = ("sampled", "trained", "truncated", "duplicate", "low", "not_selected")
    train |= {"ledger/pass", "ledger/prompts_used", *(f"ledger/tokens_{fate}" for fate in fates)}
    assert [without_times(row) for row in steps] == [train, train | val]
    for row in steps:
        timers = {name for name in row if name.startswith("timers/")}
        assert timers - {"timers/validation_time"} == {"timers/rollout_time", "timers/train_time"}
        shares = {name for name in row if name.startswith("time/")}
        assert {"time/step", "time/generate", "time/score", "time/audit", "time/train"} <= shares


def calls(folder: Path) -> dict[str, list[list[tuple[str, str, float]]]]:
    """(prompt, response, reward) of the reward function's calls, by rollout: "train" two, "val" two.

    Those of one rollout come after all of the one before, since its answers are given to every rank.
    """
    lines = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    of = {kind: [tuple(rest) for kind_, *rest in lines if kind_ == kind] for kind in ("train", "val")}
    train, val = of["train"], of["val"]
    assert len(train) == 2 * 16 and len(val) == 2 * 3
    return {"train": [train[:16], train[16:]], "val": [val[:3], val[3:]]}


@pytest.mark.slow
def test_rewards_in_the_metrics_are_those_of_the_function(folder):
    """Means over all answers, and over the two best to each of four prompts."""
    rows, rollouts = metrics(folder, "function"), calls(folder)
    for row, rated in zip((rows[0], rows[2]), rollouts["val"], strict=True):
        assert row["val_rollouts/rewards"] == pytest.approx(np.mean([value for *_, value in rated]))
    for row, rated in zip(rows[1:], rollouts["train"], strict=True):
        assert row["train_rollouts/rewards"] == pytest.approx(np.mean([value for *_, value in rated]))
        by_prompt = defaultdict(list)
        for prompt, _, value in rated:
            by_prompt[prompt].append(value)
        assert [len(values) for values in by_prompt.values()] == [4] * 4
        best = [sorted(values)[-2:] for values in by_prompt.values()]
        assert row["train_rollouts/rewards_selected"] == pytest.approx(np.mean(best))
        assert np.mean(best) > row["train_rollouts/rewards"]
        lengths = [len(prompt) for prompt, *_ in rated]  # a token is a character of these
        assert row["train_rollouts/prompt_lengths"] == pytest.approx(np.mean(lengths))


@pytest.mark.slow
def test_all_rows_are_used_once_in_an_epoch(folder):
    prompts = [sorted({prompt for prompt, *_ in rated}) for rated in calls(folder)["train"]]
    assert sorted(prompts[0] + prompts[1]) == [f"say {i}: " for i in range(8)]


@pytest.mark.slow
def test_samples_are_what_the_function_saw(folder):
    """The first answers of a rollout with their rewards: of validation all, in the order of the rows."""
    rows, rollouts = read_jsonl(folder / "function" / "samples.jsonl"), calls(folder)
    for step, number in ((0, 0), (2, 1)):
        shown = [row for row in rows if row["step"] == step and row["table"] == "val_rollouts"]
        assert [row["prompt"] for row in shown] == [f"say {i}: " for i in range(3)]
        rated = [(row["prompt"], row["response"], row["reward"]) for row in shown]
        assert sorted(rated) == sorted(rollouts["val"][number])
    for step in (1, 2):
        [shown] = [row for row in rows if row["step"] == step and row["table"] == "train_rollouts"]
        assert (shown["prompt"], shown["response"], shown["reward"]) in rollouts["train"][step - 1]


@pytest.mark.slow
def test_selected_answers_are_trained_on_in_batches(folder):
    """Two of each of 4 prompts' answers, four in an update: two updates a step."""
    for row in metrics(folder, "function")[1:]:
        assert row["train_rollouts/selected"] == 8 and row["train_optim/updates"] == 2
        assert row["train_rollouts/dropped_truncated"] == row["train_rollouts/dropped_duplicates"] == 0
        assert 0 < row["train_rollouts/response_lengths"] <= NEW_TOKENS
        assert row["train_optim/loss"] == pytest.approx(UNIFORM, rel=0.1)
        assert row["train_optim/grad_norm"] > 0 and row["audit/logprob_error_max"] < 1e-4
        assert row["audit/logprob_error_quantile"] < row["audit/logprob_error_max"]  # the minimum here


@pytest.mark.slow
def test_too_long_prompts_are_dropped_and_counted(folder):
    log = (folder / "function" / "log.txt").read_text()
    assert "train data: 9 prompts, 1 dropped too long, " in log
    assert "longest" in log and "val data: 3 prompts, " in log


@pytest.fixture(scope="module")
def idle(folder) -> Path:
    """OUTPUT of runs in whose first steps nothing, or almost nothing, is selected."""
    flags = ["train_rs.py", "--model", folder / "function" / "hf", "--train-data", folder / "train.jsonl"]
    flags += ["--reward-fn", "tests.scripts.test_train_rs:zero"]
    flags += ["--max-prompt-len", 64, "--max-new-tokens", 1]
    flags += ["--prompts-per-step", 4, "--samples-per-prompt", 4, "--output"]
    keep = ["--truncated", "keep", "--max-steps", 2, "--min-reward"]
    nothing = [*flags, folder / "nothing", "--max-steps", 2]
    runs = [[*nothing, "--max-time", "00:00:00"], nothing]  # one step, and then the other
    runs += [[*flags, folder / "low", *keep, 1e-9], [*flags, folder / "enough", *keep, 0]]
    lines = [[str(word) for word in command] for command in runs]
    fork_ranks(1, "tests/workers/resume.py", json.dumps(lines))
    return folder


def same_weights(folder: Path, names: tuple[str, str]) -> bool:
    first, second = (load_file(folder / name / "hf" / "model.safetensors") for name in names)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_step_that_selects_nothing_goes_on(idle):
    """No answer of one token ends: nothing is trained on, and the result is the model it started from.

    A checkpoint can be saved, and continued from, before there has been an update.
    """
    log = (idle / "nothing" / "log.txt").read_text()
    assert "continuing after step 1" in log
    assert "none of the 16 responses of the first rollout ended within --max-new-tokens 1" in log
    for row in read_jsonl(idle / "nothing" / "metrics.jsonl"):
        assert row["train_rollouts/selected"] == row["train_optim/updates"] == 0
        assert row["train_rollouts/dropped_truncated"] == 16 and row["train_rollouts/ended"] == 0
        assert row["train_rollouts/response_lengths"] == 1
        assert not {"train_optim/loss", "train_optim/grad_norm", "train_rollouts/rewards_selected"} & set(row)
    assert same_weights(idle, ("function", "nothing"))


@pytest.mark.slow
def test_rewards_without_spread_are_said_and_counted(idle, folder):
    """A step in which all answers to each prompt are worth the same; not one in which some are."""
    message = "all responses to a prompt have one reward, for every prompt of the step"
    log = (idle / "enough" / "log.txt").read_text()
    assert f"step 1: {message}" in log and f"step 2: {message}" in log
    for row in metrics(idle, "enough"):
        assert row["train_rollouts/prompts_without_spread"] == 1.0
    assert message not in (folder / "function" / "log.txt").read_text()
    by_prompt = [{prompt: set() for prompt, *_ in rated} for rated in calls(folder)["train"]]
    for row, rated, values in zip(
        metrics(folder, "function")[1:], calls(folder)["train"], by_prompt, strict=True
    ):
        for prompt, _, value in rated:
            values[prompt].add(value)
        flat = sum(len(some) == 1 for some in values.values())
        assert row["train_rollouts/prompts_without_spread"] == flat / 4 < 1


@pytest.mark.slow
def test_answers_below_the_least_reward_are_left_out(idle):
    """All rewards are 0; --min-reward 0 keeps them, 1e-9 does not."""
    for row in metrics(idle, "low"):
        assert row["train_rollouts/selected"] == 0 and row["train_rollouts/dropped_low"] == 16
    for row in metrics(idle, "enough"):
        assert row["train_rollouts/selected"] == 4 and row["train_rollouts/dropped_low"] == 0
    assert same_weights(idle, ("function", "low")) and not same_weights(idle, ("function", "enough"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "toy"])
def test_toy_task(name, folder):
    """Without data, by a reward model and by the toy's own function."""
    rows = metrics(folder, name)
    assert {f"train_rollouts/{part}" for part in STATISTICS} <= set(rows[1])
    shown = [row for row in read_jsonl(folder / name / "samples.jsonl") if row["table"] == "val_rollouts"]
    assert [row["step"] for row in shown] == [0] * 4 + [2] * 4
    for step in (0, 2):
        values = [row["reward"] for row in shown if row["step"] == step]
        assert rows[step]["val_rollouts/rewards"] == pytest.approx(np.mean(values))
    scores = [toy.toy_score(row["prompt"], row["response"]) for row in shown]
    if name == "toy":
        assert [row["reward"] for row in shown] == scores == [0.0] * 8
        log = (folder / "toy" / "log.txt").read_text()
        for row in rows[1:]:  # as the script's docstring says of the random tiny model
            assert (
                row["train_rollouts/rewards"] == 0.0 and row["train_rollouts/prompts_without_spread"] == 1.0
            )
            assert f"step {row['step']}: all responses to a prompt have one reward" in log


@pytest.mark.slow
def test_the_reward_model_judges_the_toy_task_too(folder):
    """Its scores are those of transformers, where the answer's text has the tokens that were sampled.

    They are standardised by the numbers in its directory, as --reward-standardise auto has it.
    """
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "judge")
    text = transformers.AutoTokenizer.from_pretrained(TINY)
    compared = 0
    for row in read_jsonl(folder / "model" / "samples.jsonl"):
        if "\ufffd" in row["response"] or not row["response"]:
            continue  # part of a character, or a stop token, which the text leaves out
        ids = text(row["prompt"] + row["response"], add_special_tokens=False).input_ids
        with torch.no_grad():
            score = judge(torch.tensor([ids])).logits.item()
        assert row["reward"] == pytest.approx((score - MEAN) / STD, abs=2e-4), row
        compared += 1
    assert compared >= 1
    rewards = [row["reward"] for row in read_jsonl(folder / "model" / "samples.jsonl")]
    assert np.std(rewards) > 0.01


@pytest.mark.slow
def test_a_failing_reward_function_stops_the_run(tmp_path):
    """On one rank, while the other waits for its rewards: within a minute, with the exception shown."""
    log = tmp_path / "failed_at"
    write_prompts(tmp_path / "rows.jsonl", "fatal", 4, log)
    flags = ("--prompts-per-step", 2, "--samples-per-prompt", 2, "--max-new-tokens", 2)
    data = ("--train-data", tmp_path / "rows.jsonl", "--output", tmp_path / "out")
    fatal = ("--reward-fn", "tests.scripts.test_train_rs:broken")
    done = fork_ranks(2, "train_rs.py", *flags, *data, *fatal, check=False)
    assert time.time() - float(log.read_text()) < 60
    assert done.returncode != 0
    assert f"failed: {LAST_WORDS}" in done.stderr and f"ConnectionError: {LAST_WORDS}" in done.stderr
    assert not (tmp_path / "out" / "hf").exists()
