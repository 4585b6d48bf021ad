"""Attention over a pack against one dense masked softmax in float64."""

import sys

import pytest
import torch
from torch import Tensor

from align.data import context_slices
from align.distributed import parallel
from align.errors import UserError
from align.model import architecture, attention, spec
from align.model.config import ModelConfig
from tests.support import stand_ins
from tests.support.packed_attention import loops

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


def pack(
    lengths: list[int],
    prefixes: list[tuple[int, int]] | None = None,
    part: tuple[int, int] = (0, 1),
) -> attention.PackedAttentionParams:
    """These sequences end to end, without padding, as a context parallel rank sees them."""
    prefixes = prefixes or [(0, 0)] * len(lengths)
    return attention.packed_params(lengths, prefixes, sum(lengths), None, torch.device("cpu"), part)


@pytest.fixture(autouse=True)
def no_packages():
    """Forget stand-ins that a test imports, and the kernel that was chosen by them."""
    attention.flash_kernel.cache_clear()
    yield
    attention.flash_kernel.cache_clear()
    for package in ("flash_attn", "flash_attn_interface"):
        sys.modules.pop(package, None)


@pytest.fixture(params=["by_sequence", "torch's flash", "flash_attn"])
def kernel(request, monkeypatch) -> str:
    """All ways to compute attention, with stand-ins for a GPU's kernels."""
    if request.param != "by_sequence":
        monkeypatch.setattr(attention, "uses_flash", lambda *_: True)
        monkeypatch.setattr(attention, "varlen_attn", loops)
    if request.param == "flash_attn":
        without_varlen(monkeypatch)
    return request.param


def without_varlen(monkeypatch) -> None:
    """Pretend the torch that TensorRT-LLM requires, and flash-attn installed."""
    monkeypatch.setattr(attention, "KNOWN", frozenset())
    monkeypatch.setattr(attention, "varlen_attn", None)
    monkeypatch.setattr(sys, "meta_path", [stand_ins.StandIn("flash_attn"), *sys.meta_path])


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
def test_pack(lengths, window, groups, kernel):
    inputs, exact = tensors(12, groups), tensors(12, groups)
    out = core(window).within(*inputs, pack(lengths))
    same_with_gradients(out, dense(*exact, lengths, 0, window), inputs, exact)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 12])
@pytest.mark.parametrize("lengths", [[4, 6, 12, 2], [1, 0, 22, 1], [24]], ids=str)
def test_slices_of_a_pack_add_up_to_the_whole(ranks, window, lengths, kernel):
    """Context parallelism: a rank has some of the queries and all keys; sequences cross its borders."""
    inputs, exact = tensors(24, 2), tensors(24, 2)
    out = in_slices(core(window), *inputs, lengths, None, ranks)
    same_with_gradients(out, dense(*exact, lengths, 0, window), inputs, exact)


def in_slices(
    module: attention.TorchAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    prefixes: list[tuple[int, int]] | None,
    ranks: int,
) -> Tensor:
    """Outputs of all context parallel ranks in turn; gradients of gathered keys sum over ranks."""
    spans = [context_slices.spans_of_rank(len(query), rank, ranks) for rank in range(ranks)]
    queries, *gathered = ([context_slices.take(x, own) for own in spans] for x in (query, key, value))
    key, value = (torch.cat(parts) for parts in gathered)
    outputs = [
        module.within(x, key, value, pack(lengths, prefixes, (rank, ranks))) for rank, x in enumerate(queries)
    ]
    return context_slices.in_pack_order(torch.cat(outputs), ranks)


def same_with_gradients(out: Tensor, expected: Tensor, inputs: list[Tensor], exact: list[Tensor]) -> None:
    """Values, and the gradients of `found` and `exact` for some gradient of the values."""
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).double()
    out.backward(grad)
    expected.backward(grad)
    for ours, theirs in zip(inputs, exact, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_queries_at_the_end_of_a_longer_text():
    """attend() takes the last m of n positions, as a later slice (or a cache) needs."""
    query, key, value = tensors(9, 2)
    out = attention.attend(query[6:], key, value, core().scale, None)
    torch.testing.assert_close(out, dense(query, key, value, [9], 0, None)[6:], rtol=1e-4, atol=1e-5)


def test_a_sequence_does_not_feel_its_neighbours():
    query, key, value = tensors(9, 2)
    alone = core().by_sequence(query[4:7], key[4:7], value[4:7], pack([3]))
    packed = core().by_sequence(query, key, value, pack([4, 3, 2]))[4:7]
    assert torch.equal(alone, packed)


def test_bf16_in_bf16_out():
    inputs = [x.detach().bfloat16() for x in tensors(12, 2)]
    out = core().by_sequence(*inputs, pack([7, 5]))
    assert out.dtype == torch.bfloat16
    expected = dense(*(x.double() for x in inputs), [7, 5], 0, None)
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-6)


def test_describe_makes_padding_a_sequence_of_its_own():
    lengths = [5, 3]
    packing = attention.packed_params(lengths, [(0, 0), (0, 0)], 12, None, torch.device("cpu"))
    assert packing.lengths == [5, 3, 4] and packing.max_seqlen_q == 5
    assert packing.cu_seqlens_q.tolist() == [0, 5, 8, 12]
    assert packing.cu_seqlens_q.dtype == torch.int32
    assert lengths == [5, 3]  # the batch's own list
    assert pack(lengths).lengths == [5, 3] and pack(lengths).keys is None
    assert attention.packed_params([], [], 2, None, torch.device("cpu")).cu_seqlens_q.tolist() == [0, 2]


def test_describe_prefixes_by_hand():
    """b continues a's first two places, d the whole of c."""
    packing = attention.packed_params(
        [3, 2, 1, 1], [(0, 0), (0, 2), (0, 0), (5, 1)], 8, None, torch.device("cpu")
    )
    assert packing.lengths == [3, 2, 1, 1, 1] and packing.seen == [3, 4, 1, 2, 1]
    assert packing.keys.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 5, 6, 7]
    assert packing.cu_seqlens_q.tolist() == [0, 3, 5, 6, 7, 8]
    assert packing.cu_seqlens_kv.tolist() == [0, 3, 7, 8, 10, 11]
    assert (packing.max_seqlen_q, packing.max_seqlen_kv) == (3, 4)


def test_describe_a_ranks_part_by_hand():
    """Sequences abc and defgh, and padding ijkl, on three ranks, which have ab kl, cd ij and ef gh."""
    parts = [
        attention.packed_params([3, 5], [(0, 0)] * 2, 12, None, torch.device("cpu"), (r, 3)) for r in range(3)
    ]
    assert [part.lengths for part in parts] == [[2, 2], [1, 1, 2], [2, 2]]  # ab kl, c d ij, ef gh
    assert [part.seen for part in parts] == [[2, 4], [3, 1, 2], [3, 5]]  # ab ijkl, abc d ij, def defgh
    gathered = "abklcdijefgh"  # keys by rank
    keys = ["".join(gathered[i] for i in part.keys) for part in parts]
    assert keys == ["abijkl", "abcdij", "defdefgh"]
    assert [part.cu_seqlens_q.tolist() for part in parts] == [[0, 2, 4], [0, 1, 2, 4], [0, 2, 4]]
    assert [part.cu_seqlens_kv.tolist() for part in parts] == [[0, 2, 6], [0, 3, 4, 6], [0, 3, 8]]
    assert [(part.max_seqlen_q, part.max_seqlen_kv) for part in parts] == [(2, 4), (2, 3), (2, 5)]


def test_describe_one_sequence_on_two_ranks_by_hand():
    """abcdefgh: the first rank has ab and gh, the second cd and ef; both pieces see ab."""
    first, second = (pack([8], None, (rank, 2)) for rank in range(2))
    assert (first.lengths, first.seen) == ([2, 2], [2, 8])
    assert first.keys.tolist() == [0, 1, 0, 1, 4, 5, 6, 7, 2, 3]  # of abghcdef: ab abcdefgh
    assert (second.lengths, second.seen) == ([2, 2], [4, 6])
    assert second.keys.tolist() == [0, 1, 4, 5, 0, 1, 4, 5, 6, 7]  # abcd abcdef


def test_describe_prefixes_of_a_ranks_part_by_hand():
    """Sequences abcd and efgh, which continues ab: a rank with f sees ab ef."""
    first, second = (pack([4, 4], [(0, 0), (0, 2)], (rank, 2)) for rank in range(2))
    gathered = "abghcdef"
    assert (first.lengths, first.seen) == ([2, 2], [2, 6])
    assert "".join(gathered[i] for i in first.keys) == "ababefgh"
    assert (second.lengths, second.seen) == ([2, 2], [4, 4])
    assert "".join(gathered[i] for i in second.keys) == "abcdabef"


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_have_equal_shares_of_a_long_sequence(ranks):
    """Pairs of a query and a key that it sees; contiguous slices: the last rank has nearly twice the mean."""
    parts = [pack([64 * ranks], None, (rank, ranks)) for rank in range(ranks)]
    pairs = [
        sum(n * (n + 1) // 2 - (n - m) * (n - m + 1) // 2 for m, n in zip(x.lengths, x.seen, strict=True))
        for x in parts
    ]
    assert pairs == [64 * (64 * ranks + 1) // 2] * ranks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_flash_is_for_half_precision_on_gpus(dtype, monkeypatch):
    half = dtype != torch.float32
    monkeypatch.setattr(attention, "flash_kernel", lambda: "flash attention")
    assert [attention.uses_flash(dtype, d, cuda=True) for d in (8, 20, 64, 128, 256, 264)] == [
        *[half, False, half, half, half, False]
    ]
    assert not attention.uses_flash(dtype, 64, cuda=False)
    monkeypatch.setattr(attention, "flash_kernel", lambda: None)
    assert not attention.uses_flash(dtype, 64, cuda=True)


@pytest.fixture
def on_gpu(monkeypatch):
    """Pretend a GPU of a compute capability, for which no kernel has been chosen."""

    def pretend(*capability: int) -> None:
        attention.flash_kernel.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return pretend


def test_flash_attention_3_is_activated_once_on_hopper(on_gpu, monkeypatch):
    """By torch's own function, with a stand-in for the package."""
    on_gpu(9, 0)
    assert attention.flash_kernel() == "flash attention"  # not installed
    monkeypatch.setattr(sys, "meta_path", [stand_ins.StandIn("flash_attn_interface"), *sys.meta_path])
    activate, activated = torch.nn.attention.activate_flash_attention_impl, []
    monkeypatch.setattr(
        torch.nn.attention,
        "activate_flash_attention_impl",
        lambda name: (activated.append(name), activate(name)),
    )
    on_gpu(8, 0)
    assert attention.flash_kernel() == "flash attention" and not activated
    on_gpu(9, 0)
    try:
        assert [attention.flash_kernel() for _ in range(3)] == ["FlashAttention 3"] * 3
        assert attention.uses_flash(torch.bfloat16, 64, cuda=True)
        assert activated == ["FA3"] == [torch.nn.attention.current_flash_attention_impl()]
    finally:
        torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)


def test_flash_attn_is_for_a_torch_without_varlen_attn(on_gpu, monkeypatch):
    on_gpu(9, 0)
    monkeypatch.setattr(attention, "KNOWN", frozenset({"query", "key"}))
    assert attention.flash_kernel() is None and not attention.uses_flash(torch.bfloat16, 64, cuda=True)
    on_gpu(8, 0)
    without_varlen(monkeypatch)
    assert attention.flash_kernel() == "flash-attn 2.8.3"
    assert attention.uses_flash(torch.bfloat16, 64, cuda=True)


@pytest.mark.parametrize("package", ["flash_attn_interface", "flash_attn"])
def test_a_package_that_fails_is_an_error_in_one_line(package, on_gpu, monkeypatch, tmp_path):
    on_gpu(9, 0)
    (tmp_path / f"{package}.py").write_text("raise ImportError('undefined symbol:\\n_ZN2at')")
    monkeypatch.syspath_prepend(tmp_path)
    if package == "flash_attn":
        monkeypatch.setattr(attention, "KNOWN", frozenset())
    message = f"^{package} is installed and fails: undefined symbol: _ZN2at. Mend or uninstall it$"
    with pytest.raises(UserError, match=message):
        attention.uses_flash(torch.bfloat16, 64, cuda=True)


def test_the_kernel_is_called_as_this_torch_declares_it():
    """varlen_attn itself, as far as a CPU goes: to the dispatch of its kernel."""
    query, key, value = (x.detach().bfloat16() for x in tensors(6, 2))
    ends = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
        attention.flash(query, key, value, ends, ends, 6, 6, 1.0, 3)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_shared_prefix_is_as_good_as_a_copy(ranks, window, kernel):
    """Sequences abcde, abcxy, and fgh, fz: the second of each continues the first."""
    unshared = [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 7, 10, 11]  # place of each token in the shared pack
    sequences = [5, 2, 3, 1, 1], [(0, 0), (0, 3), (0, 0), (7, 1), (0, 0)]
    own = [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 14, 15]  # where those places are in the unshared one
    inputs, exact = tensors(12, 2), tensors(12, 2)
    expected = dense(*(x[unshared] for x in exact), [5, 5, 3, 2, 1], 0, window)[own]
    same_with_gradients(in_slices(core(window), *inputs, *sequences, ranks), expected, inputs, exact)


def test_window_is_told_to_megatron_without_the_token_itself():
    """Hugging Face's window counts the token itself, Megatron's counts those before it."""
    arch = architecture.Architecture(
        *("mistral", 64, 32, 48, 2, HEADS, 2, DIM, 1e-5, 0.02, 128, False, False, False),
        window=7,
        rope=(("rope_theta", 1e4),),
    )
    config = spec.transformer_config(arch, ModelConfig(), parallel.ParallelConfig(), te=False)
    assert config.window_size == (6, 0)
