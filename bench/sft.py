"""Supervised fine-tuning, ours against TRL's SFTTrainer: real tokens per second on the same work.

    pip install -r requirements.txt -r bench/requirements.txt
    python bench/sft.py --data rows.jsonl --model models/smollm2-135m-instruct --dtype fp32

What is compared: the same rows of {"messages": [...]} in the same order, 8 rows a step (BATCH), AdamW without
weight decay, learning rate 1e-5, gradients clipped to norm 1, no recomputation of activations.

    ours         rows end to end, nothing padded; bf16 means bf16 weights with fp32 main weights
    trl-padded   SFTTrainer as it comes: 8 rows a step, padded to the longest; bf16 means autocast (bf16=True)
    trl-packed   SFTTrainer(packing=True), best fit decreasing into rows of 1024 tokens (PACK), one a step

Each is measured in a fresh process with the same thread count, in turn, `rounds` times over. A real token is
a token of a row, including the prompt; padding is not work. The first step of each run is dropped. Ours and
trl-padded must report the same tokens and, within TOLERANCE, the same loss of the first step, which proves
that both were timed at the same job. With one thread the clock is the process's own CPU seconds, which repeat
within a few per cent whatever else the machine does; the wall clock, printed beside it, does not.
"""

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import tyro

# torch, trl and our package are imported inside the functions that run in a child: the parent must stay small
# (a child's peak memory starts at its parent's), and no trainer may pay for the libraries of another one.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BATCH = 8
PACK = 1024
MICRO_BATCH_TOKENS = PACK  # as many tokens in a forward pass as trl-packed has
LEARNING_RATE = 1e-5
CLIP_GRAD = 1.0
IGNORED = -100  # label of a token that is not trained, in TRL and transformers
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}  # relative, between the first losses of ours and trl-padded


@dataclass(frozen=True)
class Config:
    """Flags of this benchmark."""

    data: Path
    """jsonl file of {"messages": [...]} rows with variable length, at most 1024 tokens each."""

    model: Path = Path("models/smollm2-135m-instruct")
    """Hugging Face directory of the model to train."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """What the matrix multiplications run in; weights and Adam states are kept in fp32 either way."""

    threads: int = 1
    """CPU threads of every child process."""

    steps: int = 4
    """Measured steps of 8 rows; one more is run first and dropped."""

    rounds: int = 1
    """How often each trainer is measured, in turn."""

    loss_on: Literal["answer", "all"] = "answer"
    """Train on the assistants' answers with their end of turn, or on every token."""

    trainers: tuple[Literal["ours", "trl-padded", "trl-packed"], ...] = ("ours", "trl-padded", "trl-packed")
    """Which to measure."""


@dataclass(frozen=True)
class Measured:
    """One run of one trainer. The lists have one entry per step, the warm-up step first."""

    tokens: list[int]
    """Real tokens of each step: the summed lengths of its rows (prompt and answer, no padding)."""

    cpu_s: list[float]
    """CPU seconds of each step, of all threads of the process; data loading and the optimizer included."""

    wall_s: list[float]
    """Wall-clock seconds of each step."""

    trained_tokens: int
    """Tokens of the first BATCH rows that carry loss."""

    loss: float
    """Loss of the first step, before any update: mean over its trained tokens, in nats."""

    grad_norm: float
    """Norm of the first step's gradient before clipping."""

    peak_rss_gb: float
    """Largest resident memory of the process, in 1e9 bytes."""


def main(config: Config) -> None:
    """Measure every trainer in a process of its own, print the table, check that the work was the same."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(config.threads)
    quiet = {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    os.environ.update(quiet, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    jobs = {
        "ours": partial(run_ours, config),
        "trl-padded": partial(run_trl, config, False),
        "trl-packed": partial(run_trl, config, True),
    }
    if not (config.model / "config.json").exists():
        raise ValueError(f"--model {config.model} holds no config.json: make it with `make smollm2`")
    read_rows(config)  # a mistake in the data shows before minutes are spent
    peak = in_child(partial(measure_peak, config))
    runs: dict[str, list[Measured]] = {name: [] for name in config.trainers}
    for _ in range(config.rounds):
        for name in config.trainers:
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            runs[name].append(in_child(jobs[name]))
    print_table(runs, config, peak)
    if "ours" in runs and "trl-padded" in runs:
        check_same_work(runs["ours"][0], runs["trl-padded"][0], TOLERANCE[config.dtype])


def in_child(job: Callable):
    """Run `job` in a fresh process and return its result. An exception in the child is raised here."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(job).result()


def read_rows(config: Config) -> list[list[dict]]:
    """Return the conversations of all steps, the warm-up step's first.

    Raises:
        ValueError: a line that is not JSON or has no "messages", or fewer rows than the steps need.
    """
    needed = BATCH * (config.steps + 1)
    rows = []
    with config.data.open() as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{config.data}:{number}: not JSON: {error}") from error
            if "messages" not in row:
                raise ValueError(f'{config.data}:{number}: no field "messages"')
            rows.append(row["messages"])
            if len(rows) == needed:
                return rows
    raise ValueError(
        f"--data {config.data} has {len(rows)} rows: --steps {config.steps} and a warm-up step need {needed}"
    )


def measure_peak(config: Config) -> float:
    """Return the machine's matrix-multiply ceiling in GFLOP/s. Runs in a child."""
    from peak import gemm_peak

    return gemm_peak(config.dtype, config.threads)


def run_ours(config: Config) -> Measured:
    """Train with our package. Runs in a child.

    The same job as trl-padded: step i trains the BATCH rows from i * BATCH on; AdamW with betas 0.9 and
    0.999, eps 1e-8 and no weight decay, constant LEARNING_RATE, CLIP_GRAD. `clocks` is read before the first
    step and after each; `differences` and `peak_rss_gb` fill the result.
    """
    import tempfile

    import torch

    from align import data, engine, huggingface, losses, model, optim, packing, parallel, tokenizer

    torch.set_num_threads(config.threads)
    settings = model.ModelConfig(model=str(config.model), precision=config.dtype)
    adam = optim.OptimConfig(lr=LEARNING_RATE, weight_decay=0.0, adam_beta2=0.999, clip_grad=CLIP_GRAD)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file, parallel.start(parallel.ParallelConfig()):
        file.writelines(json.dumps({"messages": messages}) + "\n" for messages in read_rows(config))
        file.flush()
        text = tokenizer.load(config.model)
        rows, _ = data.load_sft([Path(file.name)], text, data.FormatConfig(loss_on=config.loss_on))
        arch = huggingface.read_config(config.model)
        policy = model.build_policy(arch, settings, parallel.ParallelConfig())
        huggingface.load(policy, huggingface.open_source(config.model, arch, 0))
        policy = model.distributed(policy)
        optimizer = optim.build(policy, adam)

        def loss_fn(batch, logprobs):
            return losses.sft_loss(logprobs, batch.mask), {}

        steps = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        log, found = [clocks()], []
        for examples in steps:
            plan = packing.plan([row.num_inputs for row in examples], 1, MICRO_BATCH_TOKENS, None)[0]
            batches = [packing.collate([examples[i] for i in micro]) for micro in plan]
            metrics = engine.forward_backward(policy, batches, loss_fn, packing.num_trained(examples))
            found.append((metrics["loss"], optim.step(optimizer, LEARNING_RATE)))
            log.append(clocks())
    return Measured(
        tokens=[sum(len(row.ids) for row in examples) for examples in steps],
        cpu_s=differences([entry["cpu"] for entry in log]),
        wall_s=differences([entry["wall"] for entry in log]),
        trained_tokens=packing.num_trained(steps[0]),
        loss=found[0][0],
        grad_norm=found[0][1],
        peak_rss_gb=peak_rss_gb(),
    )


def run_trl(config: Config, packing: bool) -> Measured:
    """Train with TRL's SFTTrainer, padded or packed. Runs in a child."""
    import datasets
    import torch
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(config.threads)
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    rows = [tokenize(messages, tokenizer, config.loss_on) for messages in read_rows(config)]
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trl.SFTTrainer(
            model=model,
            args=trl_config(config, packing, scratch),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        log = record_steps(trainer)
        trainer.train()
    return Measured(
        tokens=differences([0, *(entry["num_tokens"] for entry in log[1:])]),
        cpu_s=differences([entry["cpu"] for entry in log]),
        wall_s=differences([entry["wall"] for entry in log]),
        trained_tokens=sum(label != IGNORED for row in rows[:BATCH] for label in row["labels"][1:]),
        loss=log[1]["loss"],
        grad_norm=log[1]["grad_norm"],
        peak_rss_gb=peak_rss_gb(),
    )


def tokenize(messages: list[dict], tokenizer, loss_on: str) -> dict[str, list[int]]:
    """Return a conversation's `input_ids` and `labels`, which TRL takes as they are.

    TRL's own preparation (prompt and completion rows, completion_only_loss) also trains what the template
    puts behind the end of the turn, a newline in ChatML. We stop at the end of the turn. The labels are made
    here so that both losses are means over the same tokens; preparation is not timed on either side.
    """
    tokens = tokenizer.apply_chat_template(messages, return_dict=False)
    if len(tokens) > PACK:
        raise ValueError(
            f"a row of --data has {len(tokens)} tokens; TRL would cut it at {PACK}: leave it out"
        )
    if loss_on == "all":
        return {"input_ids": tokens, "labels": tokens}
    labels = [IGNORED] * len(tokens)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(
                messages[:turn], add_generation_prompt=True, return_dict=False
            )
            end = tokens.index(tokenizer.eos_token_id, len(prompt)) + 1
            labels[len(prompt) : end] = tokens[len(prompt) : end]
    return {"input_ids": tokens, "labels": labels}


def trl_config(config: Config, packing: bool, output: str):
    """Return TRL's settings: its defaults, except for what makes the runs comparable."""
    import trl

    return trl.SFTConfig(
        output_dir=output,
        per_device_train_batch_size=1 if packing else BATCH,
        packing=packing,
        max_length=PACK,
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


def record_steps(trainer) -> list[dict[str, float]]:
    """Make `trainer` log its steps into the returned list, which training fills.

    Entry 0 is the start; after it comes one entry per step: `cpu` and `wall` (seconds, at the step's end),
    `num_tokens` (real tokens since the start), `loss`, `grad_norm`.
    """
    from transformers import PrinterCallback, TrainerCallback

    log = []

    class Recorder(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            log.append(clocks())

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:  # not the summary at the end
                log.append({**clocks(), **logs})

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Recorder)
    return log


def clocks() -> dict[str, float]:
    """Return both clocks in seconds; only differences mean anything."""
    return {"cpu": time.process_time(), "wall": time.perf_counter()}


def differences(values: list[float]) -> list[float]:
    """Return what each value adds to the one before: one entry fewer."""
    return [after - before for before, after in zip(values, values[1:], strict=False)]


def peak_rss_gb() -> float:
    """Return the largest resident memory of this process so far, in 1e9 bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def matmul_parameters(model: Path) -> int:
    """Count the weights that a token is multiplied with: all matrices of the model, the head among them.

    The embedding is a look-up and does not count, unless it is tied to the head. Reads file headers only.
    """
    matrices = {}
    for file in model.glob("*.safetensors"):
        with file.open("rb") as content:
            header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
        header.pop("__metadata__", None)
        matrices |= {name: math.prod(t["shape"]) for name, t in header.items() if len(t["shape"]) == 2}
    if "lm_head.weight" in matrices:
        matrices.pop("model.embed_tokens.weight")
    return sum(matrices.values())


def tokens_per_second(runs: list[Measured], clock: Literal["cpu_s", "wall_s"]) -> float:
    """Return real tokens per second over all runs, their warm-up steps left out."""
    tokens = sum(sum(run.tokens[1:]) for run in runs)
    return tokens / sum(sum(getattr(run, clock)[1:]) for run in runs)


def print_table(runs: dict[str, list[Measured]], config: Config, peak: float) -> None:
    """Print one line per trainer and our ratios to the others."""
    clock = "cpu_s" if config.threads == 1 else "wall_s"
    flops = 6 * matmul_parameters(config.model)  # of a trained token: forward 2, backward 4 per weight
    print(f"\n{config.model}, {config.dtype}, {config.threads} thread(s), loss on {config.loss_on}")
    print(f"{BATCH * config.steps} rows after {BATCH} rows of warm-up, {config.rounds} round(s)")
    print(f"matrix-multiply peak {peak:.0f} GFLOP/s, which is {peak * 1e9 / flops:.0f} tokens/s\n")
    columns = ("tok/s CPU", "tok/s wall", "step s", "peak RSS GB", "of peak", "first loss", "grad norm")
    print(f"{'trainer':<12}" + "".join(f"{name:>12}" for name in columns))
    for name, done in runs.items():
        first, steps = done[0], [s for run in done for s in getattr(run, clock)[1:]]
        speed = tokens_per_second(done, clock)
        print(
            f"{name:<12}{tokens_per_second(done, 'cpu_s'):>12.1f}{tokens_per_second(done, 'wall_s'):>12.1f}"
            f"{sum(steps) / len(steps):>12.2f}{max(run.peak_rss_gb for run in done):>12.2f}"
            f"{speed * flops / peak / 1e9:>12.0%}{first.loss:>12.5f}{first.grad_norm:>12.4f}"
        )
    if "ours" in runs:
        ours = tokens_per_second(runs["ours"], clock)
        for name in [name for name in runs if name != "ours"]:
            print(f"ours / {name}: {ours / tokens_per_second(runs[name], clock):.2f}x")


def check_same_work(ours: Measured, trl: Measured, tolerance: float) -> None:
    """Raise RuntimeError unless both trained the same tokens and met the same loss in the first step."""
    if (ours.tokens, ours.trained_tokens) != (trl.tokens, trl.trained_tokens):
        raise RuntimeError(
            f"not the same work: tokens by step {ours.tokens} and {trl.tokens}, "
            f"trained in the first {BATCH} rows {ours.trained_tokens} and {trl.trained_tokens}"
        )
    if abs(ours.loss - trl.loss) > tolerance * trl.loss:
        raise RuntimeError(
            f"not the same work: losses of the first step {ours.loss} and {trl.loss}, tolerance {tolerance}"
        )


if __name__ == "__main__":
    main(tyro.cli(Config))
