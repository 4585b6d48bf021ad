"""Rollouts that outlive a crash: samples in files of the run directory.

    OUTPUT/rollouts/step_00000012_judge.safetensors     samples for step 12 and those after it

What a file holds follows from the sampler's weights, its settings, the prompts and their random numbers. It
knows the sha256 of all these, so that a run that is continued takes it for just the same question.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from align.distributed import parallel
from align.generation.generator import Sample
from align.training import tables
from align.training.offload import Weights

NUMBERS = 4096  # of a tensor that weights_digest looks at


def kept(path: Path, made_of: str, make: Callable[[], list[list[Sample]]]) -> list[list[Sample]]:
    """The samples in a file, or new ones, which are left there. Collective.

    Args:
        made_of: what they depend on, see `made_of`; a file that was made of something else is replaced.
        make: samples by prompt, the same on every rank.
    """
    found = parallel.on_main(lambda: read(path, made_of))
    if found is None:
        found = make()
        if parallel.is_main():
            write(path, made_of, found)
    return found


def read(path: Path, made_of: str) -> list[list[Sample]] | None:
    """The samples in a file, None if there is none or if it was made of something else."""
    arrays = tables.read(path, made_of)
    if arrays is None:
        return None
    ends = arrays["lengths"].cumsum()  # what is behind the last one is empty
    parts = [np.split(arrays[name], ends)[:-1] for name in ("ids", "logprobs", "model_logprobs")]
    finish = ["stop" if ended else "length" for ended in arrays["ended"]]
    samples = [Sample(*values) for values in zip(*parts, finish, strict=True)]
    firsts = [0, *arrays["answers"].cumsum()]
    return [samples[first:last] for first, last in zip(firsts, firsts[1:], strict=False)]


def write(path: Path, made_of: str, samples: Sequence[Sequence[Sample]]) -> None:
    """Write samples by prompt."""
    every = [sample for answers in samples for sample in answers]
    arrays = {
        "answers": np.array([len(answers) for answers in samples], np.int64),  # [prompts]
        "lengths": np.array([len(sample.ids) for sample in every], np.int64),  # [samples]
        "ended": np.array([sample.finish == "stop" for sample in every], np.uint8),  # [samples]
        "ids": joined([sample.ids for sample in every], np.int32),  # [tokens], as the others
        "logprobs": joined([sample.logprobs for sample in every], np.float32),
        "model_logprobs": joined([sample.model_logprobs for sample in every], np.float32),
    }
    tables.write(path, made_of, arrays)


def joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """Arrays end to end; there may be none."""
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype, copy=False)


def discard(directory: Path, before: int) -> None:
    """Delete the files of phases whose first step is below `before`."""
    for path in directory.glob("step_????????_*.safetensors"):
        if int(path.name[5:13]) < before:
            path.unlink()


def made_of(weights: str, settings: object, prompts: Sequence[np.ndarray], streams: object) -> str:
    """sha256 of what samples follow from.

    Args:
        weights: of the sampler, its `weights_digest`.
        settings: of the sampler, and the run's seed: anything whose repr tells it.
        prompts: [n] token ids each.
        streams: the numbers that random numbers follow from, besides the seed.
    """
    digest = hashlib.sha256(repr((weights, settings, streams)).encode())
    for ids in prompts:
        digest.update(repr(len(ids)).encode() + ids.astype(np.int32).tobytes())
    return digest.hexdigest()


def weights_digest(weights: Weights) -> str:
    """sha256 of some numbers of each tensor on every rank: training changes many of them. Collective."""
    digest = hashlib.sha256()
    for name, tensor in weights.held.items():
        flat = tensor.view(-1)
        numbers = flat[:: max(1, len(flat) // NUMBERS)].float()
        digest.update(name.encode() + numbers.numpy().tobytes())
    return hashlib.sha256(repr(parallel.gather(digest.hexdigest())).encode()).hexdigest()
