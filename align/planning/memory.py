"""Memory of a run in bytes: the arithmetic of tools.plan. Nothing is allocated here.

Each function is one term, from sizes alone, and says which tensors of which file it counts. Micro-batches are
full and answers of the greatest length. Not counted: what grows neither with the model nor with the tokens of
a micro-batch (metrics, rotary angles), padding of Megatron's buffers, the rows of the data.

Letters: H hidden size, F ffn size, V rows of the embedding with its padding, d head dimension, T tokens of a
micro-batch; a weight has b bytes. A "place" is one of a rank's T / cp tokens.
"""

import math
from dataclasses import dataclass, replace

from align.generation.generator import PREFILL_TOKENS, READ_AHEAD
from align.generation.inference import GROWTH, GROWTH_GPU
from align.kernels.matmul import BLOCK
from align.model.architecture import Architecture
from align.model.logprobs import chunk_size

FP32 = 4
BUCKET = 40_000_000  # least weights in a bucket of Megatron's gradients, if they are summed in buckets


@dataclass(frozen=True)
class Setting:
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
class Work:
    """Load of a model: the largest micro-batch of a rank, and their number."""

    tokens: int  # T, over all context parallel ranks
    count: int  # micro-batches of an update
    longest: int  # tokens of a sequence
    shared: float = 1.0  # keys that attention sees per place: more than 1 where sequences share a beginning
    entropy: bool = False  # is the entropy computed, as in PPO


# ---- weights ---------------------------------------------------------------------------------------------


def vocabulary(arch: Architecture, tp: int) -> int:
    """Rows of the embedding on one rank: model.padded_vocab_size / tp."""
    multiple = math.lcm(64, tp)
    return math.ceil(arch.vocab_size / multiple) * multiple // tp


def layer_matrices(arch: Architecture, tp: int) -> int:
    """Weights in one layer's matrices on one rank: query, key, value, output, gate (if any), up, down."""
    attention = 2 * (arch.heads + arch.kv_heads) * arch.head_dim * arch.hidden_size
    return (attention + (len(arch.mlp_inputs) + 1) * arch.hidden_size * arch.ffn_size) // tp


def layer_weights(arch: Architecture, tp: int) -> int:
    """The same with norms and biases."""
    norms = 2 * sum(norm_sizes(arch)) + (2 * arch.head_dim if arch.qk_norm else 0)
    return layer_matrices(arch, tp) + sum(layer_biases(arch, tp)) + norms


def layer_biases(arch: Architecture, tp: int) -> list[int]:
    """Numbers in each bias of a layer's matrices on one rank; biases of the output and of down are on all."""
    sizes = [(arch.heads + 2 * arch.kv_heads) * arch.head_dim // tp] if arch.qkv_bias else []
    sizes += [arch.hidden_size] if arch.out_bias else []
    return sizes + ([len(arch.mlp_inputs) * arch.ffn_size // tp, arch.hidden_size] if arch.mlp_bias else [])


def norm_sizes(arch: Architecture) -> list[int]:
    """Numbers in each parameter of a norm over the hidden size: weight, and bias of a LayerNorm."""
    return [arch.hidden_size] * (1 if arch.norm == "rms" else 2)


def weights(arch: Architecture, s: Setting) -> int:
    """Weights on one rank. Tied embeddings are on the first stage, and once more on the last."""
    matrix = vocabulary(arch, s.tp) * arch.hidden_size
    count = arch.layers // s.pp * layer_weights(arch, s.tp)
    if s.first:
        count += matrix
    if s.last:
        count += sum(norm_sizes(arch))  # the last norm
        count += arch.labels * arch.hidden_size if arch.labels else 0 if shares_matrix(arch, s) else matrix
    return count


def shares_matrix(arch: Architecture, s: Setting) -> bool:
    """True if one matrix on this rank is both embedding and output layer."""
    return arch.tied_embeddings and not arch.labels and s.pp == 1


def largest_weight(arch: Architecture, s: Setting) -> int:
    """Numbers in the largest parameter: an embedding, or gate and up."""
    sizes = [len(arch.mlp_inputs) * arch.ffn_size * arch.hidden_size // s.tp]
    if s.first or (s.last and not arch.labels):
        sizes.append(vocabulary(arch, s.tp) * arch.hidden_size)
    return max(sizes)


def gradients(arch: Architecture, s: Setting) -> int:
    """Megatron's buffer: fp32, of all weights of the rank, however many ranks share them."""
    return FP32 * weights(arch, s)


def optimizer(arch: Architecture, s: Setting) -> float:
    """Both moments in fp32, and fp32 main weights of bf16 ones (those of fp32 are the weights themselves)."""
    return (2 if s.item == FP32 else 3) * FP32 * weights(arch, s) / s.copies


def update(arch: Architecture, s: Setting) -> float:
    """Memory of one optimizer step beside its state.

    The norm of the gradient takes a copy of one parameter's. gloo, which a CPU's ranks speak, copies what it
    receives: the weights, a bucket at a time, from the ranks that updated them.
    """
    gathered = s.item * bucket(arch, s) if s.copies > 1 and not s.gpu else 0
    return max(FP32 * min(largest_weight(arch, s), weights(arch, s) / s.copies), gathered)


def bucket(arch: Architecture, s: Setting) -> int:
    """Most weights in a bucket of Megatron's buffers, closed when it has BUCKET; a rank alone has one."""
    if s.copies == 1:
        return weights(arch, s)
    return min(weights(arch, s), max(BUCKET, 1_000_000 * s.copies) + largest_weight(arch, s))


def pinned(size: float) -> int:
    """Memory that torch's allocator of pinned memory takes for a tensor of so many bytes: a power of two."""
    return 2 ** math.ceil(math.log2(size)) if size > 0 else 0


def pinned_weights(arch: Architecture, s: Setting) -> int:
    """offload.Weights beside a GPU: each parameter of this rank is a tensor in pinned memory."""
    h, d = arch.hidden_size, arch.head_dim
    qkv, matrix = (arch.heads + 2 * arch.kv_heads) * d // s.tp, vocabulary(arch, s.tp) * h
    layer = [
        qkv * h,
        arch.heads * d // s.tp * h,
        len(arch.mlp_inputs) * arch.ffn_size // s.tp * h,
        arch.ffn_size // s.tp * h,
        *(2 * norm_sizes(arch)),
    ]
    layer += layer_biases(arch, s.tp) + ([d, d] if arch.qk_norm else [])
    ends = [matrix] if s.first else []
    if s.last:
        ends += norm_sizes(arch) + (
            [arch.labels * h] if arch.labels else [] if shares_matrix(arch, s) else [matrix]
        )
    return sum(pinned(s.item * n) for n in layer) * (arch.layers // s.pp) + sum(
        pinned(s.item * n) for n in ends
    )


def pinned_model(arch: Architecture, s: Setting) -> float:
    """offload.Part's copies beside a GPU of a model in training.

    Megatron's buffer of weights is one piece of memory; main weights and moments are tensors of each of the
    parameters that this rank updates.
    """
    states = pinned_weights(arch, replace(s, item=FP32)) * (2 if s.item == FP32 else 3) / s.copies
    return pinned(s.item * weights(arch, s)) + states


# ---- what a forward pass keeps for the backward pass -----------------------------------------------------


def widths(arch: Architecture, s: Setting) -> tuple[int, int, int]:
    """Numbers per token on one rank: queries; keys (or values); what the product for all three made.

    With more ranks than key heads, ranks share a head, and each gathers the whole product.
    """
    d, product = arch.head_dim, (arch.heads + 2 * arch.kv_heads) * arch.head_dim
    if s.tp > arch.kv_heads:
        return arch.heads * d // s.tp, d, product
    return arch.heads * d // s.tp, arch.kv_heads * d // s.tp, product // s.tp


def uses_flash(arch: Architecture, s: Setting) -> bool:
    """attention.uses_flash, said of sizes."""
    return s.gpu and s.item == 2 and arch.head_dim % 8 == 0 and arch.head_dim <= 256


def attention_saves(arch: Architecture, s: Setting, work: Work) -> float:
    """Bytes per place of one layer's core attention, its output (which the next product keeps) included."""
    q, k, product = widths(arch, s)
    seen = work.shared * s.cp  # context parallel ranks gather the keys of all
    own = work.shared == 1 and s.cp == 1  # then values are a view of the product, which stays for them
    # Queries are copied out of the product to be contiguous, unless there is one group, or one query in each.
    copied = s.item * q if arch.head_dim < k < q else 0
    normed = copied + FP32 * (q + k) / arch.head_dim if arch.qk_norm else 0  # what the norms keep
    if s.recompute == "selective":  # queries, keys and values before their rotation, and the output
        given = s.item * (q + k) + normed if arch.qk_norm else copied
        return given + s.item * (product + q)
    logsumexp, flash = FP32 * q / arch.head_dim, uses_flash(arch, s)
    copies = s.item != FP32 and not flash  # a CPU computes bf16 in copies in fp32
    kept = k + product if own and not copies else 2 * k * seen  # rotated keys, and values
    if arch.qk_norm and not (own and not copies):
        normed += s.item * product  # keys before their norm
    if flash:
        return s.item * (q + kept + q) + logsumexp + normed
    # attn_mask in fp32, where a sequence has more keys than queries, or a window
    mask = FP32 * work.longest if work.shared > 1 or arch.window is not None else 0
    return FP32 * (q + kept + q) + logsumexp + s.item * q + mask + normed


def layer_saves(arch: Architecture, s: Setting, work: Work) -> float:
    """Bytes per place that one layer keeps: inputs of norms, of all four products and of the activation."""
    h, f, split = arch.hidden_size, arch.ffn_size / s.tp, s.tp if s.sequence_parallel else 1
    norms = 2 * norm_saves(arch, s) / split
    # On a CPU in fp32 the gathered input of a product stays (cpu.linear_by_onednn).
    products = 2 * s.item * h / (1 if s.item == FP32 and not s.gpu else split)
    return norms + products + attention_saves(arch, s, work) + s.item * (len(arch.mlp_inputs) * f + f)


def norm_saves(arch: Architecture, s: Setting) -> float:
    """Bytes per place that a norm keeps: its input, and 1 / rms, or of a LayerNorm mean and 1 / deviation.

    torch's LayerNorm keeps these two in bf16 on a CPU, in fp32 on a GPU.
    """
    if arch.norm == "rms":
        return s.item * arch.hidden_size + FP32
    return s.item * arch.hidden_size + 2 * (FP32 if s.gpu else s.item)


def saved(arch: Architecture, s: Setting, work: Work) -> float:
    """All that this stage keeps of its micro-batches that have gone forward and not back yet.

    1F1B: stage i has min(pp - i, their number) of them at most.
    """
    h, places = arch.hidden_size, work.tokens / s.cp
    split = s.tp if s.sequence_parallel else 1
    if s.recompute == "full":
        layer = s.item * h / split  # the layer's input
    else:
        layer = layer_saves(arch, s, work)
    total = arch.layers // s.pp * layer * places
    if s.last:
        # the last norm; what the output layer is given (a reward model: a copy in fp32)
        total += norm_saves(arch, s) / split * places
        total += (s.item if not arch.labels else FP32 if s.item != FP32 else 0) * h * places
    else:
        total += s.item * h / split * places  # the output, until its gradient comes
    return total * min(s.pp - s.stage, work.count)


# ---- what lives for a moment -----------------------------------------------------------------------------


def chunk(arch: Architecture, s: Setting, work: Work) -> int:
    """Numbers in the logits that exist at one time."""
    rows = vocabulary(arch, s.tp)
    return rows * min(chunk_size(rows, s.gpu), math.ceil(work.tokens))


def output_forward(arch: Architecture, s: Setting, work: Work) -> float:
    """Beside `saved`: the last norm's output and a chunk of logits.

    On a CPU logits are fp32, beside those of the product in bf16, or beside exp(logits) for the entropy; on a
    GPU in bf16 nothing else is written.
    """
    if arch.labels:
        return s.item * arch.hidden_size * work.tokens / s.cp
    if s.gpu and s.item == 2:
        each = 2
    else:
        each = max(FP32 + (s.item if s.item != FP32 else 0), FP32 * (1 + work.entropy))
    return s.item * arch.hidden_size * work.tokens / s.cp + each * chunk(arch, s, work)


def output_backward(arch: Architecture, s: Setting, work: Work) -> float:
    """Beside `saved`: gradients of its input and, in fp32, of its matrix, and a chunk of logits."""
    h, rows = arch.hidden_size, vocabulary(arch, s.tp)
    if arch.labels:
        return 2 * s.item * h * work.tokens / s.cp
    total = s.item * h * work.tokens / s.cp + FP32 * rows * h
    if s.gpu:
        product, each = 0, 2 * s.item  # logits and their gradient
    elif s.item == FP32:
        product, each = FP32 * min(rows, BLOCK) * h, FP32 * (1 + work.entropy)
    else:
        product, each = s.item * rows * h, FP32 + s.item
    cast = s.item * rows * h if s.item != FP32 else 0  # the matrix's gradient in b bytes, at the end
    return total + max(product + each * chunk(arch, s, work), cast)


def layer_backward(arch: Architecture, s: Setting, work: Work) -> float:
    """Most that the backward pass of one layer needs beyond what it frees: in its activation or gate and up.

    I is the width of the activation's input: 2 F with a gate, F without. At the activation the input of the
    down projection (F) is free again. There are: the layer's gradient (H), the activation's (F), and until
    its input's (I) is made, for a SwiGLU on a CPU two steps on the way (2 F), else none.
    In gate and up the activation's input (I) is free, too; there are the gradients of their output (I, on a
    CPU in fp32 once more, with rows up to a multiple of 64), their input (H) and their matrix.
    """
    h, f, places = arch.hidden_size, arch.ffn_size / s.tp, work.tokens / s.cp
    i = len(arch.mlp_inputs) * f
    steps = 0 if s.gpu or arch.activation == "relu2" else 2 * f
    activation = places * (h + f + i + steps - f)
    again = i if s.item == FP32 and not s.gpu else 0
    gate_up = places * (2 * h + i + again - (i + f)) + i * h
    return s.item * max(activation, gate_up)


def end_of_backward(arch: Architecture, s: Setting, work: Work) -> float:
    """When all activations are free: the embedding's gradient, and if it is tied that of the output layer."""
    if not s.first:
        return 0.0
    matrix = s.item * vocabulary(arch, s.tp) * arch.hidden_size
    return (1 + shares_matrix(arch, s)) * matrix + 2 * s.item * arch.hidden_size * work.tokens / s.cp


def reduction(arch: Architecture, s: Setting) -> float:
    """gloo's copies of the gradients that it sums, at the end of the backward pass; NCCL works in place.

    A bound: the first buckets may be done before the last is ready.
    """
    if s.copies == 1 or s.gpu:
        return 0.0
    return gradients(arch, s)


def training(arch: Architecture, s: Setting, work: Work) -> dict[str, float]:
    """The peak of one forward and backward pass beyond weights, gradients and optimizer, in two items."""
    kept, whole = saved(arch, s, work), layer_saves(arch, s, work) * work.tokens / s.cp
    again = whole if s.recompute == "full" else 0.0  # one layer's, made in the backward pass
    # The output layer's gradient of a tied matrix waits for the embedding's.
    waiting = s.item * vocabulary(arch, s.tp) * arch.hidden_size if shares_matrix(arch, s) else 0.0
    moments = [
        (kept + again + layer_backward(arch, s, work), waiting),
        (end_of_backward(arch, s, work) + reduction(arch, s), 0.0),
    ]
    if s.last:
        moments += [(kept, output_forward(arch, s, work)), (kept, output_backward(arch, s, work))]
    activations, logits = max(moments, key=sum)
    return {"activations": activations, "logits": logits}


def forward_only(arch: Architecture, s: Setting, work: Work) -> dict[str, float]:
    """The peak of a forward pass without a gradient: one layer, or the output layer.

    A layer's MLP holds its input, attention's output, the norm's, gate and up, and the activation's output.
    Its attention: input, norm's output, product, contiguous queries, rotated queries and keys, gathered keys
    and values, output (on a CPU in bf16 also in fp32).
    """
    q, k, product = widths(arch, s)
    h, f, places = arch.hidden_size, arch.ffn_size / s.tp, work.tokens / s.cp
    copies = FP32 * (2 * q + 2 * k * work.shared * s.cp) if s.item != FP32 and not s.gpu else 0
    mlp = s.item * (3 * h + (len(arch.mlp_inputs) + 1) * f)
    attention = s.item * (2 * h + product + 3 * q + k * s.cp + 2 * k * work.shared * s.cp) + copies
    moments = [(places * max(mlp, attention), 0.0)]
    if s.last:
        moments.append((2 * s.item * h * places, output_forward(arch, s, work)))
    activations, logits = max(moments, key=sum)
    return {"activations": activations, "logits": logits}


# ---- sampling --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollout:
    """Load of sampling on one copy of the model."""

    slots: int  # sequences at a time
    prompts: int  # that it takes from the queue at once, at most: its share of the rollout
    per_prompt: int  # answers to each
    prompt: int  # tokens
    answer: int  # tokens


def cache_per_token(arch: Architecture, s: Setting) -> int:
    """Keys and values of one token in all layers of this rank."""
    return 2 * arch.layers // s.pp * max(arch.kv_heads // s.tp, 1) * arch.head_dim * s.item


def kv_cache(arch: Architecture, s: Setting, r: Rollout) -> float:
    """InferenceModel's cache for all slots, and the prompts that were read ahead of a free slot.

    Its room grows in steps, a layer at a time, which then exists twice.
    """
    growth, token = GROWTH_GPU if s.gpu else GROWTH, cache_per_token(arch, s)
    room = math.ceil((r.prompt + r.answer) / growth) * growth
    growing = r.slots * room * token / (arch.layers // s.pp)
    ahead = min(math.ceil(r.slots / READ_AHEAD / r.per_prompt), r.prompts) * r.prompt * token
    # At the start all prompts are read before the first is in its slot.
    read = min(math.ceil(r.slots / r.per_prompt), r.prompts) * r.prompt * token
    begun = r.slots * math.ceil(r.prompt / growth) * growth * token + read
    return max(r.slots * room * token + growing + ahead, begun)


def prefill(arch: Architecture, s: Setting, r: Rollout) -> float:
    """Prompts that are read in one pass: keys and values of all layers and one layer at work.

    At the end they are stacked and then cut by prompt, each time into new memory.
    """
    together = min(math.ceil(r.slots / r.per_prompt), r.prompts) * r.prompt
    tokens = max(min(together, PREFILL_TOKENS), r.prompt)
    layer = s.item * (3 * arch.hidden_size + (len(arch.mlp_inputs) + 1) * arch.ffn_size / s.tp)
    kept = cache_per_token(arch, s)
    return tokens * max(kept + layer, 3 * kept)


def drawing(arch: Architecture, s: Setting, r: Rollout) -> float:
    """Logits of all slots in fp32, and what sampling.pick makes of them; those of prompts that wait."""
    copies = 4  # logits, weights, and two more on the way
    waiting = min(math.ceil(r.slots / r.per_prompt), r.prompts)
    return FP32 * arch.vocab_size * (copies * r.slots + waiting)


def packed(arch: Architecture, s: Setting) -> int:
    """On a CPU copies of all matrices as oneDNN reads them fastest (matmul.pack); on a GPU none."""
    if s.gpu:
        return 0
    head = vocabulary(arch, s.tp) * arch.hidden_size if s.last else 0
    return s.item * (arch.layers // s.pp * layer_matrices(arch, s.tp) + head)


def sampling(arch: Architecture, s: Setting, r: Rollout, copy: Setting | None) -> dict[str, float]:
    """The peak of sampling, by item. `copy`: the layout of a copy of the weights (--rollout-layout reshard).

    Megatron's copy receives all parts, each into a tensor of its own, before any gets to its place; through
    gloo those of other ranks into one more.
    """
    at = copy or s
    whole = at.item * weights(arch, at) if copy else 0
    transfer = whole * (1 if s.gpu else 2 - 1 / (s.tp * s.pp))
    cache, rest = kv_cache(arch, at, r), max(prefill(arch, at, r), drawing(arch, at, r))
    busy = cache + rest + packed(arch, at)
    copies = whole + (transfer if transfer > busy else packed(arch, at))
    if transfer > busy:
        cache, rest = 0.0, 0.0
    return {"copies": copies, "kv_cache": cache, "activations": rest}


# ---- checkpoints -----------------------------------------------------------------------------------------


def saving(arch: Architecture, s: Setting) -> float:
    """Host memory of the first data parallel rank while a checkpoint is written.

    Megatron (its fully_reshardable format) gathers main weights and moments of all data parallel ranks there,
    bucket by bucket: the three (12 bytes a weight), this rank's part of the bucket, and of one of the three
    at a time what is received, gloo's own copy of that, and the whole. Then parts of the three, and the
    weights, are copied for the writer.
    """
    count, part = weights(arch, s), bucket(arch, s)
    gathering = 3 * FP32 * (count + part / s.copies + part)
    return max(gathering, 2 * 3 * FP32 * count + s.item * count)
