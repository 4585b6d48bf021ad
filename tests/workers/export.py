"""Run by test_export.py on every rank: exports of models in several layouts, and who writes what."""

import json
import sys
import weakref
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from align.distributed import parallel
from align.model import huggingface
from tests.support import grids
from tools.conformance.cases import Case
from tools.conformance.worker import build

write_file = huggingface.write_file


def export(directory: Path, output: Path, case: Case) -> dict:
    """Export a model: the names of this rank's files, and the bytes of earlier ones in memory at each."""
    grids.change(case.layout)
    files, tensors, alive = [], [], []

    def write(own: dict[str, Tensor], path: Path) -> dict[str, tuple[str, int]]:
        if not alive:  # passed only if every rank is here, and none waits for another's tensors
            dist.monitored_barrier(timeout=timedelta(seconds=60))
        alive.append(sum(tensor.nbytes for tensor in (ref() for ref in tensors) if tensor is not None))
        tensors.extend(map(weakref.ref, own.values()))
        files.extend([path.name] if own else [])
        return write_file(own, path)

    huggingface.write_file = write
    huggingface.save(build(directory, case), directory, output)
    return {"files": files, "alive": alive}


if __name__ == "__main__":
    output, limit, cases = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    huggingface.MAX_FILE_BYTES = limit
    results = {}
    with parallel.start(parallel.ParallelConfig()):
        for name, (directory, flags) in cases.items():
            results[name] = parallel.gather(export(Path(directory), output / name, Case(**flags)))
        if parallel.is_main():
            (output / "results.json").write_text(json.dumps(results))
