"""What a model computes, as the config.json of a Hugging Face directory says it.

Llama, Mistral, Qwen2, Qwen3, StableLM and Nemotron are one decoder with a few switches. On top it has an
output layer over the vocabulary (a language model), or a linear head of a few labels (a reward model,
*ForSequenceClassification).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import AutoConfig, PretrainedConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "stablelm", "nemotron")
IMPLEMENTED = frozenset(
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings tie_word_embeddings initializer_range "
    "rope_theta rope_scaling rope_parameters sliding_window use_sliding_window max_window_layers layer_types "
    "architectures id2label".split()
)
IMPLEMENTED_BY = {
    "stablelm": {"use_qkv_bias", "partial_rotary_factor"},
    "nemotron": {"partial_rotary_factor"},
}
NORMS = {  # kind, and the field that holds its epsilon; the other families: RMS_NORM
    "stablelm": ("layer", "layer_norm_eps"),
    "nemotron": ("layer_1p", "norm_eps"),
}
RMS_NORM = ("rms", "rms_norm_eps")
WITHOUT_EFFECT = frozenset(
    "dtype torch_dtype transformers_version use_cache bos_token_id eos_token_id pad_token_id unk_token_id "
    "sep_token_id pretraining_tp _name_or_path label2id num_labels is_llama_config transformers.js_config "
    "output_attentions output_hidden_states return_dict problem_type chunk_size_feed_forward "
    "is_encoder_decoder".split()
)
ONLY_VALUE = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
}
ONLY_VALUE_BY = {
    "stablelm": {"qk_layernorm": False, "use_parallel_residual": False, "hidden_dropout": 0.0},
    "nemotron": {"hidden_act": "relu2"},
}
ROPE_FIELDS = {
    "default": {"rope_theta", "rope_type"},
    "linear": {"rope_theta", "rope_type", "factor"},
    "llama3": {
        *("rope_theta", "rope_type", "factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    },
}


@dataclass(frozen=True)
class Architecture:
    """What a model computes: a decoder, and what is on top of it."""

    family: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    init_std: float
    max_positions: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    window: int | None
    """sliding window: a token sees itself and the window - 1 tokens before it; None for all"""
    rope: tuple[tuple[str, float | str], ...]
    """Hugging Face's rope_parameters, as sorted items"""
    labels: int = 0
    """rows of a reward model's head; 0: a language model"""
    norm: Literal["rms", "layer", "layer_1p"] = "rms"
    """RMSNorm; LayerNorm with weight and bias; LayerNorm whose factor is weight + 1"""
    activation: Literal["swiglu", "relu2"] = "swiglu"
    """silu(gate) * up; relu(up)^2, without a gate"""
    rotary_fraction: float = 1.0
    """share of a head's dimensions, from the first on, that are rotated by the position"""

    @property
    def rotary_dims(self) -> int:
        """Dimensions of a head that are rotated by the position."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def mlp_inputs(self) -> tuple[str, ...]:
        """Matrices before the activation, by Hugging Face's names."""
        return ("gate", "up") if self.activation == "swiglu" else ("up",)

    @property
    def matmul_params(self) -> int:
        """Weights that multiply every token: matrices and output embedding, without the input embedding."""
        attention = self.hidden_size * self.head_dim * 2 * (self.heads + self.kv_heads)
        head = self.labels or self.vocab_size
        mlp = (len(self.mlp_inputs) + 1) * self.hidden_size * self.ffn_size
        return self.layers * (attention + mlp) + head * self.hidden_size


def read_config(directory: Path) -> Architecture:
    """The architecture that a directory's config.json describes.

    Raises:
        ValueError: an unknown architecture, or a field that changes the computation and is not implemented.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"--model {directory}: no config.json there; give a Hugging Face model directory")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if "flags" in raw and "model_type" not in raw:  # metrics.Run wrote it
        raise ValueError(f"--model {directory} is the directory of a run: its model is {directory}/hf")
    check_fields(raw, path)
    hf = AutoConfig.from_pretrained(directory, local_files_only=True)
    family, rope = hf.model_type, dict(rope_fields(hf))
    norm, norm_eps = NORMS.get(family, RMS_NORM)
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    fraction = rotary_fraction(family, rope.pop("partial_rotary_factor", None), head_dim, path)
    if hf.num_key_value_heads is None:  # transformers has no default for Nemotron
        raise ValueError(f"{path}: num_key_value_heads is missing")
    return Architecture(
        family=family,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        ffn_size=hf.intermediate_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        norm_eps=getattr(hf, norm_eps),
        init_std=hf.initializer_range,
        max_positions=hf.max_position_embeddings,
        tied_embeddings=bool(hf.tie_word_embeddings),
        qkv_bias=family == "qwen2" or (family == "stablelm" and hf.use_qkv_bias),
        qk_norm=family == "qwen3",
        window=hf.sliding_window if family == "mistral" else None,
        rope=rope_parameters(rope, path),
        labels=hf.num_labels if is_classifier(raw) else 0,
        norm=norm,
        activation="relu2" if family == "nemotron" else "swiglu",
        rotary_fraction=fraction,
    )


def is_classifier(raw: dict) -> bool:
    """Is this config.json that of a *ForSequenceClassification model, which is how reward models are kept?"""
    return any(name.endswith("ForSequenceClassification") for name in raw.get("architectures") or [])


def check_fields(raw: dict, path: Path) -> None:
    """Refuse what we do not implement, by the name that the file gives it."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{path}: model_type {family!r} is not implemented; known: {', '.join(FAMILIES)}")
    implemented = IMPLEMENTED | IMPLEMENTED_BY.get(family, set()) | {NORMS.get(family, RMS_NORM)[1]}
    only_value = ONLY_VALUE | ONLY_VALUE_BY.get(family, {})
    for name, value in raw.items():
        if name in implemented | WITHOUT_EFFECT:
            continue
        if name in only_value and value not in (None, only_value[name]):
            raise ValueError(f"{path}: {name} = {value!r} is not implemented, only {only_value[name]!r}")
        if name not in only_value:
            raise ValueError(
                f"{path}: the field {name!r} is not implemented. If it does not change what the model "
                "computes, remove it from the file"
            )
    if raw.get("use_sliding_window"):
        raise ValueError(
            f"{path}: use_sliding_window = true is not implemented (windows in some layers only)"
        )
    kinds = set(raw.get("layer_types") or [])
    if kinds - {"full_attention"} and not (family == "mistral" and kinds == {"sliding_attention"}):
        raise ValueError(f"{path}: layer_types {sorted(kinds)} is not implemented; all layers must be alike")


def rope_fields(hf: PretrainedConfig) -> dict:
    """rope_parameters of transformers 5, or what they were in transformers 4, which TensorRT-LLM asks for."""
    if hasattr(hf, "rope_parameters"):
        return hf.rope_parameters
    fields = {
        name: getattr(hf, name) for name in ("rope_theta", "partial_rotary_factor") if hasattr(hf, name)
    }
    return fields | (getattr(hf, "rope_scaling", None) or {})


def rotary_fraction(family: str, fraction: float | None, head_dim: int, path: Path) -> float:
    """partial_rotary_factor, checked."""
    fraction = 1.0 if fraction is None else fraction
    if fraction != 1.0 and "partial_rotary_factor" not in IMPLEMENTED_BY.get(family, ()):
        raise ValueError(f"{path}: partial_rotary_factor other than 1.0 is not implemented for {family}")
    dims = int(head_dim * fraction)
    if not 0 < dims <= head_dim or dims % 2:
        raise ValueError(
            f"{path}: partial_rotary_factor = {fraction} rotates {dims} of a head's {head_dim} dimensions: "
            "give an even number of them, at least 2"
        )
    return fraction


def rope_parameters(rope: dict, path: Path) -> tuple[tuple[str, float | str], ...]:
    """Hugging Face's rope_parameters as sorted items, checked."""
    rope = {name: value for name, value in rope.items() if value is not None and name != "type"}
    kind = rope.setdefault("rope_type", "default")
    if kind not in ROPE_FIELDS:
        raise ValueError(f"{path}: rope_type {kind!r} is not implemented; known: {', '.join(ROPE_FIELDS)}")
    if unknown := set(rope) - ROPE_FIELDS[kind]:
        raise ValueError(f"{path}: {sorted(unknown)} in rope_parameters of type {kind!r} is not implemented")
    return tuple(sorted(rope.items()))
