"""Supervised fine-tuning: raise the likelihood of the answers in a data set.

    torchrun --nproc_per_node 2 train_sft.py --tp 2 \
        --model DIR --train-data train.jsonl --val-data val.jsonl --output runs/sft

Rows are prompts with a response, or conversations: align/data.py has the formats. The loss is the negative
log-likelihood of the answers, averaged over all trained tokens of the global batch. OUTPUT/hf is the result,
a Hugging Face directory. Without arguments the built-in tiny model learns a toy task.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from align import (
    checkpoint,
    data,
    engine,
    huggingface,
    losses,
    model,
    optim,
    packing,
    parallel,
    tokenizer,
    toy,
)
from align.checkpoint import CheckpointConfig
from align.data import FormatConfig
from align.metrics import Clock, Run, RunConfig, model_flops
from align.model import ModelConfig
from align.optim import OptimConfig
from align.packing import Batch, Example
from align.parallel import ParallelConfig

# ---- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    train_data: tuple[Path, ...] = ()
    """training rows: jsonl files, plain or .gz (default: a toy task, written to OUTPUT/data)"""
    val_data: tuple[Path, ...] = ()
    """validation rows"""
    global_batch_size: int = 32
    """sequences per optimizer step, over all ranks"""
    micro_batch_tokens: int = 4096
    """most tokens in one forward pass of a rank; sequences are packed up to it"""
    micro_batch_size: int | None = None
    """most sequences in one forward pass (default: as many as fit)"""
    max_epochs: int = 1
    """passes over the training rows"""
    max_steps: int | None = None
    """most optimizer steps (default: what --max-epochs gives)"""
    max_time: str | None = None
    """HH:MM:SS after which the run saves and exits with status 0; the same command continues it"""
    val_interval: int = 100
    """steps between validations; there is one before the first step and one after the last as well"""
    val_batches: int | None = None
    """global batches per validation (default: all of --val-data)"""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    format: FormatConfig = field(default_factory=FormatConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self):
        batch = ("global_batch_size", "micro_batch_tokens", "micro_batch_size")
        for name in (*batch, "max_epochs", "max_steps", "val_interval", "val_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if self.val_data and not self.train_data:
            raise ValueError("--val-data without --train-data: give both, or none for the toy task")


@record
def main(config: Config) -> None:
    # ---- setup and checks ------------------------------------------------------------------------
    arch = huggingface.read_config(config.model.path)
    model.check(arch, config.model, config.parallel)
    packing.check_budget(config.format.max_seq_len, config.micro_batch_tokens, arch.max_positions)
    stop = parallel.Stop(config.max_time)
    run = Run(config.run, asdict(config), __file__, parallel.is_main())
    run.say(f"{parallel.layout()}; {model.describe(arch, config.model)}")

    # ---- data ------------------------------------------------------------------------------------
    train_files, val_files = config.train_data, config.val_data
    if not train_files:
        train_files, val_files = parallel.on_main(lambda: toy.write(config.run.output / "data"))
    text = tokenizer.load(config.model.path)
    train, counts = data.load_sft(train_files, text, config.format)
    packing.check_size(len(train), config.global_batch_size, "--train-data")
    run.say(f"training data: {data.describe(counts)}")
    run.say(f"first example, trained tokens in brackets:\n{data.show(train[0], text)}")
    val = []
    if val_files:
        val, counts = data.load_sft(val_files, text, config.format)
        run.say(f"validation data: {data.describe(counts)}")
    if config.val_batches is not None:
        val = val[: config.val_batches * config.global_batch_size]
    packing.check_ids(train + val, arch.vocab_size)
    total_steps = len(train) // config.global_batch_size * config.max_epochs
    if config.max_steps is not None:
        total_steps = min(total_steps, config.max_steps)
    optim.check(config.optim, total_steps)
    run.total_steps = total_steps

    def micro_batches(examples: list[Example]) -> list[Batch]:
        """This rank's share of some examples, packed."""
        lengths = [example.num_inputs for example in examples]
        plan = packing.plan(lengths, parallel.dp_size(), config.micro_batch_tokens, config.micro_batch_size)
        return [
            packing.collate([examples[i] for i in rows], engine.alignment(config.parallel)).to(
                parallel.device()
            )
            for rows in plan[parallel.dp_rank()]
        ]

    # ---- model -----------------------------------------------------------------------------------
    policy = model.build_policy(arch, config.model, config.parallel)
    huggingface.load(policy, huggingface.open_source(config.model.path, arch, config.parallel.seed))
    policy = model.distributed(policy)
    optimizer = optim.build(policy, config.optim)

    # ---- loss ------------------------------------------------------------------------------------
    def loss_fn(batch: Batch, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return losses.sft_loss(logprobs, batch.mask), {}

    def validate() -> dict[str, float]:
        with engine.during("validation"):
            found = engine.evaluate(policy, val_batches, loss_fn, packing.num_trained(val))
        return {f"val/{name}": value for name, value in found.items()}

    val_batches = micro_batches(val) if val else []

    # ---- resume ----------------------------------------------------------------------------------
    first_step, latest = checkpoint.resume(config.checkpoint, config.run.output, policy, optimizer)
    run.resume_at(first_step)
    if first_step:
        run.say(f"continuing after step {first_step}")
    elif val:
        latest = validate()
        run.log(0, latest)
    checkpoint.check_monitor(config.checkpoint, latest)

    # ---- loop ------------------------------------------------------------------------------------
    clock, reason = Clock(), None
    for step in range(first_step, total_steps):
        # batch
        rows = packing.global_batch(len(train), config.global_batch_size, config.parallel.seed, step)
        examples = [train[row] for row in rows]
        batches = micro_batches(examples)
        clock.lap("data")

        # update
        lr = optim.learning_rate(config.optim, step, total_steps)
        with engine.during(f"step {step + 1}"):
            found = engine.forward_backward(policy, batches, loss_fn, packing.num_trained(examples))
            clock.lap("forward_backward")
            found |= {"grad_norm": optim.step(optimizer, lr), "lr": lr}
            clock.lap("optimizer")

        # evaluate
        done, reason = step + 1, stop.reason()
        metrics = {f"train/{name}": value for name, value in found.items()}
        tokens = sum(example.num_inputs for example in examples)
        seconds = clock.total("data", "forward_backward", "optimizer")
        if val and (done % config.val_interval == 0 or done == total_steps):
            metrics |= validate()
            clock.lap("validate")

        # log, then save: what a checkpoint continues has been logged
        latest |= metrics
        checkpoint.check_monitor(config.checkpoint, latest)
        speed = {
            "time/tokens_per_s": tokens / seconds,
            "time/tflops_per_s": model_flops(arch.matmul_params, tokens) / seconds / 1e12,
        }
        run.log(done, {**metrics, **clock.shares(), **speed})
        if checkpoint.is_due(config.checkpoint, done) or done == total_steps or reason:
            checkpoint.save(config.checkpoint, config.run.output, done, policy, optimizer, latest)
            clock.lap("save")  # counted in the next step's line
        if reason:
            break

    # ---- end -------------------------------------------------------------------------------------
    if reason and done < total_steps:
        run.say(f"{reason}: stopped after step {done} of {total_steps}; the same command continues")
    else:
        huggingface.save(policy, config.model.path, config.run.output / "hf", [text.save, config.format.save])
        run.say(f"the model is in {config.run.output / 'hf'}")
    run.close()


if __name__ == "__main__":
    flags = tyro.cli(Config, config=(tyro.conf.OmitArgPrefixes,))
    with parallel.start(flags.parallel):
        main(flags)
