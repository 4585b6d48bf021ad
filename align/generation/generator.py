"""Sampling from a policy: many prompts, several responses to each, decoded together on the training weights.

`Generator` is made once per run and samples as often as asked. Each response has random numbers of its own,
from the run's seed and a stream id that the script gives with its prompt: but for rounding, neither the
sequences decoded beside it nor the rank that decodes it have an effect.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch import nn

from align.data.tokenizer import Tokenizer
from align.distributed import parallel, watchdog
from align.distributed.parallel import ParallelConfig
from align.errors import UserError
from align.flags import COUNT, between, check_ranges, refuse_unused, whole
from align.generation import trtllm
from align.generation.continuous_batching import ContinuousBatch, OnToken
from align.generation.inference import NO_GPU, InferenceModel, why_no_graphs
from align.generation.reshard import Reshard
from align.generation.rollout import Sample, says_stop
from align.generation.sampling import SamplingConfig
from align.generation.slots import Slots
from align.generation.tape import Tape
from align.model import gpt
from align.model.architecture import Architecture
from align.model.config import ModelConfig
from align.model.gpt import Policy
from align.model.lora import Adapters
from align.training import offload


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
    rollout_tp_graphs: bool = False
    """on GPUs capture the decode steps of copies of several tensor parallel ranks as CUDA graphs, with NCCL's
    collectives in them. Never tried on hardware"""
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
        if self.generate_with == "trtllm":
            refuse_unused(self, RolloutConfig, "rollout_tp_graphs", "with --generate-with trtllm")
        if self.generate_with == "trtllm" and self.rollout_layout == "reshard":
            raise UserError(
                "--rollout-layout reshard has no effect with --generate-with trtllm, whose engines have "
                "--rollout-tp ranks each: leave it out"
            )
        if self.generate_with == "native" and self.rollout_layout == "same":
            refuse_unused(self, RolloutConfig, "rollout_tp", "with --rollout-layout same")

    def reshards(self, parallel: ParallelConfig) -> bool:
        """True if the weights are copied to another layout. Raises UserError for one that cannot sample."""
        if parallel.vp > 1 and self.rollout_layout == "same":
            raise UserError(
                "--rollout-layout same cannot sample from the stages of --vp: leave one of them out"
            )
        if self.rollout_layout is None:
            return parallel.tp > 1 or parallel.pp > 1 or self.rollout_tp > 1
        return self.rollout_layout == "reshard"


class Generator:
    """Sampler of a policy in training, with a copy of it in another layout where that pays.

    Many models have more rows in their output layer than their tokenizer has ids. A Generator restricts the
    policy's softmax to the tokenizer's ids, in sampling and in training alike: no other id is ever drawn, and
    log-probs, entropies and importance ratios are those of the distribution that is sampled from.
    """

    def __init__(
        self,
        policy: nn.Module,
        config: RolloutConfig,
        sampling_config: SamplingConfig,
        model_config: ModelConfig,
        parallel_config: ParallelConfig,
        tokenizer: Tokenizer,
        keep: bool = False,
        tape: Tape | None = None,
    ):
        """
        Args:
            keep: keep KV cache and CUDA graphs between calls, while the policy's weights stay in place.
            tape: samples to record, or to read in place of sampling.
        """
        self.keep, self.tape = keep, tape
        self.kept: Slots | None = None
        self.policy: Policy | gpt.Interleaved = unwrap_model(policy)
        sampling_config = replace(sampling_config, stop=(*sampling_config.stop, *tokenizer.stop_strings))
        self.config, self.sampling, self.tokenizer = config, sampling_config, tokenizer
        self.seed, self.fixed = parallel_config.seed, parallel_config.deterministic
        self.known_ids = min(self.policy.arch.vocab_size, tokenizer.vocab_size)
        for stage in gpt.stages(policy):
            stage.known_ids = self.known_ids
        self.copy: Policy | None = None
        self.engine: trtllm.Engine | None = None
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
                absent_ids=range(self.known_ids, self.policy.arch.vocab_size),
                group=self.group,
                slots=config.rollout_slots,
                keep=config.trtllm_keep,
                memory=config.trtllm_memory,
            )
        elif config.reshards(parallel_config):
            self.copy = gpt.in_layout(self.policy, model_config, groups)
            self.reshard = Reshard(self.policy, self.copy)
            self.freed = offload.release(self.copy.parameters())
        else:
            self.replica = mpu.get_data_parallel_rank(with_context_parallel=True)
            self.replicas = mpu.get_data_parallel_world_size(with_context_parallel=True)
            self.group = mpu.get_model_parallel_group()
        self.leads = self.group.rank() == 0

    def describe(self) -> str:
        """Layout of sampling, for the log."""
        sampler = "the training layout" if self.copy is None else "a copy of the weights"
        sampler = "TensorRT-LLM" if self.engine else sampler
        split = f", tp {self.config.rollout_tp}" if self.copy or self.engine else ""
        slots = f"{self.replicas} x {self.config.rollout_slots} sequences at a time"
        if not self.engine:
            reason = why_no_graphs(self.copy or self.policy, self.config.rollout_tp_graphs)
            slots += ", steps as CUDA graphs" if reason is None else ""
            silent = (None,) if self.config.rollout_tp_graphs else (None, NO_GPU)
            slots += "" if reason in silent else f", steps without CUDA graphs: {reason}"
        return f"sampling in {sampler}{split}: {slots}"

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[np.ndarray],
        streams: Sequence[tuple[int, ...]],
        samples_per_prompt: int = 1,
        on_token: OnToken | None = None,
    ) -> list[list[Sample]]:
        """Sample responses to prompts, in the order of the prompts, on every rank. Collective.

        Args:
            prompts: [n] token ids each, the same on every rank.
            streams: the stream id of each prompt, which seeds its random numbers beside the run's seed.
            on_token: called for each new token, on the ranks that sampled it; with an engine at the end.

        Raises:
            UserError: a prompt is empty, or leaves no room for a response in the model's context.
        """
        context = self.policy.arch.max_positions
        for prompt in prompts:
            check_prompt(prompt, context)
        if not prompts:
            return []
        samples = self.tape.play(streams, samples_per_prompt) if self.tape else None
        if samples is None:
            samples = self.sample(prompts, streams, samples_per_prompt, on_token)
        if self.tape:
            self.tape.note(streams, samples)
        return samples

    def sample(
        self,
        prompts: Sequence[np.ndarray],
        streams: Sequence[tuple[int, ...]],
        samples_per_prompt: int,
        on_token: OnToken | None,
    ) -> list[list[Sample]]:
        """`generate` for checked prompts, with the engine or the policy."""
        if self.engine:
            samples = self.by_engine(prompts, streams, samples_per_prompt, on_token)
            return gather(samples, len(prompts), samples_per_prompt)
        if self.copy is not None:
            offload.restore(self.freed)
            self.reshard.run()
        slots = min(self.config.rollout_slots, len(prompts) * samples_per_prompt)
        state = self.decoder(slots, max(map(len, prompts)))
        options = (self.sampling, self.tokenizer, self.seed, slots, on_token)
        batch = ContinuousBatch(state, *options, prompts, streams, samples_per_prompt)
        samples = batch.run(Queue(len(prompts), self).take)
        graphed = state.engine.graphed
        if self.keep and graphed and self.copy is None:
            self.kept, graphed = state, False
        del state, batch
        if self.copy is not None:
            self.freed = offload.release(self.copy.parameters())
        if self.copy is not None or graphed:  # graphs have memory of their own
            parallel.free_memory()
        return gather(samples if self.leads else {}, len(prompts), samples_per_prompt)

    def decoder(self, slots: int, prompt: int) -> Slots:
        """Decoding state for so many slots and prompts of that length, the last call's if it still fits."""
        policy, kept, self.kept = self.copy or self.policy, self.kept, None
        most = min(self.sampling.max_new_tokens, policy.arch.max_positions)
        longest = min(prompt + most, policy.arch.max_positions) + 1  # of an ended one, while it waits
        if kept is not None:
            fits = kept.slots >= slots and kept.engine.capacity >= longest
            if fits and kept.engine.follow(policy):
                kept.release(0)
                return kept
            slots, longest = max(slots, kept.slots), max(longest, kept.engine.capacity)
        del kept  # before its successor takes memory
        engine = InferenceModel(policy, slots, self.config.rollout_tp_graphs)
        if engine.graphed:
            engine.reserve_whole(longest)
        return Slots(engine, self.sampling, slots, most)

    def by_engine(
        self,
        prompts: Sequence[np.ndarray],
        streams: Sequence[tuple[int, ...]],
        samples_per_prompt: int,
        on_token: OnToken | None,
    ) -> dict[tuple[int, int], Sample]:
        """Sample with this rank's TensorRT-LLM engine, if the rank leads one. Collective."""
        assert self.engine is not None
        parallel.free_memory()  # the engine's processes need the memory that torch caches
        self.engine.refresh(self.policy)
        samples: dict[tuple[int, int], Sample] = {}
        if self.leads:
            numbers = range(self.replica, len(prompts), self.replicas)
            places = [(i, number) for i in numbers for number in range(samples_per_prompt)]
            seeds = [trtllm.seed(self.seed, streams[i], number) for i, number in places]
            watchdog.tick("generate")
            responses = self.engine.sample([prompts[i] for i, _ in places], seeds, self.ends)
            samples = {place: Sample(*fields) for place, fields in zip(places, responses, strict=True)}
        self.engine.rest()
        if on_token:
            for (i, number), sample in samples.items():
                for token in sample.ids.tolist():
                    on_token(i, number, token)
        return samples

    def ends(self, ids: list[int]) -> bool:
        """True if a response ends with its newest token."""
        return ids[-1] in self.tokenizer.stop_ids or says_stop(ids, self.tokenizer, self.sampling.stop)


def check_rollout(
    arch: Architecture,
    config: RolloutConfig,
    sampling_config: SamplingConfig,
    model_config: ModelConfig,
    parallel_config: ParallelConfig,
    adapters: Adapters | None = None,
) -> None:
    """Refuse a sampler that this model, machine or number of processes does not allow."""
    if config.generate_with == "trtllm" and adapters:
        raise UserError(
            "--generate-with trtllm: its engine has no adapters (--lora-rank, --adapter), and merging rounds "
            "them to bf16: leave it out"
        )
    if config.generate_with == "trtllm":
        trtllm.check_trtllm(sampling_config, model_config, parallel_config)
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
    """Refuse samplers without `Sample.model_logprobs`, for scripts whose audit compares them."""
    if config.generate_with == "trtllm" and sampling_config.temperature != 1:
        raise UserError(
            f"--generate-with trtllm with --temperature {sampling_config.temperature}: TensorRT-LLM returns "
            "log-probs at the sampling temperature only, and this script's audit needs the model's own: "
            "give 1"
        )


def warn_if_none_ended(responses: Sequence[Sample], max_new_tokens: int, say: Callable[[str], None]) -> None:
    """Log a warning if every response of a rollout is truncated: training would hardly learn from it."""
    if all(response.finish == "length" for response in responses):
        say(
            f"WARNING: none of the {len(responses):,} responses of the first rollout ended within "
            f"--max-new-tokens {max_new_tokens}: raise it, give the text that ends a response as --stop, or "
            "start from a model that was trained on responses with an end"
        )


def check_prompt(prompt: np.ndarray, context: int) -> None:
    """Raise UserError for an empty prompt, or one that fills the model's context."""
    if len(prompt) == 0:
        raise UserError("the prompt is empty: there must be a token to continue")
    if len(prompt) >= context:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, the model's context {context}: no room for a response"
        )


class Queue:
    """Prompts of one rollout, dealt to the copies of the model.

    A copy takes more whenever it has free slots, from a counter in the job's store; with --deterministic the
    shares are fixed.
    """

    numbers = itertools.count()  # a number for each queue, the same on every rank

    def __init__(self, total: int, generator: Generator):
        self.total, self.group = total, generator.group
        self.key = f"rollout/{next(Queue.numbers)}"
        self.replicas, self.leads = generator.replicas, generator.leads
        self.fixed = generator.fixed or generator.replicas == 1
        self.empty = False
        self.share = range(generator.replica, total, generator.replicas)  # with fixed shares: what is left

    def take(self, most: int) -> range:
        """The numbers of up to `most` prompts; none when all are taken. Collective over the copy's ranks."""
        if self.fixed:
            numbers, self.share = self.share[:most], self.share[most:]
            return numbers
        if self.empty:
            return range(0)
        claim = torch.zeros(2, dtype=torch.int64, device=parallel.device())
        if self.leads:
            store = dist.distributed_c10d._get_default_store()
            left = self.total - store.add(self.key, 0)
            count = max(1, min(most, math.ceil(left / self.replicas)))  # leaves a share for the other copies
            start = min(store.add(self.key, count) - count, self.total)
            claim = torch.tensor([start, min(start + count, self.total)], device=parallel.device())
        if self.group.size() > 1:
            dist.broadcast(claim, dist.get_global_rank(self.group, 0), group=self.group)
        numbers = range(*claim.tolist())
        self.empty = not numbers
        return numbers


def gather(
    own: dict[tuple[int, int], Sample], num_prompts: int, samples_per_prompt: int
) -> list[list[Sample]]:
    """The responses of all ranks, by prompt, on every rank. Collective."""
    samples = {key: sample for part in parallel.gather(own) for key, sample in part.items()}
    return [[samples[i, k] for k in range(samples_per_prompt)] for i in range(num_prompts)]


def rollout_groups(tp: int) -> ProcessGroupCollection:
    """Process groups of a layout in which each `tp` neighbouring ranks hold a whole model. Collective."""

    def own_group(lists: list[list[int]]) -> dist.ProcessGroup:
        return dist.new_subgroups_by_enumeration(lists, timeout=parallel.LONGEST_WAIT)[0]

    ranks = range(dist.get_world_size())
    tensor_groups = own_group([list(ranks[i : i + tp]) for i in ranks[::tp]])
    data_groups = own_group([list(ranks[i::tp]) for i in range(tp)])
    single_groups = own_group([[rank] for rank in ranks])
    groups = ProcessGroupCollection()
    groups.tp = groups.mp = tensor_groups
    groups.dp = groups.dp_cp = groups.expt_dp = data_groups
    for name in ("pp", "cp", "embd", "pos_embd", "ep", "expt_tp", "tp_ep"):
        setattr(groups, name, single_groups)
    return groups
