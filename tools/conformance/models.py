"""Random small models of every family, as transformers writes them."""

from pathlib import Path

import torch
import transformers

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


def write_models(directory: Path) -> None:
    """Write a directory for each family, in which every tensor is random, norms and biases too."""
    for seed, (name, config) in enumerate(FAMILIES.items()):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms start at one and biases at zero: a mix-up would not show
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(directory / name)
