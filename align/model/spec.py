"""A model in Megatron's terms: transformer configuration, layers, rotary frequencies."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor, nn

from align.distributed import megatron_patches
from align.distributed.parallel import ParallelConfig
from align.model.architecture import Architecture
from align.model.attention import TorchAttention
from align.model.config import ModelConfig
from align.model.layers import ACTIVATIONS, NORMS
from align.model.lora import Adapters, adapted

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(
    arch: Architecture, config: ModelConfig, parallel: ParallelConfig, te: bool
) -> TransformerConfig:
    """Megatron's configuration of the model. Dropout is off in every algorithm of this repository."""
    # fp32 on a CPU has a linear layer of its own; Transformer Engine's layers were not tried with it.
    fuses_accumulation = config.dtype != torch.float32 and not te
    if fuses_accumulation:
        megatron_patches.fuse_gradient_accumulation()
    return TransformerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_size,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm" if arch.norm == "rms" else "LayerNorm",
        layernorm_zero_centered_gamma=arch.norm == "layer_1p",
        layernorm_epsilon=arch.norm_eps,
        qk_layernorm=arch.qk_norm,
        activation_func=F.silu,  # not used
        gated_linear_unit=len(arch.mlp_inputs) == 2,
        use_te_activation_func=True,  # the activation is a module of the layer spec, from align.model.layers
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        window_size=None if arch.window is None else (arch.window - 1, 0),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vp if parallel.vp > 1 else None,
        # The interleaved schedule is right only with this pair, and the other one refuses it.
        overlap_p2p_comm=parallel.vp > 1,
        batch_p2p_comm=parallel.vp == 1,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        bf16=config.dtype == torch.bfloat16,
        fp8="hybrid" if te and config.fp8 else None,  # 4 bits of exponent forward, 5 for gradients
        fp8_recipe="tensorwise",  # the scale of each product from its own values: no state to keep
        params_dtype=config.dtype,
        pipeline_dtype=config.dtype,
        # Micro-batches differ in length, so stages exchange shapes first. Megatron requires "alltoall" for
        # that, even for a model without experts.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # The engine divides each loss by the step's global denominator; this keeps Megatron from dividing.
        calculate_per_token_loss=True,
        # Weights are loaded from a file. mark_tensor_parallel sets the attributes of the initialisation.
        perform_initialization=False,
        deterministic_mode=parallel.deterministic,
        # Megatron's fusions need CUDA extensions, or duplicate align.model.layers.
        apply_rope_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=fuses_accumulation,
        **RECOMPUTE[config.recompute],
    )


def block_spec(
    config: TransformerConfig, arch: Architecture, te: bool, vp_stage: int | None, adapters: Adapters | None
) -> TransformerBlockSubmodules:
    """Spec of this stage's layers, and of the norm after them."""
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(arch, te, adapters)] * get_num_layers_to_build(config, vp_stage),
        layer_norm=NORMS[arch.norm],
    )


def layer_spec(arch: Architecture, te: bool, adapters: Adapters | None = None) -> ModuleSpec:
    """Spec of a layer with our norm and activation. `te`: linears and attention of Transformer Engine."""
    norm, names = NORMS[arch.norm], {}
    column, row, attention, outer_norm = ColumnParallelLinear, RowParallelLinear, TorchAttention, norm
    if te:
        from align.model import transformer_engine  # here: it needs Transformer Engine

        column, row, attention = transformer_engine.LAYERS
        outer_norm, names = IdentityOp, transformer_engine.CHECKPOINT_NAMES  # `column` norms its input
    qk_norm = norm if arch.qk_norm else IdentityOp
    qkv, fc1 = (adapted(column, name, arch, adapters) for name in ("linear_qkv", "linear_fc1"))
    proj, fc2 = (adapted(row, name, arch, adapters) for name in ("linear_proj", "linear_fc2"))
    return ModuleSpec(
        TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=outer_norm,
            self_attention=ModuleSpec(
                SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=qkv,
                    core_attention=attention,
                    linear_proj=linear(proj, arch.out_bias),
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=outer_norm,
            mlp=ModuleSpec(
                MLP,
                submodules=MLPSubmodules(
                    linear_fc1=linear(fc1, arch.mlp_bias),
                    linear_fc2=linear(fc2, arch.mlp_bias),
                    activation_func=ACTIVATIONS[arch.activation],
                ),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names,
        ),
    )


def linear(kind: Any, bias: bool) -> Any:
    """Class of a linear layer, with a bias or without: Megatron's config has one switch for all layers."""

    class Biased(kind):
        def __init__(self, *sizes: int, bias: bool, **rest: object):
            super().__init__(*sizes, bias=True, **rest)

    return Biased if bias else kind


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding: a multiple of tp, and of 64 for fast matrix products."""
    multiple = math.lcm(64, tp)
    return math.ceil(vocab_size / multiple) * multiple


def mark_tensor_parallel(model: nn.Module, arch: Architecture) -> None:
    """Mark split weights, as Megatron's initialisation does.

    Without the marks the gradient norm counts one rank's part of each matrix only, and clipping is silently
    wrong. Transformer Engine marks its layers itself.
    """
    for name, module in model.named_modules():
        if not isinstance(module, ColumnParallelLinear | VocabParallelEmbedding | RowParallelLinear):
            continue
        weight = getattr(module, "weight", None)
        if weight is not None and not hasattr(weight, "tensor_model_parallel"):
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            # gate and up are two matrices on each rank
            stride = len(arch.mlp_inputs) if name.endswith("linear_fc1") else 1
            set_tensor_model_parallel_attributes(weight, True, dim, stride)


def rotary_frequencies(arch: Architecture) -> Tensor:
    """Angular frequency of each pair of a head's dimensions, [d/2]; 0 for pairs that are not rotated."""
    frequencies = scaled_frequencies(dict(arch.rope), arch.rotary_dims)
    return F.pad(frequencies, (0, (arch.head_dim - arch.rotary_dims) // 2))


def scaled_frequencies(rope: dict[str, Any], dims: int) -> Tensor:
    """Angular frequencies of `dims` / 2 pairs: theta^(-2i/dims), scaled by the model's rope type.

    Linear scaling divides all by `factor`. llama3 (Llama 3.1) and yarn (https://arxiv.org/abs/2309.00071)
    divide frequencies with a wavelength beyond the original context, keep those well inside it, and
    interpolate between: llama3 by the number of turns within this context, yarn by the index of the pair.
    """
    exponents = torch.arange(0, dims, 2, dtype=torch.int64).float() / dims
    frequencies = 1.0 / (rope["rope_theta"] ** exponents)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / rope["factor"]
    context = rope["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = context * frequencies / (2 * math.pi)  # full turns within the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: scaled, 1: unchanged
    else:
        assert kind == "yarn", kind
        first, last = yarn_range(rope, dims)
        keep = 1 - ((torch.arange(dims // 2) - first) / (last - first)).clamp(0, 1)
    return (1 - keep) * frequencies / rope["factor"] + keep * frequencies


def yarn_range(rope: dict[str, Any], dims: int) -> tuple[float, float]:
    """Indices of the pairs between which yarn interpolates: beta_fast and beta_slow turns in the context."""
    context, theta = rope["original_max_position_embeddings"], rope["rope_theta"]
    first, last = (
        dims * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    )
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    return first, last + 0.001 if first == last else last


def rotary_scale(arch: Architecture) -> Tensor | None:
    """YaRN's attention factor of each pair of a head's dimensions, [d/2]; None without YaRN.

    `attention_factor` if present, else m(mscale) / m(mscale_all_dim) with m(a) = 0.1 a ln(factor) + 1 if both
    are present, else m(1).
    """
    rope: dict[str, Any] = dict(arch.rope)
    if rope.get("rope_type") != "yarn":
        return None
    factor = rope.get("attention_factor")
    if factor is None:
        growth = 0.1 * math.log(max(rope["factor"], 1))
        above, below = rope.get("mscale"), rope.get("mscale_all_dim")
        factor = (growth * above + 1) / (growth * below + 1) if above and below else growth + 1
    rotated, rest = arch.rotary_dims // 2, (arch.head_dim - arch.rotary_dims) // 2
    return torch.tensor([factor] * rotated + [1.0] * rest)
