"""Transformer Engine, by its stand-in: the same numbers, files and checkpoints as torch's layers."""

import json
from pathlib import Path

import pytest

from tests.support.launch import torchrun

pytestmark = pytest.mark.slow

CASES = {
    2: [
        dict(family="llama_tied"),
        dict(family="qwen2", tp=2),
        dict(family="qwen3", tp=2, sequence_parallel=True),
        dict(family="stablelm", pp=2),
        dict(family="nemotron", tp=2, sequence_parallel=True),
    ],
}


@pytest.fixture(scope="module", params=CASES)
def results(request, models, tmp_path_factory) -> list[tuple[dict, dict]]:
    """Results of each case and rank with torch's layers, and with Transformer Engine's."""
    output: Path = tmp_path_factory.mktemp("te")
    torchrun(request.param, "tests/workers/te.py", models, output, json.dumps(CASES[request.param]))
    ranks = [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(request.param)]
    return [tuple(pair) for rank in ranks for pair in rank]


def test_one_path_is_transformer_engine(results):
    assert all(torch["te"] == 0 and te["te"] > 0 for torch, te in results)


def test_names_and_exported_files_are_the_same(results):
    """Byte for byte, from weights that were read by the same names."""
    for torch, te in results:
        assert te["weights"] == torch["weights"] != []
        assert sorted(te["names"]) == sorted(torch["names"])


def test_logprobs_are_the_same(results):
    for torch, te in results:
        assert te["logprobs"] == pytest.approx(torch["logprobs"], abs=1e-5)


def test_checkpoints_have_the_same_entries(results):
    for torch, te in results:
        assert te["shards"] == torch["shards"]


def test_a_checkpoint_moves_between_both(results):
    """Log-probs before and after the move are those of the same weights, and so is what is trained then."""
    for pair in results:
        for before, after in (each["moved"] for each in pair):
            assert after == pytest.approx(before, abs=1e-5)


def test_training_is_the_same(results):
    """Losses, and norms of the gradient, which say whether split and copied weights are counted rightly."""
    for torch, te in results:
        for step, other in zip(te["history"], torch["history"], strict=True):
            assert step == pytest.approx(other, rel=1e-4)
