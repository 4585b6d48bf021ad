"""Scores of sampled answers: by a reward model that lives in the same job, or by a function of the user's.

Both take answers by prompt and return an array [prompts, answers of each], the same on every rank.
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch import Tensor

from align import architecture, engine, huggingface, model, offload, packing, parallel, tokenizer
from align.generate import Sample
from align.model import ModelConfig
from align.packing import Batch, BatchConfig, Example
from align.parallel import ParallelConfig
from align.preferences import as_scored
from align.prompts import Prompt

Function = Callable[[str, str, dict], float]  # prompt, response, row of the data -> reward


@dataclass(frozen=True)
class RewardConfig:
    reward_model: Path | None = None
    """Hugging Face directory of a reward model (train_rm.py makes one) with the policy's tokenizer"""
    reward_fn: str | None = None
    """module:function of yours, called with prompt, response (both text) and the row; returns a number"""

    def __post_init__(self):
        if self.reward_model and self.reward_fn:
            raise ValueError("--reward-model and --reward-fn: give one of them")


def answer(prompt: Prompt, sample: Sample) -> Example:
    """Prompt and sampled answer as an example that trains the answer. No text, no tokenizer in between."""
    trained = np.arange(len(prompt.ids) + len(sample.ids)) >= len(prompt.ids)
    return Example(np.concatenate([prompt.ids, sample.ids]).astype(np.int32), trained)


class RewardModel:
    """A reward model in the policy's layout. Between rollouts its weights wait in CPU memory."""

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        layout: ParallelConfig,
        batch: BatchConfig,
        text: tokenizer.HuggingFaceTokenizer | tokenizer.SentencePieceTokenizer,
    ):
        """`config`: the policy's, for its precision and kernels; `text`: the policy's tokenizer."""
        self.batch = batch
        config = replace(config, model=str(directory))
        arch = architecture.read_config(config.path)
        if arch.labels != 1:
            kind = f"has {arch.labels} labels" if arch.labels else "is a language model"
            raise ValueError(f"--reward-model {directory} {kind}: give a reward model with one label")
        if tokenizer.load(config.path).ids_by_token != text.ids_by_token:
            raise ValueError(
                f"--reward-model {directory} has another tokenizer than --model: it would read other texts "
                "than were sampled"
            )
        self.scorer = model.build_scorer(arch, config, layout)
        huggingface.load(self.scorer, huggingface.open_source(config.path, arch, layout.seed))
        self.weights = offload.park(self.scorer)

    def __call__(self, prompts: Sequence[Prompt], samples: Sequence[Sequence[Sample]]) -> np.ndarray:
        """Rewards [prompts, answers]: the model's value at the last token of each answer. Collective.

        Raises ValueError for an answer beyond the model's context, FloatingPointError for NaN and infinity.
        """
        longest = max(
            len(prompt.ids) + len(sample.ids)
            for prompt, answers in zip(prompts, samples, strict=True)
            for sample in answers
        )
        if longest > (context := self.scorer.arch.max_positions):
            raise ValueError(
                f"--reward-model has a context of {context} tokens, prompt and answer have {longest}: lower "
                "--max-prompt-len or --max-new-tokens"
            )
        rows, numbers = [], []  # each row some answers to one prompt, whose places they share
        for i, (prompt, answers) in enumerate(zip(prompts, samples, strict=True)):
            examples = [as_scored(answer(prompt, sample)) for sample in answers]
            sizes = [example.num_inputs for example in examples]
            for part in packing.within_budget(sizes, self.batch.micro_batch_tokens):
                rows.append(examples[part.start : part.stop])
                numbers.append(np.array([(i, k) for k in part]))
        batches = engine.micro_batches(self.scorer, rows, self.batch, {"number": numbers})

        def scores(batch: Batch, values: Tensor) -> Tensor:
            return values[batch.mask.bool()][:, 0]  # those at the last tokens

        with self.weights.lent_to(self.scorer):
            found = engine.outputs(self.scorer, batches, scores)
        mine = [
            (*number, score)
            for batch, part in zip(batches, found, strict=True)
            for number, score in zip(batch.extra["number"].tolist(), part.tolist(), strict=True)
        ]
        rewards = table(parallel.gather_over_dp(mine), samples)
        if not np.isfinite(rewards).all():
            raise FloatingPointError("--reward-model gave a score that is NaN or infinite")
        return rewards


class RewardFunction:
    """A function of the user's. Each answer is scored once, by one of the ranks."""

    def __init__(self, name: str, text: tokenizer.HuggingFaceTokenizer, stop: tuple[str, ...]):
        """`name`: module:function, the module in the current directory or installed; `stop`: --stop."""
        self.name, self.function, self.text, self.stop = name, import_function(name), text, stop

    def __call__(self, prompts: Sequence[Prompt], samples: Sequence[Sequence[Sample]]) -> np.ndarray:
        """Rewards [prompts, answers]. Collective. Raises ValueError for what is no finite number."""
        places = [(i, k) for i, answers in enumerate(samples) for k in range(len(answers))]
        mine = []
        for i, k in places[dist.get_rank() :: dist.get_world_size()]:
            prompt, response = prompts[i], samples[i][k].text(self.text, self.stop)
            value = self.function(self.text.decode(prompt.ids.tolist()), response, prompt.row)
            if not isinstance(value, int | float | np.number) or not math.isfinite(value):
                raise ValueError(
                    f"--reward-fn {self.name} returned {value!r} for the answer {response!r}: a reward is a "
                    "finite number"
                )
            mine.append((i, k, float(value)))
        everyone: list[list | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return table(everyone, samples)


def import_function(name: str) -> Function:
    """The function that module:function names. Raises ValueError if there is none."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"--reward-fn {name!r} must be of the form module:function")
    sys.path.insert(0, str(Path.cwd()))
    package = module.partition(".")[0]  # find_spec raises an error of its own if this one is missing
    if importlib.util.find_spec(package) is None or importlib.util.find_spec(module) is None:
        raise ValueError(f"--reward-fn {name}: no module {module!r} in the current directory or installed")
    found = getattr(importlib.import_module(module), function, None)
    if not callable(found):
        raise ValueError(f"--reward-fn {name}: module {module!r} has no function {function!r}")
    return found


def table(parts: Sequence[Sequence[tuple[int, int, float]]], samples: Sequence[Sequence]) -> np.ndarray:
    """(prompt, answer, reward) of all ranks as an array [prompts, answers]."""
    rewards = np.full((len(samples), len(samples[0])), np.nan)
    for part in parts:
        for i, k, reward in part:
            rewards[i, k] = reward
    return rewards
