"""Supervised fine-tuning, ours against TRL's SFTTrainer: real tokens per second on the same work.

    pip install -r requirements.txt -r bench/requirements.txt
    python bench/sft.py --data rows.jsonl --model models/smollm2-135m-instruct --dtype fp32

Compared are the same rows of {"messages": [...]} in the same order, 8 rows a step (BATCH), AdamW without
weight decay, learning rate 1e-5, gradients clipped to norm 1, no recomputation of activations.

    ours         rows end to end, nothing padded; bf16 means bf16 weights with fp32 main weights
    trl-padded   SFTTrainer's defaults: 8 rows a step, padded to the longest; bf16 means autocast (bf16=True)
    trl-packed   SFTTrainer(packing=True), best fit decreasing into rows of 1024 tokens (PACK), one a step

Processes and clocks: see common.py. Ours and trl-padded must report the same tokens and, within TOLERANCE,
the same loss of the first step: they were timed at the same job.
"""

import json
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import common
import tyro
from common import Measured

BATCH = 8
PACK = 1024
MICRO_BATCH_TOKENS = PACK  # as many tokens in a forward pass as trl-packed has
IGNORED = -100  # label of a token that is not trained, in TRL and transformers
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}  # relative, between the first losses of ours and trl-padded


@dataclass(frozen=True)
class Config:
    """Flags of this benchmark."""

    data: Path
    """jsonl file of {"messages": [...]} rows with variable length, at most 1024 tokens each."""
    loss_on: Literal["answer", "all"] = "answer"
    """Train on the assistants' answers with their end of turn, or on every token."""
    trainers: tuple[Literal["ours", "trl-padded", "trl-packed"], ...] = ("ours", "trl-padded", "trl-packed")
    """Trainers to measure."""
    run: common.RunConfig = field(default_factory=common.RunConfig)


def main(config: Config) -> None:
    """Measure every trainer in a process of its own, print the table, check that the work was the same."""
    common.prepare(config.run)
    read_rows(config)  # a mistake in the data shows before minutes are spent
    jobs = {
        "ours": partial(run_ours, config),
        "trl-padded": partial(run_trl, config, False),
        "trl-packed": partial(run_trl, config, True),
    }
    peak = common.in_child(partial(common.measure_peak, config.run))
    runs = common.measure({name: jobs[name] for name in config.trainers}, config.run.rounds)
    print_results(runs, config, peak)
    if "ours" in runs and "trl-padded" in runs:
        check_same_work(runs["ours"][0], runs["trl-padded"][0], TOLERANCE[config.run.dtype])


def read_rows(config: Config) -> list[list[dict]]:
    """Return the conversations of all steps, the warm-up step's first."""
    return [row["messages"] for row in common.read_rows(config.data, ("messages",), BATCH, config.run.steps)]


def run_ours(config: Config) -> Measured:
    """Train with our package. Runs in a child.

    The same job as trl-padded: step i trains the BATCH rows from i * BATCH on, at a constant learning rate.
    """
    import torch

    from align.data import formats, packing, sft, tokenizer
    from align.data.tokenizer import load_tokenizer
    from align.distributed import parallel
    from align.losses import supervised
    from align.model import gpt
    from align.training import engine, optim

    torch.set_num_threads(config.run.threads)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file, parallel.start(parallel.ParallelConfig()):
        file.writelines(json.dumps({"messages": messages}) + "\n" for messages in read_rows(config))
        file.flush()
        tokenizer = load_tokenizer(config.run.model)
        rows, _ = sft.load_sft([Path(file.name)], tokenizer, formats.FormatConfig(loss_on=config.loss_on))
        policy = gpt.distributed(common.our_model(config.run.model, config.run.dtype))
        optimizer = common.our_optimizer(policy)

        def loss_fn(batch, logprobs):
            return supervised.sft_loss(logprobs, batch.mask), {}

        steps = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        log = [common.clocks()]
        for examples in steps:
            plan = packing.plan_micro_batches(
                [row.num_inputs for row in examples], 1, MICRO_BATCH_TOKENS, None
            )[0]
            batches = [packing.collate([[examples[i]] for i in micro]) for micro in plan]
            metrics = engine.forward_backward(policy, batches, loss_fn, packing.num_trained(examples))
            metrics["grad_norm"] = optim.step(optimizer, common.LEARNING_RATE)
            log.append(metrics | common.clocks())
    tokens = [sum(len(row.ids) for row in examples) for examples in steps]
    return common.measured(log, tokens, trained_tokens=list(map(packing.num_trained, steps)))


def run_trl(config: Config, packing: bool) -> Measured:
    """Train with TRL's SFTTrainer, padded or packed. Runs in a child."""
    import datasets
    import torch
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(config.run.threads)
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(config.run.model)
    rows = [tokenize(messages, tokenizer, config.loss_on) for messages in read_rows(config)]
    model = AutoModelForCausalLM.from_pretrained(config.run.model, dtype=torch.float32)
    batch = 1 if packing else BATCH
    with tempfile.TemporaryDirectory() as scratch:
        settings = common.trl_arguments(config.run, batch, PACK, scratch)
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(packing=packing, **settings),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        log = common.record_steps(trainer)
        trainer.train()
    trained = [sum(label != IGNORED for label in row["labels"][1:]) for row in rows]
    return common.measured(log, common.logged_tokens(log), trained_tokens=common.sums_by_step(trained, BATCH))


def tokenize(messages: list[dict], tokenizer, loss_on: str) -> dict[str, list[int]]:
    """Return a conversation's `input_ids` and `labels`, which TRL takes as they are.

    TRL's own preparation (prompt and completion rows, completion_only_loss) also trains what the template
    puts behind the end of the turn, a newline in ChatML. We stop at the end of the turn. The labels are made
    here so that both losses are means over the same tokens; preparation is not timed on either side.
    """
    tokens = tokenizer.apply_chat_template(messages, return_dict=False)
    if len(tokens) > PACK:
        raise ValueError(f"a row of --data has {len(tokens)} tokens, TRL cuts it at {PACK}: leave it out")
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


def print_results(runs: dict[str, list[Measured]], config: Config, peak: float) -> None:
    """Print what was measured, one line per trainer, and our ratios to the others."""
    run = config.run
    flops = 6 * common.matmul_parameters(run.model)  # of a trained token: forward 2, backward 4 per weight
    print(f"\n{run.model}, {run.dtype}, {run.threads} thread(s), loss on {config.loss_on}")
    print(f"{BATCH * run.steps} rows after {BATCH} rows of warm-up, {run.rounds} round(s)")
    print(f"matrix-multiply peak {peak:.0f} GFLOP/s, which is {peak * 1e9 / flops:.0f} tokens/s\n")
    figures = {
        "first loss": lambda run: f"{run.losses[0]:.5f}",
        "grad norm": lambda run: f"{run.grad_norms[0]:.4f}",
    }
    common.print_table(runs, common.clock_name(run), dict.fromkeys(runs, flops), peak, figures)


def check_same_work(ours: Measured, trl: Measured, tolerance: float) -> None:
    """Raise RuntimeError unless both trained the same tokens and met the same loss in the first step."""
    if (ours.tokens, ours.trained_tokens) != (trl.tokens, trl.trained_tokens):
        raise RuntimeError(
            f"not the same work: tokens by step {ours.tokens} and {trl.tokens}, "
            f"of which trained {ours.trained_tokens} and {trl.trained_tokens}"
        )
    loss, trl_loss = ours.losses[0], trl.losses[0]
    if abs(loss - trl_loss) > tolerance * trl_loss:
        raise RuntimeError(f"not the same work: first losses {loss} and {trl_loss}, tolerance {tolerance}")


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.OmitArgPrefixes,)))
