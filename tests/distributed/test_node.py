"""One rank of a machine works for all of its ranks, which share its files."""

import json
from pathlib import Path

import pytest

from tests.support.launch import FORKS, fork_ranks

pytestmark = pytest.mark.skipif(not FORKS, reason="ranks open each other's files by /proc")


@pytest.mark.parametrize(
    ("machines", "first"), [("a a a", [0, 0, 0]), ("a b a", [0, 1, 0]), ("a b c", [0, 1, 2])]
)
def test_the_first_rank_of_each_machine_reads_for_the_others(machines, first, tmp_path: Path):
    fork_ranks(3, "tests/workers/node.py", tmp_path, *machines.split())
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    for rank, record in enumerate(ranks):
        start = 100 * first[rank]
        assert record["rows"] == [[], [start], [start, start + 1], [start, start + 1, start + 2]]
        assert record["counts"] == {"rows": 4}
        assert record["calls"] == ([rank, rank] if first[rank] == rank else [])
        assert record["files"] == ranks[first[rank]]["files"]
        assert record["mistake"] == f"rank {first[rank]}: no"
    assert len({file for record in ranks for file in record["files"]}) == 2 * len(set(first))
