"""PPO: sample responses, score them, and raise the likelihood of those better than a critic expects.

    torchrun --nproc_per_node 2 train_ppo.py --model runs/sft/hf --reward-model runs/rm/hf \
        --train-data train_prompts.jsonl --val-data test_prompts.jsonl --output runs/ppo

A step samples responses to --prompts-per-step prompts, scores them by a reward model, a function of yours
(--reward-fn module:function) or both, subtracts a KL penalty for leaving the model that training starts from
(--kl-coef), and estimates advantages with a critic, which starts as the reward model. Then each
--global-batch-size responses give one update of critic and policy, --ppo-epochs times. Policy, reference,
reward model and critic share the same processes; with --offload each phase has only those on the GPU that it
needs. Rows of data are prompts: align/data/prompts.py has the formats. OUTPUT/hf is the result. Without
arguments it runs on the built-in tiny model, which is random, and a toy task; demo.py shows one that learns.
Without a critic: train_grpo.py.

PPO: arXiv 1707.06347; with language models: 1909.08593, 2203.02155.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from torch import Tensor

from align import flags
from align.data import packing, prompts, toy
from align.data.packing import Batch
from align.data.prompts import PromptFormat
from align.distributed import launch, node, parallel
from align.errors import UserError
from align.generation import audit
from align.generation.audit import AuditConfig
from align.generation.generator import Generator, RolloutConfig, check_rollout, warn_if_none_ended
from align.generation.rollout import Rollout, TruncationConfig
from align.generation.sampling import SamplingConfig
from align.generation.tape import Tape
from align.losses import rl
from align.losses.statistics import explained_variance, moments, per_response
from align.model import adapter_files, architecture, gpt, huggingface
from align.model.config import check_model, describe_model
from align.model.lora import LoraConfig
from align.planning import estimate
from align.rewards import sources
from align.rewards.sources import RewardConfig
from align.tracking.metrics import mean_of
from align.tracking.run import RunConfig
from align.training import engine, minibatches, optim, reference
from align.training.checkpoint import CheckpointConfig
from align.training.config import CommonConfig, LoopConfig
from align.training.kl_penalty import KlConfig
from align.training.ledger import Ledger
from align.training.minibatches import Minibatches
from align.training.optim import OptimConfig
from align.training.phases import OffloadConfig
from align.training.session import Session

TRAIN, VAL = 0, 1  # random streams of the samples
ROLLOUT = ("generate", "score", "logprobs", "reference", "values")  # phases before the updates

# ---- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(CommonConfig):
    prompts_per_step: int = 64
    """prompts per rollout"""
    samples_per_prompt: int = 1
    """responses per prompt"""
    ppo_epochs: int = 1
    """PPO epochs: passes over a rollout's responses; each but the first draws its minibatches anew"""
    clip: Annotated[float, tyro.conf.arg(aliases=("--clip-low",))] = 0.2
    """PPO clip range epsilon: the ratio pi / pi_old is clipped to [1 - eps, 1 + eps]"""
    clip_high: float | None = None
    """upper clip range: the ratio is clipped to [1 - --clip, 1 + x] (DAPO's clip-higher; default: --clip)"""
    dual_clip: float | None = None
    """dual clip: largest ratio with an effect where the advantage is negative, above 1 (default: none)"""
    gamma: float = 1.0
    """discount factor of rewards per token, from 0 to 1"""
    gae_lambda: float = 0.95
    """GAE lambda: 1 = Monte Carlo returns, 0 = one-step TD"""
    whiten_advantages: bool = True
    """whiten advantages to mean 0 and variance 1 over all response tokens of the step"""
    entropy_coef: float = 0.0
    """entropy bonus coefficient, per nat and token; 0: none"""
    critic: Path | None = None
    """model that initialises the critic: a reward model, or a language model whose values start at 0
    (default: --reward-model, else --model)"""
    critic_lr: float = 1e-5
    """critic learning rate, after the same warm-up as --lr"""
    critic_min_lr: float = 1e-5
    """critic learning rate at the end"""
    critic_warmup_steps: int = 0
    """first steps, which train the critic only"""
    value_clip: float = 0.2
    """value clip range: a value is clipped to [old - x, old + x] in the critic's loss; 0: no limit"""
    audit_ratio: float | None = None
    """bound on the mean |pi / pi_old - 1| at a rollout's first update, where both are one policy, and on the
    error of its loss, relative to the mean size of a token's term (default: 1e-5 on a CPU and with
    --deterministic, else 1e-4 in fp32 and 0.1 in bf16; inf: no bound)"""
    audit: AuditConfig = AuditConfig()
    kl: KlConfig = KlConfig(kl_in="reward")
    truncation: TruncationConfig = TruncationConfig()
    reward: RewardConfig = RewardConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    offload: OffloadConfig = OffloadConfig()
    format: PromptFormat = PromptFormat()
    lora: LoraConfig = LoraConfig()
    run: RunConfig = RunConfig(output=Path("runs/ppo"))
    loop: LoopConfig = LoopConfig(val_batches=1)
    optim: OptimConfig = OptimConfig(lr=1e-6, min_lr=1e-6, warmup_steps=0)
    checkpoint: CheckpointConfig = CheckpointConfig(monitor="val_rollouts/rewards")
    plan = estimate.ppo  # for tools/plan.py

    def __post_init__(self):
        super().__post_init__()
        flags.check_ranges(
            self,
            prompts_per_step=flags.COUNT,
            samples_per_prompt=flags.SAMPLES,
            ppo_epochs=flags.REPEATS,
            clip=flags.COEFFICIENT,
            clip_high=flags.COEFFICIENT,
            dual_clip=flags.above(1, 1e6),
            gamma=flags.number(0, 1),
            gae_lambda=flags.number(0, 1),
            entropy_coef=flags.COEFFICIENT,
            critic_lr=flags.LEARNING_RATE,
            critic_min_lr=flags.LEARNING_RATE,
            critic_warmup_steps=flags.COUNT_OR_0,
            value_clip=flags.COEFFICIENT,
            audit_ratio=flags.BOUND,
        )
        responses, size = self.responses_per_step, self.batch.global_batch_size
        if responses % size:
            raise UserError(
                f"a step has {responses} responses (--prompts-per-step x --samples-per-prompt), which is no "
                f"multiple of --global-batch-size {size}, the responses of an update"
            )
        if self.train_data and not (self.reward.reward_model or self.reward.reward_fn):
            raise UserError("no reward: give --reward-model DIR or --reward-fn module:function")
        self.kl.check(self.kl_place, responses, Config.kl)
        self.truncation.check(self.sampling.max_new_tokens)
        if self.critic_min_lr > self.critic_lr:
            raise UserError(f"--critic-min-lr {self.critic_min_lr} is above --critic-lr {self.critic_lr}")
        audit.check_whole_distribution(self.sampling)

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_step

    @property
    def responses_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def kl_place(self) -> str:
        """--kl-in without "auto"."""
        return self.kl.place("reward")

    @property
    def critic_optim(self) -> OptimConfig:
        """Optimizer flags of the critic."""
        return replace(self.optim, lr=self.critic_lr, min_lr=self.critic_min_lr)

    @property
    def objective(self) -> rl.Objective:
        """PPO's, with its bounds."""
        return partial(rl.ppo, clip=self.clip, clip_high=self.clip_high, dual_clip=self.dual_clip)

    def policy_steps(self, total_steps: int) -> int:
        """Steps that train the policy. Raises UserError for none, or fewer than the schedule's."""
        if total_steps <= self.critic_warmup_steps:
            raise UserError(f"--critic-warmup-steps {self.critic_warmup_steps} leaves the policy no step")
        optim.check_optim(self.optim, total_steps - self.critic_warmup_steps)
        return total_steps - self.critic_warmup_steps

    def draws(self, step: int) -> list[list[list[int]]]:
        """Minibatches of all PPO epochs of a step, [minibatch][prompt][response]."""
        sizes = self.responses_per_step, self.samples_per_prompt, self.batch.global_batch_size
        epochs = range(self.ppo_epochs)
        return [m for epoch in epochs for m in minibatches.draw(*sizes, (self.parallel.seed, step, epoch))]


def token_statistics(
    rewards: Tensor, values: Tensor, advantages: Tensor, returns: Tensor, lengths: list[int]
) -> dict[str, float]:
    """Metrics of a rollout's tokens, [N] each; `lengths`: of its responses."""
    statistics: dict[str, float | Tensor] = {
        "rollout_size": len(lengths),
        "rewards_with_kl": per_response(rewards, lengths).mean(),
        **moments("advantages", advantages),
        **moments("returns", returns),
        **moments("values", values),
        "explained_variance": explained_variance(values, returns),
    }
    return {name: float(value) for name, value in statistics.items()}


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
    policy_steps = config.policy_steps(session.total_steps)

    # ---- models ----------------------------------------------------------------------------------
    phase, store = session.offload(estimate.resolve_offload(config))
    judges = sources.reward_sources(
        reward, config.model, config.parallel, config.batch, tokenizer, config.sampling.stop, store
    )
    options: dict[str, Any] = dict(entropy=True, entropy_grad=config.entropy_coef > 0, adapters=adapters)
    policy = gpt.build_policy(arch, config.model, config.parallel, config.sampling.temperature, **options)
    huggingface.load(policy, huggingface.open_source(config.model.path, arch, config.parallel.seed))
    adapter_files.load(policy, config.parallel.seed)
    policy = gpt.distributed(policy)
    optimizer = optim.build(policy, config.optim)
    if config.kl.kl_coef:
        ref = reference.ReferenceWeights(policy, store, config)
    phase.add("policy", policy, optimizer)
    critic_start = config.critic or reward.reward_model or config.model.path
    critic = sources.load_scorer("--critic", critic_start, config.model, config.parallel, tokenizer)
    critic = gpt.distributed(critic)
    trained = {"policy": (policy, optimizer), "critic": (critic, optim.build(critic, config.critic_optim))}
    values_as = sources.standardisation_of_values(critic_start, config.model, reward)
    phase.add("critic", *trained["critic"])
    session.say(f"the critic starts as {critic_start}")
    settings = config.rollout, config.sampling, config.model, config.parallel
    generator = Generator(policy, *settings, tokenizer, keep=not phase.enabled, tape=Tape(session))
    session.say(generator.describe())

    # ---- rollouts --------------------------------------------------------------------------------
    def rollout(name: str, numbers: Sequence[int], stream: tuple[int, ...], num_samples: int) -> Rollout:
        """Sample responses to prompts of a data set and score them; `stream`: of their random numbers."""
        chosen = [rows[name][number] for number in numbers]
        streams = [(*stream, number) for number in numbers]
        with phase("generate", policy="weights"):
            samples = generator.generate([prompt.ids for prompt in chosen], streams, num_samples)
        with phase("score"):
            scores = np.asarray(sum(judge(chosen, samples) for judge in judges))
        return Rollout(numbers, chosen, samples, scores)

    def validate(step: int) -> dict[str, float]:
        """Rewards of one response to each validation prompt, each time with the same random numbers."""
        sampled = rollout("val", range(len(rows["val"])), (VAL,), 1)
        session.samples(step, sampled.table("val_rollouts", 4, tokenizer, config.sampling.stop))
        return {f"val_rollouts/{name}": value for name, value in sampled.statistics().items()}

    # ---- losses ----------------------------------------------------------------------------------
    kl_estimator = config.kl.estimator(config.kl_place)
    is_exact = parallel.is_exact(config.parallel)
    ratio_bound = audit.ratio_bound(config.audit_ratio, config.model.dtype, is_exact)

    def policy_loss(batch: Batch, output: Tensor, kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, entropy = output.index_select(0, batch.trained).double().unbind(1)  # [n] response tokens
        old_logprobs, advantages, counted = (batch.extra[name] for name in ("old", "advantages", "counted"))
        loss, metrics = rl.policy_loss(logprobs, old_logprobs, advantages, counted, config.objective)
        entropy = (entropy * counted).sum()
        if kl_coef:
            kl = kl_estimator(*rl.only_where(counted, logprobs, batch.extra["ref"]))
            loss = loss + kl_coef * kl.sum()
        return loss - config.entropy_coef * entropy, {**metrics, "entropy": entropy}

    def value_loss(batch: Batch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        values = values_as.standardised(output.index_select(0, batch.trained)[:, 0].double())  # [n]
        return rl.value_loss(values, batch.extra["values"], batch.extra["returns"], config.value_clip)

    def update(
        name: str, loss_fn: engine.LossFn, batches: list[list[Batch]], num_tokens: Sequence[float], lr: float
    ) -> list[dict[str, float]]:
        """One update of a model for each minibatch that has a gradient."""
        model, model_optimizer = trained[name]
        updates = []
        with phase("train", **{name: "all"}), engine.during(f"step {session.done}, {name}"):
            for minibatch, count in zip(batches, num_tokens, strict=True):
                if count:
                    metrics = engine.forward_backward(model, minibatch, loss_fn, count)
                    if session.record:
                        session.record.put_update(name, model, metrics)
                    updates.append(metrics | {"grad_norm": optim.step(model_optimizer, lr), "lr": lr})
        return updates

    # ---- loop ------------------------------------------------------------------------------------
    session.resume(trained, validate if rows["val"] else None)
    for step in session.steps():
        policy_step = step - config.critic_warmup_steps
        kl_coef = config.kl.coef_after(policy_step, session.latest, config.responses_per_step)
        kl_in_reward, kl_in_loss = (kl_coef, 0.0) if config.kl_place == "reward" else (0.0, kl_coef)

        # rollout: [A] responses, whose N tokens lie end to end from here on
        sampled = rollout("train", session.rows_of_step(step), (TRAIN, step), config.samples_per_prompt)
        if step == session.continued.step:
            warn_if_none_ended(sampled.responses, config.sampling.max_new_tokens, session.say)
        audit.check_ends(sampled.places, sampled.responses, tokenizer.stop_ids, generator.sampling.stop)
        session.samples(session.done, sampled.table("train_rollouts", 1, tokenizer, config.sampling.stop))
        examples = [example for group in sampled.examples() for example in group]
        packed = Minibatches(policy, examples, config.draws(step), config.batch)
        lengths = packed.lengths

        # log-probs of policy and reference, and values, [N]
        with phase("logprobs", policy="weights"):
            old_logprobs, entropies = ref_logprobs, _ = packed.outputs(policy).unbind(1)
        if config.kl.kl_coef:
            with phase("reference", **ref.needs), ref():
                ref_logprobs = packed.outputs(policy)[:, 0]
        with phase("values", critic="weights"):
            values = values_as.standardised(packed.outputs(critic)[:, 0])
        precision = arch.vocab_size, config.model.dtype, config.sampling.temperature
        by_response = old_logprobs.split(lengths)
        metrics = audit.check_sampler(sampled, by_response, entropies, *precision, config.audit)

        # rewards, advantages and returns, [N]
        scores, counted = sampled.scores_and_counted(config.truncation, config.sampling.max_new_tokens)  # [A]
        kl = kl_estimator(old_logprobs, ref_logprobs)
        rewards = rl.token_rewards(scores, kl, lengths, kl_in_reward)
        advantages, returns = rl.gae(rewards, values, lengths, config.gamma, config.gae_lambda)
        statistics = sampled.statistics() | token_statistics(rewards, values, advantages, returns, lengths)
        if config.kl.kl_coef:
            statistics |= {"init_policy_kl": float(per_response(kl, lengths).mean()), "kl_coef": kl_coef}
        metrics |= {f"train_rollouts/{name}": value for name, value in statistics.items()}
        if config.whiten_advantages:
            advantages = rl.whiten(advantages)

        # update
        mask = rl.per_token(counted.double(), lengths)  # [N]
        tokens = {"old": old_logprobs, "ref": ref_logprobs, "advantages": advantages, "counted": mask}
        if record := session.record:
            record.put_examples(examples)
            record.put(**sampled.arrays(), rewards=rewards, values=values, returns=returns, counted=mask)
            record.put(old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, advantages=advantages)
        batches = packed.micro_batches(**tokens, values=values, returns=returns)
        lr = optim.learning_rate(config.critic_optim, step, session.total_steps)
        updates = update("critic", value_loss, batches, packed.num_tokens, lr)
        first = packed.of_first_update((values - returns).square() / 2, packed.num_tokens)
        audit.check_update(updates[0]["loss"], *first, ratio_bound)
        metrics |= {f"train_optim/critic_{name}": value for name, value in mean_of(updates).items()}
        signal = "advantages" if kl_in_loss == config.entropy_coef == 0 else "counted"
        fates = {"truncated": mask == 0, "critic_warmup": mask.new_tensor(policy_step < 0)}
        ledger = Ledger(sampled.tokens, fates | {"without_signal": tokens[signal] == 0})
        if policy_step >= 0:
            lr = optim.learning_rate(config.optim, policy_step, policy_steps)
            num_tokens = packed.tokens_with_gradient(mask, tokens[signal])
            loss_fn = ledger.counting(partial(policy_loss, kl_coef=kl_in_loss), "counted", signal)
            updates = update("policy", loss_fn, batches, num_tokens, lr)
            metrics["train_optim/skipped_updates"] = len(batches) - len(updates)
            if updates:
                terms = kl_in_loss * kl - config.entropy_coef * entropies - advantages
                first = packed.of_first_update(terms, num_tokens, mask)
                metrics |= audit.check_first_update(updates[0], *first, ratio_bound)
            else:
                reason = "advantages are 0" if counted.any() else "responses are truncated (--truncated)"
                session.say(f"step {session.done}: all {reason}, so the policy learnt nothing")
            metrics |= {f"train_optim/{name}": value for name, value in mean_of(updates).items()}
        metrics |= ledger.close(f"step {session.done}", config.ppo_epochs) | session.use_prompts(sampled.rows)
        rollout_time = metrics["timers/rollout_time"] = session.clock.total(*ROLLOUT)
        metrics["timers/train_time"] = session.clock.total("train")

        if rows["val"] and session.validates():
            metrics |= validate(session.done)
            metrics["timers/validation_time"] = session.clock.total(*ROLLOUT) - rollout_time
        session.end_step(metrics)

    session.export(policy, [tokenizer.save])


if __name__ == "__main__":
    launch.run(main, Config)
