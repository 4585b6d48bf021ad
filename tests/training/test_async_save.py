"""--async-save: what is saved is the state of its step, whatever happens while it is written.

That changes of the weights do not reach the copy is shown in test_checkpoint_states.py.
"""

import json
from pathlib import Path

import pytest
import torch

from align.training import checkpoint_writer
from tests.support.files import reproducible_metrics
from tests.support.launch import Launcher, fork_ranks, start_forks
from tests.support.resume import (
    CASES,
    STEPS,
    assert_same_end,
    command,
    finish,
    kept,
    kill_all,
    printed,
    ranks,
    steps_printed,
    wait_for,
)

NAMES = {"sft": "", "ppo": "--offload on", "self_reward": ""}  # one model, two, one with a reference


def run_of(name: str, data: Path, judge: Path, output: Path, *flags: object) -> list[str]:
    """A command of CASES."""
    return command(CASES[name].script, data, output, *CASES[name].words(judge), *NAMES[name].split(), *flags)


@pytest.fixture(scope="module")
def ends(data, toy_judge, tmp_path_factory) -> Path:
    """Runs of NAMES, and the same ones with --async-save."""
    folder = tmp_path_factory.mktemp("ends")
    runs = [
        run_of(name, data, toy_judge, folder / (name + "-async" * len(flags)), *flags)
        for name in NAMES
        for flags in ((), ("--async-save",))
    ]
    fork_ranks(2, "tests/workers/resume.py", json.dumps(runs), timeout_s=600)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_run_is_the_same(name, ends):
    assert_same_end(ends / f"{name}-async", ends / name)
    assert kept(ends / f"{name}-async") == kept(ends / name)


def hold_save(step: int, hold: Path, run: list[str], output: Path) -> Launcher:
    """Start SFT on two ranks, and wait until it has gone on for three steps while a save is held back."""
    hold.touch()
    launcher = start_forks(2, printed(output), "tests/workers/async_save.py", step, hold, *run)
    wait_for(lambda: steps_printed(output) >= 1 + step + 3, launcher, output)
    assert (output / f"checkpoints/step_{step:08d}.tmp").is_dir()
    assert not (output / f"checkpoints/step_{step:08d}").exists()
    return launcher


@pytest.mark.slow
def test_killed_while_it_writes(data, toy_judge, ends, tmp_path):
    """The next start continues from the checkpoint before; then both ranks end as if nothing had happened."""
    output, hold = tmp_path / "killed", tmp_path / "hold"
    run = run_of("sft", data, toy_judge, output, "--async-save")
    launcher = hold_save(16, hold, run, output)
    kill_all(launcher, output)
    assert kept(output) == ["step_00000008"]
    fork_ranks(2, *run)
    assert "continuing after step 8" in (output / "log.txt").read_text()
    assert_same_end(output, ends / "sft")
    assert kept(output) == kept(ends / "sft")
    assert not list(output.glob("checkpoints/*.tmp"))


@pytest.mark.slow
def test_a_signal_finishes_the_save(data, toy_judge, ends, tmp_path):
    """A run that is told to stop waits for the files of the save under way, and saves its last step."""
    output, hold = tmp_path / "stopped", tmp_path / "hold"
    run = run_of("sft", data, toy_judge, output, "--async-save", "--save-top-k", 9)
    launcher = hold_save(8, hold, run, output)
    ranks(launcher)[1].terminate()
    with pytest.raises(AssertionError, match="do not end"):
        launcher.wait(timeout=3)
    assert kept(output) == []
    hold.unlink()
    finish(launcher, output)
    first, last = kept(output)
    assert first == "step_00000008"
    step = int(last.removeprefix("step_"))
    assert f"SIGTERM received: stopped after step {step} of {STEPS}" in printed(output).read_text()
    fork_ranks(2, *run_of("sft", data, toy_judge, output))  # --async-save may change
    assert reproducible_metrics(output) == reproducible_metrics(ends / "sft")


@pytest.mark.slow
def test_a_full_disk_ends_the_run(data, toy_judge, tmp_path):
    """One line names the file, and the checkpoint before is what remains."""
    output = tmp_path / "full"
    run = run_of("sft", data, toy_judge, output, "--async-save")
    done = fork_ranks(2, "tests/workers/async_save.py", 16, "full", *run, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "step_00000016.tmp/__" in last
    assert last.endswith("_0.distcp: No space left on device")
    assert kept(output) == ["step_00000008"]


def test_what_shares_memory_is_copied():
    shared, gathered = torch.arange(3.0), torch.arange(4.0)
    live = {shared.untyped_storage().data_ptr()}
    bucket = ("path", "name", ([], [("a", shared), ("b", gathered)]))
    path, name, (objects, tensors) = checkpoint_writer.copy(bucket, live)
    assert (path, name, objects) == ("path", "name", [])
    shared.zero_()
    assert tensors[0] == ("a", tensors[0][1]) and tensors[0][1].tolist() == [0, 1, 2]
    assert tensors[1][1] is gathered
