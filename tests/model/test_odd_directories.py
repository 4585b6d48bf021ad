"""Spoilt model directories: each ends with a ValueError of one line that names the file and the field."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.errors import UserError
from align.model import architecture, huggingface, spec

Spoil = Callable[[Path], object]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FIRST, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def config(**changes: object) -> Spoil:
    """Change fields of config.json."""

    def spoil(directory: Path) -> None:
        fields = json.loads((directory / CONFIG).read_text()) | changes
        (directory / CONFIG).write_text(json.dumps(fields))

    return spoil


def rope(base: dict, *remove: str, **changes: object) -> Spoil:
    """Change rope_parameters."""
    fields = {name: value for name, value in {**base, **changes}.items() if name not in remove}
    return config(rope_parameters=fields)


def text(file: str, content: str | bytes) -> Spoil:
    """Write a file."""
    return lambda directory: (directory / file).write_bytes(
        content.encode() if isinstance(content, str) else content
    )


def stored_as(dtype: torch.dtype, name: str = FIRST) -> Spoil:
    """Store one tensor in another type."""

    def spoil(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        save_file({**tensors, name: tensors[name].to(dtype)}, directory / WEIGHTS)

    return spoil


def index(content: object) -> Spoil:
    """An index instead of model.safetensors, which is the only shard."""

    def spoil(directory: Path) -> None:
        names = load_file(directory / WEIGHTS)
        (directory / WEIGHTS).rename(directory / "shard.safetensors")
        weight_map = dict.fromkeys(names, "shard.safetensors")
        text = content(weight_map) if callable(content) else content
        (directory / INDEX).write_text(text if isinstance(text, str) else json.dumps(text))

    return spoil


ODD = {  # name: what is wrong, and words of the message
    **{
        f"{name}={value!r}": (config(**{name: value}), (CONFIG, name))
        for name, value in [
            ("model_type", ["llama"]),
            ("vocab_size", 0),
            ("vocab_size", "131"),
            ("vocab_size", 10**12),
            ("hidden_size", -64),
            ("hidden_size", 64.0),
            ("hidden_size", True),
            ("hidden_size", None),
            ("intermediate_size", 0),
            ("num_hidden_layers", 10**9),
            ("num_hidden_layers", 0),
            ("num_attention_heads", 0),
            ("num_key_value_heads", 3),  # does not divide 4
            ("num_key_value_heads", 0),
            ("num_key_value_heads", [2]),
            ("head_dim", 0),
            ("head_dim", -16),
            ("head_dim", "16"),
            ("max_position_embeddings", 0),
            ("max_position_embeddings", "256"),
            ("initializer_range", -1.0),
            ("initializer_range", float("nan")),
            ("rms_norm_eps", "1e-5"),
            ("rms_norm_eps", float("inf")),
            ("tie_word_embeddings", "false"),
            ("attention_bias", 1),
            ("mlp_bias", "no"),
            ("rope_theta", float("inf")),
            ("rope_theta", 0),
            ("rope_theta", "10000"),
            ("rope_scaling", "yarn"),
            ("rope_parameters", [1]),
            ("layer_types", "full_attention"),
            ("layer_types", [{}]),
            ("architectures", "LlamaForCausalLM"),
            ("architectures", [None]),
            ("id2label", {"a": "LABEL_0"}),
            ("id2label", ["LABEL_0"]),
            ("num_labels", -1),
            ("pruned_heads", {"0": [1]}),
            ("quantization_config", {"bits": 4}),
        ]
    },
    "7 heads": (config(num_attention_heads=7), (CONFIG, "hidden size", "attention heads (7)")),
    "odd head": (config(head_dim=17), (CONFIG, "17")),
    "rope factor 0": (rope(YARN, factor=0), (CONFIG, "rope_parameters: factor = 0")),
    "rope factor nan": (rope(YARN, factor=float("nan")), (CONFIG, "factor = nan")),
    "rope factor text": (rope(YARN, factor="4"), (CONFIG, "factor = '4'")),
    "rope without factor": (rope(YARN, "factor"), (CONFIG, "yarn", "factor")),
    "linear without factor": (rope(YARN, "factor", rope_type="linear"), (CONFIG, "linear")),
    "rope type 3": (rope(YARN, rope_type=3), (CONFIG, "rope_type = 3")),
    "theta in rope": (rope(YARN, rope_theta=float("inf")), (CONFIG, "rope_theta = inf")),
    "context 0": (
        rope(YARN, original_max_position_embeddings=0),
        (CONFIG, "original_max_position_embeddings"),
    ),
    "beta text": (rope(YARN, beta_fast="32"), (CONFIG, "beta_fast")),
    "mscale list": (rope(YARN, mscale=[1]), (CONFIG, "mscale")),
    "truncate null": (rope(YARN, truncate=None), (CONFIG, "truncate")),
    "attention factor": (rope(YARN, attention_factor=-1.0), (CONFIG, "attention_factor")),
    "llama3 equal": (rope(LLAMA3, low_freq_factor=4.0), (CONFIG, "low_freq_factor")),
    "llama3 without": (rope(LLAMA3, "high_freq_factor"), (CONFIG, "high_freq_factor")),
    "config empty": (text(CONFIG, ""), (CONFIG, "not valid JSON")),
    "config cut": (text(CONFIG, '{"model_type": "lla'), (CONFIG, "not valid JSON")),
    "config list": (text(CONFIG, "[]"), (CONFIG, "must hold a JSON object, not []")),
    "config nested": (text(CONFIG, "[" * 100_000), (CONFIG, "not valid JSON")),
    "config latin": (text(CONFIG, b'{"a": "\xe9"}'), (CONFIG, "not valid JSON")),
    "config long number": (text(CONFIG, '{"vocab_size": ' + "9" * 5000 + "}"), (CONFIG, "not valid JSON")),
    **{
        f"{file} broken": (text(file, '{"a": '), (file, "not valid JSON"))
        for file in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
    },
    "generation_config list": (text("generation_config.json", "[1]"), ("generation_config.json", "object")),
    **{
        f"stored as {name}": (stored_as(dtype), (WEIGHTS, f"{FIRST} is stored as {name}"))
        for name, dtype in {
            "I8": torch.int8,
            "I32": torch.int32,
            "BOOL": torch.bool,
            "F8_E4M3": torch.float8_e4m3fn,
            "C64": torch.complex64,
        }.items()
    },
    "a norm in I64": (stored_as(torch.int64, "model.norm.weight"), (WEIGHTS, "model.norm.weight", "I64")),
    "weights empty": (text(WEIGHTS, b""), (WEIGHTS, "cannot be read")),
    "weights of Git LFS": (text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), (WEIGHTS,)),
    "index broken": (index('{"weight_map": '), (INDEX, "not valid JSON")),
    "index list": (index([]), (INDEX, "object")),
    "index without weight_map": (index({"metadata": {}}), (INDEX, "weight_map")),
    "weight_map list": (index({"weight_map": [FIRST]}), (INDEX, "weight_map")),
    "weight_map number": (index({"weight_map": {FIRST: 1}}), (INDEX, FIRST)),
    "weight_map outside": (index({"weight_map": {FIRST: "../x.safetensors"}}), (INDEX, FIRST)),
    "weight_map empty": (index({"weight_map": {}}), ("tensors are missing",)),
    "weight_map of no tensor": (
        index(lambda names: {"weight_map": {**names, HEAD: "other.safetensors"}}),
        ("other.safetensors", "cannot be read"),
    ),
}


@pytest.fixture(scope="module")
def sound(models) -> Path:
    """The directory to copy and spoil; it has every kind of file."""
    return models / "llama"


@pytest.mark.parametrize("name", ODD)
def test_one_line_names_file_and_field(sound, tmp_path, name):
    directory = Path(shutil.copytree(sound, tmp_path / "model"))
    spoil, words = ODD[name]
    spoil(directory)
    with pytest.raises(UserError) as error:
        arch = architecture.read_config(directory)
        spec.rotary_frequencies(arch)
        huggingface.open_source(directory, arch, 0)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and len(message) < 500
    assert str(directory) in message
    for word in words:
        assert word in message


def test_a_shard_without_the_tensor_that_the_index_promises(sound, tmp_path):
    directory = Path(shutil.copytree(sound, tmp_path / "model"))
    index(lambda names: {"weight_map": names})(directory)
    tensors = load_file(directory / "shard.safetensors")
    save_file({x: t for x, t in tensors.items() if x != FIRST}, directory / "shard.safetensors")
    with pytest.raises(UserError, match=rf"shard.safetensors has no {FIRST}, which {INDEX} says"):
        huggingface.open_source(directory, architecture.read_config(directory), 0)


def test_a_tied_model_with_a_head_of_integers(sound, tmp_path):
    directory = Path(shutil.copytree(sound, tmp_path / "model"))
    config(tie_word_embeddings=True)(directory)
    stored_as(torch.int8, HEAD)(directory)
    with pytest.raises(UserError, match=rf"{WEIGHTS}: {HEAD} is stored as I8"):
        architecture.read_config(directory)
