"""Sampling from a policy: many prompts, several answers to each, decoded together on the training weights.

`Generator` is made once per run and samples as often as asked. A sequence that ends makes room for the next
prompt at once. Each answer has random numbers of its own, which follow from the run's seed and from numbers
that the script gives with its prompt: but for rounding, what is decoded beside it, or where, has no effect.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.resharding.refit import CopyService, NCCLCopyService, swap_model_weights
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from align import model, offload, packing, parallel, sampling
from align.inference import InferenceModel, Prefix
from align.model import ModelConfig, Policy
from align.parallel import ParallelConfig
from align.sampling import SamplingConfig

READ_AHEAD = 4  # one part in so many of the slots is the least that is read at once, while prompts are left
PREFILL_TOKENS = 4096  # most tokens of prompts that are read in one pass, unless one alone has more

OnToken = Callable[[int, int, int], None]  # number of the prompt, of the answer to it, token


class Tokenizer(Protocol):
    """What this file needs of a tokenizer; `align.tokenizer` has two."""

    stop_ids: set[int]

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class RolloutConfig:
    """Where and how densely answers are sampled."""

    rollout_layout: Literal["same", "reshard"] | None = None
    """same: sample in the training layout; reshard: from copies of the weights, remade after each update, of
    which each --rollout-tp ranks hold one and decode prompts of their own (default where tp or pp > 1)"""
    rollout_tp: int = 1
    """reshard: tensor parallel size of the copy; with 1 every rank holds a whole model while it samples"""
    rollout_slots: int = 64
    """sequences that one copy of the model decodes at the same time; their keys and values take memory"""

    def __post_init__(self):
        for name in ("rollout_tp", "rollout_slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if self.rollout_layout == "same" and self.rollout_tp > 1:
            raise ValueError("--rollout-tp has no effect with --rollout-layout same: leave one of them out")

    def reshards(self, parallel: ParallelConfig) -> bool:
        """Are the weights copied to another layout?"""
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
        """What it says, without what ended it."""
        ids = self.ids.tolist()
        text = tokenizer.decode(ids[:-1] if ids[-1] in tokenizer.stop_ids else ids)
        ends = [text.index(end) for end in stop if end in text]
        return text[: min(ends)] if ends else text


class Request:
    """An answer in the making."""

    def __init__(self, prompt: int, number: int, length: int, uniforms: np.ndarray):
        self.prompt, self.number, self.length = prompt, number, length  # length: of the prompt
        self.uniforms = uniforms  # [most new tokens], one for each
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.model_logprobs: list[float] = []
        self.finish: str | None = None

    @property
    def position(self) -> int:
        """Where its newest token stands."""
        return self.length + len(self.ids) - 1

    def sample(self) -> Sample:
        """The answer, once it is finished."""
        ids = np.array(self.ids, np.int32)
        logprobs, model_logprobs = (np.array(x, np.float32) for x in (self.logprobs, self.model_logprobs))
        return Sample(ids, logprobs, model_logprobs, self.finish)


class Generator:
    """Samples from a policy in training, of which it holds a copy in another layout where that pays."""

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
        self.config, self.sampling, self.tokenizer = config, sampling_config, tokenizer
        self.seed, self.fixed = parallel_config.seed, parallel_config.deterministic
        self.copy = None
        if config.reshards(parallel_config):
            check_rollout_tp(config.rollout_tp, self.policy)
            self.copy = model.in_layout(self.policy, model_config, rollout_groups(config.rollout_tp))
            self.freed = offload.release(self.copy.parameters())
            self.copy_service = copy_service()
            tp = config.rollout_tp
            self.replica, self.replicas = dist.get_rank() // tp, dist.get_world_size() // tp
            self.group = self.copy.pg_collection.tp
        else:
            self.replica = mpu.get_data_parallel_rank(with_context_parallel=True)
            self.replicas = mpu.get_data_parallel_world_size(with_context_parallel=True)
            self.group = mpu.get_model_parallel_group()
        self.leads = self.group.rank() == 0

    def describe(self) -> str:
        """Where answers are sampled, for the log."""
        where = "the training layout" if self.copy is None else "a copy of the weights"
        split = f", tp {self.config.rollout_tp}" if self.copy else ""
        return (
            f"sampling in {where}{split}: {self.replicas} x {self.config.rollout_slots} sequences at a time"
        )

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
            on_token: called for each new token, on the ranks that sampled it.

        Raises:
            ValueError: a prompt is empty, or leaves no room for an answer in the model's context.
        """
        context = self.policy.arch.max_positions
        for prompt in prompts:
            check_prompt(prompt, context)
        if not prompts:
            return []
        if self.copy is not None:
            offload.restore(self.freed)
            swap_model_weights([self.policy], [self.copy], self.copy_service)
        slots = min(self.config.rollout_slots, len(prompts) * samples_per_prompt)
        engine = InferenceModel(self.copy or self.policy, slots)
        queue = Queue(len(prompts), self)
        batch = ContinuousBatch(engine, self, slots, on_token)
        mine = batch.run(queue, prompts, streams, samples_per_prompt)
        del engine, batch
        if self.copy is not None:
            self.freed = offload.release(self.copy.parameters())
            parallel.free_memory()
        return gather(mine if self.leads else {}, len(prompts), samples_per_prompt)


def check_rollout_tp(tp: int, policy: Policy) -> None:
    """Refuse a --rollout-tp that this model or the number of processes does not allow."""
    arch, world = policy.arch, dist.get_world_size()
    if world % tp:
        raise ValueError(f"--rollout-tp {tp} does not divide the {world} processes")
    if arch.heads % tp or arch.ffn_size % tp or (arch.kv_heads % tp and tp % arch.kv_heads):
        raise ValueError(
            f"--rollout-tp {tp} does not divide the model's {arch.heads} attention heads, {arch.kv_heads} "
            f"key-value heads and {arch.ffn_size} ffn columns"
        )


def check_prompt(prompt: np.ndarray, context: int) -> None:
    """Raises ValueError for a prompt that cannot be answered."""
    if len(prompt) == 0:
        raise ValueError("the prompt is empty: there must be a token to continue")
    if len(prompt) >= context:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, the model's context {context}: no room for an answer"
        )


# ---- one copy of the model ----------------------------------------------------------------------------


class ContinuousBatch:
    """The sequences that one copy of the model decodes, slot by slot; all ranks of the copy run it alike."""

    def __init__(self, engine: InferenceModel, generator: Generator, slots: int, on_token: OnToken | None):
        self.engine, self.slots, self.on_token = engine, slots, on_token
        self.sampling, self.tokenizer, self.seed = generator.sampling, generator.tokenizer, generator.seed
        self.context = generator.policy.arch.max_positions
        self.waiting: deque[tuple[Request, Prefix]] = deque()
        self.live: list[Request] = []  # by slot
        self.seen = None  # [slots, V], for the repetition penalty
        if self.sampling.repetition_penalty != 1.0:
            size = (slots, generator.policy.arch.vocab_size)
            self.seen = torch.zeros(size, dtype=torch.bool, device=engine.device)

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
            free = [slot for slot, request in enumerate(self.live) if request.finish]
            done |= {(r.prompt, r.number): r.sample() for r in self.live if r.finish}
            free += range(len(self.live), self.slots)
            while len(self.waiting) < len(free):
                # A few more than are needed now: to read prompts one by one takes twice the time.
                wanted = max(len(free) - len(self.waiting), self.slots // READ_AHEAD)
                numbers = queue.take(math.ceil(wanted / samples_per_prompt))
                if not numbers:
                    break
                self.read(numbers, prompts, streams, samples_per_prompt)
            taken = [(slot, *self.waiting.popleft()) for slot in free[: len(self.waiting)]]
            self.start(taken, prompts)
            if not taken:
                self.close_gaps()
            if not self.live:
                return done
            if all(request.finish is None for request in self.live):
                self.step()

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
            ids = [torch.from_numpy(prompts[i].astype(np.int64)).to(self.engine.device) for i in chosen]
            for i, prefix in zip(chosen, self.engine.prefill(ids), strict=True):
                room = min(self.sampling.max_new_tokens, self.context - len(prompts[i]))
                for number in range(samples_per_prompt):
                    uniforms = np.random.default_rng([self.seed, *streams[i], number]).random(room)
                    self.waiting.append((Request(i, number, len(prompts[i]), uniforms), prefix))

    def start(self, taken: list[tuple[int, Request, Prefix]], prompts: Sequence[np.ndarray]) -> None:
        """Put requests into slots and draw their first tokens."""
        if not taken:
            return
        for slot, request, prefix in taken:
            self.engine.place(prefix, slot)
            self.live[slot : slot + 1] = [request]
            if self.seen is not None:
                self.seen[slot] = False
                self.seen[slot, torch.from_numpy(prompts[request.prompt].astype(np.int64))] = True
        logits = None
        if not self.engine.stages.after:
            logits = torch.stack([prefix.logits for _, _, prefix in taken])
        self.draw(logits, [slot for slot, _, _ in taken])

    def step(self) -> None:
        """One more token for every sequence."""
        tokens = torch.tensor([request.ids[-1] for request in self.live], device=self.engine.device)
        positions = torch.tensor([request.position for request in self.live])
        self.draw(self.engine.decode(tokens, positions), list(range(len(self.live))))

    def draw(self, logits: Tensor | None, slots: list[int]) -> None:
        """Draw a token for the sequence in each of the slots, from logits [len(slots), V]."""
        requests, device = [self.live[slot] for slot in slots], self.engine.device
        drawn = torch.zeros(3, len(slots), dtype=torch.float64, device=device)
        if logits is not None:
            uniforms = torch.tensor([r.uniforms[len(r.ids)] for r in requests], dtype=torch.float64)
            seen = None if self.seen is None else self.seen[slots]
            drawn = torch.stack(
                [x.double() for x in sampling.pick(logits, uniforms.to(device), self.sampling, seen)]
            )
        self.engine.stages.from_last(drawn)
        for slot, request, token, *logprobs in zip(slots, requests, *drawn.tolist(), strict=True):
            request.ids.append(int(token))
            request.logprobs.append(logprobs[0])
            request.model_logprobs.append(logprobs[1])
            request.finish = self.finish(request)
            if self.seen is not None:
                self.seen[slot, int(token)] = True
            if self.on_token is not None:
                self.on_token(request.prompt, request.number, int(token))

    def finish(self, request: Request) -> str | None:
        """Why the answer ends with its newest token, or None."""
        if request.ids[-1] in self.tokenizer.stop_ids:
            return "stop"
        if self.sampling.stop:
            # a character has at most 4 tokens, those of its bytes
            tail = 4 * max(map(len, self.sampling.stop)) + 4
            text = self.tokenizer.decode(request.ids[-tail:])
            if any(end in text for end in self.sampling.stop):
                return "stop"
        return "length" if len(request.ids) == len(request.uniforms) else None

    def close_gaps(self) -> None:
        """Move the last sequences into the slots of finished ones, so that those in use are the first."""
        for slot in reversed(range(len(self.live))):
            if not self.live[slot].finish:
                continue
            last = self.live.pop()
            if slot < len(self.live):
                self.engine.move(len(self.live), slot, last.position)
                self.live[slot] = last
                if self.seen is not None:
                    self.seen[slot] = self.seen[len(self.live)]


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
    mine: dict[tuple[int, int], Sample], num_prompts: int, samples_per_prompt: int
) -> list[list[Sample]]:
    """The answers of all ranks, by prompt, on every rank. Collective."""
    everyone: list[dict | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = {key: sample for part in everyone for key, sample in part.items()}
    return [[found[i, k] for k in range(samples_per_prompt)] for i in range(num_prompts)]


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
    """What carries the weights from one layout to the other."""
    if not torch.cuda.is_available():
        return "gloo"
    service = NCCLCopyService()
    # Its own stream would not wait for the parts that Megatron cuts out of the weights on the current one.
    service._copy_stream = torch.cuda.current_stream()
    return service
