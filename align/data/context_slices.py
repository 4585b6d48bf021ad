"""Zigzag context parallelism: rank r of R holds the slices r and 2 R - 1 - r of 2 R equal slices of a pack.

A causal query attends to all tokens of its sequence before it. In one long sequence a late slice therefore
costs more than an early one, and the two slices of each rank together cost the same.
"""

import torch
from torch import Tensor


def spans_of_rank(total: int, rank: int, ranks: int) -> list[tuple[int, int]]:
    """Spans [start, end) of this rank in a pack: two, or one where its slices are neighbours.

    `total`, the tokens of the pack, is a multiple of 2 R unless R = 1.
    """
    assert ranks == 1 or total % (2 * ranks) == 0
    late = 2 * ranks - 1 - rank
    first, second = ((i * total // (2 * ranks), (i + 1) * total // (2 * ranks)) for i in (rank, late))
    return [(first[0], second[1])] if first[1] == second[0] else [first, second]


def take(x: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """Entries [T/R, ...] of a rank's spans, of x [T, ...] in the order of the pack."""
    parts = [x[start:end] for start, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def in_pack_order(x: Tensor, ranks: int) -> Tensor:
    """Reorder x [T, ...] from the entries of ranks 0, 1, ... end to end to the order of the pack."""
    slices = x.chunk(2 * ranks)
    return torch.cat([*slices[::2], *slices[::-2]])
