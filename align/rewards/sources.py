"""Reward sources: a reward model in the same job, and a function of the user's.

Each is called with responses by prompt and returns rewards [prompts, responses], equal on every rank.
"""

import contextlib
import copy
import importlib.util
import itertools
import json
import math
import os
import random
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from align.data import hub
from align.data.jsonl import write_object
from align.data.packing import BatchConfig
from align.data.preferences import as_scored
from align.data.prompts import Prompt
from align.data.tokenizer import Tokenizer, load_tokenizer
from align.distributed import parallel, watchdog
from align.distributed.parallel import ParallelConfig
from align.errors import UserError
from align.flags import SCALE, SCORE, check_ranges, refuse_unused
from align.generation.rollout import Sample, response_example
from align.model import architecture, gpt, huggingface
from align.model.config import ModelConfig
from align.model.gpt import Scorer
from align.training import batching, offload
from align.training.offload import HostStore

T = TypeVar("T", np.ndarray, Tensor)
# rewards [prompts, responses] of prompts and their responses
RewardSource = Callable[[Sequence[Prompt], Sequence[Sequence[Sample]]], np.ndarray]
Function = Callable[[str, str, dict], float]  # prompt, response, row of the data -> reward
STATISTICS = "reward_statistics.json"  # in a reward model's directory, beside config.json
Setting = tuple[Callable[[], Any], Callable[[Any], Any]]  # functions that read it and restore it
SETTINGS: tuple[Setting, ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (os.getcwd, os.chdir),
)
RANDOM_STATES: tuple[Setting, ...] = (
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
    (
        lambda: torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        lambda state: None if state is None else torch.cuda.set_rng_state(state),
    ),
)


@dataclass(frozen=True)
class RewardConfig:
    """Reward model, reward function, and the scale of scores."""

    reward_model: Path | None = None
    """reward model (train_rm.py makes one) with the policy's tokenizer: a directory, or one of the Hub"""
    reward_fn: str | None = None
    """module:function of yours, called with prompt, response (both text) and the row; returns a number; with
    a reward model as well their sum counts"""
    reward_mean: float = 0.0
    """subtracted from the reward model's scores"""
    reward_std: float = 1.0
    """the scores are divided by it then; with the mean and standard deviation that the reward model has on
    responses of --model, rewards are standardised"""
    reward_standardise: Literal["off", "auto"] = "off"
    """auto: --reward-mean and --reward-std are those in the reward model's reward_statistics.json, in which
    train_rm.py writes the mean and standard deviation of its scores on validation rows"""

    def __post_init__(self):
        check_ranges(self, reward_mean=SCORE, reward_std=SCALE)
        if not self.reward_model:
            names = "reward_mean reward_std reward_standardise"
            refuse_unused(self, RewardConfig, names, "without --reward-model")
        if self.reward_standardise == "auto":
            why = "with --reward-standardise auto, which reads it from a file"
            refuse_unused(self, RewardConfig, "reward_mean reward_std", why)

    def resolved(self, is_toy: bool) -> "RewardConfig":
        """Replace --reward-standardise auto by numbers, and no reward by the toy task's own if `is_toy`."""
        reward = self.with_statistics()
        if is_toy and not (reward.reward_model or reward.reward_fn):
            return replace(reward, reward_fn="align.data.toy:reward")
        return reward

    def with_statistics(self) -> "RewardConfig":
        """Replace --reward-standardise auto by the numbers of the file. Raises UserError without them."""
        if self.reward_standardise == "off":
            return self
        path = hub.local_model(self.reward_model) / STATISTICS
        flag = "--reward-standardise auto"
        if not path.is_file():
            raise UserError(
                f"{flag}: there is no {path}, which train_rm.py writes with each reward model. Give "
                "--reward-mean and --reward-std instead: rewards_all_mean and rewards_all_std of its "
                "validation, or what the reward model gives to responses of --model"
            )
        try:
            mean, std = (float(json.loads(path.read_bytes())[name]) for name in ("mean", "std"))
            return replace(self, reward_standardise="off", reward_mean=mean, reward_std=std)
        except (ValueError, KeyError, TypeError) as error:
            rule = 'must hold numbers "mean" and "std", std above 0'
            raise UserError(f"{flag}: {path} {rule}: {error}") from error

    def describe(self) -> str:
        """The parts of a reward, for the log."""
        score = f"the score of {self.reward_model}" if self.reward_model else None
        if (self.reward_mean, self.reward_std) != (0.0, 1.0):
            score = f"({score} - {self.reward_mean:g}) / {self.reward_std:g}"
        return f"reward: {' + '.join(filter(None, [score, self.reward_fn]))}"

    def standardised(self, scores: T) -> T:
        """Scores of the reward model, an array or tensor, as rewards."""
        return (scores - self.reward_mean) / self.reward_std


def load_scorer(
    flag: str, directory: Path, config: ModelConfig, layout: ParallelConfig, tokenizer: Tokenizer
) -> Scorer:
    """Load a reward model or critic, one value per token; a language model gets a head of zeros.

    Raises UserError, naming `flag`, for several labels or another tokenizer than the policy's.
    """
    config = replace(config, model=str(directory))
    start = architecture.read_config(config.path, flag)
    if start.labels > 1:
        raise UserError(f"{flag} {directory} has {start.labels} labels: give a model with one")
    if load_tokenizer(config.path).ids_by_token != tokenizer.ids_by_token:
        reason = "has another tokenizer than --model: the sampled token ids would mean other texts to it"
        raise UserError(f"{flag} {directory} {reason}")
    arch = replace(start, labels=1)
    scorer = gpt.build_scorer(arch, config, layout)
    source = huggingface.open_source(config.path, arch if start.labels else start, layout.seed)
    if not start.labels:  # a critic: random values would only add noise to the first advantages
        source = huggingface.FreshHead(source, arch, layout.seed, std=0.0)
    huggingface.load(scorer, source)
    return scorer


def standardisation_of_values(directory: Path, config: ModelConfig, reward: RewardConfig) -> RewardConfig:
    """Standardisation of a critic's values: the rewards' if it starts as a reward model, else none."""
    is_reward_model = architecture.read_config(replace(config, model=str(directory)).path).labels > 0
    return reward if is_reward_model else RewardConfig()


def warn_of_other_ends(reward: RewardConfig, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
    """Log a warning if a reward model's training texts seldom end with a stop token of the policy.

    The score is read at the last token, and after another token it is off the training distribution.
    """
    path = reward.reward_model and hub.local_model(reward.reward_model) / STATISTICS
    ends = json.loads(path.read_bytes()).get("ends") if path and path.is_file() else None
    if not ends:
        return
    strings = [tokenizer.encode(end, continued=True)[-1] for end in tokenizer.stop_strings]
    share = sum(ends.get(str(i), 0) for i in {*tokenizer.stop_ids, *strings}) / sum(ends.values())
    if share < 0.5:
        most = tokenizer.decode([int(max(ends, key=ends.get))])
        stops = ", ".join(repr(tokenizer.decode([i])) for i in sorted(tokenizer.stop_ids))
        say(
            f"WARNING: texts that --reward-model {reward.reward_model} was trained on end with {most!r}, "
            f"responses with {stops}: its scores are off its training distribution. Train it from the SFT "
            "model, whose format it takes over, or on texts that end as responses do"
        )


def save_statistics(statistics: dict, directory: Path) -> None:
    """Write mean and standard deviation of a reward model's scores for `RewardConfig.with_statistics`.

    A file of its own: transformers would copy fields of config.json to models derived from this one.
    """
    write_object(directory / STATISTICS, statistics)


def reward_sources(
    reward: RewardConfig,
    config: ModelConfig,
    layout: ParallelConfig,
    batch: BatchConfig,
    tokenizer: Tokenizer,
    stop: tuple[str, ...],
    store: HostStore | None = None,
) -> list[RewardSource]:
    """Build the reward sources of the flags; the reward of a response is the sum of their scores."""
    sources: list[RewardSource] = []
    if reward.reward_model:
        sources.append(RewardModel(reward, config, layout, batch, tokenizer, store))
    if reward.reward_fn:
        sources.append(RewardFunction(reward.reward_fn, tokenizer, stop))
    return sources


class RewardModel:
    """A reward model in the policy's layout, offloaded between rollouts."""

    def __init__(
        self,
        reward: RewardConfig,
        config: ModelConfig,
        layout: ParallelConfig,
        batch: BatchConfig,
        tokenizer: Tokenizer,
        store: HostStore | None = None,
    ):
        """`config`, `tokenizer`: the policy's; `store`: destination of the offloaded weights."""
        assert reward.reward_model is not None
        self.reward, self.batch = reward, batch
        if not architecture.read_config(hub.local_model(reward.reward_model), "--reward-model").labels:
            raise UserError(f"--reward-model {reward.reward_model} is a language model: give a reward model")
        self.scorer = load_scorer("--reward-model", reward.reward_model, config, layout, tokenizer)
        self.weights = offload.offload_module(self.scorer, store or HostStore())

    def __call__(self, prompts: Sequence[Prompt], samples: Sequence[Sequence[Sample]]) -> np.ndarray:
        """Rewards [prompts, responses]: the standardised value at each response's last token. Collective.

        Raises UserError for a response beyond the model's context, FloatingPointError for NaN and infinity.
        """
        examples = [
            [as_scored(response_example(prompt, sample)) for sample in responses]
            for prompt, responses in zip(prompts, samples, strict=True)
        ]
        longest = max(example.num_inputs for responses in examples for example in responses)
        if longest > (context := self.scorer.arch.max_positions):
            sizes = f"a context of {context} tokens, prompt and response have {longest}"
            raise UserError(f"--reward-model has {sizes}: lower --max-prompt-len or --max-new-tokens")
        rows = batching.pack_responses(self.scorer, examples, self.batch)
        with self.weights.swapped_into(self.scorer):
            scores = batching.per_example_outputs(self.scorer, rows, self.batch)
        rewards = np.concatenate(scores)[:, 0].astype(np.float64).reshape(len(prompts), -1)
        if not np.isfinite(rewards).all():
            raise FloatingPointError("--reward-model gave a score that is NaN or infinite")
        return self.reward.standardised(rewards)


class RewardFunction:
    """A function of the user's. Each response is scored once, by one of the ranks.

    Settings and random states of the training are restored after it. Its own random numbers are seeded by the
    response and its place, equal in every layout.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, stop: tuple[str, ...], flag: str = "--reward-fn"):
        """`name`: module:function, the module in the current directory or installed; `stop`: --stop."""
        self.flag, self.function = f"{flag} {name}", import_function(name, flag)
        self.tokenizer, self.stop = tokenizer, stop

    def __call__(self, prompts: Sequence[Prompt], samples: Sequence[Sequence[Sample]]) -> np.ndarray:
        """Rewards [prompts, responses]. Collective. Raises UserError for anything but a finite number."""
        with isolated(self.flag, RANDOM_STATES):  # once for all, since numpy's takes 0.2 ms
            part = self.part(prompts, samples)
        rewards = np.full((len(samples), len(samples[0])), np.nan)
        for i, k, reward in itertools.chain(*parallel.gather(part)):
            rewards[i, k] = reward
        return rewards

    def part(self, prompts: Sequence[Prompt], samples: Sequence[Sequence[Sample]]) -> list[tuple]:
        """(prompt, response, reward) of this rank's share."""
        places = [(i, k) for i, responses in enumerate(samples) for k in range(len(responses))]
        rewards = []
        for i, k in places[dist.get_rank() :: dist.get_world_size()]:
            watchdog.tick(self.flag)
            prompt, response = prompts[i], samples[i][k].text(self.tokenizer, self.stop)
            row = copy.deepcopy(prompt.row)  # the function may change it
            seed = zlib.crc32(samples[i][k].ids.tobytes(), i * len(samples[i]) + k)
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            with isolated(self.flag, SETTINGS):
                value = self.function(self.tokenizer.decode(prompt.ids.tolist()), response, row)
            if not isinstance(value, int | float | np.number) or not math.isfinite(value):
                returned = f"returned {value!r} for the response {response!r}"
                raise UserError(f"{self.flag} {returned}: a reward is a finite number")
            rewards.append((i, k, float(value)))
        return rewards


@contextlib.contextmanager
def isolated(flag: str, settings: Sequence[Setting]) -> Iterator[None]:
    """Restore settings after the user's code. Raises RuntimeError, naming `flag`, for its sys.exit."""
    before = [read() for read, _ in settings]
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"{flag} called sys.exit({error.code!r}): a function returns or raises") from error
    finally:
        for (read, restore), value in zip(settings, before, strict=True):
            if read() is not value:  # random states are always new objects
                restore(value)


def import_function(name: str, flag: str = "--reward-fn") -> Function:
    """Import module:function, the value of `flag`. Raises UserError if it does not exist."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise UserError(f"{flag} {name!r} must be of the form module:function")
    sys.path.insert(0, str(Path.cwd()))
    package = module.partition(".")[0]  # find_spec raises another error if the package is missing
    with isolated(f"{flag} {name}", (*SETTINGS, *RANDOM_STATES)):
        if importlib.util.find_spec(package) is None or importlib.util.find_spec(module) is None:
            raise UserError(f"{flag} {name}: no module {module!r} in the current directory or installed")
        attribute = getattr(importlib.import_module(module), function, None)
    if not callable(attribute):
        raise UserError(f"{flag} {name}: module {module!r} has no function {function!r}")
    return attribute
