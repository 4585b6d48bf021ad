"""Each repair of Megatron is still needed by the installed version: a test fails when it is not.

`save_without_padding_of_buckets` has its test in tests/training/test_checkpoint_states.py.
"""

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.resharding.copy_services import gloo_copy_service, nccl_copy_service
from torch.utils._python_dispatch import TorchDispatchMode

from align.distributed import megatron_patches, parallel
from tests.support.files import ROOT
from tests.support.waits import Waits

FACTS = """
import json
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import layers
facts = {"fuses": layers._grad_accum_fusion_available, "queue": repr(filesystem_async._results_queue)}
for name in ("l2_norm_impl", "multi_tensor_scale_impl"):
    function = getattr(clip_grads, name)
    facts[name] = (function.__module__, function.__name__)
print(json.dumps(facts))
"""


class Operations(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.names.append(str(operation.overloadpacket))
        return operation(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def untouched() -> dict:
    """Facts about Megatron in a process of its own, which imports nothing of this project."""
    command = [sys.executable, "-W", "ignore", "-c", FACTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1])


def test_megatron_alone_needs_a_cuda_extension_to_fuse_gradient_accumulation(untouched):
    assert not untouched["fuses"]


def test_megatron_alone_makes_the_queue_of_a_save_in_another_process(untouched):
    assert untouched["queue"] == "None"  # then get_write_results_queue starts a manager


@pytest.mark.parametrize("repaired", [False, True])
def test_megatron_alone_asks_for_the_step_that_it_drops(repaired, monkeypatch):
    """Loading one weight with torch's AdamW, whose state has a step that Megatron does not hand over."""
    original = DistributedOptimizer._set_main_param_and_optimizer_states
    if original.__name__ == "with_step":  # another test has repaired it
        original = original.__closure__[0].cell_contents
    monkeypatch.setattr(DistributedOptimizer, "_set_main_param_and_optimizer_states", original)
    if repaired:
        megatron_patches.keep_step_through_loading()
    main = torch.zeros(2)
    state = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}
    optimizer = SimpleNamespace(
        model_param_group_index_map={"weight": (0, 0)},
        config=SimpleNamespace(
            use_precision_aware_optimizer_no_fp8_or_ds_fp8=False, use_precision_aware_optimizer=False
        ),
        optimizer=SimpleNamespace(param_groups=[{"params": [main]}], state={main: state}),
    )
    loaded = {"param": torch.ones(2), "exp_avg": torch.full((2,), 5.0)}

    def load() -> None:
        DistributedOptimizer._set_main_param_and_optimizer_states(optimizer, "weight", loaded)

    if repaired:
        load()
        assert (main.tolist(), state["exp_avg"].tolist(), state["step"].item()) == ([1, 1], [5, 5], 3)
    else:
        with pytest.raises(KeyError, match="step"):
            load()


@pytest.mark.parametrize("repaired", [False, True])
def test_megatron_alone_waits_in_the_norm_and_scales_gradients_one_by_one(repaired, untouched, monkeypatch):
    """On a CPU one wait of the norm is visible; the others are inside of torch.tensor(numbers of the GPU)."""
    for name in ("l2_norm_impl", "multi_tensor_scale_impl"):  # what Megatron itself chooses here
        module, function = untouched[name]
        monkeypatch.setattr(clip_grads, name, getattr(importlib.import_module(module), function))
    if repaired:
        megatron_patches.measure_gradients_at_once()
    gradients = [torch.full((2,), value, device=parallel.device()) for value in (2.0, 4.0, 4.0)]
    with parallel.start(parallel.ParallelConfig()):
        flag = torch.zeros(1, dtype=torch.int, device=parallel.device())
        with Waits() as waits:
            norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, flag, [gradients], False)
        with Operations() as operations:
            lists = [gradients, gradients]
            clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_impl, flag, lists, 0.5)
    assert norm.item() == pytest.approx(72**0.5) and torch.cat(gradients).tolist() == [1, 1, 2, 2, 2, 2]
    assert bool(waits.names) is not repaired
    alone = ["aten.mul", "aten.copy_"] * len(gradients)
    assert operations.names == (["aten._foreach_mul_"] if repaired else alone)


def test_megatron_alone_copies_weights_on_a_stream_of_its_own(monkeypatch):
    """That stream does not wait for the current one, on which the parts are cut out of the weights."""
    streams = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda: streams.append("own") or "own")
    monkeypatch.setattr(nccl_copy_service, "torch", torch)
    monkeypatch.setattr(nccl_copy_service.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(nccl_copy_service.dist, "get_world_size", lambda: 1)
    assert nccl_copy_service.NCCLCopyService()._copy_stream == "own"


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs have pinned memory and streams")
def test_on_a_cpu_transfers_of_weights_pin_no_memory_and_wait_for_no_stream():
    """Megatron-Core 0.19 does both in GlooCopyService, and torch raises at either without CUDA."""
    with parallel.start(parallel.ParallelConfig()):
        buffer = gloo_copy_service.torch.empty(2, device="cpu", pin_memory=True)
        gloo_copy_service.torch.cuda.current_stream().synchronize()
    assert buffer.shape == (2,) and not buffer.is_pinned()
