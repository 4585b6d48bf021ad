"""Whole steps of train_self_reward.py against slow loops: each pair has its own tokens and numbers.

As a script this file is its own worker: it writes down what is sampled, which pairs are mixed, and what
the updates are given and find. The tests make the pairs again, out of the samples and of the scores and
winners in samples.jsonl, ask transformers what the reference says, and compute the line of the log.
"""

import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from statistics import mean, pvariance
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
import tyro

import train_self_reward
from align.data.packing import Batch
from align.data.tokenizer import Tokenizer, load_tokenizer
from align.distributed import parallel
from align.generation import generator
from align.training import engine
from tests.support.files import read_jsonl
from tests.support.launch import fork_ranks

pytestmark = pytest.mark.slow

KNOWN_IDS = 259  # of the tokenizer; the model has 264 rows
PROMPTS, STEPS, FRACTION, BETA, SCALE, SFT_WEIGHT = 12, 2, 0.25, 0.2, 0.7, 0.3
TWO = "--samples-per-prompt 2 --seed 3"  # with this seed some prompts give no pair in each step
KINDS = {  # two answers are often tied; four so seldom that pairs of judgements take the last ones' places
    "dpo": f"--loss dpo --sft-weight {SFT_WEIGHT} --sft-average-logprobs True {TWO}",
    "scale": f"--loss scale --reward-scale {SCALE} --samples-per-prompt 4",
    "rpo_bwd_kl": f"--loss rpo_bwd_kl --reward-scale {SCALE} --average-logprobs {TWO}",
}
SCORE = re.compile(
    r"[^S]* Score: ([0-5])"
)  # the form that the toy judge was taught; it says other things, too
WINNER = re.compile(r"[^W]* Winner: Judgement ([AB])")

# ---- worker --------------------------------------------------------------------------------------


def recorded(flags: list[str], tokenizer: Tokenizer) -> dict:
    """Record of a run: prompts and samples, the pairs of each step, and the updates' inputs."""
    record: dict = {"rollouts": [], "mixed": [], "updates": []}
    sample, mix, update = generator.Generator.generate, train_self_reward.mix, engine.forward_backward

    def note_samples(self: generator.Generator, prompts: list, streams: list, number: int) -> list:
        groups = sample(self, prompts, streams, number)
        record["rollouts"] += [
            {
                "stream": stream,
                "prompt": prompt.tolist(),
                "ids": [one.ids.tolist() for one in samples],
                "ended": [one.finish == "stop" for one in samples],
                "texts": [one.text(tokenizer) for one in samples],
            }
            for prompt, stream, samples in zip(prompts, streams, groups, strict=True)
        ]
        return groups

    def note_mixed(*args: object) -> list:
        pairs = mix(*args)
        record["mixed"].append(
            [[pair.ids.tolist(), *(one.ids.tolist() for one in pair.samples)] for pair in pairs]
        )
        return pairs

    def note_update(model: object, batches: list[Batch], loss_fn: engine.LossFn, denominator: float) -> dict:
        logprobs_of_batches = []

        def noting(batch: Batch, logprobs: torch.Tensor) -> tuple:
            logprobs_of_batches.append(logprobs.detach()[batch.mask.bool()])
            return loss_fn(batch, logprobs)

        metrics = update(model, batches, noting, denominator)
        record["updates"].append([pairs_of(*both) for both in zip(batches, logprobs_of_batches, strict=True)])
        return metrics

    with (
        mock.patch.object(generator.Generator, "generate", note_samples),
        mock.patch.object(train_self_reward, "mix", note_mixed),
        mock.patch.object(engine, "forward_backward", note_update),
    ):
        train_self_reward.main(
            tyro.cli(train_self_reward.Config, args=flags, config=(tyro.conf.OmitArgPrefixes,))
        )
    return record


def pairs_of(batch: Batch, policy: torch.Tensor) -> list[dict]:
    """The pairs of a micro-batch: of both sequences what is trained and where it stands, and the gap."""
    ends, first, sides = np.cumsum([0, *batch.lengths]).tolist(), 0, []
    for start, end in zip(ends, ends[1:], strict=False):
        trained = batch.mask[start:end].bool()
        here = slice(first, first + int(trained.sum()))
        sides.append(
            {
                "targets": batch.targets[start:end][trained].tolist(),
                "positions": batch.positions[start:end][trained].tolist(),
                "ref": batch.extra["ref"][here].tolist(),
                "policy": policy[here].tolist(),
            }
        )
        first = here.stop
    gaps = batch.extra["gap"].tolist()
    assert first == len(policy) == len(batch.extra["ref"]) and len(sides) == 2 * len(gaps)
    return [{"sides": sides[2 * i : 2 * i + 2], "gap": gap} for i, gap in enumerate(gaps)]


# ---- slow loops ----------------------------------------------------------------------------------


class RunRecord:
    """Results of a run of one kind: the record of each rank, the tables of samples, and the log."""

    def __init__(self, folder: Path, kind: str):
        self.kind = kind
        self.ranks = [json.loads((folder / f"{kind}{rank}.json").read_text()) for rank in range(2)]
        self.samples = read_jsonl(folder / kind / "samples.jsonl")
        self.log = [row for row in read_jsonl(folder / kind / "metrics.jsonl") if row["step"] > 0]

    def rollouts(self, step: int, purpose: int) -> list[dict]:
        """Answers (0), judgements (1) or verdicts (2) of a step, as rank 0 saw them."""
        return [
            one
            for one in self.ranks[0]["rollouts"]
            if (one["stream"][1], one["stream"][3]) == (step, purpose)
        ]

    def table(self, step: int, name: str) -> list[dict]:
        """The rows of a table that a step wrote."""
        return [row for row in self.samples if (row["step"], row["table"]) == (step + 1, name)]

    def scores(self, step: int) -> dict[tuple[int, int], list[float | None]]:
        """By row of the data and number of the answer what its judgements say."""
        table, scores = iter(self.table(step, "train_judgements")), {}
        for one in self.rollouts(step, 1):
            row, k = one["stream"][2], one["stream"][4]
            rows = [next(table) for _ in one["texts"]]
            assert [(each["row"], each["answer"], each["judgement"]) for each in rows] == [
                (row, k, text) for text in one["texts"]
            ]
            scores[row, k] = [each["score"] for each in rows]
        assert not list(table)
        rows = self.table(step, "train_judgements")
        check_read(SCORE, [row["judgement"] for row in rows], [row["score"] for row in rows], float)
        return scores

    def winners(self, step: int) -> dict[int, dict[int, str | None]]:
        """By row of the data and 2 a + b who won, of the judgements a, shown as A, and b, shown as B."""
        verdicts, table = self.rollouts(step, 2), self.table(step, "train_comparisons")
        assert [one["texts"] for one in verdicts] == [[row["verdict"]] for row in table]
        check_read(WINNER, [row["verdict"] for row in table], [row["winner"] for row in table], str)
        winners: dict[int, dict[int, str | None]] = {}
        for one, row in zip(verdicts, table, strict=True):
            winners.setdefault(one["stream"][2], {})[one["stream"][4]] = row["winner"]
        return winners


def check_read(taught: re.Pattern, texts: list[str], values: list, kind: type) -> None:
    """Assert that the right value was read from texts in the taught form, which are most."""
    matches = [(taught.fullmatch(text), value) for text, value in zip(texts, values, strict=True)]
    read = [(kind(match[1]), value) for match, value in matches if match]
    assert len(read) > len(texts) / 2 and all(value_read == value for value_read, value in read), read


def good_pairs(run: RunRecord, step: int) -> list[dict]:
    """The responses with the highest and the lowest mean score to each prompt, if they differ."""
    scores, pairs = run.scores(step), []
    for one in run.rollouts(step, 0):
        row = one["stream"][2]
        valid = {
            k: scores_of_answer
            for k, ended in enumerate(one["ended"])
            if ended and (scores_of_answer := [score for score in scores[row, k] if score is not None])
        }
        means = {k: mean(scores_of_answer) for k, scores_of_answer in valid.items()}
        if len(means) < 2 or max(means.values()) == min(means.values()):
            continue
        best, worst = (
            min((pvariance(valid[k]), k) for k in valid if means[k] == end(means.values()))[1]
            for end in (max, min)
        )
        if one["ids"][best] != one["ids"][worst]:
            both = [one["ids"][best], one["ids"][worst]]
            pairs.append({"ids": [one["prompt"], *both], "gap": means[best] - means[worst]})
    return pairs


def judgement_pairs(run: RunRecord, step: int) -> list[dict]:
    """The two judgements of the response with the most different ones, by prompt, if both orders agree."""
    scores, pairs = run.scores(step), []
    judged = {(one["stream"][2], one["stream"][4]): one for one in run.rollouts(step, 1)}
    for row, winners in run.winners(step).items():
        spread = {
            k: pvariance(scores_of_answer)
            for (of, k), scores_of_answer in scores.items()
            if of == row and None not in scores_of_answer and all(judged[of, k]["ended"])
        }
        k = min(k for k in spread if spread[k] == max(spread.values()))
        assert spread[k] > 0 and set(winners) == {1, 2}  # 2 a + b of (0, 1) and of (1, 0)
        for best, agreed in enumerate((("A", "B"), ("B", "A"))):
            if (winners[1], winners[2]) == agreed:
                both = [judged[row, k]["ids"][j] for j in (best, 1 - best)]
                ids = [judged[row, k]["prompt"], *both]
                pairs.append({"ids": ids, "gap": strength_gap(), "score": scores[row, k][best]})
    return pairs


def strength_gap() -> float:
    """d = t_1 - t_2 of one won comparison: the maximum of log s(d) - (t_1^2 + t_2^2) / 2, where t_1 = -t_2.

    Its derivative is s(-d) - d / 2.
    """
    low, high = 0.0, 2.0
    for _ in range(60):
        d = (low + high) / 2
        low, high = (d, high) if 1 / (1 + math.exp(d)) > d / 2 else (low, d)
    return low


def expected(run: RunRecord) -> list[dict]:
    """The pairs of each step in order, the number of judgements among them, and of those accepted."""
    counts, waiting, steps = Counter(range(6)), [], []
    for step in range(STEPS):
        good, offered = good_pairs(run, step), judgement_pairs(run, step)
        accepted = 0
        for pair in offered:
            if counts[math.floor(pair["score"])] / counts.total() < 0.4:  # --meta-judge-class-cap
                counts[math.floor(pair["score"])] += 1
                waiting.append(pair)
                accepted += 1
        number = 0
        while number < len(waiting) and number + 1 <= FRACTION * min(PROMPTS, len(good) + number + 1):
            number += 1
        pairs = good[: PROMPTS - number] + waiting[:number]
        waiting = waiting[number:]
        steps.append({"pairs": pairs, "good": len(good), "judgements": number, "taken": accepted})
    return steps


def line(kind: str, pairs: list[dict]) -> dict[str, float]:
    """Metrics of an update, from the log-probs of policy and reference of each token."""
    sums: Counter[str] = Counter()
    for pair in pairs:
        policy, ref = ([total(kind, side[name]) for side in pair["sides"]] for name in ("policy", "ref"))
        chosen, rejected = (BETA * (p - r) for p, r in zip(policy, ref, strict=True))
        sums.update(
            {
                "preference_loss": preference(kind, chosen - rejected, pair["gap"]),
                "sft_loss": -policy[0] / (len(pair["sides"][0]["policy"]) if kind == "dpo" else 1),
                "acc": float(chosen > rejected),
                "rewards_chosen_mean": chosen,
                "rewards_rejected_mean": rejected,
                "rewards_margin_mean": chosen - rejected,
                "rewards_all_mean": (chosen + rejected) / 2,
                "square": (chosen**2 + rejected**2) / 2,
                "logprobs_chosen_mean": policy[0],
                "logprobs_rejected_mean": policy[1],
                "logratio_abs_mean": (abs(chosen) + abs(rejected)) / 2 / BETA,
            }
        )
    means = {name: value / len(pairs) for name, value in sums.items()}
    means["rewards_all_std"] = math.sqrt(means.pop("square") - means["rewards_all_mean"] ** 2)
    weight = SFT_WEIGHT if kind == "dpo" else 0.0
    return means | {"loss": means["preference_loss"] + weight * means["sft_loss"]}


def total(kind: str, logprobs: list[float]) -> float:
    """Log-prob of a sample, or with --average-logprobs the mean over its tokens."""
    return math.fsum(logprobs) / (len(logprobs) if " --average-logprobs" in KINDS[kind] else 1)


def preference(kind: str, x: float, gap: float) -> float:
    """The loss of a pair whose rewards differ by x."""
    p, q = (1 / (1 + math.exp(-value)) for value in (gap, x))
    return {
        "dpo": -math.log(q),
        "scale": -abs(gap) * math.log(q),
        "rpo_bwd_kl": p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)),
    }[kind]


# ---- tests ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(toy_judge, tmp_path_factory) -> Path:
    """Runs of all kinds on two data parallel ranks."""
    folder = tmp_path_factory.mktemp("step")
    fork_ranks(2, "tests/scripts/test_self_reward_step.py", toy_judge, folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def run(request, folder) -> RunRecord:
    return RunRecord(folder, request.param)


@pytest.fixture(scope="module")
def start(toy_judge) -> transformers.PreTrainedModel:
    """The model before the first step, the reference of both."""
    return transformers.AutoModelForCausalLM.from_pretrained(toy_judge / "hf", dtype=torch.float64)


def test_each_step_has_the_pairs_that_the_scores_give(run):
    """Those of answers first, then of judgements as many as --meta-judge-fraction allows."""
    for mixed, wanted, log in zip(run.ranks[0]["mixed"], expected(run), run.log, strict=True):
        assert mixed == [pair["ids"] for pair in wanted["pairs"]]
        good, judgements = wanted["good"], wanted["judgements"]
        assert 0 < good <= PROMPTS and 0 < judgements <= FRACTION * len(mixed)
        assert good + judgements > PROMPTS if run.kind == "scale" else len(mixed) < PROMPTS
        assert log["train/bad_samples_per_GBS"] == pytest.approx(1 - good / PROMPTS, rel=1e-12)
        assert log["train/meta_samples_per_GBS"] == judgements / PROMPTS
        assert log["train/meta_pairs"] == wanted["taken"]


def test_every_pair_is_trained_once_with_its_own_tokens(run):
    """In one micro-batch of one rank: the samples to their ends, nothing of the prompt, and the gap."""
    scale = 1.0 if run.kind == "dpo" else SCALE
    for step, wanted in enumerate(expected(run)):
        batches = [batch for rank in run.ranks for batch in rank["updates"][step]]
        trained = [pair for batch in batches for pair in batch]
        assert len(batches) > 2 and all(rank["updates"][step][0] for rank in run.ranks)
        assert len(trained) == len(wanted["pairs"])
        for pair in wanted["pairs"]:
            prompt, *samples = pair["ids"]
            sides = [(ids, list(range(len(prompt) - 1, len(prompt) + len(ids) - 1))) for ids in samples]
            same = [
                one
                for one in trained
                if [(side["targets"], side["positions"]) for side in one["sides"]] == sides
                and one["gap"] == pytest.approx(scale * pair["gap"], rel=1e-9)
            ]
            assert same, pair
            trained.remove(same[0])
        assert not trained


def test_the_reference_is_the_model_of_the_start(run, start):
    """Each token has the log-prob that transformers gives, in the second step as well, which is another's."""
    for step, wanted in enumerate(expected(run)):
        trained = [pair for rank in run.ranks for batch in rank["updates"][step] for pair in batch]
        for prompt, *samples in (pair["ids"] for pair in wanted["pairs"]):
            for ids in samples:
                ref_logprobs = [s for pair in trained for s in pair["sides"] if s["targets"] == ids]
                ref_logprobs = [s["ref"] for s in ref_logprobs if s["positions"][0] == len(prompt) - 1]
                truth = logprobs(start, prompt, ids)
                assert any(one == pytest.approx(truth, rel=0, abs=1e-4) for one in ref_logprobs), ids
        sides = [side for pair in trained for side in pair["sides"]]
        change = max(abs(p - r) for side in sides for p, r in zip(side["policy"], side["ref"], strict=True))
        assert change == 0 if step == 0 else change > 0.01


@torch.no_grad()
def logprobs(model: transformers.PreTrainedModel, prompt: list[int], ids: list[int]) -> list[float]:
    """Log-probs of the ids that continue a prompt."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1, :KNOWN_IDS]
    return logits.log_softmax(-1)[range(len(ids)), ids].tolist()


def test_the_log_is_the_mean_over_the_pairs(run):
    """Over those of answers and of judgements alike; a prompt without a pair counts nowhere."""
    for step, log in enumerate(run.log):
        pairs = [pair for rank in run.ranks for batch in rank["updates"][step] for pair in batch]
        for name, value in line(run.kind, pairs).items():
            assert log[f"train/{name}"] == pytest.approx(value, rel=1e-9, abs=1e-12), (step, name)
        assert log["audit/logprob_error_max"] < 1e-4


def test_ranks_agree(run):
    first, second = run.ranks
    assert first["rollouts"] == second["rollouts"] and first["mixed"] == second["mixed"]


if __name__ == "__main__":
    trained, output = map(Path, sys.argv[1:])
    with parallel.start(parallel.ParallelConfig()):
        for name, more in KINDS.items():
            command = (
                f"--model {trained}/hf --train-data {trained}/data/train.jsonl --output {output}/{name} "
                f"--judge-template {trained}/data/judge.txt --judgements 2 --save-interval 0 "
                f"--meta-judge --meta-judge-template {trained}/data/meta_judge.txt "
                f"--meta-judge-fraction {FRACTION} --global-batch-size {PROMPTS} --iterations 1 "
                f"--steps-per-iteration {STEPS} --max-seq-len 36 --max-new-tokens 38 --temperature 0.8 "
                f"--micro-batch-tokens 256 --micro-batch-size 2 --beta {BETA} --lr 1e-3 --warmup-steps 0 "
                f"{more}"
            )
            result = recorded(command.split(), load_tokenizer(trained / "hf"))
            (output / f"{name}{dist.get_rank()}.json").write_text(json.dumps(result))
