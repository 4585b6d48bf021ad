"""Run by test_decode_attention.py with TRITON_INTERPRET=1: the kernels, against loops in float64."""

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from align.kernels import decode_attention
from align.model.layers import rotary_cos_sin

CAPACITY = 288
LENGTHS = [1, 2, 7, 33, 128, 129, 287, 288]  # up to a block's end, beyond it, as long as there is room
LONG = [1000, 8192]
MANY = 144  # programs wanted, for 16 sequences
CASES = [  # lengths, queries of a group, d, window, programs wanted, type
    *itertools.product((LENGTHS,), (1, 8), (24, 128), (None,), (1, MANY), ("float32",)),
    *itertools.product((LENGTHS,), (3,), (64,), (7, 100), (1, MANY), ("float32",)),
    *itertools.product((LENGTHS,), (5, 16), (8, 256), (None,), (MANY,), ("float32",)),
    *itertools.product((LONG,), (2,), (64,), (None, 3000), (MANY,), ("float16",)),
    # Triton's interpreter cannot multiply matrices in bf16; what differs from fp32 is the same in fp16
    *itertools.product((LENGTHS,), (4,), (64,), (None, 40), (1, MANY), ("float16",)),
]
ON_GPU = [  # what no interpreter runs: the type of production
    *itertools.product((LENGTHS, LONG), (1, 4, 8), (64, 128), (None, 100), (1, MANY), ("bfloat16",)),
]


def slow(query: Tensor, cache: Tensor, positions: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention of each query by itself, in float64."""
    out = torch.zeros_like(query, dtype=torch.float64)
    for b, g, i in itertools.product(*map(range, query.shape[:3])):
        end = int(positions[b]) + 1
        seen = slice(max(end - window, 0) if window else 0, end)
        keys, values = cache[:, b, g, seen].double()
        out[b, g, i] = (keys @ query[b, g, i].double() * scale).softmax(0) @ values
    return out


def attend_error(
    lengths: list[int], queries: int, d: int, window: int | None, programs: int, dtype: str
) -> dict[str, object]:
    """The largest difference, and how many programs had keys of each sequence.

    What no token has written is NaN: it must not be read, or have no effect.
    """
    torch.manual_seed(queries * d)
    decode_attention.PROGRAMS, decode_attention.LEAST = programs, 256 if max(lengths) > CAPACITY else 16
    positions, room = torch.tensor(lengths) - 1, max(CAPACITY, *lengths)
    query = torch.randn(len(lengths), 2, queries, d).to(getattr(torch, dtype))
    cache = torch.randn(2, len(lengths) + 1, 2, room, d).to(query.dtype)
    for slot, length in enumerate(lengths):
        cache[:, slot, :, length:] = torch.nan
    partials, combine = [], decode_attention.combine_kernel
    decode_attention.combine_kernel = Recorded(combine, partials)
    attended = decode_attention.attend(query, cache, positions, d**-0.5, window)
    decode_attention.combine_kernel = combine
    error = (attended.double() - slow(query, cache, positions, d**-0.5, window)).abs().max().item()
    parts = [(partial[:, 0, 0, :, -1] > 0).sum(1).tolist() for partial in partials]
    return {"error": error, "parts": parts[0] if parts else [1] * len(lengths)}


@dataclass(frozen=True)
class Recorded:
    """A kernel whose first argument is kept at each call."""

    kernel: object
    arguments: list

    def __getitem__(self, grid: tuple) -> Callable:
        def run(first: Tensor, *rest: object, **constants: object) -> None:
            self.arguments.append(first)
            self.kernel[grid](first, *rest, **constants)

        return run


def append_error(queries: int, d: int, dtype: str) -> float:
    """The largest difference of queries, keys and values; infinite where another place has changed."""
    torch.manual_seed(queries * d)
    batch, groups = 5, 3
    kind = getattr(torch, dtype)
    qkv = torch.randn(batch, groups, queries + 2, d).to(kind)  # q, k, v are views, as in the inference model
    qk, v = qkv[:, :, :-1], qkv[:, :, -1]
    positions = torch.tensor([0, 3, 17, 5, 39])
    cos, sin = rotary_cos_sin(positions, torch.rand(d // 2), kind)
    cache = torch.randn(2, batch + 2, groups, 40, d).to(kind)
    expected = cache.double()
    a, b = qk.double().chunk(2, -1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    turned = torch.cat([a * c - b * s, b * c + a * s], -1)
    for row, place in enumerate(positions.tolist()):
        expected[0, row, :, place], expected[1, row, :, place] = turned[row, :, -1], v[row].double()
    before = cache.clone()
    appended = decode_attention.append(qk, v, cos, sin, cache, positions)
    moved = (cache != before).any(-1).sum().item()
    if moved > 2 * batch * groups:
        return float("inf")
    errors = (appended.double() - turned[:, :, :-1]).abs().max(), (cache.double() - expected).abs().max()
    return max(error.item() for error in errors)


if __name__ == "__main__":
    json.dump(
        {
            "attend": [[*case, attend_error(*case)] for case in CASES],
            "append": [
                [queries, d, dtype, append_error(queries, d, dtype)]
                for queries, d, dtype in itertools.product((1, 3, 16), (8, 24, 128), ("float32", "bfloat16"))
            ],
        },
        sys.stdout,
    )
