"""No operation of a micro-batch makes the host wait for the GPU, in a step of each script.

As a script this file is its own worker: it runs each script and writes down the operations that hand a value,
or a size that depends on values, to the host.
"""

import functools
import importlib
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import train_self_reward
from align import command_line
from align.data import packing
from align.data.packing import Example
from align.distributed import parallel
from align.tracking import run
from align.training import engine
from tests.support.files import MEGATRON_0_16
from tests.support.launch import fork_ranks
from tests.support.waits import Waits

pytestmark = pytest.mark.slow

STEP = "--max-steps 1 --save-interval 0 --micro-batch-size 4 --micro-batch-tokens 2048"
ROLLOUT = f"{STEP} --max-new-tokens 8 --samples-per-prompt 2 --truncated keep"
SCRIPTS = {
    "train_sft": STEP,
    "train_rm": STEP,
    "train_dpo": STEP,
    "train_ppo": f"{ROLLOUT} --prompts-per-step 16 --kl-in loss",
    "train_grpo": f"{ROLLOUT} --prompts-per-step 16 --entropy-coef 0.1",
}

# ---- worker --------------------------------------------------------------------------------------


def waits_of(script: str, flags: list[str]) -> list[tuple[int, bool, list[str]]]:
    """Of each pass over some micro-batches: their number, if it has a gradient, the operations that wait."""
    module, passes, schedule = importlib.import_module(script), [], engine.schedule

    def noting(model: object, batches: list, finish: object, forward_only: bool) -> list:
        # the last validation, when all kernels are compiled
        is_checked = torch.cuda.is_available() and forward_only and any(has_grad for _, has_grad, _ in passes)
        if is_checked:
            torch.cuda.set_sync_debug_mode("error")
        with Waits() as waits:
            results = schedule(model, batches, finish, forward_only)
        if is_checked:
            torch.cuda.set_sync_debug_mode("default")
        passes.append((len(batches), not forward_only, waits.names))
        return results

    with mock.patch.object(engine, "schedule", noting):
        module.main(command_line.parse(module.Config, flags))
    return passes


# ---- tests ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def passes(tmp_path_factory) -> dict[str, list[tuple[int, bool, list[str]]]]:
    folder = tmp_path_factory.mktemp("waits")
    fork_ranks(1, "tests/scripts/test_waits.py", folder)
    return json.loads((folder / "passes.json").read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_micro_batches_do_not_wait(script, passes):
    """Megatron 0.16 looks once at the number of tokens, after the backward pass of the last micro-batch."""
    models = 2 if script == "train_ppo" else 1
    assert sum(count > 1 and has_gradient for count, has_gradient, _ in passes[script]) == models
    for _, has_gradient, waits in passes[script]:
        assert waits == ["aten._local_scalar_dense"] * (has_gradient and MEGATRON_0_16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")
def test_torch_finds_no_wait_on_a_gpu(passes):
    """Under torch's own check the run would have failed in its last pass."""
    for script in ("train_sft", "train_rm", "train_dpo"):
        assert not passes[script][-1][1]


def test_loss_of_self_rewarding_does_not_wait():
    pair = [Example(np.array([1, 2, n], np.int32), np.arange(3) > 1) for n in (3, 4)]
    batch = packing.collate([pair])
    batch.extra.update(ref=torch.zeros(2), gap=torch.ones(1))
    logprobs = torch.full((3,), -1.0, requires_grad=True)
    with Waits() as waits:
        loss, _ = train_self_reward.preference_loss(train_self_reward.Config(), 0.1, batch, logprobs)
        loss.backward()
    assert waits.names == [] and logprobs.grad.tolist() == pytest.approx([0, -0.05, 0.05])


def test_a_wait_is_noticed():
    x, mask = torch.ones(3), torch.tensor([True, False, True])
    for wait in (lambda: x[mask], lambda: mask.nonzero(), lambda: float(x.sum())):
        with Waits() as waits:
            wait()
        assert waits.names


if __name__ == "__main__":
    run.Run.close = functools.partialmethod(run.Run.close, plots=False)
    folder = Path(sys.argv[1])
    with parallel.start(parallel.ParallelConfig()):
        of_scripts = {
            name: waits_of(name, [*flags.split(), "--output", str(folder / name)])
            for name, flags in SCRIPTS.items()
        }
    (folder / "passes.json").write_text(json.dumps(of_scripts))
