"""Run a script: flags, process group, watch over the ranks, and errors in one line."""

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from align import console
from align.command_line import parse
from align.distributed import parallel, watchdog
from align.errors import UserError

C = TypeVar("C")


def run(main: Callable[[C], None], config_class: type[C]) -> None:
    """Call a script's `main` with the flags of the command line, on every rank of its process group.

    A user's mistake ends with one line on stderr and in log.txt and with status 2, whichever rank meets it;
    any other error with its traceback, status 1 and the name of the rank. No rank outlives another's failure.
    """
    console.adapt()
    try:
        config: Any = parse(config_class)
        if not hasattr(config, "rollout") or config.rollout.generate_with == "native":
            parallel.use_expandable_segments()
        with parallel.start(config.parallel) as store:
            log = config.run.output / "log.txt" if hasattr(config, "run") else None
            with watchdog.Watchdog(store, config.parallel.stall_limit, log):
                main(config)
    except UserError as error:  # before the ranks know each other: each has the same
        line, status, _ = watchdog.outcome(error, "")
        if os.environ.get("RANK", "0") == "0":
            watchdog.say(line, "", None)
        else:
            time.sleep(watchdog.GRACE_S)  # torchrun ends all as soon as one has ended
        watchdog.end_process(status, line)
