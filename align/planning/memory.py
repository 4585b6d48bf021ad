"""Memory of training in bytes: the arithmetic of tools.plan. Nothing is allocated here.

Each function is one term, from sizes only, with the tensors that it counts. Micro-batches are full and
responses have the greatest length. Not counted: tensors that grow neither with the model nor with the tokens
of a micro-batch (metrics, rotary angles), padding of Megatron's buffers, the rows of the data.

Letters: H hidden size, F ffn size, V rows of the embedding with its padding, d head dimension, T tokens of a
micro-batch; a weight has b bytes. A "place" is one of a rank's T / cp tokens.
"""

import math
from dataclasses import dataclass, replace

from align.kernels.matmul import BLOCK
from align.model.architecture import Architecture
from align.model.logprobs import chunk_size

FP32 = 4
BUCKET = 40_000_000  # fewest weights in a bucket of Megatron's gradients, with several ranks


@dataclass(frozen=True)
class RankShape:
    """Precision, kernels and layout of a model, and the pipeline stage of this rank."""

    item: int  # bytes of a weight, and of an activation
    gpu: bool
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    stage: int = 0
    sequence_parallel: bool = False
    recompute: str = "none"
    keep_logits: bool = False
    vp: int = 1  # stages of a rank

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.pp - 1

    @property
    def copies(self) -> int:
        """Ranks with the same weights, over which the optimizer's state is split."""
        return self.dp * self.cp


@dataclass(frozen=True)
class MicroBatchLoad:
    """Load of a model: the largest micro-batch of a rank, and their number."""

    tokens: int  # T, over all context parallel ranks
    count: int  # micro-batches of an update
    longest: int  # tokens of a sequence
    shared: float = 1.0  # keys of attention per place: more than 1 if sequences share a beginning
    entropy: bool = False  # True if the entropy is computed, as in PPO


def vocabulary(arch: Architecture, tp: int) -> int:
    """Rows of the embedding on one rank: model.padded_vocab_size / tp."""
    multiple = math.lcm(64, tp)
    return math.ceil(arch.vocab_size / multiple) * multiple // tp


def layer_matrices(arch: Architecture, tp: int) -> int:
    """Weights in one layer's matrices on one rank: query, key, value, output, gate (if any), up, down."""
    attention = 2 * (arch.heads + arch.kv_heads) * arch.head_dim * arch.hidden_size
    return (attention + (len(arch.mlp_inputs) + 1) * arch.hidden_size * arch.ffn_size) // tp


def layer_weights(arch: Architecture, tp: int) -> int:
    """Weights in one layer on one rank: matrices, norms and biases."""
    norms = 2 * sum(norm_sizes(arch)) + (2 * arch.head_dim if arch.qk_norm else 0)
    return layer_matrices(arch, tp) + sum(layer_biases(arch, tp)) + norms


def layer_biases(arch: Architecture, tp: int) -> list[int]:
    """Numbers in each bias of a layer on one rank; every rank has the biases of the output and of down."""
    sizes = [(arch.heads + 2 * arch.kv_heads) * arch.head_dim // tp] if arch.qkv_bias else []
    sizes += [arch.hidden_size] if arch.out_bias else []
    return sizes + ([len(arch.mlp_inputs) * arch.ffn_size // tp, arch.hidden_size] if arch.mlp_bias else [])


def norm_sizes(arch: Architecture) -> list[int]:
    """Numbers in each parameter of a norm over the hidden size: weight, and bias of a LayerNorm."""
    return [arch.hidden_size] * (1 if arch.norm == "rms" else 2)


def weights(arch: Architecture, s: RankShape) -> int:
    """Weights on one rank. Tied embeddings are on the first stage and on the last."""
    matrix = vocabulary(arch, s.tp) * arch.hidden_size
    count = arch.layers // s.pp * layer_weights(arch, s.tp)
    if s.first:
        count += matrix
    if s.last:
        count += sum(norm_sizes(arch))  # the last norm
        count += arch.labels * arch.hidden_size if arch.labels else 0 if shares_matrix(arch, s) else matrix
    return count


def shares_matrix(arch: Architecture, s: RankShape) -> bool:
    """True if one matrix on this rank is both embedding and output layer."""
    return arch.tied_embeddings and not arch.labels and s.pp == 1


def largest_weight(arch: Architecture, s: RankShape) -> int:
    """Numbers in the largest parameter: an embedding, or gate and up."""
    sizes = [len(arch.mlp_inputs) * arch.ffn_size * arch.hidden_size // s.tp]
    if s.first or (s.last and not arch.labels):
        sizes.append(vocabulary(arch, s.tp) * arch.hidden_size)
    return max(sizes)


def gradients(arch: Architecture, s: RankShape) -> int:
    """Megatron's buffer: fp32, of all weights of the rank, however many ranks share them."""
    return FP32 * weights(arch, s)


def optimizer(arch: Architecture, s: RankShape) -> float:
    """Both moments in fp32, and fp32 main weights of bf16 ones; fp32 weights are their own main weights."""
    return (2 if s.item == FP32 else 3) * FP32 * weights(arch, s) / s.copies


def update(arch: Architecture, s: RankShape) -> float:
    """Memory of an optimizer step: one parameter's gradient for the norm, on a CPU gloo's of a bucket."""
    gathered = s.item * bucket(arch, s) if s.copies > 1 and not s.gpu else 0
    return max(FP32 * min(largest_weight(arch, s), weights(arch, s) / s.copies), gathered)


def bucket(arch: Architecture, s: RankShape) -> int:
    """Most weights in a bucket of Megatron's buffers, closed at BUCKET; a single rank has one bucket."""
    if s.copies == 1:
        return weights(arch, s)
    return min(weights(arch, s), max(BUCKET, 1_000_000 * s.copies) + largest_weight(arch, s))


def pinned(size: float) -> int:
    """Pinned memory of a tensor of so many bytes, which torch's allocator rounds up to a power of two."""
    return 2 ** math.ceil(math.log2(size)) if size > 0 else 0


def pinned_weights(arch: Architecture, s: RankShape) -> int:
    """Pinned memory of offload.Weights beside a GPU, a tensor for each parameter of this rank."""
    h, d = arch.hidden_size, arch.head_dim
    qkv, matrix = (arch.heads + 2 * arch.kv_heads) * d // s.tp, vocabulary(arch, s.tp) * h
    layer = [qkv * h, arch.heads * d // s.tp * h]
    layer += [len(arch.mlp_inputs) * arch.ffn_size // s.tp * h, arch.ffn_size // s.tp * h]
    layer += 2 * norm_sizes(arch) + layer_biases(arch, s.tp) + ([d, d] if arch.qk_norm else [])
    ends = [matrix] if s.first else []
    if s.last:
        head = [arch.labels * h] if arch.labels else [] if shares_matrix(arch, s) else [matrix]
        ends += norm_sizes(arch) + head
    return sum(pinned(s.item * n) for n in layer * (arch.layers // s.pp) + ends)


def pinned_model(arch: Architecture, s: RankShape) -> float:
    """Pinned memory of phases.Part's copies beside a GPU, of a model in training.

    Megatron's buffer of weights is one storage; main weights and moments are tensors of each parameter that
    this rank updates.
    """
    states = pinned_weights(arch, replace(s, item=FP32)) * (2 if s.item == FP32 else 3) / s.copies
    return pinned(s.item * weights(arch, s)) + states


def widths(arch: Architecture, s: RankShape) -> tuple[int, int, int]:
    """Numbers per token on one rank: queries; keys (or values); the product for all three.

    With more ranks than key heads, ranks share a head, and each gathers the whole product.
    """
    d, product = arch.head_dim, (arch.heads + 2 * arch.kv_heads) * arch.head_dim
    if s.tp > arch.kv_heads:
        return arch.heads * d // s.tp, d, product
    return arch.heads * d // s.tp, arch.kv_heads * d // s.tp, product // s.tp


def uses_flash(arch: Architecture, s: RankShape) -> bool:
    """attention.uses_flash, by sizes."""
    return s.gpu and s.item == 2 and arch.head_dim % 8 == 0 and arch.head_dim <= 256


def attention_saves(arch: Architecture, s: RankShape, work: MicroBatchLoad) -> float:
    """Bytes per place of one layer's core attention, its output (which the next product keeps) included."""
    q, k, product = widths(arch, s)
    # Per place: context parallel ranks gather the keys of all, and a rank repeats those of its first slice,
    # up to half as many as it has places (align.data.context_slices).
    keys = work.shared * (s.cp + 0.5 if s.cp > 1 else 1)
    own = work.shared == 1 and s.cp == 1  # values are a view of the product, which is kept for them
    # Queries are copied out of the product to be contiguous, unless there is one group, or one query in each.
    copied = s.item * q if arch.head_dim < k < q else 0
    normed = copied + FP32 * (q + k) / arch.head_dim if arch.qk_norm else 0  # saved by the norms
    if s.recompute == "selective":  # queries, keys and values before their rotation, and the output
        inputs = s.item * (q + k) + normed if arch.qk_norm else copied
        return inputs + s.item * (product + q)
    logsumexp, flash = FP32 * q / arch.head_dim, uses_flash(arch, s)
    copies = s.item != FP32 and not flash  # a CPU computes bf16 in copies in fp32
    keys_and_values = k + product if own and not copies else 2 * k * keys  # keys rotated
    if arch.qk_norm and not (own and not copies):
        normed += s.item * product  # keys before their norm
    if flash:
        return s.item * (q + keys_and_values + q) + logsumexp + normed
    # attn_mask in fp32, if a sequence has more keys than queries, or a window
    mask = FP32 * work.longest if work.shared > 1 or arch.window is not None else 0
    return FP32 * (q + keys_and_values + q) + logsumexp + s.item * q + mask + normed


def layer_saves(arch: Architecture, s: RankShape, work: MicroBatchLoad) -> float:
    """Bytes per place saved by one layer: inputs of norms, of all four products and of the activation."""
    h, f, split = arch.hidden_size, arch.ffn_size / s.tp, s.tp if s.sequence_parallel else 1
    norms = 2 * norm_saves(arch, s) / split
    # On a CPU in fp32 the gathered input of a product is saved (megatron_on_cpu.linear_by_onednn).
    products = 2 * s.item * h / (1 if s.item == FP32 and not s.gpu else split)
    return norms + products + attention_saves(arch, s, work) + s.item * (len(arch.mlp_inputs) * f + f)


def norm_saves(arch: Architecture, s: RankShape) -> float:
    """Bytes per place saved by a norm: its input, and 1 / rms, or for LayerNorm mean and 1 / deviation.

    torch's LayerNorm saves these two in bf16 on a CPU, in fp32 on a GPU.
    """
    statistics = FP32 if arch.norm == "rms" else 2 * (FP32 if s.gpu else s.item)
    return s.item * arch.hidden_size + statistics


def saved(arch: Architecture, s: RankShape, work: MicroBatchLoad) -> float:
    """Activations saved on this stage, of all micro-batches between their forward and backward pass.

    The numbers of `passes_in_flight`, each through layers / (pp * vp) layers.
    """
    h, places = arch.hidden_size, work.tokens / s.cp
    split = s.tp if s.sequence_parallel else 1
    layer = s.item * h / split if s.recompute == "full" else layer_saves(arch, s, work)  # full: its input
    layers = arch.layers // (s.pp * s.vp) * layer * places
    output = s.item * h / split * places  # until its gradient is received
    passes = passes_in_flight(s, work.count)
    if not s.last:
        return passes * (layers + output)
    # the last norm; the input of the output layer (a reward model: a copy in fp32)
    head = norm_saves(arch, s) / split * places
    head += (s.item if not arch.labels else FP32 if s.item != FP32 else 0) * h * places
    if s.keep_logits and not arch.labels:
        head += s.item * vocabulary(arch, s.tp) * work.tokens
    return passes * layers + (passes - 1) * output + head


def passes_in_flight(s: RankShape, count: int) -> int:
    """Passes of `count` micro-batches through stages of this rank between forward and backward, at most.

    1F1B: pp - i on rank i. Interleaved: 2 (pp - i - 1) + (vp - 1) pp + 1, in Megatron's order.
    """
    if s.vp == 1:
        return min(s.pp - s.stage, count)
    return min(2 * (s.pp - s.stage - 1) + (s.vp - 1) * s.pp + 1, count * s.vp)


def chunk(arch: Architecture, s: RankShape, work: MicroBatchLoad) -> int:
    """Logits of one chunk."""
    rows = vocabulary(arch, s.tp)
    return rows * min(chunk_size(rows, s.gpu), math.ceil(work.tokens))


def output_forward(arch: Architecture, s: RankShape, work: MicroBatchLoad) -> float:
    """Beside `saved`: the last norm's output and a chunk of logits.

    On a CPU logits are fp32, beside the product in bf16, or beside exp(logits) for the entropy; on a GPU in
    bf16 nothing else is written. With keep_logits the product is among `saved`.
    """
    if arch.labels:
        return s.item * arch.hidden_size * work.tokens / s.cp
    if s.gpu and s.item == 2:
        per_logit = 0 if s.keep_logits else 2
    else:
        per_logit = max(FP32 + (s.item if s.item != FP32 else 0), FP32 * (1 + work.entropy))
    return s.item * arch.hidden_size * work.tokens / s.cp + per_logit * chunk(arch, s, work)


def output_backward(arch: Architecture, s: RankShape, work: MicroBatchLoad) -> float:
    """Beside `saved`: gradients of its input and, in fp32, of its matrix, and a chunk of logits."""
    h, rows = arch.hidden_size, vocabulary(arch, s.tp)
    if arch.labels:
        return 2 * s.item * h * work.tokens / s.cp
    total = s.item * h * work.tokens / s.cp + FP32 * rows * h
    if s.gpu:
        product, per_logit = 0, s.item * (1 if s.keep_logits else 2)  # logits and their gradient
    elif s.item == FP32:
        product, per_logit = FP32 * min(rows, BLOCK) * h, FP32 * (1 + work.entropy)
    else:
        product, per_logit = s.item * rows * h, FP32 + s.item
    cast = s.item * rows * h if s.item != FP32 else 0  # the matrix's gradient in b bytes, at the end
    return total + max(product + per_logit * chunk(arch, s, work), cast)


def layer_backward(arch: Architecture, s: RankShape, work: MicroBatchLoad) -> float:
    """Peak of one layer's backward pass beyond the memory it frees: at its activation or at gate and up.

    I is the width of the activation's input: 2 F with a gate, F without. At the activation the input of the
    down projection (F) is free again. Allocated are the gradients of the layer (H), of the activation (F) and
    of its input (I), and for a SwiGLU on a CPU two intermediates (2 F).
    At gate and up the activation's input (I) is free, too; allocated are the gradients of their output (I, on
    a CPU in fp32 once more, with rows up to a multiple of 64), their input (H) and their matrix.
    """
    h, f, places = arch.hidden_size, arch.ffn_size / s.tp, work.tokens / s.cp
    i = len(arch.mlp_inputs) * f
    steps = 0 if s.gpu or arch.activation == "relu2" else 2 * f
    activation = places * (h + f + i + steps - f)
    padded = i if s.item == FP32 and not s.gpu else 0
    gate_up = places * (2 * h + i + padded - (i + f)) + i * h
    return s.item * max(activation, gate_up)


def end_of_backward(arch: Architecture, s: RankShape, work: MicroBatchLoad) -> float:
    """With all activations freed: the gradient of the embedding, and of a tied output layer."""
    if not s.first:
        return 0.0
    matrix = s.item * vocabulary(arch, s.tp) * arch.hidden_size
    return (1 + shares_matrix(arch, s)) * matrix + 2 * s.item * arch.hidden_size * work.tokens / s.cp


def reduction(arch: Architecture, s: RankShape) -> float:
    """gloo's copies of the gradients after the backward pass, an upper bound; NCCL reduces in place."""
    return 0.0 if s.copies == 1 or s.gpu else gradients(arch, s)


def training(arch: Architecture, s: RankShape, work: MicroBatchLoad) -> dict[str, float]:
    """Peak of one forward and backward pass beyond weights, gradients and optimizer, in two items."""
    activations, layer = saved(arch, s, work), layer_saves(arch, s, work) * work.tokens / s.cp
    recomputed = layer if s.recompute == "full" else 0.0
    # The output layer's gradient of a tied matrix is kept until the embedding's.
    tied = s.item * vocabulary(arch, s.tp) * arch.hidden_size if shares_matrix(arch, s) else 0.0
    moments = [
        (activations + recomputed + layer_backward(arch, s, work), tied),
        (end_of_backward(arch, s, work) + reduction(arch, s), 0.0),
    ]
    if s.last:
        moments += [(activations, of(arch, s, work)) for of in (output_forward, output_backward)]
    return dict(zip(("activations", "logits"), max(moments, key=sum), strict=True))


def forward_only(arch: Architecture, s: RankShape, work: MicroBatchLoad) -> dict[str, float]:
    """Peak of a forward pass without a gradient: one layer, or the output layer.

    A layer's MLP: its input, outputs of attention and norm, gate and up, and the activation's output. Its
    attention: input, norm's output, product, contiguous queries, rotated queries and keys, gathered keys and
    values, output (on a CPU in bf16 also in fp32).
    """
    q, k, product = widths(arch, s)
    h, f, places = arch.hidden_size, arch.ffn_size / s.tp, work.tokens / s.cp
    copies = FP32 * (2 * q + 2 * k * work.shared * s.cp) if s.item != FP32 and not s.gpu else 0
    mlp = s.item * (3 * h + (len(arch.mlp_inputs) + 1) * f)
    attention = s.item * (2 * h + product + 3 * q + k * s.cp + 2 * k * work.shared * s.cp) + copies
    moments = [(places * max(mlp, attention), 0.0)]
    if s.last:
        moments.append((2 * s.item * h * places, output_forward(arch, s, work)))
    return dict(zip(("activations", "logits"), max(moments, key=sum), strict=True))


def saving(arch: Architecture, s: RankShape) -> float:
    """Host memory of the first data parallel rank while a checkpoint is written.

    Megatron (its fully_reshardable format) gathers main weights and moments of all data parallel ranks there,
    bucket by bucket: the three (12 bytes a weight), this rank's part of the bucket, and for one of the three
    at a time the received parts, gloo's copy of them, and the whole. Then parts of the three, and the
    weights, are copied for the writer. A CPU's heap is not counted: of 135 million weights on one rank 36
    bytes a weight are allocated, and up to 48 were resident, as it keeps freed memory in pieces.
    """
    count, part = weights(arch, s), bucket(arch, s)
    gathering = 3 * FP32 * (count + part / s.copies + part)
    return max(gathering, 3 * FP32 * count + snapshot(arch, s))


def snapshot(arch: Architecture, s: RankShape) -> float:
    """Host memory of the first data parallel rank from a save with --async-save on, until its end.

    The copies that are written: main weights and moments in fp32, and the weights, a GPU's in pinned memory.
    """
    copied = pinned_weights(arch, s) if s.gpu else s.item * weights(arch, s)
    return 3 * FP32 * weights(arch, s) + copied


def loading(arch: Architecture, s: RankShape) -> float:
    """Host memory of every rank while it continues from a checkpoint, 20 bytes a weight.

    Megatron makes main weights and moments whole on each data parallel rank (12 bytes), and copies of parts
    of them: 20 bytes in fp32 and 19 in bf16 were measured with 67 million weights on 1 and 2 ranks.
    """
    return 5 * FP32 * weights(arch, s)
