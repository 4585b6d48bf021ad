"""Greedy answers of models with adapters, in every layout, against peft."""

import peft
import pytest
import torch

from align.distributed.parallel import ParallelConfig
from align.model import architecture
from align.model.lora import LoraConfig
from tests.support.generation import GREEDY, NEW_TOKENS, network, prompts, sample, transformers_greedy
from tools.conformance.worker import RandomAdapters

pytestmark = pytest.mark.slow

FAMILIES = {  # by processes
    1: ("llama", "qwen3", "stablelm", "nemotron"),
    2: ("llama", "nemotron"),
    4: ("stablelm",),
}
COUNT = 8  # prompts
LAYOUTS = {  # of processes: training layout, rollout flags
    1: {"one": ({}, {})},
    2: {
        "same": ({"tp": 2}, {"rollout_layout": "same"}),
        "reshard": ({"tp": 2}, {}),
        "pp2-to-tp2": ({"pp": 2}, {"rollout_tp": 2}),
        "vp2-reshard": ({"pp": 2, "vp": 2}, {}),
    },
    4: {
        "same": ({"tp": 4}, {"rollout_layout": "same"}),  # two ranks share a key-value head
        "tp2-to-tp4": ({"tp": 2, "pp": 2}, {"rollout_tp": 4}),
    },
}
RANK = 4


@pytest.fixture(scope="module")
def expected(models) -> dict[str, tuple[list[list[int]], list[list[int]]]]:
    """peft's greedy answers of each family, with and without its adapters."""
    answers = {}
    for name in FAMILIES[1]:
        arch = architecture.read_config(models / name)
        adapters = LoraConfig(lora_rank=RANK).of_model(arch)
        fields = dict(r=RANK, lora_alpha=2 * RANK, target_modules=list(adapters.targets))
        model = peft.get_peft_model(network(models / name), peft.LoraConfig(**fields))
        source = RandomAdapters(arch, adapters, ParallelConfig().seed)
        peft.set_peft_model_state_dict(model, {key: source.read(key) for key in source.shapes})
        answer = lambda m=model: transformers_greedy(m.base_model.model, prompts(COUNT), NEW_TOKENS)  # noqa: E731
        with torch.no_grad():
            adapted = answer()
            with model.disable_adapter():
                answers[name] = adapted, answer()
    return answers


@pytest.mark.parametrize("processes", LAYOUTS)
def test_answers_are_pefts(processes, models, expected, tmp_path):
    cases = {
        f"{family} {name}": {
            "model": str(models / family),
            "prompts": prompts(COUNT),
            "sampling": GREEDY,
            "parallel": layout,
            "rollout": rollout,
            "lora": RANK,
        }
        for family in FAMILIES[processes]
        for name, (layout, rollout) in LAYOUTS[processes].items()
    }
    for name, result in sample(tmp_path, processes, cases).items():
        answers = [ids for [(ids, *_)] in result["answers"]]
        adapted, base = expected[name.split()[0]]
        assert answers == adapted, name
        assert sum(ids != other for ids, other in zip(answers, base, strict=True)) > COUNT // 2
