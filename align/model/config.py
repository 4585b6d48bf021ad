"""Flags of a model, and checks of them against its architecture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from megatron.core import parallel_state as mpu
from megatron.core.utils import get_te_version

from align.data import hub
from align.distributed.parallel import ParallelConfig, device_name
from align.errors import UserError
from align.files import ASSETS
from align.kernels import matmul
from align.model.architecture import Architecture
from align.model.attention import flash_kernel, uses_flash
from align.model.lora import Adapters, all_weights

FP8_MULTIPLE = 16  # divides the sizes of an 8-bit product


@dataclass(frozen=True)
class ModelConfig:
    """Model, precision and kernels."""

    model: str = "tiny"
    """Hugging Face directory to start from, a model of the Hub (org/name, org/name@revision), or "tiny": a
    small random Llama that comes with this project"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: weights in bf16; main weights, gradients and Adam in fp32. auto: bf16 on GPUs, fp32 on a CPU"""
    attention: Literal["auto", "torch", "te"] = "auto"
    """attention and linear layers: torch's kernels or Transformer Engine. auto: te where it is installed"""
    fp8: bool = False
    """matrix products of the layers in 8 bits; needs --attention te and a GPU that has them (H100, H200)"""
    recompute: Literal["none", "selective", "full"] = "none"
    """activation recomputation in the backward pass: attention core (selective) or whole layers (full)"""
    keep_logits: bool = False
    """keep the logits between forward and backward pass, 2 bytes for each trained token and vocabulary entry,
    in place of computing them twice; a language model in bf16"""

    @property
    def path(self) -> Path:
        """The directory of the model, downloaded from the Hub if it is a name there. Raises UserError."""
        tiny = ASSETS / "tiny"
        return tiny if self.model == "tiny" else hub.local_model(Path(self.model))

    @property
    def dtype(self) -> torch.dtype:
        is_bf16 = self.precision == "bf16" or (self.precision == "auto" and torch.cuda.is_available())
        return torch.bfloat16 if is_bf16 else torch.float32


def check_model(
    arch: Architecture,
    config: ModelConfig,
    parallel: ParallelConfig,
    overlap_param_gather: bool = False,
    adapters: Adapters | None = None,
) -> None:
    """Refuse a layout that this model does not allow, before anything is built."""
    tp, pp = parallel.tp, parallel.pp
    if adapters:
        check_adapters(config, overlap_param_gather)
    if overlap_param_gather and not overlaps_gradients():
        raise UserError(
            "--overlap-param-gather: one rank holds all main weights, so there is nothing to gather: leave "
            "it out, or start more processes than --tp x --pp"
        )
    if arch.heads % tp or arch.ffn_size % tp:
        raise UserError(
            f"--tp {tp} does not divide the model's {arch.heads} attention heads (and {arch.ffn_size} ffn "
            "columns): use a divisor, or data parallelism (more processes) or --pp instead"
        )
    if arch.kv_heads % tp and tp % arch.kv_heads:
        raise UserError(
            f"--tp {tp} and the model's {arch.kv_heads} key-value heads: one must divide the other"
        )
    if arch.layers % (pp * parallel.vp):
        flags = f"--pp {pp}" + (f" x --vp {parallel.vp} = {pp * parallel.vp}" if parallel.vp > 1 else "")
        raise UserError(f"{flags} does not divide the model's {arch.layers} layers")
    if (
        adapters is None
        and uses_te(config)
        and (arch.window is not None or parallel.cp > 1 or arch.out_bias or arch.mlp_bias)
    ):
        raise UserError(
            f"--attention {config.attention} is Transformer Engine's here, without sliding windows, --cp "
            "above 1, attention_bias and mlp_bias: give --attention torch"
        )
    if config.fp8:
        check_fp8(arch, config, tp)
    if config.keep_logits and config.dtype == torch.float32:
        raise UserError(
            "--keep-logits and --precision fp32, whose logits are overwritten: give --precision bf16"
        )


def check_adapters(config: ModelConfig, overlap_param_gather: bool) -> None:
    """Refuse flags that adapters do not work with, or that have no use beside them."""
    if config.attention == "te" or config.fp8:
        flag = "--fp8" if config.fp8 else "--attention te"
        raise UserError(
            f"{flag}: Transformer Engine's layers norm their input inside and have no adapters (--lora-rank, "
            "--adapter): leave it out"
        )
    if overlap_param_gather:
        raise UserError(
            "--overlap-param-gather: adapters (--lora-rank, --adapter) are gathered in no time: leave it out"
        )


def check_fp8(arch: Architecture, config: ModelConfig, tp: int) -> None:
    """Refuse --fp8 where Transformer Engine's 8-bit products cannot be used."""
    if not uses_te(config):
        raise UserError("--fp8 needs Transformer Engine: give --attention te on a GPU, or leave --fp8 out")
    if config.dtype != torch.bfloat16:
        raise UserError(f"--fp8 and --precision {config.precision}: the rest of the model must be in bf16")
    if torch.cuda.get_device_capability() < (8, 9):
        raise UserError(f"--fp8: {device_name()} has no 8-bit products: leave it out")
    sizes = {
        "hidden_size": arch.hidden_size,
        "attention columns": arch.heads * arch.head_dim // tp,
        "query, key and value rows": (arch.heads + 2 * arch.kv_heads) * arch.head_dim // tp,
        "ffn columns": arch.ffn_size // tp,
    }
    for name, size in sizes.items():
        if size % FP8_MULTIPLE:
            raise UserError(f"--fp8: the {size} {name} of a rank are no multiple of {FP8_MULTIPLE}")


def uses_te(config: ModelConfig) -> bool:
    """True if Transformer Engine computes the layers of a model without adapters.

    Raises UserError for --attention te without it.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if config.attention == "te" and not (HAVE_TE and torch.cuda.is_available()):
        raise UserError(
            "--attention te needs a GPU and the package transformer-engine: install it or use torch"
        )
    return config.attention != "torch" and HAVE_TE and torch.cuda.is_available()


def describe_model(
    arch: Architecture,
    config: ModelConfig,
    overlap_param_gather: bool = False,
    adapters: Adapters | None = None,
) -> str:
    """Model, precision, kernels and adapters, for the log."""
    if adapters is None and uses_te(config):
        kernels = f"Transformer Engine {get_te_version()}{', fp8' if config.fp8 else ''}"
    elif not torch.cuda.is_available():
        kernels = f"torch kernels, {matmul.kernels(config.dtype)}"
    else:
        flash = uses_flash(config.dtype, arch.head_dim, cuda=True)
        kernels = f"torch kernels, {flash_kernel() if flash else 'attention by sequence'}"
        kernels += ", small layers compiled"
    if overlaps_gradients():
        kernels += ", gradients summed during the backward pass"
    if overlap_param_gather:
        kernels += ", weights gathered during the forward pass"
    precision = str(config.dtype).removeprefix("torch.")
    size = f"{all_weights(arch) / 1e6:.1f} M weights"
    commit = f" ({config.path.name})" if config.path.parent.name == "snapshots" else ""
    trained = f"; {adapters.describe(arch)}" if adapters else ""
    return f"{arch.family} with {size} from {config.model}{commit}, {precision}, {kernels}{trained}"


def overlaps_gradients() -> bool:
    """True if more than one rank takes part in the gradient reduction."""
    return mpu.get_data_parallel_world_size(with_context_parallel=True) > 1
