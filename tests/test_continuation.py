"""A run that continues is the same run, or says what is not: script, flags, training rows."""

import json
import re
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
from align import checkpoint
from align.continuation import FREE, Continuation
from align.metrics import flatten
from align.packing import data_order
from tests.conftest import fork_python
from tests.test_scripts import chats, comparisons, write_rows

COMMON = "--max-seq-len 64 --global-batch-size 2 --max-steps 3 --warmup-steps 1"
STOP = ("--max-time", "00:00:00")  # after step 1
CHANGED = {  # (script that made the checkpoint, script that continues, data, flags): words of the refusal
    "grown": (
        "sft",
        "sft",
        "grown",
        "",
        r"rows of --train-data 8 -> 10, checksum of the token ids \S+ \S+ \d+ -> \d+\. ",
    ),
    "edited": (
        "sft",
        "sft",
        "edited",
        "",
        r"otherwise: checksum of the token ids of --train-data \d+ -> \d+\. ",
    ),
    "shuffled": (
        "sft",
        "sft",
        "shuffled",
        "",
        r"otherwise: checksum of the token ids of --train-data \d+ -> \d+\. ",
    ),
    "batch": ("sft", "sft", "first", "--global-batch-size 4", r"otherwise: --global-batch-size 2 -> 4\. "),
    "seed": ("sft", "sft", "first", "--seed 7", r"otherwise: --seed 1234 -> 7\. "),
    "precision": ("sft", "sft", "first", "--precision bf16", r"otherwise: --precision auto -> bf16\. "),
    "lr": ("sft", "sft", "first", "--lr 1e-3", r"otherwise: --lr 1e-05 -> 0\.001\. "),
    "steps": ("sft", "sft", "first", "--max-steps 4", r"otherwise: --max-steps 3 -> 4\. "),
    "two": (
        "sft",
        "sft",
        "first",
        "--clip-grad 2 --loss-on all",
        r"otherwise: --clip-grad 1\.0 -> 2\.0, --loss-on answer -> all\. ",
    ),
    "kwargs": (
        "sft",
        "sft",
        "first",
        "--special-tokens-in-text allow",
        r"--special-tokens-in-text split -> allow\. ",
    ),
    "loss": ("dpo", "dpo", "pairs", "--loss ipo", r"otherwise: --loss dpo -> ipo\. "),
    "beta": ("dpo", "dpo", "pairs", "--beta 0.5", r"otherwise: --beta None -> 0\.5\. "),
    "other pairs": ("dpo", "dpo", "other pairs", "", r"otherwise: checksum of the token ids of --train-data"),
    "sft after dpo": (
        "dpo",
        "sft",
        "first",
        "",
        r"is of train_dpo\.py, not of train_sft\.py: give another --output",
    ),
    "dpo after sft": (
        "sft",
        "dpo",
        "pairs",
        "",
        r"is of train_sft\.py, not of train_dpo\.py: give another --output",
    ),
    "rm after dpo": (
        "dpo",
        "rm",
        "pairs",
        "",
        r"is of train_dpo\.py, not of train_rm\.py: give another --output",
    ),
    "no resume": (
        "sft",
        "sft",
        "first",
        "--resume-with-changes --no-resume",
        r"--resume-with-changes continues a run, and --no-resume",
    ),
    "from nowhere": (
        "sft",
        "sft",
        "first",
        "--resume-from nowhere/step_00000001",
        r"--resume-from nowhere/step_00000001 is no checkpoint of --output",
    ),
}
ALLOWED = {  # data and flags that change no number
    "same": ("first", ""),
    "free": (
        "first",
        "--save-interval 1 --save-top-k 3 --micro-batch-size 1 --monitor train/loss",
    ),
    "another file": ("copy", "--micro-batch-tokens 128 --recompute full"),
}


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str | None, Path]]:
    """Error (None: it ran to its end) and OUTPUT of each command."""
    folder = tmp_path_factory.mktemp("resumed")
    rows = chats(10, seed=0)
    data_sets = {
        "first": rows[:8],
        "copy": rows[:8],
        "grown": rows,
        "edited": [*rows[:7], rows[8]],
        "shuffled": [rows[1], rows[0], *rows[2:8]],
        "pairs": comparisons(8, seed=0),
        "other pairs": comparisons(8, seed=1),
    }
    files = {name: write_rows(folder / f"{name}.jsonl", some) for name, some in data_sets.items()}

    def command(script: str, output: Path, data: str, *flags: str) -> list[str]:
        words = [f"train_{script}.py", "--output", output, "--train-data", files[data], *COMMON.split()]
        return [str(word) for word in (*words, *flags)]

    def attempt(commands: dict[str, list[str]]) -> dict[str, str | None]:
        (folder / "commands.json").write_text(json.dumps(list(commands.values())))
        fork_python("tests/scripts_worker.py", folder)
        return dict(zip(commands, json.loads((folder / "errors.json").read_text()), strict=True))

    made = {name: folder / "made" / name for name in ("sft", "dpo")}
    data = {"sft": "first", "dpo": "pairs"}
    first = {name: command(name, made[name], data[name], *STOP) for name in made}
    first["whole"] = command(
        "sft", folder / "whole", "first", *"--save-interval 1 --save-top-k 3 --monitor train/loss".split()
    )
    errors, commands, outputs = attempt(first), {}, {"whole": folder / "whole"}
    assert set(errors.values()) == {None}
    for name, (of, script, rows_of, flags, _) in CHANGED.items():
        commands[name] = command(script, made[of], rows_of, *flags.split())
    for name, (rows_of, flags) in ALLOWED.items():
        outputs[name] = shutil.copytree(made["sft"], folder / name)
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
    return {name: (error, outputs.get(name)) for name, error in attempt(commands).items()}


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_run_is_refused_by_name(attempts, name):
    error, _ = attempts[name]
    assert error and re.search(CHANGED[name][4], error), error
    assert "\n" not in error


def numbers(output: Path) -> list[dict]:
    """metrics.jsonl without times."""
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith(("time", "memory"))} for row in rows]


def same(found: list[dict], wanted: list[dict]) -> bool:
    """True if two records are equal to rounding."""
    return all(row == pytest.approx(of, rel=1e-5) for row, of in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ALLOWED)
def test_what_may_change_changes_no_number(attempts, name):
    error, output = attempts[name]
    assert error is None
    whole = numbers(output.parent / "whole")
    assert [row["step"] for row in whole] == [1, 2, 3]
    assert same(numbers(output), whole)


def test_fewer_steps_than_are_finished(attempts):
    error, _ = attempts["fewer"]
    assert error.endswith("3 steps are finished, and the flags ask for 2 in all")


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


def test_a_complete_run_says_so(attempts):
    error, output = attempts["complete"]
    assert error is None and "the run is complete: all 3 steps are done" in (output / "log.txt").read_text()


def test_resume_from_an_earlier_checkpoint(attempts):
    error, output = attempts["from"]
    assert error is None
    assert (output / "log.txt").read_text().count("continuing after step 2") == 1
    assert same(numbers(output), numbers(output.parent / "whole"))


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
