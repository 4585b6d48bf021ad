"""Cache of rollouts in the run directory, for a continued run.

    OUTPUT/rollouts/step_00000012_judge.safetensors     samples for step 12 and later steps

The samples follow from the sampler's weights and settings, the prompts and their random numbers. A file has
the sha256 of all these as its fingerprint, and a continued run uses it only with an equal fingerprint.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from align.distributed import parallel
from align.generation.rollout import Sample
from align.training import tables
from align.training.offload import Weights

NUMBERS = 4096  # of each tensor, read by weights_digest


def cached(path: Path, fingerprint: str, make: Callable[[], list[list[Sample]]]) -> list[list[Sample]]:
    """Read the samples of a file, or make and write them. Collective.

    Args:
        fingerprint: of their inputs, from `fingerprint`; a file with another fingerprint is replaced.
        make: samples by prompt, equal on every rank.
    """
    samples = parallel.on_main(lambda: read(path, fingerprint))
    if samples is None:
        samples = make()
        if parallel.is_main():
            write(path, fingerprint, samples)
    return samples


def read(path: Path, fingerprint: str) -> list[list[Sample]] | None:
    """Read samples by prompt; None if there is no file, or one with another fingerprint."""
    arrays = tables.read(path, fingerprint)
    if arrays is None:
        return None
    ends = arrays["lengths"].cumsum()
    parts = [np.split(arrays[name], ends)[:-1] for name in ("ids", "logprobs", "model_logprobs")]
    finish = ["stop" if ended else "length" for ended in arrays["ended"]]
    samples = [Sample(*values) for values in zip(*parts, finish, strict=True)]
    firsts = [0, *arrays["answers"].cumsum()]
    return [samples[first:last] for first, last in zip(firsts, firsts[1:], strict=False)]


def write(path: Path, fingerprint: str, samples: Sequence[Sequence[Sample]]) -> None:
    """Write samples by prompt."""
    flat = [sample for responses in samples for sample in responses]
    arrays: dict[str, np.ndarray] = {
        "answers": np.array([len(responses) for responses in samples], np.int64),  # [prompts]
        "lengths": np.array([len(sample.ids) for sample in flat], np.int64),  # [samples]
        "ended": np.array([sample.finish == "stop" for sample in flat], np.uint8),  # [samples]
        "ids": concatenate([sample.ids for sample in flat], np.int32),  # [tokens], as the others
        "logprobs": concatenate([sample.logprobs for sample in flat], np.float32),
        "model_logprobs": concatenate([sample.model_logprobs for sample in flat], np.float32),
    }
    tables.write(path, fingerprint, arrays)


def concatenate(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """Concatenate arrays, perhaps none."""
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype, copy=False)


def discard(directory: Path, before: int) -> None:
    """Delete the files of phases whose first step is below `before`."""
    for path in directory.glob("step_????????_*.safetensors"):
        if int(path.name[5:13]) < before:
            path.unlink()


def fingerprint(weights: str, settings: object, prompts: Sequence[np.ndarray], streams: object) -> str:
    """sha256 of all inputs of samples.

    Args:
        weights: the sampler's `weights_digest`.
        settings: of the sampler, with the run's seed: anything identified by its repr.
        prompts: [n] token ids each.
        streams: stream ids of the random numbers.
    """
    digest = hashlib.sha256(repr((weights, settings, streams)).encode())
    for ids in prompts:
        digest.update(repr(len(ids)).encode() + ids.astype(np.int32).tobytes())
    return digest.hexdigest()


def weights_digest(weights: Weights) -> str:
    """sha256 of a sample of each tensor's numbers on every rank: training changes many. Collective."""
    digest = hashlib.sha256()
    for name, tensor in weights.held.items():
        flat = tensor.view(-1)
        numbers = flat[:: max(1, len(flat) // NUMBERS)].float()
        digest.update(name.encode() + numbers.numpy().tobytes())
    return hashlib.sha256(repr(parallel.gather(digest.hexdigest())).encode()).hexdigest()
