"""Run by test_museum.py on every rank: scripts with one bug after another, and the errors that stop them."""

import functools
import importlib
import json
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

from align.distributed import parallel
from align.tracking.run import Run
from align.training import checkpoint
from tests.museum.exhibit import PROCESSES, RUNS
from tests.museum.exhibits import OWN
from tests.museum.public import PUBLIC
from tests.support import grids
from tests.support.seeded_bugs import Bug, seeded

COMMON = "--deterministic --lr 1e-3 --save-interval 0 --precision"
DATA = {"train_dpo": "train_comparisons", "train_rm": "train_comparisons"}


def runs(precision: str) -> dict[str, tuple[str, Bug, int]]:
    """The runs of a precision by name: flags, bug, steps.

    In fp32 each exhibit, and beside it in its other layout; in bf16, whose bounds are wider, those that are
    stopped in fp32. Their flags also without a bug.
    """
    named: dict[str, tuple[str, Bug, int]] = {}
    for name, exhibit in (OWN | PUBLIC).items():
        if precision == "fp32" or exhibit.caught:
            named[name] = exhibit.run, exhibit.bug, 1 + exhibit.after
        if precision == "fp32" and exhibit.beside:
            named[f"{name} beside"] = exhibit.beside, exhibit.bug, 1
    longest: dict[str, int] = {}
    for flags, _, steps in named.values():
        longest[flags] = max(steps, longest.get(flags, 1))
    return {f"{flags} alone": (flags, {}, steps) for flags, steps in longest.items()} | named


def run(folder: Path, flags: str, bug: Bug, steps: int, precision: str, output: Path) -> dict[str, object]:
    """The error that stops a script, None if there is none, metrics of the steps before, samples."""
    script, *words = f"{RUNS[flags]} {COMMON} {precision} --max-steps {steps} --output {output}".split()
    words += [
        "--model",
        str(folder / "model"),
        "--train-data",
        str(folder / f"{DATA.get(script, 'train')}.jsonl"),
    ]
    module = importlib.import_module(script)
    config = tyro.cli(module.Config, args=words, config=(tyro.conf.OmitArgPrefixes,))
    torch.use_deterministic_algorithms(config.parallel.deterministic)
    grids.change(config.parallel)
    message = None
    try:
        with seeded(bug):
            module.main(config)
    except (
        RuntimeError,
        ValueError,
        FloatingPointError,
    ) as error:  # an audit's, or of shapes that do not fit
        message = re.sub(r"\n.*", "", f"{type(error).__name__}: {error}", flags=re.DOTALL)
    return {
        "message": message,
        "steps": rows(output / "metrics.jsonl"),
        "samples": rows(output / "samples.jsonl"),
    }


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(folder: Path, written: Path) -> None:
    """All runs of this number of processes, in both precisions."""
    results: dict[str, dict] = {"fp32": {}, "bf16": {}}
    for precision, by_name in results.items():
        for number, (name, (flags, bug, steps)) in enumerate(runs(precision).items()):
            if PROCESSES[flags] == dist.get_world_size():
                output = written / f"{precision}{number}"
                by_name[name] = run(folder, flags, bug, steps, precision, output)
    (written / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    Run.close = functools.partialmethod(Run.close, plots=False)  # curves take long, and so do checkpoints
    checkpoint.write = lambda folder, *state: folder.mkdir(parents=True, exist_ok=True)
    with parallel.start(parallel.ParallelConfig()):
        main(*map(Path, sys.argv[1:]))
