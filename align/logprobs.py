"""Log-probabilities of targets straight from hidden states, for training and reference alike; and entropies.

The vocabulary may be split over tensor parallel ranks. Logits exist for `CHUNK` tokens at a time, in float32
in the softmax, and are computed again in the backward pass: a [tokens, vocabulary] tensor never exists.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from align.matmul import add_product, linear, padded, product, uses_onednn

CHUNK = 256  # tokens whose logits exist at one time
# Logit of a row past the vocabulary: its probability p = exp(ABSENT - ...) is exactly 0, and so is p log p,
# which with minus infinity would be NaN.
ABSENT = -1e30


def target_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    group: dist.ProcessGroup,
    temperature: float = 1.0,
) -> Tensor:
    """log p(targets) for each token, in nats, p = softmax(logits / temperature).

    Args:
        hidden: [n, H] final hidden states, the same on every rank of the group. The gradient that comes back
            is this rank's part: pass hidden through Megatron's copy_to (or gather_from_sequence) region.
        weight: [V_padded / tp, H] this rank's rows of the output embedding.
        targets: [n] int64 token ids in [0, vocab_size).
        vocab_size: V without the rows that only pad the embedding; they get no probability.
        group: the tensor parallel group.
        temperature: what the logits are divided by, above 0.

    Returns:
        [n] float32.
    """
    given = hidden, weight, targets, vocab_size, group, temperature
    return logprobs_and_entropies(*given, entropy=False)[0]


def target_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    group: dist.ProcessGroup,
    temperature: float = 1.0,
) -> Tensor:
    """What target_logprobs gives, and the entropy H = -sum_v p_v log p_v of each token's distribution p.

    Returns:
        [n, 2] float32: log-prob and entropy, in nats. Either has a gradient.
    """
    given = hidden, weight, targets, vocab_size, group, temperature
    return torch.stack(logprobs_and_entropies(*given, entropy=True), 1)


def logprobs_and_entropies(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    group: dist.ProcessGroup,
    temperature: float,
    entropy: bool,
) -> list[Tensor]:
    """Log-probs [n] of the targets, and with `entropy` the entropies [n], in float32."""
    count = len(hidden)
    if uses_onednn(hidden):
        hidden, targets = padded(hidden), padded(targets)
    found = TargetLogProbs.apply(hidden, weight, targets, vocab_size, group, temperature, entropy)
    return [values[:count] for values in found if values is not None]


class TargetLogProbs(torch.autograd.Function):
    """log p(y) = z_y - log sum_v exp z_v and H = -sum_v p_v log p_v, p = softmax(z), z = hidden weight^T / t.

    d log p(y) / dz_v = onehot(y)_v - p_v;  dH / dz_v = -p_v (log p_v + H).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, group, temperature, entropy):  # noqa: ANN001
        tp, first = group.size(), group.rank() * weight.shape[0]
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        logsumexp = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if entropy else None
        for a in range(0, len(hidden), CHUNK):
            here = slice(a, a + CHUNK)
            z = logits(hidden[here], weight, first, vocab_size, temperature)  # [c, V/tp]
            top = z.amax(1)
            if tp > 1:
                dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
            index, owned = local_index(targets[here], first, len(weight))
            target = z.gather(1, index[:, None])[:, 0].masked_fill(~owned, 0.0)
            parts = torch.stack([target, *exp_sums_(z.sub_(top[:, None]), entropy)])
            if tp > 1:
                dist.all_reduce(parts, group=group)
            logsumexp[here] = top + parts[1].log()
            logprobs[here] = parts[0] - logsumexp[here]
            if entropy:  # H = log sum_v exp x_v - sum_v p_v x_v for any shift x of z, here by the largest
                entropies[here] = parts[1].log() - parts[2] / parts[1]
        ctx.save_for_backward(hidden, weight, targets, logsumexp, entropies)
        ctx.vocab_size, ctx.first, ctx.temperature = vocab_size, first, temperature
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad, grad_entropy):  # noqa: ANN001
        hidden, weight, targets, logsumexp, entropies = ctx.saved_tensors
        grad = grad / ctx.temperature  # dz / d(hidden weight^T)
        slopes = None
        if entropies is not None and grad_entropy.any():  # it is all zero where entropy is only logged
            slopes = grad_entropy / ctx.temperature
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for a in range(0, len(hidden), CHUNK):
            here = slice(a, a + CHUNK)
            z = logits(hidden[here], weight, ctx.first, ctx.vocab_size, ctx.temperature)
            z.sub_(logsumexp[here, None])  # log p
            if slopes is None:
                z.exp_().mul_(-grad[here, None])  # -p grad
            else:  # -p (grad + slope (log p + H))
                p = z.exp()
                z.add_(entropies[here, None]).mul_(-slopes[here, None]).sub_(grad[here, None]).mul_(p)
            index, owned = local_index(targets[here], ctx.first, len(weight))
            z.scatter_add_(1, index[:, None], (grad[here] * owned)[:, None])
            z = z.to(hidden.dtype)
            grad_hidden[here] = product(z, weight)
            add_product(grad_weight, z.t(), hidden[here])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def logits(hidden: Tensor, weight: Tensor, first: int, vocab_size: int, temperature: float) -> Tensor:
    """hidden weight^T / temperature, [c, V/tp] float32, and ABSENT in the rows past the vocabulary."""
    z = linear(hidden, weight).float()
    if temperature != 1:
        z /= temperature
    real = min(max(vocab_size - first, 0), len(weight))
    z[:, real:] = ABSENT
    return z


def exp_sums_(x: Tensor, entropy: bool) -> list[Tensor]:
    """sum_v exp x_v, and with `entropy` sum_v x_v exp x_v, [c] each, of x [c, V/tp], which is overwritten."""
    if not entropy:
        return [x.exp_().sum(1)]
    exps = x.exp()
    return [exps.sum(1), x.mul_(exps).sum(1)]


def local_index(targets: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Column of each target in this rank's shard (0 where it is not here), and whether it is here."""
    index = targets - first
    owned = (index >= 0) & (index < rows)
    return index.masked_fill(~owned, 0), owned
