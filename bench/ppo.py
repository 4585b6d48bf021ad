"""One step of PPO and of GRPO, ours against TRL's trainers: speed, phases and memory on the same work.

    pip install -r requirements.txt -r bench/requirements.txt
    pip install --no-deps --target trl-1.10 trl==1.10.0
    python bench/ppo.py --data prompts.jsonl --trl-ppo trl-1.10

Compared are, with the same rows of {"prompt": [messages]} in the same order:

    grpo   --samples answers, 8 to a prompt (GROUP); the reward is the share of digits among the characters of
           the answer. Ours is train_grpo.py; TRL's is GRPOTrainer.
    ppo    --samples answers, one to a prompt, with critic and reward model: four models of the same size,
           those two from one *ForSequenceClassification directory with a random head that is written first.
           Ours is train_ppo.py; TRL's is PPOTrainer, which 1.10 was the last checked to have
           (trl.experimental.ppo) and which is therefore taken from the directory --trl-ppo.

On both sides an answer has 64 new tokens (NEW), no end-of-turn token ends one; temperature 1, whole
vocabulary; KL coefficient 0.04, so that there is a reference pass (grpo: k3 estimator, in the loss; ppo: k1,
in the rewards); every answer is trained on once, in one update of AdamW without weight decay, learning rate
1e-6, gradients clipped to norm 1 (PPOTrainer never clips); no recomputation of activations. TRL trains
--micro-batch answers at a time, ours packs what fits into MICRO_BATCH_TOKENS.

A real token is one of a prompt with its answer, each sample counted once, however often it is computed;
padding is not work. Both sides must report the same real tokens in every step. Answers are drawn, so losses
are not compared here: tests compare ours with the equations.

Processes and clocks: see common.py. The phases of our table, by the same clock, must add up to the step. Peak
memory is resident memory of the process, from its start to its last step; "at start": of loading the models.
"""

import contextlib
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean as mean
from types import SimpleNamespace
from typing import Any, Literal

import common
import rm
import tyro

GROUP = 8  # answers to a prompt, for grpo
NEW = 64  # tokens of each answer
MAX_PROMPT_LEN = 512
MICRO_BATCH_TOKENS = 2048  # of a forward pass of ours
LEARNING_RATE = 1e-6
KL_COEF = 0.04
GAP = 0.02  # most of a step that its phases may leave out

Name = Literal["grpo", "ppo"]


@dataclass(frozen=True)
class Config:
    """Flags of this benchmark."""

    data: Path
    """jsonl file of prompts in messages; --samples of them for each step, of at most 512 tokens."""
    trainer: Literal["grpo", "ppo", "both"] = "both"
    """Algorithms to measure."""
    sides: tuple[Literal["ours", "trl"], ...] = ("ours", "trl")
    """Sides to measure."""
    trl_ppo: Path | None = None
    """Directory of TRL 1.10: pip install --no-deps --target DIR trl==1.10.0 (for ppo)."""
    samples: int = 32
    """Answers of a step."""
    micro_batch: int = 8
    """Answers that TRL trains at a time."""
    offload: Literal["on", "off"] = "on"
    """Ours: --offload of the script."""
    run: common.RunConfig = field(default_factory=lambda: common.RunConfig(steps=1))

    @property
    def names(self) -> tuple[Name, ...]:
        """The algorithms to measure."""
        return ("grpo", "ppo") if self.trainer == "both" else (self.trainer,)


@dataclass(frozen=True)
class Measured:
    """One run of one trainer. The lists have one entry per step, the warm-up step first."""

    tokens: list[int]
    """Real tokens of each step."""
    cpu_s: list[float]
    """CPU seconds of each step, of all threads of the process."""
    wall_s: list[float]
    """Wall-clock seconds of each step."""
    generate_s: list[float]
    """Seconds of each step in which answers were sampled, by `common.clock_name`'s clock."""
    peak_rss_gb: float
    """Largest resident memory of the process, in 1e9 bytes."""
    start_rss_gb: float
    """Largest resident memory before the first step, in 1e9 bytes."""
    phases: list[dict[str, float]] = field(default_factory=list)
    """Ours: the seconds of each step by phase, by `common.clock_name`'s clock."""
    memory: list[dict[str, float]] = field(default_factory=list)
    """Ours: the peak resident memory of each step by phase, in 1e9 bytes."""


def main(config: Config) -> None:
    """Measure every trainer in a process of its own, print the tables, check that the work was the same."""
    check(config)
    common.prepare(config.run)
    for name in config.names:
        rows_of(config, name)  # a mistake in the data shows before minutes are spent
    with tempfile.TemporaryDirectory() as scorer:
        if "ppo" in config.names:
            common.in_child(partial(rm.write_start, config.run.model, Path(scorer)))
        jobs = {
            f"{side} {name}": partial(JOBS[side, name], config, Path(scorer))
            for name in config.names
            for side in config.sides
        }
        runs = common.measure(jobs, config.run.rounds)
    for name in config.names:
        runs_of_name = {job: done for job, done in runs.items() if job.endswith(name)}
        print_results(config, name, runs_of_name)
        check_same_tokens(runs_of_name)


def check(config: Config) -> None:
    """Raise ValueError for flags that do not fit each other."""
    if min(config.samples, config.micro_batch) < 1 or config.samples % config.micro_batch:
        raise ValueError(
            f"--samples {config.samples} is not a multiple of --micro-batch {config.micro_batch}"
        )
    if "grpo" in config.names and config.samples % GROUP:
        raise ValueError(f"--samples {config.samples} is not a multiple of {GROUP}, the answers to a prompt")
    if "ppo" in config.names and "trl" in config.sides:
        folder = config.trl_ppo
        if folder is None or not (folder / "trl" / "experimental" / "ppo").is_dir():
            raise ValueError(
                f"--trl-ppo {folder} holds no trl/experimental/ppo: "
                "pip install --no-deps --target DIR trl==1.10.0, or take --trainer grpo"
            )


def group_size(name: Name) -> int:
    """Return the answers to each prompt."""
    return GROUP if name == "grpo" else 1


def rows_of(config: Config, name: Name) -> list[dict[str, list[dict]]]:
    """Return the prompts of all steps, the warm-up step's first."""
    rows = common.read_rows(config.data, ("prompt",), config.samples // group_size(name), config.run.steps)
    return [{"prompt": row["prompt"]} for row in rows]


def digit_share(prompt: str, response: str, row: dict) -> float:
    """The reward of grpo, as --reward-fn calls it: the share of digits among the answer's characters."""
    return sum(letter.isdigit() for letter in response) / max(1, len(response))


def run_trl_grpo(config: Config, scorer: Path) -> Measured:
    """Train with TRL's GRPOTrainer; `scorer` is not used. Runs in a child."""
    import datasets
    import torch
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def reward(completions: list[list[dict]], **columns: list) -> list[float]:
        return [digit_share("", messages[0]["content"], {}) for messages in completions]

    torch.set_num_threads(config.run.threads)
    with tempfile.TemporaryDirectory() as scratch:
        settings = trl.GRPOConfig(
            **trl_arguments(config, scratch),
            max_steps=config.run.steps + 1,
            num_generations=GROUP,
            max_completion_length=NEW,
            generation_kwargs={"min_new_tokens": NEW},  # no end-of-turn token before
            beta=KL_COEF,
            shuffle_dataset=False,
        )
        model = AutoModelForCausalLM.from_pretrained(config.run.model, dtype=torch.float32)
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=settings,
            train_dataset=datasets.Dataset.from_list(rows_of(config, "grpo")),
            processing_class=AutoTokenizer.from_pretrained(config.run.model),
        )
        log = record_steps(trainer, model)
        trainer.train()
    return measured_trl(config, log)


def run_trl_ppo(config: Config, scorer: Path) -> Measured:
    """Train with the PPOTrainer of --trl-ppo, reward model and critic from `scorer`. Runs in a child."""
    sys.path.insert(0, str(config.trl_ppo))
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    def load(kind: Any, folder: Path) -> Any:
        return kind.from_pretrained(folder, dtype=torch.float32)

    torch.set_num_threads(config.run.threads)
    tokenizer = AutoTokenizer.from_pretrained(config.run.model, padding_side="left")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(rm.PAD_ID)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        settings = PPOConfig(
            **trl_arguments(config, scratch),
            total_episodes=config.samples * (config.run.steps + 1),
            num_ppo_epochs=1,
            num_mini_batches=1,
            local_rollout_forward_batch_size=config.samples,
            response_length=NEW,
            temperature=1.0,
            kl_coef=KL_COEF,
            num_sample_generations=0,
        )
        policy = load(AutoModelForCausalLM, config.run.model)
        trainer = PPOTrainer(
            args=settings,
            processing_class=tokenizer,
            model=policy,
            ref_model=load(AutoModelForCausalLM, config.run.model),
            reward_model=load(AutoModelForSequenceClassification, scorer),
            value_model=load(AutoModelForSequenceClassification, scorer),
            train_dataset=(data := prompt_ids(rows_of(config, "ppo"), tokenizer)),
        )
        order = torch.utils.data.DataLoader(data, config.samples, collate_fn=trainer.data_collator)
        trainer.dataloader = trainer.accelerator.prepare(order)  # its own shuffles
        log = record_steps(trainer, policy)
        trainer.train()
    return measured_trl(config, log)


def trl_arguments(config: Config, output: str) -> dict[str, Any]:
    """Return the settings that both TRL trainers share."""
    settings = common.trl_arguments(config.run, config.micro_batch, 0, output)
    del settings["max_length"]  # not one of these trainers
    steps = config.samples // config.micro_batch
    return settings | {"learning_rate": LEARNING_RATE, "gradient_accumulation_steps": steps}


def prompt_ids(rows: list[dict], tokenizer: Any) -> Any:
    """Return a data set of the prompts' token ids, with the header of the answer."""
    import datasets

    template = partial(tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=False)
    tokenized = [{"input_ids": template(row["prompt"])} for row in rows]
    if any(rm.PAD_ID in row["input_ids"] for row in tokenized):
        raise ValueError(f"--data has a prompt with token {rm.PAD_ID}, which pads: leave it out")
    return datasets.Dataset.from_list(tokenized)


def record_steps(trainer: Any, policy: Any) -> list[dict[str, float]]:
    """Make a TRL trainer log into the returned list, which training fills.

    Entry 0 is the start; after it comes one entry per step. An entry has `cpu` and `wall` (seconds), `peak`
    (resident memory so far, in 1e9 bytes), and what `count_generate` sums up since the start.
    """
    from transformers import PrinterCallback, TrainerCallback

    log, sums = [], count_generate(policy)

    def entry() -> dict[str, float]:
        return common.clocks() | sums | {"peak": common.peak_rss_gb()}

    class Recorder(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            log.append(entry())

        def on_step_end(self, args, state, control, **kwargs):
            log.append(entry())

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Recorder())
    return log


def count_generate(policy: Any) -> dict[str, float]:
    """Have every call of `policy.generate` add to the returned sums.

    They are `generate_cpu` and `generate_wall` (seconds), `tokens` (real ones, prompts and answers) and
    `samples`. RuntimeError in a call whose answers do not have NEW tokens.
    """
    sums = {"generate_cpu": 0.0, "generate_wall": 0.0, "tokens": 0, "samples": 0}
    generate = policy.generate

    def counted(input_ids: Any, attention_mask: Any, **kwargs: Any) -> Any:
        before = common.clocks()
        output = generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        for name, after in common.clocks().items():
            sums[f"generate_{name}"] += after - before[name]
        new = getattr(output, "sequences", output).shape[1] - input_ids.shape[1]
        if new != NEW:
            raise RuntimeError(f"TRL sampled {new} tokens, not {NEW}")
        sums["tokens"] += int(attention_mask.sum()) + new * len(input_ids)
        sums["samples"] += len(input_ids)
        return output

    policy.generate = counted
    return sums


def measured_trl(config: Config, log: list[dict[str, float]]) -> Measured:
    """Return the result of a TRL trainer from a log of `record_steps`."""
    steps = {name: common.differences([entry[name] for entry in log]) for name in log[0]}
    if steps["samples"] != [config.samples] * (config.run.steps + 1):
        raise RuntimeError(f"TRL sampled {steps['samples']} answers by step, not {config.samples} in each")
    return Measured(
        tokens=steps["tokens"],
        cpu_s=steps["cpu"],
        wall_s=steps["wall"],
        generate_s=steps[f"generate_{common.clock_name(config.run).removesuffix('_s')}"],
        peak_rss_gb=log[-1]["peak"],
        start_rss_gb=log[0]["peak"],
    )


def run_ours(name: Name, config: Config, scorer: Path) -> Measured:
    """Train by train_ppo.py or train_grpo.py, reward model and critic from `scorer`. Runs in a child."""
    import torch

    from align.distributed import parallel

    torch.set_num_threads(config.run.threads)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        data, output = Path(scratch) / "prompts.jsonl", Path(scratch) / "run"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(config, name)))
        arguments = our_flags(config, name, scorer) + ["--train-data", str(data), "--output", str(output)]
        script = importlib.import_module(f"train_{name}")
        flags = tyro.cli(script.Config, args=arguments, config=(tyro.conf.OmitArgPrefixes,))
        log = watch_ours(config)
        with parallel.start(flags.parallel):
            script.main(flags)
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return measured_ours(config, log, rows)


def our_flags(config: Config, name: Name, scorer: Path) -> list[str]:
    """Return the flags of the script that the comparison needs, but for data and output."""
    flags = {
        "model": config.run.model,
        "precision": config.run.dtype,
        "prompts-per-step": config.samples // group_size(name),
        "samples-per-prompt": group_size(name),
        "global-batch-size": config.samples,
        "micro-batch-tokens": MICRO_BATCH_TOKENS,
        "max-prompt-len": MAX_PROMPT_LEN,
        "max-new-tokens": NEW,
        "truncated": "keep",
        "kl-coef": KL_COEF,
        "offload": config.offload,
        "max-steps": config.run.steps + 1,
        "lr": LEARNING_RATE,
        "min-lr": LEARNING_RATE,
        "warmup-steps": 0,
        "weight-decay": 0,
        "clip-grad": common.CLIP_GRAD,
        "save-interval": 0,
    }
    if name == "grpo":
        flags |= {"reward-fn": "ppo:digit_share", "kl": "k3", "kl-in": "loss"}
    else:
        flags |= {"reward-model": scorer, "critic-lr": LEARNING_RATE, "critic-min-lr": LEARNING_RATE}
    return [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]


def watch_ours(config: Config) -> list[dict[str, float]]:
    """Patch our package for the comparison, in this process, and log its steps.

    No token ends an answer, prompts are in the order of the file, and with one thread the phases of a step
    are timed in CPU seconds. Returns the log: entry 0 is the start, after it comes one entry per step, with
    `cpu` and `wall` (seconds) and `peak` (resident memory so far, in 1e9 bytes).
    """
    import numpy as np

    from align.data import packing
    from align.tracking import metrics
    from align.tracking.run import Run
    from align.training import phases, session

    load, resume_at, write = session.load_tokenizer, Run.resume_at, Run.log
    start_peak, peaks, log = phases.start_peak, [], []

    def without_stops(*args: Any) -> Any:
        tokenizer = load(*args)
        tokenizer.stop_ids = set()
        return tokenizer

    def note_peak() -> bool:  # a phase counts its peak anew, and the process's own peak with it
        peaks.append(common.peak_rss_gb())
        return start_peak()

    def read_clocks(method: Callable) -> Callable:
        def wrapped(run: Run, *args: Any) -> None:
            log.append(common.clocks() | {"peak": max([*peaks, common.peak_rss_gb()])})
            method(run, *args)

        return wrapped

    session.load_tokenizer, phases.start_peak = without_stops, note_peak
    packing.epoch_order = lambda num_rows, seed, epoch: np.arange(num_rows)
    Run.resume_at, Run.log = read_clocks(resume_at), read_clocks(write)
    if common.clock_name(config.run) == "cpu_s":
        metrics.time = SimpleNamespace(**vars(time) | {"perf_counter": time.process_time})
    return log


def measured_ours(config: Config, log: list[dict[str, float]], rows: list[dict[str, float]]) -> Measured:
    """Return the result of ours from a log of `watch_ours` and the rows of metrics.jsonl.

    Raises:
        RuntimeError: the phases of a measured step do not add up to its time by the clocks, but for GAP.
    """
    times = {name: common.differences([entry[name] for entry in log]) for name in ("cpu", "wall")}
    steps = times[common.clock_name(config.run).removesuffix("_s")]
    phases = [seconds_by_phase(row) for row in rows]
    for seconds, phase in zip(steps[1:], phases[1:], strict=True):
        total = sum(phase.values())
        if abs(total / seconds - 1) > GAP:
            raise RuntimeError(f"a step took {seconds:.2f} s, its phases {total:.2f} s: {phase}")
    memory = [
        {name.removeprefix("memory/"): gb for name, gb in row.items() if name.startswith("memory/")}
        for row in rows
    ]
    lengths = [row["train_rollouts/prompt_lengths"] + row["train_rollouts/response_lengths"] for row in rows]
    return Measured(
        tokens=[round(length * config.samples) for length in lengths],
        cpu_s=times["cpu"],
        wall_s=times["wall"],
        generate_s=[phase["generate"] for phase in phases],
        peak_rss_gb=log[-1]["peak"],
        start_rss_gb=log[0]["peak"],
        phases=phases,
        memory=memory,
    )


def seconds_by_phase(row: dict[str, float]) -> dict[str, float]:
    """Return the seconds of a step's phases from its row of metrics.jsonl, where they are shares."""
    shares = {name.removeprefix("time/"): share for name, share in row.items() if name.startswith("time/")}
    seconds = shares.pop("step")
    return {name: share * seconds for name, share in shares.items() if not name.endswith("_per_s")}


JOBS: dict[tuple[str, Name], Callable[[Config, Path], Measured]] = {
    ("ours", "grpo"): partial(run_ours, "grpo"),
    ("ours", "ppo"): partial(run_ours, "ppo"),
    ("trl", "grpo"): run_trl_grpo,
    ("trl", "ppo"): run_trl_ppo,
}


def print_results(config: Config, name: Name, runs: dict[str, list[Measured]]) -> None:
    """Print what was measured of one algorithm: a line per side, the ratio, the phases of ours."""
    run = config.run
    prompts, group = config.samples // group_size(name), group_size(name)
    print(
        f"\n{name}: {run.model}, {run.dtype}, {run.threads} thread(s)\n"
        f"{run.steps} step(s) after one of warm-up, {run.rounds} round(s); {prompts} prompts x {group} "
        f"answers of {NEW} tokens; ours with --offload {config.offload}, TRL trains {config.micro_batch} "
        "answers at a time\n"
    )
    clock = common.clock_name(run)
    print_table(config, runs, clock)
    if len(runs) == 2:
        ours, trl = runs[f"ours {name}"], runs[f"trl {name}"]
        speed = common.tokens_per_second(ours, clock) / common.tokens_per_second(trl, clock)
        print(f"ours / TRL: {speed:.2f}x the speed, {peak_gb(ours) / peak_gb(trl):.2f}x the peak memory")
    for job in [job for job in runs if job.startswith("ours")]:
        print_means("seconds", [step for done in runs[job] for step in done.phases[1:]], shares=True)
        print_means("peak GB", [step for done in runs[job] for step in done.memory[1:]], shares=False)


def print_table(config: Config, runs: dict[str, list[Measured]], clock: Literal["cpu_s", "wall_s"]) -> None:
    """Print speeds, seconds of a step, and peak memory, one line per trainer."""
    columns = ("samples/s", "tok/s CPU", "tok/s wall", "step s", "generate s", "rest s")
    columns += ("peak RSS GB", "at start GB")
    print(f"{'trainer':<12}" + "".join(f"{column:>12}" for column in columns))
    for job, done in runs.items():
        step = mean([s for run in done for s in getattr(run, clock)[1:]])
        generate = mean([s for run in done for s in run.generate_s[1:]])
        speeds = [common.tokens_per_second(done, name) for name in ("cpu_s", "wall_s")]
        print(
            f"{job:<12}{config.samples / step:>12.3f}{speeds[0]:>12.1f}{speeds[1]:>12.1f}"
            f"{step:>12.2f}{generate:>12.2f}{step - generate:>12.2f}{peak_gb(done):>12.2f}"
            f"{max(run.start_rss_gb for run in done):>12.2f}"
        )


def print_means(title: str, steps: list[dict[str, float]], shares: bool) -> None:
    """Print the mean of each phase over some steps, largest first; with `shares` also its part of the sum."""
    names = dict.fromkeys(name for step in steps for name in step)
    means = {name: mean([step.get(name, 0.0) for step in steps]) for name in names}
    total = sum(means.values())
    print(f"\n{'phase of ours':<24}{title:>12}" + f"{'share':>8}" * shares)
    for name, value in sorted(means.items(), key=lambda item: -item[1]):
        print(f"{name:<24}{value:>12.2f}" + f"{value / total:>8.1%}" * shares)
    if shares:
        print(f"{'sum':<24}{total:>12.2f}{sum(value / total for value in means.values()):>8.1%}")


def peak_gb(runs: list[Measured]) -> float:
    """Return the largest resident memory of some runs, in 1e9 bytes."""
    return max(run.peak_rss_gb for run in runs)


def check_same_tokens(runs: dict[str, list[Measured]]) -> None:
    """Raise RuntimeError unless all runs had the same real tokens in every step."""
    counts = {job: [run.tokens for run in done] for job, done in runs.items()}
    if len({tuple(tokens) for done in counts.values() for tokens in done}) > 1:
        raise RuntimeError(f"not the same work: real tokens by step: {counts}")


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.OmitArgPrefixes,)))
