"""Run by test_decode_attention.py with TRITON_INTERPRET=1: the kernels, against loops in float64."""

import itertools
import json
import sys

import torch
from torch import Tensor

from align.kernels import decode_attention
from align.model.layers import rotary_cos_sin

CAPACITY = 288
LENGTHS = [1, 2, 7, 33, 128, 129, 287, 288]  # up to a block's end, beyond it, as long as there is room
MANY = 144  # programs wanted, for 16 sequences
CASES = [  # queries of a group, d, window, programs wanted, type
    *itertools.product((1, 8), (24, 128), (None,), (1, MANY), ("float32",)),
    *itertools.product((3,), (64,), (7, 100), (1, MANY), ("float32",)),
    *itertools.product((5, 16), (8, 256), (None,), (MANY,), ("float32",)),
    # Triton's interpreter cannot multiply matrices in bf16; what differs from fp32 is the same in fp16
    *itertools.product((4,), (64,), (None, 40), (1, MANY), ("float16",)),
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


def attend_error(queries: int, d: int, window: int | None, programs: int, dtype: str) -> dict[str, float]:
    """The largest difference, and into how many parts the keys were divided.

    What no token has written is NaN: it must not be read, or have no effect.
    """
    torch.manual_seed(queries * d)
    decode_attention.PROGRAMS, decode_attention.LEAST = programs, 16
    positions = torch.tensor(LENGTHS) - 1
    query = torch.randn(len(LENGTHS), 2, queries, d).to(getattr(torch, dtype))
    cache = torch.randn(2, len(LENGTHS) + 1, 2, CAPACITY, d).to(query.dtype)
    for slot, length in enumerate(LENGTHS):
        cache[:, slot, :, length:] = torch.nan
    parts = []
    division = decode_attention.division
    decode_attention.division = lambda *shape: parts.append(division(*shape)) or parts[-1]
    attended = decode_attention.attend(query, cache, positions, d**-0.5, window)
    decode_attention.division = division
    error = (attended.double() - slow(query, cache, positions, d**-0.5, window)).abs().max().item()
    return {"error": error, "parts": parts[0][1]}


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
