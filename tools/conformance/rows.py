"""Rows of every algorithm for a few steps: random ones, or rows of the user's file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from align.data.packing import Example, num_trained
from align.data.preferences import Pair, as_scored
from align.losses import supervised

STEPS, ROWS, VOCAB = 3, 6, 131
PAIRED = ("dpo", "ranking", "grpo")  # algorithms whose rows have two responses to a prompt
ROLLOUTS = ("ppo", "grpo", "critic")  # algorithms whose loss reads a recorded rollout
Arrays = Sequence[np.ndarray] | np.ndarray
Recorded = dict[str, list[np.ndarray]]  # of one step: by name, the numbers [n] of each row's response tokens


class Source(Protocol):
    """Rows of each step; the first `rows` of them are asked for."""

    def examples(self, step: int, rows: int = ROWS) -> list[Example]: ...

    def pairs(self, step: int, rows: int = ROWS) -> list[Pair]: ...


class RandomRows:
    """Rows of random tokens, equal in every process."""

    def examples(self, step: int, rows: int = ROWS) -> list[Example]:
        """Rows of different lengths, with a random prompt each that is not trained."""
        random = np.random.default_rng(step)
        rows_ = []
        for _ in range(rows):
            length = int(random.integers(5, 50))
            prompt = int(random.integers(1, length - 1))
            ids = random.integers(0, VOCAB, length, dtype=np.int32)
            rows_.append(Example(ids, np.arange(length) >= prompt))
        return rows_

    def pairs(self, step: int, rows: int = ROWS) -> list[Pair]:
        """Two responses of different lengths to each random prompt; every other pair has a margin.

        The prompt of row 1 is one token. In rows 2 to 4 the responses begin alike: in row 3 the chosen one is
        the beginning of the rejected one, in row 4 it is the other way round.
        """
        random = np.random.default_rng([step, 1])
        rows_ = []
        for row in range(rows):
            size = 1 if row == 1 else random.integers(4, 17)
            alike, short = (3 if row in (2, 3, 4) else 0), random.integers(4, 10)
            prompt, first, second = (random.integers(0, VOCAB, n) for n in (size, short, short + 5))
            first, second = first[: 3 if row in (3, 4) else None], np.append(first[:alike], second[alike:])
            chosen, rejected = (first, second) if row % 2 else (second, first)
            margin = 1.5 - row % 2 * 1.5
            rows_.append(Pair(with_response(prompt, chosen), with_response(prompt, rejected), margin=margin))
        return rows_


RANDOM = RandomRows()


def with_response(prompt: np.ndarray, response: np.ndarray) -> Example:
    """Prompt and response, [n] and [m] ids, as one example in which the response is trained."""
    ids = np.concatenate([prompt, response]).astype(np.int32)
    return Example(ids, np.arange(len(ids)) >= len(prompt))


class StoredRows:
    """Rows of the user's file as token ids, in the file of `store`."""

    def __init__(self, path: Path):
        stored = json.loads(path.read_text())
        self.rows = [
            [Example(np.array(ids, np.int32), np.array(trained, bool)) for ids, trained in row]
            for row in stored["rows"]
        ]
        self.margins = stored["margins"]

    @property
    def are_pairs(self) -> bool:
        return len(self.rows[0]) == 2

    def examples(self, step: int, rows: int = ROWS) -> list[Example]:
        return [row[0] for row in self.rows[step * ROWS :][:rows]]

    def pairs(self, step: int, rows: int = ROWS) -> list[Pair]:
        places = range(step * ROWS, step * ROWS + rows)
        return [Pair(self.rows[n][0], self.rows[n][1], self.margins[n]) for n in places]


def store(rows: Sequence[Example | Pair], path: Path) -> None:
    """Write the first rows, as many as `STEPS` updates and an evaluation of one row need."""
    chosen = rows[: STEPS * ROWS + 1]
    sides = [row.examples if isinstance(row, Pair) else (row,) for row in chosen]
    stored = [[(side.ids.tolist(), side.trained.tolist()) for side in row] for row in sides]
    margins = [row.margin if isinstance(row, Pair) else 0.0 for row in chosen]
    path.write_text(json.dumps({"rows": stored, "margins": margins}))


@dataclass(frozen=True)
class DataSet:
    """Rows of one algorithm, and for each of them what its loss reads and is divided by."""

    rows: list[tuple[Example, ...]]
    values: dict[str, Arrays]  # [rows][k, ...] by name, for batch.extra
    counts: list[int]  # [rows], what a row adds to the denominator of its step


def data_set(
    algorithm: str,
    step: int,
    rows: int = ROWS,
    source: Source = RANDOM,
    recorded: Recorded | None = None,
) -> DataSet:
    """The rows of one step of an algorithm of `losses.LOSSES`; `recorded`: its rollout, if it has one."""
    groups = rows_of_step(algorithm, step, rows, source)
    if algorithm in ("sft", *ROLLOUTS):
        return DataSet(groups, dict(recorded or {}), [num_trained(group) for group in groups])
    if algorithm == "regression":
        target = labels(step, rows)
        return DataSet(groups, {"target": target[:, None]}, (target != supervised.MISSING).sum(1).tolist())
    if algorithm == "dpo":
        row = step * ROWS + np.arange(rows)
        return DataSet(groups, {"row": row[:, None]}, [1] * rows)
    margins = np.array([[pair.margin] for pair in source.pairs(step, rows)])
    return DataSet(groups, {"target": margins}, [1] * rows)


def rows_of_step(algorithm: str, step: int, rows: int, source: Source = RANDOM) -> list[tuple[Example, ...]]:
    """The examples of each row: both responses to a prompt, or one text; for scores with an end to read."""
    groups: list[tuple[Example, ...]]
    if algorithm in PAIRED:
        groups = [pair.examples for pair in source.pairs(step, rows)]
    else:
        groups = [(example,) for example in source.examples(step, rows)]
    scored = algorithm in ("ranking", "regression")
    return [tuple(map(as_scored, group)) for group in groups] if scored else groups


def labels(step: int, rows: int = ROWS) -> np.ndarray:
    """[rows, 2] float32, two attributes of `examples`; some are missing, never both of a row."""
    random = np.random.default_rng([step, 2])
    values = random.normal(size=(rows, 2)).astype(np.float32)
    values[1::3, 0] = values[2::3, 1] = supervised.MISSING
    return values


def record(algorithm: str, step: int, outputs: list[np.ndarray]) -> Recorded:
    """A rollout around a model's log-probs or values [n], one array for each row, so that some tokens clip.

    Log-probs of the sampling policy and of the reference, values of the critic at the rollout, returns, and
    advantages of both signs.
    """
    random = np.random.default_rng([step, 3])
    kinds = {"values": 0.3, "returns": 1.0} if algorithm == "critic" else {"old": 0.2, "ref": 0.3}
    recorded = {
        name: [values + random.normal(size=len(values)) * std for values in outputs]
        for name, std in kinds.items()
    }
    if algorithm != "critic":
        recorded["advantages"] = [random.normal(size=len(values)) for values in outputs]
    return recorded
