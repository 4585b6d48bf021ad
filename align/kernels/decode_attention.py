"""Decode attention of one new token of each sequence to its KV cache, in Triton for GPUs.

Only the keys of a sequence's own tokens are read, once for all queries of their group. With too few sequences
to occupy a GPU, several programs share one: each reads some of the keys, and their softmaxes are combined
(flash-decoding, https://pytorch.org/blog/flash-decoding/). Their number depends on shapes only, so that a
CUDA graph of a step stays valid while the sequences grow.

Not run on a GPU yet: the tests run it in Triton's interpreter, and compile it for an H100.

Triton comes with torch for CUDA, so this file is imported only if tensors are on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 528  # target at the same time: 4 for each of the 132 multiprocessors of an H100
LEAST = 128  # fewest keys of a program
TILE = 16384  # bytes of keys that a program reads at once
LOWEST = tl.constexpr(-1e30)  # below all scores; minus infinity less itself would be NaN


def append(qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, positions: Tensor) -> Tensor:
    """Rotate queries and keys like `layers.apply_rotary`, in fp32, and append keys and values to the cache.

    Args:
        qk: [B, groups, queries of a group + 1, d], the last row of each group its key.
        v: [B, groups, d].
        cos, sin: B times d/2 numbers, from `layers.rotary_cos_sin`.
        cache: [2, slots, groups, capacity, d], keys and values; those of sequence b are in slot b.
        positions: [B] int64, position of each token in its sequence and of its key and value in the cache.

    Returns:
        The queries, [B, groups, queries, d].
    """
    batch, groups, rows, d = qk.shape
    assert qk.stride(3) == v.stride(2) == cache.stride(4) == 1 and cos.is_contiguous() and sin.is_contiguous()
    out = torch.empty(batch, groups, rows - 1, d, dtype=qk.dtype, device=qk.device)
    append_kernel[batch, groups](
        qk, v, cos, sin, positions, out, cache, *qk.stride()[:3], *v.stride()[:2], *cache.stride()[:3],
        ROWS=rows, HALF=d // 2, ROW_BLOCK=triton.next_power_of_2(rows),
        HALF_BLOCK=triton.next_power_of_2(d // 2),
    )  # fmt: skip
    return out


def attend(query: Tensor, cache: Tensor, positions: Tensor, scale: float, window: int | None) -> Tensor:
    """softmax(q K^T scale) V over a sequence's tokens up to its newest one, or over its last `window` tokens.

    Args:
        query: [B, groups, queries of a group, d], contiguous; sums are fp32.
        cache, positions: as in `append`, which stores the newest token's key and value.

    Returns:
        [B, groups, queries, d].
    """
    batch, groups, queries, d = query.shape
    assert query.is_contiguous() and cache.stride(3) == d and cache.stride(4) == 1
    width = max(triton.next_power_of_2(d), 16)
    block = min(max(TILE // (width * query.element_size()), 16), 128)
    size, splits = division(batch * groups, cache.shape[3], block)
    shape = dict(QUERIES=queries, D=d, ROWS=max(triton.next_power_of_2(queries), 16), WIDTH=width)
    out, partial = torch.empty_like(query), None
    if splits > 1:
        partial = torch.empty(batch, groups, splits, queries, d + 2, device=query.device)
    attend_kernel[batch, groups, splits](
        query, cache, positions, out, partial, scale, size, *cache.stride()[:3],
        WINDOW=window or 0, BLOCK=block, **shape,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(batch * groups,)](partial, out, splits, **shape)
    return out


def division(sequences: int, capacity: int, block: int) -> tuple[int, int]:
    """Split a sequence's keys among programs: keys of each, a multiple of block, and number of programs.

    Args:
        sequences: batch times groups, each with at least one program.
        capacity: keys of the cache.
    """
    programs = min(max(PROGRAMS // sequences, 1), -(-capacity // LEAST))
    size = -(-capacity // (programs * block)) * block
    return size, -(-capacity // size)


@triton.jit
def append_kernel(
    qk, v, cos, sin, positions, out, cache,
    qk_token, qk_group, qk_row, v_token, v_group, kind, slot, group,
    ROWS: tl.constexpr, HALF: tl.constexpr, ROW_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """Program of one token and group; the last arguments are strides of v and of the cache."""
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i, j = tl.arange(0, ROW_BLOCK)[:, None], tl.arange(0, HALF_BLOCK)[None, :]
    here = (i < ROWS) & (j < HALF)
    source = qk + b * qk_token + g * qk_group + i * qk_row + j
    first = tl.load(source, mask=here, other=0).to(tl.float32)
    second = tl.load(source + HALF, mask=here, other=0).to(tl.float32)
    c = tl.load(cos + b * HALF + j, mask=j < HALF, other=0).to(tl.float32)
    s = tl.load(sin + b * HALF + j, mask=j < HALF, other=0).to(tl.float32)
    a, z = first * c - second * s, second * c + first * s

    query = out + ((b * tl.num_programs(1) + g) * (ROWS - 1) + i) * (2 * HALF) + j
    tl.store(query, a, mask=here & (i < ROWS - 1))
    tl.store(query + HALF, z, mask=here & (i < ROWS - 1))
    place = cache + b * slot + g * group + tl.load(positions + b) * (2 * HALF)
    key = place + j + 0 * i
    tl.store(key, a, mask=here & (i == ROWS - 1))
    tl.store(key + HALF, z, mask=here & (i == ROWS - 1))
    all_columns = tl.arange(0, 2 * HALF_BLOCK)
    value = tl.load(v + b * v_token + g * v_group + all_columns, mask=all_columns < 2 * HALF)
    tl.store(place + kind + all_columns, value, mask=all_columns < 2 * HALF)


@triton.jit
def attend_kernel(
    query, cache, positions, out, partial, scale, size, kind, slot, group,
    QUERIES: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program of one sequence, one group, `size` of its keys; queries padded to ROWS, dimensions to WIDTH.

    partial, [.., QUERIES, D + 2] fp32: the weighted sum of values, the highest score, and the sum of the
    exponentials. None if one program reads all keys.
    """
    b, g, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    here = (i < QUERIES) & (j < D)
    row = (b * tl.num_programs(1) + g) * QUERIES + i
    q = tl.load(query + row * D + j, mask=here, other=0)
    length = tl.load(positions + b).to(tl.int32) + 1
    start = 0  # the first visible key
    if WINDOW > 0:
        start = tl.maximum(length - WINDOW, 0)
    last = tl.minimum((part + 1) * size, length)
    keys = cache + b * slot + g * group
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for begin in range(tl.maximum(part * size, start // BLOCK * BLOCK), last, BLOCK):
        places = begin + tl.arange(0, BLOCK)
        seen = (places >= start) & (places < last)
        at = keys + places[:, None].to(tl.int64) * D + j
        k = tl.load(at, mask=seen[:, None] & (j < D), other=0)
        v = tl.load(at + kind, mask=seen[:, None] & (j < D), other=0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, LOWEST)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(seen[None, :], tl.exp(scores - higher[:, None]), 0.0)
        before = tl.exp(top - higher)
        total = total * before + tl.sum(weights, 1)
        sums = sums * before[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    if partial is None:
        tl.store(out + row * D + j, sums / total[:, None], mask=here)
    else:
        row = ((b * tl.num_programs(1) + g) * tl.num_programs(2) + part) * QUERIES + i
        tl.store(partial + row * (D + 2) + j, sums, mask=here)
        tl.store(partial + row * (D + 2) + D, top[:, None], mask=i < QUERIES)
        tl.store(partial + row * (D + 2) + D + 1, total[:, None], mask=i < QUERIES)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    partial, out, splits,
    QUERIES: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program of one sequence and one group: combine the softmaxes over parts of the keys."""
    n = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    here = (i < QUERIES) & (j < D)
    top = tl.full([ROWS, 1], LOWEST, tl.float32)
    total = tl.zeros([ROWS, 1], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for part in range(splits):
        row = partial + ((n * splits + part) * QUERIES + i) * (D + 2)
        height = tl.load(row + D, mask=i < QUERIES, other=LOWEST)
        higher = tl.maximum(top, height)
        before, now = tl.exp(top - higher), tl.exp(height - higher)
        total = total * before + now * tl.load(row + D + 1, mask=i < QUERIES, other=0)
        sums = sums * before + now * tl.load(row + j, mask=here, other=0)
        top = higher
    tl.store(out + (n * QUERIES + i) * D + j, sums / total, mask=here)
