"""Zigzag context parallelism: rank r of R holds the slices r and 2 R - 1 - r of 2 R equal slices of a pack.

A causal query attends to all tokens of its sequence before it. In one long sequence a late slice therefore
costs more than an early one, and the two slices of each rank together cost the same.
"""

import torch
from torch import Tensor


def spans_of_rank(total: int, rank: int, ranks: int) -> list[tuple[int, int]]:
    """Spans [start, end) of this rank in a pack of `total` tokens, a multiple of 2 R; all for one rank."""
    if ranks == 1:
        return [(0, total)]
    size, rest = divmod(total, 2 * ranks)
    assert rest == 0
    return [(i * size, (i + 1) * size) for i in (rank, 2 * ranks - 1 - rank)]


def take(x: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """Entries [T/R, ...] of a rank's spans, of x [T, ...] in the order of the pack."""
    parts = [x[start:end] for start, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def in_pack_order(x: Tensor, ranks: int) -> Tensor:
    """Reorder x [T, ...] from the entries of ranks 0, 1, ... end to end to the order of the pack."""
    slices = x.chunk(2 * ranks)
    return torch.cat([*slices[::2], *slices[::-2]])
