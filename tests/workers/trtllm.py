"""Run by test_trtllm.py: cases from a file, what TensorRT-LLM's stand-in got and drew to another file."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from safetensors.torch import load_file

from align.distributed import parallel
from align.distributed.parallel import ParallelConfig
from align.generation import generator, trtllm
from align.generation.generator import RolloutConfig
from align.generation.sampling import SamplingConfig
from align.model import architecture, gpt, huggingface
from align.model.config import ModelConfig
from tests.support import stand_ins
from tests.support.tokenizers import Letters

stand_ins.install("tensorrt_llm")
LETTERS = Letters(stop_ids=range(2, 12))


def ends(ids: list[int], stop: tuple[str, ...]) -> bool:
    """The rule of align/generation/generator.py in other words."""
    return ids[-1] in LETTERS.stop_ids or any(LETTERS.decode(ids).endswith(text) for text in stop)


def wrong_weights(got: dict[str, torch.Tensor], directory: Path, factor: float) -> list[str]:
    """Names of tensors that are not, bit for bit, those of a directory times `factor`."""
    want = load_file(directory / "model.safetensors")
    names = got.keys() ^ want.keys() - ({"lm_head.weight"} if "lm_head.weight" not in got else set())
    return sorted(names) + [
        name for name in got.keys() & want.keys() if not got[name].equal(want[name] * factor)
    ]


def run(case: dict) -> dict:
    """Inputs and outputs of a case's engines in three rollouts; the weights are halved before the third.

    answers: for each rollout, for each prompt [ids, logprobs, model_logprobs, finish].
    native: for each prompt, what native sampling draws before the weights change, where that was asked for.
    wrong, log: for each engine and rollout wrong tensors; what the engine was asked in all.
    """
    layout = ParallelConfig(**case["parallel"])
    mpu.destroy_model_parallel()
    parallel.make_grid(layout)
    config, sampling = ModelConfig(model=case["model"], precision="fp32"), SamplingConfig(**case["sampling"])
    arch = architecture.read_config(config.path)
    policy = gpt.build_policy(arch, config, layout)
    huggingface.load(policy, huggingface.open_source(config.path, arch, layout.seed))
    prompts, tp = [np.array(ids, np.int32) for ids in case["prompts"]], case["rollout_tp"]
    results = {"answers": [], "wrong": [], "native": None}
    if case.get("native"):
        native = generator.Generator(policy, RolloutConfig(), sampling, config, layout, LETTERS)
        samples = native.generate(prompts, [(0, i) for i in range(len(prompts))])
        results["native"] = [plain((s.ids, s.logprobs, s.model_logprobs, s.finish)) for [s] in samples]
        by_engine = RolloutConfig(
            generate_with="trtllm", rollout_tp=tp, rollout_slots=4, trtllm_keep=case["keep"]
        )
        through, told = generator.Generator(policy, by_engine, sampling, config, layout, LETTERS), []
        streams = [(0, i) for i in range(len(prompts))]
        samples = through.generate(prompts, streams, on_token=lambda *token: told.append(token))
        results["generator"] = [plain((s.ids, s.logprobs, s.model_logprobs, s.finish)) for [s] in samples]
        results["described"], results["told"] = through.describe(), sum(by_rank(told), [])
    group = generator.rollout_groups(tp).tp
    engine = trtllm.Engine(config.path, sampling, LETTERS.stop_ids, (), group, 4, case["keep"], 0.5)
    replica, replicas = dist.get_rank() // tp, dist.get_world_size() // tp
    for factor in (1.0, 1.0, 0.5):
        if factor != 1:
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.mul_(factor)
        engine.refresh(policy)
        own_answers = {}
        if engine.leads:
            numbers = range(replica, len(prompts), replicas)
            seeds = [trtllm.seed(7, (0, i), 0) for i in numbers]
            answers_of_engine = engine.sample(
                [prompts[i] for i in numbers], seeds, lambda ids: ends(ids, sampling.stop)
            )
            own_answers = {i: plain(answer) for i, answer in zip(numbers, answers_of_engine, strict=True)}
        engine.rest()
        every = by_rank(own_answers)
        results["answers"].append([next(part[i] for part in every if i in part) for i in range(len(prompts))])
        wrong = wrong_weights(engine.llm.weights, config.path, factor) if engine.leads else None
        results["wrong"].append([names for names in by_rank(wrong) if names is not None])
    results["log"] = [log for log in by_rank(engine.llm.log if engine.leads else None) if log is not None]
    return results


def plain(answer: trtllm.Response) -> list:
    return [part if isinstance(part, str) else part.tolist() for part in answer]


def by_rank(item: object) -> list:
    """The items of all ranks. Collective."""
    items: list = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


if __name__ == "__main__":
    cases_path, results_path = map(Path, sys.argv[1:])
    trtllm.BUCKET_BYTES = 40_000
    trtllm.gpu = lambda: str(3 + dist.get_rank())  # as if the GPUs of the node were numbered from 3
    trtllm.device_key = lambda: f"GPU-{3 + dist.get_rank()}"
    torch.cuda.ipc_collect = lambda: None
    with parallel.start(ParallelConfig()):
        results = {name: run(case) for name, case in json.loads(cases_path.read_text()).items()}
        if parallel.is_main():
            results_path.write_text(json.dumps(results))
