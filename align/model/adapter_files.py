"""Adapters in and out: peft's directories of adapter_config.json and adapter_model.safetensors.

Names there are `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`. A reward model's head is
`base_model.model.score.weight`, one of the modules_to_save.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.utils import unwrap_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from align.distributed import parallel
from align.errors import UserError
from align.files import read_object, shown
from align.model import huggingface
from align.model.architecture import Architecture
from align.model.gpt import Decoder, Interleaved, stages
from align.model.lora import AdaptedColumn, AdaptedLinear, Adapters, LoraConfig, Place, matrices

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
HEAD = f"{PREFIX}score.weight"
BLOCKS = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}  # else mlp
# Fields that are checked below, or by the tensors' names, or that change nothing that the model computes.
READ = frozenset(
    "r lora_alpha use_rslora init_lora_weights target_modules modules_to_save bias peft_type task_type "
    "exclude_modules layers_to_transform layers_pattern base_model_name_or_path lora_dropout "
    "inference_mode auto_mapping revision peft_version eva_config megatron_core qalora_group_size".split()
)
# Initial values beside weights that stay as they are; others (PiSSA, OLoRA, ...) change the weights, too.
INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")


# ---- names ---------------------------------------------------------------------------------------


def key(layer: int, matrix: str, half: str) -> str:
    """Name of a tensor: of A or B ("lora_A", "lora_B") of a matrix (q_proj, ...) of a layer, from 0."""
    return f"{PREFIX}model.layers.{layer}.{BLOCKS.get(matrix[0], 'mlp')}.{matrix}.{half}.weight"


def adapter_shapes(arch: Architecture, adapters: Adapters) -> dict[str, tuple[int, int]]:
    """Name and shape of every tensor of a model's adapters, without its head."""
    rank, sizes = adapters.rank, matrices(arch)
    return {
        key(layer, name, half): shape
        for layer in range(arch.layers)
        for name in adapters.targets
        for half, shape in {"lora_A": (rank, sizes[name][1]), "lora_B": (sizes[name][0], rank)}.items()
    }


def adapted_modules(model: Decoder | Interleaved) -> Iterator[tuple[int, AdaptedLinear]]:
    """Yield each module with adapters on this rank, and the number of its layer in the whole model."""
    for layer in model.decoder.layers:
        for module in layer.modules():
            if isinstance(module, AdaptedLinear):
                yield layer.layer_number - 1, module


# ---- reading -------------------------------------------------------------------------------------


def read(config: LoraConfig, arch: Architecture) -> Adapters | None:
    """The adapters that the flags ask for; None if all weights are trained. Raises UserError."""
    return config.of_model(arch) if config.adapter is None else read_config(config.adapter, arch)


def read_config(directory: Path, arch: Architecture) -> Adapters:
    """The adapters in a directory, for a model. Raises UserError for what is missing or not implemented."""
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"--adapter {directory}: no {CONFIG} there; give a directory as peft writes it")
    fields = read_object(path)
    refuse(fields, path)
    stored = set(StoredAdapters(directory).shapes)
    known = matrices(arch)
    targets = tuple(name for name in known if any(f".{name}.lora_" in tensor for tensor in stored))
    note = f", now without its dropout of {fields['lora_dropout']}" if fields.get("lora_dropout") else ""
    adapters = Adapters(
        fields["r"], fields["lora_alpha"], bool(fields.get("use_rslora")), targets, "", directory, note
    )
    check_tensors(directory, arch, adapters)
    return adapters


def refuse(fields: dict, path: Path) -> None:
    """Refuse an adapter_config.json that asks for more than LoRA on linear layers."""
    if fields.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {shown(fields.get('peft_type'))}, only LORA is implemented")
    for name in ("r", "lora_alpha"):
        value = fields.get(name)
        if not isinstance(value, int if name == "r" else int | float) or not value > 0:
            raise UserError(f"{path}: {name} must be a number above 0, not {shown(value)}")
    if fields.get("init_lora_weights") not in INITIAL:
        raise UserError(
            f"{path}: init_lora_weights {shown(fields['init_lora_weights'])} changes the base weights as "
            "well: convert the adapter to plain LoRA with peft first"
        )
    if fields.get("bias") not in (None, "none") or set(fields.get("modules_to_save") or ()) - {
        "score",
        "classifier",
    }:
        raise UserError(f"{path}: only adapters and a reward model's score are trained here")
    for name, value in fields.items():
        if name not in READ and value not in (None, False, "", 0, [], {}):
            raise UserError(f"{path}: {name} = {shown(value)} is not implemented")


def check_tensors(directory: Path, arch: Architecture, adapters: Adapters) -> None:
    """Refuse a directory whose tensors are not those of one rank on the same matrices of every layer."""
    shapes, path = StoredAdapters(directory).shapes, directory / WEIGHTS
    expected = adapter_shapes(arch, adapters)
    if HEAD in shapes:
        if not arch.labels:
            raise UserError(f"--adapter {directory} is a reward model's, it has a head: give another one")
        expected |= {HEAD: (arch.labels, arch.hidden_size)}
    if not adapters.targets or (missing := sorted(set(expected) - set(shapes))):
        first = missing[0] if adapters.targets else key(0, "q_proj", "lora_A")
        raise UserError(f"{path}: {first} is missing: every layer must have the same adapters")
    if unknown := sorted(set(shapes) - set(expected)):
        raise UserError(f"{path}: {unknown[0]} is no adapter of a layer's matrix of this model")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise UserError(f"{path}: {name} is {shapes[name]}, --model and {CONFIG} mean {shape}")


def has_head(adapters: Adapters | None) -> bool:
    """True if the files of the adapters hold the head of a reward model."""
    return bool(adapters and adapters.directory and HEAD in StoredAdapters(adapters.directory).shapes)


def num_labels(directory: Path) -> int:
    """Labels of the head in a directory; 0 without one."""
    return StoredAdapters(directory).shapes.get(HEAD, (0,))[0]


class AdapterSource(Protocol):
    """Whole tensors of adapters by name."""

    def read(self, name: str) -> Tensor: ...


class StoredAdapters:
    """The tensors of adapter_model.safetensors."""

    def __init__(self, directory: Path):
        path = directory / WEIGHTS
        try:
            self.file: Any = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"--adapter {directory}: {WEIGHTS} cannot be read: {error}") from error
        self.shapes = {name: tuple(self.file.get_slice(name).get_shape()) for name in self.file.keys()}

    def read(self, name: str) -> Tensor:
        return self.file.get_tensor(name)


class FreshAdapters:
    """Random A and zero B. Each tensor has a generator seeded by its name: equal in every layout."""

    def __init__(self, arch: Architecture, adapters: Adapters, seed: int):
        self.shapes, self.init, self.seed = adapter_shapes(arch, adapters), adapters.init, seed

    def read(self, name: str) -> Tensor:
        rows, inputs = shape = self.shapes[name]
        if name.endswith("lora_B.weight"):
            return torch.zeros(shape)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        if self.init == "gaussian":
            return torch.randn(shape, generator=generator) / rows
        return (2 * torch.rand(shape, generator=generator) - 1) * inputs**-0.5


def load(model: Decoder | Interleaved, seed: int) -> None:
    """Fill the adapters of this rank's shard, fresh ones or from their files; nothing without adapters."""
    if (adapters := model.adapters) is None:
        return
    if adapters.directory is None:
        fill(model, FreshAdapters(model.arch, adapters, seed))
        return
    stored = StoredAdapters(adapters.directory)
    fill(model, stored)
    if HEAD in stored.shapes and model.post_process:
        stages(model)[-1].score.weight.data.copy_(stored.read(HEAD))


@torch.no_grad()
def fill(model: Decoder | Interleaved, source: AdapterSource) -> None:
    """Copy this rank's part of all adapters from a source."""
    tp, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
    for layer, module in adapted_modules(model):
        place = module.place
        rows = torch.cat([source.read(key(layer, name, "lora_A")) for name in place.adapted])
        is_column = isinstance(module, AdaptedColumn)
        module.lora_A.copy_(rows if is_column else rows.chunk(tp, 1)[rank])
        outputs = Outputs(source, layer, place)
        if is_column:  # as the rows of the fused weight
            name, hf_name = names_of(place)
            part = huggingface.read_part(outputs, place.arch, name, hf_name, module.lora_B)
            module.lora_B.copy_(part.view_as(module.lora_B))
        else:
            module.lora_B.copy_(outputs.read(place.parts[0]))


class Outputs:
    """The B matrices of a layer as a source of weights; 0 for a matrix without adapters."""

    def __init__(self, source: AdapterSource, layer: int, place: Place):
        self.source, self.layer, self.place = source, layer, place

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        assert columns is None
        if name in self.place.adapted:
            return self.source.read(key(self.layer, name, "lora_B"))[rows]
        return torch.zeros(matrices(self.place.arch)[name][0], self.place.adapters.rank)[rows]


def names_of(place: Place) -> tuple[str, str]:
    """Names of a fused weight as `huggingface.read_part` and `join` take them."""
    is_fused = len(place.parts) > 1 or place.module == "linear_fc1"
    return f"{place.module}.weight", "*_proj" if is_fused else place.parts[0]


# ---- writing -------------------------------------------------------------------------------------


def whole(
    model: Decoder | Interleaved, values: Callable[[nn.Parameter], Tensor] = huggingface.weight_of
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of all that is trained beside the base model, in one order on every rank.

    The head of a reward model has all its labels here. `values` and cost: as `huggingface.whole_tensors`.
    """
    assert model.adapters
    all_shapes = adapter_shapes(model.arch, model.adapters)
    names = [
        key(layer, name, half)
        for layer, module in adapted_modules(model)
        for half in ("lora_A", "lora_B")
        for name in module.place.adapted
    ]
    shapes: dict[str, tuple[int, ...]] = {name: all_shapes[name] for name in names}
    if model.arch.labels and model.post_process:
        shapes[HEAD] = (model.arch.labels, model.arch.hidden_size)
    like = values(next(parameter for parameter in model.parameters() if parameter.requires_grad))
    return huggingface.of_all_stages(shapes, stage_tensors(model, values), like)


def stage_tensors(
    model: Decoder | Interleaved, values: Callable[[nn.Parameter], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of this stage, on its tensor parallel ranks. Collective."""
    for layer, module in adapted_modules(model):
        place = module.place
        inner, outer = (huggingface.all_parts(values(x)) for x in (module.lora_A, module.lora_B))
        is_column = isinstance(module, AdaptedColumn)
        blocks = (inner[0] if is_column else torch.cat(inner, 1)).split(place.adapters.rank)
        for name, block in zip(place.adapted, blocks, strict=True):
            yield key(layer, name, "lora_A"), block
        outputs = {place.parts[0]: outer[0]}
        if is_column:
            rows = [part.flatten(0, -2) for part in outer]
            outputs = dict(huggingface.join(rows, place.arch, *names_of(place)))
        for name in place.adapted:
            yield key(layer, name, "lora_B"), outputs[name]
    if model.arch.labels and model.post_process:
        yield HEAD, values(stages(model)[-1].score.weight)


@torch.no_grad()
def save(model: nn.Module, base: Path | str, directory: Path) -> None:
    """Write the adapters as peft does, with the head of a reward model. Collective.

    base: name or directory of the model that they belong to.
    """
    decoder: Decoder | Interleaved = unwrap_model(model)
    assert decoder.adapters
    tensors = {}
    for name, tensor in whole(decoder):
        if name == HEAD:
            tensor = stages(decoder)[-1].merge_labels(tensor)
        if parallel.is_main():
            tensors[name] = tensor.to("cpu", copy=True).contiguous()
    if parallel.is_main():
        unfinished = directory.with_name(directory.name + ".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save_file(tensors, unfinished / WEIGHTS, metadata={"format": "pt"})
        fields = peft_fields(decoder.adapters, str(base), is_reward_model=bool(decoder.arch.labels))
        (unfinished / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(unfinished, directory)
    dist.barrier()


def peft_fields(adapters: Adapters, base: str, is_reward_model: bool) -> dict[str, Any]:
    """adapter_config.json of the adapters."""
    alpha = int(adapters.alpha) if adapters.alpha == int(adapters.alpha) else adapters.alpha
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_reward_model else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapters.rank,
        "lora_alpha": alpha,
        "use_rslora": adapters.rslora,
        "target_modules": list(adapters.targets),
        "modules_to_save": ["score"] if is_reward_model else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
