"""Run by test_matmul.py on every rank: Megatron's two linear layers, one after the other, over all ranks."""

import itertools
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from align.distributed import parallel

TOKENS, SIZE, WIDE = 10, 24, 36
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases(tp: int) -> list[tuple[str, bool]]:
    """(precision, sequence parallel) of every run with so many ranks."""
    return list(itertools.product(DTYPES, (False, True) if tp > 1 else (False,)))


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """x [T, 1, SIZE], weights [WIDE, SIZE] and [SIZE, WIDE], a bias of the first, gradient of the output."""
    random = torch.Generator().manual_seed(0)
    shapes = {
        "x": (TOKENS, 1, SIZE),
        "first": (WIDE, SIZE),
        "bias": (WIDE,),
        "second": (SIZE, WIDE),
        "grad": (TOKENS, 1, SIZE),
    }
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def run(precision: str, sequence_parallel: bool) -> dict[str, Tensor | str]:
    """This rank's part of the output and the gradients, and the name of the product's autograd function."""
    rank, size, dtype = dist.get_rank(), dist.get_world_size(), DTYPES[precision]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=SIZE,
        num_attention_heads=2,
        tensor_model_parallel_size=size,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )
    same = dict(config=config, init_method=torch.nn.init.zeros_, skip_bias_add=False)
    column = ColumnParallelLinear(SIZE, WIDE, bias=True, gather_output=False, **same)
    row = RowParallelLinear(WIDE, SIZE, bias=False, input_is_parallel=True, **same)
    tensors = inputs(dtype)
    with torch.no_grad():
        column.weight.copy_(tensors["first"].chunk(size)[rank])
        column.bias.copy_(tensors["bias"].chunk(size)[rank])
        row.weight.copy_(tensors["second"].chunk(size, 1)[rank])
    x, grad = (
        tensors[name].chunk(size)[rank] if sequence_parallel else tensors[name] for name in ("x", "grad")
    )
    x = x.clone().requires_grad_()
    hidden, _ = column(x)
    output, _ = row(hidden)
    output.backward(grad)
    grads = {"x": x.grad, "first": column.weight.grad, "bias": column.bias.grad, "second": row.weight.grad}
    return {"output": output.detach(), **grads, "function": hidden.grad_fn.name()}


def main(output: Path) -> None:
    with parallel.start(parallel.ParallelConfig(tp=int(os.environ["WORLD_SIZE"]))):
        for precision, sequence_parallel in cases(dist.get_world_size()):
            results = run(precision, sequence_parallel)
            torch.save(results, output / f"{precision}-{sequence_parallel}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
