"""Work that one rank of a machine does for all of its ranks."""

import itertools
import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from align.distributed import parallel
from align.distributed.watchdog import machine
from align.errors import UserError

T = TypeVar("T")
NO_LIMIT = timedelta(days=365)  # a collective would end after parallel.LONGEST_WAIT
calls = itertools.count()


def once(make: Callable[[], T]) -> T:
    """Call a function on the first rank of each machine, and give its result to the others. Collective.

    Results are pickled; stored rows (align/data/stored_rows.py) stay the same file. A UserError is raised on
    every rank. Without /proc, by which ranks open each other's files, each rank calls the function.
    """
    place = machine() if Path("/proc/self/fd").is_dir() else str(os.getpid())
    first = parallel.gather(place).index(place)
    store: Any = dist.distributed_c10d._get_default_store()
    key = f"once/{next(calls)}/{first}"
    box: list[Any] = [None, None]  # result, mistake
    if first == dist.get_rank():
        try:
            box[0] = make()
        except UserError as error:
            box[1] = error
        store.set(key, pickle.dumps(box))
    else:
        store.wait([key], NO_LIMIT)
        box = pickle.loads(store.get(key))
    dist.barrier()  # until then the first rank keeps its files
    if box[1]:
        raise box[1]
    return box[0]
