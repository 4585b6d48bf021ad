"""Runs that are killed at random moments, over and over, end as if nothing had happened: make soak.

SOAK_KILLS: number of kills over all scripts; SOAK_SEED: of their moments.
"""

import os
import random
import shutil
import subprocess
import time

import pytest

from tests.support.files import reproducible_metrics
from tests.support.launch import start_torchrun
from tests.support.resume import (
    CASES,
    assert_ledger_closed,
    assert_same_end,
    command,
    finish,
    kept,
    kill_all,
    printed,
)

KILLS = int(os.environ.get("SOAK_KILLS", 100))


@pytest.mark.parametrize("number", range(len(CASES)), ids=CASES)
def test_soak(number, data, toy_judge, whole, tmp_path):
    name, case = list(CASES.items())[number]
    rng = random.Random(f"{os.environ.get('SOAK_SEED', 0)} {name}")
    output = tmp_path / "killed"
    launch = (2, printed(output), *command(case.script, data, output, *case.words(toy_judge)))
    start = time.monotonic()
    finish(start_torchrun(*launch), output)
    duration = time.monotonic() - start
    kills, ends, steps = 0, 1, []
    while kills < KILLS // len(CASES) + (number < KILLS % len(CASES)):
        if (output / "hf").is_dir():  # complete: begin a new one
            assert_same_end(output, whole / name)
            shutil.rmtree(output)
            ends += 1
        launcher = start_torchrun(*launch)
        try:
            assert launcher.wait(timeout=rng.uniform(0, duration)) == 0
        except subprocess.TimeoutExpired:
            kill_all(launcher, output)
            kills += 1
            steps.append(int(kept(output)[-1].removeprefix("step_")) if kept(output) else 0)
    finish(start_torchrun(*launch), output)
    assert_same_end(output, whole / name)
    assert_ledger_closed(output)
    assert len(reproducible_metrics(output)) == len(reproducible_metrics(whole / name)) and kept(
        output
    ) == kept(whole / name)
    print(f"\n{name}: {kills} kills, with {steps} steps saved; {ends + 1} runs ended as one without kills")
