"""8-bit products where they can be used, and what the log's first line says of kernels."""

from dataclasses import replace

import pytest
import torch

from align.distributed import parallel
from align.distributed.parallel import ParallelConfig
from align.errors import UserError
from align.model import architecture, attention, config, gpt, spec
from align.model.config import ModelConfig
from align.training import batching

FP8 = ModelConfig(precision="bf16", attention="te", fp8=True)


@pytest.fixture(scope="module", autouse=True)
def world():
    with parallel.start(ParallelConfig()):
        yield


@pytest.fixture
def on_gpu(monkeypatch):
    """As on an H100 with Transformer Engine, as far as checks ask."""
    monkeypatch.setattr(config, "uses_te", lambda config: config.attention != "torch")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def arch() -> architecture.Architecture:
    return architecture.read_config(ModelConfig().path)


def test_8_bit_products_are_megatrons_without_state(on_gpu):
    """Scales come from the values of each product, so that a checkpoint needs none."""
    config.check_model(arch(), FP8, ParallelConfig())
    settings = spec.transformer_config(arch(), FP8, ParallelConfig(), te=True)
    assert (settings.fp8, settings.fp8_recipe, settings.fp8_param, settings.bf16) == (
        "hybrid",
        "tensorwise",
        False,
        True,
    )
    assert spec.transformer_config(arch(), replace(FP8, fp8=False), ParallelConfig(), te=True).fp8 is None


@pytest.mark.parametrize(
    "layout, multiple",
    [(ParallelConfig(), 16), (ParallelConfig(tp=2), 16), (ParallelConfig(tp=2, sequence_parallel=True), 32)],
)
def test_micro_batches_have_a_size_of_8_bit_products_on_each_rank(layout, multiple):
    module = torch.nn.Module()
    module.config = spec.transformer_config(arch(), FP8, layout, te=True)
    assert batching.alignment(module) == multiple
    module.config = spec.transformer_config(arch(), replace(FP8, fp8=False), layout, te=True)
    assert batching.alignment(module) == multiple // 16


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention": "torch"}, "--fp8 needs Transformer Engine: give --attention te on a GPU, or leave"),
        ({"precision": "fp32"}, "--fp8 and --precision fp32: .* must be in bf16"),
    ],
)
def test_8_bit_products_are_refused_without_what_they_need(on_gpu, changes, message):
    with pytest.raises(UserError, match=message):
        config.check_model(arch(), replace(FP8, **changes), ParallelConfig())


def test_8_bit_products_are_refused_on_a_gpu_without_them(on_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(UserError, match="--fp8: CPU has no 8-bit products"):
        config.check_model(arch(), FP8, ParallelConfig())


def test_8_bit_products_are_refused_for_sizes_that_they_do_not_take(on_gpu):
    odd = replace(arch(), ffn_size=48)
    config.check_model(odd, FP8, ParallelConfig())
    with pytest.raises(UserError, match="--fp8: the 24 ffn columns of a rank are no multiple of 16"):
        config.check_model(odd, FP8, ParallelConfig(tp=2))


def test_param_gather_of_one_rank_is_refused(monkeypatch):
    """A rank that holds all main weights has nothing to gather."""
    check = (arch(), ModelConfig(precision="fp32"), ParallelConfig())
    monkeypatch.setattr(config, "overlaps_gradients", lambda: False)
    with pytest.raises(UserError, match="--overlap-param-gather: one rank holds all main weights"):
        config.check_model(*check, overlap_param_gather=True)
    monkeypatch.setattr(config, "overlaps_gradients", lambda: True)
    config.check_model(*check, overlap_param_gather=True)


def test_kernels_are_named(monkeypatch):
    """On a CPU; on GPUs with torch's kernels in both precisions, and with Transformer Engine's."""
    fp32, bf16 = ModelConfig(precision="fp32"), ModelConfig(precision="bf16")
    assert "float32, torch kernels, matrix products by " in config.describe_model(arch(), fp32)
    assert config.describe_model(arch(), bf16).endswith("bfloat16, torch kernels")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(config, "uses_te", lambda config: config.attention == "te")
    for module in (attention, config):
        monkeypatch.setattr(module, "flash_kernel", lambda: "FlashAttention 3")
    small = "small layers compiled"
    assert config.describe_model(arch(), fp32).endswith(
        f"float32, torch kernels, attention by sequence, {small}"
    )
    assert config.describe_model(arch(), bf16).endswith(f"bfloat16, torch kernels, FlashAttention 3, {small}")
    monkeypatch.setattr(config, "get_te_version", lambda: "2.11.0")
    monkeypatch.setattr(config, "overlaps_gradients", lambda: True)
    line = "bfloat16, Transformer Engine 2.11.0, fp8, gradients summed during the backward pass"
    assert config.describe_model(arch(), FP8).endswith(line)


def test_megatron_logs_nothing_of_a_model(caplog):
    """Its notes on its own classes are none that a user can act on."""
    gpt.build_policy(arch(), ModelConfig(precision="fp32"), ParallelConfig())
    assert [record.message for record in caplog.records if record.name.startswith("megatron")] == []
