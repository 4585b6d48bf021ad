"""Sampling from a policy: many prompts, several answers to each, decoded together on the training weights.

`Generator` is made once per run and samples as often as asked. A sequence that ends makes room for the next
prompt at once. Each answer has random numbers of its own, which follow from the run's seed and from numbers
that the script gives with its prompt: but for rounding, what is decoded beside it, or where, has no effect.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.resharding.refit import CopyService, NCCLCopyService, swap_model_weights
from megatron.core.utils import unwrap_model
from torch import nn

from align.data import packing
from align.data.marker_chat import MarkerChat
from align.distributed import parallel, watchdog
from align.distributed.parallel import ParallelConfig
from align.errors import UserError
from align.flags import COUNT, between, check_ranges, refuse_unused, whole
from align.generation import sampling, trtllm
from align.generation.inference import InferenceModel, Prefix, takes_graphs
from align.generation.sampling import SamplingConfig
from align.generation.slots import Drawn, Slots
from align.model import gpt
from align.model.architecture import Architecture
from align.model.config import ModelConfig
from align.model.gpt import Policy
from align.training import offload

READ_AHEAD = 4  # one part in so many of the slots is the least that is read at once, while prompts are left
PREFILL_TOKENS = 4096  # most tokens of prompts that are read in one pass, unless one alone has more

OnToken = Callable[[int, int, int], None]  # number of the prompt, of the answer to it, token


class Tokenizer(Protocol):
    """Methods of a tokenizer that sampling needs; `align.data.tokenizer` has two tokenizers."""

    stop_ids: set[int]
    stop_strings: tuple[str, ...]
    chat: MarkerChat | None
    vocab_size: int

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class RolloutConfig:
    """Layout and batch size of sampling."""

    rollout_layout: Literal["same", "reshard"] | None = None
    """same: sample in the training layout; reshard: sample from copies of the weights in a layout of their
    own, remade after each update; each --rollout-tp ranks hold one copy and decode their own prompts. None:
    reshard where tp or pp > 1"""
    rollout_tp: int = 1
    """reshard: tensor parallel size of a copy; with 1 every rank holds a whole model while it samples"""
    rollout_slots: int = 64
    """sequences that one copy of the model decodes at a time; their KV cache takes memory"""
    generate_with: Literal["native", "trtllm"] = "native"
    """trtllm: engines of TensorRT-LLM sample, each of --rollout-tp ranks, whatever --rollout-layout says; see
    requirements-trtllm.txt. Never tried on hardware"""
    trtllm_keep: bool = False
    """keep the engines' memory on the GPUs between rollouts"""
    trtllm_memory: float = 0.4
    """KV cache of an engine, as a share of the GPU memory that is free when it starts"""

    def __post_init__(self):
        check_ranges(self, rollout_tp=COUNT, rollout_slots=whole(1, 10**6), trtllm_memory=between(0, 1))
        if self.generate_with == "native":
            refuse_unused(self, RolloutConfig, "trtllm_keep trtllm_memory", "with --generate-with native")
        if self.generate_with == "trtllm" and self.rollout_layout == "reshard":
            raise UserError(
                "--rollout-layout reshard has no effect with --generate-with trtllm, whose engines have "
                "--rollout-tp ranks each: leave it out"
            )
        if self.generate_with == "native" and self.rollout_layout == "same":
            refuse_unused(self, RolloutConfig, "rollout_tp", "with --rollout-layout same")

    def reshards(self, parallel: ParallelConfig) -> bool:
        """True if the weights are copied to another layout."""
        if self.rollout_layout is None:
            return parallel.tp > 1 or parallel.pp > 1 or self.rollout_tp > 1
        return self.rollout_layout == "reshard"


@dataclass(frozen=True, eq=False)
class Sample:
    """One answer."""

    ids: np.ndarray  # [n] int32, the stop token included
    logprobs: np.ndarray  # [n] float32, under the distribution that each was drawn from
    model_logprobs: np.ndarray  # [n] float32, under the model as it is: temperature 1, nothing cut off
    finish: Literal["stop", "length"]

    def text(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> str:
        """The response as text, without what ended it."""
        ids = self.ids.tolist()
        text = tokenizer.decode(ids[:-1] if ids[-1] in tokenizer.stop_ids else ids)
        ends = [text.index(end) for end in (*stop, *tokenizer.stop_strings) if end in text]
        text = text[: min(ends)] if ends else text
        ended = tokenizer.chat and self.finish == "stop"
        return text.removesuffix(tokenizer.chat.end_of_turn) if ended else text


@dataclass(frozen=True, eq=False)
class Request:
    """An answer that waits for a slot, its prompt being read."""

    prompt: int
    number: int  # of the answers to its prompt
    prefix: Prefix
    uniforms: np.ndarray  # [most new tokens], one for each


class Generator:
    """Samples from a policy in training, of which it holds a copy in another layout where that pays.

    Many models have more rows in their output layer than their tokenizer has ids. From here on the policy's
    softmax is over the tokenizer's ids only, in sampling and in training alike: no other id is ever drawn,
    and log-probs, entropies and importance ratios are those of the distribution that is sampled from.
    """

    def __init__(
        self,
        policy: nn.Module,
        config: RolloutConfig,
        sampling_config: SamplingConfig,
        model_config: ModelConfig,
        parallel_config: ParallelConfig,
        tokenizer: Tokenizer,
    ):
        self.policy: Policy = unwrap_model(policy)
        sampling_config = replace(sampling_config, stop=(*sampling_config.stop, *tokenizer.stop_strings))
        self.config, self.sampling, self.tokenizer = config, sampling_config, tokenizer
        self.seed, self.fixed = parallel_config.seed, parallel_config.deterministic
        self.policy.known_ids = min(self.policy.arch.vocab_size, tokenizer.vocab_size)
        self.copy = self.engine = None
        tp = config.rollout_tp
        if config.generate_with == "trtllm" or config.reshards(parallel_config):
            groups = rollout_groups(tp)
            self.replica, self.replicas = dist.get_rank() // tp, dist.get_world_size() // tp
            self.group = groups.tp
        if config.generate_with == "trtllm":
            self.engine = trtllm.Engine(
                model=model_config.path,
                sampling=sampling_config,
                stop_ids=tokenizer.stop_ids,
                absent_ids=range(self.policy.known_ids, self.policy.arch.vocab_size),
                group=self.group,
                slots=config.rollout_slots,
                keep=config.trtllm_keep,
                memory=config.trtllm_memory,
            )
        elif config.reshards(parallel_config):
            self.copy = gpt.in_layout(self.policy, model_config, groups)
            self.freed = offload.release(self.copy.parameters())
            self.copy_service = copy_service()
        else:
            self.replica = mpu.get_data_parallel_rank(with_context_parallel=True)
            self.replicas = mpu.get_data_parallel_world_size(with_context_parallel=True)
            self.group = mpu.get_model_parallel_group()
        self.leads = self.group.rank() == 0

    def describe(self) -> str:
        """Layout of sampling, for the log."""
        where = "the training layout" if self.copy is None else "a copy of the weights"
        where = "TensorRT-LLM" if self.engine else where
        split = f", tp {self.config.rollout_tp}" if self.copy or self.engine else ""
        slots = f"{self.replicas} x {self.config.rollout_slots} sequences at a time"
        graphs = not self.engine and takes_graphs(self.copy or self.policy)
        return f"sampling in {where}{split}: {slots}" + (", steps as CUDA graphs" if graphs else "")

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[np.ndarray],
        streams: Sequence[tuple[int, ...]],
        samples_per_prompt: int = 1,
        on_token: OnToken | None = None,
    ) -> list[list[Sample]]:
        """Sample answers to prompts, in the order of the prompts, on every rank. Collective.

        Args:
            prompts: [n] token ids each, the same on every rank.
            streams: for each prompt the numbers that its random numbers follow from, besides the run's seed.
            on_token: called for each new token, on the ranks that sampled it; with an engine at the end.

        Raises:
            UserError: a prompt is empty, or leaves no room for an answer in the model's context.
        """
        context = self.policy.arch.max_positions
        for prompt in prompts:
            check_prompt(prompt, context)
        if not prompts:
            return []
        if self.engine:
            mine = self.by_engine(prompts, streams, samples_per_prompt, on_token)
            return gather(mine, len(prompts), samples_per_prompt)
        if self.copy is not None:
            offload.restore(self.freed)
            swap_model_weights([self.policy], [self.copy], self.copy_service)
        slots = min(self.config.rollout_slots, len(prompts) * samples_per_prompt)
        engine = InferenceModel(self.copy or self.policy, slots)
        queue = Queue(len(prompts), self)
        batch = ContinuousBatch(engine, self, slots, on_token)
        mine = batch.run(queue, prompts, streams, samples_per_prompt)
        graphed = engine.graphed
        del engine, batch
        if self.copy is not None:
            self.freed = offload.release(self.copy.parameters())
        if self.copy is not None or graphed:  # graphs have memory of their own
            parallel.free_memory()
        return gather(mine if self.leads else {}, len(prompts), samples_per_prompt)

    def by_engine(
        self,
        prompts: Sequence[np.ndarray],
        streams: Sequence[tuple[int, ...]],
        samples_per_prompt: int,
        on_token: OnToken | None,
    ) -> dict[tuple[int, int], Sample]:
        """Sample with this rank's TensorRT-LLM engine, if the rank leads one. Collective."""
        parallel.free_memory()  # the engine's processes need what torch only keeps for later
        self.engine.refresh(self.policy)
        found = {}
        if self.leads:
            numbers = range(self.replica, len(prompts), self.replicas)
            places = [(i, number) for i in numbers for number in range(samples_per_prompt)]
            seeds = [trtllm.seed(self.seed, streams[i], number) for i, number in places]
            watchdog.tick("generate")
            answers = self.engine.sample([prompts[i] for i, _ in places], seeds, self.ends)
            found = {place: Sample(*answer) for place, answer in zip(places, answers, strict=True)}
        self.engine.rest()
        for (i, number), sample in found.items() if on_token else ():
            for token in sample.ids.tolist():
                on_token(i, number, token)
        return found

    def ends(self, ids: list[int]) -> bool:
        """True if a response ends with its newest token."""
        return ids[-1] in self.tokenizer.stop_ids or says_stop(ids, self.tokenizer, self.sampling.stop)


def check_rollout(
    arch: Architecture,
    config: RolloutConfig,
    sampling_config: SamplingConfig,
    model_config: ModelConfig,
    parallel_config: ParallelConfig,
) -> None:
    """Refuse a sampler that this model, machine or number of processes does not allow."""
    if config.generate_with == "trtllm":
        trtllm.check(sampling_config, model_config, parallel_config)
    if config.generate_with == "trtllm" or config.reshards(parallel_config):
        check_rollout_tp(config.rollout_tp, arch, dist.get_world_size())


def check_rollout_tp(tp: int, arch: Architecture, world: int) -> None:
    """Refuse a --rollout-tp that this model or the number of processes does not allow."""
    if world % tp:
        raise UserError(f"--rollout-tp {tp} does not divide the {world} processes")
    if arch.heads % tp or arch.ffn_size % tp or (arch.kv_heads % tp and tp % arch.kv_heads):
        raise UserError(
            f"--rollout-tp {tp} does not divide the model's {arch.heads} attention heads, {arch.kv_heads} "
            f"key-value heads and {arch.ffn_size} ffn columns"
        )


def check_model_logprobs(config: RolloutConfig, sampling_config: SamplingConfig) -> None:
    """Refuse samplers that do not tell `Sample.model_logprobs`, for scripts whose audit compares them."""
    if config.generate_with == "trtllm" and sampling_config.temperature != 1:
        raise UserError(
            f"--generate-with trtllm with --temperature {sampling_config.temperature}: TensorRT-LLM tells "
            "the log-probs of what it draws from only, and this script's audit needs the model's own; take 1"
        )


def warn_if_none_ended(responses: Sequence[Sample], max_new_tokens: int, say: Callable[[str], None]) -> None:
    """Log a warning if no response of a rollout ended by itself: training would hardly learn from it."""
    if all(response.finish == "length" for response in responses):
        say(
            f"WARNING: none of the {len(responses):,} responses of the first rollout ended within "
            f"--max-new-tokens {max_new_tokens}: raise it, give the text that ends a response as --stop, or "
            "start from a model that was trained on responses with an end"
        )


def check_prompt(prompt: np.ndarray, context: int) -> None:
    """Raises UserError for a prompt that cannot be answered."""
    if len(prompt) == 0:
        raise UserError("the prompt is empty: there must be a token to continue")
    if len(prompt) >= context:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, the model's context {context}: no room for an answer"
        )


def says_stop(ids: Sequence[int], tokenizer: Tokenizer, stop: tuple[str, ...]) -> bool:
    """True if a stop text ends in the newest token, or before it among the last few."""
    # a character has at most 4 tokens, those of its bytes
    tail = 4 * max(map(len, stop), default=0) + 4
    text = tokenizer.decode([int(i) for i in ids[-tail:]]) if stop else ""
    return any(end in text for end in stop)


# ---- one copy of the model ----------------------------------------------------------------------------


LIVE, STOP, LENGTH = range(3)  # how a sequence stands: it goes on, or has ended, and why
FINISH = {STOP: "stop", LENGTH: "length"}


class ContinuousBatch:
    """The sequences that one copy of the model decodes, slot by slot; all ranks of the copy run it alike.

    What the host knows of a slot is a row of each of some arrays; what the device needs is in `Slots`.
    """

    def __init__(self, engine: InferenceModel, generator: Generator, slots: int, on_token: OnToken | None):
        self.engine, self.slots, self.on_token = engine, slots, on_token
        self.sampling, self.tokenizer, self.seed = generator.sampling, generator.tokenizer, generator.seed
        self.context = generator.policy.arch.max_positions
        self.stop_ids = np.array(sorted(self.tokenizer.stop_ids), np.int32)
        self.waiting: deque[Request] = deque()
        most = min(self.sampling.max_new_tokens, self.context)
        self.state = Slots(engine, self.sampling, slots, most)
        self.flying: deque[Drawn] = deque()  # steps that the device was told to do, not looked at yet
        self.used = 0  # slots
        # by slot: whose answer it is, tokens of the prompt, most and present tokens of the answer
        self.prompt, self.number, self.length, self.room, self.count = np.zeros((5, slots), np.int64)
        self.finish = np.zeros(slots, np.int8)
        self.ids = np.zeros((slots, most), np.int32)
        self.logprobs, self.model_logprobs = np.zeros((2, slots, most), np.float32)

    def run(
        self,
        queue: "Queue",
        prompts: Sequence[np.ndarray],
        streams: Sequence[tuple[int, ...]],
        samples_per_prompt: int,
    ) -> dict[tuple[int, int], Sample]:
        """Sample until the queue is empty. Returns {(prompt, number of the answer): answer}."""
        done = {}
        while True:
            watchdog.tick("generate")
            ended = self.ended()
            done |= {(int(self.prompt[slot]), int(self.number[slot])): self.sample(slot) for slot in ended}
            free = ended + list(range(self.used, self.slots))
            while len(self.waiting) < len(free):
                # A few more than are needed now: to read prompts one by one takes twice the time.
                wanted = max(len(free) - len(self.waiting), self.slots // READ_AHEAD)
                numbers = queue.take(math.ceil(wanted / samples_per_prompt))
                if not numbers:
                    break
                self.read(numbers, prompts, streams, samples_per_prompt)
            taken = free[: len(self.waiting)]
            if taken:
                self.start(taken, prompts)
            else:
                self.close_gaps(ended)
            if not self.used:
                return done
            if not self.finish[: self.used].any():
                self.step()

    def ended(self) -> list[int]:
        """The slots whose sequences have ended; where there are any, no step is flying any more."""
        if self.finish[: self.used].any():
            while self.flying:
                self.look()
        return np.flatnonzero(self.finish[: self.used]).tolist()

    def read(
        self,
        numbers: range,
        prompts: Sequence[np.ndarray],
        streams: Sequence[tuple[int, ...]],
        samples_per_prompt: int,
    ) -> None:
        """Prefill prompts; all answers to one continue the same prefix."""
        for part in packing.within_budget([len(prompts[i]) for i in numbers], PREFILL_TOKENS):
            chosen = numbers[part.start : part.stop]
            ids = [torch.from_numpy(prompts[i].astype(np.int64)) for i in chosen]
            for i, prefix in zip(chosen, self.engine.prefill(ids), strict=True):
                room = min(self.sampling.max_new_tokens, self.context - len(prompts[i]))
                for number in range(samples_per_prompt):
                    uniforms = np.random.default_rng([self.seed, *streams[i], number]).random(room)
                    self.waiting.append(Request(i, number, prefix, uniforms))

    def start(self, taken: list[int], prompts: Sequence[np.ndarray]) -> None:
        """Put waiting requests into these slots and draw their first tokens."""
        assert not self.flying
        requests = [self.waiting.popleft() for _ in taken]
        given = [prompts[request.prompt] for request in requests]
        self.used = max(self.used, taken[-1] + 1)
        self.prompt[taken] = [request.prompt for request in requests]
        self.number[taken] = [request.number for request in requests]
        self.length[taken] = [len(prompt) for prompt in given]
        self.room[taken] = [len(request.uniforms) for request in requests]
        self.count[taken], self.finish[taken] = 0, LIVE
        prefixes, uniforms = zip(*((r.prefix, r.uniforms) for r in requests), strict=True)
        self.note(np.array(taken), self.state.start(taken, prefixes, given, uniforms).numpy())

    def step(self) -> None:
        """One more token for every sequence; perhaps the host looks at it only after the next step."""
        tokens = self.length[: self.used] + self.count[: self.used]
        self.flying.append(self.state.step(self.used, int(tokens.max()) + len(self.flying)))
        if len(self.flying) > self.state.ahead:
            self.look()

    def look(self) -> None:
        """Note what the oldest step in flight has drawn; sequences that had ended before it leave it out."""
        drawn = self.flying.popleft().numpy()
        slots = np.flatnonzero(self.finish[: self.used] == LIVE)
        self.note(slots, drawn[:, slots])

    def note(self, slots: np.ndarray, drawn: np.ndarray) -> None:
        """Note the tokens drawn for some slots, [3, n] as in `Drawn`."""
        sampling.check(drawn[2])
        places = slots, self.count[slots]
        self.ids[places], self.logprobs[places], self.model_logprobs[places] = drawn
        self.count[slots] += 1
        self.finish[slots] = self.standing(slots)
        if self.on_token is not None:
            for slot, token in zip(slots, drawn[0], strict=True):
                self.on_token(int(self.prompt[slot]), int(self.number[slot]), int(token))

    def standing(self, slots: np.ndarray) -> np.ndarray:
        """For each of the slots LIVE, or why its answer ends with its newest token."""
        stops = np.isin(self.ids[slots, self.count[slots] - 1], self.stop_ids)
        if self.sampling.stop:
            answers = [self.ids[slot, : self.count[slot]] for slot in slots]
            stops |= np.array([says_stop(x, self.tokenizer, self.sampling.stop) for x in answers], bool)
        return np.where(stops, STOP, np.where(self.count[slots] == self.room[slots], LENGTH, LIVE))

    def sample(self, slot: int) -> Sample:
        """The answer of a slot whose sequence has ended."""
        count, finish = self.count[slot], FINISH[self.finish[slot]]
        ids = self.ids[slot, :count].copy()
        logprobs, model_logprobs = (x[slot, :count].copy() for x in (self.logprobs, self.model_logprobs))
        return Sample(ids, logprobs, model_logprobs, finish)

    def close_gaps(self, ended: list[int]) -> None:
        """Move the last sequences into these slots, so that those in use are the first."""
        for slot in reversed(ended):
            self.used = last = self.used - 1
            if slot < last:
                self.state.move(last, slot, self.length[last] + self.count[last] - 1)
                for array in (self.prompt, self.number, self.length, self.room, self.count, self.finish):
                    array[slot] = array[last]
                for array in (self.ids, self.logprobs, self.model_logprobs):
                    array[slot] = array[last]
        if ended:
            self.state.release(self.used)


# ---- all copies of the model --------------------------------------------------------------------------


class Queue:
    """Hands the prompts of one rollout to the copies of the model.

    Whoever is done early takes more (a counter in the job's store says what is taken), unless --deterministic
    fixes who gets which.
    """

    numbers = itertools.count()  # of the queues made so far, the same on every rank

    def __init__(self, total: int, generator: Generator):
        self.total, self.group = total, generator.group
        self.key = f"rollout/{next(Queue.numbers)}"
        self.replicas, self.leads = generator.replicas, generator.leads
        self.fixed = generator.fixed or generator.replicas == 1
        self.empty = False
        self.left = range(generator.replica, total, generator.replicas)

    def take(self, most: int) -> range:
        """The numbers of up to `most` prompts; none when all are taken. Collective over the copy's ranks."""
        if self.fixed:
            taken, self.left = self.left[:most], self.left[most:]
            return taken
        if self.empty:
            return range(0)
        claim = torch.zeros(2, dtype=torch.int64, device=parallel.device())
        if self.leads:
            store = dist.distributed_c10d._get_default_store()
            left = self.total - store.add(self.key, 0)
            count = max(1, min(most, math.ceil(left / self.replicas)))  # something is left for the others
            start = min(store.add(self.key, count) - count, self.total)
            claim = torch.tensor([start, min(start + count, self.total)], device=parallel.device())
        if self.group.size() > 1:
            dist.broadcast(claim, dist.get_global_rank(self.group, 0), group=self.group)
        taken = range(*claim.tolist())
        self.empty = not taken
        return taken


def gather(
    own: dict[tuple[int, int], Sample], num_prompts: int, samples_per_prompt: int
) -> list[list[Sample]]:
    """The answers of all ranks, by prompt, on every rank. Collective."""
    samples = {key: sample for part in parallel.gather(own) for key, sample in part.items()}
    return [[samples[i, k] for k in range(samples_per_prompt)] for i in range(num_prompts)]


def rollout_groups(tp: int) -> ProcessGroupCollection:
    """Process groups of a layout in which each `tp` neighbouring ranks hold a whole model. Collective."""
    ranks = range(dist.get_world_size())
    split, _ = dist.new_subgroups_by_enumeration([list(ranks[i : i + tp]) for i in ranks[::tp]])
    alike, _ = dist.new_subgroups_by_enumeration([list(ranks[i::tp]) for i in range(tp)])
    alone, _ = dist.new_subgroups_by_enumeration([[rank] for rank in ranks])
    groups = ProcessGroupCollection()
    groups.tp = groups.mp = split
    groups.dp = groups.dp_cp = groups.expt_dp = alike
    for name in ("pp", "cp", "embd", "pos_embd", "ep", "expt_tp", "tp_ep"):
        setattr(groups, name, alone)
    return groups


def copy_service() -> CopyService | str:
    """Copy service that moves weights from one layout to another."""
    if not torch.cuda.is_available():
        return "gloo"
    service = NCCLCopyService()
    # Its own stream would not wait for the parts that Megatron cuts out of the weights on the current one.
    service._copy_stream = torch.cuda.current_stream()
    return service
