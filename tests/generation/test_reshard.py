"""Weights in another layout, received in parts: the bits of Megatron's own transfer, in bounded memory."""

import json
from pathlib import Path

import pytest

from tests.support.launch import fork_ranks

pytestmark = pytest.mark.slow
PART = 65536  # bytes


@pytest.mark.parametrize(
    ("processes", "layout", "tp"),
    [
        (2, {"tp": 2}, 1),
        (2, {"pp": 2}, 2),
        (2, {"pp": 2, "vp": 2}, 2),
        (2, {}, 2),
        (4, {"tp": 2, "pp": 2}, 1),
    ],
)
@pytest.mark.parametrize("part", [PART, 2**40])
def test_parts_have_the_bits_of_the_whole(processes: int, layout: dict, tp: int, part: int, tmp_path: Path):
    fork_ranks(processes, "tests/workers/reshard.py", tmp_path / "out.json", json.dumps(layout), tp, part)
    for rank in json.loads((tmp_path / "out.json").read_text()):
        assert rank["equal"] and rank["again"]
        assert sum(rank["alive"]) == rank["whole"] > 4 * PART  # each part is freed before the next
        assert max(rank["alive"]) <= min(rank["whole"], part + rank["largest"])
        assert len(rank["alive"]) == 1 if part > PART else len(rank["alive"]) > 3
