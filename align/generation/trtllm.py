"""TensorRT-LLM as a sampling backend: its engine samples with the present training weights.

Untested on hardware: written against the published sources of release 1.2, and run against a stand-in only
(tests/stand_ins/tensorrt_llm, which names the source of each definition).

Each --rollout-tp neighbouring ranks share an engine, which the first of them drives. It starts its workers
through Ray, one on the GPU of each rank: only with Ray can release 1.2 load weights from another process.
Before a rollout the ranks gather the weights as whole Hugging Face tensors, bucket by bucket, and pass each
worker CUDA IPC handles of the tensors on its GPU; the worker reads its own shard.

- Random numbers: the seed of a response follows from the run's seed and its stream id. The tokens differ from
  those of native sampling, and a resumed run may have others: the rounding depends on the sequences decoded
  beside a response.
- Log-probs: the engine returns those under softmax(logits / temperature), before filters. Without filters
  they are the sampling log-probs, at temperature 1 the model's own. Others are NaN, which no audit accepts.
  Training computes the log-probs it needs itself.
- The engine's reuse of prompts is off, so its cache has nothing of older weights.
"""

import contextlib
import importlib.util
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from align.distributed.parallel import ParallelConfig
from align.errors import UserError
from align.generation.sampling import SamplingConfig
from align.model import huggingface
from align.model.architecture import read_config
from align.model.config import ModelConfig
from align.model.gpt import Policy

BUCKET_BYTES = 1024**3  # of weights copied on a GPU while the engine loads them
UNKNOWN_FAMILIES = ("stablelm",)  # implemented here and not in the engine
PLAIN_ROPE = {"rope_theta", "partial_rotary_factor"}  # fields that transformers 4 reads beside rope_scaling
MOST_TOP_K = 1024  # of the engine's kernel
WEIGHTS = [  # the engine's names of its memory without keys and values
    *("sampler", "drafter", "guided_decoder", "spec_resource_manager"),
    *("model_extra", "executor_extra", "model", "draft_model"),
]
CACHE = ["kv_cache"]
OF_TORCHRUN = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")

Ends = Callable[[list[int]], bool]  # True if a response ends with the newest of these tokens
Response = tuple[np.ndarray, np.ndarray, np.ndarray, Literal["stop", "length"]]  # fields of rollout.Sample


def check_trtllm(
    sampling: SamplingConfig, model_config: ModelConfig, parallel_config: ParallelConfig
) -> None:
    """Refuse flags and models that the engine does not support, before anything is built."""
    flag = "--generate-with trtllm"
    if not torch.cuda.is_available() or importlib.util.find_spec("tensorrt_llm") is None:
        raise UserError(f"{flag} needs a GPU and the package tensorrt_llm: see requirements-trtllm.txt")
    if model_config.dtype != torch.bfloat16:
        raise UserError(f"{flag} samples in bf16 only: --precision {model_config.precision} is not offered")
    if parallel_config.deterministic:
        raise UserError(f"{flag} cannot promise the same tokens again: leave out --deterministic")
    config = json.loads((model_config.path / "config.json").read_bytes())
    if config.get("model_type") in UNKNOWN_FAMILIES:
        raise UserError(f"{flag} does not know the model_type {config['model_type']}: leave it out")
    if overlooked := PLAIN_ROPE & set(config.get("rope_parameters") or {}) - set(config):
        raise UserError(
            f"{flag} reads --model {model_config.model} with transformers 4, which would overlook the "
            f"rope_parameters of its config.json: give it {', '.join(sorted(overlooked))} and rope_scaling "
            "beside them"
        )
    if config.get("tie_word_embeddings") and not read_config(model_config.path).tied_embeddings:
        raise UserError(
            f"{flag} follows the tie_word_embeddings of --model {model_config.model}, whose weights have an "
            "lm_head of their own: set it to false in config.json"
        )
    for name in ("min_p", "repetition_penalty"):
        if getattr(sampling, name) != getattr(SamplingConfig, name):
            raise UserError(f"{flag} does not do --{name.replace('_', '-')} {getattr(sampling, name)}")
    if sampling.top_k > MOST_TOP_K:
        raise UserError(f"{flag} does --top-k up to {MOST_TOP_K}, not {sampling.top_k}")


def seed(run_seed: int, stream: tuple[int, ...], number: int) -> int:
    """Seed of a response, in [0, 2^63)."""
    return int(np.random.default_rng([run_seed, *stream, number]).integers(2**63))


class Engine:
    """An engine and the ranks that load its weights. It starts at the first `refresh`."""

    def __init__(
        self,
        model: Path,
        sampling: SamplingConfig,
        stop_ids: set[int],
        absent_ids: Sequence[int],
        group: dist.ProcessGroup,
        slots: int,
        keep: bool,
        memory: float,
    ):
        """
        Args:
            model: directory of the config.json; its weights are not read.
            absent_ids: rows of the output layer without a token, which are never drawn.
            group: the ranks whose GPUs the engine shares.
            slots: sequences decoded at a time.
            keep: keep its memory on the GPUs between rollouts.
            memory: share of the free GPU memory at its start for the KV cache.
        """
        self.model, self.sampling, self.group = model, sampling, group
        self.stop_ids, self.absent_ids = sorted(stop_ids), list(absent_ids)
        self.slots, self.keep, self.memory = slots, keep, memory
        self.leads = group.rank() == 0
        self.started = self.resting = False
        self.llm: Any = None  # on the leading rank a tensorrt_llm.LLM
        self.context = 0

    @torch.no_grad()
    def refresh(self, policy: Policy) -> None:
        """Load the policy's present weights. Collective over the group and the policy's ranks."""
        if not self.started:
            self.start(policy)
        if self.resting:
            self.call("wakeup", WEIGHTS)
        for bucket in buckets(huggingface.whole_tensors(policy), BUCKET_BYTES):
            self.send(bucket)
        self.call("update_weights", None)  # None: end of the weights
        if self.resting:  # the KV cache last, since the buckets need room
            self.call("wakeup", CACHE)
        self.resting = False

    def rest(self) -> None:
        """Free the GPUs' memory until the next `refresh`, unless it is kept. Collective."""
        if not self.keep:
            self.call("sleep", WEIGHTS + CACHE)
            dist.barrier(group=self.group)  # before any rank uses that memory
            self.resting = True

    def start(self, policy: Policy) -> None:
        """Start the engine with dummy weights. Collective over the group."""
        places: list[Any] = [None] * self.group.size()
        dist.all_gather_object(places, (socket.gethostname(), gpu()), group=self.group)
        if len({host for host, _ in places}) > 1:
            raise UserError(
                f"--rollout-tp {len(places)} with --generate-with trtllm needs so many GPUs on each node"
            )
        self.context = policy.arch.max_positions
        if self.leads:
            with environment([number for _, number in places]):
                self.llm = self.make(str(policy.config.params_dtype).removeprefix("torch."))
        self.started = True

    def make(self, dtype: str) -> Any:
        """Build the engine, with a Ray cluster of its own."""
        from tensorrt_llm import LLM  # here: its import is slow and needs a GPU
        from tensorrt_llm.llmapi import CudaGraphConfig, KvCacheConfig

        return LLM(
            model=str(self.model),
            load_format="dummy",
            dtype=dtype,
            skip_tokenizer_init=True,
            tensor_parallel_size=self.group.size(),
            orchestrator_type="ray",
            ray_worker_extension_cls="tensorrt_llm.llmapi.rlhf_utils.WorkerExtension",  # has update_weights
            enable_sleep=not self.keep,
            sampler_type="TRTLLMSampler",  # TorchSampler has one seed for all, and the likeliest's log-probs
            allreduce_strategy="NCCL",  # as in its AsyncLLM: others may fail beside a second engine
            max_batch_size=self.slots,
            max_seq_len=self.context,
            enable_chunked_prefill=True,  # otherwise max_num_tokens bounds prompts
            cuda_graph_config=CudaGraphConfig(enable_padding=True, max_batch_size=self.slots),
            kv_cache_config=KvCacheConfig(enable_block_reuse=False, free_gpu_memory_fraction=self.memory),
        )

    def call(self, method: str, argument: Any) -> None:
        """Call a method of all workers and wait for it; called by all ranks."""
        if self.leads:
            self.llm._collective_rpc(method, args=(argument,))

    def send(self, bucket: list[tuple[str, Tensor]]) -> None:
        """Pass tensors that all ranks of the group have on their GPUs to the workers. Collective."""
        handles = {device_key(): [(name, reduce_tensor(tensor)) for name, tensor in bucket]}
        by_rank: list[Any] = [None] * self.group.size()
        dist.all_gather_object(by_rank, handles, group=self.group)
        self.call("update_weights", {key: value for of_rank in by_rank for key, value in of_rank.items()})
        dist.barrier(group=self.group)  # the tensors must exist until here
        torch.cuda.ipc_collect()

    def sample(self, prompts: Sequence[np.ndarray], seeds: Sequence[int], ends: Ends) -> list[Response]:
        """Sample a response to each prompt; on the leading rank only.

        Args:
            prompts: [n] token ids each.
            seeds: of each response.
        """
        from tensorrt_llm import SamplingParams

        rooms = [min(self.sampling.max_new_tokens, self.context - len(prompt)) for prompt in prompts]
        params = [
            SamplingParams(**self.options(), max_tokens=room, seed=number)
            for room, number in zip(rooms, seeds, strict=True)
        ]
        results = self.llm.generate([prompt.tolist() for prompt in prompts], params, use_tqdm=False)
        return [
            self.response(result.outputs[0], room, ends) for result, room in zip(results, rooms, strict=True)
        ]

    def options(self) -> dict[str, Any]:
        """Sampling parameters in the engine's names."""
        return dict(
            temperature=self.sampling.temperature,
            top_k=1 if self.sampling.greedy else self.sampling.top_k,
            top_p=self.sampling.top_p,
            end_id=-1,  # none, for its sampler drops an end_id
            stop_token_ids=self.stop_ids,
            bad_token_ids=self.absent_ids or None,
            include_stop_str_in_output=True,  # keeps stop tokens, too
            logprobs=1,
            detokenize=False,
        )

    def response(self, output: Any, room: int, ends: Ends) -> Response:
        """Convert a `CompletionOutput` of the engine, cut where a stop string is complete.

        Raises:
            RuntimeError: a token has no log-prob, or the response ends for an unknown reason.
        """
        ids, entries = list(output.token_ids), list(output.logprobs)
        if len(entries) != len(ids) or any(i not in entry for i, entry in zip(ids, entries, strict=True)):
            raise RuntimeError("TensorRT-LLM did not return the log-prob of each token that it drew")
        lengths = range(1, len(ids) + 1) if self.sampling.stop else [len(ids)] if ids else []
        length = next((n for n in lengths if ends(ids[:n])), None)
        if length is None and len(ids) != room:
            reason = f"{len(ids)} of {room} tokens: {output.finish_reason}"
            raise RuntimeError(f"TensorRT-LLM ended a response without a token that ends one, after {reason}")
        values = [entry[i].logprob for i, entry in zip(ids, entries, strict=True)]
        drawn, config = np.array(values[:length], np.float32), self.sampling
        unknown = np.full_like(drawn, np.nan)
        logprobs = unknown if config.top_k or config.top_p < 1 else drawn
        logprobs = np.zeros_like(drawn) if config.greedy else logprobs
        model_logprobs = drawn if config.temperature == 1 else unknown
        return np.array(ids[:length], np.int32), logprobs, model_logprobs, "stop" if length else "length"


def buckets(tensors: Iterator[tuple[str, Tensor]], most: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Copy named tensors, in lists of up to `most` bytes, or of one tensor.

    Copies, since a parameter's memory could not be freed while a worker has it open.
    """
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > most:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor.detach().clone(memory_format=torch.contiguous_format)))
        size += tensor.nbytes
    if bucket:
        yield bucket


def device_key() -> str:
    """Key of the handles for the worker on this rank's GPU."""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def gpu() -> str:
    """Number of this rank's GPU on its node, as in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    number = visible.split(",")[torch.cuda.current_device()] if visible else str(torch.cuda.current_device())
    if not number.isdecimal():
        raise UserError(f"CUDA_VISIBLE_DEVICES {visible}: --generate-with trtllm needs numbers there")
    return number


@contextlib.contextmanager
def environment(gpus: Sequence[str]) -> Iterator[None]:
    """Restrict processes started inside the block to these GPUs, without torchrun's variables.

    With these variables the workers would connect to torchrun's store and deadlock.
    """
    ours = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith(OF_TORCHRUN)}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    os.environ["TLLM_RAY_FORCE_LOCAL_CLUSTER"] = "1"  # engines of a node must not share workers
    os.environ["TLLM_DISABLE_MPI"] = "1"  # its import would start MPI
    try:
        yield
    finally:  # the engine's own variables stay
        os.environ.update(ours)
        if visible is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
