"""What a model computes, as the config.json of a Hugging Face directory says it.

Llama, Mistral, Qwen2 and Qwen3 are one decoder with a few switches. On top it has an output layer over the
vocabulary (a language model), or a linear head of a few labels (a reward model, *ForSequenceClassification).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
IMPLEMENTED = frozenset(
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim rms_norm_eps max_position_embeddings tie_word_embeddings initializer_range "
    "rope_theta rope_scaling rope_parameters sliding_window use_sliding_window max_window_layers layer_types "
    "architectures id2label".split()
)
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

    @property
    def matmul_params(self) -> int:
        """Weights that multiply every token: matrices and output embedding, without the input embedding."""
        attention = self.hidden_size * self.head_dim * 2 * (self.heads + self.kv_heads)
        head = self.labels or self.vocab_size
        return self.layers * (attention + 3 * self.hidden_size * self.ffn_size) + head * self.hidden_size


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
    family = hf.model_type
    return Architecture(
        family=family,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        ffn_size=hf.intermediate_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        norm_eps=hf.rms_norm_eps,
        init_std=hf.initializer_range,
        max_positions=hf.max_position_embeddings,
        tied_embeddings=bool(hf.tie_word_embeddings),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        window=hf.sliding_window if family == "mistral" else None,
        rope=rope_parameters(rope_fields(hf), path),
        labels=hf.num_labels if is_classifier(raw) else 0,
    )


def is_classifier(raw: dict) -> bool:
    """Is this config.json that of a *ForSequenceClassification model, which is how reward models are kept?"""
    return any(name.endswith("ForSequenceClassification") for name in raw.get("architectures") or [])


def check_fields(raw: dict, path: Path) -> None:
    """Refuse what we do not implement, by the name that the file gives it."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{path}: model_type {family!r} is not implemented; known: {', '.join(FAMILIES)}")
    for name, value in raw.items():
        if name in ONLY_VALUE and value not in (None, ONLY_VALUE[name]):
            raise ValueError(f"{path}: {name} = {value!r} is not implemented, only {ONLY_VALUE[name]!r}")
        if name not in IMPLEMENTED | WITHOUT_EFFECT | set(ONLY_VALUE):
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
    return {"rope_theta": hf.rope_theta, **(hf.rope_scaling or {})}


def rope_parameters(rope: dict, path: Path) -> tuple[tuple[str, float | str], ...]:
    """Hugging Face's rope_parameters as sorted items, checked."""
    rope = {name: value for name, value in rope.items() if value is not None and name != "type"}
    kind = rope.setdefault("rope_type", "default")
    if kind not in ROPE_FIELDS:
        raise ValueError(f"{path}: rope_type {kind!r} is not implemented; known: {', '.join(ROPE_FIELDS)}")
    if unknown := set(rope) - ROPE_FIELDS[kind] - {"partial_rotary_factor"}:
        raise ValueError(f"{path}: {sorted(unknown)} in rope_parameters of type {kind!r} is not implemented")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor other than 1.0 is not implemented")
    return tuple(sorted(rope.items()))
