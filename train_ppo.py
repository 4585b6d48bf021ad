"""PPO: sample answers, score them, and make those likelier that are better than expected, near the reference.

    torchrun --nproc_per_node 2 train_ppo.py --model runs/sft/hf --reward-model runs/rm/hf \
        --train-data train_prompts.jsonl --val-data test_prompts.jsonl --output runs/ppo

A step samples answers to --prompts-per-step prompts, scores them by a reward model, a function of yours
(--reward-fn module:function) or both, charges what leads away from the model that training starts from
(--kl-coef), and takes one update for each --global-batch-size answers, --ppo-epochs times. --advantages says
what "better than expected" is: gae asks a critic, which starts as the reward model; rloo and grpo compare the
--samples-per-prompt answers to a prompt; reinforce compares with all answers of the step. Policy, reference,
reward model and critic live in the same processes; with --offload each phase has only those on the GPU that
it needs. Rows of data are prompts: align/data/prompts.py has the formats. OUTPUT/hf is the result. Without
arguments it runs on the built-in tiny model, which is random, and a toy task; demo.py shows one that learns.

PPO: arXiv 1707.06347; with language models: 1909.08593, 2203.02155. RLOO: 2402.14740. GRPO: 2402.03300, here
with a mean over tokens and its KL where --kl-in says. REINFORCE with whitened rewards-to-go: 2501.03262.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from align.data import packing, prompts, toy
from align.data.packing import Batch
from align.data.prompts import PromptFormat
from align.data.tokenizer import load_tokenizer
from align.distributed import launch, parallel
from align.errors import UserError
from align.flags import (
    BOUND,
    COEFFICIENT,
    COUNT,
    COUNT_OR_0,
    LEARNING_RATE,
    REPEATS,
    SAMPLES,
    above,
    check_ranges,
    number,
    refuse_unused,
)
from align.generation import audit
from align.generation.audit import AuditConfig
from align.generation.generator import Generator, RolloutConfig, check_rollout, warn_if_none_ended
from align.generation.rollout import Rollout
from align.generation.sampling import SamplingConfig
from align.losses import rl
from align.model import architecture, gpt, huggingface
from align.model.config import check_model, describe_model
from align.rewards import sources
from align.rewards.sources import RewardConfig
from align.tracking.metrics import Clock, mean_of
from align.tracking.run import Run, RunConfig
from align.training import batching, checkpoint, continuation, engine, offload, optim, reference
from align.training.checkpoint import CheckpointConfig
from align.training.config import CommonConfig, LoopConfig
from align.training.optim import OptimConfig
from align.training.phases import OffloadConfig, Phases

TRAIN, VAL = 0, 1  # what random numbers of samples are drawn for
ROLLOUT = ("generate", "score", "logprobs", "reference", "values")  # phases before the updates
WHITENED = ("gae", "reinforce")  # --advantages that may be
KL = {"k1": rl.kl_k1, "abs": rl.kl_abs, "k2": rl.kl_k2, "k3": rl.kl_k3}

# ---- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(CommonConfig):
    advantages: Literal["gae", "rloo", "grpo", "reinforce"] = "gae"
    """advantage estimator: gae (PPO's, with a critic), or without one rloo and grpo (relative to the other
    responses to the prompt) and reinforce (relative to all)"""
    prompts_per_step: int = 64
    """prompts per rollout"""
    samples_per_prompt: int = 1
    """responses per prompt: the group size of rloo and grpo"""
    ppo_epochs: int = 1
    """PPO epochs: passes over a rollout's responses; each but the first draws its minibatches anew"""
    clip: float = 0.2
    """PPO clip range epsilon: the ratio pi / pi_old is clipped to [1 - eps, 1 + eps]"""
    gamma: float = 1.0
    """discount factor of rewards per token, from 0 to 1 (gae and reinforce)"""
    gae_lambda: float = 0.95
    """GAE lambda: 1 = Monte Carlo returns, 0 = one-step TD (gae only)"""
    whiten_advantages: bool = True
    """whiten advantages to mean 0 and variance 1 over all response tokens of the step (gae and reinforce)"""
    entropy_coef: float = 0.0
    """entropy bonus coefficient, per nat and token; 0: none"""
    unended: Literal["mask", "penalise", "keep"] = "mask"
    """truncated responses (cut off by --max-new-tokens): mask leaves them out of the policy loss (the critic
    learns from them, rloo and grpo do not compare with them), penalise subtracts a penalty, keep treats them
    like the others"""
    unended_penalty: float = 1.0
    """penalty subtracted from the reward of a truncated response (--unended penalise)"""
    kl_coef: float = 0.01
    """KL penalty coefficient beta, per nat; 0 loads no reference model"""
    kl_in: Literal["auto", "reward", "loss"] = "auto"
    """place of the KL penalty: subtracted from each token's reward, as in PPO, or added to the loss, as in
    GRPO. auto: loss with grpo, whose division by the spread of rewards would blow it up, else reward"""
    kl: Literal["auto", "k1", "abs", "k2", "k3"] = "auto"
    """KL estimator at a token, of d = log pi - log pi_ref: k1 d, abs |d|, k2 d^2 / 2, k3 exp(-d) - 1 + d.
    auto: k1 in the reward, k3 in the loss"""
    kl_target: float | None = None
    """target KL in nats per token, to which --kl-coef is adapted after each step (default: no adaptation)"""
    kl_horizon: float = 10000.0
    """horizon of the adaptive KL coefficient, in responses; above a fifth of the responses of a step"""
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
    """bound on the mean |pi / pi_old - 1| at a rollout's first update, where both are one policy (default:
    1e-5 on a CPU and with --deterministic, else 1e-4 in fp32 and 0.1 in bf16; inf: no bound)"""
    audit: AuditConfig = AuditConfig()
    reward: RewardConfig = RewardConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    offload: OffloadConfig = OffloadConfig()
    format: PromptFormat = PromptFormat()
    run: RunConfig = RunConfig(output=Path("runs/ppo"))
    loop: LoopConfig = LoopConfig(val_batches=1)
    optim: OptimConfig = OptimConfig(lr=1e-6, min_lr=1e-6, warmup_steps=0)
    checkpoint: CheckpointConfig = CheckpointConfig(monitor="val_rollouts/rewards")

    def __post_init__(self):
        super().__post_init__()
        check_ranges(
            self,
            prompts_per_step=COUNT,
            samples_per_prompt=SAMPLES,
            ppo_epochs=REPEATS,
            clip=COEFFICIENT,
            gamma=number(0, 1),
            gae_lambda=number(0, 1),
            entropy_coef=COEFFICIENT,
            unended_penalty=COEFFICIENT,
            kl_coef=COEFFICIENT,
            kl_target=above(0, 1e6),
            kl_horizon=above(0, 1e12),
            critic_lr=LEARNING_RATE,
            critic_min_lr=LEARNING_RATE,
            critic_warmup_steps=COUNT_OR_0,
            value_clip=COEFFICIENT,
            audit_ratio=BOUND,
        )
        answers, size = self.answers_per_step, self.batch.global_batch_size
        if answers % size:
            raise UserError(
                f"a step has {answers} answers (--prompts-per-step x --samples-per-prompt), which is no "
                f"multiple of --global-batch-size {size}, the answers of an update"
            )
        if self.train_data and not (self.reward.reward_model or self.reward.reward_fn):
            raise UserError("what is a good answer? Give --reward-model DIR or --reward-fn module:function")
        if self.advantages in ("rloo", "grpo") and self.samples_per_prompt == 1:
            raise UserError(
                f"--advantages {self.advantages} compares the answers to a prompt: give --samples-per-prompt"
            )
        if self.kl_target is not None and self.kl_horizon * 5 <= self.answers_per_step:
            raise UserError(
                f"--kl-horizon {self.kl_horizon} must be above a fifth of the {self.answers_per_step} "
                "answers of a step: --kl-coef could fall below 0"
            )
        if self.kl_place == "loss" and self.kl == "k1":
            raise UserError("--kl k1 in the loss: its gradient averages to 0; give --kl k2 or k3")
        if self.critic_min_lr > self.critic_lr:
            raise UserError(f"--critic-min-lr {self.critic_min_lr} is above --critic-lr {self.critic_lr}")
        self.check_used()

    def check_used(self) -> None:
        """Refuse flags without effect beside others, and samplers whose log-probs training cannot say."""
        kind = f"--advantages {self.advantages}"
        if self.advantages != "gae":
            names = "gae_lambda critic critic_lr critic_min_lr critic_warmup_steps value_clip"
            refuse_unused(self, Config, names, f"with {kind}, which has no critic")
        if self.advantages not in WHITENED:
            why = f"with {kind}, which takes whole responses"
            refuse_unused(self, Config, "gamma whiten_advantages", why)
        if self.kl_coef == 0:
            refuse_unused(self, Config, "kl kl_in kl_target", "with --kl-coef 0: there is no reference")
        if self.kl_target is None:
            refuse_unused(self, Config, "kl_horizon", "without --kl-target")
        if self.unended != "penalise":
            refuse_unused(self, Config, "unended_penalty", f"with --unended {self.unended}")
        for name in ("top_k", "top_p", "min_p", "repetition_penalty", "greedy"):
            if getattr(self.sampling, name) != getattr(SamplingConfig, name):
                raise UserError(
                    f"--{name.replace('_', '-')}: PPO's log-probs are those of the whole distribution at "
                    "--temperature; tokens drawn from another one would be weighed wrongly"
                )

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_step

    @property
    def answers_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def kl_place(self) -> str:
        """--kl-in without "auto"."""
        return {"auto": "loss" if self.advantages == "grpo" else "reward"}.get(self.kl_in, self.kl_in)

    @property
    def kl_estimator(self) -> Callable[[Tensor, Tensor], Tensor]:
        """KL estimator that --kl names."""
        return KL[{"auto": "k3" if self.kl_place == "loss" else "k1"}.get(self.kl, self.kl)]

    def kl_coef_after(self, done: int, latest: dict[str, float]) -> float:
        """The price of KL after `done` steps, whose last one `latest` knows."""
        if self.kl_target is None or done < self.critic_warmup_steps + 2:
            return self.kl_coef  # no KL was seen yet: the last policy that sampled was the reference
        kl_coef, kl = (latest[f"train_rollouts/{name}"] for name in ("kl_coef", "init_policy_kl"))
        return rl.adapted_kl_coef(kl_coef, kl, self.kl_target, self.kl_horizon, self.answers_per_step)

    def minibatches(self, step: int, epoch: int) -> list[list[list[int]]]:
        """Draw the updates of a PPO epoch: [update][prompt][response], responses by number in the rollout.

        Epoch 0 goes through the rollout in its order, in the micro-batches in which old log-probs and values
        are computed: so the ratio of the first update is 1 to the last bit. Each later one has a permutation
        of its own, which follows from --seed, step and epoch, and is the same in every layout.
        """
        numbers = np.arange(self.answers_per_step)
        if epoch > 0:
            numbers = np.random.default_rng([self.parallel.seed, step, epoch]).permutation(numbers)
        updates = np.sort(numbers.reshape(-1, self.batch.global_batch_size), 1).tolist()
        size = self.samples_per_prompt
        return [[list(group) for _, group in groupby(update, lambda n: n // size)] for update in updates]


def advantages_of(
    config: Config, rewards: Tensor, values: Tensor, lengths: list[int], counted: Tensor
) -> tuple[Tensor, Tensor]:
    """Advantages [N] of the answers' tokens, not whitened, and returns [N], which a critic learns.

    Args:
        rewards, values: [N] of the tokens, the answers end to end; values are 0 without a critic.
        lengths: [A] tokens of each answer.
        counted: [A] bool, answers that the policy learns from.
    """
    if config.advantages == "gae":
        return rl.gae(rewards, values, lengths, config.gamma, config.gae_lambda)
    if config.advantages == "reinforce":  # what is earned from here on
        return rl.gae(rewards, values, lengths, config.gamma, 1.0)
    returns = torch.stack([part.sum() for part in rewards.split(lengths)])  # [A]
    groups = (-1, config.samples_per_prompt)
    compare = rl.rloo if config.advantages == "rloo" else rl.grpo
    advantages = compare(returns.view(groups), counted.view(groups)).view(-1)
    return expand(advantages, lengths), expand(returns, lengths)


def reorder(x: Tensor, lengths: list[int], order: Sequence[int]) -> Tensor:
    """[N] numbers of tokens, the responses end to end, with the responses in another order."""
    parts = x.split(lengths)
    return torch.cat([parts[number] for number in order])


def expand(x: Tensor, lengths: list[int]) -> Tensor:
    """[A] numbers of answers as [N] of their tokens."""
    return x.repeat_interleave(torch.tensor(lengths))


def tokens_with_gradient(counted: Tensor, signal: Tensor, sizes: list[int]) -> list[float]:
    """Count the tokens that each update trains: 0 for an update whose gradient is 0.

    Such an update takes no optimizer step, in which Adam's momentum and weight decay would move the weights.

    Args:
        counted: [N] 1 for tokens that the policy learns from, else 0.
        signal: [N] the factor of a token's gradient: its advantage, or `counted` if the loss has more terms.
        sizes: tokens of each update, in sum N.
    """
    has_gradient = [bool(part.any()) for part in (counted * signal).split(sizes)]
    return [float(part.sum()) * has for part, has in zip(counted.split(sizes), has_gradient, strict=True)]


def moments(name: str, x: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation of numbers of tokens."""
    return {f"{name}_mean": x.mean(), f"{name}_std": x.std(correction=0)}


def by_answer(x: Tensor, lengths: list[int]) -> Tensor:
    """[N] numbers of tokens as [A] means over those of each answer."""
    return torch.stack([part.mean() for part in x.split(lengths)])


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
    if config.critic_warmup_steps >= total_steps:
        raise UserError(
            f"--critic-warmup-steps {config.critic_warmup_steps} leaves the policy no step of {total_steps}"
        )
    policy_steps = total_steps - config.critic_warmup_steps
    optim.check_optim(config.optim, policy_steps)
    critic_optim = replace(config.optim, lr=config.critic_lr, min_lr=config.critic_min_lr)
    run.total_steps = total_steps

    # ---- models ----------------------------------------------------------------------------------
    clock, store = Clock(), config.offload.store(config.run.output)
    phase = Phases(clock, run.say, store, config.offload.enabled)
    judges = sources.reward_sources(
        reward, config.model, config.parallel, config.batch, tokenizer, config.sampling.stop, store
    )
    policy = gpt.build_policy(
        arch, config.model, config.parallel, temperature=config.sampling.temperature, entropy=True
    )
    huggingface.load(policy, huggingface.open_source(config.model.path, arch, config.parallel.seed))
    policy = gpt.distributed(policy)
    optimizer = optim.build(policy, config.optim)
    if config.kl_coef:
        reference.check_same(config.run.output, config.model.path, config.checkpoint)
        ref = offload.Weights(policy.module, store)
    phase.add("policy", policy, optimizer)
    trained = {"policy": (policy, optimizer)}
    if config.advantages == "gae":
        start = config.critic or reward.reward_model or config.model.path
        critic = sources.load_scorer("--critic", start, config.model, config.parallel, tokenizer)
        is_new = not architecture.read_config(replace(config.model, model=str(start)).path).labels
        values_as = (
            RewardConfig() if is_new else reward
        )  # a reward model's values are standardised as rewards
        critic = gpt.distributed(critic)
        critic_optimizer = optim.build(critic, critic_optim)
        phase.add("critic", critic, critic_optimizer)
        trained["critic"] = (critic, critic_optimizer)
        run.say(f"the critic starts as {start}")
    generator = Generator(policy, config.rollout, config.sampling, config.model, config.parallel, tokenizer)
    run.say(generator.describe())

    # ---- rollouts --------------------------------------------------------------------------------
    def rollout(name: str, numbers: Sequence[int], stream: tuple[int, ...], answers: int) -> Rollout:
        """Sample answers to some prompts of a data set and score them; `stream`: of their random numbers."""
        chosen = [rows[name][number] for number in numbers]
        streams = [(*stream, number) for number in numbers]
        with phase("generate", policy="weights"):
            samples = generator.generate([prompt.ids for prompt in chosen], streams, answers)
        with phase("score"):
            scores = sum(judge(chosen, samples) for judge in judges)
        return Rollout(numbers, chosen, samples, scores)

    def validate(step: int) -> dict[str, float]:
        """Rewards of one answer to each validation prompt, each time with the same random numbers."""
        found = rollout("val", range(len(rows["val"])), (VAL,), 1)
        run.samples(step, found.table("val_rollouts", 4, tokenizer, config.sampling.stop))
        return {f"val_rollouts/{name}": value for name, value in found.statistics().items()}

    # ---- losses ----------------------------------------------------------------------------------
    ratio_bound = config.audit_ratio
    if ratio_bound is None:
        ratio_bound = audit.ratio_bound(config.model.dtype, parallel.is_exact(config.parallel))

    def policy_loss(batch: Batch, output: Tensor, kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, entropy = output[batch.mask.bool()].double().unbind(1)  # [n] tokens of answers
        old, advantages, counted = (batch.extra[name] for name in ("old", "advantages", "counted"))
        loss, metrics = rl.policy_loss(logprobs, old, advantages, counted, config.clip)
        entropy = (entropy * counted).sum()
        if kl_coef:
            kl = config.kl_estimator(logprobs, batch.extra["ref"])
            loss = loss + kl_coef * kl[counted.bool()].sum()
        return loss - config.entropy_coef * entropy, {**metrics, "entropy": entropy}

    def value_loss(batch: Batch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        values = values_as.standardised(output[batch.mask.bool()][:, 0].double())  # [n]
        return rl.value_loss(values, batch.extra["values"], batch.extra["returns"], config.value_clip)

    def update(
        name: str, loss_fn: engine.LossFn, batches: list[list[Batch]], tokens: list[float], lr: float
    ) -> list[dict[str, float]]:
        """Updates of a model, one for each list of micro-batches whose loss is about any tokens."""
        one_model, its_optimizer = trained[name]
        found = []
        with phase("train", **{name: "all"}), engine.during(f"step {done}, {name}"):
            for mine, count in zip(batches, tokens, strict=True):
                if count:
                    metrics = engine.forward_backward(one_model, mine, loss_fn, count)
                    found.append(metrics | {"grad_norm": optim.step(its_optimizer, lr), "lr": lr})
        return found

    # ---- resume ----------------------------------------------------------------------------------
    others = {name: pair for name, pair in trained.items() if name != "policy"}
    first_step, latest = checkpoint.resume(
        *(resumed.checkpoint, policy, optimizer, others),
        during=lambda name: phase("load", **{name: "all"}),
    )
    run.resume_at(first_step)
    if first_step:
        run.say(resumed.describe())
    elif rows["val"]:
        latest = validate(0)
        run.log(0, latest)
    checkpoint.check_monitor(config.checkpoint, latest)

    # ---- loop ------------------------------------------------------------------------------------
    clock.shares(), phase.memory()  # what came before the first step is not its own
    reason = None
    for step in range(first_step, total_steps):
        done, kl_coef = step + 1, config.kl_coef_after(step, latest)
        in_reward, in_loss = (kl_coef, 0.0) if config.kl_place == "reward" else (0.0, kl_coef)

        # rollout: [A] answers; their N tokens lie end to end from here on
        found = rollout("train", resumed.rows_of_step(step), (TRAIN, step), config.samples_per_prompt)
        if step == first_step:
            warn_if_none_ended(found.responses, config.sampling.max_new_tokens, run.say)
        run.samples(done, found.table("train_rollouts", 1, tokenizer, config.sampling.stop))
        lengths = [len(sample.ids) for sample in found.responses]
        ended = torch.tensor([sample.finish == "stop" for sample in found.responses])
        examples = [example for examples in found.examples() for example in examples]
        draws = [draw for epoch in range(config.ppo_epochs) for draw in config.minibatches(step, epoch)]
        by_prompt = [[[examples[number] for number in group] for group in draw] for draw in draws]
        updates = [batching.pack_responses(policy, groups, config.batch) for groups in by_prompt]
        in_order = updates[: len(updates) // config.ppo_epochs]

        # what the models say of each token, [N]
        with phase("logprobs", policy="weights"):
            old = batching.per_token_outputs(policy, in_order, config.batch)[:, 0]
        sampled = [sample.logprobs for sample in found.responses]
        computed = [part.numpy() for part in old.split(lengths)]
        stop_texts = (*config.sampling.stop, *tokenizer.stop_strings)
        audit.check_ends(found.places, found.responses, tokenizer.stop_ids, stop_texts)
        metrics = audit.compare(
            *(found.places, sampled, computed, config.model.dtype, config.sampling.temperature),
            config=config.audit,
        )
        ref_logprobs, values = old, torch.zeros_like(old)
        if config.kl_coef:
            with phase("reference"), ref.swapped_into(policy.module):
                ref_logprobs = batching.per_token_outputs(policy, in_order, config.batch)[:, 0]
        if "critic" in trained:
            with phase("values", critic="weights"):
                values = values_as.standardised(
                    batching.per_token_outputs(critic, in_order, config.batch)[:, 0]
                )

        # rewards, advantages and returns of each token, [N]
        scores = torch.from_numpy(found.rewards).view(-1)  # [A]
        if config.unended == "penalise":
            scores = scores - config.unended_penalty * ended.logical_not().double()
        counted = ended if config.unended == "mask" else torch.ones_like(ended)  # [A]
        kl = config.kl_estimator(old, ref_logprobs)
        token_rewards = rl.token_rewards(scores, kl, lengths, in_reward)
        advantages, returns = advantages_of(config, token_rewards, values, lengths, counted)
        statistics = found.statistics() | {
            "rollout_size": len(lengths),
            "rewards_with_kl": by_answer(token_rewards, lengths).mean(),
            **moments("advantages", advantages),
        }
        if config.kl_coef:
            statistics |= {"init_policy_kl": by_answer(kl, lengths).mean(), "kl_coef": kl_coef}
        if "critic" in trained:
            statistics |= moments("returns", returns) | moments("values", values)
            statistics["explained_variance"] = rl.explained_variance(values, returns)
        metrics |= {f"train_rollouts/{name}": float(value) for name, value in statistics.items()}
        if config.whiten_advantages and config.advantages in WHITENED:
            advantages = rl.whiten(advantages)

        # update
        known = {"old": old, "ref": ref_logprobs, "values": values, "returns": returns}
        known |= {"advantages": advantages, "counted": expand(counted.double(), lengths)}
        order = [number for draw in draws for group in draw for number in group]
        known = {name: reorder(x, lengths, order) for name, x in known.items()}
        batches = batching.micro_batches_with_tokens(policy, updates, config.batch, known)
        part_lengths = [sum(packing.num_trained(row) for row in rows_of_update) for rows_of_update in updates]
        if "critic" in trained:
            lr = optim.learning_rate(critic_optim, step, total_steps)
            made = update("critic", value_loss, batches, part_lengths, lr)
            metrics |= {f"train_optim/critic_{name}": value for name, value in mean_of(made).items()}
        if (policy_step := step - config.critic_warmup_steps) >= 0:
            lr = optim.learning_rate(config.optim, policy_step, policy_steps)
            loss_fn = partial(policy_loss, kl_coef=in_loss)
            signal = known["advantages"] if in_loss == config.entropy_coef == 0 else known["counted"]
            num_counted = tokens_with_gradient(known["counted"], signal, part_lengths)
            made = update("policy", loss_fn, batches, num_counted, lr)
            metrics["train_optim/skipped_updates"] = len(updates) - len(made)
            if made:
                metrics |= audit.check_ratio(made[0]["ratio_error"], ratio_bound)
            elif counted.any():
                run.say(f"step {done}: all advantages are 0, so the policy learnt nothing")
            else:
                run.say(f"step {done}: no answer ended, so the policy learnt nothing; see --unended")
            metrics |= {f"train_optim/{name}": value for name, value in mean_of(made).items()}
        times = {"timers/rollout_time": clock.total(*ROLLOUT), "timers/train_time": clock.total("train")}

        # evaluate
        reason = stop.reason()
        if rows["val"] and config.validates(done, total_steps):
            metrics |= validate(done)
            times["timers/validation_time"] = clock.total(*ROLLOUT) - times["timers/rollout_time"]

        # log, then save: what a checkpoint continues has been logged
        latest |= metrics
        checkpoint.check_monitor(config.checkpoint, latest)
        run.log(done, {**metrics, **times, **clock.shares(), **phase.memory()})
        if checkpoint.is_due(config.checkpoint, done) or done == total_steps or reason:
            with checkpoint.saving(config.checkpoint, config.run.output, done, latest, resumed.state) as path:
                for name, (one_model, its_optimizer) in trained.items():
                    with phase("save", **{name: "all"}):  # counted in the next step's line
                        folder = path if name == "policy" else path / name
                        checkpoint.write(folder, done, one_model, its_optimizer)
        if reason:
            break

    # ---- end -------------------------------------------------------------------------------------
    if reason and done < total_steps:
        run.say(f"{reason}: stopped after step {done} of {total_steps}; the same command continues")
    else:
        with phase("export", policy="weights"):
            huggingface.save(policy, config.model.path, config.run.output / "hf", [tokenizer.save])
        run.say(f"the model is in {config.run.output / 'hf'}")
    run.close()


if __name__ == "__main__":
    launch.run(main, Config)
