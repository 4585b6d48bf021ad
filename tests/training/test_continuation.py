"""A run that continues is the same run, or says what is not: script, flags, training rows."""

import json
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import train_dpo
import train_ppo
import train_rm
import train_sft
from align.data.packing import data_order
from align.tracking.run import flatten
from align.training import checkpoint
from align.training.continuation import FREE, Continuation
from tests.support.files import ROOT, write_rows
from tests.support.launch import fork_python
from tests.support.rows import chats, comparisons

COMMON = "--max-seq-len 64 --global-batch-size 2 --max-steps 3 --warmup-steps 1"
STOP = ("--max-time", "00:00:00")  # after step 1
RL = (
    "--prompts-per-step 2 --samples-per-prompt 2 --max-new-tokens 4 --truncated keep --max-prompt-len 64 "
    "--reward-fn align.data.toy:reward --global-batch-size 4 --max-steps 3 --warmup-steps 1"
)
FLAGS = {  # script: changed flags, and the words of the refusal
    "sft": {
        "--global-batch-size 4": "--global-batch-size 2 -> 4",
        "--seed 7": "--seed 1234 -> 7",
        "--precision bf16": "--precision auto -> bf16",
        "--lr 1e-3": "--lr 1e-05 -> 0.001",
        "--min-lr 1e-7": "--min-lr 1e-06 -> 1e-07",
        "--warmup-steps 2": "--warmup-steps 1 -> 2",
        "--constant-steps 1": "--constant-steps 0 -> 1",
        "--weight-decay 0": "--weight-decay 0.01 -> 0.0",
        "--adam-beta2 0.9": "--adam-beta2 0.98 -> 0.9",
        "--clip-grad 2 --loss-on all": "--clip-grad 1.0 -> 2.0, --loss-on answer -> all",
        "--max-steps 4": "--max-steps 3 -> 4",
        "--max-epochs 2": "--max-epochs 1 -> 2",
        "--max-seq-len 80": "--max-seq-len 64 -> 80",  # with room for a row that was left out
        "--special-tokens-in-text allow": "--special-tokens-in-text split -> allow",
        "--model {tiny}": "--model tiny -> {tiny}",
    },
    "dpo": {
        "--loss ipo": "--loss dpo -> ipo",
        "--beta 0.5": "--beta None -> 0.5",
        "--loss cdpo --label-smoothing 0.1": "--loss dpo -> cdpo, --label-smoothing None -> 0.1",
        "--sft-weight 1": "--sft-weight None -> 1.0",
    },
    "ppo": {
        "--kl-coef 0.3": "--kl-coef 0.01 -> 0.3",
        "--clip 0.3": "--clip 0.2 -> 0.3",
        "--temperature 0.7": "--temperature 1.0 -> 0.7",
        "--samples-per-prompt 4": "--samples-per-prompt 2 -> 4",
        "--max-new-tokens 5": "--max-new-tokens 4 -> 5",
        "--gae-lambda 0.9": "--gae-lambda 0.95 -> 0.9",
        "--reward-fn align.rewards.gsm8k:reward": "--reward-fn align.data.toy:reward -> align.rewards.gsm8k",
    },
}
OTHERS = {  # checkpoint of, continued by, rows, flags: words of the refusal
    ("sft", "sft", "grown", ""): "rows of --train-data 8 -> 10, checksum of the token ids of --train-data ",
    ("sft", "sft", "edited", ""): "otherwise: checksum of the token ids of --train-data ",
    ("sft", "sft", "shuffled", ""): "otherwise: checksum of the token ids of --train-data ",
    ("dpo", "dpo", "other pairs", ""): "otherwise: checksum of the token ids of --train-data ",
    ("ppo", "ppo", "other prompts", ""): "otherwise: rows of --train-data 8 -> 7, checksum of the token ids ",
    ("dpo", "sft", "first", ""): "is of train_dpo.py, not of train_sft.py: give another --output",
    ("sft", "dpo", "pairs", ""): "is of train_sft.py, not of train_dpo.py: give another --output",
    ("dpo", "rm", "pairs", ""): "is of train_dpo.py, not of train_rm.py: give another --output",
    ("sft", "ppo", "prompts", RL): "is of train_sft.py, not of train_ppo.py: give another --output",
    ("sft", "sft", "first", "--resume-with-changes --no-resume"): "and --no-resume starts over: give one",
    ("sft", "sft", "first", "--resume-from x/step_00000001"): "x/step_00000001 is no checkpoint of --output",
}
ROWS = {"sft": "first", "dpo": "pairs", "ppo": "prompts"}
CHANGED = {
    (script, script, ROWS[script], flags): f"was trained otherwise: {words}"
    for script, changes in FLAGS.items()
    for flags, words in changes.items()
} | OTHERS
ALLOWED = {  # data and flags that change no number
    "same": ("first", ""),
    "free": (
        "first",
        "--save-interval 1 --save-top-k 3 --micro-batch-size 1 --monitor train/loss --profile 4:1",
    ),
    "another file": ("copy", "--micro-batch-tokens 128 --recompute full"),
}


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> dict[object, tuple[str | None, Path]]:
    """Error (None: it ran to its end) of each command, and its OUTPUT; the copied model of changed ones."""
    folder = tmp_path_factory.mktemp("resumed")
    rows = chats(10, seed=0)
    prompts = [{"prompt": [{"role": "user", "content": f"sort: d {x} a c"}]} for x in "befghijk"]
    data_sets = {
        "first": rows[:8],
        "copy": rows[:8],
        "grown": rows,
        "edited": [*rows[:7], rows[8]],
        "shuffled": [rows[1], rows[0], *rows[2:8]],
        "pairs": comparisons(8, seed=0),
        "other pairs": comparisons(8, seed=1),
        "prompts": prompts,
        "other prompts": prompts[1:],
    }
    files = {name: write_rows(folder / f"{name}.jsonl", some) for name, some in data_sets.items()}

    def command(script: str, output: Path, data: str, *flags: str) -> list[str]:
        words = [f"train_{script}.py", "--output", output, "--train-data", files[data]]
        return [str(word) for word in (*words, *(RL if script == "ppo" else COMMON).split(), *flags)]

    def attempt(commands: dict) -> dict:
        (folder / "commands.json").write_text(json.dumps(list(commands.values())))
        fork_python("tests/workers/scripts.py", folder)
        return dict(zip(commands, json.loads((folder / "errors.json").read_text()), strict=True))

    tiny = shutil.copytree(ROOT / "assets/tiny", folder / "tiny")
    stopped = {script: folder / "stopped" / script for script in ROWS}
    first = {script: command(script, stopped[script], ROWS[script], *STOP) for script in ROWS}
    first["whole"] = command(
        "sft", folder / "whole", "first", *"--save-interval 1 --save-top-k 3 --monitor train/loss".split()
    )
    errors, commands, outputs = attempt(first), {}, {"whole": folder / "whole"}
    assert set(errors.values()) == {None}
    for change in CHANGED:
        of, script, rows_of, flags = change
        commands[change] = command(script, stopped[of], rows_of, *flags.format(tiny=tiny).split())
    for name, (rows_of, flags) in ALLOWED.items():
        outputs[name] = shutil.copytree(stopped["sft"], folder / name)
        commands[name] = command("sft", outputs[name], rows_of, *flags.split())
    for name, flags in (("fewer", "--max-steps 2"), ("with changes", "--max-steps 9 --max-epochs 1")):
        outputs[name] = shutil.copytree(folder / "whole", folder / name)
        rows_of = "first" if name == "fewer" else "grown"
        commands[name] = command("sft", outputs[name], rows_of, *flags.split(), "--resume-with-changes")
    outputs["refused"] = shutil.copytree(folder / "whole", folder / "refused")
    earlier = outputs["refused"] / "checkpoints/step_00000001"
    commands["refused"] = command("sft", outputs["refused"], "grown", "--resume-from", str(earlier))
    commands["complete"] = first["whole"]
    outputs["complete"] = folder / "whole"
    outputs["from"] = outputs["free"]  # which keeps its checkpoints
    commands["from"] = [*commands["free"], "--resume-from", f"{outputs['free']}/checkpoints/step_00000002"]
    return {name: (error, outputs.get(name, tiny)) for name, error in attempt(commands).items()}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGED, ids=lambda change: " ".join(change))
def test_a_changed_run_is_refused_by_name(attempts, change):
    error, tiny = attempts[change]
    assert error and CHANGED[change].format(tiny=tiny) in error and "\n" not in error, error


def numbers(output: Path) -> list[dict]:
    """metrics.jsonl without times."""
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith(("time", "memory"))} for row in rows]


def same(actual: list[dict], wanted: list[dict]) -> bool:
    """True if two records are equal to rounding."""
    return all(row == pytest.approx(of, rel=1e-5) for row, of in zip(actual, wanted, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALLOWED)
def test_what_may_change_changes_no_number(attempts, name):
    error, output = attempts[name]
    assert error is None
    whole = numbers(output.parent / "whole")
    assert [row["step"] for row in whole] == [1, 2, 3]
    assert same(numbers(output), whole)


@pytest.mark.slow
def test_fewer_steps_than_are_finished(attempts):
    error, _ = attempts["fewer"]
    assert error.endswith("3 steps are finished, and the flags ask for 2 in all")


@pytest.mark.slow
def test_a_new_pass_over_changed_rows(attempts):
    error, output = attempts["with changes"]
    assert error is None
    log = (output / "log.txt").read_text()
    assert "continuing with changes: --max-steps 3 -> 9, rows of --train-data 8 -> 10" in log
    assert [row["step"] for row in numbers(output)] == [1, 2, 3, 4, 5, 6, 7, 8]  # 3, then 10 rows by 2
    state = checkpoint.read_state(checkpoint.newest(output / "checkpoints"))
    assert state["pass_start"] == 3 and state["identity"]["data"]["rows"] == 10


def test_a_new_pass_has_each_row_once():
    data = data_order(([np.array([i], np.int32)] for i in range(10)), rows_per_step=2, seed=3)
    run = Continuation(None, 7, pass_start=7, total_steps=17, identity={"data": data})
    for epoch in range(2):
        steps = range(7 + 5 * epoch, 12 + 5 * epoch)
        assert Counter(row for step in steps for row in run.rows_of_step(step)) == Counter(range(10))


@pytest.mark.slow
def test_a_complete_run_says_so(attempts):
    error, output = attempts["complete"]
    assert error is None and "the run is complete: all 3 steps are done" in (output / "log.txt").read_text()


@pytest.mark.slow
def test_resume_from_an_earlier_checkpoint(attempts):
    error, output = attempts["from"]
    assert error is None
    assert (output / "log.txt").read_text().count("continuing after step 2") == 1
    assert same(numbers(output), numbers(output.parent / "whole"))


@pytest.mark.slow
def test_a_refused_run_leaves_everything_as_it_was(attempts):
    error, output = attempts["refused"]
    assert "rows of --train-data 8 -> 10" in error
    for path in (path for path in (output.parent / "whole").rglob("*") if path.is_file()):
        copy = output / path.relative_to(output.parent / "whole")
        assert path.name == "log.txt" or copy.read_bytes() == path.read_bytes(), copy


def test_free_flags_are_flags():
    """Every name of FREE is a flag of some script: a misspelt one would compare what may change."""
    names = {
        name
        for script in (train_sft, train_rm, train_dpo, train_ppo)
        for name in flatten(asdict(script.Config()))
    }
    assert set(FREE) - names == set()
