"""Run by test_generate.py under torchrun: cases from a file, what each samples to another file."""

import json
import sys
from pathlib import Path

import numpy as np
from megatron.core import parallel_state as mpu

from align import architecture, generate, huggingface, model, parallel
from align.generate import RolloutConfig
from align.model import ModelConfig
from align.parallel import ParallelConfig
from align.sampling import SamplingConfig


class Letters:
    """A tokenizer in which every token is one character, and 2 ends an answer."""

    stop_ids = {2}

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(0x100 + i) for i in ids)


def run(case: dict) -> list:
    """What a case samples: for each prompt, for each answer [ids, logprobs, model_logprobs, finish]."""
    layout = ParallelConfig(**case.get("parallel", {}))
    mpu.destroy_model_parallel()
    parallel.make_grid(layout)
    config = ModelConfig(model=case["model"], precision=case.get("precision", "fp32"))
    arch = architecture.read_config(config.path)
    policy = model.build_policy(arch, config, layout)
    huggingface.load(policy, huggingface.open_source(config.path, arch, layout.seed))
    generator = generate.Generator(
        policy,
        RolloutConfig(**case.get("rollout", {})),
        SamplingConfig(**case["sampling"]),
        config,
        layout,
        Letters(),
    )
    prompts = [np.array(ids, np.int32) for ids in case["prompts"]]
    streams = [(0, i) for i in range(len(prompts))]
    for _ in range(case.get("rounds", 1)):
        found = generator.generate(prompts, streams, case.get("samples", 1))
    return [
        [(s.ids.tolist(), s.logprobs.tolist(), s.model_logprobs.tolist(), s.finish) for s in samples]
        for samples in found
    ]


if __name__ == "__main__":
    given, written = map(Path, sys.argv[1:])
    with parallel.start(ParallelConfig()):
        results = {name: run(case) for name, case in json.loads(given.read_text()).items()}
        if parallel.is_main():
            written.write_text(json.dumps(results))
