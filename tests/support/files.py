"""Paths of the repository, its version of Megatron-Core, and rows in files of JSON lines."""

import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = ROOT / "assets" / "tiny"
MEGATRON_0_16 = importlib.metadata.version("megatron-core").startswith("0.16.")  # else 0.19


def write_rows(path: Path, rows: Iterable[dict]) -> Path:
    """Write one JSON object a line; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reproducible_metrics(output: Path) -> list[dict[str, float]]:
    """metrics.jsonl of a run without what depends on the clock and on the machine."""
    changing = ("time/", "timers/", "memory/")
    return [
        {name: value for name, value in row.items() if not name.startswith(changing)}
        for row in read_jsonl(output / "metrics.jsonl")
    ]


def without_times(row: dict[str, float]) -> set[str]:
    return {name for name in row if not name.startswith(("time/", "timers/"))}
