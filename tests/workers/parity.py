"""Run by test_parity.py on every rank: what we compute for each family in one layout, to a file.

Of language models logits, of reward models values, of both the steps of training and an export before them.
"""

import json
import sys
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from align.data import packing
from align.distributed import parallel
from align.model import architecture, gpt, huggingface
from align.model.config import ModelConfig
from align.training import batching, engine
from tools.conformance.cases import Case
from tools.conformance.rows import STEPS, data_set
from tools.conformance.worker import build, train

FRESH = ("llama", "llama_tied")  # language models that are given a head


class Logits(gpt.Policy):
    """The policy, but its last stage returns all logits, [T, padded V]."""

    def _postprocess(self, hidden_states, **rest):
        out = GPTModel._postprocess(self, hidden_states, **{**rest, "labels": None})
        return gather_from_tensor_model_parallel_region(out)[0] if self.post_process else out


def logits(directory: Path, layout: parallel.ParallelConfig) -> torch.Tensor:
    """Logits [T, V] of the first rows in one pack."""
    arch = architecture.read_config(directory)
    policy = Logits(arch, ModelConfig(precision="fp32", attention="torch"), layout)
    huggingface.load(policy, huggingface.open_source(directory, arch, 0))
    batch = packing.collate(data_set("sft", 0).rows, batching.alignment(policy))
    return engine.outputs(policy, [batch], lambda _, out: out)[0][: sum(batch.lengths), : arch.vocab_size]


def values(scorer: gpt.Scorer) -> list[torch.Tensor]:
    """Values [n, 1] at the n tokens of each side of the first pairs, which share the places of the prompt."""
    batch = packing.collate(data_set("ranking", 0).rows, batching.alignment(scorer))
    packed = engine.outputs(scorer, [batch], lambda _, out: out)[0]
    own = packed[: sum(batch.lengths)].split(batch.lengths)
    return [torch.cat([packed[a : a + n], rest]) for (a, n), rest in zip(batch.prefixes, own, strict=True)]


def main(models: Path, reward_models: Path, output: Path, flags: dict[str, int | bool]) -> None:
    """`models` and `reward_models` have a directory of the same name for each family."""
    cases = {name: Case(name, **flags) for name in ("sft", "dpo", "ranking")}
    results = {}
    with parallel.start(cases["sft"].layout):
        for directory in sorted(models.iterdir()):
            name, reward_model = directory.name, reward_models / directory.name
            huggingface.save(build(directory, cases["sft"]), directory, output / "lm" / name)
            scorer = build(reward_model, cases["ranking"])
            huggingface.save(scorer, reward_model, output / "rm" / name)
            outputs = {"logits": logits(directory, cases["sft"].layout), "values": values(scorer)}
            for algorithm, case in cases.items():
                start_from = reward_model if algorithm == "ranking" else directory
                outputs[algorithm] = train(start_from, case, output / f"{name}.safetensors")[:STEPS]
            results[name] = outputs
        for name in FRESH:
            huggingface.save(build(models / name, cases["ranking"]), models / name, output / "fresh" / name)
        if parallel.is_main():
            torch.save(results, output / "results.pt")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), json.loads(sys.argv[4]))
