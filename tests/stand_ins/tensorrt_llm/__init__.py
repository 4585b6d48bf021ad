"""A stand-in for TensorRT-LLM on a CPU: it takes what release 1.2 takes, refuses the rest, and is slow.

The names are those of NVIDIA/TensorRT-LLM, read in these places; nothing of its code is here.

    LLM(...), generate, unknown names refused
        tensorrt_llm/llmapi/llm.py, BaseLLM [a]
    further arguments of LLM, KvCacheConfig, CudaGraphConfig
        tensorrt_llm/llmapi/llm_args.py, BaseLlmArgs, TorchLlmArgs [a];
        tests/unittest/api_stability/references/llm.yaml, ea35fd67
    ray_worker_extension_cls, NCCL beside other engines
        tensorrt_llm/_torch/async_llm.py, AsyncLLM [a]
    SamplingParams, how it is checked
        tensorrt_llm/sampling_params.py [a]
    CompletionOutput, stop words left out of it
        tensorrt_llm/executor/result.py [a]
    TRTLLMSampler tells the drawn token's log-prob, TorchSampler the likeliest's, with one seed for all
        tensorrt_llm/_torch/pyexecutor/sampler.py, 00026bd1
    an end_id is left out of the answer; log-probs are before filters; top_k up to 1024
        cpp/tensorrt_llm/kernels/samplingTopKKernels.cu, 03961722
    a seed for each request
        cpp/tensorrt_llm/layers/samplingLayer.cpp, 03961722
    update_weights(handles), then update_weights(None); a worker looks for the UUID of its GPU
        tensorrt_llm/llmapi/rlhf_utils.py, WorkerExtension, 04762f3b
    sleep, wakeup, enable_sleep; their tags
        tensorrt_llm/executor/ray_gpu_worker.py, RayGPUWorker, 0acd798d;
        tensorrt_llm/_torch/virtual_memory.py, ExecutorMemoryType
    TLLM_RAY_FORCE_LOCAL_CLUSTER; workers inherit the environment of their driver
        tensorrt_llm/executor/ray_executor.py, RayExecutor, 0777969c

[a] as printed in the documentation of release 1.2.1, 1.2.1/_modules of branch gh-pages, 58fb435e. The other
files have been read at the commits named, of the months around release 1.2: what 1.2.1 itself holds there may
differ. An engine that works so is volcengine/verl, verl/workers/rollout/trtllm_rollout, 075abdbe.

What the real one does with weights, transformers does here: an oracle that shares nothing with our model.
"""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from tensorrt_llm.llmapi import CudaGraphConfig, KvCacheConfig, checked

OPTIONS = {  # of LLM: those that are used, with their types
    "model": str,
    "load_format": str,
    "dtype": str,
    "skip_tokenizer_init": bool,
    "tensor_parallel_size": int,
    "orchestrator_type": str,
    "ray_worker_extension_cls": str,
    "enable_sleep": bool,
    "sampler_type": str,
    "allreduce_strategy": str,
    "max_batch_size": int,
    "max_seq_len": int,
    "enable_chunked_prefill": bool,
    "cuda_graph_config": CudaGraphConfig,
    "kv_cache_config": KvCacheConfig,
}
VALUES = {
    "load_format": {"auto", "dummy"},
    "dtype": {"auto", "bfloat16", "float16", "float32"},
    "orchestrator_type": {"ray", "rpc"},
    "sampler_type": {"auto", "TorchSampler", "TRTLLMSampler"},
    "allreduce_strategy": {"AUTO", "NCCL"},
    "ray_worker_extension_cls": {"tensorrt_llm.llmapi.rlhf_utils.WorkerExtension"},
}
TAGS = {
    *("sampler", "drafter", "guided_decoder", "spec_resource_manager", "model_extra", "executor_extra"),
    *("kv_cache", "model", "draft_model"),
}
STARTED_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID")


@dataclass
class SamplingParams:
    """Sampling parameters of one request."""

    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    bad_token_ids: list[int] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    n: int = 1
    best_of: int | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        checked(self)
        for name in ("min_p", "repetition_penalty", "stop"):
            assert getattr(self, name) is None, f"what {name} does with this sampler was not found out"
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise OverflowError("seed: uint64")
        if self.top_k is not None and not 0 <= self.top_k <= 1024:
            raise ValueError(f"top_k={self.top_k}")


@dataclass(frozen=True)
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class LLM:
    """An engine; `log` holds what it was asked, `weights` what it was given."""

    def __init__(self, **options: Any):
        for name, value in options.items():
            if name not in OPTIONS:
                raise ValueError(f"LLM got invalid argument: {name}")
            if type(value) is not OPTIONS[name]:
                raise TypeError(f"LLM: {name} is {value!r}, not of type {OPTIONS[name].__name__}")
            if name in VALUES and value not in VALUES[name]:
                raise ValueError(f"LLM: {name} is {value!r}")
        left = [name for name in STARTED_BY_TORCHRUN if name in os.environ]
        assert not left, f"the workers would inherit {left}"
        assert os.environ["TLLM_RAY_FORCE_LOCAL_CLUSTER"] == os.environ["TLLM_DISABLE_MPI"] == "1"
        self.options, self.log = options, []
        self.workers = [f"GPU-{number}" for number in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        assert len(self.workers) == options["tensor_parallel_size"]
        config = transformers.AutoConfig.from_pretrained(options["model"], local_files_only=True)
        dtype = getattr(torch, options["dtype"])
        self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.expected = dict(self.model.named_parameters())  # without lm_head where it is tied
        self.weights: dict[str, torch.Tensor] = {}
        self.asleep: set[str] = set()
        self.whole = False
        self.used = self.stale = False  # blocks of keys and values: are there any, of older weights?

    # ---- what the workers do ----

    def _collective_rpc(self, method: str, args: tuple = (), kwargs: dict | None = None) -> list[None]:
        """Run a method of the workers."""
        if method not in ("update_weights", "sleep", "wakeup", "reset_prefix_cache"):
            raise AttributeError(f"The RayGPUWorker has no method called '{method}'.")
        self.log.append(method if method != "update_weights" or args[0] else "finish")
        getattr(self, f"_{method}")(*args, **(kwargs or {}))
        return [None] * len(self.workers)

    def _update_weights(self, handles: dict[str, list] | None = None) -> None:
        assert self.options.get("ray_worker_extension_cls"), "only the extension has update_weights"
        assert not self.asleep & {"model", "model_extra"}, "the memory of the weights is released"
        if handles is None:
            missing = self.expected.keys() - self.weights.keys()
            assert not missing, f"{sorted(missing)[0]} the first of {len(missing)} that never came"
            self.model.load_state_dict(self.weights, strict=False)
            self.whole, self.stale = True, self.used and self.options["kv_cache_config"].enable_block_reuse
            return
        if self.whole:  # the first of another set
            self.whole, self.weights = False, {}
        for worker in self.workers:
            if worker not in handles:
                raise ValueError(f"Device UUID {worker} not found in ipc_handles")
            for name, (function, arguments) in handles[worker]:
                # the real one writes the number of its GPU over arguments[6], which a CPU tensor's has not
                tensor = function(*arguments)
                assert name in self.expected, f"the model has no {name}"
                assert tensor.shape == self.expected[name].shape and tensor.is_contiguous(), name
                first = self.weights.setdefault(name, tensor.clone())
                assert torch.equal(first, tensor), f"two workers were given different {name}"

    def _reset_prefix_cache(self) -> None:
        self.used = self.stale = False

    def _sleep(self, tags: list[str]) -> None:
        self._check_tags(tags)
        assert not self.asleep & set(tags), "asleep already"
        self.asleep |= set(tags)

    def _wakeup(self, tags: list[str]) -> None:
        self._check_tags(tags)
        assert self.asleep >= set(tags), "not asleep"
        self.asleep -= set(tags)

    def _check_tags(self, tags: list[str]) -> None:
        if not self.options.get("enable_sleep"):
            raise ValueError("Sleep feature is not enabled")
        if unknown := set(tags) - TAGS:
            raise ValueError(f"Unknown memory tag {unknown}")

    # ---- sampling ----

    def generate(
        self,
        inputs: list[list[int]],
        sampling_params: list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """An answer to each of the prompts."""
        assert not self.asleep and self.whole, "asleep, or the weights are not complete"
        assert not self.stale, "blocks in the cache are of older weights: reset_prefix_cache was not called"
        self.log.append("generate")
        self.used = True
        assert all(type(token) is int for prompt in inputs for token in prompt)
        return [
            RequestOutput(prompt, [self._answer(prompt, params)])
            for prompt, params in zip(inputs, sampling_params, strict=True)
        ]

    @torch.no_grad()
    def _answer(self, prompt: list[int], params: SamplingParams) -> CompletionOutput:
        if params.end_id is None and self.options["skip_tokenizer_init"]:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        random, output = torch.Generator().manual_seed(params.seed % 2**63), CompletionOutput(0)
        while output.finish_reason is None:
            ids = torch.tensor([prompt + output.token_ids])
            logits = self.model(ids).logits[0, -1].float() / params.temperature
            logits[params.bad_token_ids or []] = float("-inf")  # that log-probs are of the rest is assumed
            token = self._draw(logits, params, random)
            if token == params.end_id:
                output.finish_reason = "stop"
                break
            output.token_ids.append(token)
            output.logprobs.append({token: Logprob(logits.log_softmax(-1)[token].item(), 1)})
            full = len(prompt) + len(output.token_ids) == self.options["max_seq_len"]
            if token in params.stop_token_ids:
                output.finish_reason = "stop"
                if not params.include_stop_str_in_output:
                    output.token_ids.pop()
            elif full or len(output.token_ids) == params.max_tokens:
                output.finish_reason = "length"
        return output

    def _draw(self, logits: torch.Tensor, params: SamplingParams, random: torch.Generator) -> int:
        probs = logits.softmax(-1)
        if params.top_k:
            probs[probs < probs.topk(params.top_k).values[-1]] = 0
            probs /= probs.sum()
        order = probs.sort(descending=True)
        kept = order.values.cumsum(-1) - order.values < params.top_p
        return int(order.indices[torch.multinomial(order.values * kept, 1, generator=random)])
