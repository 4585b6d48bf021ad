"""The loss of every algorithm as its script computes it, on the rows of rows.py."""

from functools import partial

from torch import Tensor

from align.data.packing import Batch
from align.losses import preference, rl, supervised
from align.losses.statistics import log_ratio_statistics, pair_statistics

BETA = 0.1
CLIP, VALUE_CLIP, ENTROPY_COEF, KL_COEF = 0.2, 0.2, 0.01, 0.05
SEED = 5  # of a reward model's head
# Adam divides a gradient by its own size: with the usual 1e-8 it makes whole steps of gradients that are
# nothing but rounding, and one bit of a weight moves metrics by 1e-4.
ADAM_EPS = 1e-5
# Adam's first step has nearly the same size for every gradient, also for those that are rounding errors of 0.
# Scores show that more than log-probs do.
LR = {
    **{"sft": 1e-3, "dpo": 1e-3, "ppo": 1e-3, "grpo": 1e-3},
    **{"ranking": 1e-4, "regression": 1e-4, "critic": 1e-4},
}


def sft_loss(batch: Batch, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Supervised fine-tuning."""
    assert len(logprobs) == len(batch.tokens)
    return supervised.sft_loss(logprobs, batch.mask), {"square": (logprobs.square() * batch.mask).sum()}


def sequence_logprobs(batch: Batch, logprobs: Tensor) -> Tensor:
    """[2P]: chosen, rejected, chosen, ..."""
    return preference.sequence_logprobs(logprobs, batch.mask, batch.lengths)


def dpo_loss(batch: Batch, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimization; the reference's log-probs are in batch.extra["ref"]."""
    policy, reference = sequence_logprobs(batch, logprobs).view(-1, 2), batch.extra["ref"].view(-1, 2)
    chosen, rejected = policy.unbind(1)
    ref_chosen, ref_rejected = reference.unbind(1)
    loss = preference.dpo(chosen, rejected, ref_chosen, ref_rejected, BETA).sum()
    return loss, log_ratio_statistics(chosen, rejected, ref_chosen, ref_rejected, BETA)


def ranking_loss(batch: Batch, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Reward model on pairs with margins."""
    chosen, rejected = values[batch.mask.bool()].double().view(-1, 2).unbind(1)
    loss = supervised.ranking(chosen, rejected, batch.extra["target"]).sum()
    return loss, pair_statistics(chosen, rejected)


def regression_loss(batch: Batch, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Reward model on labels."""
    error, present = supervised.regression(values[batch.mask.bool()].double(), batch.extra["target"])
    return error, {"present": present}


def ppo_loss(batch: Batch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped objective with an entropy bonus."""
    logprobs, entropy = output.index_select(0, batch.trained).double().unbind(1)
    arguments = batch.extra["old"], batch.extra["advantages"], batch.mask.index_select(0, batch.trained)
    loss, metrics = rl.policy_loss(logprobs, *arguments, partial(rl.ppo, clip=CLIP))
    return loss - ENTROPY_COEF * entropy.sum(), {**metrics, "entropy": entropy.sum()}


def grpo_loss(batch: Batch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO: PPO's objective, and the k3 estimate of the KL to the reference in the loss."""
    logprobs, entropy = output.index_select(0, batch.trained).double().unbind(1)
    arguments = batch.extra["old"], batch.extra["advantages"], batch.mask.index_select(0, batch.trained)
    loss, metrics = rl.policy_loss(logprobs, *arguments, partial(rl.ppo, clip=CLIP))
    kl = rl.kl_k3(logprobs, batch.extra["ref"]).sum()
    return loss + KL_COEF * kl, {**metrics, "entropy": entropy.sum(), "kl": kl.detach()}


def critic_loss(batch: Batch, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's critic."""
    tokens = values.index_select(0, batch.trained)[:, 0].double()
    return rl.value_loss(tokens, batch.extra["values"], batch.extra["returns"], VALUE_CLIP)


LOSSES = {
    "sft": sft_loss,
    "dpo": dpo_loss,
    "ranking": ranking_loss,
    "regression": regression_loss,
    "ppo": ppo_loss,
    "grpo": grpo_loss,
    "critic": critic_loss,
}
# rows of the model's head; 0: a language model
LABELS = {"sft": 0, "dpo": 0, "ppo": 0, "grpo": 0, "ranking": 1, "regression": 2, "critic": 1}
