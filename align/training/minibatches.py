"""The responses of a rollout as the minibatches of PPO, packed once for log-probs, values and training.

[N] is one number per response token of the rollout, the responses end to end; [A] one per response.
"""

from collections.abc import Sequence
from itertools import groupby, islice

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from align.data import packing
from align.data.packing import Batch, BatchConfig, Example
from align.losses import rl
from align.training import batching


def draw(
    num_responses: int, group_size: int, minibatch_size: int, place: tuple[int, int, int]
) -> list[list[list[int]]]:
    """Minibatches of one PPO epoch: [minibatch][prompt][response], responses by number in the rollout.

    Epoch 0 goes through the rollout in its order, in the micro-batches in which old log-probs and values are
    computed: so the ratio of the first update is 1 to the last bit. Each later epoch has its own permutation,
    by `place` (seed, step, epoch), equal in every layout. `group_size`: responses per prompt.
    """
    numbers = np.arange(num_responses)
    if place[-1] > 0:
        numbers = np.random.default_rng(place).permutation(numbers)
    minibatches = np.sort(numbers.reshape(-1, minibatch_size), 1).tolist()
    return [[list(group) for _, group in groupby(part, lambda n: n // group_size)] for part in minibatches]


class Minibatches:
    """The minibatches of all PPO epochs of a rollout."""

    def __init__(
        self,
        model: DistributedDataParallel,
        examples: Sequence[Example],
        draws: Sequence[Sequence[Sequence[int]]],
        config: BatchConfig,
    ):
        """
        Args:
            model: a model that reads the minibatches; all must be built for one --attention.
            examples: [A] the responses of the rollout with their prompts.
            draws: [minibatch][prompt][response], from `draw`; the first ones hold the rollout in its order.
        """
        self.model, self.config = model, config
        self.lengths = [packing.num_trained([example]) for example in examples]
        self.order = [number for minibatch in draws for group in minibatch for number in group]
        groups = [[[examples[number] for number in group] for group in minibatch] for minibatch in draws]
        self.rows = [batching.pack_responses(model, minibatch, config) for minibatch in groups]
        self.num_tokens = [sum(map(packing.num_trained, rows)) for rows in self.rows]  # trained, of each
        self.num_responses = [sum(map(len, minibatch)) for minibatch in draws]

    def outputs(self, model: DistributedDataParallel) -> Tensor:
        """Outputs of a model for the rollout's tokens, [N, ...] float64 on the CPU. Collective.

        Computed in the micro-batches of the first epoch: with the same bits as in its first update.
        """
        parts: list[np.ndarray] = []
        rows = iter(self.rows)
        while len(parts) < len(self.lengths):
            parts += batching.per_example_outputs(model, next(rows), self.config)
        return torch.from_numpy(np.concatenate(parts)).double()

    def reorder(self, x: Tensor) -> Tensor:
        """[N] in the order of the minibatches, one after another."""
        responses = x.split(self.lengths)
        return torch.cat([responses[number] for number in self.order])

    def micro_batches(self, weights: Tensor | None = None, **tokens: Tensor) -> list[list[Batch]]:
        """This rank's micro-batches of each minibatch, with `tokens`, [N] by name, in `extra`.

        `weights`: from `aggregation_weights`, likewise.
        """
        counts = [packing.num_trained(row) for rows in self.rows for row in rows]
        ordered = {name: self.reorder(values) for name, values in tokens.items()}
        if weights is not None:
            ordered["weights"] = weights
        parts = {name: iter(values.split(counts)) for name, values in ordered.items()}
        minibatches = []
        for rows in self.rows:
            values = {name: [next(part).numpy() for _ in rows] for name, part in parts.items()}
            minibatches.append(batching.micro_batches(self.model, rows, self.config, values))
        return minibatches

    def tokens_with_gradient(self, counted: Tensor, signal: Tensor) -> list[float]:
        """Number of tokens that each minibatch trains: 0 for one whose gradient is 0.

        Such a minibatch takes no optimizer step: momentum and weight decay of Adam would move the weights.

        Args:
            counted: [N] 1 for tokens that the policy learns from, else 0.
            signal: [N] factor of a token's gradient: its advantage, or `counted` if the loss has more terms.
        """
        parts = (self.reorder(x).split(self.num_tokens) for x in (counted, counted * signal))
        return [float(count.sum()) * bool(gradient.any()) for count, gradient in zip(*parts, strict=True)]

    def aggregation_weights(self, counted: Tensor, aggregate: str, max_length: int) -> Tensor:
        """`rl.aggregation_weights` of each minibatch, [its tokens] of one after another; `counted`: [N]."""
        lengths = iter([self.lengths[number] for number in self.order])
        parts = zip(self.reorder(counted).split(self.num_tokens), self.num_responses, strict=True)
        return torch.cat(
            [
                rl.aggregation_weights(part, list(islice(lengths, size)), aggregate, max_length)
                for part, size in parts
            ]
        )

    def of_first_update(
        self,
        x: Tensor,
        num_tokens: Sequence[float],
        mask: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, float]:
        """[N] values at the tokens of the first minibatch that is trained, and its number of trained tokens.

        Args:
            num_tokens: from `tokens_with_gradient`, of which one is not 0.
            mask: [N], 0 where x counts as 0.
            weights: from `aggregation_weights`, factors of x.
        """
        x = self.reorder(x if mask is None else x.where(mask.bool(), 0.0))
        first = next(i for i, count in enumerate(num_tokens) if count)
        return (x if weights is None else x * weights).split(self.num_tokens)[first], num_tokens[first]
