"""Arithmetic of tools.plan: each term by hand, and against what model, optimizer and cache really hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from align.data import packing
from align.distributed import parallel
from align.generation.inference import InferenceModel
from align.model import gpt, huggingface
from align.model.architecture import Architecture
from align.model.config import ModelConfig
from align.planning import memory, rollout_memory
from align.planning.memory import MicroBatchLoad, RankShape
from align.planning.rollout_memory import RolloutLoad
from align.training import engine, optim

SMALL = Architecture(  # 2 layers of 768 weights in matrices and 16 in norms; an embedding of 128 x 8
    family="llama",
    vocab_size=100,
    hidden_size=8,
    ffn_size=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    norm_eps=1e-5,
    init_std=0.02,
    max_positions=4096,
    tied_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
    window=None,
    rope=(("rope_theta", 1e4), ("rope_type", "default")),
)
NEMOTRON = dict(norm="layer_1p", activation="relu2", rotary_fraction=0.5)
FP32, BF16 = RankShape(4, gpu=False), RankShape(2, gpu=False)
GPU = RankShape(2, gpu=True)
WORK = MicroBatchLoad(tokens=64, count=4, longest=64)


@pytest.fixture(scope="module", autouse=True)
def world():
    with parallel.start(parallel.ParallelConfig()):
        yield


# ---- weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, setting, count",
    [
        ({}, FP32, 2 * (768 + 16) + 2 * 1024 + 8),
        (dict(tied_embeddings=True), FP32, 2 * 784 + 1024 + 8),
        (dict(labels=3), FP32, 2 * 784 + 1024 + 8 + 3 * 8),
        (dict(labels=3, tied_embeddings=True), FP32, 2 * 784 + 1024 + 8 + 3 * 8),
        (dict(qkv_bias=True), FP32, 2 * (784 + 32) + 2 * 1024 + 8),
        (dict(out_bias=True, mlp_bias=True), FP32, 2 * (784 + 8 + 32 + 8) + 2 * 1024 + 8),
        (dict(out_bias=True, mlp_bias=True), replace(FP32, tp=2), 2 * (384 + 16 + 8 + 16 + 8) + 2 * 512 + 8),
        (dict(qk_norm=True), FP32, 2 * (784 + 8) + 2 * 1024 + 8),
        (dict(norm="layer"), FP32, 2 * (784 + 16) + 2 * 1024 + 16),
        (dict(activation="relu2"), FP32, 2 * (784 - 128) + 2 * 1024 + 8),
        (dict(vocab_size=129), FP32, 2 * 784 + 2 * 192 * 8 + 8),
        ({}, replace(FP32, tp=2), 2 * (384 + 16) + 2 * 512 + 8),
        (dict(qkv_bias=True), replace(FP32, tp=2), 2 * (384 + 16 + 16) + 2 * 512 + 8),
        ({}, replace(FP32, pp=2, stage=0), 784 + 1024),
        ({}, replace(FP32, pp=2, stage=1), 784 + 8 + 1024),
        (dict(tied_embeddings=True), replace(FP32, pp=2, stage=1), 784 + 8 + 1024),
        (dict(labels=1), replace(FP32, pp=2, stage=1), 784 + 8 + 8),
    ],
)
def test_weights_of_a_rank(changes, setting, count):
    assert memory.weights(replace(SMALL, **changes), setting) == count


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(tied_embeddings=True),
        dict(qk_norm=True, qkv_bias=True),
        NEMOTRON,
        dict(qkv_bias=True, out_bias=True, mlp_bias=True),
    ],
)
def test_what_training_holds(changes, precision):
    """Weights, gradients and the optimizer's tensors of a model that is really built."""
    arch, config = replace(SMALL, **changes), ModelConfig(precision=precision)
    setting = FP32 if precision == "fp32" else BF16
    policy = gpt.build_policy(arch, config, parallel.ParallelConfig())
    assert sum(weight.numel() for weight in policy.parameters()) == memory.weights(arch, setting)
    largest = max(weight.numel() for weight in policy.parameters())
    assert largest == memory.largest_weight(arch, setting)
    huggingface.load(policy, huggingface.RandomSource(arch, 0))
    policy = gpt.distributed(policy)
    optimizer = optim.build(policy, optim.OptimConfig())
    gradients = sum(weight.main_grad.nbytes for weight in policy.parameters())
    assert gradients == memory.gradients(arch, setting)
    held, weights = 0, {weight.data.untyped_storage().data_ptr() for weight in policy.parameters()}
    for adam in optim.adams(optimizer):
        for group in adam.optimizer.param_groups:
            for weight in group["params"]:
                own = weight.data.untyped_storage().data_ptr() not in weights
                held += weight.nbytes if own else 0
                held += sum(adam.optimizer.state[weight][name].nbytes for name in ("exp_avg", "exp_avg_sq"))
    assert held == memory.optimizer(arch, setting)


def test_a_scorer_has_a_head():
    arch = replace(SMALL, labels=3)
    scorer = gpt.build_scorer(arch, ModelConfig(precision="fp32"), parallel.ParallelConfig(), (1, 1, 1))
    assert sum(weight.numel() for weight in scorer.parameters()) == memory.weights(arch, FP32)


def test_the_optimizer_is_split_over_copies():
    count = memory.weights(SMALL, FP32)
    assert memory.optimizer(SMALL, replace(FP32, dp=2, cp=2)) == 8 * count / 4
    assert memory.optimizer(SMALL, replace(BF16, dp=3)) == 12 * count / 3
    assert memory.gradients(SMALL, replace(BF16, dp=3)) == 4 * count  # which is not


def test_what_a_step_needs():
    """A copy of one gradient for the norm (gate and up: 256, embedding: 1,024); gloo's of what comes."""
    assert memory.update(SMALL, FP32) == 4 * 1024
    assert memory.update(SMALL, replace(GPU, dp=8)) == 4 * memory.weights(SMALL, GPU) / 8
    assert memory.update(SMALL, replace(BF16, dp=2)) == 2 * memory.weights(SMALL, BF16)


def test_pinned_memory_comes_in_powers_of_two():
    assert [memory.pinned(size) for size in (0, 1, 5, 8, 9)] == [0, 1, 8, 8, 16]
    arch = replace(SMALL, ffn_size=24, layers=1)
    # qkv 256 weights, output 128, gate and up 384 -> 512, down 192 -> 256, two norms; ends 1024, 1024, 8
    assert memory.pinned_weights(arch, FP32) == 4 * (256 + 128 + 512 + 256 + 16 + 2 * 1024 + 8)
    # The buffer of 256 + 128 + 384 + 192 + 16 + 2,056 = 3,032 weights is one piece, moments are one each.
    assert memory.pinned_model(arch, FP32) == 4 * 4096 + 2 * memory.pinned_weights(arch, FP32)
    # three biases of 8 more; instead of gate and up, up: 192 -> 256
    changed = replace(arch, **NEMOTRON)
    assert memory.pinned_weights(changed, FP32) == memory.pinned_weights(arch, FP32) + 4 * (3 * 8 - 256)
    halves = 3 * memory.pinned_weights(arch, FP32) / 2
    assert memory.pinned_model(arch, replace(GPU, dp=2)) == 2 * 4096 + halves


# ---- what a forward pass keeps ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, setting, size",
    [
        # norms 2 (32 + 4); products 2 x 32; q 16, k 8, qkv 32, out 16, log-sums 4, out once more 16; 3 x 16
        ({}, FP32, 72 + 64 + 4 * (16 + 8 + 32 + 16 + 4 + 16) + 4 * 48),
        # in bf16 attention's four are fp32, and nothing keeps the product of which they are copies
        # mean and 1 / deviation instead of 1 / rms; up alone
        (NEMOTRON, FP32, 72 + 8 + 64 + 4 * (16 + 8 + 32 + 16 + 4 + 16) + 4 * 32),
        (NEMOTRON | dict(head_dim=8), GPU, 40 + 8 + 32 + 2 * (32 + 16 + 64 + 32) + 4 * 4 + 2 * 32),
        ({}, BF16, 40 + 32 + 4 * (16 + 8 + 8 + 16 + 4) + 2 * 16 + 2 * 48),
        (dict(head_dim=8), GPU, 40 + 32 + 2 * (32 + 16 + 64 + 32) + 4 * 4 + 2 * 48),
        (dict(head_dim=8), replace(GPU, tp=2), 40 + 32 + 2 * (16 + 8 + 32 + 16) + 4 * 2 + 2 * 24),
        (
            dict(head_dim=8),
            replace(GPU, tp=2, sequence_parallel=True),
            20 + 16 + 2 * (16 + 8 + 32 + 16) + 4 * 2 + 2 * 24,
        ),
        # keys and values of both ranks' tokens, a quarter of them twice; the product is free
        (dict(head_dim=8), replace(GPU, cp=2), 40 + 32 + 2 * (32 + 2.5 * 32 + 32) + 4 * 4 + 2 * 48),
        # with more ranks than key heads the whole product is gathered
        (dict(head_dim=8), replace(GPU, tp=4), 40 + 32 + 2 * (8 + 8 + 64 + 8) + 4 + 2 * 12),
    ],
)
def test_what_a_layer_keeps_of_a_token(changes, setting, size):
    assert memory.layer_saves(replace(SMALL, **changes), setting, WORK) == size


@pytest.mark.parametrize(
    "setting, size",
    [
        (FP32, 2 * 696 + 36 + 32),  # and the last norm's input, its scale, the output layer's input
        (replace(FP32, recompute="full"), 2 * 32 + 36 + 32),
        (replace(FP32, pp=2, stage=0), 2 * (696 + 32)),  # two micro-batches, and the stage's output
        (replace(FP32, pp=2, stage=1), 696 + 36 + 32),
    ],
)
def test_what_a_stage_keeps(setting, size):
    assert memory.layer_saves(SMALL, FP32, WORK) == 696
    assert memory.saved(SMALL, setting, WORK) == 64 * size


@pytest.mark.parametrize(
    "stage, count, passes",
    [
        (0, 8, 11),  # Megatron starts with 2 x 3 + 4 forward passes, then one before each backward pass
        (3, 8, 5),
        (0, 4, 8),  # all that there are
    ],
)
def test_passes_in_flight_of_an_interleaved_schedule(stage, count, passes):
    """A pass goes through half a rank's layers, and keeps its output: only the last one has the head."""
    setting, arch = replace(FP32, pp=4, vp=2, stage=stage), replace(SMALL, layers=8)
    size = passes * (696 + 32) if stage < 3 else passes * 696 + (passes - 1) * 32 + 36 + 32
    assert memory.saved(arch, setting, replace(WORK, count=count)) == 64 * size


def test_no_more_micro_batches_are_in_flight_than_there_are():
    setting, one = replace(FP32, pp=4, stage=0), replace(WORK, count=1)
    arch = replace(SMALL, layers=4)
    assert memory.saved(arch, setting, WORK) == 4 * memory.saved(arch, setting, one)
    assert memory.saved(arch, replace(setting, stage=1), WORK) == 3 * memory.saved(arch, setting, one)
    assert memory.saved(arch, setting, replace(WORK, count=2)) == 2 * memory.saved(arch, setting, one)


MIDDLE = replace(SMALL, vocab_size=320, hidden_size=64, ffn_size=160, head_dim=16)


def kept(arch: Architecture, config: ModelConfig, shared: int) -> tuple[int, float, packing.Batch]:
    """Bytes that one forward pass keeps for its gradient, without weights, and of what micro-batch.

    `shared`: of a pair of 80 tokens a side so many; 0: rows of 128 and 64 tokens instead.
    """
    policy = gpt.build_policy(arch, config, parallel.ParallelConfig())
    huggingface.load(policy, huggingface.RandomSource(arch, 0))
    ids = np.random.default_rng(0).integers(0, 300, 129).astype(np.int32)
    rows = [[packing.Example(ids[: n + 1], np.arange(n + 1) > 0)] for n in (128, 64)]
    if shared:
        trained = np.arange(81) > shared
        other = np.where(trained, (ids[:81] + 1) % 300, ids[:81]).astype(np.int32)
        rows = [[packing.Example(ids[:81], trained), packing.Example(other, trained)]]
    batch, tensors = packing.collate(rows), {}
    weights = {weight.untyped_storage().data_ptr() for weight in policy.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            tensors[storage.data_ptr()] = storage  # held, so that no other gets its place
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = engine.forward(policy, batch)
    size = sum(storage.nbytes() for storage in tensors.values())
    assert output.requires_grad
    return size, batch


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "recompute, changes, shared",
    [
        ("none", {}, 0),
        ("none", dict(kv_heads=4), 0),
        ("none", dict(kv_heads=1), 0),
        ("none", dict(qkv_bias=True), 0),
        ("none", dict(qkv_bias=True, out_bias=True, mlp_bias=True), 0),
        ("none", dict(qk_norm=True), 0),
        ("none", dict(qk_norm=True, kv_heads=4), 0),
        ("none", NEMOTRON, 0),
        ("none", {}, 32),
        ("none", dict(qk_norm=True), 32),
        ("selective", {}, 0),
        ("selective", dict(kv_heads=4), 0),
        ("selective", dict(qk_norm=True), 0),
        ("full", {}, 0),
    ],
)
def test_what_a_layer_really_keeps(precision, recompute, changes, shared):
    """Bytes that two more layers add to a real forward pass. Masks alone are bounded: a row of fp32
    for each place of a sequence that continues another is counted for all places, at the greatest length."""
    arch, config = replace(MIDDLE, **changes), ModelConfig(precision=precision, recompute=recompute)
    one, batch = kept(replace(arch, layers=1), config, shared)
    three, _ = kept(replace(arch, layers=3), config, shared)
    places = len(batch.tokens)
    assert places % 64 == 0  # else products keep their input with more rows
    seen = sum(length + size for length, (_, size) in zip(batch.lengths, batch.prefixes, strict=True))
    setting = replace(FP32 if precision == "fp32" else BF16, recompute=recompute)
    work = MicroBatchLoad(places, 1, longest=80, shared=seen / places)
    planned = 64 * setting.item if recompute == "full" else memory.layer_saves(arch, setting, work)
    masks = 4 * 80 * (places - 48 if shared else 0)  # the second answer has 48 places of its own
    state = 8 if recompute == "selective" else 0  # of random numbers, for the pass that is made again
    state = 2 * 64 * setting.item if "norm" in changes else state  # weight + 1 of both norms
    assert planned * places - masks == pytest.approx((three - one) / 2, abs=state)


def test_kept_logits():
    """2 bytes for each of 320 columns of a trained token; on a GPU no others exist beside their gradient."""
    flags = [ModelConfig(precision="bf16", keep_logits=keep) for keep in (True, False)]
    (more, batch), (less, _) = (kept(MIDDLE, config, 0) for config in flags)
    count = len(batch.trained)
    assert count == len(batch.tokens) == 192 and more - less == 2 * 320 * count
    work, setting = MicroBatchLoad(count, 1, longest=80), replace(BF16, keep_logits=True)
    assert memory.saved(MIDDLE, setting, work) - memory.saved(MIDDLE, BF16, work) == more - less
    scorer = replace(MIDDLE, labels=1)
    assert memory.saved(scorer, setting, work) == memory.saved(scorer, BF16, work)
    on_gpu = replace(GPU, keep_logits=True)
    assert memory.output_forward(SMALL, on_gpu, WORK) == 64 * 16
    assert memory.output_backward(SMALL, on_gpu, WORK) == 64 * 16 + 4 * 1024 + 2 * 64 * 128


# ---- what lives for a moment -----------------------------------------------------------------------------


def test_logits_are_a_chunk():
    """On a CPU 256 tokens at most; with 300 tokens 256 x 128 numbers."""
    work = replace(WORK, tokens=300)
    assert memory.chunk(SMALL, FP32, work) == 256 * 128
    assert memory.chunk(SMALL, FP32, WORK) == 64 * 128
    assert memory.chunk(SMALL, replace(FP32, tp=2), work) == 256 * 64


def test_the_output_layer():
    # forward: the last norm's output, logits in fp32, exp of them too for the entropy; in bf16 both kinds
    assert memory.output_forward(SMALL, FP32, WORK) == 64 * 32 + 4 * 64 * 128
    assert memory.output_forward(SMALL, FP32, replace(WORK, entropy=True)) == 64 * 32 + 8 * 64 * 128
    assert memory.output_forward(SMALL, BF16, WORK) == 64 * 16 + 6 * 64 * 128
    assert memory.output_forward(SMALL, GPU, WORK) == 64 * 16 + 2 * 64 * 128
    # backward: gradients of its input and, in fp32, of its matrix; one product of 128 rows; logits
    assert memory.output_backward(SMALL, FP32, WORK) == 64 * 32 + 4 * 1024 + 4 * 1024 + 4 * 64 * 128
    assert memory.output_backward(SMALL, GPU, WORK) == 64 * 16 + 4 * 1024 + 4 * 64 * 128


def test_a_layers_backward_pass():
    # at the SwiGLU 8 + 16 + 32 + 32 - 16 numbers a token; in gate and up 16 + 64 - 48, and 2 x 16 x 8
    assert memory.layer_backward(SMALL, FP32, WORK) == 4 * 64 * 72
    assert memory.layer_backward(SMALL, GPU, WORK) == 2 * 64 * 40
    # at the squared ReLU 8 + 16 numbers a token; in up 16, and 16 x 8
    plain = replace(SMALL, activation="relu2")
    assert memory.layer_backward(plain, FP32, WORK) == 4 * max(64 * 24, 64 * 16 + 128)
    few = replace(WORK, tokens=1)
    assert memory.layer_backward(SMALL, FP32, few) == 4 * (16 + 64 - 48 + 256)


def test_the_peak_of_training():
    """The largest of the moments; a tied matrix's gradient waits for the rest of it."""
    kept, layer = memory.saved(SMALL, FP32, WORK), memory.layer_backward(SMALL, FP32, WORK)
    assert memory.training(SMALL, FP32, WORK) == {
        "activations": kept,
        "logits": memory.output_backward(SMALL, FP32, WORK),
    }
    wide = replace(SMALL, ffn_size=1600)  # whose layers take more than the output layer
    kept, layer = memory.saved(wide, FP32, WORK), memory.layer_backward(wide, FP32, WORK)
    assert memory.training(wide, FP32, WORK) == {"activations": kept + layer, "logits": 0}
    tied = replace(wide, tied_embeddings=True)
    assert memory.training(tied, FP32, WORK) == {"activations": kept + layer, "logits": 4 * 1024}
    full, again = replace(FP32, recompute="full"), 64 * memory.layer_saves(wide, FP32, WORK)
    kept = memory.saved(wide, full, WORK)
    assert memory.training(wide, full, WORK) == {"activations": kept + again + layer, "logits": 0}
    # One token, whose activations are nothing: the gradient of the embedding is the most.
    vocabulary = replace(SMALL, vocab_size=64000)
    first = replace(FP32, pp=2, stage=0)
    assert memory.training(vocabulary, first, replace(WORK, tokens=1))["activations"] == 4 * 64000 * 8 + 64


def test_gloo_copies_gradients():
    work, half = replace(WORK, tokens=1), replace(FP32, pp=2, stage=0, dp=2)
    assert memory.reduction(SMALL, half) == 4 * (784 + 1024)
    assert memory.reduction(SMALL, replace(half, gpu=True)) == memory.reduction(SMALL, FP32) == 0
    assert memory.training(SMALL, half, work)["activations"] == 4 * (784 + 1024) + 4 * 1024 + 2 * 32


def test_a_pass_without_a_gradient():
    # the MLP: 3 x 8 + 3 x 16 numbers; attention: 16 + 32 + 48 + 8 + 16
    assert memory.forward_only(SMALL, replace(FP32, pp=2, stage=0), WORK) == {
        "activations": 64 * 4 * 120,
        "logits": 0,
    }
    assert memory.forward_only(SMALL, FP32, WORK) == {
        "activations": 2 * 64 * 32,
        "logits": 64 * 32 + 4 * 64 * 128,
    }


# ---- sampling and saving ---------------------------------------------------------------------------------

ROLLOUT = RolloutLoad(slots=3, prompts=5, per_prompt=1, prompt=40, response=50)


def test_keys_and_values():
    """2 layers x 2 x 2 heads x 4 numbers of 4 bytes are 128 bytes a token. Room is for 96 tokens; a layer's
    exists twice when it grows; one prompt of 40 tokens is read ahead."""
    assert rollout_memory.cache_per_token(SMALL, FP32) == 128
    assert rollout_memory.cache_per_token(SMALL, replace(FP32, tp=4)) == 64  # no less than one head
    assert rollout_memory.cache_per_token(SMALL, replace(FP32, pp=2)) == 64
    assert rollout_memory.kv_cache(SMALL, FP32, ROLLOUT) == 3 * 96 * 128 + 3 * 96 * 64 + 40 * 128
    # Long prompts and short answers: at the start each prompt is there twice, read and in its slot.
    start = replace(ROLLOUT, prompt=960, response=1, slots=4)
    assert rollout_memory.kv_cache(SMALL, FP32, start) == max(
        4 * 992 * 128 + 4 * 992 * 64 + 960 * 128, 8 * 960 * 128
    )
    assert rollout_memory.kv_cache(SMALL, FP32, start) == 8 * 960 * 128


def test_the_cache_is_what_the_model_has():
    policy = gpt.build_policy(SMALL, ModelConfig(precision="fp32"), parallel.ParallelConfig())
    huggingface.load(policy, huggingface.RandomSource(SMALL, 0))
    with torch.no_grad():
        cached = InferenceModel(policy, ROLLOUT.slots)
        cached.reserve(ROLLOUT.prompt + ROLLOUT.response)
    assert sum(layer.nbytes for layer in cached.cache) == 3 * 96 * rollout_memory.cache_per_token(SMALL, FP32)


def test_prompts_are_read_together():
    """3 prompts of 40 tokens: keys and values three times over, or once and a layer of 3 x 8 + 3 x 16."""
    assert rollout_memory.prefill(SMALL, FP32, ROLLOUT) == 120 * max(128 + 4 * 72, 3 * 128)
    many = replace(ROLLOUT, slots=1000, prompts=1000, prompt=100)
    assert rollout_memory.prefill(SMALL, FP32, many) == 4096 * 416
    assert rollout_memory.prefill(SMALL, FP32, replace(many, prompt=5000)) == 5000 * 416


def test_packed_copies():
    assert rollout_memory.packed(SMALL, FP32) == 4 * (2 * 768 + 1024)
    assert rollout_memory.packed(SMALL, replace(FP32, pp=2, stage=0)) == 4 * 768
    assert rollout_memory.packed(SMALL, GPU) == 0


def test_a_copy_in_another_layout():
    """A small one is received at once, before anything is sampled; through gloo the other rank's twice."""
    copy = replace(GPU, tp=1)
    short = replace(ROLLOUT, slots=1, prompts=1, prompt=1, response=1)
    big = replace(SMALL, hidden_size=512, ffn_size=4096)
    whole = 2 * memory.weights(big, copy)
    assert rollout_memory.sampling(big, replace(GPU, tp=2), short, copy) == {
        "copies": 2 * whole,
        "kv_cache": 0,
        "activations": 0,
    }
    on_cpu = rollout_memory.sampling(big, replace(FP32, tp=2), short, FP32)
    assert on_cpu == {"copies": 2.5 * 2 * whole, "kv_cache": 0, "activations": 0}
    same = rollout_memory.sampling(big, replace(GPU, tp=2), short, None)
    assert same["copies"] == 0 and same["kv_cache"] == rollout_memory.kv_cache(big, replace(GPU, tp=2), short)
    long = replace(ROLLOUT, slots=64, prompt=4000, response=9000)
    sizes = rollout_memory.sampling(big, replace(GPU, tp=2), long, copy)
    assert sizes["copies"] == whole and sizes["kv_cache"] == rollout_memory.kv_cache(big, copy, long) > whole


def test_a_large_copy_is_received_in_parts():
    """70B from tp 8 to tp 4: 256 MiB, and 1/8 of the embedding, in place of the 35 GB of the copy."""
    large = replace(SMALL, vocab_size=128256, hidden_size=8192, ffn_size=28672, layers=80)
    large = replace(large, heads=64, kv_heads=8, head_dim=128)
    train, copy = replace(GPU, tp=8), replace(GPU, tp=4)
    assert rollout_memory.largest_piece(large, 8, 2) == 2 * 128256 * 8192 / 8
    tiny = replace(ROLLOUT, slots=1, prompts=1, prompt=1, response=1)
    sizes = rollout_memory.sampling(large, train, tiny, copy)
    whole, part = 2 * memory.weights(large, copy), 2**28 + 2 * 128256 * 8192 / 8
    assert sizes == {"copies": whole + part, "kv_cache": 0, "activations": 0}
    assert 35e9 < whole < 36e9 and part < 0.54e9


def test_a_checkpoint_is_gathered():
    """12 bytes a weight, its part of 12 / dp, and of a third received, gloo's and joined; or two copies."""
    count = memory.weights(SMALL, FP32)
    assert memory.saving(SMALL, FP32) == 36 * count
    assert memory.saving(SMALL, replace(FP32, dp=2)) == 30 * count
    # In buckets of 40 million weights or a little more the copies for the writer are the most.
    large = replace(SMALL, hidden_size=4096, ffn_size=16384, layers=8, vocab_size=1000)
    assert memory.saving(large, replace(FP32, item=2, dp=8)) == 26 * memory.weights(large, GPU)
    # A GPU's weights are copied to pinned memory, rounded up: gate and up, 2 x 11000 x 4096, to 2^27.
    odd = replace(large, ffn_size=11000)
    count, pinned = memory.weights(odd, GPU), memory.pinned_weights(odd, GPU)
    assert pinned > 2 * count + 8 * 2 * (2**27 - 2 * 11000 * 4096)
    assert memory.snapshot(odd, GPU) == 12 * count + pinned
    assert memory.saving(odd, replace(GPU, dp=8)) == 24 * count + pinned
