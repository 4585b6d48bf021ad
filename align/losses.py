"""The losses, as pure functions of tensors. No model, no configuration, no process group.

Index t of `logprobs` and `mask` means the prediction of `targets[t]`; a batch is packed, so tensors are [T],
several sequences end to end. A loss is a sum: the script divides it by the denominator of the whole step.
"""

from torch import Tensor


def sft_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Supervised fine-tuning: the negative log-likelihood of the trained tokens.

        L = - sum_t mask_t log p(targets_t | tokens_<=t)

    Args:
        logprobs: [T] log-probabilities of the targets, in nats.
        mask: [T] 1 where the target is trained, else 0.

    Returns:
        The sum over trained tokens, a scalar in nats.
    """
    return -(logprobs * mask).sum()
