"""--record: which steps, and files that are complete or absent. Their numbers: tests/tools/test_check.py."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from align.data.packing import Example
from align.distributed import parallel
from align.training import record
from align.training.record import Record


def test_the_first_step_and_each_nth_after_it(tmp_path):
    """So that a checkpoint of --save-interval N, or the model itself, has the weights before it."""
    assert record.begin(tmp_path, None, 0) is None
    steps = [step for step in range(7) if record.begin(tmp_path, 3, step)]
    assert steps == [0, 3, 6]
    assert record.begin(tmp_path, 3, 3).directory == tmp_path / "records" / "step_000004"
    assert all(record.begin(tmp_path, 1, step) for step in range(3))


@pytest.mark.parametrize("main", [True, False])
def test_rank_0_writes_over_a_record_of_an_interrupted_run(main, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "is_main", lambda: main)
    step = Record(tmp_path / "records" / "step_000001")
    old, unfinished = step.directory / "old", step.directory.with_suffix(".tmp")
    old.mkdir(parents=True)
    unfinished.mkdir()
    ids = [np.array([1, 2, 3], np.int32), np.array([4, 5], np.int32)]
    step.put_examples([Example(x, np.arange(len(x)) > 0) for x in ids])
    step.put(rows=[7, 3], scores=np.array([0.5, 1.0]))
    step.updates["policy"] = {"loss": 2.0}
    step.gradients["policy"] = {"lm_head.weight": np.ones((2, 2), np.float32)}
    step.write("a/train_sft.py", 1, 9, {"train/loss": 2.0})
    assert old.exists() != main and unfinished.exists() != main
    if not main:
        return
    arrays = load_file(step.directory / "arrays.safetensors")
    assert arrays["ids"].tolist() == [1, 2, 3, 4, 5] and arrays["lengths"].tolist() == [3, 2]
    assert arrays["trained"].tolist() == [False, True, True, False, True]
    assert arrays["rows"].tolist() == [7, 3]
    assert load_file(step.directory / "gradients_policy.safetensors")["lm_head.weight"].sum() == 4
    facts = json.loads((step.directory / "record.json").read_text())
    expected = {"script": "train_sft.py", "step": 1, "total_steps": 9, "metrics": {"train/loss": 2.0}}
    assert facts == {**expected, "first_updates": {"policy": {"loss": 2.0}}}
