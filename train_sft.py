"""Supervised fine-tuning: raise the likelihood of the answers in a data set.

    torchrun --nproc_per_node 2 train_sft.py --tp 2 \
        --model DIR --train-data train.jsonl --val-data val.jsonl --output runs/sft

Rows are prompts with a response, or conversations: align/data/formats.py has the formats. The loss is the
negative log-likelihood of the answers, averaged over all trained tokens of the global batch. OUTPUT/hf is the
result, a Hugging Face directory. Without arguments the built-in tiny model learns a toy task.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from align.data import display, packing, row_counts, sft, toy
from align.data.formats import FormatConfig
from align.data.marker_chat import RowFormats
from align.data.packing import Batch, Example
from align.data.tokenizer import load_tokenizer
from align.distributed import launch, parallel
from align.losses import supervised
from align.model import architecture, gpt, huggingface
from align.model.config import check_model, describe_model
from align.tracking.metrics import Clock, speed
from align.tracking.run import Run, RunConfig
from align.training import batching, checkpoint, continuation, engine, optim
from align.training.config import CommonConfig

# ---- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(CommonConfig):
    format: FormatConfig = FormatConfig()
    run: RunConfig = RunConfig(output=Path("runs/sft"))


def main(config: Config) -> None:
    # ---- setup and checks ------------------------------------------------------------------------
    arch = architecture.read_config(config.model.path)
    check_model(arch, config.model, config.parallel)
    packing.check_budget(config.format.max_seq_len, config.batch, arch.max_positions)
    stop = parallel.Stop(config.loop.max_time)
    run = Run(config.run, asdict(config), __file__, parallel.is_main())
    run.say(f"{parallel.layout()}; {describe_model(arch, config.model)}")

    # ---- data ------------------------------------------------------------------------------------
    train_files, val_files = config.train_data, config.val_data
    if not train_files:
        train_files, val_files = parallel.on_main(lambda: toy.write(config.run.output / "data"))
    tokenizer = load_tokenizer(config.model.path, run.say, config.text, parallel.on_main(run.first_day))
    formats = RowFormats()
    train, counts = sft.load_sft(train_files, tokenizer, config.format, formats)
    packing.check_size(len(train), config.batch.global_batch_size, "--train-data")
    run.say(f"training data: {row_counts.describe(counts)}")
    run.say(f"first example, trained tokens in brackets:\n{display.show(train[0], tokenizer)}")
    val = []
    if val_files:
        val, counts = sft.load_sft(val_files, tokenizer, config.format)
        run.say(f"validation data: {row_counts.describe(counts)}")
        val = val[config.val_rows()]
    trained_format = sft.adopt(formats, tokenizer, config.format, run.say)
    parallel.on_main(lambda: trained_format.save(config.run.output))  # for generate.py on a checkpoint
    packing.check_ids(train + val, arch.vocab_size)
    resumed = continuation.find(config, __file__, ([example.ids] for example in train), run.say)
    total_steps = resumed.total_steps
    optim.check_optim(config.optim, total_steps)
    run.total_steps = total_steps

    def micro_batches(examples: list[Example]) -> list[Batch]:
        """This rank's share of some examples, packed."""
        return batching.micro_batches(policy, [[example] for example in examples], config.batch)

    # ---- model -----------------------------------------------------------------------------------
    policy = gpt.build_policy(arch, config.model, config.parallel)
    huggingface.load(policy, huggingface.open_source(config.model.path, arch, config.parallel.seed))
    policy = gpt.distributed(policy)
    optimizer = optim.build(policy, config.optim)

    # ---- loss ------------------------------------------------------------------------------------
    def loss_fn(batch: Batch, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return supervised.sft_loss(logprobs, batch.mask), {}

    def validate() -> dict[str, float]:
        with engine.during("validation"):
            found = engine.evaluate(policy, val_batches, loss_fn, packing.num_trained(val))
        return {f"val/{name}": value for name, value in found.items()}

    val_batches = micro_batches(val) if val else []

    # ---- resume ----------------------------------------------------------------------------------
    first_step, latest = checkpoint.resume(resumed.checkpoint, policy, optimizer)
    run.resume_at(first_step)
    if first_step:
        run.say(resumed.describe())
    elif val:
        latest = validate()
        run.log(0, latest)
    checkpoint.check_monitor(config.checkpoint, latest)

    # ---- loop ------------------------------------------------------------------------------------
    clock, reason = Clock(), None
    for step in range(first_step, total_steps):
        # batch
        rows = resumed.rows_of_step(step)
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
        pace = speed(arch.matmul_params, tokens, tokens, clock.total("data", "forward_backward", "optimizer"))
        if val and config.validates(done, total_steps):
            metrics |= validate()
            clock.lap("validate")

        # log, then save: what a checkpoint continues has been logged
        latest |= metrics
        checkpoint.check_monitor(config.checkpoint, latest)
        run.log(done, {**metrics, **clock.shares(), **pace})
        if checkpoint.is_due(config.checkpoint, done) or done == total_steps or reason:
            checkpoint.save(
                config.checkpoint, config.run.output, done, policy, optimizer, latest, resumed.state
            )
            clock.lap("save")  # counted in the next step's line
        if reason:
            break

    # ---- end -------------------------------------------------------------------------------------
    if reason and done < total_steps:
        run.say(f"{reason}: stopped after step {done} of {total_steps}; the same command continues")
    else:
        companions = [tokenizer.save, trained_format.save]
        huggingface.save(policy, config.model.path, config.run.output / "hf", companions)
        run.say(f"the model is in {config.run.output / 'hf'}")
    run.close()


if __name__ == "__main__":
    launch.run(main, Config)
