"""Compute a finished step of a run again, and compare every number of its metrics.

    python -m tools.replay runs/ppo --step 101
    python -m tools.replay runs/ppo --step 101 --tp 2 --processes 4
    python -m tools.replay runs/ppo --step 101 --python .venv-latest/bin/python

The run's script continues from the checkpoint before the step, in a directory of its own: nothing is written
into RUN. With the run's own layout and interpreter all metrics must be equal to the last bit. In another
layout, or with another version of Megatron-Core, they must be within --bound, and the samples of a recorded
step (--record) are taken in place of sampling: one token drawn otherwise would change all that follows.

Flags of the script may follow, as far as they change no number: --tp, --pp, --cp, --sequence-parallel,
--micro-batch-tokens and their kin. Exit status 0: equal, or within the bound; 1: a difference; 2: a wrong
flag, or a step that cannot be computed again.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated

import tyro

from align import console
from align.errors import UserError, one_line
from align.files import ROOT, read_object
from align.flags import flag_of
from align.tracking.output import complete_checkpoints
from align.tracking.run import as_json, read_row
from align.training.continuation import FREE
from align.training.record import SAMPLES
from tools.plan import load_script

DROPPED = (  # flags of the run that a replay sets itself, or leaves out
    "output wandb_project wandb_name profile record samples_from save_interval save_top_k async_save resume "
    "resume_from resume_with_changes max_time stop_after"
).split()
COPIED = ("config.json", "metrics.jsonl", "base.txt", "reference.txt", "reference.safetensors")
CHANGING = ("time/", "timers/", "memory/")  # metrics that differ from run to run
EXACT = ("ledger/", "train/lr", "train_optim/lr", "train_optim/critic_lr")  # in every layout
UNIT = "audit/"  # nothing but rounding: compared in nats
NEAR_ZERO = (
    0.1  # a smaller metric, a difference of log-probs or scores, has the rounding of what it is made of
)

Launch = Callable[[int, list[str], Path], subprocess.CompletedProcess]  # processes, command, interpreter


@dataclass(frozen=True)
class Config:
    """Replay of a step."""

    run: tyro.conf.Positional[Path]
    """OUTPUT directory of a run"""
    step: int
    """step to compute again, as metrics.jsonl counts, from 1"""
    processes: int | None = None
    """processes of the replay (default: as many as the run had, or those of one copy of the model if these do
    not divide them)"""
    python: Path | None = None
    """interpreter of another environment, with another version of Megatron-Core, for example"""
    bound: Annotated[float, tyro.conf.arg(name="bound")] = 1e-5
    """largest difference in another layout or version, relative to the metric, or to 0.1 if it is smaller;
    1e-5 fits fp32"""
    work: Path | None = None
    """directory for the replay's own run, which is kept (default: a temporary one)"""


def main() -> None:
    """Replay the step that the command line names; exit status as above."""
    config, extra = tyro.cli(
        Config, prog="python -m tools.replay", description=__doc__, return_unknown_args=True
    )
    is_equal, message = replay(config, extra)
    console.write(message)
    sys.exit(0 if is_equal else 1)


def replay(config: Config, extra: Sequence[str], launch: Launch | None = None) -> tuple[bool, str]:
    """True if the step was reproduced, and the report. `extra`: flags of the script, instead of the run's."""
    check_extra(extra)
    expected, record = metrics_of(config.run, config.step), read_object(config.run / "config.json")
    start = checkpoint_before(config.run, config.step)
    processes = config.processes or default_processes(record["world_size"], extra)
    is_own = not extra and processes == record["world_size"] and config.python is None
    with tempfile.TemporaryDirectory() as temporary:
        output = config.work or Path(temporary) / "replay"
        prepare(config.run, start, output)
        words = command(config, record["flags"], output, [] if is_own else samples_flag(config))
        done = (launch or run_script)(processes, [*words, *extra], config.python or Path(sys.executable))
        if done.returncode:
            raise UserError(f"the replay failed: {last_error(done.stderr + done.stdout)}")
        actual = metrics_of(output, config.step)
    first = 1 if start is None else step_of(start) + 1
    steps = f"step {config.step}" if first == config.step else f"steps {first} to {config.step}"
    where = "the run's own layout" if is_own else f"{processes} process(es) {' '.join(extra)}".rstrip()
    is_equal, verdict = compare(expected, actual, 0.0 if is_own else config.bound)
    return is_equal, f"{config.run}: {steps} computed again in {where}: {verdict}"


def check_extra(extra: Sequence[str]) -> None:
    """Refuse flags that change the numbers of a run."""
    for word in (word for word in extra if word.startswith("--")):
        name = word[2:].partition("=")[0].replace("-", "_").removeprefix("no_")
        if name not in FREE or name in DROPPED:
            raise UserError(
                f"{word.partition('=')[0]}: a replay may change the layout only, and work on ranks"
            )


def metrics_of(run: Path, step: int) -> dict[str, float]:
    """Reproducible metrics of a step. Raises UserError if the run has not finished it."""
    path = run / "metrics.jsonl"
    rows: dict[int, dict] = {}
    if not path.is_file():
        raise UserError(f"{path} is missing: give the OUTPUT of a run")
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        row = read_row(f"{path}:{number}", line)
        rows.setdefault(row["step"], row)  # a second row of the last step is that of the test set
    if step < 1 or step not in rows:
        raise UserError(f"{path} has no step {step}: it ends with step {max(rows, default=0)}")
    return {name: value for name, value in rows[step].items() if not name.startswith((*CHANGING, "step"))}


def step_of(checkpoint: Path) -> int:
    """Finished steps of a checkpoint."""
    return int(checkpoint.name.removeprefix("step_"))


def checkpoint_before(run: Path, step: int) -> Path | None:
    """The newest checkpoint before a step; None for the first step, which needs none."""
    before = [path for path in complete_checkpoints(run / "checkpoints") if step_of(path) < step]
    if not before and step > 1:
        raise UserError(
            f"{run} has no checkpoint before step {step}: --record N --save-interval N keep those before "
            "steps 1, N + 1, 2 N + 1, ..."
        )
    return before[-1] if before else None


def default_processes(world_size: int, extra: Sequence[str]) -> int:
    """Processes for the layout of `extra`."""
    model = 1
    for flag, value in zip(extra, extra[1:], strict=False):
        if flag in ("--tp", "--pp", "--cp"):
            model *= int(value)
    return world_size if world_size % model == 0 else model


def prepare(run: Path, start: Path | None, output: Path) -> None:
    """Make the replay's run directory, as the run's was after the checkpoint `start`."""
    if output.exists():
        raise UserError(f"--work {output} exists: give another directory")
    output.mkdir(parents=True)
    for name in COPIED:
        if (run / name).exists():
            shutil.copy(run / name, output)
    if start is None:
        (output / "metrics.jsonl").unlink()
    else:
        shutil.copytree(start, output / "checkpoints" / start.name, copy_function=link)


def link(source: str, target: str) -> None:
    """A hard link, which takes no space, or a copy on another file system. Checkpoints are never changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def samples_flag(config: Config) -> list[str]:
    """The flag that takes the samples of a recorded step."""
    directory = config.run / "records" / f"step_{config.step:06d}"
    return ["--samples-from", str(directory)] if (directory / SAMPLES).is_file() else []


def command(config: Config, flags: dict, output: Path, more: list[str]) -> list[str]:
    """The script and its flags: the run's as config.json has them, a stop after the step, and `more`."""
    script = next((path for path in config.run.glob("train_*.py") if (ROOT / path.name).is_file()), None)
    if script is None:
        raise UserError(f"{config.run}: it holds no script of this repository, train_....py")
    words = list(words_of(load_script(ROOT / script.name).Config(), flags))
    own = ["--output", str(output), "--save-interval", "0", "--stop-after", str(config.step)]
    return [str(ROOT / script.name), *words, *own, *more]


def words_of(default: object, flags: dict) -> Iterator[str]:
    """Words of the flags that differ from their defaults in a configuration."""
    for field in fields(default):  # type: ignore[arg-type]
        value = getattr(default, field.name)
        if is_dataclass(value):
            yield from words_of(value, flags)
            continue
        usual = as_json({field.name: value})[field.name]
        wanted = flags.get(field.name, usual)
        if field.name in DROPPED or wanted == usual:
            continue
        flag = flag_of(field.name)
        if field.type is bool:
            yield flag if wanted else flag.replace("--", "--no-", 1)
        else:
            yield from (flag, *map(str, wanted if isinstance(wanted, list) else [wanted]))


def run_script(processes: int, words: list[str], python: Path) -> subprocess.CompletedProcess:
    """Run a script on some processes of this machine."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    whole = [str(python), *(start if processes > 1 else []), *words]
    return subprocess.run(whole, capture_output=True, text=True, errors="replace", env=environment)


def last_error(text: str) -> str:
    """The line of an error in what a run has printed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ") or "Error: " in line]
    return (errors or lines or ["it printed nothing"])[0].removeprefix("error: ")


def compare(expected: dict[str, float], actual: dict[str, float], bound: float) -> tuple[bool, str]:
    """True if all metrics are equal, or within the bound, and the words for it; in the order of the step."""
    names = [*expected, *(name for name in actual if name not in expected)]
    for name in names:
        if name not in expected or name not in actual:
            return (
                False,
                f"{name} is in one of both only: {expected.get(name)} in the run, now {actual.get(name)}",
            )
    errors = {name: difference(name, expected[name], actual[name]) for name in names}
    wrong = [name for name in names if not errors[name] <= (0.0 if name.startswith(EXACT) else bound)]
    if wrong:
        first = wrong[0]
        others = f"; {len(wrong)} of {len(names)} metrics differ" if len(wrong) > 1 else ""
        return False, f"{first} differs: {expected[first]!r} in the run, now {actual[first]!r}{others}"
    if not any(errors.values()):
        return True, f"{len(names)} metrics, equal to the last bit"
    worst = max(names, key=lambda name: errors[name])
    values = f"{expected[worst]!r} in the run, now {actual[worst]!r}"
    return True, f"{len(names)} metrics, within {bound:g}; most {errors[worst]:.1e}, of {worst}: {values}"


def difference(name: str, a: float, b: float) -> float:
    """Difference of a metric relative to its size; near 0, and of the audit, relative to a fixed one."""
    if name.startswith(UNIT):
        return abs(a - b)
    return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b), NEAR_ZERO)


if __name__ == "__main__":
    console.adapt()
    with one_line():
        main()
