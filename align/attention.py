"""Core attention on torch's own kernels, over packed sequences.

On GPUs (bf16) torch's flash kernels take the whole pack at once; on a CPU, and in fp32, each sequence is one
call of scaled_dot_product_attention: no padding and no mask either way. Megatron calls this class where its
layer spec says `core_attention`; Transformer Engine's attention takes its place with --attention te.
"""

import itertools
import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from align.layers import rotate


@dataclass
class Packing(PackedSeqParams):
    """Where the sequences of a micro-batch lie: Megatron's own type, and the lengths on the host.

    The host copy is made once per micro-batch; reading cu_seqlens in each layer would stop the GPU each time.
    """

    lengths: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)  # keys of each sequence: its prefix, then its own
    keys: Tensor | None = None  # where those keys lie, of all sequences end to end; None: just as they lie
    rotation: tuple[Tensor, Tensor] | None = None  # layers.rotation of this rank's tokens; the model sets it


def describe(
    lengths: list[int],
    prefixes: list[tuple[int, int]],
    total: int,
    qkv_format: str | None,
    device: torch.device,
) -> Packing:
    """Describe sequences of these lengths, end to end; tokens after them, up to total, are one more sequence.

    Args:
        prefixes: (start, size) of what each sequence continues, as in packing.Batch.
        qkv_format: "thd" for Transformer Engine; None for TorchAttention, which Megatron then leaves tensors
            [T, 1, heads, d] to.
    """
    rest = total - sum(lengths)
    lengths, prefixes = (lengths + [rest], prefixes + [(0, 0)]) if rest else (lengths, prefixes)
    ends = list(itertools.accumulate(lengths, initial=0))
    seen = [length + size for length, (_, size) in zip(lengths, prefixes, strict=True)]
    keys = None
    if seen != lengths:
        parts = [
            (torch.arange(start, start + size), torch.arange(begin, end))
            for (start, size), begin, end in zip(prefixes, ends, ends[1:], strict=False)
        ]
        keys = torch.cat([part for both in parts for part in both]).to(device)
    return Packing(
        qkv_format=qkv_format,
        cu_seqlens_q=torch.tensor(ends, dtype=torch.int32, device=device),
        cu_seqlens_kv=torch.tensor([0, *seen]).cumsum(0).to(torch.int32).to(device),
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(seen),
        lengths=lengths,
        seen=seen,
        keys=keys,
    )


class TorchAttention(MegatronModule):
    """Rotary positions, then softmax(q k^T / sqrt(d)) v, causal, inside each sequence of the pack.

    With a sliding window, a query sees itself and the keys of the window - 1 tokens before it.

    With context parallelism each rank holds an equal slice of the pack's tokens: queries stay where they are,
    keys and values are gathered (their gradients are summed and scattered on the way back).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        # the number of keys that a query sees, itself included
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
        packed_seq_params: Packing | None = None,
    ) -> Tensor:
        """Returns [T/cp, 1, heads * d]."""
        assert attention_mask is None and attention_bias is None and packed_seq_params is not None
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        query, key = (rotate(x, *packed_seq_params.rotation) for x in (query, key))
        start = 0
        if self.cp.size() > 1:
            start = self.cp.rank() * len(query)
            key, value = (
                gather_from_sequence_parallel_region(x.contiguous(), group=self.cp) for x in (key, value)
            )
        if packed_seq_params.keys is not None:
            key, value = (x.index_select(0, packed_seq_params.keys) for x in (key, value))
        if query.is_cuda and query.dtype != torch.float32 and self.cp.size() == 1:
            out = self.flash(query, key, value, packed_seq_params)
        else:
            out = self.by_sequence(query, key, value, packed_seq_params, start)
        return out.reshape(len(query), 1, -1)

    def flash(self, query: Tensor, key: Tensor, value: Tensor, sequences: Packing) -> Tensor:
        """All sequences in one kernel; a sequence's queries are the last of its keys."""
        return varlen_attn(
            query,
            key,
            value,
            sequences.cu_seqlens_q,
            sequences.cu_seqlens_kv,
            sequences.max_seqlen_q,
            sequences.max_seqlen_kv,
            scale=self.scale,
            window_size=(-1 if self.window is None else self.window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def by_sequence(
        self, query: Tensor, key: Tensor, value: Tensor, sequences: Packing, start: int
    ) -> Tensor:
        """One call per sequence; this rank's queries are tokens [start, start + len(query)) of the pack."""
        # split, not slices: the gradient of a slice is a full-size tensor of zeros, once per sequence
        keys, values = key.split(sequences.seen), value.split(sequences.seen)
        pieces, begin = [], 0
        for length, k, v in zip(sequences.lengths, keys, values, strict=True):
            # those of this sequence's tokens that are among the queries
            first, last = max(start - begin, 0), min(start + len(query) - begin, length)
            past = len(k) - length  # its prefix
            pieces.append((max(last - first, 0), k[: past + max(last, 0)], v[: past + max(last, 0)]))
            begin += length
        queries = query.split([size for size, _, _ in pieces])
        return torch.cat(
            [
                attend(q, k, v, self.scale, self.window)
                for q, (_, k, v) in zip(queries, pieces, strict=True)
                if len(q)
            ]
        )


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """One sequence: queries [m, heads, d], the last m of n; keys [n, groups, d] -> [m, heads, d].

    A query sees itself and the keys before it, `window` keys in all at most.
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
    """One query of each sequence against all that is kept of it: [B, groups, queries, d].

    Args:
        query: [B, groups, queries of a group, d].
        keys, values: [B, groups, n, d].
        mask: [B, 1, 1, n] of 0 and minus infinity.
    """
    if query.is_cuda:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    # On a CPU the products by themselves are faster than that kernel, which takes each sequence apart.
    scores = torch.matmul(query * scale, keys.transpose(2, 3)).add_(mask)
    return torch.matmul(scores.softmax(-1), values)
