"""Causal attention inside each sequence of a pack."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class DotProductAttention(nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        tp_group: dist.ProcessGroup | None = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
    ):
        super().__init__()
        assert attention_dropout == 0 and attn_mask_type == "causal" and attention_type == "self"
        self.heads, self.groups = num_attention_heads // tp_size, num_gqa_groups // tp_size
        self.channels, self.scale = kv_channels, softmax_scale

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        pad_between_seqs: bool | None = None,
    ) -> Tensor:
        assert qkv_format == "thd" and attn_mask_type == "padding_causal"
        assert attention_mask is cu_seqlens_q_padded is cu_seqlens_kv_padded is None and not pad_between_seqs
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
        assert query_layer.shape[1:] == (self.heads, self.channels)
        assert key_layer.shape[1:] == value_layer.shape[1:] == (self.groups, self.channels)
        sizes = cu_seqlens_q.diff().tolist()
        assert sizes == cu_seqlens_kv.diff().tolist() and max(sizes) == max_seqlen_q == max_seqlen_kv
        pieces = zip(*(x.split(sizes) for x in (query_layer, key_layer, value_layer)), strict=True)
        return torch.cat([self.attend(q, k, v) for q, k, v in pieces]).flatten(1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
