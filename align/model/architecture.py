"""Architecture of a model, read from the config.json of a Hugging Face directory.

Llama, Mistral, Qwen2, Qwen3, StableLM and Nemotron are one decoder with a few switches. On top it has an
output layer over the vocabulary (a language model), or a linear head of a few labels (a reward model,
*ForSequenceClassification).
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from align.data.tokenizer_files import JSON_FILES
from align.errors import UserError
from align.files import read_object
from align.model.config_fields import IMPLEMENTED_BY, NORMS, RMS_NORM, Norm, check_fields, rope_parameters
from align.model.weights import has_own_head


@dataclass(frozen=True)
class Architecture:
    """Architecture of a decoder and of its head."""

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
    """sliding window: a token attends to itself and the window - 1 tokens before it; None for all"""
    rope: tuple[tuple[str, float | str], ...]
    """Hugging Face's rope_parameters, as sorted items"""
    labels: int = 0
    """rows of a reward model's head; 0: a language model"""
    norm: Norm = "rms"
    """RMSNorm; LayerNorm with weight and bias; LayerNorm whose factor is weight + 1"""
    activation: Literal["swiglu", "relu2"] = "swiglu"
    """silu(gate) * up; relu(up)^2, without a gate"""
    rotary_fraction: float = 1.0
    """share of a head's dimensions, from the first on, that are rotated by the position"""
    out_bias: bool = False
    """bias of the attention's output projection"""
    mlp_bias: bool = False
    """biases of all matrices of the MLP"""

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
        """Weights in a token's matrix products: matrices and output embedding, not the input embedding."""
        attention = self.hidden_size * self.head_dim * 2 * (self.heads + self.kv_heads)
        head = self.labels or self.vocab_size
        mlp = (len(self.mlp_inputs) + 1) * self.hidden_size * self.ffn_size
        return self.layers * (attention + mlp) + head * self.hidden_size


def read_config(directory: Path, flag: str = "--model") -> Architecture:
    """Read the architecture from the config.json of a directory that a flag names.

    Raises:
        UserError: an unknown architecture, or a field that changes the computation and is not implemented.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{flag} {directory}: no config.json there; give a Hugging Face model directory")
    raw = read_object(path)
    if "flags" in raw and "model_type" not in raw:  # written by tracking.run.Run
        raise UserError(f"{flag} {directory} is the directory of a run: its model is {directory}/hf")
    hf = complete(check_fields(raw, path), path)
    for file in JSON_FILES:  # checked here: read later by transformers, or copied to an export
        read_object(path.parent / file, required=False)
    family, rope = hf.model_type, dict(rope_fields(hf))
    norm, norm_eps = NORMS.get(family, RMS_NORM)
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    fraction = rotary_fraction(family, rope.pop("partial_rotary_factor", None), head_dim, path)
    bias = "attention_bias" in IMPLEMENTED_BY.get(family, ()) and hf.attention_bias
    labels = hf.num_labels if is_classifier(raw) else 0
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
        # as in transformers: weights in a file override the field of config.json
        tied_embeddings=bool(hf.tie_word_embeddings) and not (labels == 0 and has_own_head(directory)),
        qkv_bias=family == "qwen2" or (family == "stablelm" and hf.use_qkv_bias) or bias,
        qk_norm=family == "qwen3",
        window=hf.sliding_window if family == "mistral" else None,
        rope=rope_parameters(rope, path),
        labels=labels,
        norm=norm,
        activation="relu2" if family == "nemotron" else "swiglu",
        rotary_fraction=fraction,
        out_bias=bias,
        mlp_bias="mlp_bias" in IMPLEMENTED_BY.get(family, ()) and hf.mlp_bias,
    )


def complete(fields: dict, path: Path) -> PretrainedConfig:
    """Fill missing fields with transformers' defaults."""
    fields = {name: value for name, value in copy.deepcopy(fields).items() if name != "layer_types"}
    try:
        hf = AutoConfig.for_model(**fields)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    heads, kv_heads = hf.num_attention_heads, hf.num_key_value_heads
    if kv_heads is None:  # transformers has no default for Nemotron
        raise UserError(f"{path}: num_key_value_heads is missing")
    if heads % kv_heads:
        raise UserError(f"{path}: num_key_value_heads = {kv_heads} does not divide {heads} attention heads")
    if hf.hidden_size % heads and fields.get("head_dim") is None:
        raise UserError(f"{path}: num_attention_heads = {heads} does not divide hidden_size {hf.hidden_size}")
    return hf


def is_classifier(raw: dict) -> bool:
    """True for the config.json of a *ForSequenceClassification model, the form of reward models."""
    return any(name.endswith("ForSequenceClassification") for name in raw.get("architectures") or [])


def rope_fields(hf: PretrainedConfig) -> dict:
    """rope_parameters of transformers 5, or their equivalent in transformers 4, which TensorRT-LLM needs."""
    if hasattr(hf, "rope_parameters"):
        return hf.rope_parameters
    fields = {
        name: getattr(hf, name) for name in ("rope_theta", "partial_rotary_factor") if hasattr(hf, name)
    }
    fields |= getattr(hf, "rope_scaling", None) or {}
    if fields.get("rope_type") == "yarn":
        fields.setdefault("original_max_position_embeddings", hf.max_position_embeddings)
    return fields


def rotary_fraction(family: str, fraction: float | None, head_dim: int, path: Path) -> float:
    """Check partial_rotary_factor; None is 1."""
    fraction = 1.0 if fraction is None else fraction
    if fraction != 1.0 and "partial_rotary_factor" not in IMPLEMENTED_BY.get(family, ()):
        raise UserError(f"{path}: partial_rotary_factor other than 1.0 is not implemented for {family}")
    dims = int(head_dim * fraction)
    if not 0 < dims <= head_dim or dims % 2:
        raise UserError(
            f"{path}: partial_rotary_factor = {fraction} rotates {dims} of a head's {head_dim} dimensions: "
            "give an even number of them, at least 2"
        )
    return fraction
