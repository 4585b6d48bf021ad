"""Models and data of bench/plan.py; as a script, also under torchrun: peaks of a run's memory by phase.

    plan_cases.py OUT ALLOCATOR SCRIPT FLAGS...

OUT/RANK.json gets {phase: GB}. On a CPU that is resident memory, and ALLOCATOR says of which kind: "exact"
maps each larger tensor by itself and unmaps it when freed, so that it is the sum of all live tensors;
"run" is glibc as align.distributed.megatron_on_cpu sets it: it keeps freed memory, with gaps. Models
are random: of their directories only config.json and tokenizer are read.
"""

import ctypes
import functools
import importlib
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from align import command_line
from align.distributed import megatron_on_cpu, parallel
from align.generation import generator
from align.model import gpt, huggingface
from align.rewards import sources
from align.training import batching, checkpoint, engine, offload, optim, phases
from align.training.phases import Phases

ROOT = Path(__file__).resolve().parents[1]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's numbers
PARTS = {  # phases of a script that has none of its own, and their functions
    "train": ((engine, "forward_backward"), (optim, "step")),
    "generate": ((generator.Generator, "generate"),),
    "score": ((sources.RewardModel, "__call__"),),
    "audit": ((batching, "per_example_outputs"),),
    "reference": ((engine, "outputs"),),
    "save": ((checkpoint, "write"),),
}


def write_model(directory: Path, labels: int = 0, **changes: Any) -> Path:
    """A model directory without weights: the tiny model's, with another config.json."""
    shutil.copytree(ROOT / "assets" / "tiny", directory)
    config = json.loads((directory / "config.json").read_text()) | changes
    if labels:
        config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_data(directory: Path, rows: int, length: int, prompt: int) -> Path:
    """Files of rows, pairs and prompts of so many tokens; a letter is a token of the tiny model."""
    directory.mkdir()
    rng = random.Random(0)

    def text(count: int) -> str:
        return "".join(rng.choices("abcdefgh", k=count))

    kinds = {
        "rows": lambda: {"input": text(2), "output": text(length)},
        "pairs": lambda: {
            "prompt": (start := text(length // 2)),
            "chosen": text(length - len(start) - 2),
            "rejected": text(length - len(start) - 2),
        },
        "prompts": lambda: {"prompt": text(prompt - 1)},
        "tasks": lambda: {"input": text(prompt - 2), "output": text(4)},
    }
    for name, make in kinds.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(make()) + "\n" for _ in range(rows)))
    return directory


def map_each() -> None:
    """Have glibc map each larger piece of memory by itself."""
    libc = ctypes.CDLL(None)
    for parameter, value in ((M_MMAP_MAX, 1 << 24), (M_MMAP_THRESHOLD, 1 << 16), (M_TRIM_THRESHOLD, 1 << 17)):
        libc.mallopt(parameter, value)


class Peaks:
    """The highest peak of each phase, in bytes. A phase in a phase is part of it."""

    def __init__(self):
        self.peaks: dict[str, float] = {}
        self.inside = False

    def note(self, name: str, size: float) -> None:
        self.peaks[name] = max(size, self.peaks.get(name, 0.0))

    def of(self, name: str, function: Callable) -> Callable:
        """Wrap a function, and note its peak."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            self.inside = True
            phases.start_peak()
            result = function(*args, **kwargs)
            self.note(name, phases.peak_bytes())
            self.inside = False
            return result

        return run

    def of_phases(self) -> None:
        """Note the peaks that align.training.phases.Phases measures, of this rank."""
        call = Phases.__call__.__wrapped__

        def phase(phases: Phases, name: str, /, **needs: str):  # noqa: ANN202
            yield from call(phases, name, **needs)
            for label, size in phases.peaks.items():
                self.note(label, size * 1e9)

        Phases.__call__ = offload.contextlib.contextmanager(phase)

    def of_first(self) -> None:
        """Note as "process" the memory before the first model is built."""
        build = gpt.Decoder.__init__

        def first(*args: Any, **kwargs: Any) -> None:
            if "process" not in self.peaks:
                phases.start_peak()
                self.note("process", phases.peak_bytes())
            build(*args, **kwargs)

        gpt.Decoder.__init__ = first


def main(out: Path, allocator: str, script: str, flags: list[str]) -> None:
    """Run a script with these flags and write its peaks."""
    module = importlib.import_module(script.removesuffix(".py"))
    config = command_line.parse(module.Config, flags)
    huggingface.open_source = lambda directory, arch, seed: huggingface.RandomSource(arch, seed)
    if allocator == "exact":
        megatron_on_cpu.keep_memory = map_each
    peaks = Peaks()
    peaks.of_first()
    if hasattr(config, "offload"):
        peaks.of_phases()
    else:
        for name, functions in PARTS.items():
            for owner, function in functions:
                setattr(owner, function, peaks.of(name, getattr(owner, function)))
    with parallel.start(config.parallel):
        module.main(config)
        rank = dist.get_rank()
    out.mkdir(exist_ok=True)
    (out / f"{rank}.json").write_text(json.dumps({name: size / 1e9 for name, size in peaks.peaks.items()}))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(Path(sys.argv[1]), *sys.argv[2:4], sys.argv[4:])
