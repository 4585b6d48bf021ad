"""tools.replay: a step of each script computed again, in its own layout and in another one."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from align.data import toy
from align.errors import UserError
from tests.support.files import read_jsonl, write_rows
from tests.support.launch import fork_ranks
from tests.support.resume import CASES, command
from tools import replay
from tools.replay import Config

SHORT = "--precision fp32 --max-steps 3 --save-interval 1 --val-interval 2 --record 1 --warmup-steps 1"
SCRIPTS = ("sft", "rm", "dpo", "ppo", "grpo", "rs", "self_reward")


@pytest.fixture(scope="module")
def runs(toy_judge, tmp_path_factory) -> Path:
    """A folder of runs of three steps on two data parallel ranks, which keep all their checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    toy.write(folder / "data", num_train=80, num_val=8)
    toy.write_comparisons(folder / "data", num_train=80, num_val=8)
    words = {name: case.words(toy_judge) for name, case in CASES.items()} | {"grpo": ["--deterministic"]}
    more = {"rm": ["--val-interval", "3"]}  # step 2 without scores after an update: see docs/proofs.md
    commands = [
        command(
            f"train_{name}.py",
            folder / "data",
            folder / name,
            *words[name],
            *SHORT.split(),
            *more.get(name, []),
        )
        for name in SCRIPTS
    ]
    fork_ranks(2, "tests/workers/resume.py", json.dumps(commands), timeout_s=600)
    return folder


def launch(processes: int, words: list[str], python: Path) -> subprocess.CompletedProcess:
    return fork_ranks(processes, *words, check=False)


def again(run: Path, step: int, *extra: str, **options: object) -> tuple[bool, str]:
    return replay.replay(Config(run, step, **options), extra, launch)


def files(run: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of all files of a run."""
    stats = {str(path): path.stat() for path in run.rglob("*") if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_step_has_the_same_bits_again(name, runs):
    before = files(runs / name)
    is_equal, message = again(runs / name, 3)
    assert is_equal and message.endswith("metrics, equal to the last bit"), message
    assert f"{name}: step 3 computed again in the run's own layout: " in message
    assert files(runs / name) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_step_in_another_layout(name, runs):
    is_equal, message = again(runs / name, 2, "--tp", "2")
    assert is_equal and "within 1e-05" in message, message
    assert "step 2 computed again in 2 process(es) --tp 2: " in message


def copy(run: Path, folder: Path) -> Path:
    return shutil.copytree(run, folder / run.name)


@pytest.mark.slow
def test_the_first_step_and_several_steps(runs, tmp_path):
    """Step 1 needs no checkpoint; without the one of step 1, steps 2 and 3... are computed from the first."""
    assert again(runs / "sft", 1)[0]
    run = copy(runs / "sft", tmp_path)
    shutil.rmtree(run / "checkpoints/step_00000002")
    is_equal, message = again(run, 3)
    assert is_equal and "steps 2 to 3 computed again" in message


@pytest.mark.slow
def test_tampered_metrics_and_checkpoints_are_named(runs, tmp_path):
    """One unit in the last place of a loss; a byte of a checkpoint."""
    run = copy(runs / "grpo", tmp_path)
    rows = read_jsonl(run / "metrics.jsonl")
    right = rows[-1]["train_optim/grad_norm"]
    rows[-1]["train_optim/grad_norm"] = wrong = right * (1 + 2**-52)
    write_rows(run / "metrics.jsonl", rows)
    is_equal, message = again(run, 3)
    assert not is_equal
    assert message.endswith(f": train_optim/grad_norm differs: {wrong!r} in the run, now {right!r}")

    path = next((run / "checkpoints/step_00000002").glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"the replay failed: damaged checkpoint: .*{path.name}"):
        again(run, 3)


@pytest.mark.slow
def test_samples_of_the_record_are_taken(runs, tmp_path):
    """Recorded log-probs that are 0.01 nats lower show in the audit: they were not sampled again."""
    run = copy(runs / "grpo", tmp_path)
    path = run / "records/step_000003/samples.safetensors"
    arrays = {name: x - 0.01 if name.endswith("/logprobs") else x for name, x in load_file(path).items()}
    save_file(arrays, path)
    is_equal, message = again(run, 3, "--tp", "2", "--audit-mean", "inf", "--audit-tail", "inf")
    assert not is_equal and "audit/logprob_error differs" in message


# ---- without runs ----------------------------------------------------------------------------------


def fake_run(folder: Path, steps: int, *checkpoints: int) -> Path:
    write_rows(folder / "metrics.jsonl", [{"step": step, "train/loss": 1.0} for step in range(steps + 1)])
    (folder / "config.json").write_text(json.dumps({"flags": {}, "world_size": 2}))
    for step in checkpoints:
        (folder / f"checkpoints/step_{step:08d}").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("step", "extra", "message"),
    [
        (9, (), "metrics.jsonl has no step 9: it ends with step 6"),
        (0, (), "metrics.jsonl has no step 0: it ends with step 6"),
        (3, (), "no checkpoint before step 3: --record N --save-interval N keep those before steps 1, N"),
        (5, ("--lr", "1"), "--lr: a replay may change the layout only"),
        (5, ("--output=x",), "--output: a replay may change the layout only"),
        (5, (), "it holds no script of this repository"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(step, extra, message, tmp_path):
    run = fake_run(tmp_path, 6, 4, 6)
    with pytest.raises(UserError, match=message):
        again(run, step, *extra)


def test_the_newest_checkpoint_before_a_step(tmp_path):
    run = fake_run(tmp_path, 6, 2, 4, 6)
    found = [replay.checkpoint_before(run, step) for step in (1, 3, 5, 6, 7)]
    assert [path and path.name[-1] for path in found] == [None, "2", "4", "4", "6"]


@pytest.mark.parametrize(
    ("extra", "processes"), [((), 4), (("--tp", "2"), 4), (("--tp", "2", "--pp", "4"), 8), (("--cp", "3"), 3)]
)
def test_processes_of_a_layout(extra, processes):
    assert replay.default_processes(4, extra) == processes


@pytest.mark.parametrize(
    ("actual", "bound", "is_equal", "words"),
    [
        ({"a": 2.0, "audit/x": 0.0, "train/lr": 1e-6}, 0.0, True, "3 metrics, equal to the last bit"),
        (
            {"a": 2.00001, "audit/x": 1e-6, "train/lr": 1e-6},
            1e-5,
            True,
            "within 1e-05; most 5.0e-06, of a: 2.0",
        ),
        (
            {"a": 2.00003, "audit/x": 1e-6, "train/lr": 1e-6},
            1e-5,
            False,
            "a differs: 2.0 in the run, now 2.00003",
        ),
        (
            {"a": 2.0, "audit/x": 2e-5, "train/lr": 1.1e-6},
            1e-5,
            False,
            "audit/x differs: .*; 2 of 3 metrics differ",
        ),
        ({"a": 2.0, "audit/x": 0.0, "train/lr": 1.0000001e-6}, 1e-5, False, "train/lr differs"),
        (
            {"a": 2.0, "train/lr": 1e-6},
            1.0,
            False,
            "audit/x is in one of both only: 0.0 in the run, now None",
        ),
        ({"a": 2.0, "audit/x": 0.0, "train/lr": 1e-6, "b": 1}, 1.0, False, "b is in one of both only: None"),
        ({"a": float("nan"), "audit/x": 0.0, "train/lr": 1e-6}, 1.0, False, "a differs"),
    ],
)
def test_compare(actual, bound, is_equal, words):
    found, message = replay.compare({"a": 2.0, "audit/x": 0.0, "train/lr": 1e-6}, actual, bound)
    assert found == is_equal
    assert re.search(words, message), message
