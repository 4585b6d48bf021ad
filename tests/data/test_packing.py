"""Global batches, micro-batches and packs: order, sizes, places.

With the tiny tokenizer a token is a byte; 257, 258 are <|im_start|> (BOS) and <|im_end|> (EOS).
"""

import random

import numpy as np
import pytest
import torch

from align.data import formats, packing
from align.errors import UserError
from tests.support.rows import chat


def test_check_size():
    packing.check_size(8, 8, "--train-data")
    with pytest.raises(UserError, match="--train-data has 7 usable rows.*--global-batch-size 8"):
        packing.check_size(7, 8, "--train-data")


def test_check_budget():
    def budget(tokens: int) -> packing.BatchConfig:
        return packing.BatchConfig(micro_batch_tokens=tokens)

    packing.check_budget(512, budget(512), 512)
    packing.check_budget(256, budget(512), 512, per_row=2)
    with pytest.raises(UserError, match="--max-seq-len 513 is beyond the model's context of 512"):
        packing.check_budget(513, budget(1024), 512)
    with pytest.raises(UserError, match="--max-seq-len 512 is above --micro-batch-tokens 511"):
        packing.check_budget(512, budget(511), 1024)
    with pytest.raises(UserError, match="257, of which a row has 2, is above --micro-batch-tokens 512"):
        packing.check_budget(257, budget(512), 1024, per_row=2)


def test_global_batch_is_a_permutation_per_epoch():
    epochs = [
        [packing.global_batch(23, 4, seed=7, step=5 * epoch + i) for i in range(5)] for epoch in range(3)
    ]
    for batches in epochs:
        rows = [row for batch in batches for row in batch]
        assert len(set(rows)) == 20 and set(rows) <= set(range(23))  # the tail of 3 is left out
        assert [len(batch) for batch in batches] == [4] * 5
    assert epochs[0] != epochs[1] != epochs[2]
    left_out = [set(range(23)) - {row for batch in batches for row in batch} for batches in epochs]
    assert left_out[0] != left_out[1]  # another tail each time


def test_global_batch_depends_on_its_arguments_alone():
    forward = [packing.global_batch(100, 8, seed=1, step=step) for step in range(40)]
    backward = [packing.global_batch(100, 8, seed=1, step=step) for step in reversed(range(40))]
    assert forward == backward[::-1]
    assert forward != [packing.global_batch(100, 8, seed=2, step=step) for step in range(40)]
    assert all(type(row) is int for row in forward[0])
    assert packing.global_batch(5, 5, seed=0, step=3) != packing.global_batch(5, 5, seed=0, step=4)


def test_plan_by_hand():
    # 8 + 2, 5 + 5: two micro-batches of 10 hold all; each of two ranks gets one
    assert packing.plan_micro_batches([5, 8, 5, 2], ranks=2, max_tokens=10, max_rows=None) == [
        [[1, 3]],
        [[0, 2]],
    ]
    assert packing.plan_micro_batches([5, 8, 5, 2], ranks=1, max_tokens=10, max_rows=None) == [
        [[1, 3], [0, 2]]
    ]
    assert packing.plan_micro_batches([5, 8, 5, 2], ranks=1, max_tokens=20, max_rows=None) == [[[0, 1, 2, 3]]]
    # 19 tokens would fit twice into 10, these four rows do not
    assert packing.plan_micro_batches([7, 4, 4, 4], ranks=1, max_tokens=10, max_rows=None) == [
        [[1, 3], [0], [2]]
    ]
    assert packing.plan_micro_batches([7, 4, 4], ranks=1, max_tokens=10, max_rows=None, multiple=4) == [
        [[0], [1], [2], []]
    ]
    assert packing.plan_micro_batches([3], ranks=2, max_tokens=10, max_rows=None) == [[[0]], [[]]]
    assert packing.plan_micro_batches([], ranks=2, max_tokens=10, max_rows=None) == [[[]], [[]]]


@pytest.mark.parametrize("seed", range(40))
def test_plan_properties(seed: int):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 300) for _ in range(rng.randint(1, 80))]
    ranks, max_tokens = rng.randint(1, 5), rng.randint(300, 1200)
    max_rows = rng.choice([None, 1, 3])
    planned = packing.plan_micro_batches(lengths, ranks, max_tokens, max_rows)
    micro_batches = [rows for rank in planned for rows in rank]
    assert sorted(row for rows in micro_batches for row in rows) == list(range(len(lengths)))
    assert all(rows == sorted(rows) for rows in micro_batches)
    assert all(sum(lengths[row] for row in rows) <= max_tokens for rows in micro_batches)
    assert all(len(rows) <= (max_rows or len(lengths)) for rows in micro_batches)
    assert len(planned) == ranks and len({len(rank) for rank in planned}) == 1
    assert planned == packing.plan_micro_batches(lengths, ranks, max_tokens, max_rows)
    loads = [sum(lengths[row] for rows in rank for row in rows) for rank in planned]
    assert max(loads) - min(loads) <= max(lengths)


@pytest.mark.parametrize("seed", range(20))
def test_plan_needs_few_and_even_micro_batches(seed: int):
    rng = random.Random(seed)
    lengths = [rng.randint(20, 250) for _ in range(128)]
    planned = packing.plan_micro_batches(lengths, ranks=4, max_tokens=1024, max_rows=None)
    least = -(-sum(lengths) // (4 * 1024))
    assert least <= len(planned[0]) <= least + 1
    loads = [sum(lengths[row] for row in rows) for rank in planned for rows in rank]
    assert max(loads) <= 1.1 * sum(loads) / len(loads)


def test_plan_refuses_a_row_above_the_budget():
    with pytest.raises(UserError, match="--micro-batch-tokens 10 is too few for a row of 11"):
        packing.plan_micro_batches([3, 11], ranks=2, max_tokens=10, max_rows=None)


def make_example(ids: list[int], trained: list[int]) -> packing.Example:
    return packing.Example(np.array(ids, np.int32), np.array(trained, bool))


def test_collate_by_hand():
    examples = [make_example([5, 6, 7, 8], [0, 0, 1, 1]), make_example([9, 10, 11], [0, 1, 0])]
    batch = packing.collate([[row] for row in examples], multiple=4)
    assert batch.tokens.tolist() == [5, 6, 7, 9, 10, 0, 0, 0]
    assert batch.targets.tolist() == [6, 7, 8, 10, 11, 0, 0, 0]
    assert batch.mask.tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch.trained.tolist() == np.flatnonzero(batch.is_trained).tolist() == [1, 2, 3]
    assert batch.lengths == [3, 2] == [row.num_inputs for row in examples]
    tensors = batch.tokens, batch.targets, batch.mask, batch.positions, batch.trained
    assert [x.dtype for x in tensors] == [torch.int64, torch.int64, torch.float32, torch.int64, torch.int64]


def test_collate_pads_only_where_it_must():
    row = make_example([1, 2, 3, 4, 5], [0, 1, 1, 1, 1])
    assert len(packing.collate([[row]]).tokens) == 4
    assert len(packing.collate([[row]], multiple=4).tokens) == 4
    assert len(packing.collate([[row]], multiple=3).tokens) == 6


def test_collate_of_nothing_is_padding():
    batch = packing.collate([], multiple=8)
    assert batch.tokens.tolist() == [0] * 8
    assert batch.positions.tolist() == list(range(8))
    assert batch.mask.sum() == 0
    assert (batch.trained.tolist(), batch.lengths) == ([], [])
    assert len(packing.collate([]).tokens) == 1


def test_collate_keeps_every_trained_token(tiny):
    rows = [
        formats.format_sft(chat("a" * n, "b" * (2 * n)), tiny, formats.FormatConfig())[0] for n in range(1, 9)
    ]
    batch = packing.collate([[row] for row in rows], multiple=64)
    assert batch.mask.sum() == packing.num_trained(rows) == sum(2 * n + 1 for n in range(1, 9))
    expected = [token for row in rows for token in row.ids[row.trained].tolist()]
    assert batch.targets[batch.trained].tolist() == batch.targets[batch.mask > 0].tolist() == expected


def test_collate_shares_the_common_beginning():
    """By hand: the second answer repeats the prompt's last token, which has another target there."""
    first = make_example([5, 6, 7, 8, 9], [0, 0, 0, 1, 1])
    second = make_example([5, 6, 7, 10, 11, 12], [0, 0, 0, 1, 1, 1])
    other = make_example([5, 6], [0, 1])  # a row of its own
    batch = packing.collate([[first, second], [other]], multiple=5)
    assert batch.tokens.tolist() == [5, 6, 7, 8, 7, 10, 11, 5, 0, 0]
    assert batch.targets.tolist() == [6, 7, 8, 9, 10, 11, 12, 6, 0, 0]
    assert batch.mask.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2, 3, 4, 0, 0, 1]
    assert batch.lengths == [4, 3, 1]
    assert batch.prefixes == [(0, 0), (0, 2), (7, 0)]
    assert packing.num_places([first, second]) == 7


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        (([1, 2, 3, 4], [0, 0, 1, 1]), ([1, 2, 5, 6], [0, 0, 1, 1]), 1),
        (([1, 2, 3, 4], [0, 0, 1, 1]), ([1, 2, 3, 6], [0, 0, 1, 1]), 1),  # 3 is trained: it stays its own
        (([1, 2, 3, 4], [0, 0, 0, 1]), ([1, 2, 3, 6], [0, 0, 0, 1]), 2),
        (
            ([1, 2, 3, 0], [0, 0, 0, 1]),
            ([1, 2, 3, 9, 0], [0, 0, 0, 0, 1]),
            3,
        ),  # scored: one continues the other
        (([1, 2, 3, 9, 0], [0, 0, 0, 0, 1]), ([1, 2, 3, 0], [0, 0, 0, 1]), 2),  # its score is its own
        (([1, 2], [0, 1]), ([3, 2], [0, 1]), 0),
        (([1, 2], [0, 1]), ([1, 3], [0, 1]), 0),
    ],
)
def test_shared_places(first, second, shared):
    assert packing.shared_places([make_example(*first), make_example(*second)]) == [0, shared]


def test_batch_moves():
    batch = packing.collate([[make_example([1, 2, 3], [0, 1, 1])]]).to("meta")
    assert all(x.is_meta for x in (batch.tokens, batch.targets, batch.mask, batch.positions, batch.trained))
    assert batch.lengths == [2] and batch.is_trained.tolist() == [True, True]
