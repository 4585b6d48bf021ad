"""A warm process of which tests fork their ranks: importing everything anew takes 4 s of CPU for each rank.

Started once by launch.py as `python -m tests.support.fork_server`: requests are lines on stdin, answers
lines on stdout. A request names a script to run, or the process number of a launcher to look after.
This process imports what the project's scripts import, and no more: it runs no kernel, starts no thread and
no process group, so that a fork of it is what a fresh process is after its imports. A fork then has an
environment of its own, runs its script as `__main__`, and ends by the interpreter's own exit.

Beside a start by torchrun, which other tests use: when a rank fails, the others are killed at once; and all
ranks have one seed of str's hash, so that here they iterate over a set of strings in one order.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from align.distributed import parallel

SCRIPTS = (
    "generate",
    "train_dpo",
    "train_grpo",
    "train_ppo",
    "train_rm",
    "train_rs",
    "train_self_reward",
    "train_sft",
)
# what a run would import when it comes to it
LATE = ("align.tracking.plots", "matplotlib.pyplot", "torch.profiler", "tyro.constructors")
LATE_CLASSES = ("AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig", "PreTrainedTokenizerFast")


@dataclass(frozen=True)
class Request:
    """A start of several processes.

    command: a script, from the working directory, and its arguments.
    environments: that of each process.
    out, err: files to which all of them append what they print.
    detached: a launcher, itself a fork, starts them and waits for them, as torchrun would; the answer is its
        process number. Otherwise the answer is how they ended.
    """

    command: list[str]
    environments: list[dict[str, str]]
    out: str
    err: str
    timeout_s: float
    detached: bool = False


def preload() -> None:
    """Import all that the scripts need, and keep the forks from copying it when they look for garbage."""
    for name in (*SCRIPTS, *LATE):
        importlib.import_module(name)
    for name in LATE_CLASSES:
        getattr(transformers, name)  # transformers imports them at this moment
    gc.collect()
    gc.freeze()


def serve() -> Request | None:
    """Answer requests until stdin ends, then None; in the processes that it forks, their request."""
    for line in sys.stdin:
        words = json.loads(line)
        if isinstance(words, int):
            ended, status = os.waitpid(words, os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if ended else None), flush=True)
            continue
        request, server = Request(**words), os.getpid()
        launcher = os.fork() if request.detached else 0
        if launcher:
            print(launcher, flush=True)
            continue
        if request.detached:
            parallel.end_with_parent(server)
        pids = []
        for environment in request.environments:
            pids.append(os.fork())
            if not pids[-1]:
                become(request, environment)
                return request
        status = wait(pids, request.timeout_s)
        if request.detached:
            os._exit(status != 0)
        print(json.dumps(status), flush=True)
    return None


def become(request: Request, environment: dict[str, str]) -> None:
    """Give this fork an environment, files and arguments of its own, and have it die with its parent."""
    parallel.end_with_torchrun()
    torch.seed()  # of new processes these two have seeds of their own, too; Python's has at every fork
    np.random.seed()
    os.environ.clear()
    os.environ.update(environment)
    appending = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    opened = ((os.devnull, os.O_RDONLY), (request.out, appending), (request.err, appending))
    for number, (path, flags) in enumerate(opened):
        file = os.open(path, flags)
        os.dup2(file, number)
        os.close(file)
    sys.argv, sys.orig_argv = list(request.command), [sys.executable, *request.command]
    sys.path[0] = str(Path(request.command[0]).resolve().parent)  # as for `python script`


def wait(pids: list[int], timeout_s: float) -> int | None:
    """Exit code of the first of these that fails, -n if by signal n; 0 if none does; None: no time left.

    When one fails, or all take too long, those that have not ended are killed: nothing is left behind.
    """
    running, failed, end = set(pids), 0, time.monotonic() + timeout_s
    timed_out = False
    while running:
        timed_out = timed_out or time.monotonic() > end
        for pid in sorted(running):
            if failed or timed_out:
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                failed = failed or os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None if timed_out else failed


if __name__ == "__main__":
    parallel.end_with_torchrun()  # with pytest
    preload()
    request = serve()
    if request:
        runpy.run_path(request.command[0], run_name="__main__")
