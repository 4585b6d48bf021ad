"""Shared by the benchmarks of this folder: fresh processes, the clocks, TRL's settings, the table.

Each trainer is measured in a fresh process with the same thread count, in turn, `rounds` times over, and the
first step of each run is dropped. With one thread the clock is the process's own CPU seconds, which repeat
within a few per cent whatever else the machine does; the wall clock, printed beside it, does not. Padding is
not work: a real token is a token of a text.

The trainers' own libraries are imported inside the functions that run in a child: the parent must stay small
(a child's peak memory starts at its parent's), and no trainer may pay for the libraries of another one.
"""

import itertools
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for our package, `align`

LEARNING_RATE = 1e-5
CLIP_GRAD = 1.0
T = TypeVar("T")


@dataclass(frozen=True)
class RunConfig:
    """Flags of every benchmark."""

    model: Path = Path("models/smollm2-135m-instruct")
    """Hugging Face directory of the model to train."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the matrix products; trainers keep weights and Adam states in fp32 either way."""
    threads: int = 1
    """CPU threads of every child process."""
    steps: int = 4
    """Measured steps; one more is run first and dropped."""
    rounds: int = 1
    """Runs of each trainer, in turn."""


@dataclass(frozen=True)
class Measured:
    """One run of one trainer. The lists have one entry per step, the warm-up step first."""

    tokens: list[int]
    """Real tokens of each step: the summed lengths of its texts (prompt and answer, no padding)."""
    cpu_s: list[float]
    """CPU seconds of each step, of all threads of the process; data loading and the optimizer included."""
    wall_s: list[float]
    """Wall-clock seconds of each step."""
    losses: list[float]
    """Loss of each step before its update, in nats."""
    grad_norms: list[float]
    """Norm of each step's gradient before clipping."""
    peak_rss_gb: float
    """Largest resident memory of the process, in 1e9 bytes."""
    trained_tokens: list[int] | None = None
    """Tokens of each step's rows that carry loss; None where a loss is not one of tokens."""
    distinct_tokens: list[int] | None = None
    """Real tokens of each step, a prompt with several answers counted once; None where rows share nothing."""
    pass_cpu_s: float = 0.0
    """CPU seconds of a pass over the data of all steps, before the first of them; 0 without one."""
    pass_wall_s: float = 0.0
    """Its wall-clock seconds."""


def prepare(config: RunConfig) -> None:
    """Check the model directory, and set the environment that child processes start with."""
    if not (config.model / "config.json").exists():
        raise ValueError(f"--model {config.model} holds no config.json: make it with `make smollm2`")
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(config.threads)
    quiet = {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "ignore",
        "TQDM_DISABLE": "1",
    }
    os.environ.update(quiet, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def measure(jobs: dict[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Run every trainer in a process of its own, in turn, `rounds` times over."""
    runs: dict[str, list[T]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            runs[name].append(in_child(job))
    return runs


def in_child(job: Callable[[], T]) -> T:
    """Run `job` in a fresh process and return its result. An exception in the child is raised here."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(job).result()


def measure_peak(config: RunConfig) -> float:
    """Return the machine's matrix-multiply ceiling in GFLOP/s. Runs in a child."""
    from peak import gemm_peak

    return gemm_peak(config.dtype, config.threads)


def read_rows(path: Path, fields: tuple[str, ...], batch: int, steps: int) -> list[dict]:
    """Return the rows of all steps, `batch` each, the warm-up step's first.

    Raises:
        ValueError: a line that is not JSON or lacks one of `fields`, or fewer rows than the steps need.
    """
    needed = batch * (steps + 1)
    rows = []
    with path.open() as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error
            for field in fields:
                if field not in row:
                    raise ValueError(f'{path}:{number}: no field "{field}"')
            rows.append(row)
            if len(rows) == needed:
                return rows
    raise ValueError(f"--data {path} has {len(rows)} rows: --steps {steps} and a warm-up step need {needed}")


def clocks() -> dict[str, float]:
    """Return both clocks in seconds; only differences mean anything."""
    return {"cpu": time.process_time(), "wall": time.perf_counter()}


def differences(values: list[float]) -> list[float]:
    """Return what each value adds to the one before: one entry fewer."""
    return [after - before for before, after in itertools.pairwise(values)]


def seconds(run: RunConfig, call: Callable[[], Any], times: int) -> list[float]:
    """Return the seconds of each of `times` calls, after a warm-up call, by `clock_name`'s clock."""
    readings = [clocks()]
    for _ in range(times + 1):
        call()
        readings.append(clocks())
    return differences([reading[clock_name(run).removesuffix("_s")] for reading in readings])[1:]


def sums_by_step(values: list[int], batch: int) -> list[int]:
    """Return the sums of every `batch` values, one of each row."""
    return [sum(values[i : i + batch]) for i in range(0, len(values), batch)]


def peak_rss_gb() -> float:
    """Return the largest resident memory of this process so far, in 1e9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def of_pass(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Return the fields of Measured about a pass between two readings of `clocks`."""
    return {f"pass_{name}_s": after[name] - before[name] for name in before}


def measured(log: list[dict[str, float]], tokens: list[int], **rest: float | list[int]) -> Measured:
    """Return the result of a trainer that logged as `record_steps` does, at the end of its process.

    Args:
        log: the clocks at the start, and after each step with `loss` and `grad_norm`.
        tokens: real tokens of each step.
        rest: fields of Measured that not every trainer has.
    """
    return Measured(
        tokens=tokens,
        cpu_s=differences([entry["cpu"] for entry in log]),
        wall_s=differences([entry["wall"] for entry in log]),
        losses=[entry["loss"] for entry in log[1:]],
        grad_norms=[entry["grad_norm"] for entry in log[1:]],
        peak_rss_gb=peak_rss_gb(),
        **rest,
    )


def our_model(directory: Path, dtype: str, head: Literal["policy", "scorer"] = "policy") -> Any:
    """Return our model of a Hugging Face directory, its weights loaded."""
    from align.distributed.parallel import ParallelConfig
    from align.model import architecture, gpt, huggingface
    from align.model.config import ModelConfig

    arch = architecture.read_config(directory)
    build = gpt.build_policy if head == "policy" else gpt.build_scorer
    model = build(arch, ModelConfig(model=str(directory), precision=dtype), ParallelConfig())
    huggingface.load(model, huggingface.open_source(directory, arch, 0))
    return model


def our_optimizer(model: Any) -> Any:
    """Return our AdamW as TRL sets its own: betas 0.9 and 0.999, eps 1e-8, no weight decay, CLIP_GRAD.

    `model` is what `align.model.gpt.distributed` returned.
    """
    from align.training import optim

    settings = optim.OptimConfig(lr=LEARNING_RATE, weight_decay=0.0, adam_beta2=0.999, clip_grad=CLIP_GRAD)
    return optim.build(model, settings)


def trl_arguments(config: RunConfig, batch: int, max_length: int, output: str) -> dict[str, Any]:
    """Return settings of every TRL trainer: its defaults, except for what makes the runs comparable."""
    return dict(
        output_dir=output,
        per_device_train_batch_size=batch,
        max_length=max_length,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP_GRAD,
        bf16=config.dtype == "bf16",  # TRL's default is True
        gradient_checkpointing=False,  # TRL's default is True: slower
        train_sampling_strategy="sequential",  # the same rows in every step as ours
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def record_steps(trainer: Any) -> list[dict[str, float]]:
    """Make a transformers `trainer` log its steps into the returned list, which training fills.

    Entry 0 is the start; after it comes one entry per step: `cpu` and `wall` (seconds, at the step's end),
    `num_tokens` (real tokens since the start), `loss`, `grad_norm`.
    """
    from transformers import PrinterCallback, TrainerCallback

    log = []

    class Recorder(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            log.append({**clocks(), "num_tokens": 0})

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:  # not the summary at the end
                log.append({**clocks(), **logs})

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Recorder)
    return log


def logged_tokens(log: list[dict[str, float]]) -> list[int]:
    """Return the real tokens of each step that TRL counted into a log of `record_steps`."""
    return differences([entry["num_tokens"] for entry in log])


def matmul_parameters(model: Path, head: bool = True) -> int:
    """Count the weights that a token is multiplied with: all matrices of the model, with the head or without.

    The embedding is a look-up and does not count, unless it is tied to the head. Reads file headers only.
    """
    matrices = {}
    for file in model.glob("*.safetensors"):
        with file.open("rb") as content:
            header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
        header.pop("__metadata__", None)
        matrices |= {name: math.prod(t["shape"]) for name, t in header.items() if len(t["shape"]) == 2}
    if not head:
        matrices.pop("lm_head.weight", None)
    if not head or "lm_head.weight" in matrices:
        matrices.pop("model.embed_tokens.weight")
    return sum(matrices.values())


def clock_name(config: RunConfig) -> Literal["cpu_s", "wall_s"]:
    """Return the clock that speeds are stated by: CPU seconds where one thread makes them mean something."""
    return "cpu_s" if config.threads == 1 else "wall_s"


def tokens_per_second(runs: list[Measured], clock: Literal["cpu_s", "wall_s"]) -> float:
    """Return real tokens per second over all runs, their warm-up steps left out."""
    tokens = sum(sum(run.tokens[1:]) for run in runs)
    return tokens / sum(sum(getattr(run, clock)[1:]) for run in runs)


def print_table(
    runs: dict[str, list[Measured]],
    clock: Literal["cpu_s", "wall_s"],
    flops: dict[str, float],
    peak: float,
    figures: dict[str, Callable[[Measured], str]],
) -> None:
    """Print one line per trainer, and the speed of each of ours over that of each other one.

    Args:
        flops: by trainer, useful floating-point operations per real token.
        peak: the machine's matrix-multiply ceiling in GFLOP/s.
        figures: by column name, more about a trainer's first run.
    """
    width = max(12, *(len(name) + 2 for name in runs))
    columns = ("tok/s CPU", "tok/s wall", "step s", "peak RSS GB", "of peak", *figures)
    print(f"{'trainer':<{width}}" + "".join(f"{name:>12}" for name in columns))
    for name, done in runs.items():
        steps = [s for run in done for s in getattr(run, clock)[1:]]
        share = tokens_per_second(done, clock) * flops[name] / peak / 1e9
        print(
            f"{name:<{width}}"
            f"{tokens_per_second(done, 'cpu_s'):>12.1f}{tokens_per_second(done, 'wall_s'):>12.1f}"
            f"{sum(steps) / len(steps):>12.2f}{max(run.peak_rss_gb for run in done):>12.2f}{share:>12.0%}"
            + "".join(f"{figure(done[0]):>12}" for figure in figures.values())
        )
    for ours in [name for name in runs if name.startswith("ours")]:
        for peer in [name for name in runs if not name.startswith("ours")]:
            ratio = tokens_per_second(runs[ours], clock) / tokens_per_second(runs[peer], clock)
            print(f"{ours} / {peer}: {ratio:.2f}x")
