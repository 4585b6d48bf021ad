"""One step of train_ppo.py or train_grpo.py against slow loops: each token has its own response's numbers.

As a script this file is its own worker: it writes down what the step samples, what the models say, and
what the updates are given. The tests compute rewards and advantages from the first two, token by token, and
look for them in the micro-batches.
"""

import importlib
import json
import math
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from align import command_line
from align.data.packing import Batch
from align.data.tokenizer import Tokenizer, load_tokenizer
from align.distributed import parallel
from align.generation.rollout import Rollout
from align.training.minibatches import Minibatches
from tests.support.launch import fork_ranks
from tests.support.rewards import reward

pytestmark = pytest.mark.slow

KL_COEF, GAMMA, LAMBDA, PENALTY = 0.07, 0.97, 0.9, 0.25
KINDS = {
    "gae": f"train_ppo --gamma {GAMMA} --gae-lambda {LAMBDA} --truncated penalise "
    f"--truncated-penalty {PENALTY} --samples-per-prompt 3 --ppo-epochs 3",
    "plain": "train_ppo --no-whiten-advantages --samples-per-prompt 1 --offload on",
    "reinforce": f"train_grpo --advantages reinforce --gamma {GAMMA} --samples-per-prompt 3",
    "rloo": "train_grpo --advantages rloo --truncated keep --samples-per-prompt 3 --offload on",
    "grpo": "train_grpo --advantages grpo --truncated keep --samples-per-prompt 3",
}
PROMPTS = 6

# ---- worker --------------------------------------------------------------------------------------


def recorded(script: str, flags: list[str], tokenizer: Tokenizer) -> dict:
    """Record of a step: its responses, the numbers of each model, the updates' inputs."""
    record: dict = {"said": []}
    module = importlib.import_module(script)
    outputs, micro_batches = Minibatches.outputs, Minibatches.micro_batches
    generator = mock.Mock(wraps=module.Generator)

    def note_rollout(*args: object) -> object:
        result = Rollout(*args)
        record["answers"] = [
            {
                "ids": sample.ids.tolist(),
                "ended": sample.finish == "stop",
                "score": reward(tokenizer.decode(prompt.ids.tolist()), sample.text(tokenizer), prompt.row),
            }
            for prompt, samples in zip(result.prompts, result.samples, strict=True)
            for sample in samples
        ]
        return result

    def note_said(*args: object) -> object:
        values = outputs(*args)
        if len(record["said"]) == 1:  # the reference, which is the policy in a first step
            values[:, 0] += 0.3 * torch.arange(len(values)).sin()
        record["said"].append(values[:, 0].tolist())
        return values

    def note_batches(*arguments: object, **tokens: torch.Tensor) -> list:
        result = micro_batches(*arguments, **tokens)
        record["batches"] = [[sequences(batch) for batch in batches] for batches in result]
        return result

    with (
        mock.patch.object(module, "Generator", generator),
        mock.patch.object(module, "Rollout", note_rollout),
        mock.patch.object(Minibatches, "outputs", note_said),
        mock.patch.object(Minibatches, "micro_batches", note_batches),
    ):
        module.main(command_line.parse(module.Config, flags))
    record["keep"] = generator.call_args.kwargs["keep"]
    return record


def sequences(batch: Batch) -> list[dict]:
    """Trained targets of each sequence of a micro-batch, and the tensors beside them."""
    ends, first, parts = np.cumsum([0, *batch.lengths]).tolist(), 0, []
    for start, end in zip(ends, ends[1:], strict=False):
        targets = batch.targets[start:end][batch.mask[start:end].bool()].tolist()
        here = slice(first, first + len(targets))
        parts.append({"targets": targets, **{k: x[here].tolist() for k, x in batch.extra.items()}})
        first += len(targets)
    return parts


# ---- slow loops ----------------------------------------------------------------------------------


def expected(kind: str, record: dict) -> list[dict[str, list[float]]]:
    """Expected numbers of each token of each response."""
    critic = kind in ("gae", "plain")
    old, ref, *rest = record["said"]
    values = rest[0] if critic else [0.0] * len(old)
    result, place = [], 0
    for answer in record["answers"]:
        own = range(place, place + len(answer["ids"]))
        place += len(own)
        score = answer["score"]
        if kind == "gae" and not answer["ended"]:
            score -= PENALTY
        in_reward = 0.0 if kind == "grpo" else KL_COEF
        rewards = [-in_reward * (old[t] - ref[t]) + (score if t == own[-1] else 0.0) for t in own]
        result.append(
            {
                "targets": answer["ids"],
                "old": [old[t] for t in own],
                "ref": [ref[t] for t in own],
                "values": [values[t] for t in own],
                "rewards": rewards,
                "counted": [1.0 if answer["ended"] or kind not in ("plain", "reinforce") else 0.0] * len(own),
            }
        )
    for answer in result:
        answer["advantages"] = advantages(kind, answer)
    if kind in ("gae", "reinforce"):
        every = [a for answer in result for a in answer["advantages"]]
        mean = math.fsum(every) / len(every)
        std = math.sqrt(math.fsum((a - mean) ** 2 for a in every) / len(every) + 1e-8)
        for answer in result:
            answer["advantages"] = [(a - mean) / std for a in answer["advantages"]]
    if kind in ("rloo", "grpo"):
        for i, answer in enumerate(result):
            group = [sum(other["rewards"]) for other in result[i // 3 * 3 : i // 3 * 3 + 3]]
            own = sum(answer["rewards"])
            if kind == "rloo":
                one = own - (sum(group) - own) / 2
            else:
                one = (own - np.mean(group)) / (np.std(group, ddof=1) + 1e-4)
            answer["advantages"] = [one] * len(answer["targets"])
    return result


def advantages(kind: str, answer: dict[str, list[float]]) -> list[float]:
    """A_t = sum_l (gamma lambda)^l (R_{t+l} + gamma V_{t+l+1} - V_{t+l}), written out."""
    gamma, gae_lambda = {"gae": (GAMMA, LAMBDA), "plain": (1.0, 0.95)}.get(kind, (GAMMA, 1.0))
    rewards, values = answer["rewards"], [*answer["values"], 0.0]
    errors = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(len(rewards))]
    return [
        sum((gamma * gae_lambda) ** (later - t) * errors[later] for later in range(t, len(errors)))
        for t in range(len(errors))
    ]


# ---- tests ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(toy_models, tmp_path_factory) -> dict[str, list[dict]]:
    """By kind what each of two data parallel ranks saw."""
    folder = tmp_path_factory.mktemp("step")
    fork_ranks(2, "tests/scripts/test_ppo_step.py", toy_models, folder)
    return {
        kind: [json.loads((folder / f"{kind}{rank}.json").read_text()) for rank in range(2)] for kind in KINDS
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_has_its_own_numbers(kind, steps):
    """In each epoch every answer is in one micro-batch of one rank, with the numbers that slow loops give.

    The updates of the first epoch take the answers in their order, those of the others are drawn anew.
    """
    ranks = steps[kind]
    wanted = expected(kind, ranks[0])
    assert {answer["ended"] for answer in ranks[0]["answers"]} == {True, False}
    per_update, epochs = len(wanted) // 2, 3 if kind == "gae" else 1
    assert {len(rank["batches"]) for rank in ranks} == {2 * epochs}
    extra = {"old", "ref", "advantages", "counted"} | (
        {"values", "returns"} if kind in ("gae", "plain") else {"response", "weights"}
    )
    assert {frozenset(one) for batch in ranks[0]["batches"][0] for one in batch} == {
        frozenset(extra | {"targets"})
    }
    drawn = []  # of each epoch the answers of its first update
    for epoch in range(epochs):
        left = dict(enumerate(wanted))
        for number in (2 * epoch, 2 * epoch + 1):
            trained = [one for rank in ranks for batch in rank["batches"][number] for one in batch]
            assert len(trained) == per_update
            places = [take(left, one) for one in trained]
            drawn += [set(places)] if number == 2 * epoch else []
        assert not left
    assert drawn[0] == set(range(per_update))
    assert all(drawn[i] != drawn[k] for i in range(epochs) for k in range(i))


def take(left: dict[int, dict], sequence: dict) -> int:
    """Remove the answer that a sequence is, and has the numbers of; returns its place in the rollout."""
    place = next(
        i
        for i, one in left.items()
        if one["targets"] == sequence["targets"] and one["old"] == sequence["old"]
    )
    answer = left.pop(place)
    for name in sequence.keys() & {"ref", "values", "counted"}:
        assert sequence[name] == answer[name], name
    if "weights" in sequence:  # --aggregate token
        assert sequence["weights"] == answer["counted"] and set(sequence["response"]) == {place}
    assert sequence["advantages"] == pytest.approx(answer["advantages"], rel=1e-9, abs=1e-9)
    return place


def test_a_sampler_keeps_its_memory_unless_models_are_offloaded(steps):
    for kind, records in steps.items():
        assert [record["keep"] for record in records] == ["--offload on" not in KINDS[kind]] * 2


def test_ranks_agree_on_what_was_said(steps):
    for first, second in steps.values():
        assert first["answers"] == second["answers"] and first["said"] == second["said"]


if __name__ == "__main__":
    trained, output = map(Path, sys.argv[1:])
    with parallel.start(parallel.ParallelConfig()):
        for name, (script, more) in ((kind, flags.split(" ", 1)) for kind, flags in KINDS.items()):
            answers = 3 * PROMPTS if "per-prompt 3" in more else PROMPTS
            command = (
                f"--model {trained}/sft/hf --train-data {trained}/data/train.jsonl --output {output}/{name} "
                f"--prompts-per-step {PROMPTS} --global-batch-size {answers // 2} --max-prompt-len 48 "
                f"--max-new-tokens 8 --max-steps 1 --kl-coef {KL_COEF} --micro-batch-tokens 64 "
                f"--reward-fn tests.support.rewards:reward --save-interval 0 {more}"
            )
            result = recorded(script, command.split(), load_tokenizer(trained / "sft/hf"))
            (output / f"{name}{dist.get_rank()}.json").write_text(json.dumps(result))
