"""A run that is stopped or killed and started again ends as if nothing had happened.

Bit for bit in the same layout, to rounding in another. RESUME_KILLS (at most 10) says how often a run is
killed in place of the few times that CASES has.
"""

import contextlib
import json
import random
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from megatron.core import dist_checkpointing
from safetensors import safe_open

from align.errors import UserError
from align.training import checkpoint
from align.training.checkpoint import CheckpointConfig
from tests.support.files import reproducible_metrics
from tests.support.launch import Launcher, fork_ranks, start_forks, start_torchrun
from tests.support.resume import (
    CASES,
    LAST,
    SAVE_INTERVAL,
    STEPS,
    assert_ledger_closed,
    assert_same_end,
    command,
    finish,
    kept,
    kill_all,
    printed,
    ranks,
    samples,
    self_reward_run,
    steps_printed,
    wait_for,
)
from tests.support.rounding import PPO_CANCELS, close_self_reward

MAX_DELAY_S = {  # a kill falls up to so much after what it waits for
    "start": 4.0,  # from a launch by torchrun to about the first step
    "reference": 0.05,  # the whole pass takes some 0.3 s
    "steps": 0.2,
    "save": 0.05,  # which may take no more than 0.2 s
    "export": 0.0,  # is over in no time
}


# ---- kill -9 -----------------------------------------------------------------------------------------------


def is_saving(output: Path, since: float) -> bool:
    """True while a checkpoint is written. One left by an earlier kill, or being deleted, does not count."""
    newest = checkpoint.newest(output / "checkpoints")
    for path in output.glob("checkpoints/*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # renamed since
            if path.stat().st_ctime > since and (newest is None or path.stem > newest.name):
                return True
    return False


def kill_at_random(
    kind: str, rng: random.Random, launcher: subprocess.Popen | Launcher, output: Path
) -> None:
    """kill -9 of launcher and ranks: at start, in the pass of the reference, in steps, save or export."""
    delay = rng.uniform(0, MAX_DELAY_S[kind])
    # past a checkpoint (one line is that of step 0), so that the next start has steps to drop
    num_lines = SAVE_INTERVAL + 1 + rng.randint(1, 3)
    launch_time = time.time()
    happened = {
        "start": lambda: True,
        "reference": lambda: "reference log-probs: " in printed(output).read_text(),
        "steps": lambda: steps_printed(output) >= num_lines,
        "save": lambda: is_saving(output, launch_time),
        "export": (output / "hf.tmp").exists,
    }[kind]
    wait_for(happened, launcher, output)
    time.sleep(delay)
    assert launcher.poll() is None
    kill_all(launcher, output)
    if kind == "save":
        assert is_saving(output, launch_time), "killed too late: the save was over"
    if kind == "reference":
        assert not (output / "reference.safetensors").exists(), "killed too late: the pass was over"
    if kind == "export":
        assert not (output / "hf").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_run_ends_like_an_uninterrupted_one(name, data, toy_judge, whole, tmp_path):
    """Data parallel, with two ranks that each write a part of the checkpoint; torchrun starts SFT."""
    output, rng, case = tmp_path / "killed", random.Random(2), CASES[name]
    run = command(case.script, data, output, *case.words(toy_judge))
    start = start_torchrun if name == "sft" else start_forks
    tables, rollouts = [reference_file(output)], []
    for kind in case.kinds_of_kills():
        launcher = start(2, printed(output), *run)
        kill_at_random(kind, rng, launcher, output)
        tables.append(reference_file(output))
        rollouts.append(rollouts_left(output))
    fork_ranks(2, *run)
    tables.append(reference_file(output))
    assert len(reproducible_metrics(output)) == STEPS + 1
    log = (output / "log.txt").read_text()
    assert log.count("continuing after step") >= case.kinds_of_kills().count("steps")
    assert_same_end(output, whole / name)
    assert_ledger_closed(output)
    assert kept(output) == kept(whole / name)
    assert_written_once(tables, reference_file(whole / name))
    if name == "self_reward":
        assert_read_again(output, rollouts)


def reference_file(output: Path) -> tuple[int, int, bytes] | None:
    """Inode, time of change and content of OUTPUT/reference.safetensors, None where there is none."""
    path = output / "reference.safetensors"
    return (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) if path.exists() else None


def assert_written_once(
    seen: list[tuple[int, int, bytes] | None], expected: tuple[int, int, bytes] | None
) -> None:
    """Assert that the reference's file is absent, then for good the whole right file, after each kill."""
    written = [state for state in seen if state is not None]
    assert seen[: len(seen) - len(written)] + written == seen, "the file vanished"
    assert len(set(written)) <= 1, "the reference was computed again"
    assert (seen[-1] and seen[-1][2]) == (expected and expected[2])


def rollouts_left(output: Path) -> tuple[int, set[str]]:
    """Number of saved steps, and names of the finished files of samples, after a kill."""
    path = checkpoint.newest(output / "checkpoints")
    done = int(path.name.removeprefix("step_")) if path else 0
    return done, {file.stem for file in output.glob("rollouts/*.safetensors")}


def assert_read_again(output: Path, kills: list[tuple[int, set[str]]]) -> None:
    """Assert that samples of before a kill, three steps at a time in iterations of 14, are read again."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seconds = {row["step"]: row.get("timers/rollout_time") for row in rows}
    assert seconds[1] > 0
    for done, files in kills:
        if 0 < done < STEPS and done % 14 % 3:  # in the midst of three steps, whose rollouts are kept
            needed = {f"step_{done - done % 14 % 3 + 1:08d}_{kind}" for kind in ("generate", "judge")}
            assert needed <= files and seconds[done + 1] == 0
        for first in range(done + 1, STEPS + 1):
            if {f"step_{first:08d}_{kind}" for kind in ("generate", "judge", "meta_judge")} <= files:
                assert seconds[first] == 0
    assert any(seconds[done + 1] == 0 for done, _ in kills if done)


@pytest.mark.slow
def test_pairs_of_judgements_wait_in_the_checkpoint(whole):
    """They are of the reference's making, and new ones come only now and then."""
    path = checkpoint.newest(whole / "self_reward/checkpoints")
    assert len(json.loads((path / "judgements.json").read_text())["waiting"]) > 0
    learnt = [row.get("train/meta_samples_per_GBS", 0) for row in reproducible_metrics(whole / "self_reward")]
    assert sum(share > 0 for share in learnt) > 10


@pytest.mark.slow
def test_precomputed_reference_has_every_row_that_is_used(whole):
    """Two epochs use all 80 pairs; a NaN would stand for one that is not known."""
    with safe_open(whole / "dpo/reference.safetensors", "pt") as file:
        tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    assert {name: tuple(table.shape) for name, table in tables.items()} == {"train": (80, 2), "val": (8, 2)}
    assert all(bool((table < 0).all()) for table in tables.values())


# ---- told to stop, or another layout, at tp 2 in fp32 ------------------------------------------------------


@pytest.fixture(scope="module")
def at_tp2(data, tmp_path_factory) -> Path:
    """whole: an uninterrupted run that keeps all its checkpoints; timed: one that has no time at all."""
    directory = tmp_path_factory.mktemp("tp2")
    whole = command("train_sft.py", data, directory / "whole", "--tp", 2, "--save-top-k", 99)
    timed = command("train_sft.py", data, directory / "timed", "--tp", 2, "--max-time", "00:00:00")
    fork_ranks(2, "tests/workers/resume.py", json.dumps([whole, timed]))
    return directory


@pytest.mark.slow
def test_max_time(at_tp2):
    assert kept(at_tp2 / "timed") == ["step_00000001"]
    assert f"--max-time is over: stopped after step 1 of {STEPS}" in (at_tp2 / "timed/log.txt").read_text()
    assert not (at_tp2 / "timed/hf").exists()


@pytest.mark.slow
def test_stopped_run_ends_like_an_uninterrupted_one(data, at_tp2, tmp_path):
    """Stopped by --max-time, then by a signal to one rank, one to torchrun, a kill of torchrun alone."""
    output = tmp_path / "stopped"
    shutil.copytree(at_tp2 / "timed", output)
    run = command("train_sft.py", data, output, "--tp", 2)

    launcher = start_forks(2, printed(output), *run)
    wait_for(lambda: steps_printed(output) >= 2, launcher, output)
    ranks(launcher)[1].terminate()  # all must stop in the same step
    finish(launcher, output)
    assert_stopped(output)

    launcher = start_torchrun(2, printed(output), *run)
    wait_for(lambda: steps_printed(output) >= 2, launcher, output)
    launcher.terminate()  # torchrun tells its ranks, and waits for them
    assert launcher.wait(timeout=60) == 1
    assert_stopped(output)

    launcher = start_torchrun(2, printed(output), *run)
    wait_for(lambda: steps_printed(output) >= 2, launcher, output)
    orphans = ranks(launcher)
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(orphans, timeout=5)
    for process in alive:
        process.kill()
    assert not alive, "ranks go on without torchrun: with those of the next start they write to one OUTPUT"

    fork_ranks(2, *run)
    assert_same_end(output, at_tp2 / "whole")


def assert_stopped(output: Path) -> None:
    """The run said where it stopped by a signal, and left a checkpoint of that step."""
    step = checkpoint.newest(output / "checkpoints").name.removeprefix("step_")
    assert f"SIGTERM received: stopped after step {int(step)} of {STEPS}" in printed(output).read_text()
    assert not (output / "hf").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts",
    [("--pp 2", "--pp 2 --vp 2", "--tp 1", "--tp 2 --sequence-parallel"), ("--tp 1",)],
    ids=["2", "1"],
)
def test_another_layout_continues(layouts, data, at_tp2, tmp_path, request):
    """Saved at tp 2, continued at pp 2, dp 2, with sequence parallelism, and by one process."""
    runs = [(at_tp2 / "whole", "train_sft.py", layout, STEPS) for layout in layouts]
    continue_and_compare(int(request.node.callspec.id), runs, data, tmp_path)


@pytest.mark.slow
def test_preference_runs_continue_in_another_layout(data, whole, tmp_path):
    """Saved at tp 2, continued at pp 2 and dp 2, with a reference that is computed again or swapped in.

    With adapters the reference is the base, in each layout. Of the reward model two steps are compared, which
    need weights and Adam's state. Its loss does not change when all scores shift, so nothing but rounding
    says where they go, and Adam's steps have the size of --lr: not the scores are compared, but by how much
    the chosen ones exceed the rejected ones.
    """
    runs = [
        (whole / "dpo-tp2", "train_dpo.py", "--pp 2", LAST["dpo"]),
        (whole / "dpo-tp2", "train_dpo.py", "--reference swap", LAST["dpo"]),
        (whole / "dpo_lora-tp2", "train_dpo.py", "--lora-rank 4 --pp 2", LAST["dpo_lora"]),
        (whole / "dpo_lora-tp2", "train_dpo.py", "--lora-rank 4", LAST["dpo_lora"]),
        (whole / "rm-tp2", "train_rm.py", "--pp 2", LAST["rm"]),
    ]
    continue_and_compare(2, runs, data, tmp_path)


@pytest.mark.slow
def test_rejection_sampling_continues_in_another_layout(data, whole, tmp_path):
    """Saved at tp 2, where a copy of the weights samples; continued at pp 2 with one, at dp 2 without."""
    last = LAST["rs"]
    runs = [(whole / "rs-tp2", "train_rs.py", layout, last) for layout in ("--pp 2", "")]
    continue_and_compare(2, runs, data, tmp_path)
    expected = tables(whole / "rs-tp2", last)
    assert len(expected) == 8 + 2 * 4  # one answer of each step, four of each validation
    assert tables(tmp_path / "0", last) == tables(tmp_path / "1", last) == expected


@pytest.mark.slow
def test_ppo_continues_in_another_layout(data, whole, tmp_path):
    """Policy, critic and price of KL, from tp 2 to pp 2 and dp 2."""
    last, flags = LAST["ppo"], CASES["ppo"].flags
    runs = [(whole / "ppo-tp2", "train_ppo.py", f"{flags} {layout}", last) for layout in ("--pp 2", "")]
    continue_and_compare(2, runs, data, tmp_path)
    expected = tables(whole / "ppo-tp2", last)
    assert len(expected) == 4 + 4  # one answer of each step, four of the validation
    assert tables(tmp_path / "0", last) == tables(tmp_path / "1", last) == expected


@pytest.mark.slow
def test_self_rewarding_continues_in_another_layout(data, toy_judge, whole, tmp_path):
    """Policy, reference and waiting judgements, from tp 2 to dp 2; the three steps are sampled anew."""
    start, output = whole / "self_reward-tp2", tmp_path / "run"
    copy_run(start, output, 8)
    run = command(*self_reward_run(data, toy_judge, output))
    fork_ranks(2, "tests/workers/resume.py", json.dumps([run]))
    rows, expected = reproducible_metrics(output)[9:], reproducible_metrics(start)[9:]
    assert [row["step"] for row in rows] == [9, 10, 11, 12]
    for row, wanted in zip(rows, expected, strict=True):
        assert row == {name: close_self_reward(name, wanted[name]) for name in wanted}
    samples_of_start = [json.loads(line) for line in samples(start).splitlines()]
    assert [json.loads(line) for line in samples(output).splitlines()] == samples_of_start


def tables(output: Path, last: int) -> list[dict]:
    """Rows of samples.jsonl of the steps from 17 to `last`."""
    rows = [json.loads(line) for line in samples(output).splitlines()]
    return [row for row in rows if 16 < row["step"] <= last]


def copy_run(start: Path, output: Path, step: int) -> None:
    """Copy the files of a run after `step` steps, for another run that continues it."""
    name = f"checkpoints/step_{step:08d}"
    shutil.copytree(start / name, output / name)
    for file in ("metrics.jsonl", "samples.jsonl"):
        if (start / file).exists():
            shutil.copy(start / file, output)


def continue_and_compare(
    processes: int, runs: list[tuple[Path, str, str, int]], data: Path, folder: Path
) -> None:
    """Continue (whole run, script, flags of the layout, its last step) from step 16: equal to 1e-5."""
    outputs = [folder / str(i) for i in range(len(runs))]
    commands = []
    for output, (start, script, layout, last) in zip(outputs, runs, strict=True):
        copy_run(start, output, 16)
        commands.append(command(script, data, output, "--max-steps", last, *layout.split()))
    fork_ranks(processes, "tests/workers/resume.py", json.dumps(commands))
    for output, (start, script, layout, last) in zip(outputs, runs, strict=True):
        rows, expected = (
            [row for row in reproducible_metrics(run) if row["step"] > 16] for run in (output, start)
        )
        assert [row["step"] for row in rows] == list(range(17, last + 1)), (script, layout)
        for row, wanted in zip(rows, expected, strict=True):
            row, wanted = determined(script, row), determined(script, wanted)
            assert row == {name: close(name, wanted[name]) for name in wanted}, (script, layout)


def determined(script: str, row: dict[str, float]) -> dict[str, float]:
    """A row with the margin of a reward model in place of its means, which rounding alone moves together."""
    if script != "train_rm.py":
        return row
    kept = {name: value for name, value in row.items() if not name.endswith("_mean")}
    for group in {name.partition("/")[0] for name in row if name.endswith("rewards_all_mean")}:
        chosen, rejected = (row[f"{group}/rewards_{side}_mean"] for side in ("chosen", "rejected"))
        kept[f"{group}/rewards_margin"] = chosen - rejected
    return kept


def close(name: str, value: float) -> object:
    """Equal to 1e-5; a reward is a difference, near 0, of log-probs or scores that are not, as are others.

    The values of a critic that has taken few steps from its head of zeros differ from each other by a small
    part of their mean.
    The errors that the audit finds are nothing but rounding, which each layout has of its own.
    """
    if name.startswith("audit/") and name not in PPO_CANCELS:
        return pytest.approx(0.0, abs=1e-5)
    cancels = "rewards" in name or name in PPO_CANCELS or name == "train_rollouts/values_std"
    return pytest.approx(value, rel=1e-5, abs=1e-6 if cancels else 0.0)


# ---- what stops a run, and what starts it over -------------------------------------------------------------


@pytest.mark.slow
def test_missing_tensors_stop_the_run(data, at_tp2, tmp_path):
    path = tmp_path / "run/checkpoints/step_00000008"
    shutil.copytree(at_tp2 / "whole/checkpoints/step_00000008", path)
    (path / "__1_0.distcp").unlink()
    done = fork_ranks(1, *command("train_sft.py", data, tmp_path / "run"), check=False)
    assert done.returncode != 0
    assert "__1_0.distcp" in done.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.fixture(scope="module")
def restarted(data, tmp_path_factory) -> Path:
    """a: two steps, then a third with other flags; b: two steps, then one with --no-resume."""
    directory = tmp_path_factory.mktemp("restarted")
    a, b = (
        command("train_sft.py", data, directory / name, "--max-steps", 2, "--save-interval", 1)
        for name in "ab"
    )
    other = "--max-steps 3 --weight-decay 0.5 --adam-beta1 0.8 --resume-with-changes".split()
    runs = [a, a + other, b, [*b, "--no-resume", "--max-steps", "1"]]
    fork_ranks(1, "tests/workers/resume.py", json.dumps(runs))
    return directory


@pytest.mark.slow
def test_no_resume_starts_over(restarted):
    assert [row["step"] for row in reproducible_metrics(restarted / "b")] == [0, 1]
    assert kept(restarted / "b") == ["step_00000001"]


@pytest.mark.slow
def test_flags_win_over_a_checkpoint(restarted):
    """Megatron loads the optimizer's settings together with its state."""
    assert [row["step"] for row in reproducible_metrics(restarted / "a")] == [0, 1, 2, 3]
    path = checkpoint.newest(restarted / "a/checkpoints")
    common = dist_checkpointing.load_common_state_dict(str(path))
    groups = common["optimizer"]["optimizer"]["param_groups"]
    settings = sorted((group["weight_decay"], group["betas"], group["step"]) for group in groups)
    assert settings == [(0.0, (0.8, 0.98), 3), (0.5, (0.8, 0.98), 3)]


# ---- which checkpoints are kept ----------------------------------------------------------------------------


def fake(directory: Path, step: int, **values: float) -> Path:
    """A checkpoint as far as choosing goes: its state.json with metrics val/<name>."""
    path = directory / f"step_{step:08d}"
    path.mkdir(parents=True)
    state = {"step": step, "layout": {}, "metrics": {f"val/{name}": value for name, value in values.items()}}
    (path / "state.json").write_text(json.dumps(state))
    return path


def steps_left(directory: Path, top_k: int, monitor: str) -> list[int]:
    """Steps of the checkpoints that `prune` leaves."""
    checkpoint.prune(directory, CheckpointConfig(save_top_k=top_k, monitor=monitor))
    return sorted(int(path.name.removeprefix("step_")) for path in directory.iterdir())


@pytest.mark.parametrize(
    ("monitor", "top_k", "expected"),
    [
        ("val/loss", 1, [20, 50]),
        ("val_loss", 1, [20, 50]),
        ("validation_loss", 2, [20, 30, 50]),
        ("val_acc", 1, [10, 50]),
        ("val/acc", 3, [10, 30, 40, 50]),
        ("val/loss", 0, [50]),
    ],
)
def test_best_and_newest_are_kept(monitor, top_k, expected, tmp_path):
    losses, accuracies = (5.0, 1.0, 2.0, 3.0, 4.0), (0.9, 0.1, 0.7, 0.8, 0.2)
    for i, (loss, acc) in enumerate(zip(losses, accuracies, strict=True), 1):
        fake(tmp_path, 10 * i, loss=loss, acc=acc)
    assert steps_left(tmp_path, top_k, monitor) == expected


def test_of_equals_the_oldest_is_kept(tmp_path):
    """A checkpoint between two validations carries the older one's value: that one was measured."""
    for step in (70, 20, 60, 10, 40, 30, 50):
        fake(tmp_path, step, loss=1.0)
    assert steps_left(tmp_path, 2, "val_loss") == [10, 20, 70]


def test_without_validation_only_the_newest_is_kept(tmp_path):
    for step in (1, 2, 3):
        fake(tmp_path, step)
    assert steps_left(tmp_path, 5, "val_loss") == [3]


@pytest.mark.parametrize("monitor", ["val/accuracy", "loss", "validation_los", "time/step"])
def test_wrong_monitor_is_refused(monitor):
    known = {"val/loss": 1.0, "val/acc": 0.5, "train/loss": 2.0}
    with pytest.raises(UserError, match=rf"--monitor {monitor} is no metric of this run; it has .*val/loss"):
        checkpoint.check_monitor(CheckpointConfig(monitor=monitor), known)


def test_half_written_and_half_deleted_are_never_picked_up(tmp_path):
    assert checkpoint.newest(tmp_path / "absent") is None
    fake(tmp_path, 10, loss=1.0)
    fake(tmp_path, 20, loss=2.0).rename(tmp_path / "step_00000020.tmp")
    assert checkpoint.newest(tmp_path) == tmp_path / "step_00000010"
    (fake(tmp_path, 30, loss=3.0) / "state.json").unlink()  # no kill leaves that: it is damage, and named
    with pytest.raises(UserError, match="damaged checkpoint: .*step_00000030/state.json is missing"):
        checkpoint.read_state(checkpoint.newest(tmp_path))


def test_half_deleted_checkpoint_does_not_stop_a_save(tmp_path):
    """One that has lost its state.json is neither ranked nor deleted."""
    (fake(tmp_path, 10, loss=1.0) / "state.json").unlink()
    fake(tmp_path, 20, loss=2.0)
    fake(tmp_path, 30, loss=3.0)
    assert steps_left(tmp_path, 1, "val_loss") == [10, 20, 30]


def test_deleting_is_never_seen_half_done(tmp_path, monkeypatch):
    """A directory with a checkpoint's name is complete: deletion renames it first."""
    fake(tmp_path, 10, loss=2.0)
    fake(tmp_path, 20, loss=1.0)
    fake(tmp_path, 30, loss=3.0)
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)  # killed before it could delete anything
    assert checkpoint.newest(tmp_path).name == "step_00000030"
    checkpoint.prune(tmp_path, CheckpointConfig())
    assert sorted(path.name for path in tmp_path.glob("step_????????")) == ["step_00000020", "step_00000030"]


def test_is_due():
    assert [step for step in range(1, 13) if checkpoint.is_due(CheckpointConfig(save_interval=5), step)] == [
        5,
        10,
    ]
    assert not any(checkpoint.is_due(CheckpointConfig(save_interval=0), step) for step in range(1, 13))
