"""Decode attention of one new token of each sequence to its KV cache, in Triton for GPUs.

Only the keys of a sequence's own tokens are read, once for all queries of their group. With too few sequences
to occupy a GPU, several programs share one: each reads some of the keys, and their softmaxes are combined
(flash-decoding, https://pytorch.org/blog/flash-decoding/). Their number depends on shapes only, so that a
CUDA graph of a step stays valid while the sequences grow; which keys each reads is computed on the device,
from the sequence's length.

Not run on a GPU yet: the tests run it in Triton's interpreter, and compile it for an H100.

Triton comes with torch for CUDA, so this file is imported only if tensors are on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MULTIPROCESSORS = (
    torch.cuda.get_device_properties("cuda").multi_processor_count if torch.cuda.is_available() else 132
)
PROGRAMS = 6 * MULTIPROCESSORS  # target at the same time: by their shared memory six fit on an H100's each
LEAST = 256  # fewest keys of a program, unless the sequence has fewer; a multiple of every block
MOST = 64  # programs of one sequence
TILE = 8192  # bytes of keys that a program reads at once
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
    splits = num_splits(batch * groups, min(cache.shape[3], (window or cache.shape[3]) + block))
    shape = dict(QUERIES=queries, D=d, WIDTH=width)
    out, partial = torch.empty_like(query), None
    if splits > 1:
        partial = torch.empty(batch, groups, queries, splits, d + 2, device=query.device)
    attend_kernel[batch, groups, splits](
        query, cache, positions, out, partial, scale, *cache.stride()[:3],
        WINDOW=window or 0, BLOCK=block, LEAST=LEAST, ROWS=max(triton.next_power_of_2(queries), 16), **shape,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(batch * groups * queries,)](partial, out, splits, D=d, WIDTH=width, MOST=MOST)
    return out


def num_splits(sequences: int, keys: int) -> int:
    """Number of programs that share the keys of a sequence, 1 to MOST.

    Args:
        sequences: batch times groups, each with at least one program.
        keys: the most that one sequence can have.
    """
    return min(max(PROGRAMS // sequences, 1), -(-keys // LEAST), MOST)


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
    query, cache, positions, out, partial, scale, kind, slot, group,
    QUERIES: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Program of one sequence, one group, a part of its keys; queries padded to ROWS, dimensions to WIDTH.

    partial, [.., QUERIES, parts, D + 2] fp32: the weighted sum of values, the highest score, and the sum of
    the exponentials; 0, LOWEST and 0 of a part without keys. None if one program reads all keys.
    """
    b, g, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    parts = tl.num_programs(2)
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    here = (i < QUERIES) & (j < D)
    row = (b * tl.num_programs(1) + g) * QUERIES + i
    q = tl.load(query + row * D + j, mask=here, other=0)
    length = tl.load(positions + b).to(tl.int32) + 1
    start = 0  # the first visible key
    if WINDOW > 0:
        start = tl.maximum(length - WINDOW, 0)
    origin = start // BLOCK * BLOCK
    size = tl.maximum(tl.cdiv(tl.cdiv(length - origin, parts), BLOCK) * BLOCK, LEAST)
    first = origin + part * size
    last = tl.minimum(first + size, length)
    keys = cache + b * slot + g * group
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for begin in range(first, last, BLOCK):
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
        row = row * parts + part
        tl.store(partial + row * (D + 2) + j, sums, mask=here)
        tl.store(partial + row * (D + 2) + D, top[:, None], mask=i < QUERIES)
        tl.store(partial + row * (D + 2) + D + 1, total[:, None], mask=i < QUERIES)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(partial, out, splits, D: tl.constexpr, WIDTH: tl.constexpr, MOST: tl.constexpr):
    """Program of one query: combine the softmaxes over the parts of its keys, MOST of them at most."""
    n = tl.program_id(0).to(tl.int64)
    k, j = tl.arange(0, MOST)[:, None], tl.arange(0, WIDTH)
    row = partial + (n * splits + k) * (D + 2)
    tops = tl.load(row + D, mask=k < splits, other=LOWEST)
    weights = tl.exp(tops - tl.max(tops, 0, keep_dims=True))
    total = tl.sum(weights * tl.load(row + D + 1, mask=k < splits, other=0))
    sums = tl.sum(weights * tl.load(row + j[None, :], mask=(k < splits) & (j[None, :] < D), other=0), 0)
    tl.store(out + n * D + j, sums / total, mask=j < D)
