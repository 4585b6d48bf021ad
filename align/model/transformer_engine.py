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
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import ModuleSpec, TransformerLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from align.model.architecture import Architecture
from align.model.attention import PackedAttentionParams
from align.model.layers import ACTIVATIONS, NORMS, rotary_embedding

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
        query, key = (rotary_embedding(x, *packed_seq_params.rotation) for x in (query, key))
        return super().forward(
            query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params
        )


def layer_spec(arch: Architecture) -> ModuleSpec:
    """Spec of one layer."""
    norm = NORMS[arch.norm] if arch.qk_norm else IdentityOp
    return ModuleSpec(
        TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=TELayerNormColumnParallelLinear,
                    core_attention=TEAttention,
                    linear_proj=TERowParallelLinear,
                    q_layernorm=norm,
                    k_layernorm=norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=ModuleSpec(
                MLP,
                submodules=MLPSubmodules(
                    linear_fc1=TELayerNormColumnParallelLinear,
                    linear_fc2=TERowParallelLinear,
                    activation_func=ACTIVATIONS[arch.activation],
                ),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=CHECKPOINT_NAMES,
        ),
    )
