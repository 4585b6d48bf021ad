"""The run directory: flags and versions, metrics, samples and log; the console line; optional wandb.

`metrics.jsonl` is the record, one line a step, written before the console and wandb. Metrics that depend on
the clock are named `time/...` or `timers/...`; two runs of the same flags differ in these only.
"""

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from align import console
from align.errors import UserError
from align.files import read_object, write_atomically
from align.flags import COUNT, check_ranges, flag_of
from align.tracking.output import check_run, complete_checkpoints, delete_checkpoint, lock
from align.tracking.profile import parse_steps

COLUMNS = {  # metric: (label, format); the console shows those that a step has, in this order
    "train/loss": ("loss", "7.4f"),
    "train_rollouts/rewards": ("reward", "6.3f"),
    "train_rollouts/response_lengths": ("length", "6.1f"),
    "train_rollouts/init_policy_kl": ("kl", "7.4f"),
    "train_optim/loss": ("loss", "7.4f"),
    "train/acc": ("acc", "5.3f"),
    "train/judge_mean": ("judge", "5.2f"),
    "train/bad_samples_per_GBS": ("bad", "5.3f"),
    "train/grad_norm": ("grad_norm", "8.3f"),
    "train/lr": ("lr", "8.2e"),
    "time/tokens_per_s": ("tokens/s", "9,.0f"),
    "val/loss": ("val_loss", "7.4f"),
    "val/acc": ("val_acc", "5.3f"),
    "test/loss": ("test_loss", "7.4f"),
    "test/acc": ("test_acc", "5.3f"),
    "val_rollouts/rewards": ("val_reward", "6.3f"),
    "val/judge_mean": ("val_judge", "5.2f"),
    "val/true_rewards": ("val_true", "5.3f"),
    "val/judge_correlation": ("val_corr", "5.3f"),
}
PACKAGES = ("torch", "megatron-core", "transformers", "numpy", "transformer-engine")
BAR_WIDTH = 20


@dataclass(frozen=True)
class RunConfig:
    """Run directory and wandb."""

    output: Path = Path("runs/sft")
    """directory of this run: config, log, metrics, samples, plots, checkpoints, the finished model in hf/"""
    wandb_project: str | None = None
    """also log to this wandb project; the environment variable WANDB_MODE says online or offline"""
    wandb_name: str | None = None
    """name of the wandb run; wandb invents one if none is given"""
    profile: str | None = None
    """torch.profiler over some steps, START:STEPS, such as 10:3: a table of kernels and a trace of each rank
    in OUTPUT/profile; phases are named in the trace"""
    record: int | None = None
    """record the first step, and every N-th after it, in OUTPUT/records: tokens, log-probs, advantages,
    gradients, and all else that the numbers of a step follow from; 1: every step (default: none)"""
    samples_from: Path | None = None
    """record of a step, OUTPUT/records/step_NNNNNN, whose samples are taken in place of sampling; other
    prompts are sampled. tools.replay sets it (PPO, GRPO, rejection sampling, self-rewarding)"""

    def __post_init__(self):
        if self.wandb_name is not None and self.wandb_project is None:
            raise UserError(f"--wandb-name {self.wandb_name} needs --wandb-project: give both or none")
        check_ranges(self, record=COUNT)
        parse_steps(self.profile)


class Run:
    """Record of one run. Rank 0 (`main`) writes it; on the other ranks every method does nothing.

    `resume_at` comes before the first `log`. `total_steps` is shown on the console and may be set later.
    """

    def __init__(self, config: RunConfig, flags: dict, script: str, main: bool, total_steps: int = 0):
        """`flags`: the script's resolved configuration (`dataclasses.asdict`); `script`: its `__file__`."""
        self.main, self.config, self.total_steps = main, config, total_steps
        self.wandb_run = None
        self.bar = ""  # the last line of a terminal
        self.first_log: tuple[int, float] | None = None  # step and time at the start of the ETA
        self.flags = as_json(flags)
        self.script, self.began = Path(script), datetime.date.today().isoformat()
        check_run(config.output, flatten(flags), self.script)
        if main:
            self._open()

    def _open(self) -> None:
        """Lock the directory; write the flags if it is new, else log the changed ones."""
        self.config.output.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.config.output, self.say)
        path = self.config.output / "config.json"
        if not path.exists():
            return self._write_config()
        record = read_object(path)
        before, self.began = record.get("flags", {}), record.get("began", self.began)
        for name, value in self.flags.items():
            if value != before.get(name):
                self.say(f"{flag_of(name)} {value} (was {before.get(name)})")

    def _write_config(self) -> None:
        """Write flags, versions and commit, and copy the script."""
        record = {"flags": self.flags, "began": self.began, **environment(self.script)}
        write_atomically(self.config.output / "config.json", json.dumps(record, indent=2) + "\n")
        shutil.copy(self.script, self.config.output)

    def first_day(self) -> datetime.date:
        """The day on which the run began, also after a resume; on rank 0 only."""
        try:
            return datetime.date.fromisoformat(self.began)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.config.output / 'config.json'}: began: {error}") from error

    def resume_at(self, step: int) -> None:
        """Continue the record after `step` steps, without later ones. Raises UserError if it ends before."""
        if not self.main:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            last = drop_after(self.config.output / name, step)
            if name == "metrics.jsonl" and last != step:
                raise UserError(
                    f"{self.config.output / name}: it must reach step {step}, and ends at step {last}: "
                    "restore it, or start over with --no-resume"
                )
        # Only now: a refused run changes nothing.
        for path in complete_checkpoints(self.config.output / "checkpoints"):
            if path.name > f"step_{step:08d}":
                delete_checkpoint(path)
        self._write_config()
        if self.config.wandb_project is not None:
            self.wandb_run = start_wandb(self.config, fresh=step == 0)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record one finished step. Raises UserError for NaN and infinity, which JSON cannot hold."""
        if not self.main:
            return
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise UserError(f"metric {name} is {value} at step {step}: every metric must be finite")
        append(self.config.output / "metrics.jsonl", [{"step": step, **metrics}])
        if self.wandb_run is not None:
            self.wandb_run.log(metrics, step=step)
        self._show(step, metrics)

    def samples(self, step: int, rows: list[dict]) -> None:
        """Record samples, one dictionary each, all with the same keys."""
        if not self.main or not rows:
            return
        append(self.config.output / "samples.jsonl", [{"step": step, **row} for row in rows])
        if self.wandb_run is not None:
            import wandb

            table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
            name = f"table/{rows[0]['table']}" if "table" in rows[0] else "samples"
            self.wandb_run.log({name: table}, step=step)

    def say(self, text: str) -> None:
        """Log a line: on the console, and with date and time in log.txt."""
        if not self.main:
            return
        self._write_log(text)
        if console.is_terminal():
            self._print(f"\r\x1b[K{text}\n{self.bar}", end="")  # above the bar, which is redrawn
        else:
            self._print(text)

    def _write_log(self, text: str) -> None:
        log = self.config.output / "log.txt"
        with open(log, "a", encoding="utf-8", errors="backslashreplace") as file:  # as `append`
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def _print(self, text: str, end: str = "\n") -> None:
        """Print on the console; log once if it is gone."""
        if error := console.write(text, end):
            self._write_log(f"the console is gone ({error}): this log goes on")

    def close(self, plots: bool = True) -> None:
        """End the record: draw the curves, finish the wandb run."""
        if not self.main:
            return
        if self.bar:
            self.bar = ""
            self._print("")
        if plots:
            from align.tracking.plots import draw  # here: slow to import, and only one rank needs it

            for path in draw(self.config.output):
                self.say(f"curves: {path}")
        if self.wandb_run is not None:
            self.wandb_run.finish()
        self.lock.close()

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        """Show a step: a redrawn bar on a terminal, with a line for each validation; every step in a file."""
        line = f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}  {columns(metrics)}"
        if not console.is_terminal():
            self._print(line)
            return
        if any(name.startswith(("val/", "val_")) for name in metrics):
            self._print(f"\r\x1b[K{line}")
        done = min(1.0, step / max(1, self.total_steps))
        blocks = ("█" * round(BAR_WIDTH * done)).ljust(BAR_WIDTH, "░")
        bar = f"{blocks} {line}  ETA {self._eta(step)}"
        self.bar = bar[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot be redrawn
        self._print(f"\r\x1b[K{self.bar}", end="")

    def _eta(self, step: int) -> str:
        """Time left, H:MM:SS, at the mean speed since the first step logged by this process."""
        now = time.monotonic()
        first_step, start_time = self.first_log = self.first_log or (step, now)
        if step == first_step:
            return "?"
        seconds_per_step = (now - start_time) / (step - first_step)
        minutes, seconds = divmod(round(seconds_per_step * max(0, self.total_steps - step)), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def columns(metrics: dict[str, float]) -> str:
    """Format the metrics of COLUMNS, in aligned columns."""
    shown = [(*COLUMNS[name], metrics[name]) for name in COLUMNS if name in metrics]
    return "  ".join(f"{label} {value:{form}}" for label, form, value in shown)


def flatten(flags: dict) -> dict:
    """Flatten a nested configuration to flags: {"run": {"output": 1}} is {"output": 1}."""
    parts = [flatten(x) if isinstance(x, dict) else {name: x} for name, x in flags.items()]
    return {name: value for part in parts for name, value in part.items()}


def as_json(flags: dict) -> dict:
    """The flags of a nested configuration as JSON has them: paths are text."""
    return json.loads(json.dumps(flatten(flags), default=str))


def environment(script: Path) -> dict:
    """Versions (None: not installed), commit, number of processes and command."""
    folder = script.resolve().parent
    changes = git(folder, "status", "--porcelain", "--untracked-files=no")
    dirty = None if changes is None else bool(changes)
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "git": {"commit": git(folder, "rev-parse", "HEAD"), "dirty": dirty},
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "command": shlex.join(sys.orig_argv),
    }


def version(package: str) -> str | None:
    """Installed version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git(folder: Path, *command: str) -> str | None:
    """Output of a git command in `folder`; None without git or a repository."""
    if shutil.which("git") is None:
        return None
    words = ["git", "-C", str(folder), *command]
    result = subprocess.run(words, capture_output=True, text=True, errors="replace")
    return result.stdout.strip() if result.returncode == 0 else None


def start_wandb(config: RunConfig, fresh: bool):
    """Start a wandb run, or continue the one whose id is in the run directory."""
    import wandb  # here: optional

    path = config.output / "wandb_id.txt"
    if fresh or not path.exists():
        write_atomically(path, secrets.token_hex(4) + "\n")
    return wandb.init(
        project=config.wandb_project,
        name=config.wandb_name,
        id=path.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=config.output,
        config=read_object(config.output / "config.json"),
    )


def append(path: Path, rows: list[dict]) -> None:
    """Append rows to a jsonl file."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    # half of a surrogate pair has no UTF-8 form; its backslash escape happens to be valid JSON
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def drop_after(path: Path, step: int) -> int:
    """Keep the rows of a jsonl file up to `step`, without a torn last line; returns the last step, or 0."""
    unfinished, last = path.with_suffix(".tmp"), 0
    with contextlib.ExitStack() as files:
        target = files.enter_context(open(unfinished, "wb"))
        lines = files.enter_context(open(path, "rb")) if step and path.exists() else ()
        for number, line in enumerate(lines, start=1):
            if line.endswith(b"\n"):  # else torn by a kill
                row = read_row(f"{path}:{number}", line)
                if row["step"] <= step and not is_final(row):
                    target.write(line)
                    last = row["step"]
    unfinished.rename(path)
    return last


def read_row(location: str, line: bytes) -> dict:
    """Parse a line of metrics.jsonl or samples.jsonl. Raises UserError with its location."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{location}: not valid JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise UserError(f"{location}: a row of a run has a step")
    return row


def is_final(row: dict) -> bool:
    """True for the line of a test set, which is computed again at the end of a continued run."""
    return len(row) > 1 and all(name == "step" or name.startswith("test") for name in row)
