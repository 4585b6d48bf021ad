"""Flags that every script has, the number of steps, and the steps that validate."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data import hub
from align.data.packing import BatchConfig
from align.data.tokenizer import TextConfig
from align.distributed import parallel
from align.distributed.parallel import ParallelConfig, parse_time
from align.errors import UserError
from align.flags import COUNT, check_ranges, refuse_unused
from align.model.config import ModelConfig
from align.tracking.run import RunConfig
from align.training.checkpoint import CheckpointConfig
from align.training.optim import OptimConfig


@dataclass(frozen=True)
class LoopConfig:
    """Length of the run and its validations."""

    max_epochs: int = 1
    """passes over the training rows"""
    max_steps: int | None = None
    """most steps (default: what --max-epochs gives); in PPO and rejection sampling a step is a rollout with
    all of its updates, else one optimizer step"""
    max_time: str | None = None
    """HH:MM:SS after which the run saves and exits with status 0; the same command continues it"""
    stop_after: int | None = None
    """step after which the run saves and exits with status 0; unlike --max-steps it is no part of the
    learning-rate schedule, and the same command without it continues"""
    val_interval: int = 100
    """steps between validations; there is one before the first step and one after the last as well"""
    val_batches: int | None = None
    """batches of --val-data per validation, each of the rows that a training step takes; None: all rows"""

    def __post_init__(self):
        check_ranges(self, max_epochs=COUNT, max_steps=COUNT, stop_after=COUNT)
        check_ranges(self, val_interval=COUNT, val_batches=COUNT)
        if self.max_time is not None:
            parse_time(self.max_time)


@dataclass(frozen=True)
class CommonConfig:
    """The flags that every script has. A script's Config adds its own, and its own defaults of these."""

    train_data: tuple[Path, ...] = ()
    """training rows: files of JSON lines, a JSON array or Parquet, plain or .gz, or data sets of the Hub,
    org/name[/config][@revision][:split], by default the split "train" (default: a toy task, written to
    OUTPUT/data)"""
    val_data: tuple[Path, ...] = ()
    """validation rows; of a data set of the Hub the split must be named"""
    batch: BatchConfig = BatchConfig()
    loop: LoopConfig = LoopConfig()
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    text: TextConfig = TextConfig()
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self):
        if self.val_data and not self.train_data:
            raise UserError("--val-data without --train-data: give both, or none for the toy task")
        if self.train_data and not self.val_data:
            default, why = type(self), "without --val-data"
            refuse_unused(self.loop, default.loop, "val_interval val_batches", why)
            if self.checkpoint.metric.startswith("val"):
                refuse_unused(self.checkpoint, default.checkpoint, "monitor save_top_k", why)
        if self.run.samples_from and not hasattr(self, "rollout"):
            raise UserError("--samples-from: this script samples nothing, leave it out")
        for path in self.val_data:
            if hub.is_data(path) and not hub.split_of(path):
                raise UserError(f"--val-data {path}: name a split, as in {path}:validation")

    def files(
        self, write_toy: Callable[[Path], tuple[tuple[Path, ...], tuple[Path, ...]]]
    ) -> dict[str, list[Path]]:
        """Files of "train" and "val"; without --train-data a toy task's, in OUTPUT/data. Collective."""
        train, val = self.train_data, self.val_data
        if not train:
            train, val = parallel.on_main(lambda: write_toy(self.run.output / "data"))
        return {"train": list(train), "val": list(val)}

    @property
    def rows_per_step(self) -> int:
        """Training rows of one step."""
        return self.batch.global_batch_size

    def total_steps(self, num_rows: int, pass_start: int = 0) -> int:
        """Steps of the run, whose first epoch begins at `pass_start`; rows that fill no step are left out."""
        steps = pass_start + num_rows // self.rows_per_step * self.loop.max_epochs
        return steps if self.loop.max_steps is None else min(steps, self.loop.max_steps)

    def val_rows(self) -> slice:
        """The rows of a validation set in use."""
        batches = self.loop.val_batches
        return slice(None if batches is None else batches * self.rows_per_step)

    def plan(self, cluster: Any) -> Any:
        """Models and phases for tools/plan.py: a script names its function of align/planning/estimate.py."""
        raise UserError("tools.plan cannot plan this script: its Config has no `plan = estimate. ...`")

    def validates(self, done: int, total_steps: int) -> bool:
        """True if a validation follows `done` steps."""
        return done % self.loop.val_interval == 0 or done == total_steps
