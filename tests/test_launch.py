"""Forked ranks are what torchrun starts, and a rank that fails, hangs or dies fails its test."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.support.files import ROOT
from tests.support.launch import FORKS, environment, fork_python, fork_ranks, torchrun

SHOWN = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    *sorted(environment().keys() - os.environ.keys()),
)
SELF = f"""
import json, os, sys, time
shown = {{name: os.environ.get(name) for name in {SHOWN}}}
shown |= dict(argv=sys.argv, path=sys.path[0], cwd=os.getcwd(), name=__name__)
shown |= dict(main=sys.modules["__main__"].__file__)
shown |= dict(stdin=sys.stdin.read(), unbuffered=sys.stdout.write_through)
sys.stdout.write(json.dumps(shown) + "\\n")
"""
FRESH = """
import os, sys, threading
import torch
from megatron.core import parallel_state
print(len(os.listdir("/proc/self/task")), threading.active_count(), torch.get_num_threads())
hack = "align.distributed.megatron_on_cpu"
print(torch.distributed.is_initialized(), parallel_state.is_initialized(), hack in sys.modules)
print(torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype(), torch.is_grad_enabled())
"""
SEEDS = """
import random
import numpy, torch
print(random.random(), numpy.random.random(), torch.rand(()).item())
"""
pytestmark = pytest.mark.skipif(not FORKS, reason="here fork_ranks is torchrun")


def write(directory: Path, script: str) -> Path:
    """The script as a file."""
    path = directory / "script.py"
    path.write_text(script)
    return path


def test_forked_ranks_find_what_torchrun_gives(tmp_path):
    path = write(tmp_path, SELF)
    forked, started = (start(2, path, "a b", 3) for start in (fork_ranks, torchrun))
    rows = [sorted(map(json.loads, done.stdout.splitlines()), key=str) for done in (forked, started)]
    assert rows[0] == rows[1] and [row["RANK"] for row in rows[0]] == ["0", "1"]
    assert rows[0][0]["argv"] == [str(path), "a b", "3"] and rows[0][0]["cwd"] == str(ROOT)


def test_a_forked_script_is_no_rank(tmp_path):
    row = json.loads(fork_python(write(tmp_path, SELF)).stdout)
    assert row["RANK"] is None and row["WORLD_SIZE"] is None and row["name"] == "__main__"


def test_a_fork_is_a_process_after_its_imports(tmp_path):
    """One thread, no groups, nothing switched on."""
    forked = fork_ranks(1, write(tmp_path, FRESH)).stdout
    assert forked.splitlines() == ["1 1 1", "False False False", "False torch.float32 True"]


def test_forks_have_seeds_of_their_own(tmp_path):
    """Else a rank that draws before it is seeded would agree with the others here and nowhere else."""
    numbers = fork_ranks(2, write(tmp_path, SEEDS)).stdout.split()
    assert len(set(numbers)) == 6


def test_a_rank_that_fails_ends_the_others(tmp_path):
    script = "import os, time\nif os.environ['RANK'] == '1': raise KeyError('the reason')\ntime.sleep(100)"
    path, since = write(tmp_path, script), time.monotonic()
    done = fork_ranks(2, path, check=False)
    assert done.returncode == 1 and "KeyError: 'the reason'" in done.stderr
    with pytest.raises(AssertionError, match="KeyError: 'the reason'"):
        fork_ranks(2, path)
    assert time.monotonic() - since < 50


def test_a_rank_that_dies_by_a_signal_fails(tmp_path):
    path = write(tmp_path, "import os\nprint('the last words', flush=True)\nos.kill(os.getpid(), 9)")
    done = fork_ranks(1, path, check=False)
    assert done.returncode == -signal.SIGKILL and done.stdout == "the last words\n"


def test_ranks_that_hang_are_killed_and_shown(tmp_path):
    script = "import os, sys, time\nopen(sys.argv[1] + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
    path = write(tmp_path, script + "print('here', flush=True)\ntime.sleep(100)")
    with pytest.raises(AssertionError, match=r"took over 3 s\n\s*here"):
        fork_ranks(2, path, tmp_path / "pid", timeout_s=3)
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
    assert not any(psutil.pid_exists(pid) for pid in pids)
