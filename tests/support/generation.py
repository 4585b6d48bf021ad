"""Prompts, settings and processes that sample, and what transformers answers."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

from align.generation.rollout import Sample
from tests.support.launch import fork_ranks
from tests.support.tokenizers import Letters
from tools.conformance.models import SIZES

NEW_TOKENS = 12
GREEDY = {"max_new_tokens": NEW_TOKENS, "greedy": True}
WARPED = {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2}
SAMPLED = {"max_new_tokens": NEW_TOKENS, **WARPED, "stop": [Letters().decode([i]) for i in range(40, 44)]}
SAMPLES = 3  # answers to a prompt in the cases that sample
# What log-probs may differ by in nats, on average and at one token. Those of transformers in fp32 are up to
# 1.6e-5 off those in fp64; in bf16 they are 0.037 and 0.49 off those in fp32 of the same weights.
FP32, BF16 = (5e-6, 4e-5), (0.08, 1.0)


def prompts(count: int = 64) -> list[list[int]]:
    """Random prompts of 1 to 40 tokens."""
    rng = np.random.default_rng(3)
    return [rng.integers(3, 131, rng.integers(1, 41)).tolist() for _ in range(count)]


def sample(tmp_path: Path, processes: int, cases: dict[str, dict]) -> dict[str, dict]:
    """Samples of the cases, all in one start of the processes."""
    cases_path, results_path = tmp_path / "cases.json", tmp_path / "found.json"
    cases_path.write_text(json.dumps(cases))
    fork_ranks(processes, "tests/workers/generator.py", cases_path, results_path, timeout_s=400)
    return json.loads(results_path.read_text())


def network(directory: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def transformers_greedy(
    policy: transformers.PreTrainedModel, prompts: list[list[int]], new_tokens: int, **options: float
) -> list[list[int]]:
    """Greedy answers by transformers, each prompt alone, up to the end token 2 or the context's end."""
    fixed = dict(do_sample=False, eos_token_id=2, pad_token_id=0)
    context, answers = SIZES["max_position_embeddings"], []
    for ids in prompts:
        room = min(new_tokens, context - len(ids))
        out = policy.generate(torch.tensor([ids]), max_new_tokens=room, **fixed, **options)
        answers.append(out[0, len(ids) :].tolist())
    return answers


def sample_of(ids: list[int]) -> Sample:
    zeros = np.zeros(len(ids), np.float32)
    return Sample(np.array(ids, np.int32), zeros, zeros, "length")
