"""Reward model: a score for each text, trained on pairs of a chosen and a rejected text, or on labels.

    torchrun --nproc_per_node 2 train_rm.py --model runs/sft/hf --train-data train_comparisons.jsonl \
        --val-data test_comparisons.jsonl --output runs/rm

The score is a linear head on the hidden state of the text's last token. --loss ranking (Bradley-Terry) takes
pairs, {"prompt", "chosen", "rejected"} or {"text"} lines, good before bad; --loss regression takes {"text",
"label"} rows: align/data/preferences.py has the formats. OUTPUT/hf is the result, a
*ForSequenceClassification model with one label; the mean and standard deviation of its scores, for
--reward-standardise auto of PPO and rejection sampling, are in reward_statistics.json there. Without
arguments the built-in tiny model learns a toy task.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from align.data import display, packing, preferences, row_counts, tokenizer_files, toy
from align.data.packing import Batch, Example
from align.data.preferences import Labelled, Pair, PreferenceFormat
from align.distributed import launch, node, parallel
from align.errors import UserError
from align.flags import COEFFICIENT, SCORE, check_ranges, refuse_unused, whole
from align.losses import supervised
from align.losses.statistics import pair_statistics
from align.model import adapter_files, architecture, gpt, huggingface, lora
from align.model.config import ModelConfig, check_model, describe_model
from align.model.lora import LoraConfig
from align.planning import estimate
from align.rewards.sources import save_statistics
from align.tracking.metrics import speed, wilson_interval, with_std
from align.tracking.run import RunConfig
from align.training import batching, engine, optim
from align.training.config import CommonConfig
from align.training.optim import OptimConfig
from align.training.session import Session

Rows = Sequence[Pair | Labelled]
STATISTICS_ROWS = 1000  # whose mean is known to a few hundredths of the standard deviation

# ---- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(CommonConfig):
    test_data: tuple[Path, ...] = ()
    """rows for one evaluation after the last step; like --val-data, each file is a set of its own"""
    loss: Literal["ranking", "regression"] = "ranking"
    """ranking: Bradley-Terry, -log sigmoid(score of chosen - score of rejected - margin); regression: squared
    error"""
    center_rewards_coef: float = 0.0
    """ranking: coefficient of (score of chosen + score of rejected)^2 in the loss, which draws the mean score
    to 0; 0.01 is usual"""
    num_attributes: int = 1
    """regression: attributes, the numbers in the label of a row"""
    attribute_weights: tuple[float, ...] = ()
    """regression: weight of each attribute in the one score (default: equal, with sum 1)"""
    overlap_param_gather: bool = False
    """overlap the all-gather of updated weights with the next forward pass, by buckets; needs data parallel
    (or context parallel) ranks"""
    format: PreferenceFormat = PreferenceFormat()
    lora: LoraConfig = LoraConfig()
    run: RunConfig = RunConfig(output=Path("runs/rm"))
    optim: OptimConfig = OptimConfig(lr=9e-6, min_lr=9e-7)
    plan = estimate.reward_model  # for tools/plan.py

    def __post_init__(self):
        super().__post_init__()
        check_ranges(
            self, center_rewards_coef=COEFFICIENT, num_attributes=whole(1, 10**4), attribute_weights=SCORE
        )
        refuse_unused(self.model, ModelConfig, "keep_logits", "with a reward model")
        unused = {"ranking": "num_attributes attribute_weights", "regression": "center_rewards_coef"}
        refuse_unused(self, Config, unused[self.loss], f"with --loss {self.loss}")
        if (count := len(self.attribute_weights)) not in (0, self.num_attributes):
            raise UserError(
                f"--attribute-weights has {count} numbers for --num-attributes {self.num_attributes}"
            )
        if self.attribute_weights and not any(self.attribute_weights):
            raise UserError("--attribute-weights 0: one weight must be other than 0, else all scores are 0")
        if self.loss == "regression" and not self.train_data:
            raise UserError("--loss regression needs --train-data: the toy task has no labels")


def num_targets(rows: Rows) -> int:
    """Denominator of the loss of some rows: pairs, or labels that are not missing."""
    return sum(int((row.target != supervised.MISSING).sum()) for row in rows)


def main(config: Config) -> None:
    # ---- setup and checks ------------------------------------------------------------------------
    start = architecture.read_config(config.model.path)
    if start.labels not in (0, config.num_attributes):
        labels = f"{start.labels} labels, --num-attributes says {config.num_attributes}"
        raise UserError(f"--model {config.model.model} has {labels}")
    arch = replace(start, labels=config.num_attributes)
    adapters = adapter_files.read(config.lora, arch)
    check_model(arch, config.model, config.parallel, config.overlap_param_gather, adapters)
    per_row = 2 if config.loss == "ranking" else 1
    packing.check_budget(config.format.max_seq_len, config.batch, arch.max_positions, per_row)
    session = Session(config, __file__)
    description = describe_model(arch, config.model, config.overlap_param_gather, adapters)
    session.say(f"{parallel.layout()}; {description}")
    owner = "the adapter" if adapter_files.has_head(adapters) else "the model" if start.labels else None
    session.say(f"the head is that of {owner}" if owner else "the head starts at random")

    # ---- data ------------------------------------------------------------------------------------
    files, tokenizer = config.files(toy.write_comparisons), session.load_tokenizer()

    def load(files: list[Path], name: str) -> Rows:
        def read() -> tuple[Rows, dict[str, int]]:
            if config.loss == "ranking":
                return preferences.load_pairs(files, tokenizer, config.format, text_lines=True)
            return preferences.load_labelled(files, tokenizer, config.format, config.num_attributes)

        rows, counts = node.once(read)
        packing.check_ids((example for row in rows for example in row.scored), arch.vocab_size)
        session.say(f"{name} data: {row_counts.describe(counts)}")
        return rows

    train = load(files["train"], "train")
    packing.check_size(len(train), config.batch.global_batch_size, "--train-data")
    first = train[0].scored[0]
    shown = Example(first.ids[:-1], np.arange(len(first.ids) - 1) == len(first.ids) - 2)
    session.say(f"first row, its score is read at the token in brackets:\n{display.show(shown, tokenizer)}")
    val = {name: load([file], name) for name, file in named_sets("val", files["val"]).items()}
    test = {name: load([file], name) for name, file in named_sets("test", config.test_data).items()}
    session.find_checkpoint([example.ids for example in row.scored] for row in train)

    def micro_batches(rows: Rows) -> list[Batch]:
        """This rank's share of some rows, packed."""
        examples, values = [row.scored for row in rows], {"target": [row.target for row in rows]}
        return batching.micro_batches(scorer, examples, config.batch, values)

    # ---- model -----------------------------------------------------------------------------------
    weights = config.attribute_weights or (1 / config.num_attributes,) * config.num_attributes
    scorer = gpt.build_scorer(arch, config.model, config.parallel, weights, adapters)
    source = huggingface.open_source(config.model.path, start, config.parallel.seed)
    if start.labels == 0:
        source = huggingface.FreshHead(source, arch, config.parallel.seed)
    huggingface.load(scorer, source)
    adapter_files.load(scorer, config.parallel.seed)
    scorer = gpt.distributed(scorer, config.overlap_param_gather)
    optimizer = optim.build(scorer, config.optim)

    # ---- loss ------------------------------------------------------------------------------------
    def loss_fn(batch: Batch, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        scores = values.index_select(0, batch.trained).double()  # [N, A], those at the last tokens
        if config.loss == "regression":
            error, _ = supervised.regression(scores, batch.extra["target"])
            rewards = scores @ gpt.stages(scorer)[-1].label_weights.double()  # [N]
            return error, {"rewards_all_mean": rewards.sum(), "rewards_all_square": rewards.square().sum()}
        chosen, rejected = scores.view(-1, 2).unbind(1)  # [P]
        loss = supervised.ranking(chosen, rejected, batch.extra["target"]).sum()
        metrics = pair_statistics(chosen, rejected)
        if config.center_rewards_coef:
            metrics["centering_loss"] = supervised.centering(chosen, rejected).sum()
            loss = loss + config.center_rewards_coef * metrics["centering_loss"]
        return loss, metrics

    def statistics(metrics: dict[str, float], rows: Rows) -> dict[str, float]:
        """Metrics of some rows: rewards are means over rows, whatever the loss is a mean over."""
        scale = num_targets(rows) / len(rows)
        return with_std({k: v * scale if k.startswith("rewards") else v for k, v in metrics.items()})

    def metrics_of(name: str, rows: Rows) -> dict[str, float]:
        """Metrics of some rows of a data set, without a gradient."""
        with engine.during(f"evaluation of {name}"):
            metrics = engine.evaluate(scorer, micro_batches(rows), loss_fn, num_targets(rows))
        return statistics(metrics, rows)

    def evaluate(sets: dict[str, Rows]) -> dict[str, float]:
        """Metrics of some data sets, `name/metric`."""
        metrics: dict[str, float] = {}
        for name, data in sets.items():
            rows = data if name in test else data[config.val_rows()]
            metrics |= {f"{name}/{metric}": value for metric, value in metrics_of(name, rows).items()}
        return metrics

    def reward_statistics() -> dict[str, float | str | dict[int, int]]:
        """Mean and standard deviation of the scores, on validation rows if there are any; last tokens."""
        name, data = ("val", val["val"]) if val else ("train", train)
        order = packing.epoch_order(len(data), config.parallel.seed, 0)
        rows = [data[row] for row in order[:STATISTICS_ROWS].tolist()]
        metrics = metrics_of(name, rows)
        ends = Counter(int(example.ids[-2]) for row in rows for example in row.scored)  # -1: padding
        moments = {"mean": metrics["rewards_all_mean"], "std": metrics["rewards_all_std"]}
        return {**moments, "texts": ends.total(), "data": name, "ends": dict(ends.most_common(8))}

    # ---- loop ------------------------------------------------------------------------------------
    session.resume({"policy": (scorer, optimizer)}, (lambda step: evaluate(val)) if val else None)
    clock = session.clock
    for step in session.steps():
        # batch
        numbers = session.rows_of_step(step)
        rows = [train[row] for row in numbers]
        batches = micro_batches(rows)
        clock.lap("data")

        # update
        if record := session.record:
            record.put_examples([example for row in rows for example in row.scored])
            record.put_outputs("scores", scorer, [row.scored for row in rows], config.batch)
            record.put(rows=numbers, targets=np.concatenate([row.target for row in rows]))
        with engine.during(f"step {session.done}"):
            update = engine.forward_backward(scorer, batches, loss_fn, num_targets(rows))
            clock.lap("forward_backward")
            if record:
                record.put_update("policy", scorer, update)
            update = statistics(update, rows)
            update |= optim.update(optimizer, config.optim, step, session.total_steps)
            clock.lap("optimizer")
        metrics = {f"train/{name}": value for name, value in update.items()}
        tokens = sum(example.num_inputs for row in rows for example in row.scored)
        computed = sum(packing.num_places(row.scored) for row in rows)
        seconds = clock.total("data", "forward_backward", "optimizer")
        metrics |= speed(lora.matmul_params(arch, adapters), tokens, computed, seconds)

        # evaluate
        if val and session.validates():
            metrics |= evaluate(val)
            clock.lap("validate")
        session.end_step(metrics)

    # ---- test ------------------------------------------------------------------------------------
    companions = [tokenizer.save, tokenizer_files.save_pad_token]
    if session.is_complete:
        if metrics := evaluate(test):
            session.run.log(session.total_steps, metrics)
        for name, data in test.items() if config.loss == "ranking" else ():
            acc, count = metrics[f"{name}/acc"], len(data)
            low, high = wilson_interval(acc, count)
            interval = f"95 % interval {low:.3f} to {high:.3f}"
            session.say(f"{name}: accuracy {acc:.3f} ({interval}) on {count} pairs")
        companions.append(partial(save_statistics, reward_statistics()))
    session.export(scorer, companions, "reward model")


def named_sets(kind: str, files: Sequence[Path]) -> dict[str, Path]:
    """Files as sets by name: "val" the first, which --monitor watches, "val/NAME" another NAME.jsonl."""
    named = {kind if i == 0 else f"{kind}/{file.name.split('.')[0]}": file for i, file in enumerate(files)}
    if len(named) < len(files):
        raise UserError(f"--{kind}-data: two files of one name, {', '.join(map(str, files))}: rename one")
    return named


if __name__ == "__main__":
    launch.run(main, Config)
