"""The schedule by hand; what the optimizer decays, keeps in fp32, forgets and refuses."""

import json
import math

import pytest
import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads

from align.data.packing import BatchConfig
from align.distributed import megatron_patches, parallel
from align.errors import UserError
from align.model import architecture, gpt, huggingface, logprobs
from align.model.config import ModelConfig, overlaps_gradients
from align.training import batching, checkpoint, engine, optim
from tests.support.files import MEGATRON_0_16
from tests.support.launch import fork_ranks
from tests.support.waits import Waits
from tools.conformance.losses import LOSSES
from tools.conformance.rows import data_set

SCHEDULE = optim.OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=4, constant_steps=2)


def rates(config: optim.OptimConfig, total_steps: int) -> list[float]:
    return [optim.learning_rate(config, step, total_steps) for step in range(total_steps)]


# ---- schedule ------------------------------------------------------------------------------------


def test_schedule_by_hand():
    quarter = 0.8 * (1 + math.sqrt(0.5)) / 2  # of the way from 1 to 0.2, a quarter of the half cosine in
    cosine = [1.0, 0.2 + quarter, 0.6, 1.0 - quarter]
    assert rates(SCHEDULE, 10) == pytest.approx([0.2, 0.4, 0.6, 0.8, *cosine, 0.2, 0.2])


def test_after_the_last_step_the_rate_stays():
    assert [optim.learning_rate(SCHEDULE, step, 10) for step in (10, 1000)] == [0.2, 0.2]


def test_without_warmup_the_first_step_has_the_full_rate():
    config = optim.OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=0)
    assert rates(config, 2) == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize("total_steps", [1, 3, 10, 11])
def test_short_runs_warm_up_and_do_not_collapse(total_steps):
    """With the default 10 warm-up steps: 1/11, 2/11, ... of the rate; never 0, never back to the minimum."""
    config = optim.OptimConfig(lr=1e-5, min_lr=1e-6)
    expected = [1e-5 * (step + 1) / 11 for step in range(total_steps)]
    assert rates(config, total_steps) == pytest.approx(expected)
    optim.check_optim(config, total_steps)


def test_a_constant_rate():
    config = optim.OptimConfig(lr=3e-6, min_lr=3e-6, warmup_steps=0)
    optim.check_optim(config, 4)
    assert rates(config, 4) == [3e-6] * 4


def test_a_minimum_above_the_rate_is_refused():
    with pytest.raises(UserError, match=r"--min-lr 1e-06 is above --lr 5e-07"):
        optim.check_optim(optim.OptimConfig(lr=5e-7), 100)


@pytest.mark.parametrize("total_steps", [5, 6])
def test_a_tail_that_leaves_no_cosine_is_refused(total_steps):
    message = rf"--warmup-steps 4 and --constant-steps 2 leave no step of {total_steps} .*lower one"
    with pytest.raises(UserError, match=message):
        optim.check_optim(SCHEDULE, total_steps)
    optim.check_optim(SCHEDULE, 7)


# ---- optimizer -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def world():
    with parallel.start(parallel.ParallelConfig()):
        yield


def build(directory, precision: str, **flags: float):
    """A model in one process and its optimizer."""
    arch = architecture.read_config(directory)
    layout, config = parallel.ParallelConfig(), ModelConfig(str(directory), precision)
    policy = gpt.build_policy(arch, config, layout)
    huggingface.load(policy, huggingface.open_source(directory, arch, 0))
    policy = gpt.distributed(policy)
    return policy, optim.build(policy, optim.OptimConfig(**flags))


def set_gradient(policy, value: float) -> None:
    policy.zero_grad_buffer()
    for parameter in policy.parameters():
        parameter.main_grad.fill_(value)


def test_weight_decay_is_for_matrices_only(models):
    """A step with gradient zero is the decay alone, w (1 - lr weight_decay). Qwen2 has norms and biases."""
    policy, optimizer = build(models / "qwen2", "fp32", weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    set_gradient(policy, 0.0)
    assert optim.step(optimizer, 0.1) == 0.0
    decayed = set()
    for name, parameter in policy.named_parameters():
        factor = 0.95 if parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
        decayed |= {name} if factor < 1 else set()
    assert {name.split(".")[-1] for name in set(before) - decayed} == {"weight", "bias"}
    assert len(decayed) == 1 + 4 * 4  # the tied embedding; qkv, proj, fc1, fc2 of each layer


def test_the_rate_is_the_size_of_the_first_step_and_the_norm_is_before_clipping(models):
    """Adam's first step is lr * g / (|g| + eps) of the clipped gradient g."""
    count = sum(parameter.numel() for parameter in build(models / "llama", "fp32")[0].parameters())
    clipped = count**-0.5  # its norm is 1
    for flags, step in (({}, 1e-3), ({"adam_eps": 3 * clipped}, 0.25e-3)):
        policy, optimizer = build(models / "llama", "fp32", weight_decay=0.0, clip_grad=1.0, **flags)
        before = [p.detach().clone() for p in policy.parameters()]
        set_gradient(policy, 2.0)
        assert optim.step(optimizer, 1e-3) == pytest.approx(2 * count**0.5, rel=1e-5)
        assert flags or all(group["eps"] == 1e-8 for group in optimizer.param_groups)
        for parameter, old in zip(policy.parameters(), before, strict=True):
            torch.testing.assert_close(parameter.detach(), old - step, rtol=0, atol=1e-6)


def test_gradients_are_measured_and_clipped_at_once(models, monkeypatch):
    """With the bits of Megatron's loop over the weights, which waits at each; this waits once a step."""
    results = []
    for ours in (True, False):
        policy, optimizer = build(models / "llama", "fp32", clip_grad=0.5)
        if not ours:
            monkeypatch.setattr(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
            monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", utils.local_multi_tensor_scale)
        with Waits() as waits:
            norms = []
            for seed in range(2):
                random_gradient(policy, seed)
                norms.append(optim.step(optimizer, 1e-3))
        first = 0 if MEGATRON_0_16 else 1  # whether any weight has a norm of its own
        assert len(waits.names) == first + (
            2 if ours else 4
        )  # more inside of torch.tensor(numbers of the GPU)
        results.append((norms, [p.detach().clone() for p in policy.parameters()]))
    assert results[0][0] == results[1][0] and min(results[0][0]) > 0.5
    assert all(map(torch.equal, results[0][1], results[1][1]))


def test_a_checkpoint_of_another_adam_leaves_torch_fused(models, tmp_path):
    """Transformer Engine's Adam has no such setting in its groups, and so none in its checkpoints."""
    policy, optimizer = build(models / "llama", "fp32")
    random_gradient(policy, 0)
    optim.step(optimizer, 1e-3)
    for group in optimizer.param_groups:
        del group["fused"], group["foreach"]
    checkpoint.write(tmp_path / "saved", 1, policy, optimizer)
    policy, optimizer = build(models / "llama", "fp32")
    checkpoint.load(tmp_path / "saved", policy, optimizer, same_layout=True)
    assert [(group["fused"], group["foreach"]) for group in optimizer.param_groups] == [(True, False)] * 2


def test_bf16_weights_follow_fp32_main_weights(models):
    """Eight steps of 1e-3 from about 1: each alone is lost in bf16, whose numbers lie 4e-3 to 8e-3 apart."""
    policy, optimizer = build(models / "llama", "bf16", weight_decay=0.0)
    weight = policy.module.decoder.final_layernorm.weight
    before = weight.detach().float().clone()
    assert weight.dtype == torch.bfloat16 and weight.main_grad.dtype == torch.float32
    for _ in range(8):
        set_gradient(policy, 1.0)
        optim.step(optimizer, 1e-3)
    expected = (before - 8e-3).bfloat16()
    torch.testing.assert_close(weight.detach(), expected, rtol=2**-7, atol=0)
    assert (weight < before).all()


def test_gradients_of_weights_are_added_to_fp32(models, monkeypatch):
    """Those of two micro-batches of a bf16 model: by `add_product`, with the bits that Megatron's way has."""
    calls, gradients = [], []
    add_product = megatron_patches.add_product
    monkeypatch.setattr(megatron_patches, "add_product", lambda *a: calls.append(a) or add_product(*a))
    for fuses in (True, False):
        policy, _ = build(models / "llama", "bf16")
        for module in policy.modules():
            if hasattr(module, "gradient_accumulation_fusion"):
                module.gradient_accumulation_fusion = fuses
        data = data_set("sft", 0, 5)
        batches = batching.micro_batches(policy, data.rows, BatchConfig(micro_batch_tokens=100), data.values)
        policy.zero_grad_buffer()
        engine.forward_backward(policy, batches, LOSSES["sft"], sum(data.counts))
        gradients.append({name: p.main_grad.clone() for name, p in policy.named_parameters()})
        assert len(batches) > 1
    # qkv, proj, fc1, fc2 of each layer
    assert len(calls) == 4 * len(policy.module.decoder.layers) * len(batches)
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_the_gradient_of_the_output_layer_is_added_to_fp32(name, models, monkeypatch):
    """On a CPU, whose product is bf16, the same bits; a tied embedding is no longer summed in bf16."""
    gradients, forward = [], logprobs.TargetLogProbs.forward

    def without_buffer(ctx, *args):  # as for a model without Megatron's
        results = forward(ctx, *args)
        ctx.main_grad = None
        return results

    for own in (True, False):
        if not own:
            monkeypatch.setattr(logprobs.TargetLogProbs, "forward", without_buffer)
        policy, _ = build(models / name, "bf16")
        data = data_set("sft", 0, 5)
        batches = batching.micro_batches(policy, data.rows, BatchConfig(micro_batch_tokens=100), data.values)
        policy.zero_grad_buffer()
        engine.forward_backward(policy, batches, LOSSES["sft"], sum(data.counts))
        gradients.append({name: p.main_grad.clone() for name, p in policy.named_parameters()})
        output = policy.module.shared_embedding_or_output_weight() if "tied" in name else None
        output = policy.module.output_layer.weight if output is None else output
        assert output.grad_added_to_main_grad == own
    for key, gradient in gradients[0].items():
        other = gradients[1][key]
        if "tied" in name and "embedding" in key:
            assert not torch.equal(gradient, other)
            torch.testing.assert_close(gradient, other, rtol=2**-7, atol=2**-9 * other.abs().max().item())
        else:
            assert torch.equal(gradient, other), key


def test_a_gradient_that_is_not_finite_stops_the_run(models):
    policy, optimizer = build(models / "llama", "fp32")
    set_gradient(policy, math.nan)
    with pytest.raises(FloatingPointError, match="the norm of the gradient is nan"):
        optim.step(optimizer, 1e-3)


# ---- a new beginning -----------------------------------------------------------------------------


def random_gradient(policy, seed: int) -> None:
    policy.zero_grad_buffer()
    rng = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=rng))


def weights_and_main_weights(policy, optimizer) -> list[torch.Tensor]:
    """In fp32 they are the same memory."""
    groups = [group for adam in optim.adams(optimizer) for group in adam.optimizer.param_groups]
    return [*(p.data for p in policy.parameters()), *(p.data for group in groups for p in group["params"])]


def moments(optimizer) -> list[torch.Tensor]:
    """With the number of steps of each weight, which they are divided by."""
    states = [state for adam in optim.adams(optimizer) for state in adam.optimizer.state.values()]
    return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_after_a_reset_steps_are_first_steps(models, precision):
    """Bit for bit those of a new optimizer of the same weights; moments and counts are gone, weights stay."""
    (policy, optimizer), (fresh, new_optimizer) = (build(models / "qwen2", precision) for _ in range(2))
    for seed in range(3):
        random_gradient(policy, seed)
        optim.step(optimizer, 1e-3)
    assert all(value.any() for value in moments(optimizer))
    before = [value.clone() for value in weights_and_main_weights(policy, optimizer)]
    optim.reset(optimizer)
    assert len(moments(optimizer)) > 3 and not any(value.any() for value in moments(optimizer))
    for now, then in zip(weights_and_main_weights(policy, optimizer), before, strict=True):
        assert torch.equal(now, then)
    for tensor, other in zip(weights_and_main_weights(fresh, new_optimizer), before, strict=True):
        assert not torch.equal(tensor, other)  # the steps did something
    for tensor, other in zip(weights_and_main_weights(fresh, new_optimizer), before, strict=True):
        tensor.copy_(other)
    for seed in (7, 8):
        for model_, its in ((policy, optimizer), (fresh, new_optimizer)):
            random_gradient(model_, seed)
            optim.step(its, 1e-3)
        for tensor, other in zip(
            weights_and_main_weights(policy, optimizer) + moments(optimizer),
            weights_and_main_weights(fresh, new_optimizer) + moments(new_optimizer),
            strict=True,
        ):
            assert torch.equal(tensor, other)


def test_the_first_step_after_a_reset_has_the_size_of_the_rate(models):
    """Adam's first step is lr * sign(gradient): here against the moments of three steps the other way."""
    policy, optimizer = build(models / "llama", "fp32", weight_decay=0.0)
    for _ in range(3):
        set_gradient(policy, 1.0)
        optim.step(optimizer, 1e-3)
    optim.reset(optimizer)
    before = [p.detach().clone() for p in policy.parameters()]
    set_gradient(policy, -1.0)
    optim.step(optimizer, 1e-3)
    for parameter, old in zip(policy.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old + 1e-3, rtol=1e-3, atol=1e-5)


# ---- the sum over ranks --------------------------------------------------------------------------


@pytest.mark.slow
def test_gradients_summed_during_the_backward_pass_are_the_same(models, tmp_path):
    """Bit for bit, in several buckets, also where a rank's last micro-batch, or its only one, is empty."""
    assert not overlaps_gradients()  # with nobody
    fork_ranks(2, "tests/workers/overlap.py", models / "llama", tmp_path)
    for rank in range(2):
        results = json.loads((tmp_path / f"rank{rank}.json").read_text())
        after, during = results["after"], results["during"]
        assert results["default"] and (after["buckets"], during["buckets"] > 3) == (1, True)
        assert during["bits"] == after["bits"]
        assert during["norms"] == pytest.approx(after["norms"], rel=1e-6)
