"""A rank that fails, leaves or hangs ends the job in seconds, is named, and nothing is said twice."""

import os
import re
import signal
import time

import psutil
import pytest
import torch

from align.distributed import parallel, watchdog
from tests.support.launch import fork_ranks, torchrun

pytestmark = pytest.mark.slow

SCRIPT = "tests/workers/watchdog.py"
NAME = r"rank {} of 2 \(pid \d+ on \S+\)"
PHASE = r"in reward of step \d \(.*watchdog.py:\d+ main.*\)"
ENDS = {  # flags: status, the line
    "--how user --on 1": (2, "error: --data x: row 3 has no text"),
    "--how user": (2, "error: --data x: row 3 has no text"),
    "--how main": (2, "error: --data x: row 3 has no text"),
    "--how refused": (2, "error: --how refused must be something else"),
    "--how file --on 0": (2, "error: /nowhere/rows.jsonl: No such file or directory"),
    "--nonsense 3": (2, "error: Unrecognized options: --nonsense, 3"),
    "--stall-limit nan": (2, "error: --stall-limit nan must be 0, or from 5 to 1e9 seconds"),
    "--how bug --on 1": (1, "rank 1 of 2 failed: a bug"),
    "--how bug": (1, "rank [01] of 2 failed: a bug"),
    "--how thread --on 0": (1, "rank 0 of 2 failed: 'with a thread'"),
    "--how exit0 --on 1": (1, r"rank 1 of 2 failed: sys.exit\(0\) before the end of the run"),
    "--how exit0": (1, r"rank [01] of 2 failed: sys.exit\(0\) before the end of the run"),
    "--how exit3 --on 0": (3, r"rank 0 of 2 failed: sys.exit\(3\) before the end of the run"),
    "--how leave --on 0": (1, f"rank 1 of 2 ended: {NAME.format(0)} is gone"),  # it serves the store here
    "--how leave --on 1": (1, f"{NAME.format(1)} left {PHASE}: .*"),
    "--how hang --on 1 --stall-limit 5": (1, f"no rank made progress for 5 s .*: {NAME.format(1)} {PHASE}"),
    "--how stop --on 1 --stall-limit 5": (1, f"no rank .*: {NAME.format(1)} stopped {PHASE}"),
}


@pytest.mark.parametrize("flags", ENDS)
def test_a_rank_that_ends_early_is_named(flags):
    status, line = ENDS[flags]
    start = time.monotonic()
    done = fork_ranks(2, SCRIPT, *flags.split(), check=False, timeout_s=60)
    assert time.monotonic() - start < 40  # a stall is seen after 5 s, a load of the machine takes the rest
    assert done.returncode == (-9 if "stop" in flags and done.returncode < 0 else status), done.stderr
    # The C++ code of a store whose rank is gone prints lines of its own.
    lines = [
        x
        for x in done.stderr.splitlines()
        if not re.match(r"\[rank|Exception raised from|frame #|<omit|$", x)
    ]
    assert re.fullmatch(line, lines[0]), done.stderr
    lines = lines[:1] + [x for x in lines[1:] if " of 2 ended: " not in x]  # of a rank without the store
    assert len(lines) == 1 or (" failed: " in line and lines[1] == "Traceback (most recent call last):"), (
        done.stderr
    )
    assert done.stderr.count("Traceback") == (" failed: " in line)
    assert "done" not in done.stdout


@pytest.mark.parametrize("flags", ["", "--how late --on 1 --stall-limit 5", "--stall-limit 0"])
def test_ranks_that_work_are_left_alone(flags):
    done = fork_ranks(2, SCRIPT, *flags.split())
    assert done.stdout == "done\n" and not re.search("^(rank|error|no rank)", done.stderr, re.MULTILINE)


def test_a_fork_of_a_killed_rank_ends_as_well():
    done = fork_ranks(2, SCRIPT, "--how", "fork", "--on", "1", check=False)
    assert done.returncode == -9
    child = int(done.stdout)
    end = time.monotonic() + 10
    while runs(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not runs(child)


def test_a_fork_outlives_the_thread_that_made_it():
    assert fork_ranks(2, SCRIPT, "--how", "forking_thread", "--on", "1").stdout == "done\n"


def runs(pid: int) -> bool:
    """Whether this process is alive: the dead one whose new parent does not ask for its status is not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_fork_ends_whose_parent_died_before_the_kernel_was_asked():
    pid = os.fork()
    if not pid:
        parallel.end_with_parent(parent=os.getpid())  # a process that is not this one's parent, or no more
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_a_gpu_that_is_out_of_memory_names_the_phase_and_what_helps(monkeypatch):
    monkeypatch.setattr(watchdog.Progress, "phase", "train policy")
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 80 GiB"
    )
    line, status, trace = watchdog.outcome(error, "rank 3 of 8")
    assert line.startswith("rank 3 of 8 failed: out of GPU memory in train policy: CUDA out of memory")
    assert "python -m tools.plan" in line and "--micro-batch-tokens" in line
    assert status == 1 and "Tried to allocate 2.00 GiB" in trace


def test_torchrun_reports_the_rank_at_fault():
    done = torchrun(2, SCRIPT, "--how", "leave", "--on", "1", check=False)
    assert done.returncode == 1
    cause = done.stderr.split("Root Cause")[1]
    assert re.search(f"{NAME.format(1)} left {PHASE}", cause), done.stderr
