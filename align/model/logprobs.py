"""Log-probabilities of targets, and entropies, from hidden states, for training and reference alike.

The vocabulary may be split over tensor parallel ranks. Logits are computed for `chunk_size` tokens at a time,
in float32 in the softmax, and again in the backward pass: the full [tokens, vocabulary] never exists, unless
its bf16 product is kept for the backward pass.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from align.kernels.fused import fused
from align.kernels.matmul import add_product, linear, padded, product, uses_onednn

CHUNK = 256  # tokens of a chunk on a CPU, whose logits stay in its cache
GPU_LOGITS = 2**28  # logits of a chunk on a GPU, 1 GiB in float32, half of it in bf16
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
    entropy: bool = False,
    entropy_grad: bool = True,
    keep_logits: bool = False,
) -> Tensor:
    """log p(targets) for each token, in nats, p = softmax(logits / temperature).

    Args:
        hidden: [n, H] final hidden states, equal on every rank of the group. Their gradient is this rank's
            part: pass hidden through Megatron's copy_to (or gather_from_sequence) region.
        weight: [V_padded / tp, H] this rank's rows of the output embedding.
        targets: [n] int64 token ids in [0, vocab_size).
        vocab_size: V without the padding rows of the embedding, which have no probability.
        group: the tensor parallel group.
        temperature: divisor of the logits, above 0.
        entropy: compute the entropy H = -sum_v p_v log p_v of each token's distribution as well.
        entropy_grad: False if the entropies have no gradient, which takes a pass over the logits less.
        keep_logits: keep the products hidden weight^T for the backward pass; not for float32, which is
            overwritten.

    Returns:
        [n] float32, with `entropy` [n, 2]: log-prob and entropy, in nats.
    """
    count = len(hidden)
    if uses_onednn(hidden):
        hidden, targets = padded(hidden), padded(targets)
    logprobs, entropies = TargetLogProbs.apply(
        hidden,
        weight,
        targets,
        vocab_size,
        group,
        temperature,
        entropy,
        entropy_grad,
        keep_logits and torch.is_grad_enabled(),
    )
    if entropy:
        return torch.stack([logprobs[:count], entropies[:count]], 1)
    return logprobs[:count]


class TargetLogProbs(torch.autograd.Function):
    """log p(y) = z_y - log sum_v exp z_v and H = -sum_v p_v log p_v, p = softmax(z), z = hidden weight^T / t.

    d log p(y) / dz_v = onehot(y)_v - p_v;  dH / dz_v = -p_v (log p_v + H).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, group, temperature, entropy, entropy_grad, keep):
        tp, first = group.size(), group.rank() * weight.shape[0]
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        logsumexp = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if entropy else None
        products = []
        for here in chunks(hidden, weight):
            z = linear(hidden[here], weight)
            if keep:
                products.append(z)
            z, *rest = logits(z, first, vocab_size, temperature)
            top = row_max(z, *rest)
            if tp > 1:
                dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
            parts = partial_sums_(z, top, targets[here, None], first, entropy, *rest)
            if tp > 1:
                dist.all_reduce(parts, group=group)
            logsumexp[here] = top[:, 0] + parts[1].log()
            logprobs[here] = parts[0] - logsumexp[here]
            if (
                entropies is not None
            ):  # H = log sum_v exp x_v - sum_v p_v x_v for any shift x of z, here by the maximum
                entropies[here] = parts[1].log() - parts[2] / parts[1]
        ctx.save_for_backward(hidden, weight, targets, logsumexp, entropies, *products)
        ctx.vocab_size, ctx.first, ctx.temperature = vocab_size, first, temperature
        # With bf16 weights, Megatron's fp32 buffer of gradients: nothing is rounded on the way to it.
        ctx.main_grad = None if weight.dtype == torch.float32 else getattr(weight, "main_grad", None)
        ctx.entropy_grad = entropy and entropy_grad
        if entropies is not None and not entropy_grad:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad, grad_entropy):  # noqa: ANN001
        hidden, weight, targets, logsumexp, entropies, *products = ctx.saved_tensors
        grad = grad / ctx.temperature  # dz / d(hidden weight^T)
        slopes, offsets = None, grad
        if ctx.entropy_grad:
            slopes = grad_entropy / ctx.temperature
            offsets = grad + slopes * entropies
        grad_hidden = torch.empty_like(hidden)
        total = None  # a frozen weight has no gradient
        if ctx.needs_input_grad[1]:
            is_new = ctx.main_grad is None
            total = torch.zeros_like(weight, dtype=torch.float32) if is_new else ctx.main_grad
        for number, here in enumerate(chunks(hidden, weight)):
            z = products[number] if products else linear(hidden[here], weight)
            z, *rest = logits(z, ctx.first, ctx.vocab_size, ctx.temperature)
            columns = [
                None if x is None else x[here, None] for x in (targets, logsumexp, grad, offsets, slopes)
            ]
            z = logits_grad_(z, *columns, ctx.first, hidden.dtype, *rest)
            grad_hidden[here] = product(z, weight)
            if total is not None:
                add_product(total, z.t(), hidden[here])
        if total is not None:
            total = total.to(weight.dtype) if ctx.main_grad is None else added(weight)
        return grad_hidden, total, *[None] * 7


def added(weight: Any) -> Tensor:
    """Tell Megatron that its buffer has the gradient of a weight; returns what autograd is to have.

    That is not read, but for a tied embedding, whose other gradient autograd adds to it.
    """
    weight.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight)


def chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """The tokens of hidden [n, H], `chunk_size` at a time."""
    size = chunk_size(len(weight), hidden.is_cuda)
    return [slice(a, a + size) for a in range(0, len(hidden), size)]


def chunk_size(rows: int, cuda: bool) -> int:
    """Tokens of a chunk, for `rows` of the output embedding on each rank.

    On a GPU the fp32 gradient of these rows is read and written once per chunk, so chunks are few: with 1,024
    tokens or more the products take far longer.
    """
    return max(GPU_LOGITS // rows // 128 * 128, 1024) if cuda else CHUNK


def logits(z: Tensor, first: int, vocab_size: int, temperature: float) -> tuple[Tensor, float, int]:
    """Logits of z = hidden weight^T, [c, V/tp], and the remaining arguments of `scale_and_mask_`."""
    rows = z.shape[1]
    real = min(max(vocab_size - first, 0), rows)
    if scales_in_kernels(z):
        return z, temperature, real
    return scale_and_mask_(z, temperature, real), 1.0, rows


def scales_in_kernels(z: Tensor) -> bool:
    """True if each kernel below scales and masks the logits itself, not once before the kernels.

    The kernels of a GPU read the product's bf16, and no float32 logits are written to memory.
    """
    return z.is_cuda and z.dtype != torch.float32


def scale_and_mask_(z: Tensor, temperature: float, real: int) -> Tensor:
    """z / temperature in float32 (in place if z is float32), and ABSENT in the columns from `real` on."""
    z = z.float()
    if temperature != 1:
        z /= temperature
    if real < z.shape[1]:
        z[:, real:] = ABSENT
    return z


@fused
def row_max(z: Tensor, temperature: float, real: int) -> Tensor:
    """Largest logit of each token in this rank's columns, [c, 1]."""
    return scale_and_mask_(z, temperature, real).amax(1, keepdim=True)


@fused
def partial_sums_(
    z: Tensor, top: Tensor, targets: Tensor, first: int, entropy: bool, temperature: float, real: int
) -> Tensor:
    """The target's logit of each token, 0 outside this rank's columns, and `exp_sums_` of z - top.

    Args:
        z: [c, V/tp], overwritten if it is float32.
        top, targets: [c, 1].

    Returns:
        [2, c] float32, with `entropy` [3, c].
    """
    z = scale_and_mask_(z, temperature, real)
    index, owned = local_index(targets, first, z.shape[1])
    target = z.gather(1, index).masked_fill(~owned, 0.0)[:, 0]
    return torch.stack([target, *exp_sums_(z.sub_(top), entropy)])


@fused
def logits_grad_(
    z: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    grad: Tensor,
    offsets: Tensor,
    slopes: Tensor | None,
    first: int,
    dtype: torch.dtype,
    temperature: float,
    real: int,
) -> Tensor:
    """grad d log p(y) / dz + slope dH / dz, [c, V/tp] of `dtype`; all tensors but z are [c, 1].

    offsets: grad + slope H, or grad where there is no slope. With a tensor more to read, Inductor would write
        the result in float32 for the second kernel.
    z is overwritten if it is float32.
    """
    z = scale_and_mask_(z, temperature, real).sub_(logsumexp)  # log p
    if slopes is None:
        z.exp_().mul_(-offsets)  # -p grad
    else:  # -p (grad + slope (log p + H))
        p = z.exp()
        z.mul_(-slopes).sub_(offsets).mul_(p)
    index, owned = local_index(targets, first, z.shape[1])
    at_target = z.gather(1, index).add_(grad * owned)  # in float32: near p = 1 the terms almost cancel
    return z.to(dtype).scatter_(1, index, at_target.to(dtype))


def exp_sums_(x: Tensor, entropy: bool) -> list[Tensor]:
    """sum_v exp x_v, and with `entropy` sum_v x_v exp x_v, [c] each, of x [c, V/tp], which is overwritten."""
    if not entropy:
        return [x.exp_().sum(1)]
    exps = x.exp()
    return [exps.sum(1), x.mul_(exps).sum(1)]


def local_index(targets: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Column of each target in this rank's shard, 0 outside it, and a mask of the targets inside."""
    index = targets - first
    owned = (index >= 0) & (index < rows)
    return index.masked_fill(~owned, 0), owned
