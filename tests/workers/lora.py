"""Run by test_lora.py on every rank: three steps with peft's adapters in one layout, and what they leave."""

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from align.distributed import parallel
from align.model import adapter_files, architecture, gpt, huggingface, lora
from align.model.config import ModelConfig
from align.model.lora import LoraConfig
from tools.conformance import worker
from tools.conformance.cases import Case
from tools.conformance.losses import SEED
from tools.conformance.rows import STEPS


def build(directory: Path, case: Case, adapter: Path) -> gpt.Decoder:
    """A model with the adapters of a directory; case "ranking": a reward model, with the head there."""
    start = architecture.read_config(directory)
    arch = replace(start, labels=int(case.algorithm == "ranking"))
    config = ModelConfig(model=str(directory), precision="fp32")
    adapters = adapter_files.read(LoraConfig(adapter=adapter), arch)
    source = huggingface.open_source(directory, start, SEED)
    if arch.labels:
        model = gpt.build_scorer(arch, config, case.layout, adapters=adapters)
        source = huggingface.FreshHead(source, arch, SEED)
    else:
        model = gpt.build_policy(arch, config, case.layout, adapters=adapters)
    huggingface.load(model, source)
    adapter_files.load(model, SEED)
    return model


def train(directory: Path, adapter: Path, case: Case, output: Path) -> dict:
    """Train from a directory's adapters; write them and the merged model."""
    with mock.patch.object(worker, "build", functools.partial(build, adapter=adapter)):
        training = worker.Training(directory, case, output / "unused")
    before = frozen(training)
    first = torch.from_numpy(np.concatenate(training.outputs(0)))
    steps = [training.step(step) for step in range(STEPS)]
    unmerged = torch.from_numpy(np.concatenate(training.outputs(0)))
    name = f"{directory.name}-{case.algorithm}"
    adapter_files.save(training.model.module, directory, output / "adapters" / name)
    huggingface.save(training.model.module, directory, output / "hf" / name)
    with lora.switched_off(training.model.module):
        base = torch.from_numpy(np.concatenate(training.outputs(0)))
    same_base = all(torch.equal(x, y) for x, y in zip(before, frozen(training), strict=True))
    return {"steps": steps, "first": first, "last": unmerged, "base": base, "same_base": same_base}


def frozen(training: worker.Training) -> list[torch.Tensor]:
    """Copies of this rank's frozen weights."""
    parameters = training.model.module.parameters()
    return [parameter.detach().clone() for parameter in parameters if not parameter.requires_grad]


def outputs_of_base(directory: Path, case: Case) -> dict[str, torch.Tensor]:
    """Outputs of a model without adapters, and of one with fresh adapters, whose B is 0."""
    results = {}
    for name, adapters in {"plain": 0, "fresh": 4}.items():
        with mock.patch.object(worker, "RandomAdapters", adapter_files.FreshAdapters):
            training = worker.Training(directory, replace(case, lora=adapters), Path("unused"))
        results[name] = torch.from_numpy(np.concatenate(training.outputs(0)))
    return results


def main(models: Path, adapters: Path, output: Path, flags: dict[str, int | bool]) -> None:
    """`adapters`: a directory FAMILY for sft and dpo, FAMILY-ranking for a reward model."""
    cases = {name: Case(name, lora=1, **flags) for name in ("sft", "dpo", "ranking")}
    results = {}
    with parallel.start(cases["sft"].layout):
        for path in sorted(adapters.iterdir()):
            family, _, kind = path.name.partition("-")
            for algorithm in [kind] if kind else ["sft", "dpo"]:
                case = replace(cases[algorithm], family=family)
                results[f"{family}-{algorithm}"] = train(models / family, path, case, output)
        results["outputs"] = outputs_of_base(models / "llama", cases["sft"])
        if parallel.is_main():
            torch.save(results, output / "results.pt")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), json.loads(sys.argv[4]))
