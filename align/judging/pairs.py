"""Preference pairs of self-rewarding: sampled responses or judgements, and the buffer of judgement pairs."""

import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from align.data.packing import Example
from align.data.prompts import Prompt
from align.data.tokenizer import Tokenizer
from align.errors import UserError
from align.files import read_object
from align.generation.rollout import Sample, response_example

STATE = "judgements.json"  # in a checkpoint: the buffer


@dataclass(frozen=True, eq=False)
class SampledPair:
    """Two samples after the same prompt ids, responses or judgements, one of them preferred."""

    row: int  # of the data, for messages
    ids: np.ndarray  # [n] int32, the prompt
    chosen: Sample
    rejected: Sample
    chosen_reward: float  # mean judge score of a response, or the score that a judgement gives
    rejected_reward: float
    gap: float  # reward gap, for losses that take one

    @property
    def samples(self) -> tuple[Sample, Sample]:
        """Both samples, chosen first."""
        return self.chosen, self.rejected

    @property
    def examples(self) -> list[Example]:
        """Both as examples that train the sample."""
        return [response_example(Prompt(self.ids, {}), sample) for sample in self.samples]

    def texts(self, tokenizer: Tokenizer, text_of: Callable[[Sample], str]) -> dict[str, str | float]:
        """Texts and scores, for the samples table."""
        return {
            "prompt": tokenizer.decode(self.ids.tolist()),
            "chosen": text_of(self.chosen),
            "rejected": text_of(self.rejected),
            "chosen_reward": self.chosen_reward,
            "rejected_reward": self.rejected_reward,
        }


def pair_of(record: Mapping) -> SampledPair:
    """A pair that `Buffer.save` has written."""
    samples = {name: sample_of(record[name]) for name in ("chosen", "rejected")}
    return SampledPair(**{**record, **samples, "ids": np.array(record["ids"], np.int32)})


def sample_of(record: Mapping) -> Sample:
    """A sample that `Buffer.save` has written."""
    logprobs, model_logprobs = (np.array(record[x], np.float32) for x in ("logprobs", "model_logprobs"))
    return Sample(np.array(record["ids"], np.int32), logprobs, model_logprobs, record["finish"])


class Buffer:
    """First-in, first-out buffer of judgement pairs, with a cap on each score's share among the chosen."""

    def __init__(self, low: float, high: float, cap: float):
        """--judge-low, --judge-high, and the largest share of a class, scores rounded down to one.

        Raises UserError if the cap admits no pair: at the start the count of each class is 1.
        """
        self.classes, self.cap = range(math.floor(low), math.floor(high) + 1), cap
        if 1 / len(self.classes) >= cap:
            number, scores = len(self.classes), f"--judge-low {low} to --judge-high {high}"
            rule = f"must be above 1/{number}: {scores} has {number} classes of scores"
            raise UserError(f"--meta-judge-class-cap {cap} {rule}")
        self.clear()

    def clear(self) -> None:
        """Start an iteration: drop all pairs, reset each count to 1."""
        self.pairs: deque[SampledPair] = deque()
        self.counts = dict.fromkeys(self.classes, 1)  # by chosen score, pairs admitted since then, plus 1

    def __len__(self) -> int:
        return len(self.pairs)

    def offer(self, pair: SampledPair) -> bool:
        """Admit a pair unless the class of its chosen score is full. Returns True if admitted."""
        score = math.floor(pair.chosen_reward)
        if self.counts[score] / sum(self.counts.values()) >= self.cap:
            return False
        self.counts[score] += 1
        self.pairs.append(pair)
        return True

    def take(self, number: int) -> list[SampledPair]:
        """Remove the `number` oldest pairs, at most all; the counts stay."""
        return [self.pairs.popleft() for _ in range(min(number, len(self)))]

    def save(self, checkpoint: Path, flags: Mapping[str, int]) -> None:
        """Write the state into a checkpoint, with flags that it fits."""
        record = {
            "flags": dict(flags),
            "counts": {str(score): count for score, count in self.counts.items()},
            "waiting": [asdict(pair) for pair in self.pairs],
        }
        # a float32 survives being written as a float64
        (checkpoint / STATE).write_text(json.dumps(record, default=np.ndarray.tolist), encoding="utf-8")

    def load(self, checkpoint: Path, flags: Mapping[str, int]) -> None:
        """Read the state of a checkpoint. Raises UserError for another script's, or for other `flags`."""
        path = checkpoint / STATE
        if not path.is_file():
            rule = "give another --output, or --no-resume"
            raise UserError(f"{checkpoint} is none of train_self_reward.py: {rule}")
        record = read_object(path)
        for name, value in flags.items():
            if value != record["flags"][name]:
                raise UserError(
                    f"{name}: {value}, in the run that is to be continued {record['flags'][name]}: its "
                    "reference and its buffer fit its own flags only; give those, or --no-resume"
                )
        self.counts.update({int(score): count for score, count in record["counts"].items()})
        self.pairs.extend(map(pair_of, record["waiting"]))


def num_judgement_pairs(good: int, available: int, size: int, fraction: float) -> int:
    """Number of judgement pairs in a batch: the largest m with m <= fraction min(size, good + m).

    They replace bad response pairs first, then good ones; the minimum is the number of trained pairs.
    `good`: trainable response pairs; `available`: judgement pairs in the buffer; `size`: pairs in a batch.
    """
    numbers = range(min(available, size) + 1)
    return max(m for m in numbers if m <= fraction * min(size, good + m) + 1e-9)  # 0.29 * 100 is below 29


def mix(pairs: Sequence[SampledPair | None], buffer: Buffer, fraction: float) -> list[SampledPair]:
    """A batch: the good response pairs in their order, then judgement pairs from the buffer.

    `pairs`: one for each place, None for a bad one; the last good ones are dropped if there is no place.
    """
    good = [pair for pair in pairs if pair is not None]
    judgements = buffer.take(num_judgement_pairs(len(good), len(buffer), len(pairs), fraction))
    return good[: len(pairs) - len(judgements)] + judgements
