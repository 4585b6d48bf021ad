"""Direct preference optimization, ours against TRL's DPOTrainer: real tokens per second on the same work.

    pip install -r requirements.txt -r bench/requirements.txt
    python bench/dpo.py --data pairs.jsonl --model models/smollm2-135m-instruct

Compared are the same rows of {"prompt": [messages], "chosen": [message], "rejected": [message]} in the
same order, 4 pairs a step (BATCH), the DPO loss with beta 0.1, AdamW without weight decay, learning rate
1e-5, gradients clipped to norm 1, no recomputation of activations.

    ours-precompute   packed, a prompt computed once for both answers; reference log-probs of all pairs in
                      one pass before the first step
    ours-swap         the same with reference log-probs in every step, by swapping in the start weights
    trl-live          DPOTrainer with a reference model, by default; 8 texts a step, padded to the longest
    trl-precompute    DPOTrainer(precompute_ref_log_probs=True)

A pass before the first step is not in the speed of the steps; its own time is printed below the table, with
the speed that steps and pass have together, over one epoch. A prompt counts with both answers, also for ours.
The share of the matrix-multiply peak counts what the loss needs: a prompt once, and the output layer for the
answers' tokens only.

Processes and clocks: see common.py. All must report the same tokens, ln 2 as the loss of the first step, and,
within pairs.TOLERANCE, the same norm of the first gradient and the same loss of the second step: they were
timed at the same job.
"""

import math
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import common
import pairs
import tyro
from common import Measured

BETA = 0.1
TRAINERS = ("ours-precompute", "ours-swap", "trl-live", "trl-precompute")


@dataclass(frozen=True)
class Config:
    """Flags of this benchmark."""

    data: Path
    """jsonl file of pairs with variable length, at most 1024 tokens in a prompt with one of its answers."""
    trainers: tuple[Literal[TRAINERS], ...] = TRAINERS
    """Trainers to measure."""
    run: common.RunConfig = field(default_factory=common.RunConfig)


def main(config: Config) -> None:
    """Measure every trainer in a process of its own, print the table, check that the work was the same."""
    common.prepare(config.run)
    pairs.read(config.data, config.run.steps)  # a mistake in the data shows before minutes are spent
    jobs = {
        "ours-precompute": partial(run_ours, config, False),
        "ours-swap": partial(run_ours, config, True),
        "trl-live": partial(run_trl, config, False),
        "trl-precompute": partial(run_trl, config, True),
    }
    peak = common.in_child(partial(common.measure_peak, config.run))
    runs = common.measure({name: jobs[name] for name in config.trainers}, config.run.rounds)
    print_results(runs, config.run, peak)
    check_start(runs)
    pairs.check_same_work(runs, config.run.dtype)


def run_ours(config: Config, swap: bool) -> Measured:
    """Train with our package. Runs in a child.

    The update is that of train_dpo.py with --reference swap or precompute, at a constant learning rate.
    """
    import numpy as np
    import torch

    from align.data import packing
    from align.distributed import parallel
    from align.losses import preference
    from align.losses.statistics import log_ratio_statistics
    from align.model import gpt
    from align.training import batching, engine, optim, reference

    torch.set_num_threads(config.run.threads)
    budget = packing.BatchConfig(pairs.BATCH, micro_batch_tokens=pairs.MICRO_BATCH_TOKENS)
    with parallel.start(parallel.ParallelConfig()), tempfile.TemporaryDirectory() as scratch:
        data = pairs.load_ours(pairs.read(config.data, config.run.steps), config.run.model)
        steps = [range(i, i + pairs.BATCH) for i in range(0, len(data), pairs.BATCH)]
        policy = gpt.distributed(common.our_model(config.run.model, config.run.dtype))
        optimizer = common.our_optimizer(policy)

        def sequence_logprobs(batch, logprobs):
            return preference.sequence_logprobs(logprobs, batch.mask, batch.lengths)

        def micro_batches(name, rows):
            examples = [data[row].examples for row in rows]
            return batching.micro_batches(policy, examples, budget, {"row": np.array(rows)[:, None]})

        def loss_fn(batch, logprobs):
            policy_logprobs = sequence_logprobs(batch, logprobs).view(-1, 2).unbind(1)
            ref_logprobs = batch.extra["ref"].view(-1, 2).unbind(1)
            loss = preference.dpo(*policy_logprobs, *ref_logprobs, BETA).sum()
            return loss, log_ratio_statistics(*policy_logprobs, *ref_logprobs, BETA)

        before = common.clocks()
        if swap:
            ref = reference.Swapped(policy, sequence_logprobs)
        else:
            file = Path(scratch) / "reference.safetensors"
            ref = reference.Precomputed(policy, sequence_logprobs, micro_batches, {"train": steps}, file, "")
        after = common.clocks()
        log = [common.clocks()]
        for rows in steps:
            batches = micro_batches("train", rows)
            ref.attach(batches, "train")
            metrics = engine.forward_backward(policy, batches, loss_fn, len(rows))
            metrics["grad_norm"] = optim.step(optimizer, common.LEARNING_RATE)
            log.append(metrics | common.clocks())
    trained = [packing.num_trained(pair.examples) for pair in data]
    return common.measured(
        log,
        pairs.our_tokens(data),
        distinct_tokens=pairs.our_distinct_tokens(data),
        trained_tokens=common.sums_by_step(trained, pairs.BATCH),
        **({} if swap else common.of_pass(before, after)),
    )


def run_trl(config: Config, precompute: bool) -> Measured:
    """Train with TRL's DPOTrainer. Runs in a child.

    DPOTrainer always tokenises by itself. The subclass hands it ready ids instead, and reads the clocks
    around the reference pass; nothing of the training is changed.
    """
    import datasets
    import torch
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(config.run.threads)
    datasets.disable_progress_bars()

    class Prepared(trl.DPOTrainer):
        clocks_of_pass = [{"cpu": 0.0, "wall": 0.0}] * 2

        def _prepare_dataset(self, dataset, *_):
            return dataset

        def _precompute_ref_logps(self, *args):
            before = common.clocks()
            dataset = super()._precompute_ref_logps(*args)
            self.clocks_of_pass = [before, common.clocks()]
            return dataset

    def load_model():
        return AutoModelForCausalLM.from_pretrained(config.run.model, dtype=torch.float32)

    tokenizer = AutoTokenizer.from_pretrained(config.run.model)
    rows = [pairs.tokenize(row, tokenizer) for row in pairs.read(config.data, config.run.steps)]
    with tempfile.TemporaryDirectory() as scratch:
        settings = common.trl_arguments(config.run, pairs.BATCH, pairs.MAX_SEQ_LEN, scratch)
        trainer = Prepared(
            model=load_model(),
            ref_model=None if precompute else load_model(),
            args=trl.DPOConfig(beta=BETA, precompute_ref_log_probs=precompute, **settings),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        log = common.record_steps(trainer)
        trainer.train()
    trained = [len(row["chosen_ids"] + row["rejected_ids"]) for row in rows]
    return common.measured(
        log,
        common.logged_tokens(log),
        distinct_tokens=pairs.trl_distinct_tokens(rows),
        trained_tokens=common.sums_by_step(trained, pairs.BATCH),
        **common.of_pass(*trainer.clocks_of_pass),
    )


def print_results(runs: dict[str, list[Measured]], run: common.RunConfig, peak: float) -> None:
    """Print what was measured, one line per trainer, our ratios to the others, and the reference passes."""
    weights = pairs.weights_per_token(run.model, next(iter(runs.values()))[0])
    # Of a real token: forward 2 and backward 4 per weight, and 2 of a reference that is in the step.
    flops = {name: (6 if name.endswith("precompute") else 8) * weights for name in runs}
    print(f"\n{run.model}, {run.dtype}, {run.threads} thread(s), DPO with beta {BETA}")
    print(f"{pairs.BATCH * run.steps} pairs after {pairs.BATCH} pairs of warm-up, {run.rounds} round(s)")
    print(
        f"matrix-multiply peak {peak:.0f} GFLOP/s, which is {peak * 1e9 / weights / 6:.0f} tokens/s, ", end=""
    )
    print(f"{peak * 1e9 / weights / 8:.0f} with the reference in the step\n")
    clock = common.clock_name(run)
    common.print_table(runs, clock, flops, peak, pairs.FIGURES)
    for name in [name for name in runs if name.endswith("precompute")]:
        print_pass(name, runs[name], clock)


def print_pass(name: str, runs: list[Measured], clock: Literal["cpu_s", "wall_s"]) -> None:
    """Print what the pass before the first step took, and the speed of pass and steps over one epoch."""
    seconds = sum(getattr(run, f"pass_{clock}") for run in runs)
    speed = sum(sum(run.tokens) for run in runs) / seconds
    steps = common.tokens_per_second(runs, clock)
    print(
        f"{name}: reference pass {seconds / len(runs):.2f} s before the first step, {speed:.1f} tok/s; "
        f"pass and steps {1 / (1 / speed + 1 / steps):.1f} tok/s"
    )


def check_start(runs: dict[str, list[Measured]]) -> None:
    """Raise RuntimeError unless the loss of the first step is ln 2: the policy is still its reference."""
    for name, done in runs.items():
        if abs(done[0].losses[0] - math.log(2)) > 1e-6:
            raise RuntimeError(f"{name} starts at a loss of {done[0].losses[0]}, not ln 2")


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.OmitArgPrefixes,)))
