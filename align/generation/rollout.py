"""Sampled responses to some prompts, and their rewards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from align.data import tokenizer
from align.data.packing import Example
from align.data.prompts import Prompt
from align.generation.generator import Sample

Tokenizer = tokenizer.HuggingFaceTokenizer | tokenizer.SentencePieceTokenizer
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Rollout:
    """Answers to some prompts, and what they are worth."""

    rows: Sequence[int]  # of the data set
    prompts: list[Prompt]
    samples: list[list[Sample]]  # [prompts][answers]
    rewards: np.ndarray  # [prompts, answers]

    @property
    def answers(self) -> list[Sample]:
        """All answers, those to one prompt end to end."""
        return [sample for samples in self.samples for sample in samples]

    @property
    def places(self) -> list[tuple[int, int]]:
        """Row and number of each of them."""
        return [
            (row, k)
            for row, samples in zip(self.rows, self.samples, strict=True)
            for k in range(len(samples))
        ]

    def examples(self) -> list[list[Example]]:
        """The answers to each prompt as examples."""
        return [
            [answer(prompt, sample) for sample in samples]
            for prompt, samples in zip(self.prompts, self.samples, strict=True)
        ]

    def statistics(self) -> dict[str, float]:
        """Means over all responses; of several to a prompt, the share of prompts whose rewards are all equal.

        Such a prompt teaches rejection sampling, RLOO and GRPO nothing about the reward.
        """
        flat = (self.rewards == self.rewards[:, :1]).all(1)
        spread = {"prompts_without_spread": float(flat.mean())} if self.rewards.shape[1] > 1 else {}
        return {
            **spread,
            "rewards": float(self.rewards.mean()),
            "response_lengths": float(np.mean([len(sample.ids) for sample in self.answers])),
            "prompt_lengths": float(np.mean([len(prompt.ids) for prompt in self.prompts])),
            "ended": float(np.mean([sample.finish == "stop" for sample in self.answers])),
        }

    def table(self, name: str, most: int, text: Tokenizer, stop: tuple[str, ...]) -> list[dict]:
        """The first prompts, their first answers and what those are worth, for samples.jsonl."""
        return [
            {
                "table": name,
                "prompt": text.decode(self.prompts[i].ids.tolist()),
                "response": self.samples[i][0].text(text, stop),
                "reward": float(self.rewards[i, 0]),
            }
            for i in range(min(most, len(self.rows)))
        ]


def answer(prompt: Prompt, sample: Sample) -> Example:
    """Prompt and sampled answer as an example that trains the answer. No text, no tokenizer in between."""
    trained = np.arange(len(prompt.ids) + len(sample.ids)) >= len(prompt.ids)
    return Example(np.concatenate([prompt.ids, sample.ids]).astype(np.int32), trained)
