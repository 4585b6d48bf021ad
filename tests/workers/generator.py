"""Run by test_generator.py on every rank: cases from a file, what each samples to another file."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from align.distributed import parallel
from align.distributed.parallel import ParallelConfig
from align.generation import continuous_batching, generator, inference
from align.generation.generator import RolloutConfig
from align.generation.sampling import SamplingConfig
from align.model import adapter_files, architecture, gpt, huggingface
from align.model.config import ModelConfig
from align.model.lora import LoraConfig
from tests.support import grids
from tests.support.tokenizers import Letters
from tools.conformance.worker import RandomAdapters

PREFILL_TOKENS = continuous_batching.PREFILL_TOKENS


class Recorder(inference.InferenceModel):
    """The inference model, which notes the lengths of the prompts of each pass."""

    passes: list[list[int]] = []

    def prefill(self, prompts: list[Tensor]) -> list[inference.PrefilledPrompt]:
        Recorder.passes.append([len(prompt) for prompt in prompts])
        return super().prefill(prompts)


@torch.no_grad()
def change(module: nn.Module) -> None:
    """Change each weight in place by a function of its value alone, in any layout the same."""
    for parameter in module.parameters():
        parameter.add_(torch.sin(50 * parameter), alpha=0.02)


def build(case: dict) -> generator.Generator:
    """The generator of a case, in its layout."""
    layout = ParallelConfig(**case.get("parallel", {}))
    grids.change(layout)
    torch.use_deterministic_algorithms(layout.deterministic)
    config = ModelConfig(model=case["model"], precision=case.get("precision", "fp32"))
    arch = architecture.read_config(config.path)
    rollout, sampling = RolloutConfig(**case.get("rollout", {})), SamplingConfig(**case["sampling"])
    generator.check_rollout(arch, rollout, sampling, config, layout)
    adapters = LoraConfig(lora_rank=case.get("lora", 0)).of_model(arch)
    policy = gpt.build_policy(arch, config, layout, adapters=adapters)
    huggingface.load(policy, huggingface.open_source(config.path, arch, layout.seed))
    if adapters:
        adapter_files.fill(policy, RandomAdapters(arch, adapters, layout.seed))
    letters = Letters(case.get("vocab_size", arch.vocab_size))
    return generator.Generator(policy, rollout, sampling, config, layout, letters, case.get("keep", False))


def run(case: dict) -> dict:
    """Sample a case; returns the responses, and how they were sampled.

    answers: for each prompt, for each answer [ids, logprobs, model_logprobs, finish].
    passes: the lengths of the prompts that this rank read in each pass.
    tokens: for each rank, for each prompt the tokens that it sampled.
    described: the layout of sampling, as the log names it.
    copy_bytes: for each rank the memory of the copy of the weights afterwards, None without a copy.
    """
    sampler, rounds = build(case), case.get("rounds", 1)
    continuous_batching.PREFILL_TOKENS = case.get("prefill_tokens", PREFILL_TOKENS)
    prompts = [np.array(ids, np.int32) for ids in case["prompts"]]
    streams = case.get("streams", [(0, i) for i in range(len(prompts))])
    for number in range(rounds):
        if number and case.get("change"):
            change(sampler.policy)
        if number and case.get("move"):
            for parameter in sampler.policy.parameters():
                parameter.data = parameter.data.clone()
        Recorder.passes, tokens = [], Counter()
        groups = sampler.generate(
            prompts, streams, case.get("samples", 1), lambda prompt, *_, count=tokens: count.update([prompt])
        )
    copied = sampler.copy and sum(x.untyped_storage().nbytes() for x in sampler.copy.parameters())
    return {
        "answers": [
            [(s.ids.tolist(), s.logprobs.tolist(), s.model_logprobs.tolist(), s.finish) for s in samples]
            for samples in groups
        ],
        "passes": Recorder.passes,
        "described": sampler.describe(),
        "tokens": by_rank([tokens[i] for i in range(len(prompts))]),
        "copy_bytes": by_rank(copied),
    }


def by_rank(item: object) -> list:
    """The items of all ranks. Collective."""
    items: list = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def attempt(case: dict) -> dict:
    """`run`, or {"errors"}: for each rank the message with which it refuses the case."""
    try:
        return run(case)
    except ValueError as error:
        return {"errors": by_rank(str(error))}


if __name__ == "__main__":
    cases_path, results_path = map(Path, sys.argv[1:])
    generator.InferenceModel = Recorder
    with parallel.start(ParallelConfig()):
        results = {name: attempt(case) for name, case in json.loads(cases_path.read_text()).items()}
        if parallel.is_main():
            results_path.write_text(json.dumps(results))
