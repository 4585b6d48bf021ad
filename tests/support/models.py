"""Random tiny models: the configurations of all families, and the tiny model of assets/."""

import copy
import json
import shutil
from pathlib import Path

import torch
import transformers

from tests.support.files import ROOT, TINY

SIZES = dict(
    vocab_size=131,  # odd, so that the embedding is padded
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,  # large, so that a wrong mask or angle shows in the logits
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,  # transformers neither fills nor trains the embedding of a pad token
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN_ROPE = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=4.0,
    original_max_position_embeddings=32,
    beta_fast=8.0,  # so that there are pairs of all three kinds in a small head
)
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama_tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama3": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE),
    "mistral": transformers.MistralConfig(**SIZES, head_dim=24, sliding_window=7, tie_word_embeddings=False),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=24, tie_word_embeddings=False),
    "stablelm": transformers.StableLmConfig(**SIZES, use_qkv_bias=True, tie_word_embeddings=False),
    "nemotron": transformers.NemotronConfig(  # squared ReLU: at 0.2 its gradients have few digits in float32
        **SIZES | {"initializer_range": 0.1}, head_dim=24, tie_word_embeddings=False
    ),
    "llama_bias": transformers.LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    ),
    "qwen3_yarn": transformers.Qwen3Config(
        **SIZES, head_dim=24, attention_bias=True, tie_word_embeddings=False, rope_parameters=YARN_ROPE
    ),
}


def random_tiny(directory: Path) -> Path:
    """The tiny model with random weights, in a directory of its own."""
    config = transformers.AutoConfig.from_pretrained(ROOT / "assets/tiny")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for file in (ROOT / "assets/tiny").iterdir():
        if file.name != "config.json":
            shutil.copy(file, directory)
    return directory


MEAN, STD = 0.25, 0.5  # of scores, as the directory of `save_reward_model` says


def save_reward_model(directory: Path) -> Path:
    """A random reward model with the policy's tokenizer, its scores of about 1 or -1."""
    config = copy.deepcopy(transformers.AutoConfig.from_pretrained(TINY))
    config.num_labels, config.initializer_range = 1, 0.2
    torch.manual_seed(9)
    transformers.LlamaForSequenceClassification(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, directory / name)
    (directory / "reward_statistics.json").write_text(json.dumps({"mean": MEAN, "std": STD}))
    return directory
