"""Linear layers split over tensor parallel ranks, with or without a norm before them."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: dist.ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str = "cuda",
    ):
        super().__init__()
        assert not fuse_wgrad_accumulation and not return_bias and parallel_mode in ("row", "column")
        assert tp_group.size() == tp_size
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.group, self.sequence_parallel, self.parallel_mode = tp_group, sequence_parallel, parallel_mode
        rows, columns = (tp_size, 1) if parallel_mode == "column" else (1, tp_size)
        shape, how = (out_features // rows, in_features // columns), {"dtype": params_dtype, "device": device}
        self.weight = nn.Parameter(torch.full(shape, torch.nan, **how))  # until something fills it
        init_method(self.weight)
        mark(self.weight, dim=0 if parallel_mode == "column" else 1)
        if bias:
            self.bias = nn.Parameter(torch.zeros(shape[0], **how))
            if parallel_mode == "column":
                mark(self.bias, dim=0)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Tensor:
        return self.product(inp)

    def product(self, x: Tensor) -> Tensor:
        from megatron.core import tensor_parallel as regions

        bias = self.bias if self.use_bias else None
        if self.parallel_mode == "column":
            enter = (
                regions.gather_from_sequence_parallel_region
                if self.sequence_parallel
                else regions.copy_to_tensor_model_parallel_region
            )
            return F.linear(enter(x, group=self.group), self.weight, bias)
        assert bias is None
        leave = (
            regions.reduce_scatter_to_sequence_parallel_region
            if self.sequence_parallel
            else regions.reduce_from_tensor_model_parallel_region
        )
        return leave(F.linear(x, self.weight), group=self.group)


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: dist.ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        device: torch.device | str = "cuda",
    ):
        assert normalization in ("LayerNorm", "RMSNorm") and not return_layernorm_output
        assert normalization == "LayerNorm" or not zero_centered_gamma
        super().__init__(
            in_features,
            out_features,
            sequence_parallel,
            fuse_wgrad_accumulation,
            tp_group,
            tp_size,
            get_rng_state_tracker,
            init_method=init_method,
            bias=bias,
            return_bias=return_bias,
            params_dtype=params_dtype,
            parallel_mode=parallel_mode,
            device=device,
        )
        self.eps, self.centred = eps, normalization == "LayerNorm"
        self.added = 1 if zero_centered_gamma else 0
        for name in ("layer_norm_weight", "layer_norm_bias") if self.centred else ("layer_norm_weight",):
            value = 0.0 if name.endswith("bias") else 1.0 - self.added
            filled = torch.full((in_features,), value, dtype=params_dtype, device=device)
            self.register_parameter(name, nn.Parameter(filled))
            getattr(self, name).sequence_parallel = sequence_parallel

    def product(self, x: Tensor) -> Tensor:
        weight, shape = self.layer_norm_weight + self.added, x.shape[-1:]
        if self.centred:
            return super().product(F.layer_norm(x, shape, weight, self.layer_norm_bias, self.eps))
        return super().product(F.rms_norm(x, shape, weight, self.eps))


class GroupedLinear(nn.Module):
    """Megatron derives a class from this one."""


def mark(weight: Tensor, dim: int) -> None:
    weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, dim, 1


class RMSNorm(nn.Module):
    """A base class of Megatron-Core 0.19's, which no model here has."""

    def __init__(self) -> None:
        raise AssertionError("a norm of its own is not played")
