"""tools.reference: its formulas and those of align.losses are written independently, and agree."""

import ast
from functools import partial

import numpy as np
import pytest
import torch

import train_dpo
from align.losses import preference, rl, supervised
from align.training import optim
from tests.support.files import ROOT
from tools import reference

LENGTHS = [3, 1, 5, 2]
OPTIONS = {"gap": 0.7, "kl_chosen": 0.3, "kl_rejected": 0.1}
OPTIONS |= {"label_smoothing": 0.2, "simpo_gamma": 0.4, "dpop_lambda": 3.0}


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def test_nothing_of_training_is_imported():
    tree = ast.parse((ROOT / "tools/reference.py").read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in modules if name.split(".")[0] in ("align", "megatron", "tests")]


@pytest.mark.parametrize("name", train_dpo.LOSSES)
def test_a_preference_loss_is_that_of_the_script(name):
    function, inputs = train_dpo.LOSSES[name]
    chosen, rejected = -numbers(6, seed=1).abs(), -numbers(6, seed=2).abs()
    refs = (-numbers(6, seed=3).abs(), -numbers(6, seed=4).abs())
    if name in train_dpo.REFERENCE_FREE:
        refs = (torch.zeros(6), torch.zeros(6))
    options = {key: OPTIONS[key] for key in inputs.split()}
    tensors = {key: torch.tensor(x, dtype=torch.float64) if key == "gap" else x for key, x in options.items()}
    for key in ("kl_chosen", "kl_rejected"):
        if key in tensors:
            tensors[key] = torch.tensor(tensors[key], dtype=torch.float64)
    script = function(chosen, rejected, *refs, 0.3, **tensors)
    ratios = zip(chosen - refs[0], rejected - refs[1], strict=True)
    own = [reference.PREFERENCE[name](*pair, 0.3, **options) for pair in ratios]
    torch.testing.assert_close(torch.stack(own), script, rtol=1e-12, atol=1e-12)


def test_supervised_losses():
    scores = numbers(4, 2)
    chosen, rejected = scores.unbind(1)
    margin = numbers(4, seed=1).abs()
    own = [reference.ranking(*pair, float(m), 0.1) for *pair, m in zip(chosen, rejected, margin, strict=True)]
    script = supervised.ranking(chosen, rejected, margin) + 0.1 * supervised.centering(chosen, rejected)
    torch.testing.assert_close(torch.stack(own), script)
    labels = torch.tensor([[1.0, -100], [-100, 2], [0, 0], [3, 1]], dtype=torch.float64)
    total = sum(reference.regression(x, y.tolist()) for x, y in zip(scores, labels, strict=True))
    torch.testing.assert_close(total, supervised.regression(scores, labels)[0])
    logprobs, trained = numbers(5), [False, True, True, False, True, True]
    mask = torch.tensor(trained[1:], dtype=torch.float64)
    torch.testing.assert_close(reference.sft(logprobs, trained), supervised.sft_loss(logprobs, mask))
    mean = preference.sequence_logprobs(logprobs, mask, [5], average=True)[0]
    torch.testing.assert_close(reference.sequence_logprob(logprobs, trained, average=True), mean)


def test_rewards_and_advantages():
    rewards, values = numbers(sum(LENGTHS)), numbers(sum(LENGTHS), seed=1)
    parts = [x.split(LENGTHS) for x in (rewards, values)]
    own = [reference.gae(r.tolist(), v.tolist(), 0.9, 0.8) for r, v in zip(*parts, strict=True)]
    flat = [x for part in own for x in part]
    script = rl.gae(rewards, values, LENGTHS, 0.9, 0.8)[0]
    assert flat == pytest.approx(script.tolist(), rel=1e-12)
    assert reference.whiten(flat) == pytest.approx(rl.whiten(script).tolist(), rel=1e-12)
    to_go = [x for part in parts[0] for x in reference.rewards_to_go(part.tolist(), 0.9)]
    zeros = torch.zeros_like(rewards)
    assert to_go == pytest.approx(rl.gae(rewards, zeros, LENGTHS, 0.9, 1.0)[0].tolist(), rel=1e-12)
    scores, kl = numbers(len(LENGTHS), seed=2), numbers(sum(LENGTHS), seed=3)
    by_response = zip(scores.tolist(), kl.split(LENGTHS), strict=True)
    tokens = [x for score, part in by_response for x in reference.token_rewards(score, part.tolist(), 0.1)]
    assert tokens == pytest.approx(rl.token_rewards(scores, kl, LENGTHS, 0.1).tolist(), rel=1e-12)


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_advantages_of_groups(name):
    returns = torch.cat([numbers(3, 4), torch.full((1, 4), 0.3, dtype=torch.float64)])
    counted = torch.tensor([[True] * 4, [True, False, True, True], [True, False, False, False], [True] * 4])
    script = getattr(rl, name)(returns, counted) * counted
    own = [getattr(reference, name)(x.tolist(), y.tolist()) for x, y in zip(returns, counted, strict=True)]
    torch.testing.assert_close(torch.tensor(own, dtype=torch.float64), script, rtol=1e-12, atol=1e-12)


def test_losses_of_policy_and_critic():
    new, old, advantages = (numbers(50, seed=seed) / 3 for seed in range(3))
    script = rl.policy_loss(new, old, advantages, torch.ones(50), partial(rl.ppo, clip=0.2))[0]
    torch.testing.assert_close(reference.policy_loss(new, old, advantages, 0.2).sum(), script)
    for clip in (0.0, 0.2):
        own = reference.value_loss(new, old, advantages, clip).sum()
        torch.testing.assert_close(own, rl.value_loss(new, old, advantages, clip)[0])
    for name, function in {"k1": rl.kl_k1, "abs": rl.kl_abs, "k2": rl.kl_k2, "k3": rl.kl_k3}.items():
        torch.testing.assert_close(reference.kl(name, new, old), function(new, old))


def test_learning_rate():
    config = optim.OptimConfig(lr=3e-4, min_lr=1e-5, warmup_steps=3, constant_steps=2)
    for step in range(12):
        own = reference.learning_rate(3e-4, 1e-5, 3, 2, step, 12)
        assert own == pytest.approx(optim.learning_rate(config, step, 12), rel=1e-14)
