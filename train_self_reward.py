"""Self-rewarding: a model judges its own responses, and learns to prefer those that it judged better.

    torchrun --nproc_per_node 2 train_self_reward.py --model runs/sft/hf \
        --train-data train.jsonl --val-data val.jsonl --output runs/self_reward

In each of --iterations the model samples --samples-per-prompt responses to each prompt and judges each of
them --judgements times, as --judge-template asks, with a score at the end. The mean of the scores ranks the
responses; the best and the worst become a pair, on which a loss of the DPO family trains. The model at the
beginning of an iteration samples, judges and is the reference. At its end the policy becomes the reference
and Adam starts anew. The learning rate does not: one warm-up and one cosine span all iterations, so each
later one takes its first steps, in which Adam's moments are new, without a warm-up of its own. With
--meta-judge the model also judges its judgements, and learns to judge from them. Rows of data are those of
SFT; on their last responses only --first-iteration-sft trains: align/data/formats.py has the formats.
OUTPUT/hf is the result. Without arguments it runs on the built-in tiny model, which is random; demo.py shows
one that learns.

Self-rewarding: arXiv 2401.10020, here with the prompts of the data in place of new ones from the model.
Meta-rewarding and length control: 2407.19594, here with a comparison counted where both orders agree.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from align.data import packing, sft_tasks, toy
from align.data.formats import FormatConfig
from align.data.marker_chat import RowFormats
from align.data.packing import Batch, Example
from align.data.sft import adopt
from align.data.sft_tasks import Task
from align.distributed import launch, node, parallel
from align.errors import UserError
from align.flags import BOUND, COEFFICIENT, COUNT, REPEATS, SCALE, check_ranges, number, refuse_unused, whole
from align.generation import audit
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
from align.generation.tape import Tape
from align.judging import self_judge as judging
from align.judging import tokens
from align.judging.judge import Judge, JudgeConfig
from align.judging.meta_judge import MetaJudge, MetaJudgeConfig
from align.judging.pairs import Buffer, SampledPair, mix
from align.judging.reference_model import ReferenceModel, trained_weights
from align.judging.self_judge import Ids, JudgedResponses, Sampler, SelfJudge, Streams
from align.losses import preference, supervised
from align.losses.statistics import log_ratio_statistics
from align.model import adapter_files, architecture, gpt, huggingface
from align.model.config import check_model, describe_model
from align.model.lora import LoraConfig
from align.planning import estimate
from align.rewards import sources
from align.tracking.metrics import with_std
from align.tracking.run import RunConfig
from align.training import batching, checkpoint, engine, optim, reference
from align.training.checkpoint import CheckpointConfig, Saving
from align.training.config import CommonConfig, LoopConfig
from align.training.ledger import Ledger
from align.training.optim import OptimConfig
from align.training.phases import OffloadConfig
from align.training.session import Session, Tokenizer

LOSSES: dict[str, Callable[..., Tensor]] = {  # --loss
    "dpo": preference.dpo,
    "scale": preference.scale,
    "rpo_bwd_kl": preference.rpo_bwd_kl,
    "rpo_fwd_kl": preference.rpo_fwd_kl,
    "ipo": preference.ipo,
    "rpo_sq": preference.rpo_sq,
}
WITH_GAP = ("scale", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")  # losses that take the gap of the scores
TRAIN, VAL = 0, 1  # random streams of the samples
BUFFER_BATCHES = 3  # batches of judgement pairs; while the buffer holds so many, no more are sampled
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
    loss: Literal[tuple(LOSSES)] = "dpo"  # type: ignore[valid-type]
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
    lora: LoraConfig = LoraConfig()
    run: RunConfig = RunConfig(output=Path("runs/self_reward"))
    loop: LoopConfig = LoopConfig(val_batches=1)
    optim: OptimConfig = OptimConfig(lr=1e-6, min_lr=5e-7)
    checkpoint: CheckpointConfig = CheckpointConfig(monitor="val/data_loss")
    plan = estimate.self_rewarding  # for tools/plan.py

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
        for flag, values in (("--length-control", self.length_control), ("--beta", self.beta)):
            if len(values) not in (1, self.iterations):
                rule = f"give one, or one for each of the {self.iterations} --iterations"
                raise UserError(f"{flag} has {len(values)} values: {rule}")
        if self.loss not in WITH_GAP:
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
            flags = f"--meta-judge-fraction {fraction} of --global-batch-size {size}"
            raise UserError(f"{flags} is no whole pair: raise one")
        if self.meta.meta_judge and self.judge.judgements == 1:
            raise UserError("--meta-judge compares judgements of one response: give --judgements 2 or more")
        own = {"--judge-template": self.judge.judge_template != JudgeConfig.judge_template}
        own["--meta-judge-template"] = self.meta.meta_judge_template != MetaJudgeConfig.meta_judge_template
        for flag in [flag for flag in own if own[flag] and not self.train_data]:
            raise UserError(f"{flag} without --train-data: the toy task has a template of its own")
        if self.sampling.greedy:
            raise UserError("--greedy gives the same response every time: leave it out")

    def iteration_steps(self, num_rows: int) -> int:
        """Steps of an iteration."""
        return self.steps_per_iteration or num_rows // self.rows_per_step * self.loop.max_epochs

    def rollout_start(self, step: int, iteration_steps: int) -> int:
        """The first of the steps whose responses are sampled together with those of `step`."""
        return step - step % iteration_steps % self.rollout_ahead

    def total_steps(self, num_rows: int, pass_start: int = 0) -> int:
        steps = self.iterations * self.iteration_steps(num_rows)
        return steps if self.loop.max_steps is None else min(steps, self.loop.max_steps)

    def check_lengths(self, max_positions: int) -> None:
        """Raise UserError if a prompt or judgement may not fit into the context, or a pair into a batch."""
        sft_tasks.check_lengths(self.format, self.sampling.max_new_tokens, self.batch, max_positions)


@dataclass
class State:
    """The models, the judge and the data that the steps use."""

    config: Config
    session: Session
    tokenizer: Tokenizer
    rows: dict[str, Sequence[Task]]
    self_judge: SelfJudge
    buffer: Buffer  # judgement pairs that are still to be trained on
    policy: nn.Module  # in Megatron's DistributedDataParallel
    ref: ReferenceModel
    generator: Generator
    account: tokens.Account = field(default_factory=tokens.Account)
    iteration: int = 0


class Training(NamedTuple):
    """Input of the update of a step."""

    batches: list[Batch]
    loss_fn: engine.LossFn
    denominator: int
    metrics: dict[str, float]
    examples: Sequence[Sequence[Example]] = ()  # of the batches, by row
    audit: dict[str, float] = {}
    ledger: Ledger | None = None  # of sampled tokens


def of_iteration(values: tuple[float, ...], iteration: int) -> float:
    """The value of a flag in an iteration."""
    return values[iteration] if len(values) > 1 else values[0]


# ---- losses --------------------------------------------------------------------------------------


def sft_loss(batch: Batch, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the responses of the data."""
    return supervised.sft_loss(logprobs, batch.mask), {}


def preference_loss(
    config: Config, beta: float, batch: Batch, logprobs: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """--loss of the pairs of a micro-batch, plus --sft-weight times the SFT loss of the chosen responses."""

    def sequence_logprobs(logprobs: Tensor, average: bool) -> Tensor:
        """[P, 2] of chosen and rejected."""
        return preference.sequence_logprobs(logprobs, batch.mask, batch.lengths, average).view(-1, 2)

    average, sft_average = config.average_logprobs, config.sft_average_logprobs
    ref_logprobs = torch.zeros_like(logprobs).index_copy(0, batch.trained, batch.extra["ref"])
    policy_chosen, policy_rejected = sequence_logprobs(logprobs, average).unbind(1)  # [P]
    ref_chosen, ref_rejected = sequence_logprobs(ref_logprobs, average).unbind(1)  # [P]
    gap = {"gap": batch.extra["gap"]} if config.loss in WITH_GAP else {}

    losses = LOSSES[config.loss](policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, **gap)
    statistics = log_ratio_statistics(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    if sft_average is not None and sft_average != average:
        policy_chosen = sequence_logprobs(logprobs, sft_average)[:, 0]
    loss, nll = losses.sum(), -policy_chosen.sum()
    return loss + config.sft_weight * nll, {"preference_loss": loss, "sft_loss": nll, **statistics}


def pair_batches(state: State, pairs: list[SampledPair], ref_logprobs: list[np.ndarray]) -> list[Batch]:
    """This rank's share of some pairs, in the micro-batches of `ReferenceModel.logprobs`."""
    of_pairs = zip(ref_logprobs[::2], ref_logprobs[1::2], strict=True)
    gaps = [np.array([state.config.reward_scale * pair.gap]) for pair in pairs]
    values = {"ref": [np.concatenate(pair) for pair in of_pairs], "gap": gaps}
    examples = [pair.examples for pair in pairs]
    return batching.micro_batches(state.policy, examples, state.config.batch, values)


# ---- steps ---------------------------------------------------------------------------------------


def sft_step(state: State, tasks: Sequence[Task]) -> Training:
    """Train on the responses of the data: the first iteration with --first-iteration-sft."""
    examples = [[task.example] for task in tasks]
    batches = batching.micro_batches(state.policy, examples, state.config.batch)
    return Training(batches, sft_loss, packing.num_trained([task.example for task in tasks]), {}, examples)


def rollout_step(state: State, steps: range, sample: Sampler) -> list[JudgedResponses]:
    """Responses of the reference model to the prompts of some steps, with its judgements of them."""
    places = [(TRAIN, step, row) for step in steps for row in state.session.rows_of_step(step)]
    tasks = [state.rows["train"][row] for *_, row in places]
    return state.self_judge.responses(tasks, places, state.config.samples_per_prompt, sample)


def meta_judge_step(state: State, judged: list[JudgedResponses], sample: Sampler) -> dict[str, float]:
    """Compare judgements of one response to each prompt, and put pairs of them into the buffer."""
    compared = state.self_judge.compare(judged, sample)
    pairs = [pair for comparison in compared if (pair := comparison.pair()) is not None]
    admitted = [pair for pair in pairs if state.buffer.offer(pair)]
    state.account.admit(admitted)
    state.session.samples(state.session.done, state.self_judge.tables("train_comparisons", compared))
    return judging.comparison_statistics(compared) | {"meta_pairs": len(admitted)}


def preference_step(state: State, judged: list[JudgedResponses]) -> Training:
    """Train on a pair of responses to each prompt of a step, and on pairs of judgements out of the buffer."""
    config, session = state.config, state.session
    session.samples(session.done, state.self_judge.tables("train_judgements", judged))
    length_control = of_iteration(config.length_control, state.iteration)
    response_pairs, metrics = state.self_judge.pairs(judged, length_control)
    num_buffered = len(state.buffer)
    pairs = mix(response_pairs, state.buffer, config.meta.meta_judge_fraction)
    metrics["meta_samples_per_GBS"] = (num_buffered - len(state.buffer)) / config.batch.global_batch_size
    ledger = tokens.of_step(judged, response_pairs, pairs)
    loss_fn = ledger.counting(partial(preference_loss, config, of_iteration(config.beta, state.iteration)))
    if not pairs:
        return Training([], loss_fn, 0, metrics, ledger=ledger)

    # The reference has sampled: its log-probs in training must be those of the sampler.
    ref_logprobs = state.ref.logprobs(pairs, config.batch)
    places = [(pair.row, side) for pair in pairs for side in range(2)]
    samples = [sample for pair in pairs for sample in pair.samples]
    stop_texts = (*config.sampling.stop, *state.tokenizer.stop_strings)
    audit.check_ends(places, samples, state.tokenizer.stop_ids, stop_texts)
    logprobs = [sample.model_logprobs for sample in samples]
    errors = audit.compare(places, logprobs, ref_logprobs, config.model.dtype, config=config.audit)
    batches, examples = pair_batches(state, pairs, ref_logprobs), [pair.examples for pair in pairs]
    if record := session.record:
        record.put(rows=[pair.row for pair in pairs], gaps=[pair.gap for pair in pairs])
        scores = [reward for pair in pairs for reward in (pair.chosen_reward, pair.rejected_reward)]
        record.put(ref_logprobs=np.concatenate(ref_logprobs), scores=scores)
    return Training(batches, loss_fn, len(pairs), metrics, examples, errors, ledger)


def validate(
    state: State, true_reward: sources.RewardFunction | None, iteration_steps: int, step: int
) -> dict[str, float]:
    """Sample and judge with the policy, compare it with the reference model, and evaluate the SFT loss."""
    config, session, tasks = state.config, state.session, state.rows["val"]
    iteration = max(step - 1, 0) // iteration_steps
    length_control = of_iteration(config.length_control, iteration)
    places = [(VAL, 0, row) for row in range(len(tasks))]

    def sample(kind: str, ids: Ids, streams: Streams, number: int) -> list[list[Sample]]:
        with session.phase(kind, policy="weights"):
            return state.generator.generate(ids, streams, number)

    judged = state.self_judge.responses(tasks, places, config.samples_per_prompt, sample)
    pair_or_none, metrics = state.self_judge.pairs(judged, length_control)
    pairs = [pair for pair in pair_or_none if pair is not None]
    if pairs:
        loss_fn = partial(preference_loss, config, of_iteration(config.beta, iteration))
        batches = pair_batches(state, pairs, state.ref.logprobs(pairs, config.batch))
        with session.phase("validate", policy="weights"), engine.during("validation"):
            metrics |= with_std(engine.evaluate(state.policy, batches, loss_fn, len(pairs)))
    with session.phase("validate", policy="weights"), engine.during("validation"):
        metrics["data_loss"] = engine.evaluate(state.policy, *sft_step(state, tasks)[:3])["loss"]
    if true_reward:
        true_rewards = true_reward([task.prompt for task in tasks], [prompt.samples for prompt in judged])
        metrics |= judging.compare_with(true_rewards, judged)
    session.samples(step, state.self_judge.tables("val_judgements", judged))
    texts = [pair.texts(state.tokenizer, state.self_judge.text_of) for pair in pairs[:4]]
    session.samples(step, [{"table": "val_pairs", **row} for row in texts])
    return {f"val/{name}": value for name, value in metrics.items()}


def main(config: Config) -> None:
    # ---- setup and checks ------------------------------------------------------------------------
    arch = architecture.read_config(config.model.path)
    adapters = adapter_files.read(config.lora, arch)
    check_model(arch, config.model, config.parallel, adapters=adapters)
    check_rollout(arch, config.rollout, config.sampling, config.model, config.parallel, adapters)
    config.check_lengths(arch.max_positions)
    session = Session(config, __file__)
    session.say(f"{parallel.layout()}; {describe_model(arch, config.model, adapters=adapters)}")

    # ---- data ------------------------------------------------------------------------------------
    files, tokenizer = config.files(toy.write), session.load_tokenizer()
    judge_config, meta_config = config.judge, config.meta
    if not config.train_data:
        templates = parallel.on_main(lambda: toy.write_templates(config.run.output / "data"))
        judge_config = replace(judge_config, judge_template=templates[0])
        if config.meta.meta_judge:
            meta_config = replace(meta_config, meta_judge_template=templates[1])

    def load() -> tuple[dict[str, Sequence[Task]], RowFormats, list[str]]:
        """Tasks by data set, the formats of their rows, and the markers in these."""
        formats, settings = RowFormats(), (config.format, arch.vocab_size, session.say)
        rows = sft_tasks.load_sft_sets(files, tokenizer, *settings, formats)
        return rows, formats, sorted(tokenizer.markers)

    rows, formats, markers = node.once(load)
    tokenizer.hide_markers(markers)  # as they are where the rows were read
    trained_format = adopt(formats, tokenizer, config.format, session.say)
    parallel.on_main(lambda: trained_format.save(config.run.output))  # for generate.py on a checkpoint
    size = config.batch.global_batch_size
    packing.check_size(len(rows["train"]), size, "--train-data")
    rows["val"] = rows["val"][config.val_rows()]
    session.find_checkpoint([task.prompt.ids, task.example.ids] for task in rows["train"])
    iteration_steps, epoch_steps = config.iteration_steps(len(rows["train"])), len(rows["train"]) // size
    layout_of_steps = {
        "steps of an iteration (--steps-per-iteration, or --max-epochs of the data)": iteration_steps,
        "--rollout-ahead": config.rollout_ahead,
        "--meta-judge": config.meta.meta_judge,
    }

    # ---- judges ----------------------------------------------------------------------------------
    room = arch.max_positions
    if config.meta.meta_judge:  # trained on as well, in pairs
        room = min(room, config.batch.micro_batch_tokens // 2)
    room -= config.sampling.max_new_tokens
    session.say(f"judge prompts of more than {room} tokens are shortened, and counted in judge_shortened")
    judge = Judge(judge_config, tokenizer, config.format, room)
    meta_judge = MetaJudge(meta_config, tokenizer, config.format, room)
    judge.check(rows["train"][0].prompt.row)
    if config.meta.meta_judge:
        meta_judge.check(rows["train"][0].prompt.row)
    self_judge = SelfJudge(judge, meta_judge, tokenizer, config.sampling.stop)
    cap = config.meta.meta_judge_class_cap if config.meta.meta_judge else math.inf
    buffer = Buffer(config.judge.judge_low, config.judge.judge_high, cap)
    true_reward = None
    if config.true_reward_fn:
        stop = config.sampling.stop
        true_reward = sources.RewardFunction(config.true_reward_fn, tokenizer, stop, "--true-reward-fn")

    # ---- model -----------------------------------------------------------------------------------
    phase, store = session.offload(estimate.resolve_offload(config))
    policy = gpt.build_policy(arch, config.model, config.parallel, adapters=adapters)
    huggingface.load(policy, huggingface.open_source(config.model.path, arch, config.parallel.seed))
    adapter_files.load(policy, config.parallel.seed)
    policy = gpt.distributed(policy)
    if path := session.verified_checkpoint():
        buffer.load(path, layout_of_steps)
        checkpoint.load_weights(path / "reference", policy.module)
    is_exact = parallel.is_exact(config.parallel)
    start_bound = reference.start_bound(config.audit_start, config.model.dtype, is_exact)
    weights, optimizer = trained_weights(policy, store), optim.build(policy, config.optim)
    phase.add("policy", policy, optimizer)
    rollout, tape = (config.rollout, config.sampling, config.model, config.parallel), Tape(session)
    generator = Generator(policy, *rollout, tokenizer, tape=tape)
    session.say(generator.describe())
    files_read = sorted(tokenizer.stop_ids), tokenizer.stop_strings, reference.weights_id(config.model.path)
    settings = (config.sampling, config.parallel.seed, config.model.dtype, arch, *files_read)
    ref = ReferenceModel(weights, policy, generator, phase, config.run.output, settings)
    state = State(config, session, tokenizer, rows, self_judge, buffer, policy, ref, generator)

    def save(saving: Saving) -> None:
        """Write the reference model and the buffer into a checkpoint."""
        ref.save(saving.directory / "reference", saving.writer)
        if parallel.is_main():
            buffer.save(saving.directory, layout_of_steps)

    # ---- loop ------------------------------------------------------------------------------------
    validation = partial(validate, state, true_reward, iteration_steps)
    session.resume({"policy": (policy, optimizer)}, validation if rows["val"] else None)
    first_step, is_reference = session.step, False
    judged: list[JudgedResponses] = []
    for step in session.steps():
        state.iteration = step // iteration_steps
        begin, end = state.iteration * iteration_steps, (state.iteration + 1) * iteration_steps
        metrics: dict[str, float] = {"iteration": state.iteration, "epoch": step // epoch_steps}
        metrics["consumed_samples"] = session.done * size
        is_reference |= step == begin  # the policy is still the reference

        if state.iteration == 0 and config.first_iteration_sft:
            numbers = session.rows_of_step(step)
            training = sft_step(state, [rows["train"][row] for row in numbers])
            if session.record:
                session.record.put(rows=numbers)
        else:
            # rollout, for several steps at once
            start = config.rollout_start(step, iteration_steps)
            sample = state.account.counting(partial(ref.sample, start + 1))
            if step in (start, first_step):
                is_first = not judged
                judged = rollout_step(state, range(start, min(start + config.rollout_ahead, end)), sample)
                state.account.judge(judged, is_new=step == start)
                if is_first:
                    responses = [response for prompt in judged for response in prompt.samples]
                    warn_if_none_ended(responses, config.sampling.max_new_tokens, session.say)
            if step == start and config.meta.meta_judge and len(buffer) < BUFFER_BATCHES * size:
                metrics |= meta_judge_step(state, judged, sample)
            tape.note(*judging.by_stream(judged))
            own = judged[(step - start) * size : (step - start + 1) * size]
            training, numbers = preference_step(state, own), [prompt.row for prompt in own]
        metrics |= training.metrics

        # update
        if training.denominator:
            with phase("train", policy="all"), engine.during(f"step {session.done}"):
                if session.record:
                    session.record.put_examples(list(chain(*training.examples)))
                    session.record.put_outputs("logprobs", policy, training.examples, config.batch)
                update = with_std(engine.forward_backward(policy, *training[:3]))
                if session.record:
                    session.record.put_update("policy", policy, update)
                if is_reference and "preference_loss" in update:
                    beta = of_iteration(config.beta, state.iteration)
                    reference.check_start(update, config.loss, beta, start_bound)
                is_reference = False
                metrics |= update | optim.update(optimizer, config.optim, step, session.total_steps)
        else:
            session.say(f"step {session.done}: no prompt gave a pair, so nothing was learnt")
        metrics = {f"train/{name}": value for name, value in metrics.items()} | training.audit
        metrics |= session.use_prompts(numbers)
        if training.ledger:
            waiting = judged[(step - start + 1) * size :], buffer, session.done == end
            metrics |= state.account.close(f"step {session.done}", session.latest, training.ledger, *waiting)
        rollout_time = metrics["timers/rollout_time"] = session.clock.total(*ROLLOUT)
        metrics["timers/train_time"] = session.clock.total("train")

        if rows["val"] and (session.validates() or session.done == end):
            metrics |= validation(session.done)
            metrics["timers/validation_time"] = session.clock.total(*ROLLOUT) - rollout_time

        # the next iteration begins
        if session.done == end:
            with phase("next_iteration", policy="all"):
                ref.follow_policy()
                optim.reset(optimizer)
            buffer.clear()

        if saved := session.end_step(metrics, save):
            ref.discard_samples(config.rollout_start(saved, iteration_steps) + 1)

    session.export(policy, [tokenizer.save, trained_format.save])


if __name__ == "__main__":
    launch.run(main, Config)
