"""Processes of tests: torchrun, and ranks that are forks of a warm process."""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.support.files import ROOT

FORKS = sys.platform == "linux" and not torch.cuda.is_available()  # macOS and CUDA want an exec after a fork


def torchrun(
    processes: int, *command: object, check: bool = True, timeout_s: float = 300
) -> subprocess.CompletedProcess:
    """Run `torchrun --nproc_per_node processes command...` in the repository's root, one thread a process."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        + [str(word) for word in command],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    return checked(done, check)


def fork_ranks(
    processes: int, *command: object, check: bool = True, timeout_s: float = 300
) -> subprocess.CompletedProcess:
    """As `torchrun`, but the ranks are forks of a warm process: for tests that are not about the start.

    Where these are not possible (FORKS), it is `torchrun`.
    """
    if not FORKS:
        return torchrun(processes, *command, check=check, timeout_s=timeout_s)
    return checked(fork(rank_variables(processes), command, timeout_s), check)


def fork_python(*command: object, check: bool = True, timeout_s: float = 300) -> subprocess.CompletedProcess:
    """Run `python command...` in the repository's root, in a fork of a warm process as `fork_ranks`."""
    if FORKS:
        return checked(fork([{}], command, timeout_s), check)
    words = [sys.executable, *map(str, command)]
    run = dict(cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout_s)
    return checked(subprocess.run(words, **run), check)


def start_torchrun(processes: int, printed: Path, *command: object) -> subprocess.Popen:
    """Start `torchrun` as above and return at once; what it and its ranks print goes to a file."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    words = [*launcher, str(processes), *map(str, command)]
    with open(printed, "w") as out:
        return subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.STDOUT)


@dataclass(frozen=True)
class Launcher:
    """A fork of the warm process that starts ranks and ends with them, with the methods of a Popen."""

    pid: int

    def poll(self) -> int | None:
        """Its exit status, 0 if all ranks ended well, -n if a signal n ended it; None while it runs."""
        return ask(self.pid)

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            assert time.monotonic() < end, "the ranks do not end"
            time.sleep(0.02)
        return status


def start_forks(processes: int, printed: Path, *command: object) -> Launcher | subprocess.Popen:
    """As `start_torchrun`, by forks of the warm process where these are possible."""
    if not FORKS:
        return start_torchrun(processes, printed, *command)
    printed.write_text("")
    request = to_request(rank_variables(processes), command, timeout_s=300)
    return Launcher(ask(request | {"out": str(printed), "err": str(printed), "detached": True}))


def rank_variables(processes: int) -> list[dict[str, object]]:
    """The variables of each rank's environment that torchrun sets."""
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": processes}
    world |= {"LOCAL_WORLD_SIZE": processes, "TORCHELASTIC_RUN_ID": "tests"}
    return [{**world, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]


def fork(
    variables: list[dict[str, object]], command: Sequence[object], timeout_s: float
) -> subprocess.CompletedProcess:
    """Fork a script once for each of `variables`, set beside those of `environment`; returns how it ends."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        code = ask(to_request(variables, command, timeout_s) | {"out": str(out), "err": str(err)})
        printed = [path.read_text(errors="replace") if path.exists() else "" for path in (out, err)]
    assert code is not None, f"{command} took over {timeout_s} s\n{printed[0]}\n{printed[1]}"
    return subprocess.CompletedProcess([*command], code, *printed)


def to_request(variables: list[dict[str, object]], command: Sequence[object], timeout_s: float) -> dict:
    environments = [environment() | {k: str(v) for k, v in more.items()} for more in variables]
    return dict(command=list(map(str, command)), environments=environments, timeout_s=timeout_s)


def ask(request: dict | int) -> int | None:
    """Send a request to the warm process, and wait for its answer."""
    server = warm_process()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "tests/support/fork_server.py has ended; see its stderr at the first test that used it"
    return json.loads(answer)


@functools.cache
def warm_process() -> subprocess.Popen:
    """The process of tests/support/fork_server.py, which ends with this one."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "tests.support.fork_server"],
        cwd=ROOT,
        env={**environment(), "TORCHELASTIC_RUN_ID": "tests"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def checked(done: subprocess.CompletedProcess, check: bool) -> subprocess.CompletedProcess:
    """The same, which must have ended well if `check`."""
    failed = f"{done.args}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    assert not check or done.returncode == 0, failed
    return done


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def environment() -> dict[str, str]:
    """The environment of a test's process: our package on the path, one thread, no network."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline",
    }
