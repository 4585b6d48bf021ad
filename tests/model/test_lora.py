"""Adapters against peft: three steps of AdamW in several layouts, directories in both directions, merges.

The loops over peft and transformers read one answer at a time, as those of test_parity.py.
"""

import copy
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.distributed.parallel import ParallelConfig
from align.errors import UserError
from align.model import adapter_files, architecture, lora
from align.model.config import ModelConfig, check_model
from align.model.lora import LoraConfig
from tests.support.files import TINY
from tests.support.launch import fork_ranks
from tests.support.plain_training import answer_logprob, as_input, pair_loss, plain_training
from tools import prepare_model
from tools.conformance.losses import BETA, LR
from tools.conformance.rows import RANDOM

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {  # by directory
    "llama": dict(r=4, lora_alpha=8, target_modules=ALL, task_type="CAUSAL_LM"),
    "qwen3": dict(r=6, lora_alpha=3, target_modules=ALL, use_rslora=True, task_type="CAUSAL_LM"),
    "stablelm": dict(r=3, lora_alpha=12, target_modules=["k_proj", "v_proj", "up_proj", "o_proj"]),
    "llama-ranking": dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="SEQ_CLS"),
}
RUNS = ["llama-sft", "llama-dpo", "qwen3-sft", "qwen3-dpo", "stablelm-sft", "stablelm-dpo", "llama-ranking"]
LAYOUTS = [
    dict(),
    dict(tp=2),
    dict(pp=2),
    dict(tp=2, sequence_parallel=True),
    dict(cp=2),
]


def base_model(directory: Path, is_reward_model: bool = False) -> torch.nn.Module:
    if is_reward_model:
        kind = transformers.AutoModelForSequenceClassification
        return kind.from_pretrained(directory, dtype=torch.float32, num_labels=1)
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def peft_model(directory: Path, adapter: Path) -> peft.PeftModel:
    """peft's model of an adapter's directory; no tensor may be missing there, and none left over."""
    fields = json.loads((adapter / "adapter_config.json").read_text())
    base = base_model(directory, fields["task_type"] == "SEQ_CLS")
    model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
    ours, theirs = load_file(adapter / "adapter_model.safetensors"), peft.get_peft_model_state_dict(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    return model


@pytest.fixture(scope="module")
def adapters(models, tmp_path_factory) -> Path:
    """Directories as peft writes them, A and B random."""
    directory = tmp_path_factory.mktemp("adapters")
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        base = base_model(models / name.partition("-")[0], name.endswith("ranking"))
        model = peft.get_peft_model(base, peft.LoraConfig(**fields))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.copy_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(directory / name)
    return directory


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def ours(request, models, adapters, tmp_path_factory) -> tuple[dict, Path]:
    """(results of the worker by run, directory of what it has written) in one layout."""
    layout, output = request.param, tmp_path_factory.mktemp("lora")
    processes = math.prod(layout.get(name, 1) for name in ("tp", "pp", "cp"))
    fork_ranks(processes, "tests/workers/lora.py", models, adapters, output, json.dumps(layout))
    return torch.load(output / "results.pt", weights_only=True), output


# ---- peft ----------------------------------------------------------------------------------------


def plain_sft(model: peft.PeftModel) -> list[dict[str, float]]:
    def parts(step: int) -> Iterator[tuple[Tensor, dict[str, float]]]:
        count = sum(int(row.trained.sum()) for row in RANDOM.examples(step))
        for row in RANDOM.examples(step):
            yield -answer_logprob(model, row) / count, {}

    return plain_training(model, parts, LR["sft"])


def plain_dpo(model: peft.PeftModel) -> list[dict[str, float]]:
    """The reference is the model without its adapters."""

    def parts(step: int) -> Iterator[tuple[Tensor, dict[str, float]]]:
        for pair in RANDOM.pairs(step):
            rewards = []
            for side in pair.examples:
                with torch.no_grad(), model.disable_adapter():
                    ref = answer_logprob(model, side)
                rewards.append(BETA * (answer_logprob(model, side) - ref))
            yield pair_loss(*rewards, 0.0, len(RANDOM.pairs(step)))

    return plain_training(model, parts, LR["dpo"])


def plain_ranking(model: peft.PeftModel) -> list[dict[str, float]]:
    def parts(step: int) -> Iterator[tuple[Tensor, dict[str, float]]]:
        for pair in RANDOM.pairs(step):
            chosen, rejected = (model(as_input(side)).logits[0, 0].double() for side in pair.examples)
            yield pair_loss(chosen, rejected, pair.margin, len(RANDOM.pairs(step)))

    return plain_training(model, parts, LR["ranking"])


@pytest.fixture(scope="module")
def reference(models, adapters) -> dict[str, tuple[list[dict[str, float]], dict[str, Tensor]]]:
    """Metrics of each step, and the adapters after the last one, by run."""
    results = {}
    for run in RUNS:
        family, algorithm = run.split("-")
        model = peft_model(models / family, adapters / (run if algorithm == "ranking" else family))
        steps = {"sft": plain_sft, "dpo": plain_dpo, "ranking": plain_ranking}[algorithm](model)
        results[run] = steps, copy.deepcopy(peft.get_peft_model_state_dict(model))
    return results


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_training(ours, reference, run):
    """Losses to 1e-5, other metrics to 1e-4, norms to 1e-4 of their size."""
    steps, _ = reference[run]
    for step, (actual, expected) in enumerate(zip(ours[0][run]["steps"], steps, strict=True)):
        for name, value in expected.items():
            allowed = {"loss": 1e-5, "grad_norm": 1e-4 * value}.get(name, 1e-4)
            assert abs(actual[name] - value) <= allowed, (step, name, actual[name], value)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_trained_adapters(ours, adapters, reference, run):
    """All names and values after three steps; each has moved, and no frozen weight has."""
    results, output = ours
    start = load_file(adapters / run.removesuffix("-sft").removesuffix("-dpo") / "adapter_model.safetensors")
    actual = load_file(output / "adapters" / run / "adapter_model.safetensors")
    _, expected = reference[run]
    assert actual.keys() == expected.keys() == start.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-4, msg=name)
        assert not torch.equal(actual[name], start[name]), name
    assert results[run]["same_base"]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("run", ["llama-sft", "qwen3-dpo", "stablelm-sft"])
def test_peft_loads_our_adapter_and_transformers_our_merged_model(ours, models, run):
    """Log-probs of peft's model, of the merged model, of the base and of ours, at the trained tokens."""
    results, output = ours
    family, algorithm = run.split("-")
    rows = {"sft": RANDOM.examples(0), "dpo": [side for pair in RANDOM.pairs(0) for side in pair.examples]}

    def logprobs(model: torch.nn.Module) -> Tensor:
        parts = []
        for row in rows[algorithm]:
            table = model(as_input(row)[:, :-1]).logits[0].log_softmax(-1)
            parts.append(table.gather(1, as_input(row)[0, 1:, None])[:, 0][torch.tensor(row.trained[1:])])
        return torch.cat(parts)

    loaded = peft_model(models / family, output / "adapters" / run)
    last, base = results[run]["last"], results[run]["base"]
    assert (last - base).abs().max() > 0.1
    torch.testing.assert_close(logprobs(loaded), last, rtol=0, atol=1e-4)
    merged = logprobs(base_model(output / "hf" / run))
    torch.testing.assert_close(merged, last, rtol=0, atol=1e-4)
    torch.testing.assert_close(merged, logprobs(loaded), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logprobs(base_model(models / family)), base, rtol=0, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_peft_loads_our_reward_model(ours, models):
    results, output = ours
    scores = results["llama-ranking"]["last"].flatten()
    sides = [side for pair in RANDOM.pairs(0) for side in pair.examples]
    adapter = output / "adapters/llama-ranking"
    merged = base_model(output / "hf/llama-ranking", is_reward_model=True)
    for model in (peft_model(models / "llama", adapter), merged):
        actual = torch.cat([model(as_input(side)).logits[0] for side in sides])
        torch.testing.assert_close(actual, scores, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_fresh_adapters_change_no_bit(ours):
    plain, fresh = ours[0]["outputs"]["plain"], ours[0]["outputs"]["fresh"]
    assert torch.equal(plain, fresh)


# ---- files ---------------------------------------------------------------------------------------


def merged_tensors(model: Path, adapter: Path, output: Path) -> dict[str, Tensor]:
    prepare_model.merge(model, adapter, output)
    return load_file(output / "model.safetensors")


@pytest.mark.slow
def test_merge_is_pefts(models, adapters, tmp_path):
    """To rounding in fp32; of a model in bf16 the sum is computed in fp32 and rounded once."""
    for name in ("llama", "qwen3", "stablelm"):
        expected = peft_model(models / name, adapters / name).merge_and_unload().state_dict()
        base = with_tokenizer(models / name, tmp_path / name)
        actual = merged_tensors(base, adapters / name, tmp_path / f"{name}-merged")
        assert actual.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(actual[key], tensor, rtol=1e-6, atol=1e-6)
    base_model(models / "llama").bfloat16().save_pretrained(tmp_path / "bf16")
    base = with_tokenizer(tmp_path / "bf16", tmp_path / "llama-bf16")
    upcast = base_model(base)
    model = peft.PeftModel.from_pretrained(upcast, adapters / "llama").merge_and_unload()
    actual = merged_tensors(base, adapters / "llama", tmp_path / "bf16-merged")
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(actual[key].float(), tensor, rtol=2**-8, atol=0)
        assert (actual[key] == tensor.bfloat16()).float().mean() > 0.999  # else a tie of rounding


@pytest.mark.slow
def test_a_reward_models_merge_has_its_head(models, adapters, tmp_path):
    base = with_tokenizer(models / "llama", tmp_path / "base")
    actual = merged_tensors(base, adapters / "llama-ranking", tmp_path / "merged")
    model = peft_model(models / "llama", adapters / "llama-ranking")
    expected = model.merge_and_unload().state_dict()
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, rtol=1e-6, atol=1e-6)
    assert architecture.read_config(tmp_path / "merged").labels == 1


def with_tokenizer(model: Path, folder: Path) -> Path:
    """A copy of a model's directory with a tokenizer."""
    shutil.copytree(model, folder)
    for path in TINY.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def tampered(adapter: Path, folder: Path, **fields: object) -> Path:
    """A copy of an adapter's directory with other fields in its configuration."""
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA is implemented"),
        ({"use_dora": True}, "use_dora = True is not implemented"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"bias": "all"}, "only adapters and a reward model's score"),
        ({"modules_to_save": ["lm_head"]}, "only adapters and a reward model's score"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"r": 0}, "r must be a number above 0"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number above 0"),
        ({"r": 5}, "--model and adapter_config.json mean"),
    ],
)
def test_other_adapters_are_refused(models, adapters, tmp_path, fields, message):
    arch = architecture.read_config(models / "llama")
    with pytest.raises(UserError, match=message):
        adapter_files.read_config(tampered(adapters / "llama", tmp_path / "adapter", **fields), arch)


def test_incomplete_and_foreign_adapters_are_refused(models, adapters, tmp_path):
    arch = architecture.read_config(models / "llama")
    folder = tampered(adapters / "llama", tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    last = adapter_files.key(3, "k_proj", "lora_B")
    save_file({name: tensor for name, tensor in tensors.items() if name != last}, path)
    with pytest.raises(UserError, match=f"{last} is missing"):
        adapter_files.read_config(folder, arch)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="lm_head.weight is no adapter"):
        adapter_files.read_config(folder, arch)
    with pytest.raises(UserError, match="is a reward model's"):
        adapter_files.read_config(adapters / "llama-ranking", arch)
    with pytest.raises(UserError, match="is no adapter of a layer's matrix|is missing|mean"):
        adapter_files.read_config(adapters / "llama", replace(arch, layers=2))
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        adapter_files.read_config(folder, arch)
    with pytest.raises(UserError, match="no adapter_config.json there"):
        adapter_files.read_config(tmp_path, arch)


def test_dropout_of_an_adapter_is_named(models, adapters, tmp_path):
    arch = architecture.read_config(models / "llama")
    folder = tampered(adapters / "llama", tmp_path / "adapter", lora_dropout=0.05)
    description = adapter_files.read_config(folder, arch).describe(arch)
    assert "now without its dropout of 0.05" in description


# ---- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(lora_alpha=8.0), "--lora-alpha 8.0 has no effect without --lora-rank"),
        (dict(lora_targets=("q_proj",)), "--lora-targets .* has no effect without --lora-rank"),
        (dict(lora_rank=-1), "--lora-rank -1 must be"),
        (dict(lora_rank=4, lora_alpha=0.0), "--lora-alpha 0.0 must be"),
        (dict(lora_rank=4, adapter=Path("x")), "--lora-rank 4 has no effect with --adapter x"),
        (dict(lora_rslora=True, adapter=Path("x")), "--lora-rslora True has no effect with --adapter x"),
        (dict(lora_rank=4, lora_targets=("q_proj", "q_proj")), "a name is there twice"),
    ],
)
def test_flags_without_effect(flags, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**flags)


def test_adapters_of_a_model(models):
    llama, nemotron = (architecture.read_config(models / name) for name in ("llama", "nemotron"))
    assert LoraConfig().of_model(llama) is None and not LoraConfig().enabled
    adapters = LoraConfig(lora_rank=4).of_model(llama)
    assert adapters.targets == tuple(ALL) and adapters.scale == 2.0
    assert LoraConfig(lora_rank=4, lora_rslora=True).of_model(llama).scale == 4.0  # 8 / sqrt(4)
    assert LoraConfig(lora_rank=4).of_model(nemotron).targets == (*ALL[:4], "up_proj", "down_proj")
    with pytest.raises(UserError, match="--lora-targets gate_proj: this model has q_proj"):
        LoraConfig(lora_rank=4, lora_targets=("gate_proj",)).of_model(nemotron)
    # per layer: q 64 + 64, k and v 32 + 64, o 64 + 64, gate and up 96 + 64, down 64 + 96; 4 layers
    assert adapters.num_weights(llama) == 4 * 4 * (128 + 2 * 96 + 128 + 3 * 160)
    assert "14,848 trained weights" in adapters.describe(llama)


def test_initial_values(models):
    """kaiming: uniform within 1 / sqrt(inputs), as peft's default; gaussian: deviation 1 / r; B is 0."""
    arch = replace(architecture.read_config(models / "llama"), hidden_size=4096)
    name = adapter_files.key(0, "q_proj", "lora_A")
    for init, deviation in {"kaiming": (3 * 4096) ** -0.5, "gaussian": 1 / 64}.items():
        adapters = LoraConfig(lora_rank=64, lora_init=init).of_model(arch)
        source = adapter_files.FreshAdapters(arch, adapters, seed=1)
        values = source.read(name)
        assert values.shape == (64, 4096)
        assert float(values.std()) == pytest.approx(deviation, rel=0.01)
        assert torch.equal(values, source.read(name))
        assert not torch.equal(values, adapter_files.FreshAdapters(arch, adapters, seed=2).read(name))
        assert not source.read(adapter_files.key(0, "q_proj", "lora_B")).any()
        if init == "kaiming":
            assert values.abs().max() <= 4096**-0.5


@pytest.mark.parametrize(
    ("config", "overlap", "message"),
    [
        (ModelConfig(attention="te"), False, "--attention te: Transformer Engine's layers"),
        (ModelConfig(fp8=True), False, "--fp8: Transformer Engine's layers"),
        (ModelConfig(), True, "--overlap-param-gather: adapters"),
    ],
)
def test_combinations_that_are_refused(models, config, overlap, message):
    arch = architecture.read_config(models / "llama")
    adapters = LoraConfig(lora_rank=4).of_model(arch)
    with pytest.raises(UserError, match=message):
        check_model(arch, config, ParallelConfig(), overlap, adapters)


def test_operations_of_a_step(models):
    """4 of 6 operations for a frozen weight and token, 6 for an adapter's."""
    arch = architecture.read_config(models / "llama")
    adapters = LoraConfig(lora_rank=4).of_model(arch)
    assert lora.matmul_params(arch, None) == arch.matmul_params
    assert lora.matmul_params(arch, adapters) == 4 * arch.matmul_params // 6 + 14_848
