"""Samples of a recorded step: written into its record, and read in place of sampling (--samples-from).

The stream id of a prompt's random numbers names its samples, in every layout.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from align.errors import UserError
from align.generation.rollout import Sample
from align.training.record import SAMPLES
from align.training.session import Session

Stream = tuple[int, ...]


class Tape:
    """Samples by stream id, to record and to read."""

    def __init__(self, session: Session):
        """Raises UserError if the record of --samples-from has no samples."""
        self.session, source = session, session.config.run.samples_from
        self.samples = {} if source is None else read(source)

    def play(self, streams: Sequence[Stream], number: int) -> list[list[Sample]] | None:
        """The `number` recorded samples of each stream; None unless there are such of all."""
        if not all(len(self.samples.get(stream, ())) == number for stream in streams):
            return None
        self.session.say(
            f"samples of {len(streams)} prompts: read from {self.session.config.run.samples_from}"
        )
        return [self.samples[stream] for stream in streams]

    def note(self, streams: Sequence[Stream], samples: Sequence[Sequence[Sample]]) -> None:
        """Add samples to the record of the step under way, if there is one."""
        if record := self.session.record:
            for stream, own in zip(streams, samples, strict=True):
                record.samples["_".join(map(str, stream))] = arrays_of(own)


def arrays_of(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """The samples of a prompt as arrays, end to end."""
    return {
        "lengths": np.array([len(sample.ids) for sample in samples], np.int64),
        "ended": np.array([sample.finish == "stop" for sample in samples], np.uint8),
        "ids": np.concatenate([sample.ids for sample in samples]).astype(np.int32),
        "logprobs": np.concatenate([sample.logprobs for sample in samples]).astype(np.float32),
        "model_logprobs": np.concatenate([sample.model_logprobs for sample in samples]).astype(np.float32),
    }


def samples_of(arrays: Mapping[str, np.ndarray]) -> list[Sample]:
    """The samples that `arrays_of` has written."""
    ends = arrays["lengths"].cumsum()[:-1]
    parts = [np.split(arrays[name], ends) for name in ("ids", "logprobs", "model_logprobs")]
    finish = ["stop" if ended else "length" for ended in arrays["ended"]]
    return [Sample(*values) for values in zip(*parts, finish, strict=True)]


def read(directory: Path) -> dict[Stream, list[Sample]]:
    """Samples of a step's record, by stream id."""
    path = directory / SAMPLES
    if not path.is_file():
        raise UserError(f"--samples-from {directory}: it has no {SAMPLES}: give OUTPUT/records/step_NNNNNN")
    by_stream: dict[str, dict[str, np.ndarray]] = {}
    for key, array in load_file(path).items():
        stream, _, name = key.partition("/")
        by_stream.setdefault(stream, {})[name] = array
    return {tuple(map(int, key.split("_"))): samples_of(arrays) for key, arrays in by_stream.items()}
