"""Reward model: a score for each text, trained on pairs of which one is preferred, or on labels.

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
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from align.data import display, packing, preferences, row_counts, tokenizer_files, toy
from align.data.packing import Batch, Example
from align.data.preferences import PreferenceFormat
from align.data.tokenizer import load_tokenizer
from align.distributed import launch, parallel
from align.errors import UserError
from align.flags import COEFFICIENT, SCORE, check_ranges, refuse_unused, whole
from align.losses import preference, supervised
from align.model import architecture, gpt, huggingface
from align.model.config import check_model, describe_model
from align.rewards.sources import save_statistics
from align.tracking.metrics import Clock, speed, wilson_interval, with_std
from align.tracking.run import Run, RunConfig
from align.training import batching, checkpoint, continuation, engine, optim
from align.training.config import CommonConfig
from align.training.optim import OptimConfig

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
    format: PreferenceFormat = PreferenceFormat()
    run: RunConfig = RunConfig(output=Path("runs/rm"))
    optim: OptimConfig = OptimConfig(lr=9e-6, min_lr=9e-7)

    def __post_init__(self):
        super().__post_init__()
        check_ranges(
            self,
            center_rewards_coef=COEFFICIENT,
            num_attributes=whole(1, 10**4),
            attribute_weights=SCORE,
        )
        unused = {"ranking": "num_attributes attribute_weights", "regression": "center_rewards_coef"}
        refuse_unused(self, Config, unused[self.loss], f"with --loss {self.loss}")
        if self.attribute_weights and len(self.attribute_weights) != self.num_attributes:
            raise UserError(
                f"--attribute-weights has {len(self.attribute_weights)} numbers for --num-attributes "
                f"{self.num_attributes}"
            )
        if self.attribute_weights and not any(self.attribute_weights):
            raise UserError("--attribute-weights 0: one weight must be other than 0, else all scores are 0")
        if self.loss == "regression" and not self.train_data:
            raise UserError("--loss regression needs --train-data: the toy task has no labels")


@dataclass(frozen=True)
class Rows:
    """A data set; a row is a pair with a margin [1], or one text with labels [1, A]."""

    examples: list[tuple[Example, ...]]
    target: np.ndarray  # [rows, 1] or [rows, 1, A]

    def count(self, rows: Sequence[int]) -> int:
        """Denominator of the loss of these rows: pairs, or labels that are not missing."""
        if self.target.ndim == 2:
            return len(rows)
        return int((self.target[rows] != supervised.MISSING).sum())


def main(config: Config) -> None:
    # ---- setup and checks ------------------------------------------------------------------------
    start = architecture.read_config(config.model.path)
    if start.labels not in (0, config.num_attributes):
        raise UserError(
            f"--model {config.model.model} has {start.labels} labels, --num-attributes says "
            f"{config.num_attributes}"
        )
    arch = replace(start, labels=config.num_attributes)
    check_model(arch, config.model, config.parallel)
    per_row = 2 if config.loss == "ranking" else 1
    packing.check_budget(config.format.max_seq_len, config.batch, arch.max_positions, per_row)
    stop = parallel.Stop(config.loop.max_time)
    run = Run(config.run, asdict(config), __file__, parallel.is_main())
    run.say(f"{parallel.layout()}; {describe_model(arch, config.model)}")
    run.say("the head starts at random" if start.labels == 0 else "the head is that of the model")

    # ---- data ------------------------------------------------------------------------------------
    train_files, val_files = config.train_data, config.val_data
    if not train_files:
        train_files, val_files = parallel.on_main(lambda: toy.write_comparisons(config.run.output / "data"))
    tokenizer = load_tokenizer(config.model.path, run.say, config.text, parallel.on_main(run.first_day))

    def load(files: Sequence[Path], name: str) -> Rows:
        if config.loss == "ranking":
            pairs, counts = preferences.load_pairs(files, tokenizer, config.format, text_lines=True)
            examples = [tuple(map(preferences.as_scored, pair.examples)) for pair in pairs]
            rows = Rows(examples, np.array([[pair.margin] for pair in pairs]))
        else:
            texts, labels, counts = preferences.load_labelled(
                files, tokenizer, config.format, config.num_attributes
            )
            rows = Rows([(example,) for example in texts], labels[:, None])
        packing.check_ids([example for row in rows.examples for example in row], arch.vocab_size)
        run.say(f"{name} data: {row_counts.describe(counts)}")
        return rows

    train = load(train_files, "train")
    packing.check_size(len(train.examples), config.batch.global_batch_size, "--train-data")
    first = train.examples[0][0]
    shown = Example(first.ids[:-1], np.arange(len(first.ids) - 1) == len(first.ids) - 2)
    run.say(f"first row, its score is read at the token in brackets:\n{display.show(shown, tokenizer)}")
    val = {name: load([file], name) for name, file in named_sets("val", val_files).items()}
    test = {name: load([file], name) for name, file in named_sets("test", config.test_data).items()}
    sequences = ([example.ids for example in row] for row in train.examples)
    resumed = continuation.find(config, __file__, sequences, run.say)
    total_steps = resumed.total_steps
    optim.check_optim(config.optim, total_steps)
    run.total_steps = total_steps

    def micro_batches(data: Rows, rows: Sequence[int]) -> list[Batch]:
        """This rank's share of some rows, packed."""
        examples = [data.examples[row] for row in rows]
        return batching.micro_batches(scorer, examples, config.batch, {"target": data.target[rows]})

    # ---- model -----------------------------------------------------------------------------------
    weights = config.attribute_weights or (1 / config.num_attributes,) * config.num_attributes
    scorer = gpt.build_scorer(arch, config.model, config.parallel, weights)
    source = huggingface.open_source(config.model.path, start, config.parallel.seed)
    if start.labels == 0:
        source = huggingface.FreshHead(source, arch, config.parallel.seed)
    huggingface.load(scorer, source)
    scorer = gpt.distributed(scorer)
    optimizer = optim.build(scorer, config.optim)

    # ---- loss ------------------------------------------------------------------------------------
    def loss_fn(batch: Batch, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        scores = values[batch.mask.bool()].double()  # [N, A], those at the last tokens
        if config.loss == "regression":
            error, _ = supervised.regression(scores, batch.extra["target"])
            rewards = scores @ scorer.module.label_weights.double()  # [N]
            return error, {"rewards_all_mean": rewards.sum(), "rewards_all_square": rewards.square().sum()}
        chosen, rejected = scores.view(-1, 2).unbind(1)  # [P]
        loss = supervised.ranking(chosen, rejected, batch.extra["target"]).sum()
        metrics = preference.pair_statistics(chosen, rejected)
        if config.center_rewards_coef:
            metrics["centering_loss"] = supervised.centering(chosen, rejected).sum()
            loss = loss + config.center_rewards_coef * metrics["centering_loss"]
        return loss, metrics

    def statistics(found: dict[str, float], data: Rows, rows: Sequence[int]) -> dict[str, float]:
        """Metrics of some rows: rewards are means over rows, whatever the loss is a mean over."""
        scale = data.count(rows) / len(rows)
        return with_std({k: v * scale if k.startswith("rewards") else v for k, v in found.items()})

    def metrics_of(name: str, data: Rows, rows: Sequence[int]) -> dict[str, float]:
        """Metrics of some rows of a data set, without a gradient."""
        with engine.during(f"evaluation of {name}"):
            found = engine.evaluate(scorer, micro_batches(data, rows), loss_fn, data.count(rows))
        return statistics(found, data, rows)

    def evaluate(sets: dict[str, Rows]) -> dict[str, float]:
        """Metrics of some data sets, `name/metric`."""
        metrics = {}
        for name, rows in sets.items():
            every = range(len(rows.examples))[slice(None) if name in test else config.val_rows()]
            found = metrics_of(name, rows, every)
            metrics |= {f"{name}/{metric}": value for metric, value in found.items()}
        return metrics

    def reward_statistics() -> dict[str, float | str | dict[int, int]]:
        """Mean and standard deviation of the scores, on validation rows if there are any; last tokens."""
        name, of = ("val", val["val"]) if val else ("train", train)
        order = packing.epoch_order(len(of.examples), config.parallel.seed, 0)
        rows = order[:STATISTICS_ROWS].tolist()
        found = metrics_of(name, of, rows)
        ends = Counter(
            int(example.ids[-2]) for row in rows for example in of.examples[row]
        )  # -1: as_scored's
        mean, std = found["rewards_all_mean"], found["rewards_all_std"]
        return {
            "mean": mean,
            "std": std,
            "texts": ends.total(),
            "data": name,
            "ends": dict(ends.most_common(8)),
        }

    # ---- resume ----------------------------------------------------------------------------------
    first_step, latest = checkpoint.resume(resumed.checkpoint, scorer, optimizer)
    run.resume_at(first_step)
    if first_step:
        run.say(resumed.describe())
    elif val:
        latest = evaluate(val)
        run.log(0, latest)
    checkpoint.check_monitor(config.checkpoint, latest)

    # ---- loop ------------------------------------------------------------------------------------
    clock, reason = Clock(), None
    for step in range(first_step, total_steps):
        # batch
        rows = resumed.rows_of_step(step)
        batches = micro_batches(train, rows)
        clock.lap("data")

        # update
        lr = optim.learning_rate(config.optim, step, total_steps)
        with engine.during(f"step {step + 1}"):
            found = engine.forward_backward(scorer, batches, loss_fn, train.count(rows))
            found = statistics(found, train, rows)
            clock.lap("forward_backward")
            found |= {"grad_norm": optim.step(optimizer, lr), "lr": lr}
            clock.lap("optimizer")

        # evaluate
        done, reason = step + 1, stop.reason()
        metrics = {f"train/{name}": value for name, value in found.items()}
        tokens = sum(example.num_inputs for row in rows for example in train.examples[row])
        computed = sum(packing.num_places(train.examples[row]) for row in rows)
        seconds = clock.total("data", "forward_backward", "optimizer")
        pace = speed(arch.matmul_params, tokens, computed, seconds)
        if val and config.validates(done, total_steps):
            metrics |= evaluate(val)
            clock.lap("validate")

        # log, then save: what a checkpoint continues has been logged
        latest |= metrics
        checkpoint.check_monitor(config.checkpoint, latest)
        run.log(done, {**metrics, **clock.shares(), **pace})
        if checkpoint.is_due(config.checkpoint, done) or done == total_steps or reason:
            checkpoint.save(
                config.checkpoint, config.run.output, done, scorer, optimizer, latest, resumed.state
            )
            clock.lap("save")  # counted in the next step's line
        if reason:
            break

    # ---- end -------------------------------------------------------------------------------------
    if reason and done < total_steps:
        run.say(f"{reason}: stopped after step {done} of {total_steps}; the same command continues")
    else:
        if test:
            found = evaluate(test)
            run.log(total_steps, found)
        for name, rows in test.items() if config.loss == "ranking" else ():
            acc, count = found[f"{name}/acc"], len(rows.examples)
            low, high = wilson_interval(acc, count)
            run.say(f"{name}: accuracy {acc:.3f} (95 % interval {low:.3f} to {high:.3f}) on {count} pairs")
        save_scale = partial(save_statistics, reward_statistics())
        companions = [tokenizer.save, tokenizer_files.save_pad_token, save_scale]
        huggingface.save(scorer, config.model.path, config.run.output / "hf", companions)
        run.say(f"the reward model is in {config.run.output / 'hf'}")
    run.close()


def named_sets(kind: str, files: Sequence[Path]) -> dict[str, Path]:
    """Files as sets by name: "val" the first, which --monitor watches, "val/NAME" another NAME.jsonl."""
    named = {kind if i == 0 else f"{kind}/{file.name.split('.')[0]}": file for i, file in enumerate(files)}
    if len(named) < len(files):
        raise UserError(f"--{kind}-data: two files of one name, {', '.join(map(str, files))}: rename one")
    return named


if __name__ == "__main__":
    launch.run(main, Config)
