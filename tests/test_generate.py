"""Generation against transformers, in every layout; what a sample may depend on, and what not."""

import json

import numpy as np
import pytest
import torch
import transformers

from tests.conftest import torchrun

NEW_TOKENS = 12
LAYOUTS = {  # name: processes, training layout, rollout flags
    "one": (1, {}, {}),
    "one-few-slots": (1, {}, {"rollout_slots": 5}),
    "tp2-same": (2, {"tp": 2}, {"rollout_layout": "same", "rollout_slots": 16}),
    "tp2-reshard": (2, {"tp": 2}, {"rollout_slots": 16}),
    "pp2-same": (2, {"pp": 2}, {"rollout_layout": "same", "rollout_slots": 16}),
    "pp2-reshard": (2, {"pp": 2}, {"rollout_slots": 16}),
    "pp2-to-tp2": (2, {"pp": 2}, {"rollout_tp": 2, "rollout_slots": 16}),
    "dp2": (2, {}, {"rollout_slots": 16}),
    "dp2-fixed": (2, {"deterministic": True}, {"rollout_slots": 7}),
    "cp2": (2, {"cp": 2}, {}),
    "tp4-same": (4, {"tp": 4}, {"rollout_layout": "same"}),  # two ranks share a key-value head
    "tp2-pp2-same": (4, {"tp": 2, "pp": 2}, {"rollout_layout": "same"}),
    "tp2-pp2-reshard": (4, {"tp": 2, "pp": 2}, {}),
    "tp2-sp-dp2": (4, {"tp": 2, "sequence_parallel": True}, {"rollout_slots": 9}),
    "dp4-to-tp2": (4, {}, {"rollout_layout": "reshard", "rollout_tp": 2}),
}
FOUR = ("llama", "qwen2")  # families that are tried in the layouts of four processes, which take long


def prompts(count: int = 64) -> list[list[int]]:
    """Random prompts of 1 to 40 tokens."""
    rng = np.random.default_rng(3)
    return [rng.integers(3, 131, rng.integers(1, 41)).tolist() for _ in range(count)]


def sample(tmp_path, processes: int, cases: dict[str, dict]) -> dict[str, list]:
    """What the cases sample, all in one start of the processes."""
    given, written = tmp_path / "cases.json", tmp_path / "found.json"
    given.write_text(json.dumps(cases))
    torchrun(processes, "tests/generate_worker.py", given, written, timeout_s=150)
    return json.loads(written.read_text())


def transformers_greedy(directory, given: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy answers by transformers, each prompt alone, up to the end token 2."""
    network = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    answers = []
    for ids in given:
        out = network.generate(
            torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        answers.append(out[0, len(ids) :].tolist())
    return answers


@pytest.fixture(scope="module")
def greedy(models) -> dict[str, list[list[int]]]:
    """transformers' greedy answers of each family."""
    return {name: transformers_greedy(models / name, prompts(), NEW_TOKENS) for name in families(1)}


def families(processes: int) -> tuple[str, ...]:
    return FOUR if processes == 4 else ("llama", "llama3", "qwen2", "qwen3", "mistral")


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_greedy_tokens_are_those_of_transformers(processes, greedy, models, tmp_path):
    """64 prompts of mixed lengths in every layout; some answers end early, some at the limit."""
    cases = {
        f"{family} {name}": {
            "model": str(models / family),
            "parallel": layout,
            "rollout": rollout,
            "sampling": {"max_new_tokens": NEW_TOKENS, "greedy": True},
            "prompts": prompts(),
            "rounds": 2 if name == "tp2-reshard" else 1,  # the copy is freed and filled again
        }
        for name, (count, layout, rollout) in LAYOUTS.items()
        for family in families(processes)
        if count == processes
    }
    for name, found in sample(tmp_path, processes, cases).items():
        expected = greedy[name.split()[0]]
        assert [ids for [(ids, _, _, _)] in found] == expected, name
        finishes = ["stop" if ids[-1] == 2 else "length" for ids in expected]
        assert [finish for [(_, _, _, finish)] in found] == finishes, name
    assert {"stop", "length"} == set(finishes)
