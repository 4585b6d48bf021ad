"""Steps of a run, validation steps, and rows of a validation."""

import importlib

import pytest

from align.data.packing import BatchConfig
from align.training.config import CommonConfig, LoopConfig


def config(**loop: int) -> CommonConfig:
    return CommonConfig(batch=BatchConfig(global_batch_size=4), loop=LoopConfig(**loop))


def test_total_steps():
    assert config().total_steps(19) == 4
    assert config(max_epochs=3).total_steps(19) == 12
    assert config(max_epochs=3, max_steps=5).total_steps(19) == 5
    assert config(max_steps=50).total_steps(19) == 4


def test_validates():
    assert [done for done in range(1, 11) if config(val_interval=3).validates(done, 10)] == [3, 6, 9, 10]


def test_val_rows():
    assert list(range(100))[config().val_rows()] == list(range(100))
    assert list(range(100))[config(val_batches=2).val_rows()] == list(range(8))


@pytest.mark.parametrize(
    ("script", "rows"),
    [("sft", 1000), ("rm", 1000), ("dpo", 1000), ("rs", 32), ("ppo", 64), ("self_reward", 32)],
)
def test_val_rows_by_default(script, rows):
    """A validation that samples takes the rows of one step, any other all of --val-data."""
    default = importlib.import_module(f"train_{script}").Config()
    assert default.val_rows() == slice(None if rows == 1000 else rows)
    assert len(range(1000)[default.val_rows()]) == rows
