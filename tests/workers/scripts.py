"""Run by test_scripts.py: several commands in one process, which imports once; their errors to a file."""

import contextlib
import functools
import importlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state as mpu

from align import command_line
from align.data.packing import Batch
from align.distributed import parallel
from align.errors import UserError
from align.tracking import run
from align.training import reference


@contextlib.contextmanager
def wrong_reference() -> Iterator[None]:
    """Precomputed log-probs of the reference are 1e-3 nats too large, as if computed in another way."""
    right = reference.Precomputed.attach

    def attach(self: reference.Precomputed, batches: list[Batch], name: str) -> None:
        right(self, batches, name)
        for batch in batches:
            batch.extra["ref"] = batch.extra["ref"] + 1e-3

    reference.Precomputed.attach = attach
    try:
        yield
    finally:
        reference.Precomputed.attach = right


def attempt(script: str, *command: str) -> str | None:
    """The message with which a command ends, None if it runs to its end."""
    module, shown = importlib.import_module(script.removesuffix(".py")), io.StringIO()
    try:
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
            flags = command_line.parse(module.Config, command)
            with parallel.start(flags.parallel):
                module.main(flags)
    except (UserError, RuntimeError) as error:
        return str(error)
    finally:
        if dist.is_initialized():  # a failed run leaves its groups to the end of the process
            mpu.destroy_model_parallel()
            dist.destroy_process_group()
    return None


def attempt_spoilt(command: list[str]) -> str | None:
    """`attempt`, of a command that may begin with the name of something that is made wrong for it."""
    if command[0] != "wrong-reference":
        return attempt(*command)
    with wrong_reference():
        return attempt(*command[1:])


# the curves would take most of the time; test_scripts.py looks at those of other runs
run.Run.close = functools.partialmethod(run.Run.close, plots=False)
folder = Path(sys.argv[1])
errors = [attempt_spoilt(command) for command in json.loads((folder / "commands.json").read_text())]
(folder / "errors.json").write_text(json.dumps(errors))
