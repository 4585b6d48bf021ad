"""Run by test_scripts.py: command lines of train_sft.py in one process, their errors to a file."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import torch.distributed as dist
import tyro
from megatron.core import parallel_state as mpu

import train_sft
from align import parallel


def attempt(command: list[str]) -> str | None:
    """The message with which a command ends, None if it runs to its end."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
            flags = tyro.cli(train_sft.Config, args=command, config=(tyro.conf.OmitArgPrefixes,))
            with parallel.start(flags.parallel):
                train_sft.main(flags)
    except ValueError as error:
        return str(error)
    except SystemExit:  # tyro has shown the message in a box, which breaks its lines
        return " ".join(re.sub(r"[│╭╮╰╯─]", " ", shown.getvalue()).split())
    finally:
        if dist.is_initialized():  # a failed run leaves its groups to the end of the process
            mpu.destroy_model_parallel()
            dist.destroy_process_group()
    return None


folder = Path(sys.argv[1])
errors = [attempt(command) for command in json.loads((folder / "commands.json").read_text())]
(folder / "errors.json").write_text(json.dumps(errors))
