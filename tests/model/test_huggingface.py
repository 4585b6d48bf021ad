"""Hugging Face directories: fields of config.json read or refused, tensor files, the files of an export.

That weights land where they belong, in every layout, is test_parity's subject.
"""

import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from align.data import packing
from align.distributed import parallel
from align.errors import UserError
from align.generation.inference import InferenceModel
from align.model import architecture, gpt, huggingface, huggingface_names, spec
from align.model.config import ModelConfig
from align.training import engine
from tests.support.files import TINY
from tests.support.launch import torchrun
from tools.conformance.models import FAMILIES, LLAMA3_ROPE, SIZES, YARN_ROPE

THETA = {"rope_theta": 1e4, "rope_type": "default"}
LLAMA3 = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}


def directory_with(directory: Path, remove: tuple[str, ...] = (), **changes: object) -> Path:
    """A directory that holds the tiny model's config.json with some fields changed."""
    config = json.loads((TINY / "config.json").read_text()) | changes
    for name in remove:
        del config[name]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


# ---- config.json ---------------------------------------------------------------------------------


def test_the_tiny_model():
    assert architecture.read_config(TINY) == architecture.Architecture(
        family="llama",
        vocab_size=264,
        hidden_size=128,
        ffn_size=352,
        layers=4,
        heads=4,
        kv_heads=2,
        head_dim=32,
        norm_eps=1e-5,
        init_std=0.02,
        max_positions=1024,
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
        window=None,
        rope=(("rope_theta", 10000.0), ("rope_type", "default")),
    )


@pytest.mark.parametrize(
    "family, switches",
    [
        ("llama", (False, False, False, None, 16)),
        ("llama_tied", (True, False, False, None, 16)),
        ("mistral", (False, False, False, 7, 24)),
        ("qwen2", (True, True, False, None, 16)),
        ("qwen3", (False, False, True, None, 24)),
        ("stablelm", (False, True, False, None, 16)),
        ("nemotron", (False, False, False, None, 24)),
        ("llama_bias", (False, True, False, None, 16)),
        ("qwen3_yarn", (False, True, True, None, 24)),
    ],
)
def test_switches_of_the_families(models, family, switches):
    arch = architecture.read_config(models / family)
    read = arch.tied_embeddings, arch.qkv_bias, arch.qk_norm, arch.window, arch.head_dim
    assert read == switches


@pytest.mark.parametrize(
    "family, switches",
    [
        ("llama", ("rms", "swiglu", ("gate", "up"), 16, 3)),
        ("stablelm", ("layer", "swiglu", ("gate", "up"), 4, 3)),
        ("nemotron", ("layer_1p", "relu2", ("up",), 12, 2)),
    ],
)
def test_norm_mlp_and_rotation_of_the_families(models, family, switches):
    """The last switch: matrices of 64 x 96 in a layer's MLP, which count for speed."""
    arch = architecture.read_config(models / family)
    attention = 4 * 64 * arch.head_dim * 2 * (4 + 2)
    matrices = (arch.matmul_params - 131 * 64 - attention) / (4 * 64 * 96)
    assert (arch.norm, arch.activation, arch.mlp_inputs, arch.rotary_dims, matrices) == switches


def test_fields_that_a_file_leaves_out_have_transformers_defaults(tmp_path):
    directory_with(tmp_path, ("head_dim", "num_key_value_heads", "tie_word_embeddings", "rope_theta"))
    arch = architecture.read_config(tmp_path)
    assert (arch.head_dim, arch.kv_heads, arch.tied_embeddings) == (128 // 4, 4, False)
    assert dict(arch.rope)["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model_type": "gpt2"},
            r"model_type 'gpt2' is not implemented; known: llama, mistral, qwen2, qwen3, stablelm, nemotron",
        ),
        ({"model_type": "qwen2", "attention_bias": True}, r"attention_bias = True is not implemented, only"),
        ({"model_type": "qwen3", "mlp_bias": True}, r"mlp_bias = True is not implemented"),
        ({"use_mrope": True}, r"use_mrope = True is not implemented, only False"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu' is not implemented, only 'silu'"),
        ({"attention_dropout": 0.1}, r"attention_dropout = 0.1 is not implemented"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0.5 is not implemented"),
        ({"logit_scale": 0.5}, r"the field 'logit_scale' is not implemented.*remove it"),
        ({"quantization_config": {"bits": 4}}, r"the field 'quantization_config' is not implemented"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, r"the field 'auto_map' is not implemented"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            r"rope_type 'dynamic' is not implemented; known: default, linear, llama3, yarn",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}},
            r"\['mscale'\] in rope_parameters of type 'linear' is not implemented",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            r"partial_rotary_factor other than 1.0 is not implemented",
        ),
        ({"layer_norm_eps": 1e-5}, r"the field 'layer_norm_eps' is not implemented"),
        ({"use_qkv_bias": True}, r"the field 'use_qkv_bias' is not implemented"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8},
            r"use_sliding_window = True is not implemented",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"] * 2},
            r"layer_types \['full_attention', 'sliding_attention'\] is not implemented; all layers must be",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fields_that_are_refused_by_name(tmp_path, changes, message):
    directory_with(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as error:
        architecture.read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("stablelm", {"use_parallel_residual": True}, r"use_parallel_residual = True is not implemented"),
        ("stablelm", {"qk_layernorm": True}, r"qk_layernorm = True is not implemented"),
        ("stablelm", {"hidden_dropout": 0.1}, r"hidden_dropout = 0.1 is not implemented"),
        ("stablelm", {"rms_norm_eps": 1e-5}, r"the field 'rms_norm_eps' is not implemented"),
        ("stablelm", {"rope_parameters": THETA | {"partial_rotary_factor": 0.2}}, r"0.2 rotates 3 of .* 16"),
        (
            "nemotron",
            {"rope_parameters": THETA | {"partial_rotary_factor": 0.04}},
            r"0.04 rotates 0 of .* 24",
        ),
        ("nemotron", {"hidden_act": "silu"}, r"hidden_act = 'silu' is not implemented, only 'relu2'"),
        ("nemotron", {"use_qkv_bias": True}, r"the field 'use_qkv_bias' is not implemented"),
        ("nemotron", {"num_key_value_heads": None}, r"num_key_value_heads is missing"),
    ],
)
def test_fields_of_stablelm_and_nemotron_that_are_refused(models, tmp_path, family, changes, message):
    config = json.loads((models / family / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as error:
        architecture.read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_harmless_values_of_the_same_fields_are_read(tmp_path):
    directory_with(
        tmp_path,
        model_type="qwen2",
        use_sliding_window=False,
        sliding_window=32768,
        max_window_layers=2,
        attention_dropout=0.0,
        torch_dtype="bfloat16",
    )
    assert architecture.read_config(tmp_path).window is None


def test_bookkeeping_of_published_files_is_read(tmp_path):
    """Fields of Qwen2.5 (use_mrope), Unsloth, TRL, Vicuna, transformers 4. Null sets nothing."""
    directory_with(
        tmp_path,
        use_mrope=False,
        _attn_implementation_autoset=True,
        attn_implementation="flash_attention_2",
        gradient_checkpointing=True,
        unsloth_fixed=True,
        unsloth_version="2026.1.1",
        tokenizer_class="LlamaTokenizer",
        max_sequence_length=2048,
        keys_to_ignore_at_inference=["past_key_values"],
        temperature=0.6,
        do_sample=True,
        quantization_config=None,
        attn_logit_softcapping=None,
        add_cross_attention=False,
        pruned_heads={},
    )
    assert architecture.read_config(tmp_path) == architecture.read_config(TINY)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--model .*no config.json there"):
        architecture.read_config(tmp_path)
    arch = architecture.read_config(directory_with(tmp_path))
    with pytest.raises(UserError, match=r"--model .*: no safetensors files there"):
        huggingface.open_source(tmp_path, arch, 0)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"no model.safetensors there \(other weight formats are not read\)"):
        huggingface.open_source(tmp_path, arch, 0)


def test_a_config_that_is_no_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config.json: not valid JSON: .*line 1"):
        architecture.read_config(tmp_path)


# ---- rotary positions ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scaling, expected",
    [
        (None, {"rope_type": "default"}),
        ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (LLAMA3, LLAMA3),
    ],
    ids=str,
)
def test_files_of_transformers_4_and_5_say_the_same(tmp_path, scaling, expected):
    """4: rope_theta and rope_scaling (whose "type" is older than "rope_type"); 5: rope_parameters."""
    directory_with(tmp_path, rope_theta=12345.0, rope_scaling=scaling)
    old = architecture.read_config(tmp_path).rope
    directory_with(tmp_path, ("rope_theta",), rope_parameters={"rope_theta": 12345.0, **expected})
    assert old == architecture.read_config(tmp_path).rope
    assert old == tuple(sorted({"rope_theta": 12345.0, **expected}.items()))


@pytest.mark.parametrize("scaling, expected", [(None, {}), (LLAMA3, LLAMA3)])
def test_configurations_of_transformers_4_say_the_same(scaling, expected):
    """As its 4.57 reads them: two attributes, and none of version 5."""
    hf = types.SimpleNamespace(rope_theta=12345.0, rope_scaling=scaling)
    assert architecture.rope_fields(hf) == {"rope_theta": 12345.0, **expected}


@pytest.mark.parametrize("field", ["partial_rotary_factor", "rope_parameters", None])
@pytest.mark.parametrize("family, default", [("stablelm", 0.25), ("nemotron", 0.5)])
def test_share_of_a_head_that_is_rotated(models, tmp_path, family, default, field):
    """At the top level as transformers 4 writes it, inside as 5 does, or left out; to 4.57 an attribute."""
    config = json.loads((models / family / "config.json").read_text())
    del config["rope_parameters"]
    if field:
        config |= {
            field: 0.75 if field == "partial_rotary_factor" else THETA | {"partial_rotary_factor": 0.75}
        }
    (tmp_path / "config.json").write_text(json.dumps(config))
    arch, share = architecture.read_config(tmp_path), 0.75 if field else default
    assert (arch.rotary_fraction, arch.rotary_dims) == (share, arch.head_dim * share)
    assert arch.rope == (("rope_theta", 1e4), ("rope_type", "default"))
    hf = types.SimpleNamespace(rope_theta=1e4, partial_rotary_factor=share)  # Nemotron has no rope_scaling
    assert architecture.rope_fields(hf) == {"rope_theta": 1e4, "partial_rotary_factor": share}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 2.5},
        LLAMA3,
        YARN,
        {"type": "yarn", "factor": 4.0},  # of max_position_embeddings
        YARN | {"attention_factor": 0.75, "mscale": 2.0, "mscale_all_dim": 0.5},
        YARN | {"mscale": 1.5, "mscale_all_dim": 0.8},
        YARN | {"mscale": 1.5},
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.0},
        YARN | {"factor": 0.5},
        YARN | {"beta_fast": 24, "beta_slow": 2.5},
        YARN | {"truncate": False},
        YARN | {"truncate": True, "beta_fast": None},
        YARN | {"original_max_position_embeddings": 5},  # fewer positions than one turn
        YARN | {"beta_fast": 1.0, "truncate": False},  # first and last pair are the same
    ],
    ids=str,
)
def test_frequencies_are_those_of_transformers(tmp_path, scaling):
    """And the factor of cosines and sines."""
    directory_with(tmp_path, rope_theta=500000.0, rope_scaling=scaling, head_dim=128)
    arch = architecture.read_config(tmp_path)
    frequencies, scale = spec.rotary_frequencies(arch), spec.rotary_scale(arch)
    theirs = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(tmp_path))
    assert frequencies.shape == (64,)
    torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=1e-6, atol=0)
    expected = torch.full((64,), theirs.attention_scaling)
    torch.testing.assert_close(torch.ones(64) if scale is None else scale, expected, rtol=1e-6, atol=0)


# ---- tensor files --------------------------------------------------------------------------------


@pytest.fixture
def llama(models, tmp_path) -> Path:
    """A copy of the random Llama, to spoil."""
    return Path(shutil.copytree(models / "llama", tmp_path / "llama"))


def opened(directory: Path) -> huggingface.Source:
    return huggingface.open_source(directory, architecture.read_config(directory), 0)


def rewrite(directory: Path, remove: tuple[str, ...] = (), **changes: Tensor) -> None:
    """The model's file with some tensors changed, "__" in a name standing for "."."""
    tensors = load_file(directory / "model.safetensors")
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    kept = {name: tensor for name, tensor in tensors.items() if name not in remove}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_that_transformers_writes(models, family):
    arch = architecture.read_config(models / family)
    theirs = load_file(models / family / "model.safetensors")
    assert huggingface_names.tensor_shapes(arch) == {
        name: tuple(tensor.shape) for name, tensor in theirs.items()
    }


def test_missing_unknown_and_mis_shaped_tensors_are_refused_by_name(llama):
    rewrite(llama, score__weight=torch.zeros(1, 64))
    with pytest.raises(UserError, match="architecture llama does not have, score.weight the first of 1"):
        opened(llama)
    rewrite(llama, remove=("score.weight",), model__norm__weight=torch.zeros(65))
    with pytest.raises(UserError, match=r"model.norm.weight is \(65,\), config.json means \(64,\)"):
        opened(llama)
    rewrite(llama, remove=("model.norm.weight", "lm_head.weight"))
    with pytest.raises(UserError, match="tensors are missing, lm_head.weight the first of 2"):
        opened(llama)


def test_tensors_that_say_nothing_new_are_no_error(models, tmp_path):
    """Old files hold the rotary frequencies, and tied ones may spell the output embedding out."""
    tied = shutil.copytree(models / "llama_tied", tmp_path / "tied")
    frequencies = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(8)}
    head = load_file(tied / "model.safetensors")["model.embed_tokens.weight"].clone()
    rewrite(tied, lm_head__weight=head, **frequencies)
    assert architecture.read_config(tied).tied_embeddings
    opened(tied)


@pytest.mark.parametrize("sharded", [False, True])
@torch.no_grad()
def test_tied_in_config_json_but_with_an_output_embedding_of_its_own(world, models, tmp_path, sharded):
    """transformers uses the file's, so the model is untied; the export says so."""
    source = shutil.copytree(models / "llama_tied", tmp_path / "source")
    head = load_file(source / "model.safetensors")["model.embed_tokens.weight"].clone()
    head[130, 63] += 1  # the last number of all
    rewrite(source, lm_head__weight=head)
    ids = torch.randint(0, 131, (1, 20), generator=torch.Generator().manual_seed(0))
    expected = transformers.AutoModelForCausalLM.from_pretrained(source)(ids).logits[0]
    if sharded:
        split_in_two(source)
    policy = loaded(source)
    logits = InferenceModel(policy, 1).prefill([ids[0]])[0].logits
    torch.testing.assert_close(logits, expected[-1], rtol=0, atol=1e-5)
    huggingface.save(policy, source, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_file(tmp_path / "hf" / "model.safetensors")["lm_head.weight"], head)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(ids).logits[0]
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-6)


def split_in_two(directory: Path) -> dict[str, Tensor]:
    """Divide the model's file into two with an index; returns all tensors."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {name: f"part{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, directory / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def test_several_files_behind_an_index(llama):
    tensors = split_in_two(llama)
    source = opened(llama)
    for name, tensor in tensors.items():
        assert torch.equal(source.read(name), tensor)
    name = "model.layers.2.self_attn.o_proj.weight"
    assert torch.equal(source.read(name, slice(3, 7), slice(10, 20)), tensors[name][3:7, 10:20])
    assert torch.equal(source.read(name, columns=slice(10, 20)), tensors[name][:, 10:20])


def test_two_sets_of_weights_are_refused(llama):
    """An index of other files beside model.safetensors; an index of that very file is no second set."""
    shutil.copy(llama / "model.safetensors", llama.parent)
    tensors = split_in_two(llama)
    shutil.copy(llama.parent / "model.safetensors", llama)
    with pytest.raises(UserError, match=r"two sets of weights, model.safetensors and .*index.json") as error:
        opened(llama)
    assert "part0.safetensors" in str(error.value)
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    opened(llama)


def test_files_that_are_cut_short_or_missing_are_named(llama):
    whole = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(UserError, match=r"--model: .*/model.safetensors cannot be read: "):
        opened(llama)
    (llama / "model.safetensors").write_bytes(whole)
    split_in_two(llama)
    (llama / "part1.safetensors").unlink()
    with pytest.raises(UserError, match=r"--model: .*/part1.safetensors cannot be read: "):
        opened(llama)


@pytest.mark.parametrize("family, norms", [(None, 1.0), ("stablelm", 1.0), ("nemotron", 0.0)])
def test_random_weights_are_the_same_however_they_are_cut(models, family, norms):
    """Norms start as the plain norm: Nemotron adds one to their weights."""
    arch = architecture.read_config(models / family if family else TINY)
    source, other = (huggingface.RandomSource(arch, seed) for seed in (1, 2))
    for name, shape in huggingface_names.tensor_shapes(arch).items():
        whole = source.read(name)
        assert whole.shape == shape
        assert torch.equal(
            torch.cat([source.read(name, slice(0, 5)), source.read(name, slice(5, None))]), whole
        )
        if len(shape) == 1:
            assert torch.equal(whole, torch.full(shape, 0.0 if name.endswith("bias") else norms))
            continue
        assert torch.equal(source.read(name, columns=slice(8, 16)), whole[:, 8:16])
        assert not torch.equal(other.read(name), whole)
        assert whole.std().item() == pytest.approx(arch.init_std, rel=0.05)
    one, another = (source.read(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1))
    assert not torch.equal(one, another)


# ---- export --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    with parallel.start(parallel.ParallelConfig()):
        yield


def loaded(directory: Path, precision: str = "fp32") -> gpt.Policy:
    """The model of a directory in one process."""
    arch = architecture.read_config(directory)
    policy = gpt.build_policy(arch, ModelConfig(str(directory), precision), parallel.ParallelConfig())
    huggingface.load(policy, huggingface.open_source(directory, arch, 0))
    return policy


def test_a_large_export_is_split_into_files_with_an_index(world, models, tmp_path, monkeypatch):
    limit = 60_000
    monkeypatch.setattr(huggingface, "MAX_FILE_BYTES", limit)
    huggingface.save(loaded(models / "llama"), models / "llama", tmp_path / "hf")
    tensors = load_file(models / "llama" / "model.safetensors")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 5 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in files:
        with safe_open(tmp_path / "hf" / file, "pt") as part:
            sizes = [part.get_tensor(name).nbytes for name in part.keys()]  # noqa: SIM118 it is no dictionary
        assert sum(sizes) <= limit or len(sizes) == 1
    source = opened(tmp_path / "hf")
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in tensors.items())


def test_an_export_replaces_an_older_one_and_what_a_kill_left(world, models, tmp_path):
    for name in ("hf", "hf.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old.safetensors").touch()
    wrote = []
    huggingface.save(loaded(models / "llama"), models / "llama", tmp_path / "hf", [wrote.append])
    assert wrote == [tmp_path / "hf.tmp"]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize("family, field", [("llama", "dtype"), ("nemotron", "torch_dtype")])
def test_an_export_in_bf16_says_so_in_the_field_of_its_file(world, models, tmp_path, family, field):
    source = shutil.copytree(models / family, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps({**config, field: "float32"}))
    huggingface.save(loaded(source, "bf16"), source, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == {**config, field: "bfloat16"}
    tensors = load_file(source / "model.safetensors")
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor.bfloat16()) for name, tensor in tensors.items())


@torch.no_grad()
def test_logits_of_a_model_of_the_shape_of_gpt_2b(world, tmp_path):
    """GPT-2B-001 as StableLM: half of each head rotated, a key for each query, no biases but the norms'.

    What decodes and what trains compute transformers' numbers from the same file.
    """
    torch.manual_seed(0)
    config = transformers.StableLmConfig(
        **SIZES | dict(num_key_value_heads=4, initializer_range=0.1),
        rope_parameters=THETA | {"partial_rotary_factor": 0.5},
    )
    theirs = transformers.StableLmForCausalLM(config).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    policy, ids = loaded(tmp_path), torch.randint(0, SIZES["vocab_size"], (40,))
    expected = theirs(ids[None]).logits[0]
    assert 1 < expected.abs().max() < 30
    prefixes = InferenceModel(policy, 1).prefill([ids[: n + 1] for n in range(40)])
    logits = torch.stack([prefix.logits for prefix in prefixes])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    batch = packing.collate([[packing.Example(ids.numpy().astype(np.int32), np.arange(40) > 0)]])
    logprobs = expected.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(engine.forward(policy, batch)[:39], logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("StableLm", {"rope_parameters": {**YARN_ROPE, "partial_rotary_factor": 0.5}, "use_qkv_bias": True}),
        ("Nemotron", {"attention_bias": True}),
        ("Nemotron", {"mlp_bias": True}),
        ("Llama", {"mlp_bias": True}),
    ],
)
@torch.no_grad()
def test_logits_with_yarn_and_biases(world, tmp_path, kind, changes):
    """Prefill logits: a part of each head with YaRN's factor; biases of attention or MLP alone."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **changes)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, SIZES["vocab_size"], (40,))
    prefixes = InferenceModel(loaded(tmp_path), 1).prefill([ids[: n + 1] for n in range(40)])
    logits = torch.stack([prefix.logits for prefix in prefixes])
    torch.testing.assert_close(logits, theirs(ids[None]).logits[0], rtol=0, atol=1e-4)


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_reading_needs_less_than_twice_a_ranks_own_shard(tmp_path):
    """A model of about 200 MB on two ranks: what each has to spare for reading, its weights included."""
    directory_with(
        tmp_path,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=12000,
    )
    shapes = huggingface_names.tensor_shapes(architecture.read_config(tmp_path))
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    torchrun(2, "tests/workers/memory.py", tmp_path, tmp_path)
    for rank in range(2):
        memory = json.loads((tmp_path / f"{rank}.json").read_text())
        assert memory["shard"] > 80e6
        assert memory["shard"] < memory["peak"] < 2 * memory["shard"], memory


def test_directory_of_a_run_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text('{"flags": {"model": "tiny"}, "versions": {}}')
    with pytest.raises(UserError, match="is the directory of a run: its model is .*/hf"):
        architecture.read_config(tmp_path)
