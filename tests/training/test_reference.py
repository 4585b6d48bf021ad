"""Reference log-probs: which batches are computed, when a kept file serves, what the start check refuses.

The numbers themselves: tests/model/test_parity.py, test_invariance.py and test_scripts.py.
"""

import math
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from align.data.packing import BatchConfig, Example
from align.data.preferences import Pair
from align.distributed import parallel
from align.distributed.parallel import ParallelConfig
from align.errors import UserError
from align.model.config import ModelConfig
from align.training import reference, tables
from align.training.checkpoint import CheckpointConfig


def test_each_row_once():
    """The first epoch's batches stay as they are; later ones only add what was in none."""
    batches = [[3, 1], [0, 2], [4, 3], [1, 0], [5, 4]]  # 2 of 6 rows are left over in each epoch
    assert reference.without_repeats(batches) == [[3, 1], [0, 2], [4], [5]]
    assert reference.without_repeats([[]]) == []


def test_tables(tmp_path):
    path = tmp_path / "reference.safetensors"
    assert tables.read(path, "a") is None
    tables.write(path, "a", {"train": np.array([[-1.5, -2.0]]), "val": np.ones((0, 2))})
    assert tables.read(path, "b") is None
    assert tables.read(path, "a")["train"].tolist() == [[-1.5, -2.0]]
    whole = path.read_bytes()
    for spoilt in (whole[:-1] + b"\x01", whole[:-8], whole[:40], b"", b"\xff" * 64):
        path.write_bytes(spoilt)
        with pytest.raises(UserError, match="reference.safetensors is damaged: .*remove it, and it is made"):
            tables.read(path, "a")


def example(*ids: int) -> Example:
    return Example(np.array(ids, np.int32), np.array([False] + [True] * (len(ids) - 1)))


def test_fingerprint_tells_what_matters_apart(tmp_path, monkeypatch):
    layout = {"tp": 1}
    monkeypatch.setattr(reference.parallel, "layout_sizes", lambda: layout)
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    start = ModelConfig(model=str(tmp_path), precision="fp32")
    pairs = {"train": [Pair(example(1, 2, 3), example(1, 4))], "val": []}
    batch = BatchConfig()

    def made_of(start=start, pairs=pairs, batch=batch, seed=0) -> str:
        return reference.fingerprint(start, pairs, batch, seed)

    first = made_of()
    assert first == made_of()
    others = [
        made_of(start=replace(start, precision="bf16")),
        made_of(batch=replace(batch, micro_batch_tokens=2048)),
        made_of(seed=1),
        made_of(pairs={"train": [Pair(example(1, 2, 5), example(1, 4))], "val": []}),
        made_of(pairs={"train": [Pair(example(1, 2), example(3, 1, 4))], "val": []}),  # the same ids in a row
        made_of(pairs={"train": [], "val": pairs["train"]}),
        made_of(start=replace(start, attention="torch")),
    ]
    layout["tp"] = 2
    others.append(made_of())
    layout["tp"] = 1
    weights.write_bytes(b"other")
    others.append(made_of())
    assert len({first, *others}) == len(others) + 1


def test_weights_id(tmp_path):
    """A change anywhere in a large file shows as long as it reaches one of the pieces that are read."""
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    content = np.random.default_rng(0).integers(0, 256, 1 << 24, dtype=np.uint8)
    seen = set()
    for change in (None, 0, len(content) - 1, slice(5_000_000, 6_000_000)):
        changed = content.copy()
        if change is not None:
            changed[change] ^= 1
        path.write_bytes(changed.tobytes())
        seen.add(reference.weights_id(tmp_path))
    (tmp_path / "config.json").write_text('{"a": 1}')
    seen.add(reference.weights_id(tmp_path))
    assert len(seen) == 5


def test_another_model_does_not_continue_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(reference.parallel, "is_main", lambda: True)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    output = tmp_path / "run"
    output.mkdir()
    reference.check_same(output, tmp_path / "a", CheckpointConfig())
    reference.check_same(output, tmp_path / "b", CheckpointConfig())  # nothing to continue
    (output / "checkpoints/step_00000001").mkdir(parents=True)
    (output / "checkpoints/step_00000001/state.json").write_text("{}")
    reference.check_same(output, tmp_path / "b", CheckpointConfig())
    with pytest.raises(UserError, match="is not the model that this run began with"):
        reference.check_same(output, tmp_path / "a", CheckpointConfig())
    reference.check_same(output, tmp_path / "a", CheckpointConfig(resume=False))  # starts over


def test_check_start():
    fine = {"preference_loss": math.log(2), "logratio_abs_mean": 0.0}
    reference.check_start(fine, "dpo", 0.1, 0.0)
    reference.check_start({**fine, "preference_loss": 0.5}, "kto_pair", 0.1, 0.0)
    for wrong in (
        {"preference_loss": 0.6931472},
        {"logratio_abs_mean": 1e-12},
        {"logratio_abs_mean": math.nan},
    ):
        with pytest.raises(RuntimeError, match="before the first update the policy is the reference"):
            reference.check_start({**fine, **wrong}, "dpo", 0.1, 0.0)


@pytest.mark.parametrize(
    ("logratio", "loss", "passes"),
    [
        (0.5, math.log(2), True),
        (0.5, math.log(2) + 0.0999, True),  # of log-ratios 0.5 and -0.5: beta 0.1 times a gap of 1 nat
        (0.5, math.log(2) + 0.1001, False),
        (0.5, math.log(2) - 0.1001, False),
        (0.501, math.log(2), False),
        (math.nan, math.log(2), False),
    ],
)
def test_start_within_a_bound(logratio, loss, passes):
    """--audit-start 0.5: on log-ratios, and on what they can do to the loss of dpo."""
    metrics = {"preference_loss": loss, "logratio_abs_mean": logratio}
    if passes:
        return reference.check_start(metrics, "dpo", 0.1, 0.5)
    with pytest.raises(RuntimeError, match=r"log-probs differ by .* nats a sequence \(--audit-start 0.5\)"):
        reference.check_start(metrics, "dpo", 0.1, 0.5)


def test_start_is_exact_where_passes_are():
    """On CPUs and with --deterministic nothing is forgiven; elsewhere fp32 and bf16 have bounds."""
    for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, 1.0)):
        assert reference.start_bound(None, dtype, is_exact=True) == 0.0
        assert reference.start_bound(None, dtype, is_exact=False) == bound
    assert parallel.is_exact(ParallelConfig()) and parallel.is_exact(ParallelConfig(deterministic=True))
    with mock.patch.object(parallel, "device", lambda: torch.device("cuda")):
        assert not parallel.is_exact(ParallelConfig())
        assert parallel.is_exact(ParallelConfig(deterministic=True))
