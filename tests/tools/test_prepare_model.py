"""`.nemo` archives of every layout against NeMo's arithmetic, written out here; refusals; exports."""

import io
import json
import math
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
import yaml
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from align.data import formats
from align.distributed import parallel
from align.errors import UserError
from align.model import architecture, huggingface
from align.rewards import sources
from align.training import checkpoint
from tests.support.files import TINY
from tests.support.launch import fork_ranks
from tests.support.tokenizers import SENTENCES
from tools import nemo_config, prepare_model

State = dict[str, Tensor]  # by NeMo's names

LAYERS, HIDDEN, HEADS, FFN, ROWS, IDS = 4, 64, 4, 96, 384, 330
TOKENS = [5, 9, 33, 2, 140, 8, 8, 77, 101, 3, 64, 12, 90]

# ---- configurations of published models, with smaller sizes ----------------------------------------

SIZES = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": FFN,
    "num_attention_heads": HEADS,
    "encoder_seq_length": 64,
    "max_position_embeddings": 64,
    "make_vocab_size_divisible_by": 128,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
}
WITHOUT_EFFECT = {
    "micro_batch_size": 4,
    "global_batch_size": 2048,
    "apply_query_key_layer_scaling": True,
    "use_scaled_init_method": True,
    "hidden_dropout": 0.1,
    "persist_layer_norm": True,
    "megatron_amp_O2": True,
    "fp8_margin": 0,
    "activations_checkpoint_method": "block",
    "optim": {"name": "distributed_fused_adam", "lr": 2e-4},
    "precision": "bf16",
    "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
}
TOKENIZER = {"library": "sentencepiece", "type": None, "model": "nemo:0123_mt_nlg_256k.model"}
COMMON = (
    SIZES
    | WITHOUT_EFFECT
    | {
        "tokenizer": TOKENIZER,
        "position_embedding_type": "rope",
        "bias": False,
        "share_embeddings_and_output_weights": False,
        "kv_channels": None,
        "num_query_groups": None,
        "layernorm_epsilon": 1e-5,
    }
)
GPT_2B = COMMON | {"normalization": "layernorm1p", "activation": "fast-swiglu", "rotary_percentage": 0.5}
LLAMA = COMMON | {
    "normalization": "rmsnorm",
    "activation": "fast-swiglu",
    "num_query_groups": 2,
    "kv_channels": 24,
}
NEMOTRON = GPT_2B | {
    "activation": "squared-relu",
    "num_query_groups": 2,
    "rotary_base": 5000,
    "mcore_gpt": True,
}
CONFIGS = {
    "gpt-2b": GPT_2B,
    "llama": LLAMA,
    "nemotron": NEMOTRON,
    "gpt-2b interpolated": GPT_2B | {"seq_len_interpolation_factor": 2, "rotary_percentage": 1.0},
    "layernorm, tied": GPT_2B | {"normalization": "layernorm", "share_embeddings_and_output_weights": True},
    "llama before fast": LLAMA | {"activation": "swiglu"},
    "llama 3.1": LLAMA | {"scale_positional_embedding": True, "old_context_len": 64, "scale_factor": 4},
}


def random_state(config: dict, seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    """Weights of one rank, by NeMo's names before Megatron-Core, every tensor random."""
    random = torch.Generator().manual_seed(seed)
    groups, d = config["num_query_groups"] or HEADS, config["kv_channels"] or HIDDEN // HEADS
    fc1 = 2 * FFN if config["activation"] == "fast-swiglu" else FFN
    shapes = {"embedding.word_embeddings.weight": (ROWS, HIDDEN)}
    for i in range(LAYERS):
        layer = f"encoder.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.input_layernorm.bias"] = (HIDDEN,)
        shapes[f"{layer}.self_attention.query_key_value.weight"] = ((HEADS + 2 * groups) * d, HIDDEN)
        shapes[f"{layer}.self_attention.dense.weight"] = (HIDDEN, HEADS * d)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}.post_attention_layernorm.bias"] = (HIDDEN,)
        shapes[f"{layer}.mlp.dense_h_to_4h.weight"] = (fc1, HIDDEN)
        if config["activation"] == "swiglu":
            shapes[f"{layer}.mlp.dense_h_to_4h_2.weight"] = (FFN, HIDDEN)
        shapes[f"{layer}.mlp.dense_4h_to_h.weight"] = (HIDDEN, FFN)
    shapes["encoder.final_layernorm.weight"] = shapes["encoder.final_layernorm.bias"] = (HIDDEN,)
    if not config["share_embeddings_and_output_weights"]:
        shapes["output_layer.weight"] = (ROWS, HIDDEN)
    if config["normalization"] == "rmsnorm":
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(".bias")}
    state = {"rotary_pos_emb.inv_freq": torch.ones(3)}
    for name, shape in shapes.items():
        centre = float(name.endswith("norm.weight") and config["normalization"] != "layernorm1p")
        scale = 0.3 if len(shape) == 1 else 0.15
        state[name] = (centre + torch.randn(shape, generator=random) * scale).to(dtype)
    return {f"model.language_model.{name}": tensor for name, tensor in state.items()}


# ---- NeMo's arithmetic, in float64 -----------------------------------------------------------------


def norm(x: Tensor, state: State, name: str, config: dict) -> Tensor:
    weight = state[f"{name}.weight"]
    if config["normalization"] == "rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + config["layernorm_epsilon"]).sqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + config["layernorm_epsilon"]).sqrt()
    return normed * (weight + (config["normalization"] == "layernorm1p")) + state[f"{name}.bias"]


def frequencies(dims: int, config: dict) -> list[float]:
    """Angle of each pair of dimensions at position 1."""
    inverse = [config.get("rotary_base", 10000) ** (-2 * i / dims) for i in range(dims // 2)]
    if config.get("seq_len_interpolation_factor"):
        return [frequency / config["seq_len_interpolation_factor"] for frequency in inverse]
    if not config.get("scale_positional_embedding"):
        return inverse
    scaled, context = [], config["old_context_len"]
    for frequency in inverse:
        turns = context * frequency / (2 * math.pi)
        if turns > 4:
            scaled.append(frequency)
        elif turns < 1:
            scaled.append(frequency / config["scale_factor"])
        else:
            smooth = (turns - 1) / (4 - 1)
            scaled.append((1 - smooth) * frequency / config["scale_factor"] + smooth * frequency)
    assert scaled[0] == inverse[0] and scaled[-1] != inverse[-1] and len(set(scaled)) == len(scaled)
    return scaled


def rotate(head: Tensor, config: dict) -> Tensor:
    """[S, d] with the first rotary_percentage of the dimensions turned, i with i + half of these."""
    dims = int(head.shape[1] * config.get("rotary_percentage", 1.0))
    half, turned = dims // 2, head.clone()
    for position in range(len(head)):
        for i, frequency in enumerate(frequencies(dims, config)):
            cos, sin = math.cos(position * frequency), math.sin(position * frequency)
            a, b = head[position, i], head[position, i + half]
            turned[position, i], turned[position, i + half] = a * cos - b * sin, b * cos + a * sin
    return turned


def attention(x: Tensor, weight: Tensor, config: dict) -> Tensor:
    """[S, heads * d]; rows of the weight: for each group its queries, its key, its value."""
    groups, d = config["num_query_groups"] or HEADS, config["kv_channels"] or HIDDEN // HEADS
    rows, outputs = (x @ weight.t()).split(d, 1), []
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    for group in range(groups):
        *queries, key, value = rows[group * (HEADS // groups + 2) : (group + 1) * (HEADS // groups + 2)]
        for query in queries:
            scores = rotate(query, config) @ rotate(key, config).t() / math.sqrt(d)
            outputs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ value)
    return torch.cat(outputs, 1)


def mlp(x: Tensor, state: State, name: str, config: dict) -> Tensor:
    inner = x @ state[f"{name}.dense_h_to_4h.weight"].t()
    if config["activation"] == "squared-relu":
        inner = inner.clamp(min=0).square()
    else:
        split = config["activation"] == "swiglu"
        gate, up = (inner, x @ state[f"{name}.dense_h_to_4h_2.weight"].t()) if split else inner.chunk(2, 1)
        inner = gate * torch.sigmoid(gate) * up
    return inner @ state[f"{name}.dense_4h_to_h.weight"].t()


def hidden_states(state: State, config: dict) -> Tensor:
    """[S, H] after the last norm."""
    state = {name.removeprefix("model.language_model."): tensor.double() for name, tensor in state.items()}
    x = state["embedding.word_embeddings.weight"][TOKENS]
    for i in range(LAYERS):
        layer = f"encoder.layers.{i}"
        normed = norm(x, state, f"{layer}.input_layernorm", config)
        heads = attention(normed, state[f"{layer}.self_attention.query_key_value.weight"], config)
        x = x + heads @ state[f"{layer}.self_attention.dense.weight"].t()
        x = x + mlp(
            norm(x, state, f"{layer}.post_attention_layernorm", config), state, f"{layer}.mlp", config
        )
    return norm(x, state, "encoder.final_layernorm", config)


def logits(state: State, config: dict) -> Tensor:
    tied = config["share_embeddings_and_output_weights"]
    output = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
    return hidden_states(state, config) @ state[f"model.language_model.{output}"].double().t()


# ---- layouts of the weights ------------------------------------------------------------------------


def split(name: str, tensor: Tensor, rank: int, config: dict) -> Tensor:
    """Weights of one of two tensor parallel ranks."""
    if tensor.dim() == 1:
        return tensor
    if name.endswith(("dense.weight", "dense_4h_to_h.weight")):
        return tensor.chunk(2, 1)[rank]
    if "dense_h_to_4h." in name and config["activation"] == "fast-swiglu":
        return torch.cat([half.chunk(2)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(2)[rank]


def write_ranks(state: State, config: dict, folder: Path) -> dict:
    """Two tensor parallel ranks of each of two stages, with names as of megatron_amp_O2."""
    for stage, rank in ((stage, rank) for stage in range(2) for rank in range(2)):
        part = {}
        for name, tensor in state.items():
            number = int(name.split(".")[4]) if ".layers." in name else None
            if number is None and (("embedding" in name) != (stage == 0)) and "rotary" not in name:
                continue
            if number is not None and number // 2 != stage:
                continue
            name = name.replace(f"layers.{number}.", f"layers.{(number or 0) % 2}.").replace(
                "model.", "model.module.", 1
            )
            part[name] = split(name, tensor, rank, config).clone()
        part["model.module.decoder._extra_state"] = io.BytesIO(b"Transformer Engine's")
        path = folder / f"tp_rank_{rank:02d}_pp_rank_{stage:03d}"
        path.mkdir()
        torch.save(part, path / "model_weights.ckpt")
    return {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


def write_one(state: State, config: dict, folder: Path) -> dict:
    torch.save(state, folder / "model_weights.ckpt")
    return {}


CORE_NAMES = {
    "language_model.": "",
    "encoder.": "decoder.",
    "query_key_value": "linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "dense_h_to_4h": "linear_fc1",
    "dense_4h_to_h": "linear_fc2",
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "post_attention_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def core_name(name: str) -> str:
    """A name of Megatron-Core with Transformer Engine's layers."""
    for old, new in CORE_NAMES.items():
        name = name.replace(old, new)
    return name


def write_torch_dist(state: State, config: dict, folder: Path) -> dict:
    """As Megatron-Core does it: layers stacked, the halves of a gated fc1 as pieces of their own."""
    pieces: dict[str, ShardedTensor] = {}
    for name, tensor in state.items():
        name = core_name(name)
        number = name.split(".")[3] if ".layers." in name else None
        key = name if number is None else name.replace(f".{number}.", ".", 1)
        stacked = [] if number is None else [(0, int(number), LAYERS)]
        axes = {"prepend_axis_num": len(stacked)}
        if "linear_fc1.weight" in key and config["activation"] == "fast-swiglu":
            for i, half in enumerate(tensor.chunk(2)):
                pieces[f"{name}{i}"] = ShardedTensor.from_rank_offsets(key, half, *stacked, (1, i, 2), **axes)
        elif "inv_freq" not in name:
            pieces[name] = ShardedTensor.from_rank_offsets(key, tensor, *stacked, **axes)
    checkpoint.write_state(folder / "model_weights", pieces)
    return {}


LAYOUTS = {"one rank": write_one, "tp2 pp2": write_ranks, "torch_dist": write_torch_dist}


@pytest.fixture(scope="module", autouse=True)
def world():
    with parallel.start(parallel.ParallelConfig()):
        yield


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with fewer ids than the embedding has rows."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text("\n".join(SENTENCES * 5))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "small"),
        vocab_size=IDS,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return folder / "small.model"


def write_archive(
    path: Path,
    config: dict,
    state: State,
    pieces: Path,
    write: Callable = write_one,
    prefix: str = "./",
    **more: object,
) -> Path:
    """A `.nemo` file; `more`: fields of the configuration."""
    folder = path.with_suffix(".folder")
    folder.mkdir()
    config = config | write(state, config, folder) | more
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config))
    (folder / "0123_mt_nlg_256k.model").write_bytes(pieces.read_bytes())
    with tarfile.open(path, "w:gz" if prefix == "" else "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.add(file, f"{prefix}{file.relative_to(folder)}", recursive=False)
    return path


def converted(path: Path, **options: object) -> Path:
    """The directory made of an archive."""
    output = path.with_suffix(".hf")
    prepare_model.nemo(path, output, **options)
    assert not [name for name in os.listdir(output.parent) if name.startswith(f".{output.name}")], (
        "left behind"
    )
    return output


def network(directory: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """transformers' model; in float64 with norms of torch's, since its own RMSNorm computes in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(dtype)
    for module in list(model.modules()) if dtype == torch.float64 else []:
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):
                norm = torch.nn.RMSNorm(HIDDEN, child.variance_epsilon, dtype=dtype)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model


# ---- the same logits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout", "prefix"),
    [
        *(
            (name, layout, "" if layout == "tp2 pp2" else "./")
            for name in ("gpt-2b", "llama", "nemotron")
            for layout in LAYOUTS
        ),
        *((name, "one rank", "./") for name in CONFIGS if name not in ("gpt-2b", "llama", "nemotron")),
        ("llama before fast", "tp2 pp2", ""),
    ],
)
@torch.no_grad()
def test_logits_are_those_of_nemos_arithmetic(name, layout, prefix, pieces, tmp_path):
    """Plain and compressed tars; in float64 transformers still computes the angles in float32."""
    config, state = CONFIGS[name], random_state(CONFIGS[name])
    output = converted(write_archive(tmp_path / "a.nemo", config, state, pieces, LAYOUTS[layout], prefix))
    wanted = logits(state, config)
    ids = transformers.AutoConfig.from_pretrained(output).vocab_size
    assert wanted.std() > 1 and ids == IDS < ROWS, "padding is left out"
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-6)):
        ours = network(output, dtype)(torch.tensor([TOKENS])).logits[0]
        torch.testing.assert_close(ours.double(), wanted[:, :ids], rtol=0, atol=bound)
    huggingface.SafetensorsSource(output, architecture.read_config(output))  # which training reads, too


# ---- the same weights ------------------------------------------------------------------------------


def weights_of(path: Path) -> State:
    return load_file(converted(path) / "model.safetensors")


def test_bf16_weights_keep_their_precision(pieces, tmp_path):
    """1 is added to norms in bf16, as NeMo does it in every forward pass; all else stays bit for bit."""
    state = random_state(GPT_2B, dtype=torch.bfloat16)
    weights = weights_of(write_archive(tmp_path / "a.nemo", GPT_2B, state, pieces))
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "a.hf" / "config.json").read_text())["dtype"] == "bfloat16"
    layer = "model.language_model.encoder.layers.2"
    assert torch.equal(
        weights["model.layers.2.post_attention_layernorm.weight"],
        state[f"{layer}.post_attention_layernorm.weight"] + 1,
    )
    assert torch.equal(weights["model.layers.2.input_layernorm.bias"], state[f"{layer}.input_layernorm.bias"])
    assert torch.equal(
        weights["model.layers.2.mlp.down_proj.weight"], state[f"{layer}.mlp.dense_4h_to_h.weight"]
    )
    assert torch.equal(weights["lm_head.weight"], state["model.language_model.output_layer.weight"][:IDS])


def zarr_writer(ranks: int, by_rank: bool) -> Callable:
    """Writes zarr's arrays. `by_rank`: fc1 is [gate; up] of each rank, as before Megatron-Core 0.4."""

    def write(state: State, config: dict, folder: Path) -> dict:
        keys = {core_name(name) for name in state if "inv_freq" not in name}
        for key in {
            key if ".layers." not in key else ".".join(p for p in key.split(".") if not p.isdigit())
            for key in keys
        }:
            names = [
                name
                for name in state
                if ".".join(p for p in core_name(name).split(".") if not p.isdigit()) == key
            ]
            whole = torch.stack([state[name] for name in names]) if ".layers." in key else state[names[0]]
            chunk = [1, *whole.shape[1:]] if ".layers." in key else [100, *whole.shape[1:]]
            if key.endswith("linear_fc1.weight"):
                if by_rank:
                    halves = [half.chunk(ranks, 1) for half in whole.chunk(2, 1)]
                    whole = torch.cat([half[rank] for rank in range(ranks) for half in halves], 1)
                chunk[1] = whole.shape[1] // (ranks if by_rank else 2 * ranks)
            write_zarr(folder / "model_weights" / key, whole, chunk)
        (folder / "model_weights" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
        return {"tensor_model_parallel_size": ranks}

    return write


def write_zarr(folder: Path, whole: Tensor, chunk: list[int]) -> None:
    """Raw chunks, those at the end filled up."""
    folder.mkdir(parents=True)
    about = {"chunks": chunk, "compressor": None, "dtype": "bfloat16", "fill_value": None, "filters": None}
    about |= {"order": "C", "shape": list(whole.shape), "zarr_format": 2}
    (folder / ".zarray").write_text(json.dumps(about))
    for first in range(0, len(whole), chunk[0]):
        rows = whole[first : first + chunk[0]]
        for second in range(0, whole.shape[1] if whole.dim() > 1 else 1, chunk[1] if whole.dim() > 1 else 1):
            part = rows if whole.dim() == 1 else rows[:, second : second + chunk[1]]
            full = torch.zeros(chunk, dtype=whole.dtype)
            full[tuple(slice(n) for n in part.shape)] = part
            place = [
                first // chunk[0],
                *([second // chunk[1]] if whole.dim() > 1 else []),
                *[0] * (whole.dim() - 2),
            ]
            (folder / ".".join(map(str, place))).write_bytes(full.view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize(("ranks", "by_rank"), [(1, True), (2, False), (2, True)])
def test_zarr_holds_the_same_weights(ranks, by_rank, pieces, tmp_path):
    state = random_state(GPT_2B, dtype=torch.bfloat16)
    wanted = weights_of(write_archive(tmp_path / "a.nemo", GPT_2B, state, pieces))
    weights = weights_of(
        write_archive(tmp_path / "b.nemo", GPT_2B, state, pieces, zarr_writer(ranks, by_rank))
    )
    assert weights.keys() == wanted.keys() and all(
        torch.equal(weights[name], wanted[name]) for name in wanted
    )


# ---- tokenizer, prompt format, reward models -------------------------------------------------------


def test_tokenizer_comes_along(pieces, tmp_path):
    output = converted(write_archive(tmp_path / "a.nemo", NEMOTRON, random_state(NEMOTRON), pieces))
    model = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    loaded = transformers.AutoTokenizer.from_pretrained(output)
    assert loaded.encode(SENTENCES[0], add_special_tokens=False) == model.encode(SENTENCES[0])
    config = transformers.AutoConfig.from_pretrained(output)
    generation = transformers.GenerationConfig.from_pretrained(output)
    assert (config.bos_token_id, config.eos_token_id) == (1, 2) and generation.eos_token_id == [2]
    assert not (output / "prompt_format.json").exists()


def test_tokenizer_of_a_flag(pieces, tmp_path):
    hub = {"tokenizer": {"library": "huggingface", "type": "meta-llama/Llama-2-7b"}}
    path = write_archive(tmp_path / "a.nemo", LLAMA, random_state(LLAMA), pieces, **hub)
    with pytest.raises(UserError, match="the tokenizer is meta-llama/Llama-2-7b, .*: give --tokenizer DIR"):
        converted(path)
    output = converted(path, tokenizer=TINY)
    assert transformers.AutoConfig.from_pretrained(output).vocab_size == 259
    assert (output / "chat_template.jinja").read_text() == (TINY / "chat_template.jinja").read_text()


@pytest.mark.parametrize(("multiple", "rows"), [(128, IDS), (32, ROWS)])
def test_only_padding_is_left_out(multiple, rows, pieces, tmp_path):
    """384 is no multiple of 32 that 330 would be padded to."""
    state = random_state(GPT_2B)
    path = write_archive(tmp_path / "a.nemo", GPT_2B, state, pieces, make_vocab_size_divisible_by=multiple)
    assert len(weights_of(path)["model.embed_tokens.weight"]) == rows


CHAT_TOKENS = dict(
    system_turn_start="\0", turn_start="\x11é", label_start="\\x", end_of_turn="\n", end_of_name="\n"
)


@pytest.mark.parametrize(
    ("fields", "tokens", "template", "add_bos"),
    [
        ({"chat": True, "chat_prompt_tokens": CHAT_TOKENS}, list(CHAT_TOKENS.values()), None, None),
        ({"chat": True, "train_ds": {"add_bos": True}}, ["\0", "\x11", "\x12", "\n", "\n"], None, True),
        (
            {"chat": False, "chat_prompt_tokens": CHAT_TOKENS}
            | {"train_ds": {"prompt_template": "Q: {question}\nA: {output}", "add_bos": False}},
            *(None, "Q: {question}\nA: {output}", False),
        ),
        ({"prompt_template": "{input} \\ {output}"}, None, "{input} \\ {output}", None),
    ],
)
def test_prompt_format(fields, tokens, template, add_bos, tmp_path):
    prepare_model.prompt_format(fields).save(tmp_path)
    settings = json.loads((tmp_path / "prompt_format.json").read_text())
    assert settings["add_bos"] == add_bos
    if tokens:
        assert (
            [formats.unescape(token) for token in settings["chat_tokens"]]
            == tokens
            == settings["chat"]["tokens"]
        )
        assert settings["chat"]["bos"] == bool(add_bos)
    if template:
        assert formats.unescape(settings["prompt_template"]) == template


def test_a_chat_model_is_asked_in_its_markers(pieces, tmp_path):
    """And stops at the next turn: in SentencePiece "<" and the others are several tokens, so by its text."""
    markers = dict(zip(prepare_model.MARKERS, ("<s0>", "<s1>", "<s2>", "\n", "\n"), strict=True))
    chat = {"data": {"chat": True, "chat_prompt_tokens": markers}}
    output = converted(write_archive(tmp_path / "a.nemo", NEMOTRON, random_state(NEMOTRON), pieces, **chat))
    loaded = transformers.AutoTokenizer.from_pretrained(output)
    asked = [{"role": "user", "content": "a"}]
    text = loaded.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text == "<s0>System\n\n<s1>User\na\n<s1>Assistant\n"
    generation = transformers.GenerationConfig.from_pretrained(output)
    assert (generation.eos_token_id, generation.stop_strings) == ([2], ["<s1>"])


def test_prompt_formats_that_have_no_place_are_named(capsys):
    for rows in ({"prompt_template": "{input} {output}", "add_sep": True}, {"prompt_template": "say it"}):
        assert prepare_model.prompt_format({"train_ds": rows}) is None
    first, second = capsys.readouterr().out.splitlines()
    assert "add_sep = true is not implemented" in first and "'say it' must end with the field" in second


@pytest.mark.parametrize("merged", [False, True])
@torch.no_grad()
def test_reward_models(merged, pieces, tmp_path, capsys):
    state = random_state(GPT_2B)
    head, bias = torch.randn(2, HIDDEN), torch.tensor([0.5, 0.25])
    extra = {"model.rm_head.weight": head, "model.rm_head.bias": bias}
    settings = {"num_attributes": 2, "merge_attributes": merged, "attribute_weights": [0.25, 1.0]}
    standard = {"enable": True, "mean": 1.5, "std": 2.0}
    path = write_archive(
        *(tmp_path / "a.nemo", GPT_2B, state | extra, pieces),
        regression=settings,
        reward_standardization=standard,
    )
    output = converted(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(output, dtype=torch.float32)
    wanted = hidden_states(state, GPT_2B)[-1] @ head.double().t()
    wanted = wanted @ torch.tensor([[0.25], [1.0]], dtype=torch.float64) if merged else wanted
    torch.testing.assert_close(model(torch.tensor([TOKENS])).logits[0].double(), wanted, rtol=0, atol=2e-5)
    shown = capsys.readouterr().out
    assert (
        f"heads have no bias: rewards are lower than NeMo's by {[0.375] if merged else [0.5, 0.25]}" in shown
    )
    assert "--reward-mean 1.125 --reward-std 2.0" in shown
    assert json.loads((output / "config.json").read_text())["pad_token_id"] == 0, "no text ends with <unk>"


# ---- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"position_embedding_type": "learned_absolute"},
            "position_embedding_type = 'learned_absolute' is not",
        ),
        ({"position_embedding_type": None}, "position_embedding_type = None is not implemented; only 'rope'"),
        ({"bias": True}, "bias = True is not implemented; only False"),
        ({"name": "megatron_falcon_gpt"}, "name = 'megatron_falcon_gpt' is not implemented"),
        (
            {"transformer_block_type": "normformer"},
            "transformer_block_type = 'normformer' is not implemented",
        ),
        (
            {"apply_residual_connection_post_layernorm": True},
            "post_layernorm = True is not implemented; it must be off",
        ),
        ({"num_moe_experts": 8}, "num_moe_experts = 8 is not implemented"),
        ({"window_size": [4095, 0]}, r"window_size = \[4095, 0\] is not implemented"),
        (
            {"mcore_customization_config": {"final_logit_softcapping": 30}},
            "mcore_customization_config = {'final",
        ),
        ({"peft": {"peft_scheme": "lora"}}, "peft.peft_scheme = 'lora' is not implemented"),
        (
            {"activation": "gelu"},
            r"activation = \('layernorm1p', 'gelu'\) is not implemented; known: rmsnorm with",
        ),
        ({"activation": "squared-relu", "normalization": "rmsnorm"}, r"\('rmsnorm', 'squared-relu'\) is not"),
        (
            {"normalization": "rmsnorm"},
            "rotary_percentage = 0.5 is not implemented; with rmsnorm it must be 1.0",
        ),
        ({"kv_channels": 32}, "kv_channels = 32 is not implemented; StableLM's is 64 / 4"),
        (
            {"scale_positional_embedding": True, "seq_len_interpolation_factor": 2},
            "seq_len_interpolation_factor = 2 is not implemented; not with scale_positional_embedding",
        ),
        ({"hidden_size": None}, "hidden_size must be a number, it is None"),
        ({"lambda_mlp": 3}, "the field lambda_mlp = 3 is not known. .* give --ignore lambda_mlp"),
        ({"tokenizer": TOKENIZER | {"library": "tiktoken"}}, "the tokenizer is tiktoken, which the archive"),
        (
            {"tokenizer": {"library": "sentencepiece", "model": "nemo:other.model"}},
            "tokenizer other.model is missing",
        ),
    ],
)
def test_fields_that_are_not_implemented_are_named(changes, message, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model_config.yaml").write_text(yaml.safe_dump(GPT_2B | changes))
    with pytest.raises(UserError, match=f"--input .*in: .*{message}"):
        prepare_model.nemo(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_absent_fields_mean_what_nemo_takes_then():
    with pytest.raises(UserError, match="bias = True is not implemented"):
        nemo_config.check({name: value for name, value in GPT_2B.items() if name != "bias"}, ())
    nemo_config.check(GPT_2B | {"unheard_of": 1}, ("unheard_of",))


class Harm:
    """Leaves a directory behind when it is unpickled as code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pickles_that_hold_code_are_refused(layout, pieces, tmp_path):
    write_archive(tmp_path / "a.nemo", GPT_2B, random_state(GPT_2B), pieces, LAYOUTS[layout])
    folder = tmp_path / "a.folder"
    path = (
        folder / {"one rank": "", "tp2 pp2": "tp_rank_01_pp_rank_000", "torch_dist": "model_weights"}[layout]
    )
    path /= ".metadata" if layout == "torch_dist" else "model_weights.ckpt"
    harm = Harm(tmp_path / "harm")
    if layout == "torch_dist":
        path.write_bytes(pickle.dumps(harm))
    else:
        torch.save({"model.x": harm}, path)
    name = path.relative_to(folder)
    with pytest.raises(
        UserError, match=rf"{name} holds code, posix\.mkdir: it is refused, nothing of it ran"
    ):
        prepare_model.nemo(folder, tmp_path / "out")
    assert not harm.path.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["./", ""])
def test_archives_that_are_cut_short_are_refused(prefix, pieces, tmp_path):
    path = write_archive(tmp_path / "a.nemo", GPT_2B, random_state(GPT_2B), pieces, prefix=prefix)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match="--input .*a.nemo is no tar, or is cut short"):
        converted(path)


@pytest.mark.parametrize(
    ("layout", "broken", "message"),
    [
        ("one rank", "model_weights.ckpt", "model_weights.ckpt cannot be read, or is cut short"),
        (
            "tp2 pp2",
            "tp_rank_01_pp_rank_001/model_weights.ckpt",
            "tp_rank_01_pp_rank_001/model_weights.ckpt cannot",
        ),
        ("torch_dist", "model_weights/__0_0.distcp", "model_weights/__0_0.distcp is cut short"),
        ("torch_dist", "model_weights/.metadata", "model_weights/.metadata cannot be read, or is cut short"),
    ],
)
def test_weights_that_are_cut_short_are_refused(layout, broken, message, pieces, tmp_path):
    write_archive(tmp_path / "a.nemo", GPT_2B, random_state(GPT_2B), pieces, LAYOUTS[layout])
    path = tmp_path / "a.folder" / broken
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=message):
        prepare_model.nemo(tmp_path / "a.folder", tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match="missing|cannot be read"):
        prepare_model.nemo(tmp_path / "a.folder", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"virtual_pipeline_model_parallel_size": 2},
            "virtual_pipeline_model_parallel_size = 2 is not implemented",
        ),
        ({"tensor_model_parallel_size": 4}, "tensor parallel rank 2, pipeline rank 0 are missing"),
        ({"pipeline_model_parallel_size": 1}, "tensor parallel rank 0, pipeline rank 1 are one too many"),
        ({"num_layers": 5}, "model.layers.4.input_layernorm.bias is the first of 11 missing tensors"),
        ({"num_layers": 3}, "the archive holds model.layers.3.input_layernorm.bias, which a model of this"),
        ({"ffn_hidden_size": 80}, r"model.layers.0.mlp.gate_proj.weight is \(96, 64\), .* means \(80, 64\)"),
    ],
)
def test_weights_must_be_those_of_the_configuration(changes, message, pieces, tmp_path):
    state = random_state(GPT_2B)
    path = write_archive(tmp_path / "a.nemo", GPT_2B, state, pieces, write_ranks, **changes)
    with pytest.raises(UserError, match=message):
        converted(path)


@pytest.mark.parametrize("kind", ["../out", "/tmp/out", "symlink", "hard link"])
def test_members_that_leave_the_directory_are_refused(kind, tmp_path):
    member = tarfile.TarInfo(kind if "out" in kind else "model_weights.ckpt")
    if "link" in kind:
        member.type, member.linkname = tarfile.SYMTYPE if kind == "symlink" else tarfile.LNKTYPE, "../there"
    with tarfile.open(tmp_path / "a.nemo", "w") as archive:
        archive.addfile(member, io.BytesIO())
    with pytest.raises(
        UserError, match=f"--input .*{member.name}' is a link, or leaves the directory: refused"
    ):
        converted(tmp_path / "a.nemo")


def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.nemo").write_text("no tar")
    monkeypatch.setattr("sys.argv", f"x nemo --input {tmp_path}/a.nemo --output {tmp_path}/out".split())
    with pytest.raises(SystemExit) as end:
        prepare_model.main()
    line = r"error: --input .*/a.nemo is no tar, or is cut short: [^\n]*\n"
    assert end.value.code == 2 and re.fullmatch(line, capsys.readouterr().err)


# ---- export ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("run", "layout"), [("sft", ""), ("rm", "--tp 2")])
def test_an_exported_checkpoint_is_what_its_run_has_left(run, layout, toy_models, tmp_path):
    """One process and two write the same files, bit for bit, but for the scores of training rows."""
    newest = checkpoint.newest(toy_models / run / "checkpoints")
    command = f"tools/prepare_model.py export --checkpoint {newest} --output {tmp_path}/hf {layout}"
    fork_ranks(2 if layout else 1, *command.split())
    files = {path.name for path in (toy_models / run / "hf").iterdir()} - {sources.STATISTICS}
    assert {path.name for path in (tmp_path / "hf").iterdir()} == files
    for name in files:
        assert (tmp_path / "hf" / name).read_bytes() == (toy_models / run / "hf" / name).read_bytes(), name
