"""Rejection sampling: sample several responses to each prompt, keep the best, train on them, and repeat.

    torchrun --nproc_per_node 2 train_rs.py --model runs/sft/hf --reward-model runs/rm/hf \
        --train-data train_prompts.jsonl --val-data test_prompts.jsonl --output runs/rs

A step samples --samples-per-prompt responses to --prompts-per-step prompts, scores them by a reward model or
by a function of yours (--reward-fn module:function), and keeps of each prompt the --keep-top best, on which
it takes steps of supervised fine-tuning, --global-batch-size responses in each. Rows of data are prompts:
align/data/prompts.py has the formats. OUTPUT/hf is the result. Without arguments it runs on the built-in tiny
model, which is random: all its responses to the toy task are worth 0, and the log says so in each step;
demo.py shows a model that learns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from torch import Tensor

from align.data import packing, prompts, toy
from align.data.packing import Batch
from align.data.prompts import PromptFormat
from align.distributed import launch, node, parallel
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
from align.generation.tape import Tape
from align.losses import supervised
from align.model import adapter_files, architecture, gpt, huggingface
from align.model.config import check_model, describe_model
from align.model.lora import LoraConfig
from align.planning import estimate
from align.rewards import sources
from align.rewards.sources import RewardConfig
from align.tracking.metrics import mean_of
from align.tracking.run import RunConfig
from align.training import batching, engine, ledger, optim
from align.training.checkpoint import CheckpointConfig
from align.training.config import CommonConfig, LoopConfig
from align.training.ledger import Ledger
from align.training.optim import OptimConfig
from align.training.session import Session

TRAIN, VAL = 0, 1  # random streams of the samples
FATES = ("truncated", "duplicate", "low", "not_selected")  # of responses that are not trained on

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
    truncated: Annotated[Literal["drop", "keep"], tyro.conf.arg(aliases=("--unended",))] = "drop"
    """truncated responses (cut off by --max-new-tokens): drop never trains on them, keep treats them like the
    others"""
    duplicates: Literal["drop", "keep"] = "drop"
    """responses to a prompt with the same tokens: drop counts only the first, keep all"""
    reward: RewardConfig = RewardConfig()
    audit: AuditConfig = AuditConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    format: PromptFormat = PromptFormat()
    lora: LoraConfig = LoraConfig()
    run: RunConfig = RunConfig(output=Path("runs/rs"))
    loop: LoopConfig = LoopConfig(val_batches=1)
    optim: OptimConfig = OptimConfig(lr=1e-6, min_lr=1e-6, warmup_steps=0)
    checkpoint: CheckpointConfig = CheckpointConfig(monitor="val_rollouts/rewards")
    plan = estimate.rejection_sampling  # for tools/plan.py

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
                f"--keep-top {self.keep_top} is above --samples-per-prompt {self.samples_per_prompt}"
            )
        if self.train_data and not (self.reward.reward_model or self.reward.reward_fn):
            raise UserError("no reward: give --reward-model DIR or --reward-fn module:function")
        if self.sampling.greedy and self.samples_per_prompt > 1:
            raise UserError("--greedy gives the same response every time: leave it out")

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_step


def select(
    samples: list[Sample], rewards: np.ndarray, keep_top: int, truncated: str, duplicates: str
) -> tuple[list[int], list[str]]:
    """Numbers of the best responses to one prompt, at most keep_top, best first; `rewards`: [n].

    Then the fate of each response, one of FATES, or "" for the best ones. A response is a duplicate if it has
    the tokens of an earlier one.
    """
    whole = [k for k, sample in enumerate(samples) if truncated == "keep" or sample.finish == "stop"]
    first = {samples[k].ids.tobytes(): k for k in reversed(whole)}
    distinct = whole if duplicates == "keep" else sorted(first.values())
    best = sorted(distinct, key=lambda k: -rewards[k])[:keep_top]  # stable: of equal ones the first
    sets = {"": best, "not_selected": distinct, "duplicate": whole, "truncated": range(len(samples))}
    return best, [next(fate for fate in sets if k in sets[fate]) for k in range(len(samples))]


def select_step(config: Config, sampled: Rollout) -> tuple[list[tuple[int, int]], dict[str, float], Ledger]:
    """(prompt, response) of a rollout to train on, by number, statistics of both, and the ledger."""
    least = -math.inf if config.min_reward is None else config.min_reward
    selected: list[tuple[int, int]] = []
    fates: list[str] = []
    rules = config.keep_top, config.truncated, config.duplicates
    for i, (samples, rewards) in enumerate(zip(sampled.samples, sampled.rewards, strict=True)):
        best, fates_of_prompt = select(samples, rewards, *rules)
        selected += [(i, k) for k in best if rewards[k] >= least]
        fates += fates_of_prompt
    statistics = sampled.statistics() | {
        "selected": len(selected),
        "dropped_low": int((sampled.rewards < least).sum()),
        "dropped_truncated": fates.count("truncated"),
        "dropped_duplicates": fates.count("duplicate"),
    }
    if selected:
        statistics["rewards_selected"] = float(np.mean([float(sampled.rewards[i, k]) for i, k in selected]))
    is_low = (sampled.rewards < least).reshape(-1).tolist()
    dropped = ("truncated", "duplicate")
    fates = ["low" if low and fate not in dropped else fate for low, fate in zip(is_low, fates, strict=True)]
    return selected, statistics, Ledger(sampled.tokens, ledger.per_token(fates, sampled.tokens, FATES))


def main(config: Config) -> None:
    # ---- setup and checks ------------------------------------------------------------------------
    arch = architecture.read_config(config.model.path)
    adapters = adapter_files.read(config.lora, arch)
    check_model(arch, config.model, config.parallel, adapters=adapters)
    check_rollout(arch, config.rollout, config.sampling, config.model, config.parallel, adapters)
    prompts.check_lengths(config.format, config.sampling.max_new_tokens, config.batch, arch.max_positions)
    session = Session(config, __file__)
    session.say(f"{parallel.layout()}; {describe_model(arch, config.model, adapters=adapters)}")

    # ---- data ------------------------------------------------------------------------------------
    reward = config.reward.resolved(is_toy=not config.train_data)
    session.say(reward.describe())
    files, tokenizer = config.files(toy.write), session.load_tokenizer()
    sources.warn_of_other_ends(reward, tokenizer, session.say)
    load = partial(prompts.load_sets, files, tokenizer, config.format, arch.vocab_size, session.say)
    rows = node.once(load)
    packing.check_size(len(rows["train"]), config.prompts_per_step, "--train-data", "--prompts-per-step")
    rows["val"] = rows["val"][config.val_rows()]
    session.find_checkpoint([prompt.ids] for prompt in rows["train"])

    # ---- model -----------------------------------------------------------------------------------
    judges = sources.reward_sources(
        reward, config.model, config.parallel, config.batch, tokenizer, config.sampling.stop
    )
    policy = gpt.build_policy(arch, config.model, config.parallel, adapters=adapters)
    huggingface.load(policy, huggingface.open_source(config.model.path, arch, config.parallel.seed))
    adapter_files.load(policy, config.parallel.seed)
    policy = gpt.distributed(policy)
    optimizer = optim.build(policy, config.optim)
    settings = config.rollout, config.sampling, config.model, config.parallel
    generator = Generator(policy, *settings, tokenizer, tape=Tape(session))
    session.say(generator.describe())

    # ---- rollouts --------------------------------------------------------------------------------
    def rollout(name: str, numbers: Sequence[int], stream: tuple[int, ...], num_samples: int) -> Rollout:
        """Sample responses to prompts of a data set and score them; `stream`: of their random numbers."""
        chosen = [rows[name][number] for number in numbers]
        streams = [(*stream, number) for number in numbers]
        samples = generator.generate([prompt.ids for prompt in chosen], streams, num_samples)
        clock.lap("generate")
        scores = np.asarray(sum(judge(chosen, samples) for judge in judges))
        clock.lap("score")
        return Rollout(numbers, chosen, samples, scores)

    def validate(step: int) -> dict[str, float]:
        """Rewards of one response to each validation prompt, each time with the same random numbers."""
        sampled = rollout("val", range(len(rows["val"])), (VAL,), 1)
        session.samples(step, sampled.table("val_rollouts", 4, tokenizer, config.sampling.stop))
        return {f"val_rollouts/{name}": value for name, value in sampled.statistics().items()}

    # ---- loss ------------------------------------------------------------------------------------
    def loss_fn(batch: Batch, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return supervised.sft_loss(logprobs, batch.mask), {}

    # ---- loop ------------------------------------------------------------------------------------
    clock = session.clock
    session.resume({"policy": (policy, optimizer)}, validate if rows["val"] else None)
    for step in session.steps():
        # rollout
        sampled = rollout("train", session.rows_of_step(step), (TRAIN, step), config.samples_per_prompt)
        if step == session.continued.step:
            warn_if_none_ended(sampled.responses, config.sampling.max_new_tokens, session.say)
        selected, statistics, tokens_of_step = select_step(config, sampled)
        if statistics.get("prompts_without_spread") == 1.0:
            session.say(
                f"step {session.done}: all responses to a prompt have one reward, for every prompt of the "
                "step: those kept are no better than the others; look at --reward-fn or --reward-model"
            )
        session.samples(session.done, sampled.table("train_rollouts", 1, tokenizer, config.sampling.stop))
        metrics = {f"train_rollouts/{name}": value for name, value in statistics.items()}

        if record := session.record:
            record.put_examples(list(chain(*sampled.examples())))
            numbers = [i * config.samples_per_prompt + k for i, k in selected]
            record.put(**sampled.arrays(), selected=np.array(numbers, np.int64))

        # update
        updates, lr = [], optim.learning_rate(config.optim, step, session.total_steps)
        for first in range(0, len(selected), config.batch.global_batch_size):
            chosen = selected[first : first + config.batch.global_batch_size]
            samples = [sampled.samples[i][k] for i, k in chosen]
            examples = [[response_example(sampled.prompts[i], sampled.samples[i][k])] for i, k in chosen]
            tokens = sum(len(sample.ids) for sample in samples)
            if first == 0:
                trained = batching.per_example_outputs(policy, examples, config.batch)
                places = [(sampled.rows[i], k) for i, k in chosen]
                logprobs = [sample.model_logprobs for sample in samples]
                metrics |= audit.compare(places, logprobs, trained, config.model.dtype, config=config.audit)
                clock.lap("audit")
                if record:
                    record.put(logprobs=np.concatenate(trained))
            with engine.during(f"step {session.done}"):
                batches = batching.micro_batches(policy, examples, config.batch)
                counting = tokens_of_step.counting(loss_fn)
                update = engine.forward_backward(policy, batches, counting, tokens)
                if record:
                    record.put_update("policy", policy, update)
                updates.append(update | {"grad_norm": optim.step(optimizer, lr)})
            clock.lap("train")
        metrics |= {f"train_optim/{name}": value for name, value in mean_of(updates).items()}
        metrics |= {"train_optim/lr": lr, "train_optim/updates": len(updates)}
        metrics |= tokens_of_step.close(f"step {session.done}") | session.use_prompts(sampled.rows)
        rollout_time = metrics["timers/rollout_time"] = clock.total("generate", "score")
        metrics["timers/train_time"] = clock.total("audit", "train")

        # evaluate
        if rows["val"] and session.validates():
            metrics |= validate(session.done)
            metrics["timers/validation_time"] = clock.total("generate", "score") - rollout_time
        session.end_step(metrics)

    session.export(policy, [tokenizer.save])


if __name__ == "__main__":
    launch.run(main, Config)
