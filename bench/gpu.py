"""Training, sampling and PPO on one GPU, with random weights and tokens: speeds beside what the GPU can do.

    python bench/gpu.py --output gpu.json

No model, text or network is needed. Shapes are those of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B; matrices
are bf16 with fp32 main weights, gradients and Adam. Sections:

    limits   the rate of an 8192^3 bf16 product, and of a device-to-device copy (bytes read and written)
    sft      optimizer steps on packed rows of 512 to 2048 tokens, all trained, as train_sft.py takes them
    dpo      the same on pairs, with the log-probs of the reference in every step (--reference swap)
    decode   sampling after prompts of 128 tokens, 1, 32 and 256 answers of 128 tokens at a time; and 1 and 32
             answers to one prompt that end at 8192 tokens
    trl      TRL's SFTTrainer (padded, and packed) and DPOTrainer on the rows of sft and dpo, bf16 autocast
    ppo      steps of train_ppo.py with critic, reference and reward model, --offload on and off

A training step's operations are those that the loss needs (`train_flops`): no recomputation, a prompt once
for both answers, attention to the keys that are there. Its utilisation is their rate over the measured
product's, and over 989 TFLOP/s, the data sheet's of an H100 or H200. Adam for 8B does not fit one GPU:
training takes as many of its layers as `layers_that_fit` allows, the table says how many, and operations are
counted for these. The bound of a decode step (`decode_bytes`) is all weights and the present keys and values,
read once, at the speed of the copy. Speeds are those of the median step; peak GB is memory of tensors, in 1e9
bytes, in the steps that count.

Every case runs in a process of its own: one that fails leaves a line in the table and the exit status 1. The
next one's process imports meanwhile. Without a GPU there is `--shapes tiny`
alone, which tests this script; its figures say nothing of a GPU.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

WORKER = Path(__file__).with_name("gpu_cases.py")
DATASHEET_TFLOPS = 989.0  # dense bf16, H100 and H200 SXM
TRAINED_BYTES = 18  # of a weight in training: bf16, fp32 gradient, fp32 main weight, two fp32 moments
TRAINED_SHARE = 0.6  # of the GPU's memory that these may take; the rest is for activations and logits


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def head_weights(self) -> int:
        """Weights of the output layer."""
        return self.vocab * self.hidden

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of one layer: q, k, v, output, gate, up, down."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.ffn


@dataclass(frozen=True)
class Work:
    """Amount of work measured. Pairs of numbers are bounds of lengths in tokens, which are drawn evenly."""

    product: int = 8192
    copy_bytes: int = 2**31
    warmup: int = 3  # steps, in which kernels are compiled
    steps: int = 5
    rows: int = 32  # of an SFT step
    row_tokens: tuple[int, int] = (512, 2048)
    pairs: int = 16  # of a DPO step
    prompt_tokens: tuple[int, int] = (256, 1024)
    answer_tokens: tuple[int, int] = (128, 512)
    micro_batch_tokens: int = 8192
    trl_micro_batch: int = 4  # rows or pairs that TRL computes at a time
    decode_batches: tuple[int, ...] = (1, 32, 256)
    decode_tokens: int = 128  # of a prompt, and of a response
    long_batches: tuple[int, ...] = (1, 32)  # responses to one prompt: of 8b 32 prefilled ones are too many
    long_tokens: int = 8192  # of that prompt and a response
    ppo_answers: int = 128
    ppo_prompt_tokens: tuple[int, int] = (64, 256)
    ppo_new_tokens: int = 512
    ppo_steps: int = 3


SHAPES = {
    "tiny": Shape(2, 64, 4, 2, 96, 512, True),
    "135m": Shape(30, 576, 9, 3, 1536, 49152, True),
    "1b": Shape(16, 2048, 32, 8, 8192, 128256, True),
    "8b": Shape(32, 4096, 32, 8, 14336, 128256, False),
}
TINY_WORK = Work(
    product=256,
    copy_bytes=2**22,
    warmup=1,
    steps=2,
    rows=4,
    row_tokens=(16, 64),
    pairs=2,
    prompt_tokens=(8, 32),
    answer_tokens=(8, 16),
    micro_batch_tokens=256,
    trl_micro_batch=2,
    decode_batches=(1, 3),
    decode_tokens=16,
    long_batches=(1, 2),
    long_tokens=64,
    ppo_answers=4,
    ppo_prompt_tokens=(8, 16),
    ppo_new_tokens=8,
    ppo_steps=2,
)
ALONE = ("135m", "1b")  # four models for PPO, or TRL with fp32 weights: 8b does not fit
Section = Literal["limits", "sft", "dpo", "decode", "trl", "ppo"]
Record = dict[str, Any]  # one line of a table: what was measured, or its `error`


@dataclass(frozen=True)
class Config:
    """Flags of this benchmark."""

    sections: tuple[Section, ...] = ("limits", "sft", "dpo", "decode", "trl", "ppo")
    """sections to measure, in this order"""
    shapes: tuple[Literal["tiny", "135m", "1b", "8b"], ...] = ("135m", "1b", "8b")
    """shapes of the models; trl and ppo leave out 8b"""
    time_limit_s: float = 120.0
    """longest time of one case, in seconds; it is killed then"""
    total_limit_s: float = 560.0
    """longest time of all cases, in seconds; the remaining ones are not run"""
    output: Path = Path("runs/gpu.json")
    """file of all figures, rewritten after each case"""


def work_of(shape: str) -> Work:
    """Amount of work for a shape."""
    return TINY_WORK if shape == "tiny" else Work()


def matmul_weights(shape: Shape, layers: int) -> int:
    """Weights in a token's matrix products: those of the layers, and of the output layer."""
    return layers * shape.layer_weights + shape.head_weights


def all_weights(shape: Shape, layers: int) -> int:
    """Weights of all matrices."""
    return matmul_weights(shape, layers) + (0 if shape.tied else shape.head_weights)


def layers_that_fit(shape: Shape, device_bytes: int) -> int:
    """The most layers whose training takes TRAINED_SHARE of the memory: TRAINED_BYTES for each weight.

    Raises ValueError if not even one layer does.
    """
    room = TRAINED_SHARE * device_bytes / TRAINED_BYTES - all_weights(shape, 0)
    layers = min(shape.layers, int(room // shape.layer_weights))
    if layers < 1:
        raise ValueError(
            f"{device_bytes / 1e9:.0f} GB of memory are too few to train one layer of this shape"
        )
    return layers


def keys_seen(length: int, prefix: int = 0) -> int:
    """Keys that the tokens of a causal sequence attend to, their own included: prefix + 1, prefix + 2, ..."""
    return length * prefix + length * (length + 1) // 2


def forward_flops(shape: Shape, layers: int, tokens: int, predicted: int, keys: int) -> int:
    """Operations of a forward pass: 2 for each weight and token, and in attention 4 d for each key and head.

    Args:
        tokens: that pass the layers.
        predicted: that pass the output layer.
        keys: `keys_seen`, summed over the sequences. For each the scores q k and the sums of p v take 2 d.
    """
    attention = 4 * layers * shape.heads * shape.head_dim * keys
    return 2 * layers * shape.layer_weights * tokens + 2 * shape.head_weights * predicted + attention


def train_flops(forward: int, reference: bool) -> int:
    """Operations of a step: the backward pass takes two of each product of the forward pass."""
    return (4 if reference else 3) * forward


def decode_bytes(shape: Shape, sequences: int, keys: float) -> float:
    """Bytes that one decode step must read in bf16: weights once, keys and values of `keys` tokens each."""
    cache = sequences * keys * 2 * shape.layers * shape.kv_heads * shape.head_dim
    return 2 * (matmul_weights(shape, shape.layers) + cache)


def main(config: Config) -> int:
    """Run all cases, print each line at once, and return the exit status."""
    check(config)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    deadline, records = time.monotonic() + config.total_limit_s, []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as processes:
        cases = list_cases(config)
        waiting = processes.enter_context(started(cases[0], Path(scratch)))
        for case, after in zip(cases, [*cases[1:], None], strict=True):
            process, waiting = waiting, None
            if after is not None:
                waiting = processes.enter_context(started(after, Path(scratch)))
            limit = min(config.time_limit_s, deadline - time.monotonic())
            for record in finish(process, case, Path(scratch), limit):
                records.append(record)
                print_record(record, records)
            config.output.write_text(json.dumps(records, indent=1) + "\n")
    print_ratios(records)
    print(f"\nall figures are in {config.output}", flush=True)
    return int(any("error" in record for record in records))


def check(config: Config) -> None:
    """Raise ValueError for shapes that this machine cannot measure, or a limit that leaves no time."""
    import torch

    for name in ("time_limit_s", "total_limit_s"):
        if not getattr(config, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} must be above 0")
    for name in ("sections", "shapes"):
        if not getattr(config, name):
            raise ValueError(f"--{name} is empty: give at least one")
    if not torch.cuda.is_available():
        if config.shapes != ("tiny",):
            raise ValueError(
                f"--shapes {' '.join(config.shapes)} needs a GPU: without one there is only tiny"
            )
        print("NO GPU HERE: this tests the script, and no figure below says anything of a GPU")


def list_cases(config: Config) -> list[Record]:
    """Cases in the order of the flags."""
    cases = []
    for section in config.sections:
        if section == "limits":
            cases.append({"section": section, "shape": "tiny" if config.shapes == ("tiny",) else "135m"})
            continue
        for shape in config.shapes:
            if section in ("trl", "ppo") and shape not in (*ALONE, "tiny"):
                continue
            options = [{"offload": "on"}, {"offload": "off"}] if section == "ppo" else [{}]
            cases += [{"section": section, "shape": shape} | option for option in options]
    return cases


def name_of(case: Record) -> str:
    """A case in a few words, fit for a file's name."""
    return "-".join(str(case[key]) for key in ("section", "shape", "offload") if key in case)


@contextlib.contextmanager
def started(case: Record, scratch: Path) -> Iterator[subprocess.Popen]:
    """Start a case's process, which imports and then reads a line of input; it is killed after the block."""
    with (scratch / f"{name_of(case)}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(case), str(scratch)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, which compilers join
            text=True,
        )
        try:
            yield process
        finally:
            end(process)


def end(process: subprocess.Popen) -> None:
    """Kill a case's process and those it started, if it still runs: else its number may be another's now."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(process: subprocess.Popen, case: Record, scratch: Path, limit_s: float) -> list[Record]:
    """Run a started case to its end. Returns its records; the last one is of its failure, if any."""
    start, name = time.monotonic(), name_of(case)
    if limit_s <= 0:
        return [case | {"error": "not run: --total-limit-s is over"}]
    late = False
    try:
        process.communicate("begin\n", timeout=limit_s)
    except subprocess.TimeoutExpired:
        late = True
        end(process)
    results = scratch / f"{name}.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    case_s = {"case_s": round(time.monotonic() - start, 1)}
    records = [case | json.loads(line) | case_s for line in lines]
    if late:
        records.append(case | {"error": f"no end within {limit_s:.0f} s"} | case_s)
    elif process.returncode:
        log = (scratch / f"{name}.log").read_text(errors="replace")
        print(f"---- {name} failed; the end of its output:\n{log[-3000:]}\n----", flush=True)
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        reason = lines[-1] if lines else "no output"
        records.append(case | {"error": f"exit status {process.returncode}: {reason}"} | case_s)
    return records


TRAIN_COLUMNS = ("layers", "tok/s", "step s", "TFLOP/s", "of product", "of 989", "peak GB", "reference")
DECODE_COLUMNS = (
    *("answers", "keys", "tok/s", "step ms"),
    *("GB read", "bound ms", "of bound", "call tok/s", "peak GB"),
)
PPO_PHASES = ("generate", "score", "logprobs", "reference", "values", "train", "offload")
PPO_COLUMNS = ("step s", *PPO_PHASES, "other", "peak GB")


def print_record(record: Record, records: list[Record]) -> None:
    """Print one line, and before a section's first line the names of its columns."""
    section = record["section"]
    if [other["section"] for other in records].count(section) == 1:
        columns = {"limits": (), "decode": DECODE_COLUMNS, "ppo": PPO_COLUMNS}.get(section, TRAIN_COLUMNS)
        title = "ppo, --offload" if section == "ppo" else section
        print("\n" + f"{title:<22}" + "".join(f"{column:>11}" for column in columns), flush=True)
    name = f"{section} {record.get('name', record['shape'])}"
    if section == "ppo":
        name += f", {record['offload']}"
    limits = next((r for r in records if r["section"] == "limits" and "error" not in r), None)
    if "error" in record:
        cells = [f"  FAILED: {record['error']}"]
    elif "skipped" in record:
        cells = [f"  skipped: {record['skipped']}"]
    else:
        cells = {"limits": limit_cells, "decode": decode_cells, "ppo": ppo_cells}.get(section, train_cells)(
            record, limits
        )
    print(f"{name:<22}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


def limit_cells(record: Record, limits: Record | None) -> list[str]:
    """Cells of limits: rates of this device."""
    return [
        f"  {record['device']}, torch {record['torch']}, {record['device_bytes'] / 1e9:.1f} GB: "
        f"{record['product']}^3 bf16 product {record['product_tflops']:.1f} TFLOP/s "
        f"({record['product_tflops'] / DATASHEET_TFLOPS:.0%} of {DATASHEET_TFLOPS:.0f}), "
        f"copy {record['copy_gb_per_s']:.0f} GB/s"
    ]


def train_cells(record: Record, limits: Record | None) -> list[str]:
    """Cells of sft, dpo and trl. Speeds are those of the median step."""
    tflops = record["tflops"]
    cells = [f"{record['layers']}/{SHAPES[record['shape']].layers}", f"{record['tokens_per_s']:.0f}"]
    cells += [f"{record['step_s']:.3f}", f"{tflops:.1f}"]
    cells += [f"{tflops / limits['product_tflops']:.1%}" if limits else "-"]
    cells += [f"{tflops / DATASHEET_TFLOPS:.1%}", f"{record['peak_gb']:.1f}"]
    return cells + ([f"{record['reference_share']:.0%}"] if "reference_share" in record else ["-"])


def decode_cells(record: Record, limits: Record | None) -> list[str]:
    """Cells of decode: the median step beside its bound; whole calls, with prompts and graph captures."""
    gb = record["step_bytes"] / 1e9
    cells = [str(record["answers"]), f"{record['keys']:.0f}", f"{record['tokens_per_s']:.0f}"]
    cells += [f"{record['step_s'] * 1e3:.2f}"]
    bounds = ["-", "-"]
    if limits:
        bound_s = gb / limits["copy_gb_per_s"]
        bounds = [f"{bound_s * 1e3:.2f}", f"{bound_s / record['step_s']:.0%}"]
    return [*cells, f"{gb:.2f}", *bounds, f"{record['call_tokens_per_s']:.0f}", f"{record['peak_gb']:.1f}"]


def ppo_cells(record: Record, limits: Record | None) -> list[str]:
    """Cells of ppo: seconds of a step after the first one, and the shares of its phases."""
    shares = record["shares"]
    other = 1 - sum(shares.get(phase, 0.0) for phase in PPO_PHASES)
    cells = [f"{shares.get(phase, 0.0):.1%}" for phase in PPO_PHASES] + [f"{other:.1%}"]
    return [f"{record['step_s']:.2f}", *cells, f"{record['peak_gb']:.1f}"]


def print_ratios(records: list[Record]) -> None:
    """Print our speed over TRL's on the same rows, for each of TRL's lines."""
    speeds = {
        (r["section"], r["shape"]): r["tokens_per_s"]
        for r in records
        if r["section"] in ("sft", "dpo") and "error" not in r
    }
    for record in records:
        if record["section"] == "trl" and "tokens_per_s" in record:
            if ours := speeds.get((record["task"], record["shape"])):
                ratio = ours / record["tokens_per_s"]
                print(f"ours / TRL {record['name']}: {ratio:.2f}x the speed", flush=True)


if __name__ == "__main__":
    flags = tyro.cli(Config, config=(tyro.conf.OmitArgPrefixes,))
    try:
        status = main(flags)
    except ValueError as error:
        sys.exit(f"bench/gpu.py: {error}")
    sys.exit(status)
