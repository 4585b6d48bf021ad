"""End a job as soon as one of its ranks fails, exits or stalls, and name that rank.

A thread of each rank publishes the state of its main thread once a second. It ends the process when another
rank has failed, when the process of a rank on the same machine is gone, and when no rank at all has made
progress for --stall-limit seconds. Progress is recorded by `tick`: a micro-batch, a decoded token, a reward.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from align import console
from align.errors import summary, user_message
from align.tracking.output import is_run

INTERVAL_S = 1.0
PHASE_S = 0.02  # shortest time between two published states, which take about 0.1 ms each
GRACE_S = 5.0  # for the rank at fault to end first: torchrun reports the first that ends
OUT_OF_MEMORY = (
    "`python -m tools.plan SCRIPT FLAGS` shows the memory of each phase, and the flags that reduce it: "
    "--micro-batch-tokens, --recompute full, --offload on, --tp"
)
COMMUNICATION = ("gloo", "NCCL", "TCPStore")  # in the messages of collectives with a lost rank


class Progress:
    """Number of ticks so far, the phase of the last one, and the watchdog of this process."""

    ticks = 0
    phase = "start"
    watchdog: "Watchdog | None" = None


def tick(phase: str) -> None:
    """Record that this rank makes progress, in a phase of the run."""
    Progress.ticks += 1
    if phase != Progress.phase:
        Progress.phase = phase
        if Progress.watchdog is not None:
            Progress.watchdog.publish_phase()


class Watchdog:
    """Monitor of all ranks in each of them. Use as a context manager; construction is collective."""

    def __init__(self, store: Any, stall_limit_s: float, log: Path | None):
        """
        Args:
            store: of the process group, a dist.Store; torch's stubs lack its `clone`.
            stall_limit_s: longest time without progress of any rank, from the first tick on; 0: no limit.
            log: file to which the last line of the run is added, if it exists.
        """
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.store = dist.PrefixStore("watchdog", store.clone())
        self.stall_limit_s, self.log = stall_limit_s, log
        self.main_thread = threading.get_ident()
        self.processes: list = [None] * self.world
        dist.all_gather_object(self.processes, (machine(), os.getpid(), socket.gethostname()))
        self.idle_s, self.ticks, self.beats, self.published = 0.0, 0, 0, 0.0
        self.stopped, self.ending = threading.Event(), threading.Lock()
        self.thread = threading.Thread(target=self.watch, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        self.thread.start()
        Progress.watchdog = self
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.fail(error)
        try:
            dist.barrier()  # monitored: a rank may still be at work
        except RuntimeError as lost:
            self.fail(lost)
        self.store.set(f"finished/{self.rank}", "")
        self.stopped.set()
        self.thread.join()
        Progress.watchdog = None

    def watch(self) -> None:
        """Publish this rank's state and check the others until the body ends."""
        last = time.monotonic()
        # If the store is gone, so is its rank, and the next collective fails.
        with contextlib.suppress(dist.DistError):
            self.publish()
            while not self.stopped.wait(INTERVAL_S):
                now = time.monotonic()
                # A job that was suspended as a whole has not been idle.
                self.idle_s += min(now - last, 2 * INTERVAL_S)
                last = now
                if self.ticks != Progress.ticks:
                    self.ticks, self.idle_s = Progress.ticks, 0.0
                self.publish()
                if failure := self.failure_elsewhere():
                    time.sleep(GRACE_S / 2)  # less than the grace of the rank that serves the store
                    self.end_process(failure)
                if 0 < self.stall_limit_s < self.idle_s and Progress.ticks:
                    self.check_stall()

    def publish(self) -> None:
        """Publish this rank's state to the other ranks."""
        self.beats += 1
        self.published = time.monotonic()
        frame = outside_this_file(sys._current_frames()[self.main_thread])
        state = {"beats": self.beats, "idle_s": self.idle_s, "phase": Progress.phase}
        self.store.set(
            f"state/{self.rank}", json.dumps(state | {"waits": is_waiting(frame), "at": place(frame)})
        )

    def publish_phase(self) -> None:
        """Publish the start of a phase from the main thread, unless phases are short."""
        if time.monotonic() - self.published > PHASE_S:
            with contextlib.suppress(dist.DistError):  # as in `watch`
                self.publish()

    def failure_elsewhere(self) -> dict | None:
        """The first failure of another rank, reported or of a process on this machine that is gone."""
        if self.store.check(["failure"]):
            failure = json.loads(self.store.get("failure"))
            return None if failure["rank"] == self.rank else failure
        for rank in filter(self.is_local, range(self.world)):
            if is_alive(self.processes[rank][1]) or self.store.check([f"finished/{rank}"]):
                continue
            if self.store.check(["failure"]):  # reported just before it ended
                return self.failure_elsewhere()
            line = f"{self.name(rank)} left {in_phase(self.state(rank))}: os._exit, a crash, or out of memory"
            return self.report(rank, line, 1, key=f"{rank} left")
        return None

    def check_stall(self) -> None:
        """End the job if no rank has made progress for the limit; a rank at fault ends before the others."""
        ranks = range(self.world)
        before = [self.state(rank) for rank in ranks]
        for _ in range(4):
            time.sleep(INTERVAL_S)
            self.publish()
        states = [self.state(rank) for rank in ranks]
        # stopped, or holding the GIL
        silent = [r for r in ranks if states[r]["beats"] == before[r]["beats"]]
        if any(states[r]["idle_s"] < self.stall_limit_s - 3 * INTERVAL_S for r in ranks if r not in silent):
            return  # a rank is still at work
        culprits = silent or [r for r in ranks if not states[r]["waits"]] or list(ranks)
        words = [f"{self.name(r)} {'stopped ' if r in silent else ''}{in_phase(states[r])}" for r in culprits]
        line = f"no rank made progress for {self.stall_limit_s:g} s (--stall-limit): {'; '.join(words)}"
        failure = self.report(culprits[0], line, 1, key="stall")
        if self.rank in culprits:
            self.end_process(failure)
        time.sleep(GRACE_S / 2)
        for _, pid, _ in (self.processes[r] for r in silent if self.is_local(r)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # it cannot end by itself
        time.sleep(GRACE_S / 2)
        self.end_process(failure)

    def is_local(self, rank: int) -> bool:
        """True if a rank runs on this machine."""
        return self.processes[rank][0] == self.processes[self.rank][0]

    def state(self, rank: int) -> dict:
        """The last state that a rank published."""
        if not self.store.check([f"state/{rank}"]):
            return {"beats": 0, "idle_s": 0.0, "phase": "start", "waits": False, "at": ""}
        return json.loads(self.store.get(f"state/{rank}"))

    def name(self, rank: int) -> str:
        _, pid, host = self.processes[rank]
        return f"rank {rank} of {self.world} (pid {pid} on {host})"

    def fail(self, error: BaseException) -> NoReturn:
        """End this process because of an error, and report it unless another rank caused it."""
        line, status, trace = outcome(error, f"rank {self.rank} of {self.world}")
        failure = {"rank": self.rank, "status": status, "line": line}
        try:
            if trace and is_communication(error) and (cause := self.wait_for_cause()):
                self.end_process(cause)
            self.report(self.rank, line, status, str(error), trace)
        # the rank that serves the store is gone, and has reported its failure unless it was killed
        except dist.DistError:
            if trace and is_communication(error):
                line, trace = f"rank {self.rank} of {self.world} ended: {self.name(0)} is gone", ""
            say(line, trace, self.log)
        if self.rank == 0 and self.world > 1 and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
            time.sleep(GRACE_S)  # this rank serves the store, from which the others read the failure
        self.end_process(failure | {"line": line})

    def wait_for_cause(self) -> dict | None:
        """The failure of another rank that broke a collective here, if reported within the grace time."""
        end = time.monotonic() + GRACE_S
        while time.monotonic() < end:
            if failure := self.failure_elsewhere():
                return failure
            time.sleep(0.1)
        return None

    def report(self, rank: int, line: str, status: int, key: str, trace: str = "") -> dict:
        """Report the end of the job, once for each `key`: several ranks often have the same reason."""
        failure = {"rank": rank, "status": status, "line": line}
        if self.store.add("failures", 1) == 1:
            self.store.set("failure", json.dumps(failure))
        if self.store.add(f"said/{key}", 1) == 1:
            say(line, trace, self.log)
        return failure

    def end_process(self, failure: dict) -> NoReturn:
        """End this process at once, with all its threads."""
        with self.ending:  # the first of two threads
            end_process(failure["status"], failure["line"])


def outcome(error: BaseException, rank: str) -> tuple[str, int, str]:
    """The line for an error, its exit status, and its traceback, empty for a user's mistake."""
    if (message := user_message(error)) is not None:
        return f"error: {message}", 2, ""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 128 + signal.SIGINT, ""
    status = 1
    words = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        words = f"out of GPU memory in {Progress.phase}: {summary(error)}. {OUT_OF_MEMORY}"
    if isinstance(error, SystemExit):
        words = f"sys.exit({error.code!r}) before the end of the run"
        status = error.code if isinstance(error.code, int) and error.code else 1
    return f"{rank} failed: {words}", status, "".join(traceback.format_exception(error))


def say(line: str, trace: str, log: Path | None) -> None:
    """Print the last line of a run and its traceback, and append both to the log if there is one."""
    console.write(f"{line}\n{trace}", end="", to="stderr")
    if log is not None and is_run(log.parent):
        with open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n{trace}")


def end_process(status: int, reason: str) -> NoReturn:
    """End this process without waiting for its threads; the reason is written to torchrun's error file."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": reason, "timestamp": str(int(time.time()))}
        Path(path).write_text(
            json.dumps({"message": {"message": reason, "extraInfo": details}}), encoding="utf-8"
        )
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or a full device
            stream.flush()
    os._exit(status)


def machine() -> str:
    """Identity of the machine or container in which process ids are unique."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/pid"
    if not boot.is_file():
        return socket.gethostname()
    return f"{boot.read_text(encoding='utf-8').strip()} {os.readlink(namespace)}"


def is_alive(pid: int) -> bool:
    """True if a process of this machine runs, or is a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def is_communication(error: BaseException) -> bool:
    """True for the error of a collective whose other ranks are gone."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in COMMUNICATION)


def outside_this_file(frame: FrameType) -> FrameType:
    """The innermost frame of a thread outside this file."""
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return frame


def is_waiting(frame: FrameType) -> bool:
    """True if a thread is in a collective, or in Megatron's wait for one."""
    file = frame.f_code.co_filename
    return "/torch/distributed/" in file or "/megatron/core/" in file


def place(frame: FrameType | None) -> str:
    """The call stack of a thread, outermost first, without libraries."""
    calls = []
    while frame is not None:
        code = frame.f_code
        if "site-packages" not in code.co_filename and "/lib/python" not in code.co_filename:
            calls.append(f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return " > ".join(reversed(calls[:3]))


def in_phase(state: dict) -> str:
    return f"in {state['phase']} ({state['at']})"
