"""Data and loss functions of the parity and invariance tests."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from align.data.packing import Batch, Example, num_trained
from align.data.preferences import Pair, as_scored
from align.losses import preference, supervised
from align.losses.statistics import log_ratio_statistics, pair_statistics

STEPS, ROWS, VOCAB, BETA = 3, 6, 131, 0.1
SEED = 5  # of a reward model's head
# Adam's first step has nearly the same size for every gradient, also for those that are rounding errors of 0.
# Scores show that more than log-probs do.
LR = {"sft": 1e-3, "dpo": 1e-3, "ranking": 1e-4, "regression": 1e-4}

# ---- rows ----------------------------------------------------------------------------------------


def examples(step: int, rows: int = ROWS) -> list[Example]:
    """Rows of random tokens of different lengths, with a random prompt each that is not trained."""
    random = np.random.default_rng(step)
    rows_ = []
    for _ in range(rows):
        length = int(random.integers(5, 50))
        prompt = int(random.integers(1, length - 1))
        ids = random.integers(0, VOCAB, length, dtype=np.int32)
        rows_.append(Example(ids, np.arange(length) >= prompt))
    return rows_


def pairs(step: int, rows: int = ROWS) -> list[Pair]:
    """Two answers of different lengths to each random prompt; every other pair has a margin.

    The prompt of row 1 is one token. In rows 2 to 4 the answers begin alike: in row 3 the chosen one is but
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
        rows_.append(Pair(answered(prompt, chosen), answered(prompt, rejected), margin=1.5 - row % 2 * 1.5))
    return rows_


def answered(prompt: np.ndarray, answer: np.ndarray) -> Example:
    """Prompt and answer, [n] and [m] ids, as one example in which the answer is trained."""
    ids = np.concatenate([prompt, answer]).astype(np.int32)
    return Example(ids, np.arange(len(ids)) >= len(prompt))


def labels(step: int, rows: int = ROWS) -> np.ndarray:
    """[rows, 2] float32, two attributes of `examples`; some are missing, never both of a row."""
    random = np.random.default_rng([step, 2])
    values = random.normal(size=(rows, 2)).astype(np.float32)
    values[1::3, 0] = values[2::3, 1] = supervised.MISSING
    return values


@dataclass(frozen=True)
class DataSet:
    """Rows of one algorithm, and for each of them what its loss is given and is divided by."""

    rows: list[tuple[Example, ...]]
    values: dict[str, np.ndarray]  # [rows, k, ...] by name, for batch.extra
    counts: list[int]  # [rows], what a row adds to the denominator of its step


def data_set(algorithm: str, step: int, rows: int = ROWS) -> DataSet:
    """The rows of one step: "sft", "dpo", "ranking" or "regression"."""
    if algorithm == "sft":
        rows_of_step = examples(step, rows)
        return DataSet(
            [(example,) for example in rows_of_step], {}, [num_trained([example]) for example in rows_of_step]
        )
    if algorithm == "regression":
        target = labels(step, rows)
        counts = (target != supervised.MISSING).sum(1).tolist()
        scored = [(as_scored(example),) for example in examples(step, rows)]
        return DataSet(scored, {"target": target[:, None]}, counts)
    rows_of_step = pairs(step, rows)
    if algorithm == "dpo":
        row = step * ROWS + np.arange(rows)
        return DataSet([pair.examples for pair in rows_of_step], {"row": row[:, None]}, [1] * rows)
    margins = np.array([[pair.margin] for pair in rows_of_step])
    return DataSet(
        [tuple(map(as_scored, pair.examples)) for pair in rows_of_step], {"target": margins}, [1] * rows
    )


# ---- losses, as the scripts compute them ---------------------------------------------------------


def sft_loss(batch: Batch, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Supervised fine-tuning."""
    assert len(logprobs) == len(batch.tokens)
    return supervised.sft_loss(logprobs, batch.mask), {"square": (logprobs.square() * batch.mask).sum()}


def sequence_logprobs(batch: Batch, logprobs: Tensor) -> Tensor:
    """[2P]: chosen, rejected, chosen, ..."""
    return preference.sequence_logprobs(logprobs, batch.mask, batch.lengths)


def dpo_loss(batch: Batch, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimization; the reference's log-probs are in batch.extra["ref"]."""
    both, reference = sequence_logprobs(batch, logprobs).view(-1, 2), batch.extra["ref"].view(-1, 2)
    four = (*both.unbind(1), *reference.unbind(1))
    return preference.dpo(*four, BETA).sum(), log_ratio_statistics(*four, BETA)


def ranking_loss(batch: Batch, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Reward model on pairs with margins."""
    chosen, rejected = values[batch.mask.bool()].double().view(-1, 2).unbind(1)
    loss = supervised.ranking(chosen, rejected, batch.extra["target"]).sum()
    return loss, pair_statistics(chosen, rejected)


def regression_loss(batch: Batch, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Reward model on labels."""
    error, present = supervised.regression(values[batch.mask.bool()].double(), batch.extra["target"])
    return error, {"present": present}


LOSSES = {"sft": sft_loss, "dpo": dpo_loss, "ranking": ranking_loss, "regression": regression_loss}
LABELS = {"sft": 0, "dpo": 0, "ranking": 1, "regression": 2}  # rows of the model's head; 0: a language model
FRESH = ("llama", "llama_tied")  # language models that are given a head
