"""Supervised fine-tuning: raise the likelihood of the responses in a data set.

    torchrun --nproc_per_node 2 train_sft.py --tp 2 \
        --model DIR --train-data train.jsonl --val-data val.jsonl --output runs/sft

Rows are prompts with a response, or conversations: align/data/formats.py has the formats. The loss is the
negative log-likelihood of the responses, averaged over all trained tokens of the global batch. OUTPUT/hf is
the result, a Hugging Face directory. Without arguments the built-in tiny model learns a toy task.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from torch import Tensor

from align.data import display, packing, row_counts, sft, toy
from align.data.formats import FormatConfig
from align.data.marker_chat import RowFormats
from align.data.packing import Batch, Example
from align.distributed import launch, node, parallel
from align.losses import supervised
from align.model import adapter_files, architecture, gpt, huggingface, lora
from align.model.config import check_model, describe_model
from align.model.lora import LoraConfig
from align.planning import estimate
from align.tracking.metrics import speed
from align.tracking.run import RunConfig
from align.training import batching, engine, optim
from align.training.config import CommonConfig
from align.training.session import Session

# ---- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(CommonConfig):
    overlap_param_gather: bool = False
    """overlap the all-gather of updated weights with the next forward pass, by buckets; needs data parallel
    (or context parallel) ranks"""
    format: FormatConfig = FormatConfig()
    lora: LoraConfig = LoraConfig()
    run: RunConfig = RunConfig(output=Path("runs/sft"))
    plan = estimate.sft  # for tools/plan.py


def main(config: Config) -> None:
    # ---- setup and checks ------------------------------------------------------------------------
    arch = architecture.read_config(config.model.path)
    adapters = adapter_files.read(config.lora, arch)
    check_model(arch, config.model, config.parallel, config.overlap_param_gather, adapters)
    packing.check_budget(config.format.max_seq_len, config.batch, arch.max_positions)
    session = Session(config, __file__)
    description = describe_model(arch, config.model, config.overlap_param_gather, adapters)
    session.say(f"{parallel.layout()}; {description}")

    # ---- data ------------------------------------------------------------------------------------
    files, tokenizer = config.files(toy.write), session.load_tokenizer()

    def load(name: str) -> tuple[Sequence[Example], dict[str, int], RowFormats]:
        """Examples, counts and formats of a data set."""
        formats = RowFormats()
        return *sft.load_sft(files[name], tokenizer, config.format, formats), formats

    train, counts, formats = node.once(lambda: load("train"))
    packing.check_size(len(train), config.batch.global_batch_size, "--train-data")
    session.say(f"training data: {row_counts.describe(counts)}")
    session.say(f"first example, trained tokens in brackets:\n{display.show(train[0], tokenizer)}")
    val: Sequence[Example] = []
    if files["val"]:
        val, counts, _ = node.once(lambda: load("val"))
        session.say(f"validation data: {row_counts.describe(counts)}")
        val = val[config.val_rows()]
    packing.check_ids(chain(train, val), arch.vocab_size)
    trained_format = sft.adopt(formats, tokenizer, config.format, session.say)
    parallel.on_main(lambda: trained_format.save(config.run.output))  # for generate.py on a checkpoint
    session.find_checkpoint([example.ids] for example in train)

    def micro_batches(examples: Sequence[Example]) -> list[Batch]:
        """This rank's share of some examples, packed."""
        return batching.micro_batches(policy, [[example] for example in examples], config.batch)

    # ---- model -----------------------------------------------------------------------------------
    policy = gpt.build_policy(arch, config.model, config.parallel, adapters=adapters)
    huggingface.load(policy, huggingface.open_source(config.model.path, arch, config.parallel.seed))
    adapter_files.load(policy, config.parallel.seed)
    policy = gpt.distributed(policy, config.overlap_param_gather)
    optimizer = optim.build(policy, config.optim)
    val_batches = micro_batches(val) if val else []

    # ---- loss ------------------------------------------------------------------------------------
    def loss_fn(batch: Batch, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return supervised.sft_loss(logprobs, batch.mask), {}

    def validate(step: int) -> dict[str, float]:
        with engine.during("validation"):
            metrics = engine.evaluate(policy, val_batches, loss_fn, packing.num_trained(val))
        return {f"val/{name}": value for name, value in metrics.items()}

    # ---- loop ------------------------------------------------------------------------------------
    session.resume({"policy": (policy, optimizer)}, validate if val else None)
    clock = session.clock
    for step in session.steps():
        # batch
        rows = session.rows_of_step(step)
        examples = [train[row] for row in rows]
        batches = micro_batches(examples)
        clock.lap("data")

        # update
        if record := session.record:
            record.put(rows=rows)
            record.put_examples(examples)
            record.put_outputs("logprobs", policy, [[example] for example in examples], config.batch)
        with engine.during(f"step {session.done}"):
            update = engine.forward_backward(policy, batches, loss_fn, packing.num_trained(examples))
            clock.lap("forward_backward")
            if record:
                record.put_update("policy", policy, update)
            update |= optim.update(optimizer, config.optim, step, session.total_steps)
            clock.lap("optimizer")
        metrics = {f"train/{name}": value for name, value in update.items()}
        tokens = sum(example.num_inputs for example in examples)
        seconds = clock.total("data", "forward_backward", "optimizer")
        metrics |= speed(lora.matmul_params(arch, adapters), tokens, tokens, seconds)

        # evaluate
        if val and session.validates():
            metrics |= validate(session.done)
            clock.lap("validate")
        session.end_step(metrics)

    session.export(policy, [tokenizer.save, trained_format.save])


if __name__ == "__main__":
    launch.run(main, Config)
