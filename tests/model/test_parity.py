"""Against transformers, in fp32, for every family and split: outputs, three steps of AdamW, export.

Language models with SFT and DPO; reward models with ranking. The plain loops over transformers read one
answer at a time: no packing, no padding, no shared prompts, no micro-batches.
"""

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from align.distributed import parallel
from align.errors import UserError
from align.model import architecture, gpt, huggingface
from align.model.config import ModelConfig
from tests.support.launch import fork_ranks
from tests.support.plain_training import answer_logprob, as_input, pair_loss, plain_training
from tests.workers.parity import FRESH
from tools.conformance.losses import BETA, LR, SEED
from tools.conformance.models import FAMILIES
from tools.conformance.rows import RANDOM, VOCAB

pytestmark = pytest.mark.slow

# ---- ours ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory):
    """A directory with a reward model of each family as transformers writes it, every tensor random."""
    directory = tmp_path_factory.mktemp("reward_models")
    for seed, (name, config) in enumerate(FAMILIES.items()):
        torch.manual_seed(100 + seed)
        config = copy.deepcopy(config)
        config.num_labels = 1
        model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(directory / name)
    return directory


@pytest.fixture(
    scope="module",
    params=[
        dict(),
        dict(tp=2),
        dict(pp=2),
        dict(tp=2, pp=2, sequence_parallel=True),
    ],
    ids=str,
)
def ours(request, models, reward_models, tmp_path_factory):
    """(results of the worker by family, directory of the exports) in one layout."""
    layout, output = request.param, tmp_path_factory.mktemp("parity")
    processes = layout.get("tp", 1) * layout.get("pp", 1)
    fork_ranks(processes, "tests/workers/parity.py", models, reward_models, output, json.dumps(layout))
    return torch.load(output / "results.pt", weights_only=True), output


# ---- transformers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(models, reward_models):
    """Results of plain loops over transformers and torch.optim."""
    expected = {}
    for name in FAMILIES:
        expected[name] = {
            "logits": plain_logits(language_model(models / name)),
            "values": plain_values(reward_model(reward_models / name)),
            "sft": plain_sft(language_model(models / name)),
            "dpo": plain_dpo(language_model(models / name), language_model(models / name)),
            "ranking": plain_ranking(reward_model(reward_models / name)),
        }
    return expected


def language_model(directory: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def reward_model(directory: Path) -> torch.nn.Module:
    return transformers.AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)


@torch.no_grad()
def plain_logits(lm: torch.nn.Module) -> Tensor:
    """[T, V], row after row."""
    return torch.cat([lm(as_input(row)[:, :-1]).logits[0] for row in RANDOM.examples(0)])


@torch.no_grad()
def plain_values(rm: torch.nn.Module) -> list[Tensor]:
    """The head on the last hidden state at every token of every answer, [n, 1] each."""
    sides = [as_input(side) for pair in RANDOM.pairs(0) for side in pair.examples]
    return [rm.score(rm.model(ids).last_hidden_state)[0] for ids in sides]


def plain_sft(lm: torch.nn.Module) -> list[dict[str, float]]:
    def parts(step: int) -> Iterator[tuple[Tensor, dict[str, float]]]:
        count = sum(int(row.trained.sum()) for row in RANDOM.examples(step))
        for row in RANDOM.examples(step):
            yield -answer_logprob(lm, row) / count, {}

    return plain_training(lm, parts, LR["sft"])


def plain_dpo(lm: torch.nn.Module, frozen: torch.nn.Module) -> list[dict[str, float]]:
    def parts(step: int) -> Iterator[tuple[Tensor, dict[str, float]]]:
        for pair in RANDOM.pairs(step):
            rewards = []
            for side in pair.examples:
                with torch.no_grad():
                    ref = answer_logprob(frozen, side)
                rewards.append(BETA * (answer_logprob(lm, side) - ref))
            yield pair_loss(*rewards, 0.0, len(RANDOM.pairs(step)))

    return plain_training(lm, parts, LR["dpo"])


def plain_ranking(rm: torch.nn.Module) -> list[dict[str, float]]:
    def parts(step: int) -> Iterator[tuple[Tensor, dict[str, float]]]:
        for pair in RANDOM.pairs(step):
            chosen, rejected = (rm(as_input(side)).logits[0, 0].double() for side in pair.examples)
            yield pair_loss(chosen, rejected, pair.margin, len(RANDOM.pairs(step)))

    return plain_training(rm, parts, LR["ranking"])


# ---- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(ours, reference, family):
    results, _ = ours
    difference = (results[family]["logits"] - reference[family]["logits"]).abs().max()
    assert difference <= 1e-4, difference


@pytest.mark.parametrize("family", FAMILIES)
def test_values(ours, reference, family):
    """At every token, the prompt's included, whose places the rejected side takes from the chosen one."""
    results, _ = ours
    for actual, expected in zip(results[family]["values"], reference[family]["values"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "ranking"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training(ours, reference, family, algorithm):
    results, _ = ours
    steps = zip(results[family][algorithm], reference[family][algorithm], strict=True)
    for step, (actual, expected) in enumerate(steps):
        for name, value in expected.items():
            allowed = 1e-3 if name == "grad_norm" else 1e-4
            assert abs(actual[name] - value) <= allowed, (step, name, actual[name], value)


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files of a directory."""
    return {name: x for file in directory.glob("*.safetensors") for name, x in load_file(file).items()}


def assert_same_bytes(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name].view(torch.int32), tensor.view(torch.int32)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_are_byte_identical(ours, models, reward_models, family):
    _, output = ours
    assert_same_bytes(tensors(output / "lm" / family), tensors(models / family))
    assert "score.weight" in tensors(reward_models / family)
    assert_same_bytes(tensors(output / "rm" / family), tensors(reward_models / family))


def opened(kind: type, directory: Path, **settings: int) -> torch.nn.Module:
    """Load an export with transformers; every tensor must have its place and every place its tensor."""
    module, info = kind.from_pretrained(directory, output_loading_info=True, **settings)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return module


@torch.no_grad()
def test_transformers_loads_the_language_model(ours, reference):
    """Sharded or not, transformers reads the export and computes the same."""
    _, output = ours
    for family in FAMILIES:
        lm = opened(transformers.AutoModelForCausalLM, output / "lm" / family)
        logits = lm(as_input(RANDOM.examples(0)[0])[:, :-1]).logits[0]
        torch.testing.assert_close(logits, reference[family]["logits"][: len(logits)])


@torch.no_grad()
def test_transformers_loads_the_reward_model(ours):
    """transformers computes our scores from our export, each text alone or padded on the right."""
    results, output = ours
    rows = [as_input(side)[0] for pair in RANDOM.pairs(0) for side in pair.examples]
    pad = next(token for token in range(VOCAB) if all(row[-1] != token for row in rows))
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    kept = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    for family in FAMILIES:
        ours_last = torch.stack([values[-1] for values in results[family]["values"]])
        alone = opened(transformers.AutoModelForSequenceClassification, output / "rm" / family)
        config = json.loads((output / "rm" / family / "config.json").read_text())
        assert config["architectures"] == [type(alone).__name__]
        scores = torch.cat([alone(row[None]).logits for row in rows])
        torch.testing.assert_close(scores, ours_last, rtol=0, atol=1e-4)
        batched = opened(
            transformers.AutoModelForSequenceClassification, output / "rm" / family, pad_token_id=pad
        )
        scores = batched(padded, attention_mask=kept.long()).logits
        torch.testing.assert_close(scores, ours_last, rtol=0, atol=1e-4)


def test_size_of_a_fresh_head(models):
    """Standard deviation 1 / sqrt(H + 1), whatever initializer_range says; a critic's head is 0."""
    arch = dataclasses.replace(architecture.read_config(models / "llama"), hidden_size=2**16 - 1, labels=2)
    head = huggingface.FreshHead(None, arch, SEED).read("score.weight")
    assert head.shape == (2, 2**16 - 1)
    assert float(head.std()) == pytest.approx(1 / 256, rel=0.02)  # 7 standard errors of 131,070 numbers
    assert not huggingface.FreshHead(None, arch, SEED, std=0.0).read("score.weight").any()


@pytest.mark.parametrize("family", FRESH)
def test_fresh_head(ours, models, family):
    """A language model that is given a head: that one and no other in every layout, and the rest its own."""
    _, output = ours
    directory, arch = output / "fresh" / family, architecture.read_config(models / family)
    source = huggingface.FreshHead(None, dataclasses.replace(arch, labels=1), SEED)
    head = source.read("score.weight")
    assert head.shape == (1, arch.hidden_size)
    trunk = {name: x for name, x in tensors(models / family).items() if name != "lm_head.weight"}
    assert_same_bytes(tensors(directory), {**trunk, "score.weight": head})
    module = opened(transformers.AutoModelForSequenceClassification, directory)
    assert module.config.num_labels == 1
    assert architecture.read_config(directory).labels == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reward_model_is_no_language_model(reward_models, family):
    arch = architecture.read_config(reward_models / family)
    assert arch.labels == 1
    with pytest.raises(UserError, match="is a reward model"):
        gpt.build_policy(arch, ModelConfig(), parallel.ParallelConfig())
