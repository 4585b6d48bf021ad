"""Direct preference optimization and its family: preferred answers become likelier than rejected ones.

    torchrun --nproc_per_node 2 train_dpo.py --model runs/sft/hf --loss dpo --beta 0.1 \
        --train-data train_comparisons.jsonl --val-data test_comparisons.jsonl --output runs/dpo

Rows are {"prompt", "chosen", "rejected"}, as text or as messages: align/data/preferences.py has the formats.
--loss names a function of align/losses/preference.py, where the equations and papers are. The reference is
the model that training starts from. OUTPUT/hf is the result. Without arguments the built-in tiny model learns
a toy task.
"""

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from align.data import packing, preferences, row_counts, toy
from align.data.packing import Batch
from align.data.preferences import PreferenceFormat
from align.data.tokenizer import load_tokenizer
from align.distributed import launch, parallel
from align.errors import UserError
from align.flags import BOUND, COEFFICIENT, SCALE, below, check_ranges, refuse_unused
from align.losses import preference as losses
from align.model import architecture, gpt, huggingface
from align.model.config import check_model, describe_model
from align.tracking.metrics import Clock, speed, with_std
from align.tracking.run import Run, RunConfig
from align.training import batching, checkpoint, continuation, engine, optim, reference
from align.training.config import CommonConfig
from align.training.optim import OptimConfig

LOSSES = (
    "dpo ipo scale rpo_bwd_kl rpo_fwd_kl rpo_sq cdpo robust hinge kto_pair simpo orpo dpop apo_zero "
    "sppo_hard exo_pair nca_pair"
).split()
REFERENCE_FREE = ("simpo", "orpo")  # both are defined on log-probs per token

# ---- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(CommonConfig):
    loss: Literal[tuple(LOSSES)] = "dpo"
    """preference loss, the function of that name in align/losses/preference.py"""
    beta: float | None = None
    """beta of DPO: the implicit reward is beta log(pi / pi_ref) (default: 0.1; simpo: 2)"""
    sft_weight: float | None = None
    """weight of the SFT loss: the chosen responses' negative log-likelihood (default: 0; orpo: 1)"""
    average_logprobs: bool | None = None
    """log-probs per token instead of per response (default: False; simpo and orpo: True)"""
    sft_average_logprobs: bool | None = None
    """the same for the SFT loss (default: as --average-logprobs)"""
    label_smoothing: float | None = None
    """label smoothing of cdpo, robust, exo_pair: probability that a pair is labelled the wrong way round
    (default: 0.1; exo_pair: 0.001)"""
    simpo_gamma: float | None = None
    """target reward margin gamma of simpo (default: 0.5)"""
    dpop_lambda: float | None = None
    """lambda of dpop: weight of the penalty for chosen responses that lose likelihood (default: 50)"""
    reward_scale: float | None = None
    """scale, rpo_*: factor on chosen_reward - rejected_reward of the data (default: 1)"""
    reference: Literal["precompute", "swap"] | None = None
    """reference log-probs: precompute all before training (default), or swap the reference weights in at each
    step"""
    audit_start: float | None = None
    """bound on the mean |log pi - log pi_ref| of a response before the first update, where both are one
    model, in nats (default: 0 on a CPU and with --deterministic, else 1e-3 in fp32, 1 in bf16; inf: none)"""
    format: PreferenceFormat = PreferenceFormat()
    run: RunConfig = RunConfig(output=Path("runs/dpo"))
    optim: OptimConfig = OptimConfig(lr=1e-6, min_lr=5e-7)

    def __post_init__(self):
        super().__post_init__()
        check_ranges(
            self,
            beta=SCALE,
            sft_weight=COEFFICIENT,
            label_smoothing=below(0, 0.5),
            simpo_gamma=COEFFICIENT,
            dpop_lambda=COEFFICIENT,
            reward_scale=SCALE,
            audit_start=BOUND,
        )
        inputs = inspect.signature(getattr(losses, self.loss)).parameters
        for name in ("label_smoothing", "simpo_gamma", "dpop_lambda", "reward_scale"):
            used = "reward_gap" if name == "reward_scale" else name
            if used not in inputs:
                refuse_unused(self, Config, name, f"with --loss {self.loss}")
        if self.loss in REFERENCE_FREE and (self.reference or self.average_logprobs is False):
            raise UserError(
                f"--loss {self.loss} has no reference and is defined on log-probs per token: "
                "leave out --reference and --average-logprobs"
            )
        if self.loss in REFERENCE_FREE:
            refuse_unused(self, Config, "audit_start", f"with --loss {self.loss}, which has no reference")
        if not self.sft_weight and (self.sft_weight is not None or self.loss != "orpo"):
            refuse_unused(self, Config, "sft_average_logprobs", "without --sft-weight")
        if self.label_smoothing is not None:
            losses.check_label_smoothing(self.label_smoothing, zero_allowed=self.loss != "exo_pair")


def main(config: Config) -> None:
    # ---- setup and checks ------------------------------------------------------------------------
    arch = architecture.read_config(config.model.path)
    check_model(arch, config.model, config.parallel)
    packing.check_budget(config.format.max_seq_len, config.batch, arch.max_positions, per_row=2)
    stop = parallel.Stop(config.loop.max_time)
    run = Run(config.run, asdict(config), __file__, parallel.is_main())
    run.say(f"{parallel.layout()}; {describe_model(arch, config.model)}")

    # ---- data ------------------------------------------------------------------------------------
    files = {"train": config.train_data, "val": config.val_data}
    if not config.train_data:
        toy_files = parallel.on_main(lambda: toy.write_comparisons(config.run.output / "data"))
        files = dict(zip(files, toy_files, strict=True))
    tokenizer = load_tokenizer(config.model.path, run.say, config.text, parallel.on_main(run.first_day))
    loss = getattr(losses, config.loss)
    wanted = inspect.signature(loss).parameters  # what it takes beside log-probs
    pairs = {"train": [], "val": []}
    for name in [name for name in files if files[name]]:
        pairs[name], counts = preferences.load_pairs(files[name], tokenizer, config.format)
        packing.check_ids([example for pair in pairs[name] for example in pair.examples], arch.vocab_size)
        run.say(f"{name} data: {row_counts.describe(counts)}")
        if "reward_gap" in wanted:
            preferences.check_rewards(counts, f"--{name}-data", config.loss)
    packing.check_size(len(pairs["train"]), config.batch.global_batch_size, "--train-data")
    run.say(f"first pair, trained tokens in brackets:\n{preferences.show(pairs['train'][0], tokenizer)}")
    pairs["val"] = pairs["val"][config.val_rows()]
    sequences = ([side.ids for side in pair.examples] for pair in pairs["train"])
    resumed = continuation.find(config, __file__, sequences, run.say)
    total_steps = resumed.total_steps
    optim.check_optim(config.optim, total_steps)
    run.total_steps = total_steps

    # ---- model -----------------------------------------------------------------------------------
    policy = gpt.build_policy(arch, config.model, config.parallel)
    huggingface.load(policy, huggingface.open_source(config.model.path, arch, config.parallel.seed))
    policy = gpt.distributed(policy)
    optimizer = optim.build(policy, config.optim)

    # ---- reference -------------------------------------------------------------------------------
    beta = config.beta or (2.0 if config.loss == "simpo" else 0.1)
    average = config.loss in REFERENCE_FREE if config.average_logprobs is None else config.average_logprobs
    sft_average = average if config.sft_average_logprobs is None else config.sft_average_logprobs
    reward_scale = 1.0 if config.reward_scale is None else config.reward_scale
    ref = None

    def sequence_logprobs(batch: Batch, logprobs: Tensor) -> Tensor:
        """[2P]: chosen, rejected, chosen, ..."""
        return losses.sequence_logprobs(logprobs, batch.mask, batch.lengths, average)

    def micro_batches(name: str, rows: Sequence[int]) -> list[Batch]:
        """This rank's share of some pairs of a data set, packed."""
        taken = [pairs[name][row] for row in rows]
        values = {
            "row": np.array(rows)[:, None],
            "reward_gap": reward_scale * np.array([[pair.reward_gap] for pair in taken]),
        }
        return batching.micro_batches(policy, [pair.examples for pair in taken], config.batch, values)

    start_bound = config.audit_start
    if start_bound is None:
        start_bound = reference.start_bound(config.model.dtype, parallel.is_exact(config.parallel))
    if config.loss not in REFERENCE_FREE:
        reference.check_same(config.run.output, config.model.path, config.checkpoint)
    if config.reference == "swap":
        ref = reference.Swapped(policy, sequence_logprobs)
    elif config.loss not in REFERENCE_FREE:
        run.say("reference log-probs: from OUTPUT/reference.safetensors, or a pass over all pairs makes it")
        steps = range(resumed.pass_start, total_steps)
        uses = {"train": map(resumed.rows_of_step, steps), "val": [range(len(pairs["val"]))]}
        made_of = reference.fingerprint(
            config.model, pairs, config.batch, config.parallel, total_steps, average
        )
        path = config.run.output / "reference.safetensors"
        ref = reference.Precomputed(policy, sequence_logprobs, micro_batches, uses, path, made_of)

    # ---- loss ------------------------------------------------------------------------------------
    settings = {name: value for name, value in vars(config).items() if name in wanted and value is not None}
    settings["beta"] = beta
    sft_weight = float(config.loss == "orpo") if config.sft_weight is None else config.sft_weight

    def loss_fn(batch: Batch, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        both = sequence_logprobs(batch, logprobs).view(-1, 2)
        ref_both = batch.extra.get("ref", torch.zeros_like(both)).view(-1, 2)
        four = (*both.unbind(1), *ref_both.unbind(1))  # [P] each: policy, reference; chosen, rejected
        inputs = {name: value for name, value in batch.extra.items() if name in wanted}
        chosen = four[0]
        if sft_average != average:
            chosen = losses.sequence_logprobs(logprobs, batch.mask, batch.lengths, sft_average)[::2]  # [P]
        preference, sft = loss(*four, **settings, **inputs).sum(), -chosen.sum()
        statistics = losses.log_ratio_statistics(*four, beta)
        if ref is None:
            del statistics["logratio_abs_mean"]
        return preference + sft_weight * sft, {"preference_loss": preference, "sft_loss": sft, **statistics}

    def add_inputs(batches: list[Batch], name: str, num_pairs: int) -> None:
        """Give micro-batches of a data set what the loss needs beside the policy's log-probs."""
        if ref is not None and "ref" not in batches[0].extra:
            ref.attach(batches, name)
        if "kl_chosen" in wanted:
            reference.attach_kl(batches, policy, sequence_logprobs, num_pairs)

    def validate(step: int) -> dict[str, float]:
        with engine.during("validation"):
            add_inputs(val_batches, "val", len(pairs["val"]))
            found = with_std(engine.evaluate(policy, val_batches, loss_fn, len(pairs["val"])))
            if ref is not None:
                ref.attach(sample, "val")
        logprobs = engine.outputs(policy, sample, sequence_logprobs)[0]  # [2] where rank 0 is, else [0]
        rewards = (beta * (logprobs - sample[0].extra.get("ref", 0.0))).tolist()
        table = zip(("reward_chosen", "reward_rejected"), rewards, strict=False)
        run.samples(step, [{**preferences.texts(pairs["val"][0], tokenizer), **dict(table)}])
        return {f"val/{name}": value for name, value in found.items()}

    if pairs["val"]:
        val_batches, sample = micro_batches("val", range(len(pairs["val"]))), micro_batches("val", [0])

    # ---- resume ----------------------------------------------------------------------------------
    first_step, latest = checkpoint.resume(resumed.checkpoint, policy, optimizer)
    run.resume_at(first_step)
    if first_step:
        run.say(resumed.describe())
    elif pairs["val"]:
        latest = validate(0)
        run.log(0, latest)
    checkpoint.check_monitor(config.checkpoint, latest)

    # ---- loop ------------------------------------------------------------------------------------
    clock, reason = Clock(), None
    for step in range(first_step, total_steps):
        # batch
        rows = resumed.rows_of_step(step)
        batches = micro_batches("train", rows)
        clock.lap("data")
        add_inputs(batches, "train", len(rows))
        clock.lap("reference")

        # update
        lr = optim.learning_rate(config.optim, step, total_steps)
        with engine.during(f"step {step + 1}"):
            found = with_std(engine.forward_backward(policy, batches, loss_fn, len(rows)))
            if step == 0 and ref is not None:
                reference.check_start(found, config.loss, beta, start_bound)
            clock.lap("forward_backward")
            found |= {"grad_norm": optim.step(optimizer, lr), "lr": lr}
            clock.lap("optimizer")

        # evaluate
        done, reason = step + 1, stop.reason()
        metrics = {f"train/{name}": value for name, value in found.items()}
        tokens = sum(pairs["train"][row].num_inputs for row in rows)
        computed = sum(packing.num_places(pairs["train"][row].examples) for row in rows)
        seconds = clock.total("data", "reference", "forward_backward", "optimizer")
        pace = speed(arch.matmul_params, tokens, computed, seconds)
        if pairs["val"] and config.validates(done, total_steps):
            metrics |= validate(done)
            clock.lap("validate")

        # log, then save: what a checkpoint continues has been logged
        latest |= metrics
        checkpoint.check_monitor(config.checkpoint, latest)
        run.log(done, {**metrics, **clock.shares(), **pace})
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
