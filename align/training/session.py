"""The bookkeeping of a run, the same in every script: directory, log, clock, resume, checkpoints, export.

session = Session(config, __file__)          # run directory, log, clock, signals
session.find_checkpoint(token_ids_of_rows)   # what to continue from, number of steps, order of the rows
session.resume({"policy": (policy, optimizer)}, validate)
for step in session.steps():                 # ends early on SIGTERM, SIGUSR1 or --max-time
    rows = session.rows_of_step(step)
    ...                                      # losses, batches and outputs are the script's
    session.end_step(metrics)                # log, then save: what a checkpoint continues has been logged
session.export(policy, [tokenizer.save])     # OUTPUT/hf, if the run is complete
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from align.data.tokenizer import Tokenizer, load_tokenizer
from align.distributed import parallel
from align.errors import UserError
from align.model import adapter_files, gpt, huggingface
from align.model.lora import LoraConfig
from align.tracking.metrics import Clock
from align.tracking.profile import Profiler, parse_steps
from align.tracking.run import Run
from align.training import checkpoint, continuation, ledger, optim, record, reference
from align.training.checkpoint import Saving, Trained
from align.training.config import CommonConfig
from align.training.offload import HostStore
from align.training.phases import OffloadConfig, Phases
from align.training.record import Record


class Session:
    """One run of a script, from the check of its flags to OUTPUT/hf. Collective but for `say`, `samples`.

    Attributes:
        step: the step under way, from 0; before the first one, the number of finished steps.
        total_steps: steps of the whole run, known from `find_checkpoint` on.
        latest: the newest value of each metric, from checkpoint to checkpoint.
        record: of the step under way, None unless --record asks for it; the script fills it.
    """

    def __init__(self, config: CommonConfig, script: str):
        """`script`: its `__file__`. Raises UserError if the run directory cannot be used."""
        self.config, self.script = config, script
        self.stop = parallel.Stop(config.loop.max_time)
        self.run = Run(config.run, asdict(config), script, parallel.is_main())
        self.say, self.samples = self.run.say, self.run.samples
        self.clock = Clock()
        self.phases: Phases | None = None
        self.saving: Saving | None = None  # the checkpoint under way
        self.step = self.total_steps = 0
        self.latest: dict[str, float] = {}
        self.record: Record | None = None
        self.reason: str | None = None  # to end before the last step

    def offload(self, config: OffloadConfig) -> tuple[Phases, HostStore]:
        """Measure the run by phases, which offload what they do not need; for scripts of several models."""
        store = config.store(self.config.run.output)
        phases = self.phases = Phases(self.clock, self.say, store, config.enabled)
        return phases, store

    def phase(self, name: str, **needs: str) -> AbstractContextManager:
        """A phase of `offload`; without it nothing."""
        return self.phases(name, **needs) if self.phases else nullcontext()

    def find_checkpoint(self, rows: Iterable[Sequence[np.ndarray]]) -> None:
        """Compare the run with the checkpoint that it continues, and count its steps.

        `rows`: the token ids of each row's sequences. Raises UserError for another run, or a wrong schedule.
        """
        lora: LoraConfig | None = getattr(self.config, "lora", None)
        if lora is not None and lora.enabled:  # a checkpoint holds no frozen weights
            config = self.config
            reference.check_same(config.run.output, config.model.path, config.checkpoint, "base")
        self.continued = continuation.find(self.config, self.script, rows, self.say)
        self.rows_of_step = self.continued.rows_of_step
        self.verified_checkpoint = self.continued.verified_checkpoint
        data, start, step = (getattr(self.continued, name) for name in ("identity", "pass_start", "step"))
        self.prompts = ledger.Prompts(data["data"], start, step, self.continued.prompts_used)
        if step >= (self.config.loop.stop_after or step + 1):
            raise UserError(
                f"--stop-after {self.config.loop.stop_after}: {step} steps are finished: raise it"
            )
        self.run.total_steps = self.total_steps = self.continued.total_steps
        optim.check_optim(self.config.optim, self.total_steps)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer of --model. A continued run renders the day on which it began in chat templates."""
        first_day = parallel.on_main(self.run.first_day)
        return load_tokenizer(self.config.model.path, self.say, self.config.text, first_day)

    def resume(self, trained: Trained, validate: Callable[[int], dict[str, float]] | None) -> None:
        """Load the checkpoint; a new run validates before its first step.

        Args:
            trained: models in training; the first one's checkpoint holds the others' as folders.
            validate: metrics after so many steps; None without validation rows.
        """
        self.trained = trained
        self.step, self.latest = checkpoint.resume(self.verified_checkpoint(), trained, self.phase)
        self.run.resume_at(self.step)
        if self.step:
            is_complete = self.step == self.total_steps
            complete = f"the run is complete: all {self.step} steps are done"
            self.say(complete if is_complete else f"continuing after step {self.step}")
        elif validate:
            self.latest = validate(0)
            self.run.log(0, self.latest)
        checkpoint.check_monitor(self.config.checkpoint, self.latest)
        self.times()  # the time before the first step is not the step's

    def steps(self) -> Iterator[int]:
        """Steps from 0 that are not finished, until a signal or --max-time stops the run."""
        config = self.config.run
        profiler = Profiler(parse_steps(config.profile), config.output / "profile", dist.get_rank(), self.say)
        for step in range(self.step, self.total_steps):
            self.step = step
            self.record = record.begin(config.output, config.record, step)
            profiler.start(self.done)
            yield step
            profiler.end(self.done, is_last=self.reason is not None or self.done == self.total_steps)
            if self.reason:
                return

    def use_prompts(self, rows: Sequence[int]) -> dict[str, float]:
        """Enter the prompts of the step under way into the ledger, and return its metrics."""
        return self.prompts.use(self.step, rows)

    @property
    def done(self) -> int:
        """Number of finished steps once the step under way has ended."""
        return self.step + 1

    def validates(self) -> bool:
        """True if a validation follows the step under way."""
        return self.config.validates(self.done, self.total_steps)

    def end_step(
        self, metrics: dict[str, float], save: Callable[[Saving], None] = lambda saving: None
    ) -> int:
        """Log the metrics of a step, then save a checkpoint if one is due.

        Args:
            metrics: time/... and timers/... are logged, but no part of a checkpoint.
            save: writes further state of the script into the checkpoint's directory.

        Returns:
            Number of steps in the checkpoint that has become complete; 0 if none has.
        """
        self.reason = self.stop.reason()
        if self.done == self.config.loop.stop_after:
            self.reason = self.reason or "--stop-after"
        self.latest |= {name: value for name, value in metrics.items() if not name.startswith("time")}
        checkpoint.check_monitor(self.config.checkpoint, self.latest)
        if "time/tflops_per_s" in metrics and (peak := parallel.peak_tflops(self.config.model.dtype)):
            metrics["time/mfu"] = metrics["time/tflops_per_s"] / peak
        self.run.log(self.done, metrics | self.times())
        if self.record:
            numbers = {name: value for name, value in metrics.items() if not name.startswith("time")}
            self.record.write(self.script, self.done, self.total_steps, numbers)
        is_last = self.done == self.total_steps or self.reason is not None
        due, complete = is_last or checkpoint.is_due(self.config.checkpoint, self.done), 0
        if self.saving and (due or self.saving.writer.is_done()):
            complete = self._complete()
        if due:
            self._save(save)
            if is_last or not self.config.checkpoint.async_save:
                complete = self._complete()
        if due or complete:
            self.clock.lap("save")
        return complete

    def times(self) -> dict[str, float]:
        """Duration of the step and shares of its phases, and peaks of memory where phases are measured."""
        return self.clock.shares() | (self.phases.memory() if self.phases else {})

    def _save(self, save: Callable[[Saving], None]) -> None:
        """Begin a checkpoint; its time counts in the next step's line."""
        config, output = self.config.checkpoint, self.config.run.output
        state = {"identity": self.continued.identity, "pass_start": self.continued.pass_start}
        if self.prompts.is_kept:
            state["prompts_used"] = self.prompts.state()
        interval = self.config.run.record
        saving = self.saving = Saving(config, output, self.done, self.latest, state, interval)
        for name, (model, optimizer) in self.trained.items():
            with self.phase("save", **{name: "all"}):
                gpt.finish_param_gather(model)
                optim.check_replicas(model)
                folder = checkpoint.folder_of(name, self.trained, saving.directory)
                checkpoint.write(folder, self.done, model, optimizer, saving.writer)
        save(saving)

    def _complete(self) -> int:
        """Complete the checkpoint under way; returns the number of its steps."""
        assert self.saving
        saving, self.saving = self.saving, None
        saving.complete()
        return saving.step

    @property
    def is_complete(self) -> bool:
        """True if no step is left."""
        return self.reason is None or self.done >= self.total_steps

    def export(
        self,
        model: DistributedDataParallel,
        companions: Sequence[Callable[[Path], None]],
        name: str = "model",
    ) -> None:
        """Write the model of a complete run and its `companions`' files to OUTPUT/hf; close the record."""
        if self.is_complete:
            with self.phase("export", **dict.fromkeys(list(self.trained)[:1], "weights")):
                gpt.finish_param_gather(model)
                directory = self.config.run.output / "hf"
                huggingface.save(model, self.config.model.path, directory, companions)
                if gpt.stages(model)[0].adapters:
                    folder = self.config.run.output / "adapter"
                    adapter_files.save(model, self.config.model.path, folder)
                    self.say(f"the adapter is in {folder}; the {name} with it is in {directory}")
                    return self.run.close()
            self.say(f"the {name} is in {directory}")
        else:
            steps = f"step {self.done} of {self.total_steps}"
            self.say(f"{self.reason}: stopped after {steps}; the same command continues")
        self.run.close()
