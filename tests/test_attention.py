"""Attention over a pack against one dense masked softmax in float64."""

import pytest
import torch
from torch import Tensor

from align import architecture, attention, model, parallel

HEADS, DIM = 4, 8


def core(window: int | None = None) -> attention.TorchAttention:
    """The module without the parts that need process groups."""
    module = object.__new__(attention.TorchAttention)
    torch.nn.Module.__init__(module)
    module.scale, module.window = DIM**-0.5, window
    return module


def tensors(tokens: int, groups: int, seed: int = 0) -> list[Tensor]:
    """query [T, heads, d], key and value [T, groups, d], float64 (float32's values), with gradients."""
    torch.manual_seed(seed)
    shapes = (tokens, HEADS, DIM), (tokens, groups, DIM), (tokens, groups, DIM)
    return [torch.randn(shape).double().requires_grad_() for shape in shapes]


def pack(lengths: list[int], prefixes: list[tuple[int, int]] | None = None) -> attention.Packing:
    """These sequences end to end, without padding."""
    prefixes = prefixes or [(0, 0)] * len(lengths)
    return attention.describe(lengths, prefixes, sum(lengths), None, torch.device("cpu"))


def dense(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], start: int, window: int | None
) -> Tensor:
    """softmax over a [queries, T] matrix of scores with everything masked that a query must not see."""
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    place = torch.arange(len(key))
    rows = slice(start, start + len(query))
    distance = place[rows, None] - place
    seen = (owner[rows, None] == owner) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    key, value = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * DIM**-0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("lengths", [[12], [5, 1, 6], [1, 1, 10], [0, 7, 0, 5]], ids=str)
def test_pack(lengths, window, groups):
    found, exact = tensors(12, groups), tensors(12, groups)
    grad = torch.randn(12, HEADS, DIM).double()
    out = core(window).by_sequence(*found, pack(lengths), 0)
    expected = dense(*exact, lengths, 0, window)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    out.backward(grad)
    expected.backward(grad)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_slices_of_a_pack_add_up_to_the_whole(ranks, window):
    """Context parallelism: a rank has some of the queries and all keys; sequences cross its borders."""
    lengths = [2, 3, 6, 1]
    query, key, value = tensors(12, 2)
    expected = dense(query, key, value, lengths, 0, window)
    size = 12 // ranks
    for start in range(0, 12, size):
        mine = query[start : start + size]
        out = core(window).by_sequence(mine, key, value, pack(lengths), start)
        torch.testing.assert_close(out, expected[start : start + size], rtol=1e-4, atol=1e-5)


def test_queries_at_the_end_of_a_longer_text():
    """attend() takes the last m of n positions, as a later slice (or a cache) needs."""
    query, key, value = tensors(9, 2)
    out = attention.attend(query[6:], key, value, core().scale, None)
    torch.testing.assert_close(out, dense(query, key, value, [9], 0, None)[6:], rtol=1e-4, atol=1e-5)


def test_a_sequence_does_not_feel_its_neighbours():
    query, key, value = tensors(9, 2)
    alone = core().by_sequence(query[4:7], key[4:7], value[4:7], pack([3]), 0)
    packed = core().by_sequence(query, key, value, pack([4, 3, 2]), 0)[4:7]
    assert torch.equal(alone, packed)


def test_bf16_in_bf16_out():
    found = [x.detach().bfloat16() for x in tensors(12, 2)]
    out = core().by_sequence(*found, pack([7, 5]), 0)
    assert out.dtype == torch.bfloat16
    expected = dense(*(x.double() for x in found), [7, 5], 0, None)
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-6)


def test_describe_makes_padding_a_sequence_of_its_own():
    lengths = [5, 3]
    packing = attention.describe(lengths, [(0, 0), (0, 0)], 12, None, torch.device("cpu"))
    assert packing.lengths == [5, 3, 4] and packing.max_seqlen_q == 5
    assert packing.cu_seqlens_q.tolist() == [0, 5, 8, 12]
    assert packing.cu_seqlens_q.dtype == torch.int32
    assert lengths == [5, 3]  # the batch's own list
    assert pack(lengths).lengths == [5, 3] and pack(lengths).keys is None
    assert attention.describe([], [], 2, None, torch.device("cpu")).cu_seqlens_q.tolist() == [0, 2]


def test_describe_prefixes_by_hand():
    """b continues a's first two places, d the whole of c."""
    packing = attention.describe([3, 2, 1, 1], [(0, 0), (0, 2), (0, 0), (5, 1)], 8, None, torch.device("cpu"))
    assert packing.lengths == [3, 2, 1, 1, 1] and packing.seen == [3, 4, 1, 2, 1]
    assert packing.keys.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 5, 6, 7]
    assert packing.cu_seqlens_q.tolist() == [0, 3, 5, 6, 7, 8]
    assert packing.cu_seqlens_kv.tolist() == [0, 3, 7, 8, 10, 11]
    assert (packing.max_seqlen_q, packing.max_seqlen_kv) == (3, 4)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shared_prefix_is_as_good_as_a_copy(ranks, window):
    """Sequences abcde, abcxy, and fgh, fz: the second of each continues the first."""
    unshared = [
        0,
        1,
        2,
        3,
        4,
        0,
        1,
        2,
        5,
        6,
        7,
        8,
        9,
        7,
        10,
        11,
    ]  # the place of each token in the shared pack
    sequences = pack([5, 2, 3, 1, 1], [(0, 0), (0, 3), (0, 0), (7, 1), (0, 0)])
    own = [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 14, 15]  # where those places are in the unshared one
    query, key, value = tensors(12, 2)
    exact = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    expected = dense(*(x[unshared] for x in exact), [5, 5, 3, 2, 1], 0, window)[own]
    size = 12 // ranks
    out = torch.cat(
        [
            core(window).by_sequence(
                query[a : a + size], key[sequences.keys], value[sequences.keys], sequences, a
            )
            for a in range(0, 12, size)
        ]
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    grad = torch.randn(12, HEADS, DIM).double()
    out.backward(grad)
    expected.backward(grad)
    for ours, theirs in zip((query, key, value), exact, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_window_is_told_to_megatron_without_the_token_itself():
    """Hugging Face's window counts the token itself, Megatron's counts those before it."""
    arch = architecture.Architecture(
        *("mistral", 64, 32, 48, 2, HEADS, 2, DIM, 1e-5, 0.02, 128, False, False, False),
        window=7,
        rope=(("rope_theta", 1e4),),
    )
    config = model.transformer_config(arch, model.ModelConfig(), parallel.ParallelConfig(), te=False)
    assert config.window_size == (6, 0)
