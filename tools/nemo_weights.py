"""The weights of a `.nemo` archive, in whatever layout they are, as Hugging Face's tensors.

    model_weights.ckpt                               one rank, a torch pickle
    mp_rank_00/model_weights.ckpt                    tensor parallel ranks
    tp_rank_00_pp_rank_000/model_weights.ckpt        tensor and pipeline parallel ranks
    model_weights/                                   a distributed checkpoint, torch_dist or zarr

All become {name: function that reads the whole tensor}, with Megatron-Core's names: layers are counted over
all stages, qkv is [q of a group, its k, its v] group by group, and a gated fc1 is [gate; up].

Pickles are data only: a reference to anything but tensors, and what the index of a distributed checkpoint is
made of, is refused.
"""

import functools
import io
import itertools
import json
import math
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from align.errors import UserError

Weights = dict[str, Callable[[], Tensor]]

RANK = re.compile(r"(?:mp_rank_(\d+)|tp_rank_(\d+)_pp_rank_(\d+))")
LEGACY = {  # parts of names before Megatron-Core, and of Transformer Engine's fused layers: those used here
    "encoder.": "decoder.",
    ".self_attention.query_key_value.": ".self_attention.linear_qkv.",
    ".self_attention.dense.": ".self_attention.linear_proj.",
    ".post_attention_layernorm.": ".pre_mlp_layernorm.",
    ".mlp.dense_h_to_4h.": ".mlp.linear_fc1.",
    ".mlp.dense_h_to_4h_2.": ".mlp.linear_fc1_up.",
    ".mlp.dense_4h_to_h.": ".mlp.linear_fc2.",
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
}
NOT_WEIGHTS = ("_extra_state", "rotary_pos_emb.inv_freq")
LAST_STAGE_COPY = "word_embeddings.weight"  # of tied embeddings, before Megatron-Core
BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight", "rm_head.weight")  # how tensor parallel ranks split
ON_EACH_RANK = ("layernorm.weight", "layernorm.bias", "rm_head.bias")
HUGGING_FACE = {
    "embedding.word_embeddings": "model.embed_tokens",
    "decoder.final_layernorm": "model.norm",
    "output_layer": "lm_head",
    "rm_head": "score",
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "mlp.linear_fc2": "mlp.down_proj",
    "mlp.linear_fc1_up": "mlp.up_proj",
}
INDEX_CLASSES = {  # module: names that the pickled index of a distributed checkpoint may refer to
    "torch.distributed.checkpoint.metadata": (
        "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata "
        "TensorProperties StorageMeta _MEM_FORMAT_ENCODING"
    ),
    "torch.distributed.checkpoint.filesystem": "_StorageInfo _StoragePrefix",
    "torch.distributed.checkpoint.planner": "SavePlan WriteItem WriteItemType TensorWriteData",
    "torch.distributed._shard.sharded_tensor.metadata": "TensorProperties MEM_FORMAT_ENCODING",
    "torch.serialization": "_get_layout",
    "torch": "Size",
    "collections": "OrderedDict",
}
ZARR_TYPES = {"bfloat16": torch.bfloat16, "<f4": torch.float32, "<f2": torch.float16}


def read(folder: Path, fields: dict) -> Weights:
    """The weights of an extracted archive; `fields`: of its model_config.yaml.

    Raises UserError if they are missing, incomplete, unreadable, or more than data.
    """
    if (folder / "model_weights.ckpt").is_file():
        return from_ranks([[load_state(folder / "model_weights.ckpt")]], fields)
    if ranks := rank_files(folder):
        return from_ranks([[load_state(path) for path in stage] for stage in complete(ranks, fields)], fields)
    if (folder / "model_weights").is_dir():
        return from_distributed(folder / "model_weights", fields)
    names = "model_weights.ckpt, mp_rank_00, tp_rank_00_pp_rank_000 or model_weights"
    raise UserError(f"no weights: {names} is missing")


def rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """{(pipeline rank, tensor parallel rank): its file}."""
    matches = {path: RANK.fullmatch(path.parent.name) for path in folder.glob("*/model_weights.ckpt")}
    return {(int(m[3] or 0), int(m[1] or m[2] or 0)): path for path, m in matches.items() if m}


def complete(ranks: dict[tuple[int, int], Path], fields: dict) -> list[list[Path]]:
    """Files by stage and tensor parallel rank. Raises UserError if one is missing or too many."""
    name = "virtual_pipeline_model_parallel_size"
    if (fields.get(name) or 1) > 1:
        rule = "is not implemented for weights by rank"
        raise UserError(f"model_config.yaml: {name} = {fields[name]} {rule}")
    tp, pp = (fields.get(f"{kind}_model_parallel_size") or 1 for kind in ("tensor", "pipeline"))
    expected = set(itertools.product(range(pp), range(tp)))
    if wrong := sorted(expected ^ set(ranks)):
        stage, rank = wrong[0]
        state = "missing" if wrong[0] in expected else "one too many"
        raise UserError(
            f"the weights of tensor parallel rank {rank}, pipeline rank {stage} are {state}: "
            f"model_config.yaml has tensor_model_parallel_size {tp}, pipeline_model_parallel_size {pp}"
        )
    return [[ranks[stage, rank] for rank in range(tp)] for stage in range(pp)]


def load_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, its tensors left there until they are read. Raises UserError."""
    name = f"{path.parent.name}/{path.name}" if RANK.fullmatch(path.parent.name) else path.name
    state = load_tensors(path, name, mmap=True)
    if not isinstance(state, dict):
        raise UserError(f"{name} holds a {type(state).__name__}, not the state of a model")
    return state


def load_tensors(source: Path | io.BytesIO, name: str, mmap: bool | None = None) -> Any:
    """Load a torch pickle. Raises UserError with the `name` if it is broken or holds more than data."""
    try:
        with torch.serialization.safe_globals([io.BytesIO]):  # Transformer Engine's extra state
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reference = re.search(r"GLOBAL (\S+)", str(error))
        content = f"code, {reference[1]}" if reference else "more than tensors"
        raise UserError(f"{name} holds {content}: it is refused, nothing of it ran") from error
    except (RuntimeError, OSError, EOFError) as error:
        raise UserError(f"{name} cannot be read, or is cut short: {str(error).splitlines()[0]}") from error


def rename(name: str) -> str | None:
    """Megatron-Core's name of a tensor; None for what is no weight."""
    name = re.sub(r"^model\.(module\.)?(language_model\.)?", "", name)
    for old, new in LEGACY.items():
        name = name.replace(old, new)
    return None if name.endswith(NOT_WEIGHTS) or name == LAST_STAGE_COPY else name


def from_ranks(stages: list[list[dict[str, Tensor]]], fields: dict) -> Weights:
    """The weights of ranks, by stage and tensor parallel rank; each stage counts its layers from 0."""
    weights: Weights = {}
    first = 0
    gated = str(fields.get("activation")).endswith("glu")
    for ranks in stages:
        names = {old: new for old in ranks[0] if (new := rename(old))}
        if any(set(rank) != set(ranks[0]) for rank in ranks):
            raise UserError("the tensor parallel ranks of a stage do not hold tensors of the same names")
        split = any("linear_fc1_up" in name for name in names.values())  # gate and up are two matrices
        for old, new in names.items():
            parts = [rank[old] for rank in ranks]
            weights[shifted(new, first)] = functools.partial(merge, new, parts, gated and not split)
        numbers = [number for name in names.values() if (number := layer(name)) is not None]
        first += 1 + max(numbers, default=-1)
    return weights


def layer(name: str) -> int | None:
    """Number of the layer that a tensor belongs to."""
    match = re.search(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def shifted(name: str, by: int) -> str:
    """The name of a tensor with `by` added to the number of its layer."""
    number = layer(name)
    return name if number is None else name.replace(f"layers.{number}.", f"layers.{number + by}.")


def merge(name: str, parts: list[Tensor], gated: bool) -> Tensor:
    """One tensor of all tensor parallel ranks; where fc1 is `gated` each has [gate; up] of its own."""
    if len(parts) == 1 or name.endswith(ON_EACH_RANK):
        return parts[0]
    if gated and name.endswith("linear_fc1.weight"):
        halves = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([half for of_all_ranks in halves for half in of_all_ranks])
    return torch.cat(parts, 1 if name.endswith(BY_COLUMNS) else 0)


def from_distributed(folder: Path, fields: dict) -> Weights:
    """The weights of a distributed checkpoint, which mostly holds a stack [layers, ...] for each name."""
    path = folder / "metadata.json"
    if not path.is_file():
        raise UserError("model_weights/metadata.json is missing: the checkpoint in the archive is incomplete")
    backend = json.loads(path.read_bytes()).get("sharded_backend")
    if backend == "torch_dist":
        shapes, read_one = torch_dist(folder)
    elif backend == "zarr":
        shapes, read_one = zarr(folder, fields)
    else:
        raise UserError(f"model_weights/metadata.json: sharded_backend {backend!r} is not torch_dist or zarr")
    newest = functools.lru_cache(maxsize=1)(read_one)  # a stack is asked for layer by layer
    weights: Weights = {}
    for key, shape in shapes.items():
        if (name := rename(key)) is None or not key.startswith("model."):
            continue
        if re.search(r"layers\.\D", name):
            for number in range(shape[0]):
                of_layer = name.replace("layers.", f"layers.{number}.")
                weights[of_layer] = functools.partial(lambda key, number: newest(key)[number], key, number)
        else:
            weights[name] = functools.partial(newest, key)
    return weights


class IndexUnpickler(pickle.Unpickler):
    """Unpickles the index of a distributed checkpoint, and refuses whatever such an index has no use for."""

    def find_class(self, module: str, name: str) -> object:
        if name in INDEX_CLASSES.get(module, "").split():
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        code = f"{module}.{name}"
        raise UserError(f"model_weights/.metadata holds code, {code}: it is refused, nothing of it ran")


def torch_dist(folder: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """Shapes of the tensors of a checkpoint in PyTorch's format, and how to read one of them."""
    try:
        index = IndexUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, TypeError, LookupError) as error:
        raise UserError(f"model_weights/.metadata cannot be read, or is cut short: {error}") from error
    if not isinstance(index, Metadata):
        raise UserError(f"model_weights/.metadata holds a {type(index).__name__}, not the index of tensors")
    tensors = {k: v for k, v in index.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}

    def read_one(key: str) -> Tensor:
        tensor = torch.empty(tensors[key].size, dtype=tensors[key].properties.dtype)
        for chunk in tensors[key].chunks:
            place = index.storage_data[MetadataIndex(key, chunk.offsets)]
            file = Path(place.relative_path).name
            data = io.BytesIO(read_bytes(folder / file, place.offset, place.length))
            part = load_tensors(data, f"model_weights/{file}")
            ends = zip(chunk.offsets, chunk.sizes, strict=True)
            tensor[tuple(slice(start, start + size) for start, size in ends)] = part
        return tensor

    return {key: tuple(tensor.size) for key, tensor in tensors.items()}, read_one


def read_bytes(path: Path, offset: int, length: int) -> bytes:
    """A part of a file. Raises UserError if it is not there."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(length)
    except OSError as error:
        raise UserError(f"model_weights/{path.name} cannot be read: {error}") from error
    if len(data) != length:
        raise UserError(f"model_weights/{path.name} is cut short")
    return data


def zarr(folder: Path, fields: dict) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """Shapes of the tensors of a checkpoint in zarr's format, as Megatron wrote it, and how to read one."""
    infos = {path.parent.name: json.loads(path.read_bytes()) for path in folder.glob("*/.zarray")}
    for key, info in infos.items():
        packed = info.get("compressor") or info.get("filters") or info["order"] != "C"
        if packed or info["dtype"] not in ZARR_TYPES:
            raise UserError(
                f"model_weights/{key}: of zarr only uncompressed float arrays are read: convert the "
                "checkpoint with NeMo's scripts/checkpoint_converters/convert_zarr_to_torch_dist.py"
            )

    def read_one(key: str) -> Tensor:
        info, dtype = infos[key], ZARR_TYPES[infos[key]["dtype"]]
        shape, chunk = info["shape"], info["chunks"]
        tensor, size = torch.empty(shape, dtype=dtype), math.prod(chunk) * dtype.itemsize
        for place in itertools.product(*(range(-(-n // c)) for n, c in zip(shape, chunk, strict=True))):
            name = info.get("dimension_separator", ".").join(map(str, place))
            data = read_bytes(folder / key / name, 0, size)
            into = tensor[tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, chunk, strict=True))]
            part = torch.frombuffer(bytearray(data), dtype=dtype).view(chunk)
            into.copy_(part[tuple(slice(n) for n in into.shape)])  # a last chunk reaches beyond the array
        return in_halves(tensor, shape[-2] // chunk[-2], fields) if key.endswith("fc1.weight") else tensor

    return {key: tuple(info["shape"]) for key, info in infos.items()}, read_one


def in_halves(fc1: Tensor, pieces: int, fields: dict) -> Tensor:
    """[..., gate; up, H] of a matrix in `pieces`.

    Before Megatron-Core 0.4 a distributed checkpoint had the [gate; up] of a tensor parallel rank as one
    piece; since then it is two, and the gates of all ranks come first.
    """
    tp = fields.get("tensor_model_parallel_size") or 1
    if tp == 1 or pieces != tp or not str(fields.get("activation")).endswith("glu"):
        return fc1
    return fc1.unflatten(-2, (tp, 2, -1)).transpose(-4, -3).flatten(-4, -2)


def tensors(weights: Weights, config: dict, add_one: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the model of a config.json, kind by kind; `add_one` to the norms' weights."""
    split = any("linear_fc1_up" in name for name in weights)  # gate and up are two matrices
    for name in sorted(weights, key=lambda name: (re.sub(r"\d+", "", name), layer(name) or 0)):
        tensor = weights[name]()
        for hf_name, part in cut(name, tensor, config, split):
            part = part + 1 if add_one and hf_name.endswith("norm.weight") else part
            yield hf_name, part.clone(memory_format=torch.contiguous_format)


def cut(name: str, tensor: Tensor, config: dict, split: bool) -> list[tuple[str, Tensor]]:
    """A tensor of Megatron's as Hugging Face's, its name if unknown; `split`: gate and up are two."""
    match = re.fullmatch(r"(?:decoder\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
    if match is None:
        return [(name, tensor)]
    prefix = "" if match[1] is None else f"model.layers.{match[1]}."
    if match[2] == "self_attention.linear_qkv":
        groups = config["num_key_value_heads"]
        rows = config["num_attention_heads"] // groups + 2  # of a group, in heads
        if len(tensor) % (groups * rows):
            raise UserError(f"{name} has {len(tensor)} rows, no multiple of {groups} groups of {rows} heads")
        grouped = tensor.unflatten(0, (groups, rows, -1))
        parts = {"q": grouped[:, :-2], "k": grouped[:, -2], "v": grouped[:, -1]}
        flat = {x: part.reshape(-1, tensor.shape[-1]) for x, part in parts.items()}
        return [(f"{prefix}self_attn.{x}_proj.{match[3]}", part) for x, part in flat.items()]
    if match[2] == "mlp.linear_fc1":
        names = ["up"] if config["hidden_act"] != "silu" else ["gate"] if split else ["gate", "up"]
        matrices = zip(names, tensor.chunk(len(names)), strict=True)
        return [(f"{prefix}mlp.{x}_proj.{match[3]}", matrix) for x, matrix in matrices]
    if match[2] in ("embedding.word_embeddings", "output_layer"):
        tensor = tensor[: config["vocab_size"]]
    return [(f"{prefix}{HUGGING_FACE.get(match[2], match[2])}.{match[3]}", tensor)]
