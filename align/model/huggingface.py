"""Load and save this rank's shard of a model as a Hugging Face directory; huggingface_names.py has the table.

Loading, a rank reads only its own rows or columns. Saving, the ranks of each stage divide its files: each
gathers one file at a time, matrix by matrix, and all write at once.
"""

import itertools
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.utils import unwrap_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from align.distributed import parallel
from align.errors import UserError
from align.files import ASSETS
from align.model import lora
from align.model.architecture import Architecture
from align.model.gpt import Decoder, Interleaved, stages
from align.model.huggingface_names import (
    named_parameters,
    qkv_rows_per_group,
    reorder_heads,
    rotary_order,
    split_name,
    stored,
    tensor_shapes,
)
from align.model.weights import HEAD, WeightFiles

MAX_FILE_BYTES = 2 * 1024**3

T = TypeVar("T")


class Source(Protocol):
    """Tensors by name, whole or in part."""

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor: ...


class SafetensorsSource(WeightFiles):
    """The weights of a directory. Raises UserError unless the tensors are those of the architecture."""

    def __init__(self, directory: Path, arch: Architecture):
        super().__init__(directory)
        shapes = tensor_shapes(arch)
        harmless = {name for name in self.files if name.endswith("rotary_emb.inv_freq")}
        if arch.tied_embeddings:
            harmless.add(HEAD)  # equal to the embedding: see architecture.read_config
        if missing := sorted(set(shapes) - set(self.files)):
            raise UserError(
                f"--model {self.directory}: tensors are missing, {missing[0]} the first of {len(missing)}"
            )
        if unknown := sorted(set(self.files) - set(shapes) - harmless):
            raise UserError(
                f"--model {self.directory}: tensors that the architecture {arch.family} does not have, "
                f"{unknown[0]} the first of {len(unknown)}"
            )
        for name, shape in shapes.items():
            if (actual := self.shape(name)) != shape:
                raise UserError(f"--model {self.directory}: {name} is {actual}, config.json means {shape}")


class RandomSource:
    """Random initialisation: normal matrices, norms of one, biases of zero.

    Each tensor has a generator of its own, seeded by its name, so weights are equal in every layout.
    """

    def __init__(self, arch: Architecture, seed: int):
        self.shapes, self.std, self.seed = tensor_shapes(arch), arch.init_std, seed
        self.norm_weight = 0.0 if arch.norm == "layer_1p" else 1.0

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        shape = self.shapes[name]
        if name.endswith("bias"):
            full = torch.zeros(shape)
        elif len(shape) == 1:
            full = torch.full(shape, self.norm_weight)
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
            full = torch.randn(shape, generator=generator) * self.std
        return full[rows] if columns is None else full[rows, columns]


class FreshHead:
    """A language model's weights with a new linear head [labels, H], for a reward model or a critic."""

    def __init__(self, trunk: Source, arch: Architecture, seed: int, std: float | None = None):
        """
        Args:
            arch: of the reward model.
            std: of the head's normal weights; None: 1 / sqrt(H + 1) (Stiennon et al., arXiv 2009.01325).
        """
        if std is None:
            std = (arch.hidden_size + 1) ** -0.5
        self.trunk, self.head = trunk, RandomSource(replace(arch, init_std=std), seed)

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        return (self.head if name == "score.weight" else self.trunk).read(name, rows, columns)


def open_source(directory: Path, arch: Architecture, seed: int) -> Source:
    """The weights in a directory; random ones for the built-in tiny model, which is a config.json only."""
    if list(Path(directory).glob("*.safetensors")) or list(Path(directory).glob("*.bin")):
        return SafetensorsSource(directory, arch)
    if Path(directory).resolve() != ASSETS.resolve() / "tiny":
        raise UserError(f"--model {directory}: no safetensors files there")
    return RandomSource(arch, seed)


@torch.no_grad()
def load(model: Decoder | Interleaved, source: Source) -> None:
    """Fill this rank's shard, before the model is wrapped and the optimizer is built."""
    for name, parameter, hf_name in named_parameters(model):
        part = read_part(source, model.arch, name, hf_name, parameter)
        assert part.shape == parameter.shape, (name, part.shape, parameter.shape)
        parameter.copy_(part)


def read_part(source: Source, arch: Architecture, name: str, hf_name: str, parameter: nn.Parameter) -> Tensor:
    """Read this rank's values of one parameter."""
    tp, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
    if "linear_qkv" in name and "layer_norm" not in name:
        if arch.kv_heads < tp:  # ranks share a group: each holds an equal piece of its rows
            return read_qkv(source, arch, hf_name, 0, arch.kv_heads).chunk(tp)[rank]
        groups = arch.kv_heads // tp
        return read_qkv(source, arch, hf_name, rank * groups, (rank + 1) * groups)
    if name.endswith(("linear_fc1.weight", "linear_fc1.bias")):
        rows = slice(rank * arch.ffn_size // tp, (rank + 1) * arch.ffn_size // tp)
        return torch.cat([source.read(hf_name.replace("*", half), rows) for half in arch.mlp_inputs])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        width = parameter.shape[1]
        return source.read(hf_name, columns=slice(rank * width, (rank + 1) * width))
    if name.endswith(("word_embeddings.weight", "output_layer.weight")):
        size = len(parameter)
        rows = slice(*(min(i * size, arch.vocab_size) for i in (rank, rank + 1)))
        real = source.read(hf_name, rows)
        return torch.cat([real, real.new_zeros(size - len(real), real.shape[1])])
    return source.read(hf_name)


def read_qkv(source: Source, arch: Architecture, hf_name: str, first: int, last: int) -> Tensor:
    """Read the rows of the query groups [first, last), each group its queries, its key, its value."""
    groups, sizes = last - first, qkv_rows_per_group(arch)
    parts = [
        source.read(hf_name.replace("*", x), slice(first * size, last * size))
        for x, size in zip("qkv", sizes, strict=True)
    ]
    order = rotary_order(arch)
    parts = [*(reorder_heads(part, order) for part in parts[:2]), parts[2]]
    parts = [part.unflatten(0, (groups, size)) for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(parts, 1).flatten(0, 1)


@torch.no_grad()
def save(
    model: nn.Module, start_from: Path, directory: Path, companions: Sequence[Callable[[Path], None]] = ()
) -> None:
    """Write config.json, generation_config.json and safetensors files for transformers.

    Weights are written in the precision of training, without loss; adapters are merged into them. The
    directory is complete or absent: it appears by one rename. Collective.

    Args:
        start_from: the directory of the model that training began with; its configuration is kept.
        companions: writers of other files of the model into its directory: tokenizer, template.
    """
    decoder: Decoder | Interleaved = unwrap_model(model)
    directory = Path(directory)
    unfinished = directory.with_name(directory.name + ".tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    parts = parallel.gather(write_stage(decoder, unfinished))
    if dist.get_rank() == 0:
        write_index(unfinished, {name: size for part in parts for name, size in part.items()})
        write_configs(start_from, unfinished, decoder)
        for write in companions:
            write(unfinished)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(unfinished, directory)
    dist.barrier()


def write_stage(model: Decoder | Interleaved, directory: Path) -> dict[str, tuple[str, int]]:
    """Write this rank's files of its stage. Returns {tensor: (file, bytes)} of them. Collective.

    The stage's files are dealt to its copies (data and context parallel ranks), and those of a copy to its
    tensor parallel ranks, which gather one file each and then write at the same time.
    """
    stage = mpu.get_pipeline_model_parallel_rank()
    copy = mpu.get_data_parallel_rank(with_context_parallel=True)
    copies = mpu.get_data_parallel_world_size(with_context_parallel=True)
    rank, ranks = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    files = stage_files(model)[copy::copies]
    written: dict[str, tuple[str, int]] = {}
    for first in range(0, len(files), ranks):
        file = f"stage{stage:03d}-{(first + rank) * copies + copy:05d}.safetensors"
        written |= write_file(gather_files(model, files[first : first + ranks]), directory / file)
    return written


def stage_files(model: Decoder | Interleaved) -> list[set[str]]:
    """Names of the tensors in each file of this stage, the same on all of its ranks."""
    shapes = tensor_shapes(model.arch)
    sizes = [
        (name, parameter.element_size() * math.prod(shapes[name]))
        for _, parameter, hf_name in stored(model)
        for name in split_name(hf_name, model.arch)
    ]
    return [{name for name, _ in file} for file in in_files(sizes, lambda item: item[1])]


def in_files(items: Iterable[T], nbytes: Callable[[T], int]) -> Iterator[Iterator[T]]:
    """Divide items, in their order, into files of at most MAX_FILE_BYTES, or of one item that is larger."""
    number = total = 0

    def file_of(item: T) -> int:
        nonlocal number, total
        if total and total + nbytes(item) > MAX_FILE_BYTES:
            number, total = number + 1, 0
        total += nbytes(item)
        return number

    return (file for _, file in itertools.groupby(items, file_of))


def write_files(tensors: Iterable[tuple[str, Tensor]], directory: Path) -> dict[str, tuple[str, int]]:
    """Write named tensors, in files up to the limit. Returns {tensor: (file, bytes)}."""
    written: dict[str, tuple[str, int]] = {}
    for i, file in enumerate(in_files(tensors, lambda item: item[1].nbytes)):
        written |= write_file(dict(file), directory / f"{i:05d}.safetensors")
    return written


def write_file(tensors: dict[str, Tensor], path: Path) -> dict[str, tuple[str, int]]:
    """Write one file, none without tensors. Returns {tensor: (file, bytes)}."""
    if tensors:
        save_file(tensors, path, metadata={"format": "pt"})
    return {name: (path.name, tensor.nbytes) for name, tensor in tensors.items()}


def gather_files(model: Decoder | Interleaved, files: list[set[str]]) -> dict[str, Tensor]:
    """Gather the i-th file on the i-th tensor parallel rank, in CPU memory; {} on further ranks. Collective.

    The files are gathered side by side, so that the ranks copy from their devices at the same time.
    """
    rank = mpu.get_tensor_model_parallel_rank()
    tensors: dict[str, Tensor] = {}
    values = lora.merged_weights(model)
    streams = [gathered(model, names, owner, values) for owner, names in enumerate(files)]
    for joined in itertools.zip_longest(*streams, fillvalue=()):
        for name, tensor in joined[rank] if rank < len(files) else ():
            if name in files[rank]:
                tensors[name] = tensor.to("cpu", copy=True)
    return tensors


def gathered(
    model: Decoder | Interleaved, names: set[str], owner: int, values: Callable[[nn.Parameter], Tensor]
) -> Iterator[Iterable[tuple[str, Tensor]]]:
    """Gather the parameters of some tensors on one tensor parallel rank. Collective.

    Yields, for each parameter, (Hugging Face name, tensor) of its tensors there; nothing on the other ranks.
    """
    for name, parameter, hf_name in stored(model):
        if names.isdisjoint(split_name(hf_name, model.arch)):
            continue
        parts = gather_parts(values(parameter), owner)
        if parts and name == "score.weight":
            parts = [stages(model)[-1].one_label()]
        yield join(parts, model.arch, name, hf_name) if parts else ()


def gather_parts(own: Tensor, owner: int) -> list[Tensor] | None:
    """Gather a split tensor on one tensor parallel rank; None on the others. Collective."""
    group = mpu.get_tensor_model_parallel_group()
    if group.size() == 1:
        return [own]
    parts = [torch.empty_like(own) for _ in range(group.size())] if group.rank() == owner else None
    dist.gather(own.contiguous(), parts, dst=dist.get_global_rank(group, owner), group=group)
    return parts


def join(parts: list[Tensor], arch: Architecture, name: str, hf_name: str) -> Iterator[tuple[str, Tensor]]:
    """Join the ranks' parts of one parameter to its Hugging Face tensors: the inverse of read_part."""
    if "linear_qkv" in name and "layer_norm" not in name:
        grouped = torch.cat(parts).unflatten(0, (arch.kv_heads, -1))
        back = rotary_order(arch).argsort()
        for x, tensor in zip("qkv", grouped.split(qkv_rows_per_group(arch), 1), strict=True):
            rows = tensor.flatten(0, 1)
            yield hf_name.replace("*", x), rows if x == "v" else reorder_heads(rows, back)
    elif name.endswith(("linear_fc1.weight", "linear_fc1.bias")):
        by_rank = [part.chunk(len(arch.mlp_inputs)) for part in parts]
        for half, tensors in zip(arch.mlp_inputs, zip(*by_rank, strict=True), strict=True):
            yield hf_name.replace("*", half), torch.cat(tensors)
    elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        yield hf_name, torch.cat(parts, 1)
    elif name.endswith(("word_embeddings.weight", "output_layer.weight")):
        yield hf_name, torch.cat(parts)[: arch.vocab_size]
    else:
        yield hf_name, parts[0]


def weight_of(parameter: nn.Parameter) -> Tensor:
    return parameter.data


def whole_tensors(
    model: Decoder | Interleaved, values: Callable[[nn.Parameter], Tensor] = weight_of
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor on the model's device) of all weights, in one order on every rank.

    A tensor may be a view of a parameter. Collective over the ranks that share a model.

    values: reads a tensor of a parameter's shape, of one dtype for all parameters, such as its gradient.
    """
    shapes = tensor_shapes(model.arch)
    names = [name for _, _, hf_name in stored(model) for name in split_name(hf_name, model.arch)]
    own = stage_tensors(model, values)
    like = values(next(parameter for _, parameter, _ in stored(model)))
    yield from of_all_stages({name: shapes[name] for name in names}, own, like)


def of_all_stages(
    shapes: dict[str, tuple[int, ...]], own: Iterator[tuple[str, Tensor]], like: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every pipeline stage, in one order on every rank. Collective.

    Args:
        shapes: of the tensors of this stage, in their order.
        own: these tensors, which must have the precision and the device of `like`.
    """
    group = mpu.get_pipeline_model_parallel_group()
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, shapes, group)
    for stage, of_stage in enumerate(gathered):
        for name, shape in of_stage.items():
            if stage == group.rank():
                own_name, tensor = next(own)
                assert own_name == name and tensor.shape == shape, (own_name, name, tensor.shape, shape)
            else:
                tensor = like.new_empty(shape)
            if group.size() > 1:
                dist.broadcast(tensor.contiguous(), dist.get_global_rank(group, stage), group=group)
            yield name, tensor


def stage_tensors(
    model: Decoder | Interleaved, values: Callable[[nn.Parameter], Tensor] = weight_of
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) of this stage, on its tensor parallel ranks. Collective."""
    for name, parameter, hf_name in stored(model):
        yield from join(all_parts(values(parameter)), model.arch, name, hf_name)


def all_parts(own: Tensor) -> list[Tensor]:
    """Gather a split tensor on every tensor parallel rank. Collective."""
    group = mpu.get_tensor_model_parallel_group()
    if group.size() == 1:
        return [own]
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own.contiguous(), group=group)
    return parts


def write_index(directory: Path, written: dict[str, tuple[str, int]]) -> None:
    """Rename the files as Hugging Face does, and write the index if there are several."""
    files = sorted({file for file, _ in written.values()})
    if len(files) == 1:
        os.replace(directory / files[0], directory / "model.safetensors")
        return
    names = {file: f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, file in enumerate(files, 1)}
    for file, name in names.items():
        os.replace(directory / file, directory / name)
    index = {
        "metadata": {"total_size": sum(size for _, size in written.values())},
        "weight_map": {name: names[file] for name, (file, _) in sorted(written.items())},
    }
    (directory / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )


def write_configs(start_from: Path, directory: Path, model: Decoder) -> None:
    """Write config.json, and copy generation_config.json and prompt_format.json of the first model."""
    config = json.loads((Path(start_from) / "config.json").read_bytes())
    precision = str(model.config.params_dtype).removeprefix("torch.")
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = precision
    # the weights of the first model may have an output embedding of their own, whatever its config.json says
    if config.get("tie_word_embeddings") and not model.arch.tied_embeddings:
        config["tie_word_embeddings"] = False
    if model.arch.labels:
        config |= {
            "architectures": [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[model.arch.family]],
            "num_labels": 1,
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
        }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in ("generation_config.json", "prompt_format.json"):
        if (Path(start_from) / name).is_file():
            shutil.copyfile(Path(start_from) / name, directory / name)
