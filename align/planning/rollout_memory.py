"""Memory of sampling in bytes: KV cache, prefill, logits, copies of the weights. Letters as in memory.py."""

import math
from dataclasses import dataclass

from align.distributed.parallel import ParallelConfig
from align.generation.continuous_batching import PREFILL_TOKENS, READ_AHEAD
from align.generation.generator import RolloutConfig
from align.generation.inference import GROWTH, GROWTH_GPU
from align.generation.reshard import PART
from align.model.architecture import Architecture
from align.planning.memory import FP32, RankShape, layer_matrices, vocabulary, weights


@dataclass(frozen=True)
class RolloutLoad:
    """Load of sampling on one copy of the model."""

    slots: int  # sequences at a time
    prompts: int  # most prompts taken from the queue at once: its share of the rollout
    per_prompt: int  # responses to each
    prompt: int  # tokens
    response: int  # tokens


def cache_per_token(arch: Architecture, s: RankShape) -> int:
    """Keys and values of one token in all layers of this rank."""
    return 2 * arch.layers // s.pp * max(arch.kv_heads // s.tp, 1) * arch.head_dim * s.item


def kv_cache(arch: Architecture, s: RankShape, r: RolloutLoad) -> float:
    """InferenceModel's cache for all slots, which grows layer by layer, and prompts prefilled ahead.

    On a GPU it may be allocated at once, before the first prompts are prefilled.
    """
    growth, token = GROWTH_GPU if s.gpu else GROWTH, cache_per_token(arch, s)
    room = math.ceil((r.prompt + r.response + s.gpu) / growth) * growth  # a GPU's host reads one step late
    growing = r.slots * room * token / (arch.layers // s.pp)
    ahead = min(math.ceil(r.slots / READ_AHEAD / r.per_prompt), r.prompts) * r.prompt * token
    # At the start all prompts are prefilled before the first is copied to its slot.
    prefilled = min(math.ceil(r.slots / r.per_prompt), r.prompts) * r.prompt * token
    if s.gpu:
        return r.slots * room * token + max(growing + ahead, prefilled)
    at_start = r.slots * math.ceil(r.prompt / growth) * growth * token + prefilled
    return max(r.slots * room * token + growing + ahead, at_start)


def prefill(arch: Architecture, s: RankShape, r: RolloutLoad) -> float:
    """One prefill pass: a layer's activations; all keys and values, at the end stacked, then split."""
    total = min(math.ceil(r.slots / r.per_prompt), r.prompts) * r.prompt
    tokens = max(min(total, PREFILL_TOKENS), r.prompt)
    layer = s.item * (3 * arch.hidden_size + (len(arch.mlp_inputs) + 1) * arch.ffn_size / s.tp)
    cache = cache_per_token(arch, s)
    return tokens * max(cache + layer, 3 * cache)


def drawing(arch: Architecture, r: RolloutLoad) -> float:
    """Logits of all slots in fp32, the intermediates of sampling.pick, and logits of prefilled prompts."""
    copies = 4  # logits, weights, and two intermediates
    prefilled = min(math.ceil(r.slots / r.per_prompt), r.prompts)
    return FP32 * arch.vocab_size * (copies * r.slots + prefilled)


def has_graphs(rollout: RolloutConfig, parallel: ParallelConfig, layout: RankShape) -> bool:
    """True if a GPU samples with CUDA graphs in this layout: `inference.why_no_graphs`."""
    is_captured = layout.tp == 1 or rollout.rollout_tp_graphs
    return layout.pp == 1 and is_captured and not parallel.deterministic


def is_kept(rollout: RolloutConfig, parallel: ParallelConfig, layout: RankShape) -> bool:
    """True if a GPU keeps the sampler's memory between rollouts, with `Generator(keep=True)`."""
    return has_graphs(rollout, parallel, layout) and not rollout.reshards(parallel)


def packed(arch: Architecture, s: RankShape) -> int:
    """Copies of all matrices by matmul.pack on a CPU; none on a GPU."""
    if s.gpu:
        return 0
    head = vocabulary(arch, s.tp) * arch.hidden_size if s.last else 0
    return s.item * (arch.layers // s.pp * layer_matrices(arch, s.tp) + head)


def largest_piece(arch: Architecture, tp: int, item: int) -> float:
    """The largest piece of a weight in a transfer to another layout; `tp`: the larger one of the two."""
    rows = max(arch.vocab_size, len(arch.mlp_inputs) * arch.ffn_size)
    return item * rows * arch.hidden_size / tp


def sampling(arch: Architecture, s: RankShape, r: RolloutLoad, copy: RankShape | None) -> dict[str, float]:
    """The peak of sampling, by item. `copy`: the layout of a copy of the weights (--rollout-layout reshard).

    Weights are received in parts, in tensors of their own, before they are copied; through gloo those of
    other ranks exist once more.
    """
    layout = copy or s
    whole = layout.item * weights(arch, layout) if copy else 0
    part = min(whole, PART + largest_piece(arch, max(s.tp, layout.tp), s.item))
    transfer = part * (1 if s.gpu else 2 - 1 / (s.tp * s.pp))
    cache, rest = kv_cache(arch, layout, r), max(prefill(arch, layout, r), drawing(arch, r))
    decoding = cache + rest + packed(arch, layout)
    copies = whole + (transfer if transfer > decoding else packed(arch, layout))
    if transfer > decoding:
        cache, rest = 0.0, 0.0
    return {"copies": copies, "kv_cache": cache, "activations": rest}
