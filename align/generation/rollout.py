"""Results of sampling: samples, and rollouts of prompts, samples and rewards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from align import flags
from align.data.packing import Example
from align.data.prompts import Prompt
from align.data.tokenizer import Tokenizer
from align.errors import UserError
from align.losses import rl


@dataclass(frozen=True, eq=False)
class Sample:
    """A sampled response."""

    ids: np.ndarray  # [n] int32, the stop token included
    logprobs: np.ndarray  # [n] float32, under the distribution that each token was drawn from
    model_logprobs: np.ndarray  # [n] float32, under the model itself: temperature 1, no filter
    finish: Literal["stop", "length"]

    def text(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> str:
        """The response as text, without its stop token, stop string or end of turn."""
        ids = self.ids.tolist()
        text = tokenizer.decode(ids[:-1] if ids[-1] in tokenizer.stop_ids else ids)
        ends = [text.index(end) for end in (*stop, *tokenizer.stop_strings) if end in text]
        text = text[: min(ends)] if ends else text
        if tokenizer.chat and self.finish == "stop":
            return text.removesuffix(tokenizer.chat.end_of_turn)
        return text


def says_stop(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer, stop: tuple[str, ...]) -> bool:
    """True if a stop string is complete within the last few tokens."""
    # a character has at most 4 tokens, those of its bytes
    tail = 4 * max(map(len, stop), default=0) + 4
    text = tokenizer.decode([int(i) for i in ids[-tail:]]) if stop else ""
    return any(end in text for end in stop)


def response_example(prompt: Prompt, sample: Sample) -> Example:
    """Prompt and response as an example that trains the response. Token ids in and out, never text."""
    trained = np.arange(len(prompt.ids) + len(sample.ids)) >= len(prompt.ids)
    return Example(np.concatenate([prompt.ids, sample.ids]).astype(np.int32), trained)


@dataclass(frozen=True)
class TruncationConfig:
    """Truncated and overlong responses in PPO and GRPO."""

    truncated: Annotated[Literal["mask", "penalise", "keep"], tyro.conf.arg(aliases=("--unended",))] = "mask"
    """truncated responses (cut off by --max-new-tokens): mask leaves them out of the policy's loss and of
    comparisons between responses (a critic learns from them), penalise subtracts a penalty, keep treats them
    like the others"""
    truncated_penalty: Annotated[float, tyro.conf.arg(aliases=("--unended-penalty",))] = 1.0
    """penalty subtracted from the reward of a truncated response (--truncated penalise)"""
    overlong_buffer: int = 0
    """soft overlong punishment (DAPO): the last tokens below --max-new-tokens over which a penalty rises from
    0 to 1; 0: none"""

    def __post_init__(self):
        rules = dict(truncated_penalty=flags.COEFFICIENT, overlong_buffer=flags.COUNT_OR_0)
        flags.check_ranges(self, **rules)
        if self.truncated != "penalise":
            why = f"with --truncated {self.truncated}"
            flags.refuse_unused(self, TruncationConfig, "truncated_penalty", why)

    def check(self, max_new_tokens: int) -> None:
        """Raise UserError for an overlong buffer longer than a response."""
        if self.overlong_buffer > max_new_tokens:
            raise UserError(
                f"--overlong-buffer {self.overlong_buffer} is above --max-new-tokens {max_new_tokens}: it is "
                "the last part of it"
            )


@dataclass(frozen=True, eq=False)
class Rollout:
    """Prompts, the responses sampled for them, and their rewards."""

    rows: Sequence[int]  # of the data set
    prompts: list[Prompt]
    samples: list[list[Sample]]  # [prompts][responses]
    rewards: np.ndarray  # [prompts, responses]

    @property
    def responses(self) -> list[Sample]:
        """All responses, those to one prompt end to end."""
        return [sample for samples in self.samples for sample in samples]

    @property
    def places(self) -> list[tuple[int, int]]:
        """Row and number of each response."""
        return [
            (row, k)
            for row, samples in zip(self.rows, self.samples, strict=True)
            for k in range(len(samples))
        ]

    @property
    def tokens(self) -> list[tuple[int, np.ndarray]]:
        """Number of prompt tokens, and token ids, of each response, for the ledger."""
        pairs = zip(self.prompts, self.samples, strict=True)
        return [(len(prompt.ids), sample.ids) for prompt, samples in pairs for sample in samples]

    def examples(self) -> list[list[Example]]:
        """The responses to each prompt as examples."""
        return [
            [response_example(prompt, sample) for sample in samples]
            for prompt, samples in zip(self.prompts, self.samples, strict=True)
        ]

    def scores_and_counted(self, truncation: TruncationConfig, max_new_tokens: int) -> tuple[Tensor, Tensor]:
        """Scores [A], less penalties for their lengths; [A] bool, responses that the policy learns from."""
        scores = torch.from_numpy(self.rewards).view(-1)
        is_truncated = torch.tensor([sample.finish != "stop" for sample in self.responses])
        if truncation.truncated == "penalise":
            scores = scores - truncation.truncated_penalty * is_truncated.double()
        if truncation.overlong_buffer:
            lengths = [len(sample.ids) for sample in self.responses]
            scores = scores - rl.overlong_penalty(lengths, max_new_tokens, truncation.overlong_buffer)
        return scores, ~is_truncated if truncation.truncated == "mask" else torch.ones_like(is_truncated)

    def statistics(self) -> dict[str, float]:
        """Means over all responses; with several to a prompt, the share of prompts with equal rewards only.

        Such a prompt has no signal for rejection sampling, RLOO and GRPO.
        """
        flat = (self.rewards == self.rewards[:, :1]).all(1)
        spread = {"prompts_without_spread": float(flat.mean())} if self.rewards.shape[1] > 1 else {}
        return {
            **spread,
            "rewards": float(self.rewards.mean()),
            "response_lengths": float(np.mean([len(sample.ids) for sample in self.responses])),
            "prompt_lengths": float(np.mean([len(prompt.ids) for prompt in self.prompts])),
            "ended": float(np.mean([sample.finish == "stop" for sample in self.responses])),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays for align.training.record: rows, log-probs [n] of the sampler, the rest [A] by response."""
        samples = self.responses
        return {
            "rows": np.array(self.rows),
            "scores": self.rewards.reshape(-1),
            "ended": np.array([sample.finish == "stop" for sample in samples]),
            "sampler_logprobs": np.concatenate([sample.logprobs for sample in samples]),
            "model_logprobs": np.concatenate([sample.model_logprobs for sample in samples]),
        }

    def table(self, name: str, most: int, tokenizer: Tokenizer, stop: tuple[str, ...]) -> list[dict]:
        """The first prompts, each with its first response and reward, for samples.jsonl."""
        return [
            {
                "table": name,
                "prompt": tokenizer.decode(self.prompts[i].ids.tolist()),
                "response": self.samples[i][0].text(tokenizer, stop),
                "reward": float(self.rewards[i, 0]),
            }
            for i in range(min(most, len(self.rows)))
        ]
