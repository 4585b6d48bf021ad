"""Run the grid: a job of ranks for each number of processes, the first with the references of all."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from align.errors import UserError
from tools.conformance import float64, rows
from tools.conformance.cases import Case
from tools.conformance.compare import Cell
from tools.conformance.planted import BUGS
from tools.conformance.worker import Job, Result, converted, file_of

ROOT = Path(__file__).parents[2]
WORKER = "tools/conformance/worker.py"
Launch = Callable[..., object]  # number of processes, script, arguments


@dataclass(frozen=True)
class Row:
    """A case and its result; `planted`: the name of its bug."""

    processes: int
    case: Case
    result: Result
    planted: str = ""


def torchrun(processes: int, *command: str) -> None:
    """Run a script on so many ranks of this machine."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}
    environment.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run([sys.executable, *launcher, *command], cwd=ROOT, env=environment)
    if done.returncode:
        raise SystemExit(f"the job of {processes} processes ended with status {done.returncode}: see above")


def references(cases: Iterable[Case], scale: int) -> list[Case]:
    """The plainest case for each model and algorithm; scale: of micro-batches."""
    plain = sorted({(case.algorithm, case.family, case.lora) for case in cases})
    tokens = scale * Case.micro_batch_tokens
    return [Case(name, family, lora=rank, micro_batch_tokens=tokens) for name, family, rank in plain]


def run(
    job: Job, grid: Mapping[int, list[Case]], planted: Iterable[str] = (), launch: Launch = torchrun
) -> list[Row]:
    """Run cases by number of processes, and planted bugs with their own cases.

    `job`: models, data and folder. One process runs first, for the references.
    """
    bugs = {name: BUGS[name] for name in planted}
    chosen = [case for cases in grid.values() for case in cases] + [bug.case for bug in bugs.values()]
    plain = references(chosen, job.scale)
    measured: list[Row] = []
    for processes in sorted({1, *grid, *(bug.processes for bug in bugs.values())}):
        of_size = {name: bug.case for name, bug in bugs.items() if bug.processes == processes}
        own = replace(
            job,
            cases=[asdict(case) for case in grid.get(processes, [])],
            references=[asdict(case) for case in plain] if processes == 1 else [],
            planted=[(name, asdict(case)) for name, case in of_size.items()],
        )
        path = Path(job.folder, f"job{processes}.json")
        path.write_text(json.dumps(asdict(own)))
        launch(processes, WORKER, str(path))
        written = json.loads(Path(job.folder, f"results{processes}.json").read_text())
        results = {name: [Result(**result) for result in parts] for name, parts in written.items()}
        if processes == 1 and (wrong := [r.refused for r in results["reference"] if r.refused]):
            raise UserError(wrong[0])
        measured += [
            Row(processes, *pair) for pair in zip(grid.get(processes, []), results["case"], strict=True)
        ]
        named = zip(of_size.items(), results["planted"], strict=True)
        measured += [Row(processes, case, result, name) for (name, case), result in named]
    return measured


def against_float64(job: Job, cases: Iterable[Case]) -> dict[tuple[str, str], dict[str, Cell]]:
    """Compare the stored references of `run` with float64: {(algorithm, family): cells}.

    Not those with adapters, which tests/model/test_lora.py compares with peft.
    """
    source = rows.StoredRows(Path(job.data)) if job.data else rows.RANDOM
    compared = {}
    for case in references((case for case in cases if not case.lora), job.scale):
        stored = load(job, case)
        directory = Path(job.models[case.family])
        compared[case.algorithm, case.family] = float64.compare_step(
            directory, case.algorithm, source, stored
        )
    return compared


def load(job: Job, case: Case) -> dict:
    """A stored reference."""
    stored = torch.load(Path(job.folder, file_of(case)), weights_only=True)
    arrays = {
        name: converted(stored[name], torch.Tensor, torch.Tensor.numpy) for name in ("recorded", "outputs")
    }
    return stored | arrays
