"""Log-probabilities of targets straight from hidden states, for training and reference alike; and entropies.

The vocabulary may be split over tensor parallel ranks. Logits exist for `chunk_size` tokens at a time, in
float32 in the softmax, and are computed again in the backward pass: all of [tokens, vocabulary] never exists.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from align.kernels.matmul import add_product, linear, padded, product, uses_onednn
from align.model.layers import fused

CHUNK = 256  # tokens whose logits exist at one time on a CPU: they stay in its cache
GPU_LOGITS = 2**28  # logits that exist at one time on a GPU, 1 GiB in float32, half of it in bf16
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
    """`target_logprobs`, and the entropy H = -sum_v p_v log p_v of each token's distribution p.

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
        for here in chunks(hidden, weight):
            z, *rest = logits(hidden[here], weight, first, vocab_size, temperature)
            top = largest(z, *rest)
            if tp > 1:
                dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
            parts = sums_(z, top, targets[here, None], first, entropy, *rest)
            if tp > 1:
                dist.all_reduce(parts, group=group)
            logsumexp[here] = top[:, 0] + parts[1].log()
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
        # It is all zero where entropy is only logged. A GPU would have to be waited for to know.
        if entropies is not None and (grad.is_cuda or grad_entropy.any()):
            slopes = grad_entropy / ctx.temperature
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for here in chunks(hidden, weight):
            z, *rest = logits(hidden[here], weight, ctx.first, ctx.vocab_size, ctx.temperature)
            columns = [
                None if x is None else x[here, None] for x in (targets, logsumexp, grad, entropies, slopes)
            ]
            z = gradient_(z, *columns, ctx.first, hidden.dtype, *rest)
            grad_hidden[here] = product(z, weight)
            add_product(grad_weight, z.t(), hidden[here])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """The tokens of hidden [n, H], `chunk_size` at a time."""
    size = chunk_size(len(weight), hidden.is_cuda)
    return [slice(a, a + size) for a in range(0, len(hidden), size)]


def chunk_size(rows: int, cuda: bool) -> int:
    """Tokens whose logits exist at one time, of so many `rows` of the output embedding on each rank.

    On a GPU the fp32 gradient of these rows is read and written once per chunk, so chunks are few: with 1,024
    tokens or more the products take far longer than that.
    """
    return max(GPU_LOGITS // rows // 128 * 128, 1024) if cuda else CHUNK


def logits(
    hidden: Tensor, weight: Tensor, first: int, vocab_size: int, temperature: float
) -> tuple[Tensor, float, int]:
    """hidden weight^T, [c, V/tp], and what `finished` has yet to do with it: temperature and real columns."""
    z = linear(hidden, weight)
    real = min(max(vocab_size - first, 0), len(weight))
    if finished_in_kernels(z):
        return z, temperature, real
    return finished(z, temperature, real), 1.0, len(weight)


def finished_in_kernels(z: Tensor) -> bool:
    """True if the functions below scale and mask logits themselves, rather than once before them.

    On a GPU they are kernels that read bf16 as it comes from the product, and no float32 is ever written.
    """
    return z.is_cuda and z.dtype != torch.float32


def finished(z: Tensor, temperature: float, real: int) -> Tensor:
    """z / temperature in float32 (z itself if it has it), and ABSENT in the columns from `real` on."""
    z = z.float()
    if temperature != 1:
        z /= temperature
    if real < z.shape[1]:
        z[:, real:] = ABSENT
    return z


@fused
def largest(z: Tensor, temperature: float, real: int) -> Tensor:
    """The largest logit of each token, [c, 1], of this rank's columns."""
    return finished(z, temperature, real).amax(1, keepdim=True)


@fused
def sums_(
    z: Tensor, top: Tensor, targets: Tensor, first: int, entropy: bool, temperature: float, real: int
) -> Tensor:
    """Of each token the target's logit, 0 if it is not in this rank's columns, and `exp_sums_` of z - top.

    Args:
        z: [c, V/tp], overwritten if it is float32.
        top, targets: [c, 1].

    Returns:
        [2, c] float32, with `entropy` [3, c].
    """
    z = finished(z, temperature, real)
    index, owned = local_index(targets, first, z.shape[1])
    target = z.gather(1, index).masked_fill(~owned, 0.0)[:, 0]
    return torch.stack([target, *exp_sums_(z.sub_(top), entropy)])


@fused
def gradient_(
    z: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    grad: Tensor,
    entropies: Tensor | None,
    slopes: Tensor | None,
    first: int,
    dtype: torch.dtype,
    temperature: float,
    real: int,
) -> Tensor:
    """grad d log p(y) / dz + slope dH / dz, [c, V/tp] of this type; all tensors but z are [c, 1].

    z is overwritten if it is float32.
    """
    z = finished(z, temperature, real).sub_(logsumexp)  # log p
    if slopes is None:
        z.exp_().mul_(-grad)  # -p grad
    else:  # -p (grad + slope (log p + H))
        p = z.exp()
        z.add_(entropies).mul_(-slopes).sub_(grad).mul_(p)
    index, owned = local_index(targets, first, z.shape[1])
    at_target = z.gather(1, index).add_(grad * owned)  # in float32: where p is near 1 little is left
    return z.to(dtype).scatter_(1, index, at_target.to(dtype))


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
