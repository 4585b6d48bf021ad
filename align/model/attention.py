"""Core attention on flash kernels or torch's own, over packed sequences.

On GPUs (bf16) a flash kernel computes the whole pack at once: FlashAttention 3 on Hopper where it is
installed, torch's own elsewhere, and with a torch that has none the package flash-attn. On a CPU, in fp32,
and for heads that those kernels do not support, each sequence is one call of scaled_dot_product_attention.
Nothing is padded either way. TorchAttention is the `core_attention` of Megatron's layer spec; with
--attention te it is Transformer Engine's.
"""

import functools
import importlib.util
import inspect
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from align.data import context_slices
from align.data.packing import to_device
from align.errors import UserError
from align.model.layers import rotary_embedding

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch 2.9, which TensorRT-LLM requires
    KNOWN: frozenset[str] = frozenset()  # names of its arguments
else:
    KNOWN = frozenset(inspect.signature(varlen_attn).parameters)
# torch 2.11 has no such argument, and allows fewer key heads than query heads without it.
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in KNOWN else {}


@dataclass
class PackedAttentionParams(PackedSeqParams):
    """Places of this rank's queries and keys: Megatron's own type, and the lengths on the host.

    The lengths are lists, since reading cu_seqlens in each layer would synchronise with the GPU each time.
    """

    lengths: list[int] = field(default_factory=list)  # queries of each sequence with any on this rank
    # Number of keys of its last query: of the sequence's prefix, then its own. The queries are at their end.
    seen: list[int] = field(default_factory=list)
    # Places of these keys among the gathered ones, all sequences end to end; None: all in their order.
    keys: Tensor | None = None
    rotation: tuple[Tensor, ...] = ()  # layers.rotary_cos_sin of this rank's tokens, by the model


def packed_params(
    lengths: list[int],
    prefixes: list[tuple[int, int]],
    total: int,
    qkv_format: str | None,
    device: torch.device,
    part: tuple[int, int] | None = None,
) -> PackedAttentionParams:
    """Describe sequences of these lengths, end to end; tokens after them, up to total, are one more sequence.

    Args:
        prefixes: (start, size) of the places that each sequence continues, as in packing.Batch.
        total: tokens of the pack on all context parallel ranks.
        qkv_format: "thd" for Transformer Engine; None for TorchAttention, which Megatron then calls with
            tensors [T, 1, heads, d].
        part: (rank, ranks) of the context parallel group, whose ranks have the queries of their
            `context_slices`; None: this process's. The queries of a sequence in two slices count as two
            sequences with the same beginning.
    """
    rank, ranks = part or (mpu.get_context_parallel_rank(), max(mpu.get_context_parallel_world_size(), 1))
    sequences = lengths + [total - sum(lengths)], prefixes + [(0, 0)]
    parts = [overlap(*sequences, *span) for span in context_slices.spans_of_rank(total, rank, ranks)]
    queries, seen, spans = (list(itertools.chain(*lists)) for lists in zip(*parts, strict=True))
    return PackedAttentionParams(
        qkv_format=qkv_format,
        cu_seqlens_q=ends(queries, device),
        cu_seqlens_kv=ends(seen, device),
        max_seqlen_q=max(queries),
        max_seqlen_kv=max(seen),
        lengths=queries,
        seen=seen,
        keys=places(spans, total, ranks, device),
    )


def overlap(
    lengths: list[int], prefixes: list[tuple[int, int]], first: int, end: int
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Keys of the queries [first, end) of a pack, by sequence.

    Returns:
        Number of queries of each sequence; number of keys of its last query; and, end to end, the places
        [start, end) in the pack of these keys: of its prefix, then of its own.
    """
    queries, seen, spans = [], [], []
    begins = itertools.accumulate(lengths[:-1], initial=0)
    for begin, length, (start, size) in zip(begins, lengths, prefixes, strict=True):
        last = min(begin + length, end)
        if last > max(begin, first):
            queries.append(last - max(begin, first))
            seen.append(size + last - begin)
            spans += [(start, start + size), (begin, last)]
    return queries, seen, spans


def places(spans: list[tuple[int, int]], total: int, ranks: int, device: torch.device) -> Tensor | None:
    """All places of these spans [start, end) of a pack of `total`, as an index of what `ranks` ranks gather.

    None for the whole pack of one rank.
    """
    index = torch.cat([torch.arange(*span) for span in spans])
    if ranks > 1:
        index = context_slices.in_pack_order(torch.arange(total), ranks)[index]
    elif len(index) == total:  # without prefixes
        return None
    return to_device(index, device)


def ends(sizes: list[int], device: torch.device) -> Tensor:
    """[0, the sums of the first 1, 2, ... sizes] in int32, on the device."""
    return to_device(torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32), device)


class TorchAttention(MegatronModule):
    """Rotary positions, then softmax(q k^T / sqrt(d)) v, causal, inside each sequence of the pack.

    With a sliding window, a query attends to itself and the window - 1 tokens before it.

    With context parallelism each rank holds two slices of the pack's tokens (align.data.context_slices):
    queries stay local, keys and values are gathered (their gradients are reduce-scattered).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        *,
        pg_collection: ProcessGroupCollection,
    ):
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        # number of keys of a query, itself included
        self.window = None if config.window_size is None else config.window_size[0] + 1
        self.cp: dist.ProcessGroup = pg_collection.cp

    def forward(
        self,
        query: Tensor,  # [T/cp, 1, heads, d]
        key: Tensor,  # [T/cp, 1, groups, d]
        value: Tensor,
        attention_mask: None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: PackedAttentionParams | None = None,
    ) -> Tensor:
        """Returns [T/cp, 1, heads * d]."""
        assert attention_mask is None and attention_bias is None and packed_seq_params is not None
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        query, key = (rotary_embedding(x, *packed_seq_params.rotation) for x in (query, key))
        if self.cp.size() > 1:
            key, value = (
                gather_from_sequence_parallel_region(x.contiguous(), group=self.cp) for x in (key, value)
            )
        return self.within(query, key, value, packed_seq_params).reshape(len(query), 1, -1)

    def within(self, query: Tensor, key: Tensor, value: Tensor, sequences: PackedAttentionParams) -> Tensor:
        """Attention of this rank's queries [T/cp, heads, d] to all ranks' keys and values [T, groups, d]."""
        if sequences.keys is not None:  # the gradient of index_select is a sum, that of x[keys] a sort
            key, value = (x.index_select(0, sequences.keys) for x in (key, value))
        if uses_flash(query.dtype, query.shape[-1], query.is_cuda):
            bounds = sequences.cu_seqlens_q, sequences.cu_seqlens_kv
            longest = sequences.max_seqlen_q, sequences.max_seqlen_kv
            return flash(query, key, value, *bounds, *longest, self.scale, self.window)
        return self.by_sequence(query, key, value, sequences)

    def by_sequence(
        self, query: Tensor, key: Tensor, value: Tensor, sequences: PackedAttentionParams
    ) -> Tensor:
        """One call per sequence."""
        # split, not slices: the gradient of a slice is a full-size tensor of zeros, once per sequence
        parts = query.split(sequences.lengths), key.split(sequences.seen), value.split(sequences.seen)
        return torch.cat([attend(*part, self.scale, self.window) for part in zip(*parts, strict=True)])


def uses_flash(dtype: torch.dtype, head_dim: int, cuda: bool) -> bool:
    """True if `flash` supports such heads on this device; else `attend` computes one sequence at a time.

    Flash kernels have no fp32, which serves the comparison with a CPU.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    return cuda and half and head_dim % 8 == 0 and head_dim <= 256 and flash_kernel() is not None


@functools.cache
def flash_kernel() -> str | None:
    """Load the kernel of `flash` for this GPU, at the first call, and return its name; None: there is none.

    Before 2.11 torch's function for packs had no window, or did not exist.

    Raises UserError for a package that is installed and cannot be loaded.
    """
    if "window_size" not in KNOWN:
        package, name, load = "flash_attn", None, load_flash_attn
    else:
        package, name, load = "flash_attn_interface", "flash attention", load_flash_attention_3
        if torch.cuda.get_device_capability()[0] != 9:  # Hopper
            return name
    if importlib.util.find_spec(package) is None:
        return name
    try:
        return load()
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{package} is installed and fails: {reason}. Mend or uninstall it") from error


def load_flash_attn() -> str:
    """Import the package that `flash` calls."""
    from flash_attn import __version__, flash_attn_varlen_func  # noqa: F401

    return f"flash-attn {__version__}"


def load_flash_attention_3() -> str:
    """Replace the kernel of `varlen_attn`."""
    from torch.nn.attention import activate_flash_attention_impl

    activate_flash_attention_impl("FA3")
    return "FlashAttention 3"


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """All sequences of a pack in one kernel, if `uses_flash`: queries [m, heads, d] -> [m, heads, d].

    A query attends to itself and the keys of its sequence before it, at most `window` keys in all.

    Args:
        key, value: [n, groups, d]; groups divides heads.
        cu_q, cu_k: [N + 1] int32 on the GPU. Sequence i has queries cu_q[i] to cu_q[i + 1] and keys cu_k[i]
            to cu_k[i + 1], with the keys of its queries at the end.
        max_q, max_k: most queries and keys of a sequence.
    """
    span = (-1 if window is None else window - 1, 0)  # keys before and after the query's own
    lengths = (cu_q, cu_k, max_q, max_k)
    if "window_size" not in KNOWN:
        from flash_attn import flash_attn_varlen_func

        deterministic = torch.are_deterministic_algorithms_enabled()
        options = {"softmax_scale": scale, "window_size": span, "deterministic": deterministic}
        return flash_attn_varlen_func(query, key, value, *lengths, causal=True, **options)
    out = varlen_attn(query, key, value, *lengths, scale=scale, window_size=span, **GROUPED)
    assert isinstance(out, Tensor)  # a tuple only with return_aux
    return out


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """One sequence: queries [m, heads, d], the last m of n; keys [n, groups, d] -> [m, heads, d].

    A query attends to itself and the keys before it, at most `window` keys in all.
    """
    m, n = len(query), len(key)
    mask = None
    if m < n or (window is not None and n > window):
        distance = torch.arange(n - m, n, device=query.device)[:, None] - torch.arange(n, device=query.device)
        mask = (distance >= 0) & (distance < (window or n))
    dtype = query.dtype
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))  # [1, heads, tokens, d]
    if not query.is_cuda:  # the CPU's kernel is faster in fp32, and exact
        query, key, value = query.float(), key.float(), value.float()
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1).to(dtype)


def attend_to_cache(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of one new token of each sequence to its KV cache, on a CPU: [B, groups, queries, d].

    Two matrix products are faster there than scaled_dot_product_attention, which splits the batch by
    sequence. GPUs use align/kernels/decode_attention.py.

    Args:
        query: [B, groups, queries of a group, d].
        keys, values: [B, groups, n, d].
        mask: [B, 1, 1, n] of 0 and minus infinity.
    """
    scores = torch.matmul(query * scale, keys.transpose(2, 3)).add_(mask)
    return torch.matmul(scores.softmax(-1), values)
