"""Transformer Engine in place of torch's kernels: linear layers with the norm before them, and attention.

Imported only with --attention te: its classes derive from Transformer Engine's. Norms outside of a linear
layer, activation and rotary embedding are those of align.model.layers. Not run on hardware yet;
tests/model/test_transformer_engine.py runs it with a stand-in that has the names and arguments of Transformer
Engine 2.11.
"""

from megatron.core.extensions.transformer_engine import (
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from align.model.attention import PackedAttentionParams
from align.model.layers import rotary_embedding

# Names of torch's layers in checkpoints, so that either kind of layers can load them.
CHECKPOINT_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


class TEAttention(TEDotProductAttention):
    """Rotary positions, then Transformer Engine's attention: flash-attn or cuDNN, as it finds them."""

    def forward(
        self,
        query: Tensor,  # [T, heads, d]
        key: Tensor,  # [T, groups, d]
        value: Tensor,
        attention_mask: None,
        attn_mask_type: AttnMaskType,
        attention_bias: None = None,
        packed_seq_params: PackedAttentionParams | None = None,
    ) -> Tensor:
        """Returns [T, heads * d]."""
        assert packed_seq_params is not None
        query, key = (rotary_embedding(x, *packed_seq_params.rotation) for x in (query, key))
        return super().forward(
            query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params
        )


# column and row parallel linear layers, the first with the norm before it; core attention
LAYERS = TELayerNormColumnParallelLinear, TERowParallelLinear, TEAttention
