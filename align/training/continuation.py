"""Continue a run from its checkpoint, or refuse because the identity of the run has changed.

The identity is the script, the flags that change numbers, and the training rows. Flags of `FREE` change none:
directories, intervals of saving, validation and stopping, and the layout of the work on ranks.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from align.data.packing import data_order, global_batch
from align.errors import UserError
from align.flags import flag_of
from align.tracking.output import complete_checkpoints
from align.tracking.run import as_json
from align.training import checkpoint, checkpoint_files
from align.training.config import CommonConfig

FREE = frozenset(
    "output wandb_project wandb_name profile record samples_from save_interval save_top_k async_save monitor "
    "resume resume_from resume_with_changes max_time stop_after val_interval val_batches "
    "val_data test_data train_data skip_bad_rows "  # rows are compared
    "micro_batch_tokens micro_batch_size recompute keep_logits attention tp pp vp cp sequence_parallel "
    "stall_limit offload overlap_param_gather rollout_layout rollout_tp rollout_slots rollout_tp_graphs "
    "trtllm_keep trtllm_memory reference audit_start audit_mean audit_tail audit_quantile audit_ratio".split()
)
DATA = {  # items of `data_order`; its rows a step and seed are flags
    "rows": "rows of --train-data",
    "token_ids_crc32": "checksum of the token ids of --train-data",
}


@dataclass(frozen=True)
class Continuation:
    """Checkpoint and step from which a run continues, and the order of its rows."""

    checkpoint: Path | None  # to load; None: a new run
    step: int  # finished steps
    pass_start: int  # the step before which the present order of the rows began
    total_steps: int
    identity: dict  # of the run, see `identity`
    damages: Future[list[str]] | None = None  # of the checkpoint's files, under way
    prompts_used: dict | None = None  # `ledger.Prompts.state` of the checkpoint

    def verified_checkpoint(self) -> Path | None:
        """The checkpoint, None for a new run. Raises UserError if it is damaged. Collective."""
        if self.checkpoint is not None:
            with naming_the_one_before(self.checkpoint):
                checkpoint_files.verify(self.checkpoint, self.damages)
        return self.checkpoint

    def rows_of_step(self, step: int) -> list[int]:
        """Numbers of the training rows of a step (from 0)."""
        data = self.identity["data"]
        return global_batch(data["rows"], data["rows_per_step"], data["seed"], step - self.pass_start)


def identity(config: CommonConfig, script: str, rows: Iterable[Sequence[np.ndarray]]) -> dict:
    """Identity of a run: script (its `__file__`), flags and rows (the token ids of each row's sequences)."""
    return {
        "script": Path(script).name,
        "flags": {name: value for name, value in as_json(asdict(config)).items() if name not in FREE},
        "data": data_order(rows, config.rows_per_step, config.parallel.seed),
    }


def find(
    config: CommonConfig, script: str, rows: Iterable[Sequence[np.ndarray]], say: Callable[[str], None]
) -> Continuation:
    """Find the checkpoint that a run continues from, and compare its identity. Collective.

    After a change of the data with --resume-with-changes a new pass over the rows begins. `rows`: as in
    `identity`. Raises UserError for another script, for a change without that flag, and if more steps are
    finished than the flags ask for.
    """
    now = identity(config, script, rows)
    path = checkpoint.to_resume(config.checkpoint, config.run.output)
    if path is None:
        return Continuation(None, 0, 0, config.total_steps(now["data"]["rows"]), now)
    with naming_the_one_before(path):
        damages = checkpoint_files.start_hashing(path)
    state = checkpoint.read_state(path)
    step, before = state["step"], state.get("identity", now)  # an earlier version did not store it
    if before["script"] != now["script"]:
        raise UserError(
            f"{path} is of {before['script']}, not of {now['script']}: give another --output, or "
            "--no-resume, which starts over"
        )
    changed_data = before["data"] != now["data"]
    if changes := ", ".join(differences(before, now)):
        if not config.checkpoint.resume_with_changes:
            raise UserError(
                f"{path} was trained otherwise: {changes}. Give the data and flags of that run, another "
                "--output, --resume-with-changes, which goes on, or --no-resume, which starts over"
            )
        say(f"continuing with changes: {changes}")
    if changed_data:
        say("a new pass over the training rows begins; --max-epochs counts from here")
    pass_start = step if changed_data else state.get("pass_start", 0)
    total_steps = config.total_steps(now["data"]["rows"], pass_start)
    if step > total_steps:
        raise UserError(f"{path}: {step} steps are finished, and the flags ask for {total_steps} in all")
    return Continuation(path, step, pass_start, total_steps, now, damages, state.get("prompts_used"))


@contextlib.contextmanager
def naming_the_one_before(path: Path) -> Iterator[None]:
    """Add the name of the checkpoint before it to the error of a damaged checkpoint."""
    try:
        yield
    except ValueError as error:
        earlier = [other for other in complete_checkpoints(path.parent) if other.name < path.name]
        advice = f"--resume-from {earlier[-1]} goes on before it" if earlier else "no earlier one is left"
        raise UserError(f"{error}; {advice}") from error


def differences(before: dict, now: dict) -> list[str]:
    """Changed flags and data, with old and new values."""
    names = {name: flag_of(name) for name in now["flags"]} | DATA
    old, new = before["flags"] | before["data"], now["flags"] | now["data"]
    return [f"{names[key]} {old[key]} -> {new[key]}" for key in names if key in old and old[key] != new[key]]
