"""A script whose ranks end in the way that --how says, on rank --on or on all."""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from align.distributed import launch, parallel, watchdog
from align.distributed.parallel import ParallelConfig
from align.errors import UserError


@dataclass(frozen=True)
class Config:
    how: str = "none"
    on: int = -1
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self):
        if self.how == "refused":
            raise UserError("--how refused must be something else")


def fault(how: str) -> None:
    """End, or hang, as a user's function may."""
    if how == "user":
        raise UserError("--data x: row 3\nhas no text")
    if how == "file":
        open("/nowhere/rows.jsonl")
    if how == "bug":
        assert dist.is_initialized() and how == "no bug", "a bug"
    if how == "thread":
        threading.Thread(target=time.sleep, args=(1000,)).start()
        raise KeyError("with a thread")
    if how.startswith("exit"):
        sys.exit(int(how[4:]))
    if how == "leave":
        os._exit(0)
    if how == "forking_thread":
        thread = threading.Thread(target=fork_in_thread)
        thread.start()
        thread.join()
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
    if how == "fork":  # as a reward function may
        if not (pid := os.fork()):
            time.sleep(1000)
        print(pid, flush=True)
    if how in ("kill", "fork"):
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "hang":
        time.sleep(1000)


def fork_in_thread() -> None:
    """Leave a process behind that ends with 7 after this thread."""
    if not os.fork():
        time.sleep(1)
        os._exit(7)
    time.sleep(0.3)  # until the kernel has been asked


def work(config: Config, step: int) -> None:
    watchdog.tick(f"reward of step {step}")
    if step == 3 and config.on in (-1, dist.get_rank()):
        fault(config.how)


def main(config: Config) -> None:
    if config.how == "main":
        parallel.on_main(lambda: Path("/nowhere").is_dir() or fault("user"))
    for step in range(5):
        work(config, step)
        dist.all_reduce(torch.ones(1))
        time.sleep(0.5)
    if config.how == "late" and dist.get_rank() == config.on:  # slow, but at work
        for _ in range(14):
            watchdog.tick("late")
            time.sleep(0.5)
    if parallel.is_main():
        print("done")


if __name__ == "__main__":
    launch.run(main, Config)
