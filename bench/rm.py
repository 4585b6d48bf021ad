"""Reward model from pairs, ours against TRL's RewardTrainer: real tokens per second on the same work.

    pip install -r requirements.txt -r bench/requirements.txt
    python bench/rm.py --data pairs.jsonl --model models/smollm2-135m-instruct

Compared are the same rows of {"prompt": [messages], "chosen": [message], "rejected": [message]} in the
same order, 4 pairs a step (BATCH), -log sigmoid of the difference of scores, AdamW without weight decay,
learning rate 1e-5, gradients clipped to norm 1, no recomputation of activations.

    ours   packed, nothing padded, a prompt computed once for both answers
    trl    RewardTrainer with its defaults: 8 texts a step, padded to the longest

Both start from the same files, a *ForSequenceClassification directory with a random head that is written
first, and read the score at the end-of-turn token of the answer.

Processes and clocks: see common.py. A prompt counts with both answers, also for ours; the share of the
matrix-multiply peak counts it once. Both must report the same tokens and, within pairs.TOLERANCE, the same
losses of the first two steps and the same norm of the first gradient: they were timed at the same job.
"""

import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import common
import pairs
import tyro
from common import Measured

HEAD_SEED = 1234
PAD_ID = 0  # no text may end with it: transformers takes the last other token for a text's end


@dataclass(frozen=True)
class Config:
    """Flags of this benchmark."""

    data: Path
    """jsonl file of pairs with variable length, at most 1024 tokens in a prompt with one of its answers."""
    trainers: tuple[Literal["ours", "trl"], ...] = ("ours", "trl")
    """Trainers to measure."""
    run: common.RunConfig = field(default_factory=common.RunConfig)


def main(config: Config) -> None:
    """Measure every trainer in a process of its own, print the table, check that the work was the same."""
    common.prepare(config.run)
    pairs.read(config.data, config.run.steps)  # a mistake in the data shows before minutes are spent
    peak = common.in_child(partial(common.measure_peak, config.run))
    with tempfile.TemporaryDirectory() as start:
        common.in_child(partial(write_start, config.run.model, Path(start)))
        jobs = {
            "ours": partial(run_ours, config, Path(start)),
            "trl": partial(run_trl, config, Path(start)),
        }
        runs = common.measure({name: jobs[name] for name in config.trainers}, config.run.rounds)
    print_results(runs, config.run, peak)
    pairs.check_same_work(runs, config.run.dtype)


def write_start(model: Path, output: Path) -> None:
    """Write the model that both start from: `model` with a head of one label. Runs in a child."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.eos_token_id == PAD_ID:
        raise ValueError(f"--model {model}: token {PAD_ID} ends a turn and pads: the score would be misread")
    torch.manual_seed(HEAD_SEED)
    scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    scorer.config.pad_token_id = PAD_ID
    scorer.save_pretrained(output)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD_ID)
    tokenizer.save_pretrained(output)


def run_ours(config: Config, start: Path) -> Measured:
    """Train with our package. Runs in a child.

    The update is that of train_rm.py with --loss ranking, at a constant learning rate.
    """
    import torch

    from align.data import packing, preferences
    from align.distributed import parallel
    from align.losses import supervised
    from align.losses.statistics import pair_statistics
    from align.model import gpt
    from align.training import batching, engine, optim

    torch.set_num_threads(config.run.threads)
    budget = packing.BatchConfig(pairs.BATCH, micro_batch_tokens=pairs.MICRO_BATCH_TOKENS)
    with parallel.start(parallel.ParallelConfig()):
        data = pairs.load_ours(pairs.read(config.data, config.run.steps), start)
        scored = [tuple(map(preferences.as_scored, pair.examples)) for pair in data]
        scorer = gpt.distributed(common.our_model(start, config.run.dtype, "scorer"))
        optimizer = common.our_optimizer(scorer)

        def loss_fn(batch, values):
            chosen, rejected = values.index_select(0, batch.trained).double().view(-1, 2).unbind(1)
            loss = supervised.ranking(chosen, rejected, torch.zeros_like(chosen)).sum()
            return loss, pair_statistics(chosen, rejected)

        log = [common.clocks()]
        for i in range(0, len(scored), pairs.BATCH):
            batches = batching.micro_batches(scorer, scored[i : i + pairs.BATCH], budget)
            metrics = engine.forward_backward(scorer, batches, loss_fn, pairs.BATCH)
            metrics["grad_norm"] = optim.step(optimizer, common.LEARNING_RATE)
            log.append(metrics | common.clocks())
    return common.measured(log, pairs.our_tokens(data), distinct_tokens=pairs.our_distinct_tokens(data))


def run_trl(config: Config, start: Path) -> Measured:
    """Train with TRL's RewardTrainer, which takes rows of ready token ids. Runs in a child."""
    import datasets
    import torch
    import trl
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(config.run.threads)
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(start)
    rows = [pairs.tokenize(row, tokenizer) for row in pairs.read(config.data, config.run.steps)]
    texts = [{side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")} for row in rows]
    with tempfile.TemporaryDirectory() as scratch:
        settings = common.trl_arguments(config.run, pairs.BATCH, pairs.MAX_SEQ_LEN, scratch)
        trainer = trl.RewardTrainer(
            model=AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32),
            args=trl.RewardConfig(**settings),
            train_dataset=datasets.Dataset.from_list(texts),
            processing_class=tokenizer,
        )
        log = common.record_steps(trainer)
        trainer.train()
    distinct = pairs.trl_distinct_tokens(rows)
    return common.measured(log, common.logged_tokens(log), distinct_tokens=distinct)


def print_results(runs: dict[str, list[Measured]], run: common.RunConfig, peak: float) -> None:
    """Print what was measured, one line per trainer, and our ratio to the other."""
    weights = pairs.weights_per_token(run.model, next(iter(runs.values()))[0])
    flops = 6 * weights  # of a real token: forward 2, backward 4 per weight
    print(f"\n{run.model}, {run.dtype}, {run.threads} thread(s), reward model")
    print(f"{pairs.BATCH * run.steps} pairs after {pairs.BATCH} pairs of warm-up, {run.rounds} round(s)")
    print(f"matrix-multiply peak {peak:.0f} GFLOP/s, which is {peak * 1e9 / flops:.0f} tokens/s\n")
    common.print_table(runs, common.clock_name(run), dict.fromkeys(runs, flops), peak, pairs.FIGURES)


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.OmitArgPrefixes,)))
