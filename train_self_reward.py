"""Self-rewarding: the model answers, judges its own answers, and learns to prefer those it judged better.

    torchrun --nproc_per_node 2 train_self_reward.py --model runs/sft/hf \
        --train-data train.jsonl --val-data val.jsonl --output runs/self_reward

In each of --iterations the model samples --samples-per-prompt answers to each prompt and judges each of them
--judgements times, as --judge-template asks, with a score at the end. The mean of the scores ranks the
answers; the best and the worst become a pair, on which a loss of the DPO family trains. What samples, judges
and is the reference is the model as it was when the iteration began. At its end the reference becomes the
policy and Adam starts anew. The learning rate does not: one warm-up and one cosine span all iterations, so
each later one takes its first steps, in which Adam's moments are new, without a warm-up of its own. With
--meta-judge the model also judges its judgements, and learns to judge from them. Rows of data are those of
SFT; on their last answers only --first-iteration-sft trains: align/data/formats.py has the formats. OUTPUT/hf
is the result. Without arguments it runs on the built-in tiny model, which is random; demo.py shows one that
learns.

Self-rewarding: arXiv 2401.10020, here with the given prompts in place of new ones from the model.
Meta-rewarding and length control: 2407.19594, here with a comparison counted where both orders agree.
"""

import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from align.data import packing, sft_tasks, toy
from align.data.formats import FormatConfig
from align.data.marker_chat import RowFormats
from align.data.packing import Batch
from align.data.sft import adopt
from align.data.sft_tasks import Task
from align.data.tokenizer import load_tokenizer
from align.distributed import launch, parallel
from align.errors import UserError
from align.flags import BOUND, COEFFICIENT, COUNT, REPEATS, SCALE, check_ranges, number, refuse_unused, whole
from align.generation import audit, rollout_cache
from align.generation.audit import AuditConfig
from align.generation.generator import (
    Generator,
    RolloutConfig,
    check_model_logprobs,
    check_rollout,
    warn_if_none_ended,
)
from align.generation.rollout import Sample
from align.generation.sampling import SamplingConfig
from align.judging import self_judge
from align.judging.judge import Judge, JudgeConfig
from align.judging.meta_judge import MetaJudge, MetaJudgeConfig
from align.judging.pairs import Buffer, SampledPair, mix
from align.judging.self_judge import Ids, SelfJudge, Streams
from align.losses import preference as losses
from align.losses import supervised
from align.model import architecture, gpt, huggingface
from align.model.config import check_model, describe_model
from align.rewards import sources
from align.tracking.metrics import Clock, with_std
from align.tracking.run import Run, RunConfig
from align.training import batching, checkpoint, continuation, engine, offload, optim, reference
from align.training.checkpoint import CheckpointConfig
from align.training.config import CommonConfig, LoopConfig
from align.training.optim import OptimConfig
from align.training.phases import OffloadConfig, Phases

TRAIN, VAL = 0, 1  # what random numbers of samples are drawn for
MOST_WAITING = 3  # batches of pairs of judgements; while so many wait, no more are made
ROLLOUT = ("generate", "judge", "meta_judge")  # phases before the update

# ---- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(CommonConfig):
    iterations: int = 3
    """self-rewarding iterations: each samples, judges and trains, from the model of the one before; Adam's
    moments start anew in each, the learning-rate schedule spans all of them"""
    steps_per_iteration: int | None = None
    """steps of an iteration; the next one goes on with the rows (default: --max-epochs passes over all
    rows)"""
    samples_per_prompt: int = 4
    """responses per prompt, of which one preference pair is made"""
    length_control: tuple[float, ...] = (0.0,)
    """length control, one value or one for each iteration: among the responses whose scores are within this
    share of the spread from the best (worst), the shortest (longest) is taken; 0: the best and the worst"""
    loss: Literal["dpo", "scale", "rpo_bwd_kl", "rpo_fwd_kl", "ipo", "rpo_sq"] = "dpo"
    """preference loss, the function of that name in align/losses/preference.py"""
    beta: tuple[float, ...] = (0.1,)
    """beta of DPO, one value or one for each iteration: the implicit reward is beta log(pi / pi_ref)"""
    sft_weight: float = 0.0
    """weight of the SFT loss: the chosen responses' negative log-likelihood"""
    average_logprobs: bool = False
    """log-probs per token instead of per response"""
    sft_average_logprobs: bool | None = None
    """the same for the SFT loss (default: as --average-logprobs)"""
    reward_scale: float = 1.0
    """scale, rpo_*: factor on the difference of the scores; of judgements that of their strengths, in nats"""
    first_iteration_sft: bool = False
    """supervised fine-tuning on the rows as first iteration; its validations sample and judge as well"""
    rollout_ahead: int = 1
    """steps whose responses are sampled and judged together, and kept in files until they are trained on"""
    true_reward_fn: str | None = None
    """module:function of yours, called with prompt, response (both text) and the row, which returns a number:
    validation compares the judge with it; nothing is trained on it"""
    audit_start: float | None = None
    """bound on the mean |log pi - log pi_ref| of a response before the first update, where both are one
    model, in nats (default: 0 on a CPU and with --deterministic, else 1e-3 in fp32, 1 in bf16; inf: none)"""
    audit: AuditConfig = AuditConfig()
    judge: JudgeConfig = JudgeConfig()
    meta: MetaJudgeConfig = MetaJudgeConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    offload: OffloadConfig = OffloadConfig()
    format: FormatConfig = FormatConfig(max_seq_len=512)
    run: RunConfig = RunConfig(output=Path("runs/self_reward"))
    loop: LoopConfig = LoopConfig(val_batches=1)
    optim: OptimConfig = OptimConfig(lr=1e-6, min_lr=5e-7)
    checkpoint: CheckpointConfig = CheckpointConfig(monitor="val/data_loss")

    def __post_init__(self):
        super().__post_init__()
        check_ranges(
            self,
            iterations=REPEATS,
            steps_per_iteration=COUNT,
            samples_per_prompt=whole(2, 10**5),
            length_control=number(0, 1),
            beta=SCALE,
            sft_weight=COEFFICIENT,
            reward_scale=SCALE,
            rollout_ahead=COUNT,
            audit_start=BOUND,
        )
        check_model_logprobs(self.rollout, self.sampling)
        for name in ("length_control", "beta"):
            if len(values := getattr(self, name)) not in (1, self.iterations):
                raise UserError(
                    f"--{name.replace('_', '-')} has {len(values)} values: give one, or one for each of the "
                    f"{self.iterations} --iterations"
                )
        if "reward_gap" not in self.loss_inputs:
            refuse_unused(self, Config, "reward_scale", f"with --loss {self.loss}")
        if not self.sft_weight:
            refuse_unused(self, Config, "sft_average_logprobs", "without --sft-weight")
        if self.steps_per_iteration:
            refuse_unused(self.loop, LoopConfig, "max_epochs", "with --steps-per-iteration")
        if self.first_iteration_sft and self.iterations == 1:
            raise UserError(
                "--first-iteration-sft with --iterations 1 is fine-tuning alone: use train_sft.py"
            )
        if self.true_reward_fn and self.train_data and not self.val_data:
            raise UserError("--true-reward-fn has no effect without --val-data: give both")
        size, fraction = self.batch.global_batch_size, self.meta.meta_judge_fraction
        if self.meta.meta_judge and fraction * size < 1:
            raise UserError(
                f"--meta-judge-fraction {fraction} of --global-batch-size {size} is no whole pair: raise one"
            )
        if self.meta.meta_judge and self.judge.judgements == 1:
            raise UserError("--meta-judge compares judgements of one answer: give --judgements 2 or more")
        own = {"judge_template": self.judge.judge_template != JudgeConfig.judge_template}
        own["meta_judge_template"] = self.meta.meta_judge_template != MetaJudgeConfig.meta_judge_template
        for name in [name for name in own if own[name] and not self.train_data]:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} without --train-data: the toy task has a template of its own")
        if self.sampling.greedy:
            raise UserError("--greedy gives the same answer every time: leave it out")

    @property
    def loss_inputs(self) -> set[str]:
        """Inputs of the loss beside log-probs."""
        return set(inspect.signature(getattr(losses, self.loss)).parameters)

    def iteration_steps(self, num_rows: int) -> int:
        """Steps of an iteration."""
        return self.steps_per_iteration or num_rows // self.rows_per_step * self.loop.max_epochs

    def rollout_start(self, step: int, iteration_steps: int) -> int:
        """The first of the steps whose answers are sampled together with those of `step`."""
        return step - step % iteration_steps % self.rollout_ahead

    def total_steps(self, num_rows: int, pass_start: int = 0) -> int:
        steps = self.iterations * self.iteration_steps(num_rows)
        return steps if self.loop.max_steps is None else min(steps, self.loop.max_steps)

    def check_lengths(self, max_positions: int) -> None:
        """Raises UserError if a prompt or judgement may find no room in the context, or a pair in a batch.

        Their sum may exceed the context: a response to a long prompt gets what is left of it, and a judge
        prompt is shortened to what --max-new-tokens leaves.
        """
        prompt, answer = self.format.max_seq_len, self.sampling.max_new_tokens
        if prompt > max_positions:
            raise UserError(
                f"--max-seq-len {prompt} is beyond the model's context of {max_positions} tokens: lower it"
            )
        if answer >= max_positions:
            raise UserError(
                f"--max-new-tokens {answer} leaves a prompt no token of the model's context of "
                f"{max_positions}: lower it"
            )
        if 2 * (longest := min(prompt + answer, max_positions)) > self.batch.micro_batch_tokens:
            raise UserError(
                f"--max-seq-len {prompt} and --max-new-tokens {answer} make sequences of {longest} tokens, "
                f"of which a pair has two: raise --micro-batch-tokens {self.batch.micro_batch_tokens}"
            )


def of_iteration(values: tuple[float, ...], iteration: int) -> float:
    """The value that a flag has in an iteration."""
    return values[iteration] if len(values) > 1 else values[0]


def state_of(path: Path) -> dict:
    """Buffer and counters of a checkpoint. Raises UserError if it is of another script."""
    if not (path / "judgements.json").is_file():
        raise UserError(f"{path} is none of train_self_reward.py: give another --output, or --no-resume")
    return json.loads((path / "judgements.json").read_bytes())


def check_same(before: dict[str, int], now: dict[str, int]) -> None:
    """Raises UserError if a run is continued that has gone by other flags."""
    for name in now:
        if now[name] != before[name]:
            raise UserError(
                f"{name}: {now[name]}, in the run that is to be continued {before[name]}: its reference and "
                "what waits to be trained on fit its own flags only; give those, or --no-resume"
            )


def main(config: Config) -> None:
    # ---- setup and checks ------------------------------------------------------------------------
    arch = architecture.read_config(config.model.path)
    check_model(arch, config.model, config.parallel)
    check_rollout(arch, config.rollout, config.sampling, config.model, config.parallel)
    config.check_lengths(arch.max_positions)
    stop = parallel.Stop(config.loop.max_time)
    run = Run(config.run, asdict(config), __file__, parallel.is_main())
    run.say(f"{parallel.layout()}; {describe_model(arch, config.model)}")

    # ---- data ------------------------------------------------------------------------------------
    files = {"train": config.train_data, "val": config.val_data}
    judge_config, meta_config = config.judge, config.meta
    if not config.train_data:
        toy_files = parallel.on_main(lambda: toy.write(config.run.output / "data"))
        files = dict(zip(files, toy_files, strict=True))
        templates = parallel.on_main(lambda: toy.write_templates(config.run.output / "data"))
        judge_config = replace(judge_config, judge_template=templates[0])
        if config.meta.meta_judge:
            meta_config = replace(meta_config, meta_judge_template=templates[1])
    tokenizer = load_tokenizer(config.model.path, run.say, config.text, parallel.on_main(run.first_day))
    size = config.batch.global_batch_size
    formats = RowFormats()
    rows = sft_tasks.load_sft_sets(files, tokenizer, config.format, arch.vocab_size, run.say, formats)
    trained_format = adopt(formats, tokenizer, config.format, run.say)
    parallel.on_main(lambda: trained_format.save(config.run.output))  # for generate.py on a checkpoint
    packing.check_size(len(rows["train"]), size, "--train-data")
    rows["val"] = rows["val"][config.val_rows()]
    sequences = ([task.prompt.ids, task.example.ids] for task in rows["train"])
    resumed = continuation.find(config, __file__, sequences, run.say)
    total_steps, iteration_steps = resumed.total_steps, config.iteration_steps(len(rows["train"]))
    epoch_steps = len(rows["train"]) // size
    optim.check_optim(config.optim, total_steps)
    run.total_steps = total_steps
    # what says to which iteration and rollout a step belongs
    layout_of_steps = {
        "steps of an iteration (--steps-per-iteration, or --max-epochs of the data)": iteration_steps,
        "--rollout-ahead": config.rollout_ahead,
        "--meta-judge": config.meta.meta_judge,
    }

    # ---- judges ----------------------------------------------------------------------------------
    room, stop_texts = arch.max_positions, config.sampling.stop
    if config.meta.meta_judge:  # trained on as well, in pairs
        room = min(room, config.batch.micro_batch_tokens // 2)
    room -= config.sampling.max_new_tokens
    run.say(f"judge prompts of more than {room} tokens are shortened, and counted in judge_shortened")
    ask = Judge(judge_config, tokenizer, config.format, room)
    ask_meta = MetaJudge(meta_config, tokenizer, config.format, room)
    for one in [ask, ask_meta] if config.meta.meta_judge else [ask]:
        one.check(rows["train"][0].prompt.row)
    asker = SelfJudge(ask, ask_meta, tokenizer, stop_texts)
    cap = config.meta.meta_judge_class_cap if config.meta.meta_judge else math.inf
    buffer = Buffer(config.judge.judge_low, config.judge.judge_high, cap)
    true_reward = config.true_reward_fn and sources.RewardFunction(
        config.true_reward_fn, tokenizer, stop_texts, "--true-reward-fn"
    )

    # ---- model -----------------------------------------------------------------------------------
    folder = config.run.output / "rollouts"
    clock, store = Clock(), config.offload.store(config.run.output)
    phase = Phases(clock, run.say, store, config.offload.enabled)
    policy = gpt.build_policy(arch, config.model, config.parallel)
    huggingface.load(policy, huggingface.open_source(config.model.path, arch, config.parallel.seed))
    policy = gpt.distributed(policy)
    if path := resumed.checkpoint:
        state = state_of(path)
        check_same(state["flags"], layout_of_steps)
        checkpoint.load_weights(path / "reference", policy.module)
        buffer.restore(state)
    start_bound = config.audit_start
    if start_bound is None:
        start_bound = reference.start_bound(config.model.dtype, parallel.is_exact(config.parallel))
    ref = offload.Weights(policy.module, store)
    optimizer = optim.build(policy, config.optim)
    phase.add("policy", policy, optimizer)
    generator = Generator(policy, config.rollout, config.sampling, config.model, config.parallel, tokenizer)
    run.say(generator.describe())

    # ---- rollouts --------------------------------------------------------------------------------
    def by_policy(kind: str, ids: Ids, streams: Streams, number: int) -> list[list[Sample]]:
        """Samples of the policy as it is now."""
        with phase(kind, policy="weights"):
            return generator.generate(ids, streams, number)

    def by_reference(first: int, kind: str, ids: Ids, streams: Streams, number: int) -> list[list[Sample]]:
        """Samples of the reference for the steps from `first` on, out of a file if there is one."""

        def make() -> list[list[Sample]]:
            with phase(kind), ref.swapped_into(policy.module):
                return generator.generate(ids, streams, number)

        settings = (config.sampling, config.parallel.seed, number, config.model.dtype, arch)
        path = folder / f"step_{first:08d}_{kind}.safetensors"
        return rollout_cache.cached(
            path,
            rollout_cache.fingerprint(
                ref_id, (*settings, sorted(tokenizer.stop_ids), tokenizer.stop_strings), ids, streams
            ),
            make,
        )

    # ---- losses ----------------------------------------------------------------------------------
    sft_average = (
        config.average_logprobs if config.sft_average_logprobs is None else config.sft_average_logprobs
    )

    def sft_loss(batch: Batch, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return supervised.sft_loss(logprobs, batch.mask), {}

    def preference_loss(batch: Batch, logprobs: Tensor, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
        ref_logprobs = torch.zeros_like(logprobs)
        ref_logprobs[batch.mask.bool()] = batch.extra["ref"]
        both, ref_both = (
            losses.sequence_logprobs(x, batch.mask, batch.lengths, config.average_logprobs).view(-1, 2)
            for x in (logprobs, ref_logprobs)
        )
        four = (*both.unbind(1), *ref_both.unbind(1))  # [P] each: policy, reference; chosen, rejected
        inputs = {name: value for name, value in batch.extra.items() if name in config.loss_inputs}
        preference = getattr(losses, config.loss)(*four, beta=beta, **inputs).sum()
        statistics = losses.log_ratio_statistics(*four, beta)
        chosen = four[0]
        if sft_average != config.average_logprobs:
            chosen = losses.sequence_logprobs(logprobs, batch.mask, batch.lengths, sft_average)[::2]  # [P]
        sft = -chosen.sum()
        metrics = {"preference_loss": preference, "sft_loss": sft, **statistics}
        return preference + config.sft_weight * sft, metrics

    def known_logprobs(pairs: list[SampledPair]) -> list[np.ndarray]:
        """Reference log-probs of each sample's tokens: chosen, rejected, chosen, ..."""
        with phase("reference"), ref.swapped_into(policy.module):
            return batching.per_example_outputs(policy, [pair.examples for pair in pairs], config.batch)

    def pair_batches(pairs: list[SampledPair], known: list[np.ndarray]) -> list[Batch]:
        """This rank's share of some pairs, in the same micro-batches as there."""
        values = {
            "ref": [np.concatenate(known[i : i + 2]) for i in range(0, len(known), 2)],
            "reward_gap": [np.array([config.reward_scale * pair.gap]) for pair in pairs],
        }
        return batching.micro_batches(policy, [pair.examples for pair in pairs], config.batch, values)

    def sft_batches(tasks: Sequence[Task]) -> list[Batch]:
        return batching.micro_batches(policy, [[task.example] for task in tasks], config.batch)

    def validate(step: int) -> dict[str, float]:
        """The policy as it is now answers and judges, and is compared with the reference."""
        iteration = max(step - 1, 0) // iteration_steps
        places = [(VAL, 0, row) for row in range(len(rows["val"]))]
        found = asker.responses(rows["val"], places, config.samples_per_prompt, by_policy)
        made, metrics = asker.pairs(found, of_iteration(config.length_control, iteration))
        pairs = [pair for pair in made if pair is not None]
        if pairs:
            loss_fn = partial(preference_loss, beta=of_iteration(config.beta, iteration))
            batches = pair_batches(pairs, known_logprobs(pairs))
            with phase("validate", policy="weights"), engine.during("validation"):
                metrics |= with_std(engine.evaluate(policy, batches, loss_fn, len(pairs)))
        with phase("validate", policy="weights"), engine.during("validation"):
            tokens = packing.num_trained([task.example for task in rows["val"]])
            metrics["data_loss"] = engine.evaluate(policy, sft_batches(rows["val"]), sft_loss, tokens)["loss"]
        if true_reward:
            truth = true_reward([task.prompt for task in rows["val"]], [each.samples for each in found])
            metrics |= self_judge.compare_with(truth, found)
        run.samples(step, asker.tables("val_judgements", found))
        run.samples(
            step, [{"table": "val_pairs", **pair.texts(tokenizer, asker.text_of)} for pair in pairs[:4]]
        )
        return {f"val/{name}": value for name, value in metrics.items()}

    # ---- resume ----------------------------------------------------------------------------------
    with phase("load", policy="all"):
        first_step, latest = checkpoint.resume(path, policy, optimizer)
    run.resume_at(first_step)
    if first_step:
        run.say(resumed.describe())
    elif rows["val"]:
        latest = validate(0)
        run.log(0, latest)
    checkpoint.check_monitor(config.checkpoint, latest)

    # ---- loop ------------------------------------------------------------------------------------
    clock.shares(), phase.memory()  # what came before the first step is not its own
    ref_id, reason, untouched, rolled_out = rollout_cache.weights_digest(ref), None, False, []
    for step in range(first_step, total_steps):
        done, iteration = step + 1, step // iteration_steps
        begin, end = iteration * iteration_steps, (iteration + 1) * iteration_steps
        metrics = {"iteration": iteration, "epoch": step // epoch_steps, "consumed_samples": done * size}
        audited: dict[str, float] = {}
        untouched |= step == begin  # the policy is still the reference

        if iteration == 0 and config.first_iteration_sft:
            tasks = [rows["train"][row] for row in resumed.rows_of_step(step)]
            batches, loss_fn = sft_batches(tasks), sft_loss
            denominator = packing.num_trained([task.example for task in tasks])
        else:
            # rollout, for several steps at once
            start = config.rollout_start(step, iteration_steps)
            if step in (start, first_step):
                ahead = range(start, min(start + config.rollout_ahead, end))
                places = [(TRAIN, one, row) for one in ahead for row in resumed.rows_of_step(one)]
                tasks, sample = [rows["train"][row] for *_, row in places], partial(by_reference, start + 1)
                first_rollout = not rolled_out
                rolled_out = asker.responses(tasks, places, config.samples_per_prompt, sample)
                if first_rollout:
                    responses = [sample for answered in rolled_out for sample in answered.samples]
                    warn_if_none_ended(responses, config.sampling.max_new_tokens, run.say)
            if step == start and config.meta.meta_judge and len(buffer) < MOST_WAITING * size:
                compared = asker.compare(rolled_out, sample)
                taken = [buffer.offer(pair) for one in compared if (pair := one.pair()) is not None]
                metrics |= self_judge.comparison_statistics(compared) | {"meta_pairs": sum(taken)}
                run.samples(done, asker.tables("train_comparisons", compared))

            # pairs
            found = rolled_out[(step - start) * size : (step - start + 1) * size]
            run.samples(done, asker.tables("train_judgements", found))
            made, statistics = asker.pairs(found, of_iteration(config.length_control, iteration))
            waiting = len(buffer)
            pairs = mix(made, buffer, config.meta.meta_judge_fraction)
            metrics |= statistics | {"meta_samples_per_GBS": (waiting - len(buffer)) / size}

            # what the reference says, and whether it is what has sampled
            known = known_logprobs(pairs) if pairs else []
            batches, denominator = pair_batches(pairs, known) if pairs else [], len(pairs)
            loss_fn = partial(preference_loss, beta=of_iteration(config.beta, iteration))
            if pairs:
                places = [(pair.row, side) for pair in pairs for side in range(2)]
                sampled = [one for pair in pairs for one in pair.samples]
                audit.check_ends(places, sampled, tokenizer.stop_ids, (*stop_texts, *tokenizer.stop_strings))
                sampled_logprobs = [one.model_logprobs for one in sampled]
                audited = audit.compare(
                    places, sampled_logprobs, known, config.model.dtype, config=config.audit
                )

        # update
        if denominator:
            lr = optim.learning_rate(config.optim, step, total_steps)
            with phase("train", policy="all"), engine.during(f"step {done}"):
                updated = with_std(engine.forward_backward(policy, batches, loss_fn, denominator))
                if untouched and "preference_loss" in updated:
                    beta = of_iteration(config.beta, iteration)
                    reference.check_start(updated, config.loss, beta, start_bound)
                untouched = False
                metrics |= updated | {"grad_norm": optim.step(optimizer, lr), "lr": lr}
        else:
            run.say(f"step {done}: no prompt gave a pair, so nothing was learnt")
        times = {"timers/rollout_time": clock.total(*ROLLOUT), "timers/train_time": clock.total("train")}
        metrics = {f"train/{name}": value for name, value in metrics.items()} | audited

        # evaluate
        reason = stop.reason()
        if rows["val"] and (config.validates(done, total_steps) or done == end):
            metrics |= validate(done)
            times["timers/validation_time"] = clock.total(*ROLLOUT) - times["timers/rollout_time"]

        # the next iteration begins
        if done == end:
            with phase("next_iteration", policy="all"):
                ref.follow(policy.module)
                optim.reset(optimizer)
            ref_id = rollout_cache.weights_digest(ref)
            buffer.clear()

        # log, then save: what a checkpoint continues has been logged
        latest |= metrics
        checkpoint.check_monitor(config.checkpoint, latest)
        run.log(done, {**metrics, **times, **clock.shares(), **phase.memory()})
        if checkpoint.is_due(config.checkpoint, done) or done == total_steps or reason:
            with checkpoint.saving(config.checkpoint, config.run.output, done, latest, resumed.state) as path:
                with phase("save", policy="all"):  # counted in the next step's line
                    checkpoint.write(path, done, policy, optimizer)
                with phase("save"), ref.swapped_into(policy.module):
                    checkpoint.write_weights(path / "reference", policy.module)
                if parallel.is_main():
                    state = {"flags": layout_of_steps, **buffer.record()}
                    (path / "judgements.json").write_text(json.dumps(state), encoding="utf-8")
            if parallel.is_main():
                rollout_cache.discard(folder, config.rollout_start(done, iteration_steps) + 1)
        if reason:
            break

    # ---- end -------------------------------------------------------------------------------------
    if reason and done < total_steps:
        run.say(f"{reason}: stopped after step {done} of {total_steps}; the same command continues")
    else:
        with phase("export", policy="weights"):
            savers = [tokenizer.save, trained_format.save]
            huggingface.save(policy, config.model.path, config.run.output / "hf", savers)
        run.say(f"the model is in {config.run.output / 'hf'}")
    run.close()


if __name__ == "__main__":
    launch.run(main, Config)
