"""Policy and reward model: Megatron's GPTModel with our norms, attention and heads.

`Architecture` says what the model is, `ModelConfig` how this run computes it. `build_policy` and
`build_scorer` make this rank's shard without weights; align.huggingface.load fills it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.utils import get_te_version
from torch import Tensor, nn

from align import hub, matmul
from align.architecture import Architecture
from align.attention import Packing, TorchAttention, uses_flash
from align.errors import UserError
from align.layers import ACTIVATIONS, NORMS, rotation
from align.logprobs import target_logprobs, target_logprobs_and_entropy
from align.parallel import ParallelConfig, device, device_name

FP8_MULTIPLE = 16  # what the sizes of an 8-bit product must be multiples of


@dataclass(frozen=True)
class ModelConfig:
    model: str = "tiny"
    """Hugging Face directory to start from, a model of the Hub (org/name, org/name@revision), or "tiny": a
    small random Llama that comes with this project"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: weights in bf16; main weights, gradients and Adam in fp32. auto: bf16 on GPUs, fp32 on a CPU"""
    attention: Literal["auto", "torch", "te"] = "auto"
    """attention and linear layers: torch's kernels or Transformer Engine. auto: te where it is installed"""
    fp8: bool = False
    """matrix products of the layers in 8 bits; needs --attention te and a GPU that has them (H100, H200)"""
    recompute: Literal["none", "selective", "full"] = "none"
    """activations to compute again in the backward pass: attention core (selective) or whole layer (full)"""

    @property
    def path(self) -> Path:
        """The directory of the model, which is downloaded if it is one of the Hub. Raises ValueError."""
        tiny = Path(__file__).parent.parent / "assets" / "tiny"
        return tiny if self.model == "tiny" else hub.local_model(Path(self.model))

    @property
    def dtype(self) -> torch.dtype:
        precision = (
            ("bf16" if torch.cuda.is_available() else "fp32") if self.precision == "auto" else self.precision
        )
        return torch.bfloat16 if precision == "bf16" else torch.float32


def check_model(arch: Architecture, config: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse a split that this model does not allow, before anything is built."""
    tp, pp = parallel.tp, parallel.pp
    if arch.heads % tp or arch.ffn_size % tp:
        raise UserError(
            f"--tp {tp} does not divide the model's {arch.heads} attention heads (and {arch.ffn_size} ffn "
            "columns): use a divisor, or data parallelism (more processes) or --pp instead"
        )
    if arch.kv_heads % tp and tp % arch.kv_heads:
        raise UserError(
            f"--tp {tp} and the model's {arch.kv_heads} key-value heads: one must divide the other"
        )
    if arch.layers % pp:
        raise UserError(f"--pp {pp} does not divide the model's {arch.layers} layers")
    if uses_te(config) and (arch.window is not None or parallel.cp > 1):
        raise UserError(
            f"--attention {config.attention} is Transformer Engine's here, which does not do sliding windows "
            "or --cp above 1 yet: give --attention torch"
        )
    if uses_te(config) and (arch.out_bias or arch.mlp_bias):
        raise UserError(
            f"--attention {config.attention} is Transformer Engine's here, which is not connected to "
            "attention_bias and mlp_bias yet: give --attention torch"
        )
    if config.fp8:
        check_fp8(arch, config, tp)


def check_fp8(arch: Architecture, config: ModelConfig, tp: int) -> None:
    """Refuse --fp8 where Transformer Engine's 8-bit products cannot be used."""
    if not uses_te(config):
        raise UserError("--fp8 needs Transformer Engine: give --attention te on a GPU, or leave --fp8 out")
    if config.dtype != torch.bfloat16:
        raise UserError(f"--fp8 and --precision {config.precision}: what is not in 8 bits must be in bf16")
    if torch.cuda.get_device_capability() < (8, 9):
        raise UserError(f"--fp8: {device_name()} has no 8-bit products: leave it out")
    sizes = {
        "hidden_size": arch.hidden_size,
        "attention columns": arch.heads * arch.head_dim // tp,
        "query, key and value rows": (arch.heads + 2 * arch.kv_heads) * arch.head_dim // tp,
        "ffn columns": arch.ffn_size // tp,
    }
    for name, size in sizes.items():
        if size % FP8_MULTIPLE:
            raise UserError(f"--fp8: the {size} {name} of a rank are no multiple of {FP8_MULTIPLE}")


def uses_te(config: ModelConfig) -> bool:
    """Is Transformer Engine to be used? Raises if it is asked for and not installed."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if config.attention == "te" and not (HAVE_TE and torch.cuda.is_available()):
        raise UserError(
            "--attention te needs a GPU and the package transformer-engine: install it or use torch"
        )
    return config.attention != "torch" and HAVE_TE and torch.cuda.is_available()


def describe_model(arch: Architecture, config: ModelConfig) -> str:
    """What is computed with which kernels, for the log's first lines."""
    if uses_te(config):
        kernels = f"Transformer Engine {get_te_version()}{', fp8' if config.fp8 else ''}"
    elif not torch.cuda.is_available():
        kernels = "torch kernels"
        if config.dtype == torch.float32:
            kernels += f", matrix products by {matmul.kernels()}"
    else:
        flash = uses_flash(config.dtype, arch.head_dim, cuda=True)
        kernels = f"torch kernels, {'flash attention' if flash else 'attention by sequence'}"
        kernels += ", small layers compiled"
    if overlaps_gradients():
        kernels += ", gradients summed during the backward pass"
    precision = str(config.dtype).removeprefix("torch.")
    one_matrix = arch.tied_embeddings and not arch.labels  # for embedding and output layer
    weights = arch.matmul_params + (0 if one_matrix else arch.vocab_size * arch.hidden_size)
    size = f"{weights / 1e6:.1f} M weights"
    commit = f" ({config.path.name})" if config.path.parent.name == "snapshots" else ""
    return f"{arch.family} with {size} from {config.model}{commit}, {precision}, {kernels}"


class Decoder(GPTModel):
    """Megatron's GPTModel with our layers; a subclass says what its last stage returns for each token."""

    def __init__(
        self,
        config: TransformerConfig,
        arch: Architecture,
        te: bool,
        tied: bool,
        groups: ProcessGroupCollection | None = None,
        embedding_rows: int | None = None,
    ):
        """`groups`: other process groups than training's; `embedding_rows`: V with its padding."""
        groups = groups or ProcessGroupCollection.use_mpu_process_groups()
        super().__init__(
            config,
            block_spec(config, arch, te),
            vocab_size=embedding_rows
            or padded_vocab_size(arch.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=arch.max_positions,
            pre_process=groups.pp.rank() == 0,
            post_process=groups.pp.rank() == groups.pp.size() - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=tied,
            position_embedding_type="none",  # the core attention rotates
            pg_collection=groups,
        )
        self.arch, self.te = arch, te
        self.frequencies = rotary_frequencies(arch).to(device())
        scale = rotary_scale(arch)
        self.rotary_scale = None if scale is None else scale.to(device())
        mark_tensor_parallel(self)

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, packed_seq_params: Packing, **rest: None
    ) -> tuple:
        """Megatron's, and once for all layers the rotation of these tokens, which the attention applies."""
        packed_seq_params.rotation = rotation(
            position_ids[0], self.frequencies, self.config.params_dtype, self.rotary_scale
        )
        return super()._preprocess(input_ids, position_ids, packed_seq_params=packed_seq_params, **rest)

    def sharded_state_dict(self, *args: object, **kwargs: object) -> dict:
        """For checkpoints: the weights, of the same names with all kernels."""
        return without_extra_state(super().sharded_state_dict(*args, **kwargs))


class Policy(Decoder):
    """A causal language model whose last stage returns the log-probabilities [T] of the targets.

    They are those of softmax(logits / temperature). With `entropy` it returns [T, 2], log-probs and entropies
    of these distributions, in nats. Both may be set between two passes. Ids from `known_ids` on have
    probability 0: `generate.Generator` lowers it to the ids that the tokenizer has.
    """

    def __init__(
        self,
        config: TransformerConfig,
        arch: Architecture,
        te: bool,
        groups: ProcessGroupCollection | None = None,
        embedding_rows: int | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
    ):
        super().__init__(config, arch, te, arch.tied_embeddings, groups, embedding_rows)
        self.temperature, self.entropy, self.known_ids = temperature, entropy, arch.vocab_size

    def _postprocess(self, hidden_states: Tensor, labels: Tensor, loss_mask: Tensor, **_: object) -> Tensor:
        """Log-probabilities [T] of labels [1, T] where loss_mask [1, T] is not 0, and 0 elsewhere.

        With `entropy` [T, 2], the entropies in the second column, 0 in the same places.
        """
        if not self.post_process:
            return hidden_states
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        trained = loss_mask[0].nonzero()[:, 0]
        # The output layer sees trained tokens only. First select, then copy: the copy's backward all-reduce
        # silently skips a gradient that is not contiguous.
        hidden = hidden_states.squeeze(1).index_select(0, trained)
        if not self.config.sequence_parallel:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        compute = target_logprobs_and_entropy if self.entropy else target_logprobs
        found = compute(
            hidden,
            self.output_weight(),
            labels[0][trained],
            self.known_ids,
            group,
            self.temperature,
        )
        return found.new_zeros(len(labels[0]), *found.shape[1:]).index_copy(0, trained, found)

    def output_weight(self) -> Tensor:
        """This rank's rows of the output embedding, [V/tp, H]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


class Scorer(Decoder):
    """A reward model: its last stage returns `arch.labels` values [T, A] for each token, in fp32.

    The score of a text is what stands at its last token; see align.preferences.as_scored.
    """

    def __init__(
        self, config: TransformerConfig, arch: Architecture, te: bool, label_weights: Sequence[float]
    ):
        """`label_weights`: what each of the A labels counts in the one score."""
        super().__init__(config, arch, te, tied=False)
        assert len(label_weights) == arch.labels
        self.label_weights = torch.tensor(label_weights, dtype=torch.float32, device=device())
        self.output_layer = None
        if self.post_process:
            self.score = nn.Linear(
                arch.hidden_size, arch.labels, bias=False, dtype=config.params_dtype, device=device()
            )

    def _postprocess(self, hidden_states: Tensor, **_: object) -> Tensor:
        """Values [T, A] of all tokens."""
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # Every tensor parallel rank computes the same head, so each takes its part of one gradient
            # instead of a sum over all.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden_states.squeeze(1).float() @ self.score.weight.float().t()

    def sharded_state_dict(self, *args: object, **kwargs: object) -> dict:
        """For checkpoints: that of all Megatron modules, since GPTModel's own insists on an output layer."""
        return without_extra_state(MegatronModule.sharded_state_dict(self, *args, **kwargs))

    def one_label(self) -> Tensor:
        """The head [1, H] that gives the one score: the weighted sum of the labels, which is linear, too."""
        return (self.label_weights @ self.score.weight.float())[None].to(self.score.weight.dtype)


def without_extra_state(found: dict) -> dict:
    """A checkpoint's entries without what linear layers call their extra state.

    It holds nothing that we use: --fp8 finds its scales anew at each product.
    """
    return {name: value for name, value in found.items() if not name.endswith("_extra_state")}


def build_policy(
    arch: Architecture,
    config: ModelConfig,
    parallel: ParallelConfig,
    temperature: float = 1.0,
    entropy: bool = False,
) -> Policy:
    """This rank's shard of a language model, its weights not yet filled; see Policy for what it returns."""
    if arch.labels:
        raise UserError(
            f"--model {config.model} is a reward model (*ForSequenceClassification) and predicts no tokens: "
            "give a language model"
        )
    check_model(arch, config, parallel)
    te = uses_te(config)
    made_of = transformer_config(arch, config, parallel, te)
    return Policy(made_of, arch, te, temperature=temperature, entropy=entropy)


def in_layout(policy: Policy, config: ModelConfig, groups: ProcessGroupCollection) -> Policy:
    """A model like `policy`, its weights not filled, split as `groups` say: tensor parallel, in one stage."""
    arch, parallel = policy.arch, ParallelConfig(tp=groups.tp.size())
    embedding_rows = padded_vocab_size(arch.vocab_size, policy.config.tensor_model_parallel_size)
    if embedding_rows % parallel.tp:
        raise UserError(
            f"--rollout-tp {parallel.tp} does not divide the {embedding_rows} rows of the embedding"
        )
    made_of = transformer_config(arch, config, parallel, policy.te)
    copy = Policy(made_of, arch, policy.te, groups, embedding_rows)
    copy.known_ids = policy.known_ids
    return copy


def build_scorer(
    arch: Architecture, config: ModelConfig, parallel: ParallelConfig, label_weights: Sequence[float] = (1.0,)
) -> Scorer:
    """This rank's shard of a reward model (`arch.labels` > 0), its weights not yet filled."""
    check_model(arch, config, parallel)
    te = uses_te(config)
    return Scorer(transformer_config(arch, config, parallel, te), arch, te, label_weights)


def distributed(model: Decoder) -> DistributedDataParallel:
    """Megatron's data parallelism: gradients in fp32 buffers, summed over data (and context) ranks.

    The sum of a bucket of gradients starts while the backward pass of the last micro-batch still makes the
    next. The weights' way back (overlap_param_gather) is not overlapped: between optimizer step and forward
    pass they would be old, and generation, exports, checkpoints and align.offload read them there.
    """
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlaps_gradients(),
        ),
        model,
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.no_sync_func = ddp.no_sync
    return ddp


def overlaps_gradients() -> bool:
    """Is there anybody to sum gradients with?"""
    return mpu.get_data_parallel_world_size(with_context_parallel=True) > 1


def transformer_config(
    arch: Architecture, config: ModelConfig, parallel: ParallelConfig, te: bool
) -> TransformerConfig:
    """The model in Megatron's words. Dropout is off in every algorithm of this repository."""
    recompute = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[config.recompute]
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
        use_te_activation_func=True,  # meaning: a module of the layer spec, from align.layers
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        window_size=None if arch.window is None else (arch.window - 1, 0),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        bf16=config.dtype == torch.bfloat16,
        fp8="hybrid" if te and config.fp8 else None,  # 4 bits of exponent forward, 5 for gradients
        fp8_recipe="tensorwise",  # the scale of each product from its own values: no state to keep
        params_dtype=config.dtype,
        pipeline_dtype=config.dtype,
        # Micro-batches differ in length, so stages exchange shapes first; Megatron allows that only with
        # "alltoall", even for a model without experts.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # The engine divides each loss by the step's global denominator; with this nobody divides again.
        calculate_per_token_loss=True,
        # Weights come from a file. Initialising them would only cost time; it also sets the attributes that
        # mark_tensor_parallel sets.
        perform_initialization=False,
        deterministic_mode=parallel.deterministic,
        # Megatron's fusions need CUDA extensions, or do what align.layers does.
        apply_rope_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **recompute,
    )


def block_spec(config: TransformerConfig, arch: Architecture, te: bool) -> TransformerBlockSubmodules:
    """This stage's layers, and the norm after them."""
    if te:
        from align.te import layer_spec  # here, because it needs Transformer Engine
    else:
        layer_spec = torch_layer_spec
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(arch)] * get_num_layers_to_build(config), layer_norm=NORMS[arch.norm]
    )


def torch_layer_spec(arch: Architecture) -> ModuleSpec:
    """A layer of Megatron's own linears, with our norm and attention."""
    norm = NORMS[arch.norm]
    qk_norm = norm if arch.qk_norm else IdentityOp
    return ModuleSpec(
        TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=TorchAttention,
                    linear_proj=linear(RowParallelLinear, arch.out_bias),
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                MLP,
                submodules=MLPSubmodules(
                    linear_fc1=linear(ColumnParallelLinear, arch.mlp_bias),
                    linear_fc2=linear(RowParallelLinear, arch.mlp_bias),
                    activation_func=ACTIVATIONS[arch.activation],
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


class Biased:
    """Mixin: a linear layer with a bias, where Megatron's config has one switch for all layers."""

    def __init__(self, *sizes: int, bias: bool, **rest: object):
        super().__init__(*sizes, bias=True, **rest)


def linear(kind: type, bias: bool) -> type:
    """The class of a linear layer, with a bias or without."""
    return type(f"Biased{kind.__name__}", (Biased, kind), {}) if bias else kind


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding: a multiple of tp, and of 64 for fast matrix products."""
    multiple = math.lcm(64, tp)
    return math.ceil(vocab_size / multiple) * multiple


def mark_tensor_parallel(model: nn.Module) -> None:
    """Mark split weights, as Megatron does when it initialises them.

    Without the marks the gradient norm counts only one rank's part of each matrix, and clipping is wrong,
    without an error. Transformer Engine marks its layers itself.
    """
    for name, module in model.named_modules():
        if not isinstance(module, ColumnParallelLinear | VocabParallelEmbedding | RowParallelLinear):
            continue
        weight = getattr(module, "weight", None)
        if weight is not None and not hasattr(weight, "tensor_model_parallel"):
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            # gate and up are two matrices on each rank
            stride = len(model.arch.mlp_inputs) if name.endswith("linear_fc1") else 1
            set_tensor_model_parallel_attributes(weight, True, dim, stride)


def rotary_frequencies(arch: Architecture) -> Tensor:
    """Angular frequency of each pair of a head's dimensions, [d/2]; 0 for pairs that are not rotated."""
    frequencies = scaled_frequencies(dict(arch.rope), arch.rotary_dims)
    return F.pad(frequencies, (0, (arch.head_dim - arch.rotary_dims) // 2))


def scaled_frequencies(rope: dict[str, float | str], dims: int) -> Tensor:
    """Angular frequencies of `dims` / 2 pairs: theta^(-2i/dims), scaled as the model asks.

    Linear scaling divides all by `factor`. llama3 (Llama 3.1) and yarn (https://arxiv.org/abs/2309.00071)
    divide frequencies whose wavelength is beyond the original context, keep those well inside it, and
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
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: scaled, 1: as it was
    else:
        assert kind == "yarn", kind
        first, last = yarn_range(rope, dims)
        keep = 1 - ((torch.arange(dims // 2) - first) / (last - first)).clamp(0, 1)
    return (1 - keep) * frequencies / rope["factor"] + keep * frequencies


def yarn_range(rope: dict[str, float | str], dims: int) -> tuple[float, float]:
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

    `attention_factor` if given, else m(mscale) / m(mscale_all_dim) with m(a) = 0.1 a ln(factor) + 1 if both
    are given, else m(1).
    """
    rope = dict(arch.rope)
    if rope.get("rope_type") != "yarn":
        return None
    factor = rope.get("attention_factor")
    if factor is None:
        growth = 0.1 * math.log(max(rope["factor"], 1))
        above, below = rope.get("mscale"), rope.get("mscale_all_dim")
        factor = (growth * above + 1) / (growth * below + 1) if above and below else growth + 1
    rotated, rest = arch.rotary_dims // 2, (arch.head_dim - arch.rotary_dims) // 2
    return torch.tensor([factor] * rotated + [1.0] * rest)
