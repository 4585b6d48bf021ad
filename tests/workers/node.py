"""Run by test_node.py on every rank: who reads the rows, and what each rank has of them."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist

from align.data.stored_rows import store
from align.distributed import node, parallel
from align.errors import UserError


def main(output: Path, machines: list[str]) -> None:
    with parallel.start(parallel.ParallelConfig()):
        rank = dist.get_rank()
        node.machine = lambda: machines[rank]
        calls: list[int] = []

        def make() -> tuple:
            calls.append(rank)
            return store(np.arange(n) + 100 * rank for n in range(4)), {"rows": 4}

        def refuse() -> None:
            raise UserError(f"rank {rank}: no")

        (rows, counts), (other, _) = node.once(make), node.once(make)
        try:
            node.once(refuse)
            mistake = ""
        except UserError as error:
            mistake = str(error)
        record = {
            "calls": calls,
            "counts": counts,
            "rows": [row.tolist() for row in rows],
            "files": [os.fstat(x.file.fileno()).st_ino for x in (rows, other)],
            "mistake": mistake,
        }
        (output / f"{rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
