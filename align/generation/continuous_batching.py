"""Continuous batching on one copy of the model: a slot that is free takes the next prompt."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from align.data import packing
from align.data.tokenizer import Tokenizer
from align.distributed import watchdog
from align.generation import sampling
from align.generation.inference import PrefilledPrompt
from align.generation.rollout import Sample, says_stop
from align.generation.sampling import SamplingConfig
from align.generation.slots import Drawn, Slots

READ_AHEAD = 4  # while prompts are left, at least a quarter of the slots is prefilled at once
# One in so many of the slots in use must have ended before any is filled anew: a start drains a GPU's queue,
# by estimate 1 ms beside a step of 2 to 10 ms, and half as many slots wait on average.
REFILL = 16
PREFILL_TOKENS = 4096  # most prompt tokens of one prefill pass; a longer prompt has a pass of its own
RUNNING, STOP, LENGTH = range(3)  # state of a sequence: decoding, ended by a stop token or string, truncated
FINISH: dict[int, Literal["stop", "length"]] = {STOP: "stop", LENGTH: "length"}

OnToken = Callable[[int, int, int], None]  # number of the prompt, number of the response to it, token


@dataclass(frozen=True, eq=False)
class Request:
    """A response to sample, its prompt prefilled."""

    prompt: int
    number: int  # of the responses to its prompt
    prefilled: PrefilledPrompt
    uniforms: np.ndarray  # [most new tokens], a random number for each


class ContinuousBatch:
    """Decode the sequences of one copy of the model, slot by slot; every rank of the copy runs it alike.

    Host-side state of the slots is one row of several arrays; device-side state is in `Slots`.
    """

    def __init__(
        self,
        state: Slots,
        sampling_config: SamplingConfig,
        tokenizer: Tokenizer,
        seed: int,
        slots: int,
        on_token: OnToken | None,
        prompts: Sequence[np.ndarray],
        streams: Sequence[tuple[int, ...]],
        samples_per_prompt: int,
    ):
        self.state, self.engine, self.slots, self.on_token = state, state.engine, slots, on_token
        self.sampling, self.tokenizer, self.seed = sampling_config, tokenizer, seed
        self.prompts, self.streams, self.samples_per_prompt = prompts, streams, samples_per_prompt
        self.context = self.engine.arch.max_positions
        self.stop_ids = np.array(sorted(tokenizer.stop_ids), np.int32)
        self.requests: deque[Request] = deque()
        most = min(self.sampling.max_new_tokens, self.context)
        self.in_flight: deque[Drawn] = deque()  # launched steps whose tokens the host has not read
        self.used = 0  # slots in use
        # by slot: prompt and number of its response, tokens of the prompt, most and present response tokens
        self.prompt, self.number, self.length, self.room, self.count = np.zeros((5, slots), np.int64)
        self.finish = np.zeros(slots, np.int8)
        self.ids = np.zeros((slots, most), np.int32)
        self.logprobs, self.model_logprobs = np.zeros((2, slots, most), np.float32)

    def run(self, take: Callable[[int], range]) -> dict[tuple[int, int], Sample]:
        """Sample until no prompt is left. Returns {(prompt, number of the response): sample}.

        `take`: the numbers of up to so many more prompts, none when all are taken.
        """
        samples: dict[tuple[int, int], Sample] = {}
        while True:
            watchdog.tick("generate")
            ended = self.ended()
            if self.used and not ended:
                self.step()
                continue
            samples |= {(int(self.prompt[slot]), int(self.number[slot])): self.sample(slot) for slot in ended}
            free = ended + list(range(self.used, self.slots))
            while len(self.requests) < len(free):
                # A few more than are needed now: prefilling prompts one by one takes twice the time.
                missing = max(len(free) - len(self.requests), self.slots // READ_AHEAD)
                numbers = take(math.ceil(missing / self.samples_per_prompt))
                if not numbers:
                    break
                self.prefill(numbers)
            if filled := free[: len(self.requests)]:
                self.start(filled)
            else:
                self.close_gaps(ended)
            if not self.used:
                return samples

    def ended(self) -> list[int]:
        """The slots whose sequences have ended, once enough have; steps in flight are read first."""
        if np.count_nonzero(self.finish[: self.used]) < max(1, self.used // REFILL):
            return []
        while self.in_flight:
            self.read_step()
        return np.flatnonzero(self.finish[: self.used]).tolist()

    def prefill(self, numbers: range) -> None:
        """Prefill prompts; all responses to a prompt share its keys and values."""
        for part in packing.group_by_budget([len(self.prompts[i]) for i in numbers], PREFILL_TOKENS):
            chosen = numbers[part.start : part.stop]
            ids = [torch.from_numpy(self.prompts[i].astype(np.int64)) for i in chosen]
            for i, prefilled in zip(chosen, self.engine.prefill(ids), strict=True):
                room = min(self.sampling.max_new_tokens, self.context - len(self.prompts[i]))
                for number in range(self.samples_per_prompt):
                    uniforms = np.random.default_rng([self.seed, *self.streams[i], number]).random(room)
                    self.requests.append(Request(i, number, prefilled, uniforms))

    def start(self, slots: list[int]) -> None:
        """Start the next requests in these slots and draw their first tokens."""
        assert not self.in_flight
        requests = [self.requests.popleft() for _ in slots]
        own_prompts = [self.prompts[request.prompt] for request in requests]
        self.used = max(self.used, slots[-1] + 1)
        self.prompt[slots] = [request.prompt for request in requests]
        self.number[slots] = [request.number for request in requests]
        self.length[slots] = [len(prompt) for prompt in own_prompts]
        self.room[slots] = [len(request.uniforms) for request in requests]
        self.count[slots], self.finish[slots] = 0, RUNNING
        prefilled, uniforms = zip(*((r.prefilled, r.uniforms) for r in requests), strict=True)
        self.record(np.array(slots), self.state.start(slots, prefilled, own_prompts, uniforms).numpy())

    def step(self) -> None:
        """Decode one token of every sequence; on a GPU the host reads it one step later."""
        tokens = self.length[: self.used] + self.count[: self.used]
        self.in_flight.append(self.state.step(self.used, int(tokens.max()) + self.state.ahead))
        if len(self.in_flight) > self.state.ahead:
            self.read_step()

    def read_step(self) -> None:
        """Record the tokens of the oldest step in flight, except of sequences that had ended before it."""
        drawn = self.in_flight.popleft().numpy()
        slots = np.flatnonzero(self.finish[: self.used] == RUNNING)
        self.record(slots, drawn[:, slots])

    def record(self, slots: np.ndarray, drawn: np.ndarray) -> None:
        """Record the tokens drawn for some slots, [3, n] as in `Drawn`."""
        sampling.check_draws(drawn[2])
        places = slots, self.count[slots]
        self.ids[places], self.logprobs[places], self.model_logprobs[places] = drawn
        self.count[slots] += 1
        self.finish[slots] = self.finish_of(slots)
        if len(ended := slots[self.finish[slots] != RUNNING]):
            self.state.stop(ended)
        if self.on_token is not None:
            for slot, token in zip(slots, drawn[0], strict=True):
                self.on_token(int(self.prompt[slot]), int(self.number[slot]), int(token))

    def finish_of(self, slots: np.ndarray) -> np.ndarray:
        """RUNNING, STOP or LENGTH for each of the slots, by its newest token."""
        stops = np.isin(self.ids[slots, self.count[slots] - 1], self.stop_ids)
        if self.sampling.stop:
            responses = [self.ids[slot, : self.count[slot]] for slot in slots]
            stops |= np.array([says_stop(ids, self.tokenizer, self.sampling.stop) for ids in responses], bool)
        return np.where(stops, STOP, np.where(self.count[slots] == self.room[slots], LENGTH, RUNNING))

    def sample(self, slot: int) -> Sample:
        """The response of a slot whose sequence has ended."""
        count, finish = self.count[slot], FINISH[self.finish[slot]]
        ids = self.ids[slot, :count].copy()
        logprobs, model_logprobs = (x[slot, :count].copy() for x in (self.logprobs, self.model_logprobs))
        return Sample(ids, logprobs, model_logprobs, finish)

    def close_gaps(self, ended: list[int]) -> None:
        """Move the last sequences into ended slots, so that the slots in use are the first."""
        for slot in reversed(ended):
            self.used = last = self.used - 1
            if slot < last:
                self.state.move(last, slot, self.length[last] + self.count[last] - 1)
                for array in (self.prompt, self.number, self.length, self.room, self.count, self.finish):
                    array[slot] = array[last]
                for rows in (self.ids, self.logprobs, self.model_logprobs):
                    rows[slot] = rows[last]
        if ended:
            self.state.release(self.used)
