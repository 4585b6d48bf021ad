"""Fields of a config.json: implemented ones, those without effect, and rules for their values."""

from pathlib import Path
from typing import Any, Literal

from align.errors import UserError
from align.files import shown
from align.flags import Rule, above, number, whole

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "stablelm", "nemotron")
IMPLEMENTED_BY = {
    "llama": {"attention_bias", "mlp_bias"},
    "qwen3": {"attention_bias"},
    "stablelm": {"use_qkv_bias", "partial_rotary_factor"},
    "nemotron": {"partial_rotary_factor", "attention_bias", "mlp_bias"},
}
Norm = Literal["rms", "layer", "layer_1p"]
NORMS: dict[
    str, tuple[Norm, str]
] = {  # kind, and the field that holds its epsilon; the other families: RMS_NORM
    "stablelm": ("layer", "layer_norm_eps"),
    "nemotron": ("layer_1p", "norm_eps"),
}
RMS_NORM: tuple[Norm, str] = ("rms", "rms_norm_eps")
WITHOUT_EFFECT = frozenset(
    # bookkeeping of the program that wrote the file
    "dtype torch_dtype transformers_version _name_or_path _commit_hash model_name is_llama_config "
    "transformers.js_config unsloth_fixed unsloth_version pretraining_tp finetuning_task "
    "task_specific_params prefix keys_to_ignore_at_inference problem_type label2id "
    # transformers' way to run the model, without effect on its outputs
    "use_cache output_attentions output_hidden_states return_dict chunk_size_feed_forward torchscript "
    "use_bfloat16 tf_legacy_loss gradient_checkpointing attn_implementation _attn_implementation "
    "_attn_implementation_internal _attn_implementation_autoset _flash_attn_2_enabled use_flash_attn "
    "use_flash_attention flash_attention is_encoder_decoder is_decoder neftune_noise_alpha "
    # the tokenizer's, which has files of its own
    "tokenizer_class bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id "
    "decoder_start_token_id model_max_length max_sequence_length max_seq_length "
    "tokenizer_model_max_length tokenizer_padding_side "
    # generation options of transformers 4; sampling has flags of its own here
    "max_length max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
    "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens".split()
)
ONLY_VALUE = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "use_mrope": False,
    "use_sliding_window": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
}
ONLY_VALUE_BY: dict[str, dict[str, Any]] = {
    "stablelm": {"qk_layernorm": False, "use_parallel_residual": False, "hidden_dropout": 0.0},
    "nemotron": {"hidden_act": "relu2"},
}


def or_null(rule: Rule) -> Rule:
    words, holds = rule
    return f"{words}, or null", lambda x: x is None or holds(x)


BOOLEAN = "true or false", lambda x: isinstance(x, bool)
OBJECT = "an object", lambda x: isinstance(x, dict)
LABELS = (
    "an object with numbers as keys",
    lambda x: isinstance(x, dict) and x != {} and all(map(str.isdecimal, x)),
)
STRINGS = "a list of strings", lambda x: isinstance(x, list) and all(isinstance(item, str) for item in x)
TEXT = "a string", lambda x: isinstance(x, str)

RULES: dict[str, Rule] = {
    "model_type": TEXT,
    "vocab_size": whole(1, 10**8),
    "hidden_size": whole(1, 10**6),
    "intermediate_size": whole(1, 10**7),
    "num_hidden_layers": whole(1, 10**4),
    "num_attention_heads": whole(1, 10**5),
    "num_key_value_heads": or_null(whole(1, 10**5)),
    "head_dim": or_null(whole(1, 10**5)),
    "max_position_embeddings": whole(1, 10**12),
    "tie_word_embeddings": BOOLEAN,
    "initializer_range": number(0, 1),
    "rms_norm_eps": number(0, 1),
    "layer_norm_eps": number(0, 1),
    "norm_eps": number(0, 1),
    "attention_bias": BOOLEAN,
    "mlp_bias": BOOLEAN,
    "use_qkv_bias": BOOLEAN,
    "sliding_window": or_null(whole(1, 10**12)),
    "max_window_layers": or_null(whole(0, 10**6)),
    "layer_types": or_null(STRINGS),
    "architectures": or_null(STRINGS),
    "num_labels": or_null(whole(1, 10**6)),
    "id2label": or_null(LABELS),
    "rope_scaling": or_null(OBJECT),
    "rope_parameters": or_null(OBJECT),
    "rope_theta": above(1, 1e30),
    "partial_rotary_factor": or_null(above(0, 1)),
}
ROPE_RULES: dict[str, Rule] = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": RULES["rope_theta"],
    "partial_rotary_factor": RULES["partial_rotary_factor"],
    "factor": above(0, 1e6),
    "low_freq_factor": above(0, 1e6),
    "high_freq_factor": above(0, 1e6),
    "original_max_position_embeddings": whole(1, 10**12),
    "attention_factor": or_null(above(0, 1e6)),
    "beta_fast": or_null(above(0, 1e6)),
    "beta_slow": or_null(above(0, 1e6)),
    "mscale": or_null(number(0, 1e6)),
    "mscale_all_dim": or_null(number(0, 1e6)),
    "truncate": BOOLEAN,
}
ROPE_FIELDS = {  # required and optional fields of a type, beside rope_theta
    "default": ([], []),
    "linear": (["factor"], []),
    "llama3": (["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"], []),
    "yarn": (
        ["factor", "original_max_position_embeddings"],
        ["attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"],
    ),
}
IMPLEMENTED = frozenset(RULES) - {name for of_family in IMPLEMENTED_BY.values() for name in of_family}
IMPLEMENTED -= {RMS_NORM[1], *(field for _, field in NORMS.values())}


def check_rules(fields: dict, rules: dict[str, Rule], location: str) -> None:
    """Refuse a field whose value breaks its rule."""
    for name, value in fields.items():
        if name in rules and not rules[name][1](value):
            raise UserError(f"{location}: {name} = {shown(value)} must be {rules[name][0]}")


def check_fields(raw: dict, path: Path) -> dict:
    """Return the implemented fields; refuse others that have an effect."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{path}: model_type {shown(family)} is not implemented; known: {', '.join(FAMILIES)}"
        )
    implemented = IMPLEMENTED | IMPLEMENTED_BY.get(family, set()) | {NORMS.get(family, RMS_NORM)[1]}
    only_value = ONLY_VALUE | ONLY_VALUE_BY.get(family, {})
    for name, value in raw.items():
        if name in implemented | WITHOUT_EFFECT or value is None:
            continue
        if name not in only_value:
            raise UserError(
                f"{path}: the field {name!r} is not implemented. If it does not change what the model "
                "computes, remove it from the file"
            )
        if value != only_value[name]:
            raise UserError(f"{path}: {name} = {shown(value)} is not implemented, only {only_value[name]!r}")
    fields = {name: value for name, value in raw.items() if name in implemented}
    check_rules(fields, RULES, str(path))
    for name in ("rope_scaling", "rope_parameters"):
        check_rules(fields.get(name) or {}, ROPE_RULES, f"{path}: {name}")
    kinds = set(raw.get("layer_types") or [])
    if kinds - {"full_attention"} and not (family == "mistral" and kinds == {"sliding_attention"}):
        raise UserError(f"{path}: layer_types {sorted(kinds)} is not implemented; all layers must be alike")
    return fields


def rope_parameters(rope: dict, path: Path) -> tuple[tuple[str, float | str], ...]:
    """Check Hugging Face's rope_parameters, and return them as sorted items."""
    rope = {name: value for name, value in rope.items() if value is not None and name != "type"}
    kind = rope.setdefault("rope_type", "default")
    if kind not in ROPE_FIELDS:
        raise UserError(f"{path}: rope_type {kind!r} is not implemented; known: {', '.join(ROPE_FIELDS)}")
    required, optional = ROPE_FIELDS[kind]
    if unknown := set(rope) - {"rope_theta", "rope_type", *required, *optional}:
        raise UserError(f"{path}: {sorted(unknown)} in rope_parameters of type {kind!r} is not implemented")
    if missing := [name for name in required if name not in rope]:
        raise UserError(f"{path}: rope_parameters of type {kind!r} need {missing[0]}")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise UserError(f"{path}: low_freq_factor must be below high_freq_factor")
    return tuple(sorted(rope.items()))
