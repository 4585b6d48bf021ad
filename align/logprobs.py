"""Log-probabilities of targets straight from hidden states: the one function for training and reference.

The vocabulary may be split over tensor parallel ranks. Logits exist for `CHUNK` tokens at a time, in float32
in the softmax, and are computed again in the backward pass: a [tokens, vocabulary] tensor never exists.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from align.matmul import add_product, linear, padded, product, uses_onednn

CHUNK = 256  # tokens whose logits exist at one time


def target_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, group: dist.ProcessGroup
) -> Tensor:
    """log p(targets) for each token, in nats.

    Args:
        hidden: [n, H] final hidden states, the same on every rank of the group. The gradient that comes back
            is this rank's part: pass hidden through Megatron's copy_to (or gather_from_sequence) region.
        weight: [V_padded / tp, H] this rank's rows of the output embedding.
        targets: [n] int64 token ids in [0, vocab_size).
        vocab_size: V without the rows that only pad the embedding; they get no probability.
        group: the tensor parallel group.

    Returns:
        [n] float32.
    """
    count = len(hidden)
    if uses_onednn(hidden):
        hidden, targets = padded(hidden), padded(targets)
    return TargetLogProbs.apply(hidden, weight, targets, vocab_size, group)[:count]


class TargetLogProbs(torch.autograd.Function):
    """log p(y) = z_y - log sum_v exp z_v, z = hidden weight^T;  d log p / d z = onehot(y) - softmax(z)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, group):  # noqa: ANN001
        tp, first = group.size(), group.rank() * weight.shape[0]
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        logsumexp = torch.empty_like(logprobs)
        for a in range(0, len(hidden), CHUNK):
            here = slice(a, a + CHUNK)
            z = logits(hidden[here], weight, first, vocab_size)  # [c, V/tp]
            top = z.amax(1)
            if tp > 1:
                dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
            index, owned = local_index(targets[here], first, len(weight))
            target = z.gather(1, index[:, None])[:, 0].masked_fill(~owned, 0.0)
            total = z.sub_(top[:, None]).exp_().sum(1)
            parts = torch.stack([target, total])
            if tp > 1:
                dist.all_reduce(parts, group=group)
            logsumexp[here] = top + parts[1].log()
            logprobs[here] = parts[0] - logsumexp[here]
        ctx.save_for_backward(hidden, weight, targets, logsumexp)
        ctx.vocab_size, ctx.first = vocab_size, first
        return logprobs

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for a in range(0, len(hidden), CHUNK):
            here = slice(a, a + CHUNK)
            z = logits(hidden[here], weight, ctx.first, ctx.vocab_size)
            z.sub_(logsumexp[here, None]).exp_().mul_(-grad[here, None])  # -softmax * grad
            index, owned = local_index(targets[here], ctx.first, len(weight))
            z.scatter_add_(1, index[:, None], (grad[here] * owned)[:, None])
            z = z.to(hidden.dtype)
            grad_hidden[here] = product(z, weight)
            add_product(grad_weight, z.t(), hidden[here])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def logits(hidden: Tensor, weight: Tensor, first: int, vocab_size: int) -> Tensor:
    """[c, V/tp] float32, minus infinity in the rows past the vocabulary."""
    z = linear(hidden, weight).float()
    real = min(max(vocab_size - first, 0), len(weight))
    z[:, real:] = float("-inf")
    return z


def local_index(targets: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Column of each target in this rank's shard (0 where it is not here), and whether it is here."""
    index = targets - first
    owned = (index >= 0) & (index < rows)
    return index.masked_fill(~owned, 0), owned
