"""Uninterrupted runs, which those that were stopped or killed are compared with."""

import json
from pathlib import Path

import pytest

from align.data import toy
from tests.support.launch import fork_ranks
from tests.support.resume import CASES, LAST, command, self_reward_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of chats and of comparisons for 20 steps in an epoch."""
    directory = tmp_path_factory.mktemp("data")
    toy.write(directory, num_train=80, num_val=8)
    toy.write_comparisons(directory, num_train=80, num_val=8)
    return directory


@pytest.fixture(scope="module")
def whole(data, toy_judge, tmp_path_factory) -> Path:
    """A folder of uninterrupted runs: each of CASES, and six at tp 2 that keep all their checkpoints.

    Of those at tp 2 some end before step 32, with the last step that is compared with another layout.
    """
    directory = tmp_path_factory.mktemp("whole")
    runs = [
        command(case.script, data, directory / name, *case.words(toy_judge)) for name, case in CASES.items()
    ]
    at_tp2 = ("--tp", 2, "--save-top-k", 99)
    for name, flags in (("rm", ""), ("dpo", ""), ("rs", ""), ("ppo", CASES["ppo"].flags)):
        last = ("--max-steps", LAST[name], *flags.split())
        runs.append(command(CASES[name].script, data, directory / f"{name}-tp2", *at_tp2, *last))
    lora = ("--max-steps", LAST["dpo_lora"], "--lora-rank", 4)
    runs.append(command("train_dpo.py", data, directory / "dpo_lora-tp2", *at_tp2, *lora))
    runs.append(command(*self_reward_run(data, toy_judge, directory / "self_reward-tp2"), *at_tp2))
    fork_ranks(2, "tests/workers/resume.py", json.dumps(runs), timeout_s=600)
    return directory
