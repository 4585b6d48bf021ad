"""Shared fixtures: the tiny tokenizer, random tiny models of every family, models of the toy task."""

import json
from pathlib import Path
from unittest import mock

import pytest

from align.data import toy
from align.data.hf_tokenizer import HuggingFaceTokenizer
from align.data.tokenizer import load_tokenizer
from tests.support.files import ROOT, TINY, write_rows
from tests.support.launch import fork_ranks
from tests.support.shared import filled_once
from tools.conformance.models import write_models

LONGEST = (  # files of more than half a minute, by their time in `make test`
    "training/test_resume scripts/test_scripts generation/test_generator scripts/test_ppo_invariance "
    "scripts/test_rs_invariance model/test_parity planning/test_plan scripts/test_self_reward_invariance "
    "museum/test_museum training/test_invariance training/test_offload scripts/test_generate_script "
    "scripts/test_examples training/test_continuation training/test_damage distributed/test_watchdog "
    "scripts/test_train_lora generation/test_lora_sampling model/test_lora"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that no worker is left alone with one of them at the end."""
    places = {ROOT / "tests" / f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def tiny() -> HuggingFaceTokenizer:
    """The tiny model's tokenizer: a token is a byte; 257, 258 are <|im_start|> (BOS) and <|im_end|> (EOS)."""
    return load_tokenizer(TINY)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a randomly initialised Hugging Face model of each family, every tensor random."""
    return filled_once(tmp_path_factory, "models", write_models)


@pytest.fixture(scope="session")
def toy_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ with prompts, sft/hf with a policy that mostly answers in letters, rm/hf with a reward model."""
    return filled_once(tmp_path_factory, "toy_models", train_toy_models)


def train_toy_models(directory: Path) -> None:
    toy.write(directory / "data", num_train=640, num_val=16)
    toy.write_comparisons(directory / "data", num_train=64, num_val=16)
    common = "--max-seq-len 64 --max-epochs 3 --save-interval 0 --lr 3e-3 --min-lr 1e-3 --warmup-steps 2"
    sft, rm = (
        f"train_{name}.py --model {model} --train-data {directory}/data/train{kind}.jsonl "
        f"--output {directory}/{name} {common}"
        for name, model, kind in (("sft", "tiny", ""), ("rm", directory / "sft/hf", "_comparisons"))
    )
    fork_ranks(2, "tests/workers/resume.py", json.dumps([sft.split(), rm.split()]))


@pytest.fixture(scope="session")
def toy_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ with prompts of three letters and templates, hf/ with a policy that answers, judges, meta-judges.

    None of it well, but mostly in the form that is asked for, with scores of all kinds; some answers do not
    end. Few letters make short judgements.
    """
    return filled_once(tmp_path_factory, "toy_judge", train_toy_judge)


def train_toy_judge(directory: Path) -> None:
    data = directory / "data"
    with mock.patch.object(toy, "SIZES", (3,)):
        (train,), _ = toy.write(data, num_train=160, num_val=8)
        rows = toy.judge_rows(400, seed=1, after=0) + toy.meta_rows(600, seed=2, after=0)
    for question, answer in [json.loads(line)["messages"] for line in train.read_text().splitlines()[::10]]:
        rows.append({"messages": [question, {**answer, "content": " ".join([answer["content"]] * 8)}]})
    write_rows(data / "train_judge.jsonl", rows)
    (data / "judge.txt").write_text(toy.JUDGE_TEMPLATE)
    (data / "meta_judge.txt").write_text(toy.META_TEMPLATE)
    command = (
        f"train_sft.py --train-data {train} {data}/train_judge.jsonl --output {directory} --max-seq-len 160 "
        "--max-epochs 3 --save-interval 0 --lr 4e-3 --min-lr 5e-4 --warmup-steps 5"
    )
    fork_ranks(2, "tests/workers/resume.py", json.dumps([command.split()]))
