"""The reference model of self-rewarding: the policy at the beginning of an iteration."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from megatron.core.distributed import DistributedDataParallel

from align.data.packing import BatchConfig
from align.distributed import parallel
from align.generation import rollout_cache
from align.generation.generator import Generator
from align.generation.rollout import Sample
from align.judging.pairs import SampledPair
from align.judging.self_judge import Ids, Streams
from align.model import gpt, lora
from align.training import batching, checkpoint
from align.training.checkpoint_writer import Writer
from align.training.offload import HostStore, Weights
from align.training.phases import Phases


def trained_weights(policy: DistributedDataParallel, store: HostStore) -> Weights:
    """A copy of the weights that are trained: all, or with adapters only theirs."""
    has_adapters = gpt.stages(policy)[0].adapters is not None
    return Weights(policy.module, store, lora.is_trained if has_adapters else lambda name: True)


class ReferenceModel:
    """Sampling and log-probs with the reference weights, which are swapped into the policy.

    With adapters these are swapped, and the frozen weights are the policy's. Samples are kept in files. Every
    method is collective.
    """

    def __init__(
        self,
        weights: Weights,
        policy: DistributedDataParallel,
        generator: Generator,
        phase: Phases,
        output: Path,
        settings: tuple,
    ):
        """
        Args:
            weights: of the reference, from `trained_weights`.
            output: the run directory.
            settings: what samples depend on beside trained weights, prompts and streams.
        """
        self.weights, self.policy, self.generator, self.phase = weights, policy, generator, phase
        self.directory, self.settings = output / "rollouts", settings
        self.digest = rollout_cache.weights_digest(weights)
        self.needs = {"policy": "weights"} if gpt.stages(policy)[0].adapters else {}  # of each phase

    def follow_policy(self) -> None:
        """Take the policy's weights: the next iteration begins."""
        self.weights.follow(self.policy.module)
        self.digest = rollout_cache.weights_digest(self.weights)

    def sample(self, first: int, kind: str, ids: Ids, streams: Streams, number: int) -> list[list[Sample]]:
        """Samples for the steps from `first` on, read from a file if there is one."""

        def generate() -> list[list[Sample]]:
            with self.phase(kind, **self.needs), self.weights.swapped_into(self.policy.module):
                return self.generator.generate(ids, streams, number)

        fingerprint = rollout_cache.fingerprint(self.digest, (*self.settings, number), ids, streams)
        path = self.directory / f"step_{first:08d}_{kind}.safetensors"
        samples = rollout_cache.cached(path, fingerprint, generate)
        if self.generator.tape:
            self.generator.tape.note(streams, samples)
        return samples

    def logprobs(self, pairs: Sequence[SampledPair], config: BatchConfig) -> list[np.ndarray]:
        """Log-probs of each sample's tokens, by training's forward pass: chosen, rejected, chosen, ..."""
        with self.phase("reference", **self.needs), self.weights.swapped_into(self.policy.module):
            return batching.per_example_outputs(self.policy, [pair.examples for pair in pairs], config)

    def save(self, path: Path, writer: Writer) -> None:
        """Write the weights into a directory of a checkpoint."""
        with self.phase("save", **self.needs), self.weights.swapped_into(self.policy.module):
            checkpoint.write_weights(path, self.policy.module, writer)

    def discard_samples(self, before: int) -> None:
        """Delete the samples of rollouts whose first step is below `before`."""
        if parallel.is_main():
            rollout_cache.discard(self.directory, before)
