"""Direct preference optimization and its family: preferred responses become likelier than rejected ones.

    torchrun --nproc_per_node 2 train_dpo.py --model runs/sft/hf --loss dpo --beta 0.1 \
        --train-data train_comparisons.jsonl --val-data test_comparisons.jsonl --output runs/dpo

Rows are {"prompt", "chosen", "rejected"}, as text or as messages: align/data/preferences.py has the formats.
--loss names a function of align/losses/preference.py, where the equations and papers are. The reference is
the model that training starts from; with LoRA it is the base model, also beside an --adapter. OUTPUT/hf is
the result. Without arguments the built-in tiny model learns a toy task.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from align.data import packing, preferences, row_counts, toy
from align.data.packing import Batch
from align.data.preferences import Pair, PreferenceFormat
from align.distributed import launch, node, parallel
from align.errors import UserError
from align.flags import BOUND, COEFFICIENT, SCALE, below, check_ranges, refuse_unused
from align.losses import preference
from align.losses.statistics import log_ratio_statistics
from align.model import adapter_files, architecture, gpt, huggingface, lora
from align.model.config import check_model, describe_model
from align.model.lora import LoraConfig
from align.planning import estimate
from align.tracking.metrics import speed, with_std
from align.tracking.run import RunConfig
from align.training import batching, engine, optim, reference
from align.training.config import CommonConfig
from align.training.optim import OptimConfig
from align.training.session import Session

# --loss: the function, and what it takes beside the log-probs and beta
LOSSES: dict[str, tuple[Callable[..., Tensor], str]] = {
    "dpo": (preference.dpo, ""),
    "ipo": (preference.ipo, ""),
    "scale": (preference.scale, "gap"),
    "rpo_bwd_kl": (preference.rpo_bwd_kl, "gap"),
    "rpo_fwd_kl": (preference.rpo_fwd_kl, "gap"),
    "rpo_sq": (preference.rpo_sq, "gap"),
    "cdpo": (preference.cdpo, "label_smoothing"),
    "robust": (preference.robust, "label_smoothing"),
    "hinge": (preference.hinge, ""),
    "kto_pair": (preference.kto_pair, "kl_chosen kl_rejected"),
    "simpo": (preference.simpo, "simpo_gamma"),
    "orpo": (preference.orpo, ""),
    "dpop": (preference.dpop, "dpop_lambda"),
    "apo_zero": (preference.apo_zero, ""),
    "sppo_hard": (preference.sppo_hard, ""),
    "exo_pair": (preference.exo_pair, "label_smoothing"),
    "nca_pair": (preference.nca_pair, ""),
}
REFERENCE_FREE = ("simpo", "orpo")  # both are defined on log-probs per token

# ---- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(CommonConfig):
    loss: Literal[tuple(LOSSES)] = "dpo"  # type: ignore[valid-type]
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
    overlap_param_gather: bool = False
    """overlap the all-gather of updated weights with the next forward pass, by buckets; needs data parallel
    (or context parallel) ranks"""
    format: PreferenceFormat = PreferenceFormat()
    lora: LoraConfig = LoraConfig()
    run: RunConfig = RunConfig(output=Path("runs/dpo"))
    optim: OptimConfig = OptimConfig(lr=1e-6, min_lr=5e-7)
    plan = estimate.dpo  # for tools/plan.py

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, beta=SCALE, label_smoothing=below(0, 0.5), reward_scale=SCALE, audit_start=BOUND)
        check_ranges(self, sft_weight=COEFFICIENT, simpo_gamma=COEFFICIENT, dpop_lambda=COEFFICIENT)
        for flag in ("label_smoothing", "simpo_gamma", "dpop_lambda", "reward_scale"):
            if flag.replace("reward_scale", "gap") not in self.loss_inputs:
                refuse_unused(self, Config, flag, f"with --loss {self.loss}")
        if self.loss in REFERENCE_FREE and (self.reference or self.average_logprobs is False):
            raise UserError(
                f"--loss {self.loss} has no reference and is defined on log-probs per token: "
                "leave out --reference and --average-logprobs"
            )
        if self.loss in REFERENCE_FREE:
            refuse_unused(self, Config, "audit_start", f"with --loss {self.loss}, which has no reference")
        if self.lora.enabled:
            refuse_unused(self, Config, "reference", "with LoRA, whose reference is the base model")
        if self.lora.adapter is not None:
            refuse_unused(self, Config, "audit_start", "with --adapter, which is not the reference")
        if not self.sft_weight and (self.sft_weight is not None or self.loss != "orpo"):
            refuse_unused(self, Config, "sft_average_logprobs", "without --sft-weight")
        if self.label_smoothing is not None:
            preference.check_label_smoothing(self.label_smoothing, zero_allowed=self.loss != "exo_pair")

    @property
    def loss_inputs(self) -> list[str]:
        """Inputs of the loss beside the log-probs and beta: flags, and items of a micro-batch."""
        return LOSSES[self.loss][1].split()


def main(config: Config) -> None:
    # ---- setup and checks ------------------------------------------------------------------------
    arch = architecture.read_config(config.model.path)
    adapters = adapter_files.read(config.lora, arch)
    check_model(arch, config.model, config.parallel, config.overlap_param_gather, adapters)
    packing.check_budget(config.format.max_seq_len, config.batch, arch.max_positions, per_row=2)
    session = Session(config, __file__)
    description = describe_model(arch, config.model, config.overlap_param_gather, adapters)
    session.say(f"{parallel.layout()}; {description}")

    # ---- data ------------------------------------------------------------------------------------
    files, tokenizer = config.files(toy.write_comparisons), session.load_tokenizer()
    pairs: dict[str, Sequence[Pair]] = {"train": [], "val": []}
    for name in (name for name in files if files[name]):
        load = partial(preferences.load_pairs, files[name], tokenizer, config.format)
        pairs[name], counts = node.once(load)
        packing.check_ids((example for pair in pairs[name] for example in pair.examples), arch.vocab_size)
        session.say(f"{name} data: {row_counts.describe(counts)}")
        if "gap" in config.loss_inputs:
            preferences.check_rewards(counts, f"--{name}-data", config.loss)
    packing.check_size(len(pairs["train"]), config.batch.global_batch_size, "--train-data")
    session.say(f"first pair, trained tokens in brackets:\n{preferences.show(pairs['train'][0], tokenizer)}")
    pairs["val"] = pairs["val"][config.val_rows()]
    session.find_checkpoint([example.ids for example in pair.examples] for pair in pairs["train"])

    # ---- model -----------------------------------------------------------------------------------
    policy = gpt.build_policy(arch, config.model, config.parallel, adapters=adapters)
    huggingface.load(policy, huggingface.open_source(config.model.path, arch, config.parallel.seed))
    adapter_files.load(policy, config.parallel.seed)
    policy = gpt.distributed(policy, config.overlap_param_gather)
    optimizer = optim.build(policy, config.optim)

    # ---- reference -------------------------------------------------------------------------------
    average = config.loss in REFERENCE_FREE if config.average_logprobs is None else config.average_logprobs
    reward_scale = 1.0 if config.reward_scale is None else config.reward_scale

    def sequence_logprobs(batch: Batch, logprobs: Tensor) -> Tensor:
        """[2P]: chosen, rejected, chosen, ..."""
        return preference.sequence_logprobs(logprobs, batch.mask, batch.lengths, average)

    def micro_batches(name: str, rows: Sequence[int]) -> list[Batch]:
        """This rank's share of some pairs of a data set, packed."""
        chosen_pairs = [pairs[name][row] for row in rows]
        values = {
            "row": np.array(rows)[:, None],
            "gap": reward_scale * np.array([[pair.reward_gap] for pair in chosen_pairs]),
        }
        return batching.micro_batches(policy, [pair.examples for pair in chosen_pairs], config.batch, values)

    ref: reference.Swapped | reference.BaseModel | reference.Precomputed | None = None
    is_exact = parallel.is_exact(config.parallel)
    start_bound = reference.start_bound(config.audit_start, config.model.dtype, is_exact)
    if config.loss not in REFERENCE_FREE:
        reference.check_same(config.run.output, config.model.path, config.checkpoint)
    if config.reference == "swap":
        ref = reference.Swapped(policy, sequence_logprobs)
    elif adapters and config.loss not in REFERENCE_FREE:
        ref = reference.BaseModel(policy, sequence_logprobs)
    elif config.loss not in REFERENCE_FREE:
        path = config.run.output / "reference.safetensors"
        session.say(f"reference log-probs: read from {path}, or computed for all pairs now")
        steps = range(session.continued.pass_start, session.total_steps)
        uses = {"train": map(session.rows_of_step, steps), "val": [range(len(pairs["val"]))]}
        settings = (config.batch, config.parallel, session.total_steps, average)
        fingerprint = reference.fingerprint(config.model, pairs, *settings)
        ref = reference.Precomputed(policy, sequence_logprobs, micro_batches, uses, path, fingerprint)

    # ---- loss ------------------------------------------------------------------------------------
    beta = config.beta or (2.0 if config.loss == "simpo" else 0.1)
    sft_weight = float(config.loss == "orpo") if config.sft_weight is None else config.sft_weight
    sft_average = average if config.sft_average_logprobs is None else config.sft_average_logprobs
    flags = {name: vars(config).get(name) for name in config.loss_inputs}
    preference_loss = partial(LOSSES[config.loss][0], **{k: v for k, v in flags.items() if v is not None})

    def loss_fn(batch: Batch, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        policy_logprobs = sequence_logprobs(batch, logprobs)  # [2P]
        ref_logprobs = batch.extra.get("ref", torch.zeros_like(policy_logprobs))  # [2P]
        policy_chosen, policy_rejected = policy_logprobs.view(-1, 2).unbind(1)  # [P]
        ref_chosen, ref_rejected = ref_logprobs.view(-1, 2).unbind(1)  # [P]
        extra = {name: batch.extra[name] for name in config.loss_inputs if name in batch.extra}

        loss = preference_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, **extra).sum()
        statistics = log_ratio_statistics(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
        if ref is None:
            del statistics["logratio_abs_mean"]
        if sft_average != average:
            mean_or_sum = preference.sequence_logprobs(logprobs, batch.mask, batch.lengths, sft_average)
            policy_chosen = mean_or_sum[::2]
        nll = -policy_chosen.sum()
        return loss + sft_weight * nll, {"preference_loss": loss, "sft_loss": nll, **statistics}

    def add_inputs(batches: list[Batch], name: str, num_pairs: int) -> None:
        """Set the inputs of the loss beside the policy's log-probs in micro-batches of a data set."""
        if ref is not None and "ref" not in batches[0].extra:
            ref.attach(batches, name)
        if "kl_chosen" in config.loss_inputs:
            reference.attach_kl(batches, policy, sequence_logprobs, num_pairs)

    def validate(step: int) -> dict[str, float]:
        with engine.during("validation"):
            add_inputs(val_batches, "val", len(pairs["val"]))
            metrics = with_std(engine.evaluate(policy, val_batches, loss_fn, len(pairs["val"])))
            if ref is not None:
                ref.attach(sample, "val")
        logprobs = engine.outputs(policy, sample, sequence_logprobs)[0]  # [2] on rank 0's replica, else [0]
        rewards = (beta * (logprobs - sample[0].extra.get("ref", 0.0))).tolist()
        record = zip(("reward_chosen", "reward_rejected"), rewards, strict=False)
        session.samples(step, [{**preferences.texts(pairs["val"][0], tokenizer), **dict(record)}])
        return {f"val/{name}": value for name, value in metrics.items()}

    if pairs["val"]:
        val_batches, sample = micro_batches("val", range(len(pairs["val"]))), micro_batches("val", [0])

    # ---- loop ------------------------------------------------------------------------------------
    session.resume({"policy": (policy, optimizer)}, validate if pairs["val"] else None)
    clock = session.clock
    for step in session.steps():
        # batch
        rows = session.rows_of_step(step)
        batches = micro_batches("train", rows)
        clock.lap("data")
        add_inputs(batches, "train", len(rows))
        clock.lap("reference")

        # update
        step_pairs = [pairs["train"][row] for row in rows]
        if record := session.record:
            record.put(rows=rows)
            record.put_examples([example for pair in step_pairs for example in pair.examples])
            record.put_outputs("logprobs", policy, [pair.examples for pair in step_pairs], config.batch)
            if ref is not None:
                record.put_extra("ref_logprobs", batches, "ref")
        with engine.during(f"step {session.done}"):
            update = with_std(engine.forward_backward(policy, batches, loss_fn, len(rows)))
            if record:
                record.put_update("policy", policy, update)
            if step == 0 and ref is not None and config.lora.adapter is None:
                reference.check_start(update, config.loss, beta, start_bound)
            clock.lap("forward_backward")
            update |= optim.update(optimizer, config.optim, step, session.total_steps)
            clock.lap("optimizer")
        metrics = {f"train/{name}": value for name, value in update.items()}
        tokens = sum(pair.num_inputs for pair in step_pairs)
        computed = sum(packing.num_places(pair.examples) for pair in step_pairs)
        seconds = clock.total("data", "reference", "forward_backward", "optimizer")
        metrics |= speed(lora.matmul_params(arch, adapters), tokens, computed, seconds)

        # evaluate
        if pairs["val"] and session.validates():
            metrics |= validate(session.done)
            clock.lap("validate")
        session.end_step(metrics)

    session.export(policy, [tokenizer.save])


if __name__ == "__main__":
    launch.run(main, Config)
