"""Examples to packed micro-batches: data order, packing plan, and the one token shift.

`Batch` is the batch layout of the whole project.
"""

import functools
import heapq
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from align.errors import UserError
from align.flags import COUNT, check_ranges


@dataclass(frozen=True)
class BatchConfig:
    """Sizes of an optimizer step and of a forward pass."""

    global_batch_size: int = 32
    """rows (sequences, pairs or prompts) per optimizer step, over all ranks"""
    micro_batch_tokens: int = 4096
    """token budget of a micro-batch: most tokens in one forward pass of a rank; sequences are packed up to
    it"""
    micro_batch_size: int | None = None
    """most rows in one micro-batch (default: as many as fit)"""

    def __post_init__(self):
        check_ranges(self, global_batch_size=COUNT, micro_batch_tokens=COUNT, micro_batch_size=COUNT)


@dataclass(frozen=True, eq=False)
class Example:
    """One row as tokens. `trained[i]`: token i is a target of the loss; never the first."""

    ids: np.ndarray  # [n] int32
    trained: np.ndarray  # [n] bool

    @property
    def num_inputs(self) -> int:
        """Input tokens: all but the last."""
        return len(self.ids) - 1

    def __reduce__(self) -> tuple:
        """Pickle the bytes of both arrays: stored rows take a tenth of the time of numpy's pickles."""
        assert self.ids.dtype == np.int32 and self.trained.dtype == np.bool_
        return example_of, (self.ids.tobytes(), self.trained.tobytes())


def example_of(ids: bytes, trained: bytes) -> Example:
    """An example of read-only arrays."""
    return Example(np.frombuffer(ids, np.int32), np.frombuffer(trained, bool))


def num_trained(examples: Sequence[Example]) -> int:
    """Trained tokens of some examples: the denominator of their loss."""
    return sum(int(example.trained.sum()) for example in examples)


def check_budget(max_seq_len: int, config: BatchConfig, max_positions: int, per_row: int = 1) -> None:
    """Raise UserError if a row (of `per_row` sequences) may exceed a micro-batch or the model's context."""
    flag, budget = f"--max-seq-len {max_seq_len}", f"--micro-batch-tokens {config.micro_batch_tokens}"
    if max_seq_len > max_positions:
        raise UserError(f"{flag} is beyond the model's context of {max_positions} tokens")
    if per_row * max_seq_len > config.micro_batch_tokens:
        times = "" if per_row == 1 else f", of which a row has {per_row},"
        raise UserError(f"{flag}{times} is above {budget}: raise that")


class HasIds(Protocol):
    """An Example or a Prompt."""

    @property
    def ids(self) -> np.ndarray: ...


def check_ids(sequences: Iterable[HasIds], vocab_size: int) -> None:
    """Raise UserError if a token id is beyond the model's vocabulary: the tokenizer is another model's."""
    largest = max(int(sequence.ids.max()) for sequence in sequences)
    if largest >= vocab_size:
        sizes = f"the tokenizer gives token {largest}, the model has {vocab_size}"
        raise UserError(f"{sizes}: --model holds the tokenizer of another model")


def check_size(num_rows: int, needed: int, flag: str, needed_flag: str = "--global-batch-size") -> None:
    """Raise UserError if the data of `flag` (such as --train-data) has fewer rows than one step takes."""
    if num_rows < needed:
        rule = f"give more rows or lower {needed_flag} {needed}"
        raise UserError(f"{flag} has {num_rows} usable rows, fewer than one step takes: {rule}")


def global_batch(num_rows: int, size: int, seed: int, step: int) -> list[int]:
    """Row numbers of step `step` (from 0): a new order each epoch; rows that fill no batch are left out.

    A function of its arguments alone, so a resumed run takes the same rows.
    """
    epoch, batch = divmod(step, num_rows // size)
    return epoch_order(num_rows, seed, epoch)[batch * size : (batch + 1) * size].tolist()


def data_order(rows: Iterable[Sequence[np.ndarray]], rows_per_step: int, seed: int) -> dict[str, int]:
    """Identity of the data order: equal identities give equal rows in every step of `global_batch`.

    `rows`: the token ids of each training row's sequences.
    """
    count, crc = 0, 0
    for row in rows:
        count += 1
        for ids in row:
            crc = zlib.crc32(ids.tobytes(), zlib.crc32(len(ids).to_bytes(4, "little"), crc))
    return {"rows": count, "token_ids_crc32": crc, "rows_per_step": rows_per_step, "seed": seed}


@functools.lru_cache(maxsize=2)
def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation [num_rows] of the rows in one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def plan_micro_batches(
    lengths: list[int], ranks: int, max_tokens: int, max_rows: int | None, multiple: int = 1
) -> list[list[list[int]]]:
    """Deal rows to ranks and micro-batches: `[rank][micro-batch]` -> positions in `lengths`, ascending.

    `lengths`: places of each row (`num_places`). A micro-batch holds at most `max_tokens` places and
    `max_rows` rows; UserError for a row above. All ranks get the same number of micro-batches, a `multiple`,
    the fewest of the longest-first rule, of about equal load; some are empty if rows are few. Deterministic.
    """
    if (longest := max(lengths, default=0)) > max_tokens:
        flag = f"--micro-batch-tokens {max_tokens}"
        raise UserError(f"{flag} is too few for a row of {longest}: raise it or lower --max-seq-len")
    max_rows = max_rows or len(lengths)
    count = max(1, -(-sum(lengths) // (ranks * max_tokens)), -(-len(lengths) // max(1, ranks * max_rows)))
    count += -count % multiple
    while (bins := fill_bins(lengths, ranks * count, max_tokens, max_rows)) is None:
        count += multiple
    loads = [sum(lengths[row] for row in rows) for rows in bins]
    dealt = fill_bins(loads, ranks, sum(loads), count)
    assert dealt is not None  # there is room for all in one bin
    return [[sorted(bins[b]) for b in rank] for rank in dealt]


def fill_bins(sizes: list[int], num_bins: int, max_size: int, max_items: int) -> list[list[int]] | None:
    """Place items, largest first, each into the emptiest bin with room for one; None if one does not fit."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, b) for b in range(num_bins)]
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, b = heapq.heappop(heap)
        if load + sizes[item] > max_size:
            return None
        bins[b].append(item)
        if len(bins[b]) < max_items:
            heapq.heappush(heap, (load + sizes[item], b))
    return bins


def group_by_budget(sizes: Sequence[int], budget: int) -> list[range]:
    """Group neighbours with a sum of sizes up to `budget`; a larger item is a group of its own."""
    runs, start = [], 0
    for end in range(1, len(sizes) + 1):
        if end == len(sizes) or sum(sizes[start : end + 1]) > budget:
            runs.append(range(start, end))
            start = end
    return runs


@dataclass(frozen=True, eq=False)
class Batch:
    """One packed micro-batch, the only batch layout of the project.

    N sequences lie end to end and never attend to each other; the last of the T places may be padding, which
    belongs to no sequence and is masked. Index t of mask, log-probs, values, rewards and advantages means the
    prediction of `targets[t]` from the tokens of its sequence up to `tokens[t]`. A sequence of n ids takes
    n - 1 places: the last id is a target only, the first an input only. This shift happens in `collate`,
    nowhere else.

    Sequences with a common beginning, such as two responses to a prompt, may share its places: the first
    holds them, the others attend to them as their `prefix` and take places for the rest only.
    """

    tokens: torch.Tensor  # [T] int64, inputs
    targets: torch.Tensor  # [T] int64, the token after each input
    mask: torch.Tensor  # [T] float32, 1 where the target is trained
    positions: torch.Tensor  # [T] int64, 0, 1, 2, ... in each sequence
    trained: torch.Tensor  # [n] int64, the places where the mask is 1: mask.nonzero() would wait for the GPU
    is_trained: np.ndarray  # [T] bool, the mask on the host
    lengths: list[int]  # [N], the lengths of the sequences, on the host
    # [N], (start, size) of the places that a sequence continues; size 0: none
    prefixes: list[tuple[int, int]]
    extra: dict[str, torch.Tensor] = field(default_factory=dict)  # other inputs of the loss, by name

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        names = ("tokens", "targets", "mask", "positions", "trained")
        moved: dict[str, Any] = {name: to_device(getattr(self, name), device) for name in names}
        return replace(self, extra={name: to_device(x, device) for name, x in self.extra.items()}, **moved)


def to_device(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a tensor of the host, to a GPU asynchronously: waiting would empty its queue."""
    if torch.device(device).type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def shared_places(row: Sequence[Example]) -> list[int]:
    """Number of places that each example of a row can share with the first.

    The places of their common beginning, up to the first that the example trains: a place has one mask and
    one target, so a trained place must be the example's own.
    """
    shared, first = [0], row[0].ids
    for example in row[1:]:
        places = min(len(first), len(example.ids)) - 1
        is_equal = np.append(first[:places] == example.ids[:places], False)
        untrained = np.append(~example.trained[1:], False)
        shared.append(int(min(is_equal.argmin(), untrained.argmin())))
    return shared


def num_places(row: Sequence[Example]) -> int:
    """Places of a row of examples in a batch, shared beginnings counted once."""
    return sum(example.num_inputs for example in row) - sum(shared_places(row))


def collate(rows: Sequence[Sequence[Example]], multiple: int = 1) -> Batch:
    """Shift and pack rows of examples; those of a row share their beginning. T is a multiple of `multiple`.

    Without examples T padding tokens: a rank without rows still takes part in collectives.
    """
    examples = [example for row in rows for example in row]
    skipped = [size for row in rows for size in shared_places(row)]
    lengths = [example.num_inputs - size for example, size in zip(examples, skipped, strict=True)]
    total = sum(lengths)
    padded = max(1, -(-total // multiple)) * multiple
    tokens, targets, positions = (np.zeros(padded, dtype=np.int64) for _ in range(3))
    mask = np.zeros(padded, dtype=np.float32)
    ends = np.cumsum([0, *lengths])
    for example, skip, start, end in zip(examples, skipped, ends, ends[1:], strict=False):
        tokens[start:end] = example.ids[skip:-1]
        targets[start:end] = example.ids[skip + 1 :]
        mask[start:end] = example.trained[skip + 1 :]
        positions[start:end] = np.arange(skip, skip + end - start)
    positions[total:] = np.arange(padded - total)
    firsts = np.cumsum([0, *map(len, rows)])[:-1].repeat([len(row) for row in rows])  # of each example's row
    prefixes = [(int(ends[first]), size) for first, size in zip(firsts, skipped, strict=True)]
    is_trained = mask > 0
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        mask=torch.from_numpy(mask),
        positions=torch.from_numpy(positions),
        trained=torch.from_numpy(is_trained.nonzero()[0]),
        is_trained=is_trained,
        lengths=lengths,
        prefixes=prefixes,
    )
