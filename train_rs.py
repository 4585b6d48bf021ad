"""Rejection sampling: sample several answers to each prompt, keep the best, train on them, again and again.

    torchrun --nproc_per_node 2 train_rs.py --model runs/sft/hf --reward-model runs/rm/hf \
        --train-data train_prompts.jsonl --val-data test_prompts.jsonl --output runs/rs

A step samples --samples-per-prompt answers to --prompts-per-step prompts, scores them by a reward model or by
a function of yours (--reward-fn module:function), and keeps of each prompt the --keep-top best, on which it
takes steps of supervised fine-tuning, --global-batch-size answers in each. Rows of data are prompts:
align/data/prompts.py has the formats. OUTPUT/hf is the result. Without arguments it runs on the built-in tiny
model, which is random: all its responses to the toy task are worth 0, and the log says so in each step;
demo.py shows a model that learns.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from align.data import packing, prompts, toy
from align.data.packing import Batch
from align.data.prompts import PromptFormat
from align.data.tokenizer import load_tokenizer
from align.distributed import launch, parallel
from align.errors import UserError
from align.flags import COUNT, SAMPLES, SCORE, check_ranges, refuse_unused
from align.generation import audit
from align.generation.audit import AuditConfig
from align.generation.generator import (
    Generator,
    RolloutConfig,
    check_model_logprobs,
    check_rollout,
    warn_if_none_ended,
)
from align.generation.rollout import Rollout, Sample, response_example
from align.generation.sampling import SamplingConfig
from align.losses import supervised
from align.model import architecture, gpt, huggingface
from align.model.config import check_model, describe_model
from align.rewards import sources
from align.rewards.sources import RewardConfig
from align.tracking.metrics import Clock, mean_of
from align.tracking.run import Run, RunConfig
from align.training import batching, checkpoint, continuation, engine, optim
from align.training.checkpoint import CheckpointConfig
from align.training.config import CommonConfig, LoopConfig
from align.training.optim import OptimConfig

TRAIN, VAL = 0, 1  # what random numbers of samples are drawn for

# ---- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(CommonConfig):
    prompts_per_step: int = 32
    """prompts per rollout"""
    samples_per_prompt: int = 8
    """responses per prompt: n of best-of-n"""
    keep_top: int = 1
    """best responses to a prompt that are trained on; of equal rewards those sampled first"""
    min_reward: float | None = None
    """least reward of a response that is trained on, even of the best one (default: no limit)"""
    unended: Literal["drop", "keep"] = "drop"
    """truncated responses (cut off by --max-new-tokens): drop never trains on them, keep treats them like the
    others"""
    duplicates: Literal["drop", "keep"] = "drop"
    """responses to a prompt with the same tokens: drop counts only the first, keep all"""
    reward: RewardConfig = RewardConfig()
    audit: AuditConfig = AuditConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    format: PromptFormat = PromptFormat()
    run: RunConfig = RunConfig(output=Path("runs/rs"))
    loop: LoopConfig = LoopConfig(val_batches=1)
    optim: OptimConfig = OptimConfig(lr=1e-6, min_lr=1e-6, warmup_steps=0)
    checkpoint: CheckpointConfig = CheckpointConfig(monitor="val_rollouts/rewards")

    def __post_init__(self):
        super().__post_init__()
        check_ranges(
            self, prompts_per_step=COUNT, samples_per_prompt=SAMPLES, keep_top=SAMPLES, min_reward=SCORE
        )
        check_model_logprobs(self.rollout, self.sampling)
        if self.samples_per_prompt == 1:
            refuse_unused(self, Config, "duplicates", "with --samples-per-prompt 1")
        if self.keep_top > self.samples_per_prompt:
            raise UserError(
                f"--keep-top {self.keep_top} of --samples-per-prompt {self.samples_per_prompt}: raise that"
            )
        if self.train_data and not (self.reward.reward_model or self.reward.reward_fn):
            raise UserError("what is a good answer? Give --reward-model DIR or --reward-fn module:function")
        if self.sampling.greedy and self.samples_per_prompt > 1:
            raise UserError("--greedy gives the same answer every time: leave it out")

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_step


def select(
    samples: list[Sample], values: np.ndarray, keep_top: int, unended: str, duplicates: str
) -> tuple[list[int], int, int]:
    """The numbers of the best answers to one prompt, best first.

    Args:
        values: their rewards, [n].

    Returns:
        At most keep_top numbers; how many answers were dropped because they did not end, and how many because
        they have the tokens of an earlier one.
    """
    ended = [k for k, sample in enumerate(samples) if unended == "keep" or sample.finish == "stop"]
    first = {samples[k].ids.tobytes(): k for k in reversed(ended)}
    left = ended if duplicates == "keep" else sorted(first.values())
    best = sorted(left, key=lambda k: -values[k])[:keep_top]  # stable: of equal ones the first
    return best, len(samples) - len(ended), len(ended) - len(left)


def main(config: Config) -> None:
    # ---- setup and checks ------------------------------------------------------------------------
    arch = architecture.read_config(config.model.path)
    check_model(arch, config.model, config.parallel)
    check_rollout(arch, config.rollout, config.sampling, config.model, config.parallel)
    prompts.check_lengths(config.format, config.sampling.max_new_tokens, config.batch, arch.max_positions)
    stop = parallel.Stop(config.loop.max_time)
    run = Run(config.run, asdict(config), __file__, parallel.is_main())
    run.say(f"{parallel.layout()}; {describe_model(arch, config.model)}")

    # ---- data ------------------------------------------------------------------------------------
    files, reward = {"train": config.train_data, "val": config.val_data}, config.reward.with_statistics()
    if not config.train_data:
        toy_files = parallel.on_main(lambda: toy.write(config.run.output / "data"))
        files = dict(zip(files, toy_files, strict=True))
        if not (reward.reward_model or reward.reward_fn):
            reward = replace(reward, reward_fn="align.data.toy:reward")
    run.say(reward.describe())
    tokenizer = load_tokenizer(config.model.path, run.say, config.text, parallel.on_main(run.first_day))
    sources.warn_of_other_ends(reward, tokenizer, run.say)
    rows = prompts.load_sets(files, tokenizer, config.format, arch.vocab_size, run.say)
    packing.check_size(len(rows["train"]), config.prompts_per_step, "--train-data", "--prompts-per-step")
    rows["val"] = rows["val"][config.val_rows()]
    resumed = continuation.find(config, __file__, ([prompt.ids] for prompt in rows["train"]), run.say)
    total_steps = resumed.total_steps
    optim.check_optim(config.optim, total_steps)
    run.total_steps = total_steps

    # ---- model -----------------------------------------------------------------------------------
    judges = sources.reward_sources(
        reward, config.model, config.parallel, config.batch, tokenizer, config.sampling.stop
    )
    policy = gpt.build_policy(arch, config.model, config.parallel)
    huggingface.load(policy, huggingface.open_source(config.model.path, arch, config.parallel.seed))
    policy = gpt.distributed(policy)
    optimizer = optim.build(policy, config.optim)
    generator = Generator(policy, config.rollout, config.sampling, config.model, config.parallel, tokenizer)
    run.say(generator.describe())

    least = -math.inf if config.min_reward is None else config.min_reward

    # ---- rollouts --------------------------------------------------------------------------------
    def rollout(name: str, numbers: Sequence[int], stream: tuple[int, ...], answers: int) -> Rollout:
        """Sample answers to some prompts of a data set and score them; `stream`: of their random numbers."""
        chosen = [rows[name][number] for number in numbers]
        streams = [(*stream, number) for number in numbers]
        samples = generator.generate([prompt.ids for prompt in chosen], streams, answers)
        clock.lap("generate")
        scored = Rollout(numbers, chosen, samples, sum(judge(chosen, samples) for judge in judges))
        clock.lap("score")
        return scored

    def validate(step: int) -> dict[str, float]:
        """Rewards of one answer to each validation prompt, each time with the same random numbers."""
        found = rollout("val", range(len(rows["val"])), (VAL,), 1)
        run.samples(step, found.table("val_rollouts", 4, tokenizer, config.sampling.stop))
        return {f"val_rollouts/{name}": value for name, value in found.statistics().items()}

    # ---- loss ------------------------------------------------------------------------------------
    def loss_fn(batch: Batch, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return supervised.sft_loss(logprobs, batch.mask), {}

    # ---- resume ----------------------------------------------------------------------------------
    clock = Clock()
    first_step, latest = checkpoint.resume(resumed.checkpoint, policy, optimizer)
    run.resume_at(first_step)
    if first_step:
        run.say(resumed.describe())
    elif rows["val"]:
        latest = validate(0)
        run.log(0, latest)
    checkpoint.check_monitor(config.checkpoint, latest)

    # ---- loop ------------------------------------------------------------------------------------
    clock, reason = Clock(), None
    for step in range(first_step, total_steps):
        done = step + 1

        # rollout
        found = rollout("train", resumed.rows_of_step(step), (TRAIN, step), config.samples_per_prompt)
        if step == first_step:
            warn_if_none_ended(found.responses, config.sampling.max_new_tokens, run.say)
        selected, unended, duplicates, low = [], 0, 0, 0
        for i, (row, samples) in enumerate(zip(found.rows, found.samples, strict=True)):
            filters = config.keep_top, config.unended, config.duplicates
            best, dropped_unended, dropped_duplicates = select(samples, found.rewards[i], *filters)
            good = [k for k in best if found.rewards[i, k] >= least]
            selected += [(row, k, samples[k], float(found.rewards[i, k])) for k in good]
            unended, duplicates = unended + dropped_unended, duplicates + dropped_duplicates
            low += int((found.rewards[i] < least).sum())
        statistics = found.statistics() | {"selected": len(selected), "dropped_low": low}
        statistics |= {"dropped_unended": unended, "dropped_duplicates": duplicates}
        if selected:
            statistics["rewards_selected"] = float(np.mean([value for *_, value in selected]))
        if statistics.get("prompts_without_spread") == 1.0:
            run.say(
                f"step {done}: all responses to a prompt have one reward, for every prompt of the step: those"
                " kept are no better than the others; look at --reward-fn or --reward-model"
            )
        run.samples(done, found.table("train_rollouts", 1, tokenizer, config.sampling.stop))
        metrics = {f"train_rollouts/{name}": value for name, value in statistics.items()}

        # update
        lr = optim.learning_rate(config.optim, step, total_steps)
        updates = []
        for first in range(0, len(selected), config.batch.global_batch_size):
            chosen = selected[first : first + config.batch.global_batch_size]
            examples = [[response_example(rows["train"][row], sample)] for row, _, sample, _ in chosen]
            tokens = sum(len(sample.ids) for _, _, sample, _ in chosen)
            if first == 0:
                trained = batching.per_example_outputs(policy, examples, config.batch)
                places = [(row, number) for row, number, _, _ in chosen]
                sampled = [sample.model_logprobs for _, _, sample, _ in chosen]
                metrics |= audit.compare(places, sampled, trained, config.model.dtype, config=config.audit)
                clock.lap("audit")
            with engine.during(f"step {done}"):
                batches = batching.micro_batches(policy, examples, config.batch)
                update = engine.forward_backward(policy, batches, loss_fn, tokens)
                updates.append(update | {"grad_norm": optim.step(optimizer, lr)})
            clock.lap("train")
        metrics |= {f"train_optim/{name}": value for name, value in mean_of(updates).items()}
        metrics |= {"train_optim/lr": lr, "train_optim/updates": len(updates)}
        times = {"timers/rollout_time": clock.total("generate", "score")}
        times["timers/train_time"] = clock.total("audit", "train")

        # evaluate
        reason = stop.reason()
        if rows["val"] and config.validates(done, total_steps):
            metrics |= validate(done)
            times["timers/validation_time"] = clock.total("generate", "score") - times["timers/rollout_time"]

        # log, then save: what a checkpoint continues has been logged
        latest |= metrics
        checkpoint.check_monitor(config.checkpoint, latest)
        run.log(done, {**metrics, **times, **clock.shares()})
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
        huggingface.save(policy, config.model.path, config.run.output / "hf", [tokenizer.save])
        run.say(f"the model is in {config.run.output / 'hf'}")
    run.close()


if __name__ == "__main__":
    launch.run(main, Config)
