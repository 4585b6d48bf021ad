"""A checkpoint has every number of the optimizer in its place, however Megatron divides its buffers.

Gradients are reduced in buckets, each padded at its end. Models of more than 40 million weights have several
with data parallel ranks; the workers make them small.
"""

import json
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

from align.distributed import parallel
from align.training import checkpoint, checkpoint_files
from tests.support.launch import fork_ranks

FAULTY = [  # as Megatron alone writes them
    {"model": "llama", "precision": precision, "layout": {}, "repaired": False}
    for precision in ("fp32", "bf16")
]
CASES = [
    {"model": model, "precision": precision, "layout": layout, "repaired": True}
    for model, precision, layout in (
        ("llama", "fp32", {}),
        ("llama_tied", "bf16", {}),
        ("qwen2", "fp32", {}),
        ("qwen2", "bf16", {"cp": 2}),
    )
]


@pytest.fixture(scope="module")
def results(models, tmp_path_factory) -> list[list[dict]]:
    """By rank, a result of each of FAULTY and CASES."""
    folder = tmp_path_factory.mktemp("states")
    fork_ranks(2, "tests/workers/checkpoint_states.py", models, folder, json.dumps(FAULTY + CASES))
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_checkpoints_with_misplaced_states_are_refused(results):
    for of_rank in results:
        for result in of_rank[: len(FAULTY)]:
            assert "main weights are not those of its model" in result["error"]


@pytest.mark.slow
def test_what_is_loaded_is_what_was_saved(results):
    """Weights, main weights and moments of two ranks, bit for bit."""
    for rank, of_rank in enumerate(results):
        for case, result in zip(CASES, of_rank[len(FAULTY) :], strict=True):
            assert result["buckets"] > 2 and not result["differ"], (rank, case, result)
    assert all(result["padding"] > 0 for result in results[0][len(FAULTY) :])


@pytest.mark.parametrize("version", ["0_16", "0_19"])
def test_a_checkpoint_of_either_megatron_loads(version):
    """0.16 keeps its common state in common.pt, 0.19 among the shards. That version wrote the directory."""
    path = Path(__file__).parent / "checkpoints" / f"megatron_{version}"
    assert (path / "common.pt").exists() == (version == "0_16")
    checkpoint_files.check_pickles(path)
    with parallel.start(parallel.ParallelConfig()):
        weight = ShardedTensor.from_rank_offsets("weight", torch.zeros(2, 3))
        rng = ShardedObject("rng", None, (1,), (0,), replica_id=0)
        state = checkpoint.load_state(path, {"model": {"weight": weight}, "rng": rng})
    assert state["model"]["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (state["step"], state["rng"]) == (7, {"seed": 5})
