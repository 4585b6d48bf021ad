"""Log-probabilities and entropies against log_softmax in float64: values, gradients, split over ranks."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor

from align.kernels import fused
from align.kernels.matmul import linear
from align.model import logprobs
from align.model.logprobs import CHUNK, chunk_size, target_logprobs
from tests.support.launch import fork_ranks
from tests.support.layer_formulas import counting
from tests.support.logprob_formulas import ALONE, oracle, ours
from tests.workers.logprobs import (
    HIDDEN,
    PADDED,
    TEMPERATURES,
    VOCAB,
    entropy_grad,
    inputs,
    policy_loss,
)
from tools.conformance.rows import RANDOM

PLAIN = {name: getattr(logprobs, name) for name in ("row_max", "partial_sums_", "logits_grad_")}
"""Functions that are compiled on GPUs."""


@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("entropy", [False, True])
def test_values_and_gradients(tokens, temperature, entropy):
    *arguments, grad = inputs(tokens)
    arguments = *arguments, entropy_grad(tokens) if entropy else grad, VOCAB, temperature
    for actual, expected in zip(ours(*arguments), oracle(*arguments), strict=True):
        assert actual.dtype == torch.float32 and actual.shape == expected.shape
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_entropy_alone(temperature):
    """The log-prob's gradient is zero, and cannot hide an error of the entropy's; first larger than 1."""
    *arguments, _ = inputs(CHUNK + 1)
    grad = entropy_grad(CHUNK + 1) * torch.tensor([0.0, 1.0])
    for scale in (10.0, 0.01):
        case = *arguments, grad * scale, VOCAB, temperature
        for actual, expected in zip(ours(*case), oracle(*case), strict=True):
            error = (actual.double() - expected).norm()
            assert error < 1e-5 * expected.norm(), error / expected.norm()


def test_differences_of_the_entropy_are_its_gradient():
    """(H(x + d) - H(x - d)) / 2, of our own entropies in fp32, along a random direction d of both inputs."""
    hidden, weight, targets, _ = inputs(5)
    grad = torch.tensor([0.0, 1.0]).expand(5, 2)
    _, grad_hidden, grad_weight = ours(hidden, weight, targets, grad)
    d_hidden, d_weight = 1e-3 * inputs(5, seed=1)[0], 1e-3 * inputs(5, seed=1)[1]
    ends = [
        ours(hidden + sign * d_hidden, weight + sign * d_weight, targets, grad)[0][:, 1].sum()
        for sign in (1, -1)
    ]
    expected = (grad_hidden * d_hidden).sum() + (grad_weight * d_weight).sum()
    assert abs(expected) > 1e-3  # a hundred times the error
    torch.testing.assert_close((ends[0] - ends[1]) / 2, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_entropy_leaves_the_logprobs_their_bits(temperature):
    """Asked for or not, as long as it is not trained: the same log-probs and gradients."""
    *arguments, grad = inputs(CHUNK + 9)
    alone = ours(*arguments, grad, VOCAB, temperature)
    joint = ours(*arguments, torch.stack([grad, torch.zeros_like(grad)], 1), VOCAB, temperature)
    for actual, expected in zip((joint[0][:, 0], *joint[1:]), alone, strict=True):
        assert torch.equal(actual, expected)


def test_at_temperature_1_nothing_is_divided():
    """Bit for bit the plain formula on the logits as they are, without the probability of padding rows."""
    hidden, weight, targets, _ = inputs(64)  # so many need no padding, and the products are the same
    z = linear(hidden, weight)
    z[:, VOCAB:] = -math.inf
    top = z.amax(1)
    logsumexp = top + (z - top[:, None]).exp().sum(1).log()
    expected = z.gather(1, targets[:, None])[:, 0] - logsumexp
    assert torch.equal(target_logprobs(hidden, weight, targets, VOCAB, ALONE), expected)


def test_uniform_and_certain_distributions():
    """Equal logits have entropy log V, to the bit; one far above the others has entropy 0 and no gradient."""
    weight = torch.eye(PADDED)
    hidden = torch.stack([torch.zeros(PADDED), torch.full((PADDED,), 3.0), 1e4 * weight[5]])
    targets = torch.tensor([0, 7, 5])
    grad = torch.tensor([0.0, 1.0]).expand(3, 2)
    for temperature in TEMPERATURES:
        values, grad_hidden, grad_weight = ours(hidden, weight, targets, grad, VOCAB, temperature)
        log_v = torch.tensor(VOCAB).float().log()
        assert torch.equal(values[:, 1], torch.stack([log_v, log_v, torch.tensor(0.0)]))
        torch.testing.assert_close(values[:, 0], torch.tensor([-math.log(VOCAB)] * 2 + [0.0]))
        assert torch.equal(grad_hidden[2], torch.zeros(PADDED))
        torch.testing.assert_close(grad_hidden[:2], torch.zeros(2, PADDED), rtol=0, atol=1e-7)
        assert grad_weight.isfinite().all()


def test_by_hand():
    """Logits (0, log 3) give probabilities 1/4 and 3/4."""
    weight = torch.tensor([[0.0], [torch.tensor(3.0).log()]])
    values = target_logprobs(torch.ones(2, 1), weight, torch.tensor([0, 1]), 2, ALONE)
    torch.testing.assert_close(values.exp(), torch.tensor([0.25, 0.75]))


def test_by_hand_with_temperature_and_entropy():
    """The same logits over 1/2 are (0, log 9): 1/10 and 9/10, H = log 10 - 0.9 log 9."""
    weight = torch.tensor([[0.0], [torch.tensor(3.0).log()]])
    targets = torch.tensor([0, 1])
    values = target_logprobs(torch.ones(2, 1), weight, targets, 2, ALONE, 0.5, entropy=True)
    torch.testing.assert_close(values[:, 0].exp(), torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(values[:, 1], torch.full((2,), math.log(10) - 0.9 * math.log(9)))


def test_entropies_without_a_gradient():
    """They are the same, and the gradient is that of the log-probs alone, to the last bit."""

    def gradients(factor: torch.Tensor | None, **options: bool) -> tuple[torch.Tensor, ...]:
        """Entropies, and gradients of a sum over log-prob times entropy, or times the factor in its place."""
        hidden, weight, targets, grad = inputs(CHUNK + 9)
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        values = target_logprobs(hidden, weight, targets, VOCAB, ALONE, 0.7, **options)
        logprobs, entropies = values.unbind(1) if options else (values, factor)
        (grad * logprobs * entropies).sum().backward()
        return entropies.detach(), hidden.grad, weight.grad

    attached = gradients(None, entropy=True)
    detached = gradients(None, entropy=True, entropy_grad=False)
    alone = gradients(detached[0])
    assert all(map(torch.equal, detached, alone)) and torch.equal(attached[0], detached[0])
    assert not torch.allclose(attached[1], detached[1])


@pytest.mark.parametrize("entropy", [False, True])
def test_kept_logits_change_no_bit_and_save_a_product(entropy, monkeypatch):
    """In bf16, for the backward pass only: two chunks are two products, and without them four."""
    products, results = [], []
    monkeypatch.setattr(logprobs, "linear", lambda *args: products.append(args) or linear(*args))
    hidden, weight, targets, grad = inputs(CHUNK + 9)
    grad = entropy_grad(CHUNK + 9) if entropy else grad
    for keep in (True, False):
        leaves = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
        options = dict(entropy=entropy, keep_logits=keep)
        values = target_logprobs(*leaves, targets, VOCAB, ALONE, 0.7, **options)
        values.backward(grad)
        results.append((values.detach(), *(x.grad for x in leaves)))
        assert len(products) == (2 if keep else 2 + 4)
    assert all(map(torch.equal, *results))


def test_zero_tokens():
    hidden, weight, targets, _ = inputs(0)
    for shape in ((0,), (0, 2)):
        values, grad_hidden, grad_weight = ours(hidden, weight, targets, torch.zeros(shape))
        assert values.shape == shape and grad_hidden.shape == (0, HIDDEN)
        assert torch.equal(grad_weight, torch.zeros(PADDED, HIDDEN))


def test_rows_past_the_vocabulary_get_no_probability_and_no_gradient():
    hidden, weight, _, _ = inputs(5)
    total = sum(
        target_logprobs(hidden, weight, torch.full((5,), v), VOCAB, ALONE).exp() for v in range(VOCAB)
    )
    torch.testing.assert_close(total, torch.ones(5))
    *arguments, grad = inputs(5)
    for some in (grad, entropy_grad(5)):
        grad_weight = ours(*arguments, some)[2]
        assert torch.equal(grad_weight[VOCAB:], torch.zeros(PADDED - VOCAB, HIDDEN))
        assert grad_weight[:VOCAB].any()


def test_large_logits_do_not_overflow():
    hidden, weight, targets, _ = inputs(7)
    arguments = (hidden * 1e4, weight, targets, entropy_grad(7))
    actual, expected = ours(*arguments), oracle(*arguments)
    assert all(values.isfinite().all() for values in actual)
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-5, atol=1e-1)


def test_bf16_computes_the_softmax_in_fp32():
    """Against float64 on the same bf16 logits: their rounding is the only difference to exact arithmetic."""
    hidden, weight, targets, _ = inputs(CHUNK + 9)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    for temperature in TEMPERATURES:
        values = target_logprobs(hidden, weight, targets, VOCAB, ALONE, temperature, entropy=True)
        every = ((hidden @ weight[:VOCAB].T).double() / temperature).log_softmax(1)
        logprobs, entropies = every.gather(1, targets[:, None])[:, 0], -(every.exp() * every).sum(1)
        assert values.dtype == torch.float32
        torch.testing.assert_close(
            values.double(), torch.stack([logprobs, entropies], 1), rtol=1e-5, atol=1e-5
        )


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list:
    """Logits stay bf16 between the kernels, each of which is compiled; a list with an item for each."""
    backend, seen = counting("aot_eager")
    for name, function in PLAIN.items():
        monkeypatch.setattr(logprobs, name, fused.compiled(function.__wrapped__, backend))
    monkeypatch.setattr(logprobs, "scales_in_kernels", lambda z: z.dtype != torch.float32)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("entropy", [False, True])
def test_compiled_kernels_change_nothing(monkeypatch, dtype, temperature, entropy):
    """Three kernels for chunks of every size; one more each would be made for a single token."""
    seen = as_on_a_gpu(monkeypatch)
    for tokens in (5, CHUNK, 2 * CHUNK + 3):
        hidden, weight, targets, grad = inputs(tokens)
        grad = entropy_grad(tokens) if entropy else grad
        arguments = hidden.to(dtype), weight.to(dtype), targets, grad, VOCAB, temperature
        compiled = ours(*arguments)
        with monkeypatch.context() as plain:
            for name, function in PLAIN.items():
                plain.setattr(logprobs, name, function)
            plain.setattr(logprobs, "scales_in_kernels", lambda z: False)
            expected = ours(*arguments)
        for actual, theirs in zip(compiled, expected, strict=True):
            torch.testing.assert_close(actual, theirs, rtol=1e-6, atol=1e-6)
    assert len(seen) == 3


def test_chunks_are_few_on_a_gpu():
    """1 GiB of float32 logits in multiples of 128 tokens, but never fewer than 1,024 tokens."""
    assert chunk_size(128_256, cuda=True) == 2048 and 2048 * 128_256 * 4 <= 2**30 < 2176 * 128_256 * 4
    assert chunk_size(49_152, cuda=True) == 5376
    assert chunk_size(2**20, cuda=True) == 1024
    assert chunk_size(128_256, cuda=False) == CHUNK


def test_bf16_sums_the_gradient_of_many_chunks_in_fp32():
    """Summed in bf16 the weight's gradient would be off by 0.4 %."""
    hidden, weight, targets, grad = inputs(16 * CHUNK)
    arguments = hidden.bfloat16(), weight.bfloat16(), targets, grad.abs()
    _, grad_hidden, grad_weight = ours(*arguments)
    _, exact_hidden, exact_weight = oracle(*arguments)
    assert grad_hidden.dtype == grad_weight.dtype == torch.bfloat16
    assert (grad_hidden.double() - exact_hidden).norm() < 0.005 * exact_hidden.norm()
    assert (grad_weight.double() - exact_weight).norm() < 0.003 * exact_weight.norm()


@pytest.mark.slow
def test_vocabulary_split_over_two_ranks(tmp_path):
    """Once with padding rows on the second rank, once with nothing but padding there."""
    fork_ranks(2, "tests/workers/logprobs.py", "values", tmp_path)
    for vocab in (VOCAB, PADDED // 4):
        *arguments, grad = inputs(CHUNK + 9, vocab)
        for temperature in TEMPERATURES:
            ranks = [torch.load(tmp_path / f"{vocab}-{temperature}-{rank}.pt") for rank in range(2)]
            for number, some in enumerate((grad, entropy_grad(CHUNK + 9))):
                expected = oracle(*arguments, some, vocab, temperature)
                assert_together([results[number] for results in ranks], expected)


def assert_together(ranks: list[tuple], expected: tuple) -> None:
    """Two ranks' values and gradients against those of the whole vocabulary."""
    values, grad_hidden, grad_weight = zip(*ranks, strict=True)
    for actual in values:  # both ranks know the whole answer
        torch.testing.assert_close(actual.double(), expected[0], rtol=1e-5, atol=1e-5)
    parts = grad_hidden[0] + grad_hidden[1]  # copy_to's backward sums them
    torch.testing.assert_close(parts.double(), expected[1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(torch.cat(grad_weight).double(), expected[2], rtol=1e-5, atol=1e-4)


# ---- what a policy returns -----------------------------------------------------------------------


def plain_policy(directory: Path) -> tuple[Tensor, float, float]:
    """([trained, 2], loss, gradient norm) of the rows by transformers in float64, at TEMPERATURES[0]."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    values, targets = [], []
    for example in RANDOM.examples(0):
        ids, trained = torch.tensor(example.ids).long(), torch.tensor(example.trained[1:])
        every = (lm(ids[None, :-1]).logits[0] / TEMPERATURES[0]).log_softmax(1)
        logprobs = every.gather(1, ids[1:, None])[:, 0]
        values.append(torch.stack([logprobs, -(every.exp() * every).sum(1)], 1)[trained])
        targets.append(ids[1:][trained])
    actual, batch = torch.cat(values), SimpleNamespace(targets=torch.cat(targets), mask=1.0)
    loss = policy_loss(batch, actual)[0] / 1000
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in lm.parameters() if p.grad is not None]).norm()
    return actual.detach(), float(loss.detach()), float(norm)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_policy(models, tmp_path, family):
    """Against transformers in two processes, split by tensors, context and stages."""
    layouts = [dict(tp=2, sequence_parallel=True), dict(tp=2), dict(cp=2), dict(pp=2)]
    worker = "tests/workers/logprobs.py", "policy", tmp_path, models / family, json.dumps(layouts)
    fork_ranks(2, *worker)
    values, loss, norm = plain_policy(models / family)
    for layout, actual in zip(layouts, torch.load(tmp_path / "policies.pt"), strict=True):
        mask, outputs, logprobs, actual_loss, actual_norm = actual
        assert outputs.shape == (len(mask), 2) and not outputs[~mask].any(), layout
        torch.testing.assert_close(outputs[mask].double(), values, rtol=0, atol=1e-4, msg=str(layout))
        assert torch.equal(logprobs, outputs[:, 0]), layout
        assert abs(actual_loss - loss) <= 1e-4 and abs(actual_norm - norm) <= 1e-3, (
            layout,
            actual,
            loss,
            norm,
        )
