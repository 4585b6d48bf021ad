"""LoRA (https://arxiv.org/abs/2106.09685): low-rank adapters beside the frozen matrices of the layers.

    y = x W^T + scale (x A^T) B^T        A [r, inputs] random, B [outputs, r] zero at the start

A fused linear layer (q, k, v; gate, up) has P adapted parts: `lora_A` [P r, inputs] has theirs one after the
other, and `lora_B` [outputs, r] a row for each row of the fused weight, in its order. M(B) [outputs, P r] has
row i of B in the block of the part that row i belongs to, so one product serves all parts.

    tensor parallel     lora_A          lora_B             what is communicated, T r numbers a part
    column parallel     whole           rows, as weight    sum of the gradient of x A^T, or its gather
    row parallel        columns         whole              sum of x A^T, or its reduce-scatter

With sequence parallelism each rank has the gradient of its own tokens for the whole ones: Megatron sums it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from align.errors import UserError
from align.flags import above, check_ranges, refuse_unused, whole
from align.kernels import matmul
from align.model.architecture import Architecture

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MATRICES = ("lora_A", "lora_B")


@dataclass(frozen=True)
class LoraConfig:
    """LoRA: train adapters of low rank beside the frozen weights of the model."""

    lora_rank: int = 0
    """LoRA rank r (arXiv 2106.09685): adapters A [r, inputs] and B [outputs, r] are trained and --model is
    frozen; 0 trains all weights"""
    lora_alpha: float | None = None
    """LoRA alpha: the adapters' output is scaled by alpha / r (default: 2 r)"""
    lora_rslora: bool = False
    """scale by alpha / sqrt(r) in place of alpha / r (rsLoRA, arXiv 2312.03732)"""
    lora_targets: tuple[Target, ...] = ()
    """matrices with adapters, in every layer (default: all that the model has)"""
    lora_init: Literal["kaiming", "gaussian"] = "kaiming"
    """initial A: kaiming, uniform within 1 / sqrt(inputs), or gaussian of standard deviation 1 / r; B is 0"""
    adapter: Path | None = None
    """directory of an adapter for --model, as this project or peft writes it, to continue from; its rank,
    alpha and targets hold. A reference model is --model without it"""

    def __post_init__(self):
        check_ranges(self, lora_rank=whole(0, 2**16), lora_alpha=above(0, 1e6))
        names = "lora_alpha lora_rslora lora_targets lora_init"
        if self.adapter is not None:
            why = f"with --adapter {self.adapter}, whose adapter_config.json decides it"
            refuse_unused(self, LoraConfig, f"lora_rank {names}", why)
        elif not self.lora_rank:
            refuse_unused(self, LoraConfig, names, "without --lora-rank")
        if len(set(self.lora_targets)) < len(self.lora_targets):
            raise UserError(f"--lora-targets {' '.join(self.lora_targets)}: a name is there twice")

    @property
    def enabled(self) -> bool:
        """True if adapters are trained."""
        return self.lora_rank > 0 or self.adapter is not None

    def of_model(self, arch: Architecture) -> "Adapters | None":
        """Fresh adapters for a model; None without --lora-rank. Raises UserError for a missing matrix."""
        if not self.lora_rank:
            return None
        for target in self.lora_targets:
            if target not in (known := matrices(arch)):
                raise UserError(f"--lora-targets {target}: this model has {', '.join(known)}")
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        targets = tuple(name for name in matrices(arch) if name in self.lora_targets or not self.lora_targets)
        return Adapters(self.lora_rank, alpha, self.lora_rslora, targets, self.lora_init)


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model: their rank, scale and places."""

    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...]  # in the order of `matrices`
    init: str = "kaiming"
    directory: Path | None = None  # of the files to load
    note: str = ""  # about these files, for the log

    @property
    def scale(self) -> float:
        """Factor of the adapters' output."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def num_weights(self, arch: Architecture) -> int:
        """Weights of all adapters."""
        shapes = matrices(arch)
        return arch.layers * self.rank * sum(sum(shapes[name]) for name in self.targets)

    def describe(self, arch: Architecture) -> str:
        """Trained weights and settings, for the log."""
        head = arch.labels * arch.hidden_size
        trained, frozen = self.num_weights(arch) + head, all_weights(arch) - head
        share = f"{trained:,} trained weights, {trained / (trained + frozen):.2%} of all"
        places = ", ".join(self.targets) + (" and the head" if head else "")
        source = f", from {self.directory}{self.note}" if self.directory else ""
        return f"LoRA of rank {self.rank}, scale {self.scale:.4g}, on {places}: {share}{source}"


def matrices(arch: Architecture) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each matrix of a layer, by Hugging Face's name."""
    hidden, heads, groups = arch.hidden_size, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    return {
        **{"q_proj": (heads, hidden), "k_proj": (groups, hidden), "v_proj": (groups, hidden)},
        "o_proj": (hidden, heads),
        **{f"{name}_proj": (arch.ffn_size, hidden) for name in arch.mlp_inputs},
        "down_proj": (hidden, arch.ffn_size),
    }


def matmul_params(arch: Architecture, adapters: Adapters | None) -> int:
    """Weights of a model, all trained, whose training takes as many operations in matrix products.

    Of the six operations for each weight and token the two of its gradient fall away if it is frozen.
    """
    if adapters is None:
        return arch.matmul_params
    return arch.matmul_params * 4 // 6 + adapters.num_weights(arch)


def fused_parts(arch: Architecture) -> dict[str, tuple[str, ...]]:
    """Matrices of each linear module of a layer."""
    return {
        "linear_qkv": ("q_proj", "k_proj", "v_proj"),
        "linear_proj": ("o_proj",),
        "linear_fc1": tuple(f"{name}_proj" for name in arch.mlp_inputs),
        "linear_fc2": ("down_proj",),
    }


def all_weights(arch: Architecture) -> int:
    """Weights in matrix products and in the input embedding; norms and biases are not counted."""
    is_tied = arch.tied_embeddings and not arch.labels
    return arch.matmul_params + (0 if is_tied else arch.vocab_size * arch.hidden_size)


# ---- layers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A linear module with adapters, and those of its matrices that have one."""

    arch: Architecture
    adapters: Adapters
    module: str  # linear_qkv, ...

    @property
    def parts(self) -> tuple[str, ...]:
        """All matrices of the module."""
        return fused_parts(self.arch)[self.module]

    @property
    def adapted(self) -> tuple[str, ...]:
        """Matrices with adapters: the blocks of lora_A."""
        return tuple(name for name in self.parts if name in self.adapters.targets)

    def row_parts(self, tp: int, rank: int) -> Tensor:
        """Number in `parts` of each row of a rank's weight, [rows / tp]; see huggingface.read_part."""
        shapes, numbers = matrices(self.arch), torch.arange(len(self.parts))
        if self.module == "linear_qkv":
            sizes = torch.tensor([shapes[name][0] // self.arch.kv_heads for name in self.parts])
            return numbers.repeat_interleave(sizes).repeat(self.arch.kv_heads).chunk(tp)[rank]
        return numbers.repeat_interleave(shapes[self.parts[0]][0] // tp)

    def blocks(self, tp: int, rank: int) -> Tensor:
        """One-hot block in lora_A of each row of a rank's weight, [rows / tp, P]; 0 without adapters."""
        chosen = torch.tensor([self.parts.index(name) for name in self.adapted])
        return (self.row_parts(tp, rank)[:, None] == chosen).float()


def adapted(kind: type, module: str, arch: Architecture, adapters: Adapters | None) -> type:
    """Class of a linear module with adapters; `kind` itself if no matrix of it has any."""
    if adapters is None or not (place := Place(arch, adapters, module)).adapted:
        return kind
    base: Any = {ColumnParallelLinear: AdaptedColumn, RowParallelLinear: AdaptedRow}[kind]

    class Adapted(base):
        def __init__(self, *sizes: int, **options: Any):
            super().__init__(place, *sizes, **options)

    return Adapted


class AdaptedColumn(ColumnParallelLinear):
    """ColumnParallelLinear with adapters."""

    def __init__(self, place: Place, inputs: int, outputs: int, **options: Any):
        super().__init__(inputs, outputs, **options)
        self.place, self.is_off = place, False
        rank, halves = place.adapters.rank, len(place.parts) if place.module == "linear_fc1" else 1
        rows = self.output_size_per_partition
        self.lora_A = matrix(self, len(place.adapted) * rank, inputs)
        mark_partial(self, self.lora_A)
        # gate and up are two matrices on each rank, which another layout splits each for itself
        self.lora_B = matrix(self, *((halves, rows // halves) if halves > 1 else (rows,)), rank)
        set_tensor_model_parallel_attributes(self.lora_B, True, int(halves > 1), 1)
        blocks = place.blocks(self.tp_group.size(), self.tp_group.rank()).to(self.lora_B)
        self.register_buffer("blocks", blocks, persistent=False)

    def forward(self, input_: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_, *rest, **options)
        return (output if self.is_off else output + self.delta(input_)), bias

    def delta(self, x: Tensor) -> Tensor:
        """Output of the adapters, [T, 1, rows / tp]."""
        low = linear(x, self.lora_A) * self.place.adapters.scale  # [T, 1, P r]
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        return linear(low, self.spread())

    def spread(self) -> Tensor:
        """M(B), [rows / tp, P r]."""
        rows = self.lora_B.flatten(0, -2)
        return (rows[:, None] * self.blocks[:, :, None].to(rows.dtype)).flatten(1)

    def merged(self) -> Tensor:
        """This rank's weight with its adapters, computed in fp32."""
        added = self.place.adapters.scale * (self.spread().float() @ self.lora_A.float())
        return (self.weight.float() + added).to(self.weight.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        return sharded(self, {"lora_B": self.lora_B.dim() - 2}, prefix, sharded_offsets, metadata)


class AdaptedRow(RowParallelLinear):
    """RowParallelLinear with adapters."""

    def __init__(self, place: Place, inputs: int, outputs: int, **options: Any):
        super().__init__(inputs, outputs, **options)
        self.place, self.is_off, rank = place, False, place.adapters.rank
        self.lora_A = matrix(self, rank, self.input_size_per_partition)
        set_tensor_model_parallel_attributes(self.lora_A, True, 1, 1)
        self.lora_B = matrix(self, outputs, rank)
        mark_partial(self, self.lora_B)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        return (output if self.is_off else output + self.delta(input_)), bias

    def delta(self, x: Tensor) -> Tensor:
        """Output of the adapters, [T, 1, rows], with sequence parallelism [T / tp, 1, rows]."""
        low = linear(x, self.lora_A) * self.place.adapters.scale  # [T, 1, r], a sum over this rank's columns
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return linear(low, self.lora_B)

    def merged(self) -> Tensor:
        """This rank's weight with its adapters, computed in fp32."""
        added = self.place.adapters.scale * (self.lora_B.float() @ self.lora_A.float())
        return (self.weight.float() + added).to(self.weight.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        return sharded(self, {"lora_A": 1}, prefix, sharded_offsets, metadata)


AdaptedLinear = AdaptedColumn | AdaptedRow


def matrix(module: Any, *shape: int) -> Any:
    """A matrix of an adapter, 0, in the precision and on the device of the module's weight."""
    return nn.Parameter(module.weight.new_zeros(shape))


def mark_partial(module: AdaptedLinear, whole: Any) -> None:
    """Mark a whole matrix, of which a rank has the gradient of its own tokens with sequence parallelism."""
    whole.sequence_parallel = module.sequence_parallel


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, with gradients."""
    return matmul.Linear.apply(x, weight, None) if matmul.uses_onednn(x) else F.linear(x, weight)


def sharded(
    module: AdaptedLinear, split: dict[str, int], prefix: str, offsets: tuple, metadata: dict | None
) -> dict:
    """The adapters for checkpoints. `split`: axis that is split over tensor parallel ranks."""
    state = {name: getattr(module, name) for name in MATRICES}
    groups = dict(tp_group=module.tp_group, dp_cp_group=(metadata or {})["dp_cp_group"])
    return make_sharded_tensors_for_checkpoint(state, prefix, split, offsets, **groups)


# ---- models --------------------------------------------------------------------------------------


def is_adapter(name: str) -> bool:
    """True for the name of a parameter of an adapter."""
    return name.rpartition(".")[2] in MATRICES


def is_trained(name: str) -> bool:
    """True for a parameter of an adapter, and for the head of a reward model, which has no adapter."""
    return is_adapter(name) or name == "score.weight"


def freeze_base(model: nn.Module) -> None:
    """Freeze all weights that are not trained beside adapters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name))


def modules(model: nn.Module) -> Iterator[AdaptedLinear]:
    """The modules of a model that have adapters."""
    return (module for module in model.modules() if isinstance(module, AdaptedLinear))


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes without its adapters: it is the base model."""
    own = list(modules(model))
    assert own, "a model without adapters"
    for module in own:
        module.is_off = True
    try:
        yield
    finally:
        for module in own:
            module.is_off = False


def merged_weights(model: nn.Module) -> Callable[[nn.Parameter], Tensor]:
    """Function from a parameter of a model to its value with the adapters merged, in the same precision."""
    owners = {id(module.weight): module for module in modules(model)}

    @torch.no_grad()
    def value(parameter: nn.Parameter) -> Tensor:
        owner = owners.get(id(parameter))
        return parameter.data if owner is None else owner.merged()

    return value
