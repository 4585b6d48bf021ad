"""The ranks of `python -m tools.conformance`: cases of one number of processes, and their errors, to a file.

    torchrun --nproc_per_node 2 tools/conformance/worker.py JOB.json

A case takes three updates and an evaluation. Its reference is the plainest case of one process with the same
model and algorithm, whose tensors the first job stores.
"""

import contextlib
import functools
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel

from align.data import packing
from align.distributed import grids, parallel
from align.errors import UserError
from align.model import adapter_files, architecture, gpt, huggingface
from align.model.config import ModelConfig
from align.model.lora import LoraConfig
from align.tracking.metrics import with_std
from align.training import batching, checkpoint, engine, gradients, optim, reference
from tools.conformance import compare, planted, rows
from tools.conformance.cases import Case, describe
from tools.conformance.losses import ADAM_EPS, LABELS, LOSSES, LR, SEED, sequence_logprobs
from tools.conformance.rows import ROLLOUTS, ROWS, STEPS, DataSet, Recorded, Source

SIZES = [ROWS] * STEPS + [1]  # the evaluation has fewer rows than there are data parallel ranks
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Job:
    """Cases of one number of processes."""

    models: dict[str, str]  # family: directory
    folder: str  # of references, and of all that a job writes
    cases: list[dict] = field(default_factory=list)
    references: list[dict] = field(default_factory=list)  # cases whose results are stored as references
    planted: list[tuple[str, dict]] = field(default_factory=list)  # (name of a bug, case)
    data: str | None = None  # file of `rows.store`; None: random rows
    scale: int = 1  # size of micro-batches by those of the random rows
    checkpoints: bool = True  # columns "checkpoint" and "resume", once for each model and layout


# ---- one case ------------------------------------------------------------------------------------


def build(directory: Path, case: Case) -> gpt.Decoder:
    """This rank's shard of the model that the case trains, with its weights."""
    start, labels = architecture.read_config(directory), LABELS[case.algorithm]
    arch = replace(start, labels=labels)
    config = ModelConfig(model=str(directory), precision="fp32", recompute=case.recompute)
    source = huggingface.open_source(directory, start, SEED)
    adapters = LoraConfig(lora_rank=case.lora).of_model(arch)
    if labels == 0:
        options: dict[str, Any] = dict(
            entropy=case.algorithm in ROLLOUTS, entropy_grad=case.algorithm == "ppo"
        )
        model: gpt.Decoder = gpt.build_policy(arch, config, case.layout, **options, adapters=adapters)
    else:
        model = gpt.build_scorer(arch, config, case.layout, (1 / labels,) * labels, adapters)
        source = source if start.labels else huggingface.FreshHead(source, arch, SEED)
    huggingface.load(model, source)
    if adapters:
        adapter_files.fill(model, RandomAdapters(arch, adapters, SEED))
    return model


class RandomAdapters(adapter_files.FreshAdapters):
    """Adapters with a random B as well, so that A has a gradient in the first step."""

    def read(self, name: str) -> torch.Tensor:
        if name.endswith("lora_A.weight"):
            return super().read(name)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return 0.1 * torch.randn(self.shapes[name], generator=generator)


class Training:
    """A model in training on the rows of its algorithm, in the layout of its case."""

    def __init__(
        self,
        directory: Path,
        case: Case,
        path: Path,
        source: Source = rows.RANDOM,
        recorded: list[Recorded] | None = None,
    ):
        """
        Args:
            path: file of the reference's log-probs.
            recorded: the rollout of each step.
        """
        self.case, self.source, self.recorded = case, source, recorded or []
        self.model = gpt.distributed(build(directory, case))
        self.optimizer = optim.build(self.model, optim.OptimConfig(weight_decay=0.1, adam_eps=ADAM_EPS))
        self.attach = self.reference(path) if case.algorithm == "dpo" else lambda batches: None

    def data(self, step: int) -> DataSet:
        recorded = self.recorded[step] if self.recorded else None
        return rows.data_set(self.case.algorithm, step, SIZES[step], self.source, recorded)

    def batches(self, step: int) -> list[packing.Batch]:
        return make_batches(self.model, self.case, self.data(step))

    def reference(self, path: Path) -> Callable[[list[packing.Batch]], None]:
        """Attach the reference's log-probs to micro-batches of "dpo"."""
        if self.case.lora:
            return partial(reference.BaseModel(self.model, sequence_logprobs).attach, name="train")
        if self.case.swap:
            return partial(reference.Swapped(self.model, sequence_logprobs).attach, name="train")
        precomputed = reference.Precomputed(
            self.model,
            sequence_logprobs,
            lambda name, numbers: self.batches(numbers[0] // ROWS),
            {"train": [range(step * ROWS, step * ROWS + size) for step, size in enumerate(SIZES)]},
            path,
            repr((path, self.case)),
        )
        return partial(precomputed.attach, name="train")

    def outputs(self, step: int) -> list[np.ndarray]:
        """Log-probs or values of each row's trained tokens, in the order of `data`. Collective."""
        data = self.data(step).rows
        groups = data if self.case.sharing else [(example,) for row in data for example in row]
        outputs = batching.per_example_outputs(self.model, groups, budget(self.case))
        per_row = len(data[0])
        return [np.concatenate(outputs[i : i + per_row]) for i in range(0, len(outputs), per_row)]

    def forward_backward(self, step: int) -> dict[str, float]:
        batches, loss_fn = self.batches(step), LOSSES[self.case.algorithm]
        self.attach(batches)
        return engine.forward_backward(self.model, batches, loss_fn, sum(self.data(step).counts))

    def update(self) -> float:
        """Take the optimizer step; returns the gradient's norm."""
        return optim.step(self.optimizer, LR[self.case.algorithm])

    def step(self, step: int) -> dict[str, float]:
        metrics = self.forward_backward(step)
        return with_std(metrics | {"grad_norm": self.update()})

    def evaluate(self, step: int) -> dict[str, float]:
        batches = self.batches(step)
        self.attach(batches)
        loss_fn, count = LOSSES[self.case.algorithm], sum(self.data(step).counts)
        return with_std(engine.evaluate(self.model, batches, loss_fn, count))

    def weights(self) -> Tensors:
        """All trained weights by their names in files, in CPU memory. Collective."""
        whole = (adapter_files.whole if self.case.lora else huggingface.whole_tensors)(self.model.module)
        return {name: tensor.to("cpu", copy=True) for name, tensor in whole}


def budget(case: Case) -> packing.BatchConfig:
    """Sizes of a micro-batch."""
    return packing.BatchConfig(
        micro_batch_tokens=case.micro_batch_tokens, micro_batch_size=case.micro_batch_size
    )


def make_batches(model: DistributedDataParallel, case: Case, data: DataSet) -> list[packing.Batch]:
    """This rank's micro-batches of a step."""
    order = range(len(data.rows))[:: -1 if case.reverse else 1]
    examples = [data.rows[i] for i in order]
    values = {name: [arrays[i] for i in order] for name, arrays in data.values.items()}
    if not case.sharing:
        return [unshared(model, examples, values)]
    return batching.micro_batches(model, examples, budget(case), values)


def unshared(
    model: DistributedDataParallel,
    examples: list[tuple[packing.Example, ...]],
    values: dict[str, list[np.ndarray]],
) -> packing.Batch:
    """This rank's rows in one micro-batch, in which every example has all its places itself."""
    own_rows = slice(parallel.dp_rank(), None, parallel.dp_size())
    batch = packing.collate(
        [[example] for row in examples[own_rows] for example in row], batching.alignment(model)
    )
    for name, arrays in values.items():
        parts = arrays[own_rows] or [arrays[0][:0]]
        batch.extra[name] = torch.from_numpy(np.concatenate(parts))
    return batch.to(parallel.device())


def train(directory: Path, case: Case, path: Path) -> list[dict[str, float]]:
    """Every metric of each update, and of one evaluation after them, with the project's optimizer."""
    training = Training(directory, case, path)
    return [training.step(step) for step in range(STEPS)] + [training.evaluate(STEPS)]


# ---- its errors ----------------------------------------------------------------------------------


@dataclass
class Result:
    """A case's metrics by step, and its errors by column; `refused`: the reason why the case cannot run."""

    steps: list[dict[str, float]] = field(default_factory=list)
    cells: dict[str, tuple[float, str]] = field(default_factory=dict)
    refused: str = ""


def file_of(case: Case) -> str:
    """File of a case's reference."""
    return f"{case.family}-{case.algorithm}{f'-lora{case.lora}' if case.lora else ''}.pt"


class Measurement:
    """One case with its reference. Collective."""

    def __init__(self, job: Job, case: Case, number: str, saves: bool):
        """
        Args:
            number: part of the names of files of this case only.
            saves: with the columns "checkpoint" and "resume".
        """
        self.job, self.case, self.saves = job, case, saves
        self.folder, self.number = Path(job.folder), number
        self.directory = Path(job.models[case.family])
        self.source = rows.StoredRows(Path(job.data)) if job.data else rows.RANDOM
        self.stored = self.folder / file_of(case)  # the reference

    def training(self, case: Case, recorded: list[Recorded]) -> Training:
        path = self.folder / f"{self.number}.safetensors"
        return Training(self.directory, case, path, self.source, recorded)

    def record(self) -> Result:
        """Run a reference: store its rollouts, metrics, outputs, gradients, and weights after one update."""
        recorded: list[Recorded] = []
        if self.case.algorithm in ROLLOUTS:
            training = self.training(self.case, [])
            outputs = [[x[:, 0] for x in training.outputs(step)] for step in range(len(SIZES))]
            recorded = [rows.record(self.case.algorithm, step, x) for step, x in enumerate(outputs)]
        training = self.training(self.case, recorded)
        stored = {"recorded": recorded, **self.run(training)}
        torch.save(converted(stored, np.ndarray, torch.from_numpy), self.stored)
        return Result(stored["steps"], self.errors(stored, stored))

    def run(self, training: Training) -> dict:
        """Three updates and an evaluation; a checkpoint after the first update."""
        outputs = training.outputs(0)
        metrics = training.forward_backward(0)
        gradient = gradients.by_name(training.model)
        steps = [with_std(metrics | {"grad_norm": training.update()})]
        weights = training.weights()
        if self.saves:
            checkpoint.write(self.folder / self.number, 1, training.model, training.optimizer)
        steps.append(training.step(1))
        later = training.weights()
        steps += [training.step(step) for step in range(2, STEPS)] + [training.evaluate(STEPS)]
        return dict(
            steps=steps, outputs=outputs, gradients=gradient, weights=weights, weights_after_two=later
        )

    def measure(self) -> Result:
        """Run the case, and compare it with its reference."""
        stored = torch.load(self.stored, weights_only=True)
        for name in ("recorded", "outputs"):
            stored[name] = converted(stored[name], torch.Tensor, torch.Tensor.numpy)
        training = self.training(self.case, stored["recorded"])
        results = self.run(training)
        cells = self.errors(results, stored)
        if self.saves:
            if torch.distributed.get_world_size() > 1:
                cells["checkpoint"] = self.load(self.other_layout(), results, stored)
            cells["resume"] = self.load(self.case, results, stored)
        agree = all(steps == results["steps"] for steps in parallel.gather(results["steps"]))
        if not agree:
            cells["metrics"] = math.inf, "ranks report different metrics"
        return Result(results["steps"], cells)

    def errors(self, results: dict, stored: dict) -> dict[str, tuple[float, str]]:
        """Errors of a run by column."""
        steps = results["steps"], stored["steps"]
        others = [name for name in stored["steps"][0] if name not in ("loss", "grad_norm")]
        cells = {
            "outputs": compare.outputs(results["outputs"], stored["outputs"]),
            "loss": compare.metrics(*steps, names=["loss"]),
            "gradients": compare.tensors(results["gradients"], stored["gradients"]),
            "gradient norm": compare.metrics(*steps, names=["grad_norm"]),
            "weights": compare.tensors(results["weights"], stored["weights"]),
            "metrics": compare.metrics(*steps, names=others),
        }
        return {name: (cell.error, cell.place) for name, cell in cells.items()}

    def other_layout(self) -> Case:
        """Data parallelism alone, and tensor parallelism for a case that has it already."""
        plain = replace(self.case, tp=1, pp=1, vp=1, cp=1, sequence_parallel=False)
        return replace(plain, tp=2) if plain == self.case else plain

    def load(self, case: Case, results: dict, stored: dict) -> tuple[float, str]:
        """Continue the checkpoint for a step in a layout.

        Its weights must be the saved ones to the last bit. In its own layout the next step must be the same,
        on a CPU to the last bit; in another one it is compared with the reference.
        """
        own = case == self.case
        grids.change(case.layout)
        training = self.training(case, stored["recorded"])
        checkpoint.load(self.folder / self.number, training.model, training.optimizer, same_layout=own)
        loaded = compare.tensors(training.weights(), results["weights"], bound=0.0)
        if loaded.error:
            return loaded.error, f"{loaded.place}, as loaded"
        expected = results if own else stored
        step = compare.metrics([training.step(1)], [expected["steps"][1]])
        weights = compare.tensors(training.weights(), expected["weights_after_two"])
        worst = max(step, weights, key=lambda cell: cell.error)
        return worst.error, worst.place


def converted(nested: Any, kind: type, convert: Callable) -> Any:
    """Convert all items of a type in nested dictionaries and lists: torch.load reads no arrays of numpy."""
    if isinstance(nested, dict):
        return {name: converted(item, kind, convert) for name, item in nested.items()}
    if isinstance(nested, list):
        return [converted(item, kind, convert) for item in nested]
    return convert(nested) if isinstance(nested, kind) else nested


# ---- all cases -----------------------------------------------------------------------------------


@contextlib.contextmanager
def planting(bug: str) -> Iterator[None]:
    """Plant a bug, without the audit of copies, which would end the run before the numbers differ."""
    with planted.seeded(planted.BUGS[bug].changes), mock.patch.object(optim, "check_replicas"):
        yield


def attempt(measurement: Measurement, run: Callable[[], Result], bug: str | None) -> Result:
    """The result of a case; an error of a planted bug, and a layout that a model cannot have, are results."""
    tolerated = (RuntimeError, ValueError, AssertionError) if bug else UserError
    case, processes = measurement.case, torch.distributed.get_world_size()
    grids.change(case.layout)
    try:
        with planting(bug) if bug else contextlib.nullcontext():
            result = run()
    except tolerated as error:
        result = Result(refused=f"{type(error).__name__}: {error}" if bug else str(error))
    if parallel.is_main():
        largest = max((cell[0] for cell in result.cells.values()), default=math.nan)
        planted_bug = f", planted: {bug}" if bug else ""
        names = f"{case.algorithm}, {case.family}, {describe(case, processes)}{planted_bug}"
        print(f"{names}: {result.refused or f'{largest:.0e}'}", flush=True)
    return result


def main(job: Job) -> None:
    """The results of each case, and of each planted bug, by rank 0 into a file."""
    bugs = [bug for bug, _ in job.planted]
    kinds: dict[str, tuple[list[dict], list]] = {
        "reference": (job.references, [None] * len(job.references)),
        "case": (job.cases, [None] * len(job.cases)),
        "planted": ([flags for _, flags in job.planted], bugs),
    }
    written: dict[str, list[dict]] = {}
    saved: set[tuple] = set()  # models and layouts whose checkpoints are compared
    with parallel.start(parallel.ParallelConfig()):
        processes = torch.distributed.get_world_size()
        for kind, (cases, names) in kinds.items():
            written[kind] = []
            for i, (flags, bug) in enumerate(zip(cases, names, strict=True)):
                case = Case(**flags)
                key = kind, case.family, LABELS[case.algorithm], case.sizes, case.lora, bug
                saves = job.checkpoints and kind != "reference" and key not in saved
                saved.add(key)
                measurement = Measurement(job, case, f"{processes}-{kind}-{i}", saves)
                run = measurement.record if kind == "reference" else measurement.measure
                written[kind].append(asdict(attempt(measurement, run, bug)))
        if parallel.is_main():
            Path(job.folder, f"results{processes}.json").write_text(json.dumps(written))


def use_small_buckets() -> None:
    """Divide Megatron's buffers into padded buckets, as for models of more than 40 million weights."""
    config = gpt.DistributedDataParallelConfig
    gpt.DistributedDataParallelConfig = functools.partial(config, bucket_size=3000)


if __name__ == "__main__":
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    if job.data is None:
        use_small_buckets()
    main(job)
