"""Ledger of a run: one fate for every sampled token, one use of every prompt in a pass over the data.

A script names the tokens that it does not train on; all others are to be trained. Training counts the tokens
of the micro-batches in the loss function, and a step whose two counts differ stops the run. So a lost or
repeated row, micro-batch or rank shows in the step in which it happens.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from align.data import packing
from align.data.packing import Batch
from align.distributed import parallel
from align.training.engine import LossFn


class Ledger:
    """Fates of the sampled tokens that a step settles."""

    def __init__(
        self, responses: Iterable[tuple[int, np.ndarray]], fates: Mapping[str, np.ndarray | Tensor | bool]
    ):
        """
        Args:
            responses: number of prompt tokens, and token ids, of each sampled response.
            fates: [N] bool by name, of the responses end to end: tokens that are not trained on. Of several
                fates of a token the first counts.
        """
        responses = list(responses)
        ids = np.concatenate([np.empty(0, np.int64), *(ids for _, ids in responses)]).astype(np.int64)
        places = [np.arange(size - 1, size - 1 + len(ids)) for size, ids in responses]
        checksums = checksum(ids, np.concatenate([np.empty(0, np.int64), *places]))
        is_left = np.ones(len(ids), bool)
        self.counts: dict[str, int] = {}
        for name, where in fates.items():
            is_fate = is_left & np.asarray(where, bool)
            self.counts[name] = int(is_fate.sum())
            is_left &= ~is_fate
        self.sampled, self.to_train = len(ids), (int(is_left.sum()), int(checksums[is_left].sum()))
        self.seen: list[Tensor] = []

    def counting(self, loss_fn: LossFn, *factors: str) -> LossFn:
        """The loss function, which also counts the tokens that it is called for.

        `factors`: names in `extra` of a micro-batch; a token with a factor of 0 is not trained.
        """

        def counted(batch: Batch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            self.seen.append(count_trained(batch, factors))
            return loss_fn(batch, output)

        return counted

    def close(self, label: str, passes: int = 1) -> dict[str, float]:
        """Compare with what training has counted, and return the metrics. Collective.

        Args:
            label: of the step, for the message.
            passes: number of times that each trained token is trained on: PPO epochs.

        Raises RuntimeError with both numbers if they differ.
        """
        counted = total_over_ranks(self.seen)
        check(label, self.sampled, self.counts, self.to_train, counted, passes)
        counts = {"sampled": self.sampled, "trained": self.to_train[0], **self.counts}
        return {f"ledger/tokens_{name}": count for name, count in counts.items()}


def per_token(
    fates: Sequence[str], responses: Sequence[tuple[int, np.ndarray]], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Fates of responses, [A], as those of their tokens, {name: [N] bool}; `responses`: as of `Ledger`."""
    lengths = [len(ids) for _, ids in responses]
    return {name: np.repeat([fate == name for fate in fates], lengths) for name in names}


def checksum(ids: np.ndarray | Tensor, positions: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """[n] int64, of the token ids and of the positions that predict them: another row has another sum."""
    return (ids + 1) * (positions + 1)


def count_trained(batch: Batch, factors: Sequence[str]) -> Tensor:
    """[2] int64: number and checksum of the tokens of a micro-batch whose factors are not 0."""
    targets, positions = (x.index_select(0, batch.trained) for x in (batch.targets, batch.positions))
    is_trained = torch.ones_like(targets)
    for name in factors:
        is_trained = is_trained * (batch.extra[name] != 0)
    return torch.stack([is_trained.sum(), (is_trained * checksum(targets, positions)).sum()])


def total_over_ranks(seen: Sequence[Tensor]) -> tuple[int, int]:
    """Sum counts of the micro-batches over data parallel ranks, on every rank. Collective."""
    total = torch.zeros(2, dtype=torch.int64, device=parallel.device())
    for count in seen:  # on the last pipeline stage
        total = total + count
    [total] = parallel.list_from_last_stage([parallel.sum_over_dp(total)])
    number, sum_ = total.tolist()
    return number, sum_


def check(
    label: str,
    sampled: int,
    counts: Mapping[str, int],
    to_train: tuple[int, int],
    counted: tuple[int, int],
    passes: int = 1,
) -> None:
    """Raise RuntimeError unless training has counted each token that it is to train, `passes` times.

    `counts`: tokens of every other fate; `to_train`, `counted`: number and checksum of the tokens.
    """
    number, sum_ = (passes * x for x in to_train)
    if counted == (number, sum_):
        return
    fates = " + ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    difference = counted[0] - number
    what = f"{abs(difference)} {'too many' if difference > 0 else 'lost'}" if difference else "other tokens"
    raise RuntimeError(
        f"ledger: {label}: {sampled} tokens sampled = {to_train[0]} to train + {fates}; in {passes} pass(es) "
        f"training must count {number} tokens, and counted {counted[0]}: {what}"
    )


class Prompts:
    """Uses of the training rows in the pass under way: each row once, but those that fill no step."""

    def __init__(self, data: Mapping[str, int], pass_start: int, step: int, recorded: Mapping | None = None):
        """
        Args:
            data: `packing.data_order` of the run.
            pass_start: step before which the present order of the rows began.
            step: finished steps.
            recorded: `state` in the checkpoint that the run continues, None for none.

        Raises RuntimeError if the steps of the pass so far used other rows than the record says.
        """
        self.data, self.pass_start = data, pass_start
        self.pass_steps = data["rows"] // data["rows_per_step"]
        self.used: set[int] = set()
        self.is_kept = recorded is not None  # False in a script that enters no prompts
        if step > pass_start:
            first = step - 1 - (step - 1 - pass_start) % self.pass_steps
            self.used.update(row for earlier in range(first, step) for row in self.expected(earlier))
        if recorded is not None and step > pass_start and recorded != self.state():
            raise RuntimeError(
                f"ledger: the pass over the data has used {recorded['prompts']} prompts (checksum "
                f"{recorded['checksum']}) up to the checkpoint of step {step}; the order of the rows says "
                f"{len(self.used)} ({self.state()['checksum']})"
            )

    def expected(self, step: int) -> list[int]:
        """Rows of a step, from the permutation of its pass."""
        number, place = divmod(step - self.pass_start, self.pass_steps)
        size = self.data["rows_per_step"]
        order = packing.epoch_order(self.data["rows"], self.data["seed"], number)
        return order[place * size : (place + 1) * size].tolist()

    def use(self, step: int, rows: Sequence[int]) -> dict[str, float]:
        """Enter the rows of a step, and return the metrics.

        Raises RuntimeError for rows that are not those of the step, and for a row used twice in a pass.
        """
        number, place = divmod(step - self.pass_start, self.pass_steps)
        if place == 0:
            self.used.clear()
        self.is_kept = True
        again = sorted(self.used.intersection(rows))
        self.used.update(rows)
        size = (place + 1) * self.data["rows_per_step"]
        if again or len(self.used) != size or list(rows) != self.expected(step):
            raise RuntimeError(
                f"ledger: step {step + 1} uses rows {list(rows)}, of which {again} were used before in pass "
                f"{number}; expected are {self.expected(step)}, and {len(self.used)} of {size} rows are used"
            )
        return {"ledger/pass": number, "ledger/prompts_used": len(self.used)}

    def state(self) -> dict[str, int]:
        """Number of used rows and a checksum of them, for a checkpoint."""
        return {"prompts": len(self.used), "checksum": sum((row + 1) ** 2 for row in self.used)}
