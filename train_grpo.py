"""GRPO, RLOO and REINFORCE: policy gradients without a critic; responses are compared with one another.

    torchrun --nproc_per_node 2 train_grpo.py --model runs/sft/hf --reward-fn rewards:correct \
        --train-data train_prompts.jsonl --val-data test_prompts.jsonl --output runs/grpo

A step samples --samples-per-prompt responses to --prompts-per-step prompts, scores them by a reward model, a
function of yours (--reward-fn module:function) or both, and estimates advantages: grpo and rloo compare the
responses to a prompt, reinforce all responses of the step. A KL penalty for leaving the model that training
starts from (--kl-coef) is in the loss or in the reward. Then each --global-batch-size responses give one
update of the policy, --ppo-epochs times. Policy, reference and reward model share the same processes; with
--offload each phase has only those on the GPU that it needs. Rows of data are prompts: align/data/prompts.py
has the formats. OUTPUT/hf is the result. Without arguments it runs on the built-in tiny model, which is
random, and a toy task; demo.py shows one that learns. With a critic: train_ppo.py.

GRPO: arXiv 2402.03300, here with a mean over tokens and its KL where --kl-in says. RLOO: 2402.14740.
REINFORCE with whitened rewards-to-go: 2501.03262.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
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
from align.losses.statistics import moments, per_response
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
ROLLOUT = ("generate", "score", "logprobs", "reference")  # phases before the updates
OBJECTIVES: dict[str, tuple[Callable, str]] = {  # by --objective: the function and its flags
    "ppo": (rl.ppo, "clip clip_high dual_clip"),
    "cispo": (rl.cispo, "clip clip_high"),
    "sapo": (rl.sapo, "tau_positive tau_negative"),
}

# ---- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(CommonConfig):
    advantages: Literal["grpo", "rloo", "reinforce"] = "grpo"
    """advantage estimator: grpo and rloo (relative to the other responses to the prompt) or reinforce
    (relative to all responses of the step)"""
    prompts_per_step: int = 16
    """prompts per rollout"""
    samples_per_prompt: int = 8
    """responses per prompt: the group size of grpo and rloo"""
    ppo_epochs: int = 1
    """PPO epochs: passes over a rollout's responses; each but the first draws its minibatches anew"""
    objective: Literal[tuple(OBJECTIVES)] = "ppo"  # type: ignore[valid-type]
    """objective, the function of that name in align/losses/rl.py: ppo (clipped ratio), cispo (REINFORCE with
    a clipped importance weight) or sapo (soft gate)"""
    ratio: Literal["token", "sequence"] = "token"
    """importance ratio pi / pi_old: of each token, or the geometric mean over a response (GSPO)"""
    clip: Annotated[float, tyro.conf.arg(aliases=("--clip-low",))] = 0.2
    """PPO clip range epsilon: the ratio pi / pi_old is clipped to [1 - eps, 1 + eps]"""
    clip_high: float | None = None
    """upper clip range: the ratio is clipped to [1 - --clip, 1 + x] (DAPO's clip-higher; default: --clip)"""
    dual_clip: float | None = None
    """dual clip: largest ratio with an effect where the advantage is negative, above 1 (default: none)"""
    tau_positive: float = 1.0
    """SAPO temperature of tokens with a positive advantage"""
    tau_negative: float = 1.05
    """SAPO temperature of the other tokens"""
    aggregate: Literal["token", "response", "constant"] = "token"
    """mean of the loss: over all tokens of an update, over responses of their tokens' means (GRPO's paper),
    or over responses of their tokens' sums by --max-new-tokens (Dr. GRPO)"""
    advantage_scale: Literal["prompt", "batch", "none"] = "prompt"
    """divisor of grpo's advantages: std of the rewards of the prompt, of all prompts of the step, or none
    (Dr. GRPO)"""
    gamma: float = 1.0
    """discount factor of rewards per token, from 0 to 1 (reinforce)"""
    whiten_advantages: bool = True
    """whiten advantages to mean 0 and variance 1 over all response tokens of the step (reinforce)"""
    entropy_coef: float = 0.0
    """entropy bonus coefficient, per nat and token; 0: none"""
    audit_ratio: float | None = None
    """bound on the mean |pi / pi_old - 1| at a rollout's first update, where both are one policy, and on the
    error of its loss, relative to the mean size of a token's term (default: 1e-5 on a CPU and with
    --deterministic, else 1e-4 in fp32 and 0.1 in bf16; inf: no bound)"""
    audit: AuditConfig = AuditConfig()
    kl: KlConfig = KlConfig()
    truncation: TruncationConfig = TruncationConfig()
    reward: RewardConfig = RewardConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    offload: OffloadConfig = OffloadConfig()
    format: PromptFormat = PromptFormat()
    lora: LoraConfig = LoraConfig()
    run: RunConfig = RunConfig(output=Path("runs/grpo"))
    loop: LoopConfig = LoopConfig(val_batches=1)
    optim: OptimConfig = OptimConfig(lr=1e-6, min_lr=1e-6, warmup_steps=0)
    checkpoint: CheckpointConfig = CheckpointConfig(monitor="val_rollouts/rewards")
    plan = estimate.grpo  # for tools/plan.py

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
            tau_positive=flags.SCALE,
            tau_negative=flags.SCALE,
            gamma=flags.number(0, 1),
            entropy_coef=flags.COEFFICIENT,
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
        if self.advantages != "reinforce" and self.samples_per_prompt == 1:
            raise UserError(
                f"--advantages {self.advantages} compares the responses to a prompt: give "
                "--samples-per-prompt 2 or more"
            )
        self.kl.check(self.kl_place, responses, Config.kl)
        self.truncation.check(self.sampling.max_new_tokens)
        self.refuse_unused()
        audit.check_whole_distribution(self.sampling)

    def refuse_unused(self) -> None:
        """Refuse flags that have no effect beside the others."""
        if self.advantages != "reinforce":
            why = f"with --advantages {self.advantages}, which takes whole responses"
            flags.refuse_unused(self, Config, "gamma whiten_advantages", why)
        if self.advantages != "grpo":
            flags.refuse_unused(self, Config, "advantage_scale", f"with --advantages {self.advantages}")
        names = " ".join(names for _, names in OBJECTIVES.values())
        for name in set(names.split()) - set(OBJECTIVES[self.objective][1].split()):
            flags.refuse_unused(self, Config, name, f"with --objective {self.objective}")

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_step

    @property
    def responses_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def kl_place(self) -> str:
        """--kl-in without "auto"."""
        return self.kl.place("loss" if self.advantages == "grpo" else "reward")

    @property
    def policy_objective(self) -> rl.Objective:
        """Objective that --objective names, with its bounds."""
        function, names = OBJECTIVES[self.objective]
        return partial(function, **{name: getattr(self, name) for name in names.split()})

    def draws(self, step: int) -> list[list[list[int]]]:
        """Minibatches of all PPO epochs of a step, [minibatch][prompt][response]."""
        sizes = self.responses_per_step, self.samples_per_prompt, self.batch.global_batch_size
        epochs = range(self.ppo_epochs)
        return [m for epoch in epochs for m in minibatches.draw(*sizes, (self.parallel.seed, step, epoch))]

    def estimate_advantages(self, rewards: Tensor, lengths: list[int], counted: Tensor) -> Tensor:
        """Advantages [N], not whitened, of rewards [N]; `counted`: [A] bool, responses to learn from."""
        if self.advantages == "reinforce":  # rewards to go
            return rl.gae(rewards, torch.zeros_like(rewards), lengths, self.gamma, 1.0)[0]
        returns = torch.stack([part.sum() for part in rewards.split(lengths)])  # [A]
        groups = (-1, self.samples_per_prompt)
        compare = rl.rloo if self.advantages == "rloo" else partial(rl.grpo, scale=self.advantage_scale)
        return rl.per_token(compare(returns.view(groups), counted.view(groups)).view(-1), lengths)


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
        old_logprobs, advantages, weights = (batch.extra[name] for name in ("old", "advantages", "weights"))
        responses = batch.extra["response"] if config.ratio == "sequence" else None
        loss, metrics = rl.policy_loss(
            logprobs, old_logprobs, advantages, weights, config.policy_objective, responses
        )
        if kl_coef:
            kl = kl_estimator(*rl.only_where(weights, logprobs, batch.extra["ref"]))
            loss = loss + kl_coef * (weights * kl).sum()
        loss = loss - config.entropy_coef * (weights * entropy).sum()
        return loss, {**metrics, "entropy": (entropy * batch.extra["counted"]).sum()}

    def update(
        loss_fn: engine.LossFn, batches: list[list[Batch]], num_tokens: Sequence[float], lr: float
    ) -> list[dict[str, float]]:
        """One update for each minibatch that has a gradient."""
        updates = []
        with phase("train", policy="all"), engine.during(f"step {session.done}, policy"):
            for minibatch, count in zip(batches, num_tokens, strict=True):
                if count:
                    metrics = engine.forward_backward(policy, minibatch, loss_fn, count)
                    if session.record:
                        session.record.put_update("policy", policy, metrics)
                    updates.append(metrics | {"grad_norm": optim.step(optimizer, lr), "lr": lr})
        return updates

    # ---- loop ------------------------------------------------------------------------------------
    session.resume({"policy": (policy, optimizer)}, validate if rows["val"] else None)
    for step in session.steps():
        kl_coef = config.kl.coef_after(step, session.latest, config.responses_per_step)
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

        # log-probs of policy and reference, [N]
        with phase("logprobs", policy="weights"):
            old_logprobs, entropies = ref_logprobs, _ = packed.outputs(policy).unbind(1)
        if config.kl.kl_coef:
            with phase("reference", **ref.needs), ref():
                ref_logprobs = packed.outputs(policy)[:, 0]
        precision = arch.vocab_size, config.model.dtype, config.sampling.temperature
        by_response = old_logprobs.split(lengths)
        metrics = audit.check_sampler(sampled, by_response, entropies, *precision, config.audit)

        # rewards and advantages, [N]
        scores, counted = sampled.scores_and_counted(config.truncation, config.sampling.max_new_tokens)  # [A]
        kl = kl_estimator(old_logprobs, ref_logprobs)
        rewards = rl.token_rewards(scores, kl, lengths, kl_in_reward)
        advantages = config.estimate_advantages(rewards, lengths, counted)
        if config.advantages != "reinforce":
            first_tokens = torch.tensor([0, *lengths[:-1]]).cumsum(0)
            audit.check_groups(sampled.places, advantages[first_tokens], counted)
        statistics: dict[str, float | Tensor] = {
            **sampled.statistics(),
            "rollout_size": len(lengths),
            "rewards_with_kl": per_response(rewards, lengths).mean(),
            **moments("advantages", advantages),
        }
        if config.kl.kl_coef:
            init_policy_kl = per_response(kl, lengths).mean()
            statistics |= {"init_policy_kl": init_policy_kl, "kl_coef": kl_coef}
        metrics |= {f"train_rollouts/{name}": float(value) for name, value in statistics.items()}
        if config.whiten_advantages and config.advantages == "reinforce":
            advantages = rl.whiten(advantages)

        # update
        mask = rl.per_token(counted.double(), lengths)  # [N]
        tokens = {"old": old_logprobs, "ref": ref_logprobs, "advantages": advantages, "counted": mask}
        if record := session.record:
            record.put_examples(examples)
            record.put(**sampled.arrays(), old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
            record.put(rewards=rewards, advantages=advantages, counted=mask)
        weights = packed.aggregation_weights(mask, config.aggregate, config.sampling.max_new_tokens)
        numbers = rl.per_token(torch.arange(len(lengths)).double(), lengths)
        batches = packed.micro_batches(weights, response=numbers, **tokens)
        lr = optim.learning_rate(config.optim, step, session.total_steps)
        signal = "advantages" if kl_in_loss == config.entropy_coef == 0 else "counted"
        num_tokens = packed.tokens_with_gradient(mask, tokens[signal])
        ledger = Ledger(sampled.tokens, {"truncated": mask == 0, "without_signal": tokens[signal] == 0})
        loss_fn = ledger.counting(partial(policy_loss, kl_coef=kl_in_loss), "counted", signal)
        updates = update(loss_fn, batches, num_tokens, lr)
        metrics |= ledger.close(f"step {session.done}", config.ppo_epochs) | session.use_prompts(sampled.rows)
        metrics["train_optim/skipped_updates"] = len(batches) - len(updates)
        if updates:
            tau = config.tau_positive, config.tau_negative
            terms = audit.first_terms(config.objective, advantages, old_logprobs, *tau)
            terms = terms + kl_in_loss * kl - config.entropy_coef * entropies
            first = packed.of_first_update(terms, num_tokens, mask, weights)
            metrics |= audit.check_first_update(updates[0], *first, ratio_bound)
        else:
            reason = "advantages are 0" if counted.any() else "responses are truncated (--truncated)"
            session.say(f"step {session.done}: all {reason}, so the policy learnt nothing")
        metrics |= {f"train_optim/{name}": value for name, value in mean_of(updates).items()}
        rollout_time = metrics["timers/rollout_time"] = session.clock.total(*ROLLOUT)
        metrics["timers/train_time"] = session.clock.total("train")

        if rows["val"] and session.validates():
            metrics |= validate(session.done)
            metrics["timers/validation_time"] = session.clock.total(*ROLLOUT) - rollout_time
        session.end_step(metrics)

    session.export(policy, [tokenizer.save])


if __name__ == "__main__":
    launch.run(main, Config)
