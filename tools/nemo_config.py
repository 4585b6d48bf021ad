"""NeMo's model_config.yaml as the config.json of the same model in Hugging Face's terms.

    normalization, activation                    Hugging Face          the norms' weights
    rmsnorm, swiglu or fast-swiglu               LlamaForCausalLM      as they are
    layernorm, swiglu or fast-swiglu             StableLmForCausalLM   as they are
    layernorm1p, swiglu or fast-swiglu           StableLmForCausalLM   w + 1, in w's own dtype as in NeMo
    layernorm1p, squared-relu                    NemotronForCausalLM   as they are: it adds the 1 itself

A field that changes what the model computes and is not implemented is refused by its name and value.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from align.errors import UserError

FAMILIES = {
    ("rmsnorm", "swiglu"): "llama",
    ("layernorm", "swiglu"): "stablelm",
    ("layernorm1p", "swiglu"): "stablelm",
    ("layernorm1p", "squared-relu"): "nemotron",
}
CLASSES = {"llama": "Llama", "stablelm": "StableLm", "nemotron": "Nemotron"}
EPSILON = {"llama": "rms_norm_eps", "stablelm": "layer_norm_eps", "nemotron": "norm_eps"}

IMPLEMENTED = frozenset(
    "activation data encoder_seq_length ffn_hidden_size hidden_size high_freq_factor init_method_std "
    "kv_channels layernorm_epsilon layernorm_zero_centered_gamma low_freq_factor "
    "make_vocab_size_divisible_by max_position_embeddings normalization num_attention_heads num_layers "
    "num_query_groups old_context_len peft pipeline_model_parallel_size regression reward_standardization "
    "rotary_base rotary_percentage scale_factor scale_positional_embedding seq_len_interpolation_factor "
    "share_embeddings_and_output_weights tensor_model_parallel_size tokenizer "
    "virtual_pipeline_model_parallel_size".split()
)
VALUES = {  # that are implemented
    "position_embedding_type": ("rope",),
    "bias": (False,),
    "transformer_block_type": ("pre_ln",),
    "attention_type": ("multihead",),
    "normalize_attention_scores": (True,),
    "name": (None, "", "megatron_gpt", "te_gpt", "modelopt"),  # which layers Megatron-Core takes
}
ABSENT = {"position_embedding_type": "learned_absolute", "bias": True}  # what NeMo takes then
OFF = frozenset(  # implemented if null, false, 0 or empty
    "apply_embedding_scaling apply_residual_connection_post_layernorm attn_logit_softcapping drop_layers "
    "final_logit_softcapping fp8_params headscale hyena mcore_customization_config megatron_legacy "
    "multi_latent_attention num_moe_experts openai_gelu qk_layernorm qkv_bias rotary_interleaved "
    "softmax_scale use_avg_pool window_size".split()
)
WITHOUT_EFFECT = frozenset(  # on the mathematics of a forward pass: training, precision, kernels, memory
    "answer_only_loss apex_transformer_log_level apply_query_key_layer_scaling apply_rope_fusion "
    "async_grad_allreduce attention_backend attention_dropout attention_softmax_in_fp32 batch_p2p_comm "
    "bias_activation_fusion bias_dropout_add_fusion bias_dropout_fusion bias_gelu_fusion "
    "combine_rm_and_critic_server context_parallel_size contiguous_grad_bucket critic "
    "defer_embedding_wgrad_compute distributed_adam_bucket_merge_size do_layer_norm_weight_decay dpo "
    "enable_cuda_graph enable_megatron_timers expert_model_parallel_size ffn_dropout force_head_dtype "
    "forward_micro_batch_size fp16_lm_cross_entropy fp32_grad_accum fp32_residual_connection fp8 fsdp "
    "fused_bf16 fused_fp16 gc_interval get_attention_mask_from_fusion global_batch_size "
    "grad_allreduce_chunk_size_mb grad_div_ar_fusion gradient_accumulation_fusion gradient_as_bucket_view "
    "hidden_dropout hysteresis inference knowledge_distillation kto loss_clip_val masked_softmax_fusion "
    "mcore_gpt megatron_amp_O2 megatron_timer_kwargs micro_batch_size native_amp_growth_interval "
    "native_amp_init_scale nccl_communicator_config_path nemo_version nsys_profile "
    "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage "
    "num_micro_batches_with_partial_activation_checkpoints offload_adam_states onnx_safe optim "
    "output_sequence overlap_p2p_comm override_vocab_size overwrite_base_config persist_layer_norm "
    "pipeline_model_parallel_comm_backend pipeline_model_parallel_split_rank post_process ppo pre_process "
    "precision pretrained_checkpoint rampup_batch_size reduce_amax reinforce reset_lr reset_lr_steps "
    "restore_from_ckpt restore_from_path resume_from_checkpoint reward_model_type rs "
    "save_nemo_on_validation_end seed sequence_parallel sharp skip_fp8_attention_checkpoint_load "
    "skip_train spin steerlm2 sync_batch_comm target torch_distributed_checkpoint tp_only_amax_red "
    "transformer_engine use_cpu_initialization use_emha use_flash_attention use_loss_mask "
    "use_scaled_init_method use_te_rng_tracker use_tp_pp_dp_mapping use_unified_checkpoint "
    "validation_param_sync_overlap with_fp32_embedding_grads".split()
)
WITHOUT_EFFECT_PREFIXES = (
    *("account_for_", "activations_checkpoint_", "cpu_offloading", "dist_ckpt_", "distribute_saved_", "fp8_"),
    *("fsdp_", "moe_", "recompute_", "tp_comm_", "ub_tp_comm_"),
)


def read(path: Path, ignore: Collection[str] = ()) -> dict:
    """The fields of a model_config.yaml, checked; `ignore`: names of unknown fields that are accepted.

    Raises UserError if it cannot be read, or for a field that is unknown or not implemented.
    """
    try:
        fields = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path.name} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path.name}: there must be fields in it, not a {type(fields).__name__}")
    check(fields, ignore)
    return fields


def check(fields: dict, ignore: Collection[str]) -> None:
    """Refuse what is not implemented, by the name that the file gives it."""
    for name, values in VALUES.items():
        if (value := fields.get(name, ABSENT.get(name, values[0]))) not in values:
            raise not_implemented(name, value, f"only {values[-1]!r}")
    for name, value in fields.items():
        if name in OFF and value:
            raise not_implemented(name, value, "it must be off")
        known = name in IMPLEMENTED | WITHOUT_EFFECT | OFF | set(VALUES) | set(ignore)
        if not known and not name.startswith(WITHOUT_EFFECT_PREFIXES):
            advice = f"If it does not change what the model computes, give --ignore {name}"
            raise UserError(f"model_config.yaml: the field {name} = {value!r} is not known. {advice}")
    if (scheme := (fields.get("peft") or {}).get("peft_scheme")) not in (None, "none"):
        raise not_implemented("peft.peft_scheme", scheme, "merge the adapter in NeMo first")


def not_implemented(name: str, value: object, rule: str) -> UserError:
    return UserError(f"model_config.yaml: {name} = {value!r} is not implemented; {rule}")


def normalization(fields: dict) -> str:
    """rmsnorm, layernorm or layernorm1p; Megatron's name of the last is a zero-centred gamma."""
    name = str(fields.get("normalization", "layernorm")).lower()
    return name + "1p" if fields.get("layernorm_zero_centered_gamma") and not name.endswith("1p") else name


def family(fields: dict) -> str:
    """Hugging Face's model_type. Raises UserError if there is none for this pair of norm and activation."""
    pair = normalization(fields), str(fields.get("activation", "gelu")).removeprefix("fast-")
    if pair not in FAMILIES:
        known = "; ".join(f"{norm} with {activation}" for norm, activation in FAMILIES)
        raise not_implemented("normalization, activation", pair, f"known: {known}")
    return FAMILIES[pair]


def huggingface_config(fields: dict) -> dict:
    """The config.json of a language model, without the size of its vocabulary and its special tokens.

    Raises UserError if a field is missing or no number, or for sizes that the family cannot have.
    """
    kind, heads, hidden = family(fields), number(fields, "num_attention_heads"), number(fields, "hidden_size")
    context = fields.get("encoder_seq_length")
    config = {
        "architectures": [f"{CLASSES[kind]}ForCausalLM"],
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": number(fields, "ffn_hidden_size"),
        "num_hidden_layers": number(fields, "num_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": number(fields, "num_query_groups", heads),
        "head_dim": number(fields, "kv_channels", hidden // heads),
        "hidden_act": "relu2" if kind == "nemotron" else "silu",
        "max_position_embeddings": number(fields, "max_position_embeddings", context),
        "initializer_range": number(fields, "init_method_std", 0.02, float),
        EPSILON[kind]: number(fields, "layernorm_epsilon", 1e-5, float),
        "tie_word_embeddings": bool(fields.get("share_embeddings_and_output_weights", True)),
        **rope(fields, kind),
    }
    if kind == "stablelm" and config.pop("head_dim") * heads != hidden:
        raise not_implemented("kv_channels", fields["kv_channels"], f"StableLM's is {hidden} / {heads}")
    return config


def as_reward_model(config: dict, labels: int) -> dict:
    """The config.json of a reward model on the layers of a language model."""
    names = {str(i): f"LABEL_{i}" for i in range(labels)}
    return config | {
        "architectures": [f"{CLASSES[config['model_type']]}ForSequenceClassification"],
        "tie_word_embeddings": False,
        "num_labels": labels,
        "id2label": names,
        "label2id": {name: int(i) for i, name in names.items()},
    }


def rope(fields: dict, kind: str) -> dict:
    """The fields of rotary embeddings, by the names that transformers 4 and 5 read."""
    part = number(fields, "rotary_percentage", 1.0, float)
    if kind == "llama" and part != 1:
        raise not_implemented("rotary_percentage", part, "with rmsnorm it must be 1.0")
    rotary: dict[str, Any] = {"rope_theta": number(fields, "rotary_base", 10000.0, float)}
    if kind != "llama":
        rotary["partial_rotary_factor"] = part
    factor = fields.get("seq_len_interpolation_factor")
    if fields.get("scale_positional_embedding"):
        if factor:
            rule = "not with scale_positional_embedding"
            raise not_implemented("seq_len_interpolation_factor", factor, rule)
        rotary["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": number(fields, "scale_factor", 8.0, float),
            "low_freq_factor": number(fields, "low_freq_factor", 1.0, float),
            "high_freq_factor": number(fields, "high_freq_factor", 4.0, float),
            "original_max_position_embeddings": number(fields, "old_context_len", 8192),
        }
    elif factor:  # positions are divided by it, as frequencies are by Hugging Face's
        rotary["rope_scaling"] = {"rope_type": "linear", "factor": float(factor)}
    return rotary


def number(fields: dict, name: str, default: float | None = None, kind: type = int) -> float:
    """A field as a number; YAML reads 1e-5 as text. Raises UserError if it is missing or none."""
    value = default if fields.get(name) is None else fields[name]
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"model_config.yaml: {name} must be a number, it is {value!r}") from error
