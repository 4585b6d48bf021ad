"""Sizes that do not fit are refused with the flag; times as Slurm writes them."""

import importlib
import os
import sys
from importlib.metadata import version
from unittest import mock

import pytest
import torch

from align.distributed import launch, parallel
from align.distributed.parallel import ParallelConfig, check_grid, parse_time
from align.errors import UserError
from align.model import architecture
from align.model.config import ModelConfig, check_model


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("00:00:30", 30),
        ("01:02:03", 3723),
        ("100:00:00", 360_000),
        ("1-00:00:00", 86_400),
        ("2-03:04:05", 183_845),
    ],
)
def test_times(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "90", "10:30", "00:60:00", "00:00:60", "1:2:3", "-1:00:00", "01:00:00 "]
)
def test_times_that_are_refused(text):
    with pytest.raises(UserError, match=r"--max-time .* is not of the form HH:MM:SS"):
        parse_time(text)


@pytest.mark.parametrize("world, flags", [(1, {}), (4, {"tp": 2}), (8, {"tp": 2, "pp": 2, "cp": 2})])
def test_sizes_that_fit(monkeypatch, world, flags):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    check_grid(ParallelConfig(**flags))


@pytest.mark.parametrize(
    "world, flags, message",
    [
        (1, {"tp": 2}, r"--tp 2 x --pp 1 x --cp 1 = 2 does not divide the 1 processes: .*multiple of 2"),
        (6, {"tp": 2, "pp": 2}, r"--tp 2 x --pp 2 x --cp 1 = 4 does not divide the 6 processes"),
        (4, {"cp": 3}, r"--cp 3 = 3 does not divide the 4 processes"),
        (
            2,
            {"sequence_parallel": True},
            r"--sequence-parallel has no effect with --tp 1: leave it out or raise",
        ),
        (2, {"vp": 2}, r"--vp has no effect with --pp 1: leave it out or raise"),
    ],
)
def test_sizes_that_are_refused(monkeypatch, world, flags, message):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(UserError, match=message):
        check_grid(ParallelConfig(**flags))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"tp": 3}, r"--tp 3 does not divide the model's 4 attention heads .*--pp instead"),
        ({"tp": 8}, r"--tp 8 does not divide the model's 4 attention heads"),
        ({"pp": 3}, r"--pp 3 does not divide the model's 4 layers"),
        ({"pp": 2, "vp": 4}, r"--pp 2 x --vp 4 = 8 does not divide the model's 4 layers"),
    ],
)
def test_splits_that_the_tiny_model_does_not_allow(flags, message):
    config = ModelConfig()
    with pytest.raises(UserError, match=message):
        check_model(architecture.read_config(config.path), config, ParallelConfig(**flags))


def test_transformer_engine_is_an_error_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = ModelConfig(attention="te")
    with pytest.raises(UserError, match="--attention te needs a GPU and the package transformer-engine"):
        check_model(architecture.read_config(config.path), config, ParallelConfig())


# ---- what CUDA and NCCL read when they start -----------------------------------------------------


@pytest.fixture
def environment(monkeypatch):
    """The variables that have been set since the test began; none of these was before."""
    names = (
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "CUBLAS_WORKSPACE_CONFIG",
        "NCCL_ALGO",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
    )
    kept = {name: value for name, value in os.environ.items() if name not in names}
    monkeypatch.setattr(os, "environ", kept)
    before = set(kept)
    yield lambda: {name: value for name, value in os.environ.items() if name not in before}
    torch.use_deterministic_algorithms(False)


def test_deterministic_runs_do_not_add_in_switches(environment):
    """Every function of NCCL keeps algorithms: a list without ^ would take them from gathers and scatters."""
    parallel.make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert environment() == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "^NVLS,NVLSTree",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }


def test_what_the_user_sets_stays(environment):
    os.environ["NCCL_ALGO"] = "allreduce:tree"
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"
    parallel.make_deterministic()
    parallel.use_one_queue()
    assert environment()["NCCL_ALGO"] == "allreduce:tree"
    assert environment()["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


@pytest.mark.parametrize(
    "script, flags, own, expected",
    [
        ("train_sft", [], {}, "expandable_segments:True"),
        ("train_ppo", [], {}, "expandable_segments:True"),
        ("train_ppo", ["--generate-with", "trtllm"], {}, None),
        ("train_sft", [], {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native"),
        ("train_sft", [], {"PYTORCH_ALLOC_CONF": "backend:native"}, None),
    ],
)
def test_segments_grow_but_with_trtllm(script, flags, own, expected, environment, monkeypatch):
    """Before CUDA starts; the user's value stays under both names."""
    os.environ.update(own)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    monkeypatch.setattr(parallel, "start", mock.Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        launch.run(lambda config: None, importlib.import_module(script).Config)
    assert environment().get("PYTORCH_CUDA_ALLOC_CONF") == expected


@pytest.mark.parametrize(
    "flags, expected", [({}, []), ({"tp": 2}, ["one queue"]), ({"deterministic": True}, ["deterministic"])]
)
def test_it_is_set_before_cuda_is_looked_for(monkeypatch, flags, expected):
    order = []

    def look() -> bool:
        order.append("look")
        raise InterruptedError

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parallel, "use_one_queue", lambda: order.append("one queue"))
    monkeypatch.setattr(parallel, "make_deterministic", lambda: order.append("deterministic"))
    monkeypatch.setattr(torch.cuda, "is_available", look)
    with pytest.raises(InterruptedError), parallel.start(ParallelConfig(**flags)):
        pass
    assert order == [*expected, "look"]


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 4 * 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, 4 * 756),
        ("NVIDIA H200", torch.float32, None),
        ("NVIDIA GB200", torch.float16, 4 * 2500),
        ("CPU", torch.bfloat16, None),
    ],
)
def test_the_peak_is_that_of_all_gpus(name, dtype, peak, monkeypatch):
    monkeypatch.setattr(parallel, "device_name", lambda: name)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 4)
    assert parallel.peak_tflops(dtype) == peak


def test_the_log_names_the_installed_megatron():
    """Megatron-Core 0.19 adds the commit of the repository around it to its own version."""
    with parallel.start(parallel.ParallelConfig()):
        assert parallel.layout().endswith(f", Megatron-Core {version('megatron-core')}")
