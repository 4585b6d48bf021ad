"""Names, shapes and row order of a model's tensors in Hugging Face's files and in Megatron's modules.

    Megatron (each layer)                Hugging Face                        split over tensor parallel ranks
    input_layernorm, pre_mlp_layernorm   input_, post_attention_layernorm    no
    self_attention.linear_qkv            q_proj, k_proj, v_proj              rows: by group q.. q k v (1)
    self_attention.q_, k_layernorm       q_norm, k_norm                      no
    self_attention.linear_proj           o_proj                              columns (3)
    mlp.linear_fc1                       gate_proj, up_proj (2)              rows: [gate; up] on each rank
    mlp.linear_fc2                       down_proj                           columns (3)
    embedding, output_layer              embed_tokens, lm_head               rows, padded with zeros
    decoder.final_layernorm              norm                                no
    score (reward models)                score                               no

(1) Rows of q and k are reordered within each head if only a part of it is rotated: see `rotary_order`.
(2) up_proj alone if the MLP has no gate.
(3) A bias is not split.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from align.model.architecture import Architecture
from align.model.gpt import Decoder, Interleaved
from align.model.lora import is_adapter

OUTER_NAMES = {  # of modules: Megatron's, Hugging Face's
    "embedding.word_embeddings": "model.embed_tokens",
    "decoder.final_layernorm": "model.norm",
    "output_layer": "lm_head",
    "score": "score",
}
LAYER_NAMES = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_qkv.layer_norm": "input_layernorm",  # Transformer Engine fuses them
    "self_attention.linear_qkv": "self_attn.*_proj",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc1.layer_norm": "post_attention_layernorm",
    "mlp.linear_fc1": "mlp.*_proj",
    "mlp.linear_fc2": "mlp.down_proj",
}


def tensor_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model's safetensors files, in the order of writing."""
    hidden, head = arch.hidden_size, arch.head_dim
    in_norm = ("weight",) if arch.norm == "rms" else ("weight", "bias")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (arch.vocab_size, hidden)}
    heads = {"q": arch.heads, "k": arch.kv_heads, "v": arch.kv_heads}
    for layer in range(arch.layers):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                **{f"input_layernorm.{x}": (hidden,) for x in in_norm},
                **{f"self_attn.{x}_proj.weight": (heads[x] * head, hidden) for x in "qkv"},
                **({f"self_attn.{x}_proj.bias": (heads[x] * head,) for x in "qkv"} if arch.qkv_bias else {}),
                **({f"self_attn.{x}_norm.weight": (head,) for x in "qk"} if arch.qk_norm else {}),
                "self_attn.o_proj.weight": (hidden, arch.heads * head),
                **({"self_attn.o_proj.bias": (hidden,)} if arch.out_bias else {}),
                **{f"post_attention_layernorm.{x}": (hidden,) for x in in_norm},
                **{f"mlp.{x}_proj.weight": (arch.ffn_size, hidden) for x in arch.mlp_inputs},
                "mlp.down_proj.weight": (hidden, arch.ffn_size),
                **(
                    {f"mlp.{x}_proj.bias": (arch.ffn_size,) for x in arch.mlp_inputs} if arch.mlp_bias else {}
                ),
                **({"mlp.down_proj.bias": (hidden,)} if arch.mlp_bias else {}),
            }.items()
        }
    shapes |= {f"model.norm.{x}": (hidden,) for x in in_norm}
    if arch.labels:
        return {**shapes, "score.weight": (arch.labels, hidden)}
    return shapes if arch.tied_embeddings else {**shapes, "lm_head.weight": (arch.vocab_size, hidden)}


def named_parameters(model: Decoder | Interleaved) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Yield (Megatron's name, parameter, Hugging Face's name) of each parameter of the model on this rank.

    Those of adapters are left out: align.model.adapter_files names them. A Hugging Face name with a * means
    several tensors: q, k, v or gate, up (or up alone).
    """
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        module, kind = re.split("[._](?=(?:weight|bias)$)", name)  # linear_qkv.layer_norm_weight, too
        if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", module):
            layer = model.decoder.layers[int(match[1])].layer_number - 1  # its number in the whole model
            hf_module = f"model.layers.{layer}.{LAYER_NAMES[match[2]]}"
        elif module == "output_layer" and model.arch.tied_embeddings:
            hf_module = "model.embed_tokens"  # the last stage's copy
        else:
            hf_module = OUTER_NAMES[module]
        yield name, parameter, f"{hf_module}.{kind}"


def stored(model: Decoder | Interleaved) -> Iterator[tuple[str, nn.Parameter, str]]:
    """`named_parameters` without the last stage's copy of tied embeddings."""
    for name, parameter, hf_name in named_parameters(model):
        if not (name == "output_layer.weight" and model.arch.tied_embeddings):
            yield name, parameter, hf_name


def split_name(hf_name: str, arch: Architecture) -> list[str]:
    """Split a name with a * into the names of its tensors, in the order of `huggingface.join`."""
    parts = ("q", "k", "v") if "self_attn.*" in hf_name else arch.mlp_inputs
    return [hf_name.replace("*", part) for part in parts] if "*" in hf_name else [hf_name]


def rotary_order(arch: Architecture) -> Tensor:
    """Order [d] of the rows of a head of q or k: for each of our rows its row in Hugging Face's head.

    Hugging Face rotates pairs (i, i + r/2) of the first r rows and leaves the rest. Our kernels rotate all
    pairs (i, i + d/2): the rest has frequency 0 (spec.rotary_frequencies). The results are equal, since a
    product of a query and a key does not depend on the order of their rows.
    """
    rotated, rest = arch.rotary_dims // 2, (arch.head_dim - arch.rotary_dims) // 2
    first, second, third, fourth = torch.arange(arch.head_dim).split([rotated, rotated, rest, rest])
    return torch.cat([first, third, second, fourth])


def reorder_heads(rows: Tensor, order: Tensor) -> Tensor:
    """Reorder the rows [heads * d, ...] of a matrix or a bias within each head, by order [d]."""
    if torch.equal(order, torch.arange(len(order))):
        return rows
    return rows.unflatten(0, (-1, len(order)))[:, order.to(rows.device)].flatten(0, 1)


def qkv_rows_per_group(arch: Architecture) -> tuple[int, int, int]:
    return arch.heads // arch.kv_heads * arch.head_dim, arch.head_dim, arch.head_dim
