"""Self-rewarding: sample responses, judge them, compare the judgements, and build preference pairs.

K answers to each prompt are sampled, those that ended are judged N times each, and a pair of them is chosen
to train on. Of one answer to a prompt the judgements are compared with one another, which gives a pair of
judgements. Who samples, and with which weights, is the script's affair:

    sample(kind, ids, streams, number) -> samples by prompt

where kind is "generate", "judge" or "meta_judge", ids are those of prompts, streams the numbers that their
random numbers follow from, and number says how many samples each prompt gets.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from align.data.packing import Example
from align.data.prompts import Prompt, Task
from align.generation import rollout
from align.generation.generator import Sample, Tokenizer
from align.judging import judge, meta_judge
from align.judging.judge import Choice, Judge, Judged
from align.judging.meta_judge import Buffer, MetaJudge

ANSWER, JUDGEMENT, META_JUDGEMENT = 0, 1, 2  # what random numbers are drawn for

Ids, Streams = list[np.ndarray], list[tuple[int, ...]]
Sampler = Callable[[str, Ids, Streams, int], list[list[Sample]]]

# ---- what is trained on ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SampledPair:
    """Two samples that continue the same ids, answers or judgements, of which one is preferred."""

    row: int  # of the data, for messages
    ids: np.ndarray  # [n] int32, the prompt
    chosen: Sample
    rejected: Sample
    chosen_reward: float  # what the judge says of an answer, what a judgement says itself
    rejected_reward: float
    gap: float  # by how much the chosen one is better, for losses that ask

    @property
    def samples(self) -> tuple[Sample, Sample]:
        """Both, chosen first."""
        return self.chosen, self.rejected

    @property
    def examples(self) -> list[Example]:
        """Both as examples that train the sample."""
        return [rollout.answer(Prompt(self.ids, {}), sample) for sample in self.samples]

    def texts(self, tokenizer: Tokenizer, said: Callable[[Sample], str]) -> dict[str, str | float]:
        """Text and scores of the pair, for the samples table."""
        return {
            "prompt": tokenizer.decode(self.ids.tolist()),
            "chosen": said(self.chosen),
            "rejected": said(self.rejected),
            "chosen_reward": self.chosen_reward,
            "rejected_reward": self.rejected_reward,
        }

    def record(self) -> dict:
        """The pair in what JSON knows."""
        return {
            **{name: getattr(self, name) for name in ("row", "chosen_reward", "rejected_reward", "gap")},
            "ids": self.ids.tolist(),
            **{name: sample_record(getattr(self, name)) for name in ("chosen", "rejected")},
        }


def pair_of(record: Mapping) -> SampledPair:
    """The inverse of SampledPair.record."""
    samples = {name: sample_of(record[name]) for name in ("chosen", "rejected")}
    return SampledPair(**{**record, **samples, "ids": np.array(record["ids"], np.int32)})


def sample_record(sample: Sample) -> dict:
    """A sample in what JSON knows; a float32 survives being written as a float64."""
    arrays = {name: getattr(sample, name).tolist() for name in ("ids", "logprobs", "model_logprobs")}
    return {**arrays, "finish": sample.finish}


def sample_of(record: Mapping) -> Sample:
    """The inverse of sample_record."""
    logprobs = (np.array(record[name], np.float32) for name in ("logprobs", "model_logprobs"))
    return Sample(np.array(record["ids"], np.int32), *logprobs, record["finish"])


def buffer_record(buffer: Buffer[SampledPair]) -> dict:
    """A buffer's state in what JSON knows."""
    return {
        "counts": {str(score): count for score, count in buffer.counts.items()},
        "waiting": [pair.record() for pair in buffer.waiting],
    }


def fill_buffer(buffer: Buffer[SampledPair], record: Mapping) -> None:
    """Put a buffer into the state that `buffer_record` told."""
    buffer.counts.update({int(score): count for score, count in record["counts"].items()})
    buffer.waiting.extend(pair_of(one) for one in record["waiting"])


# ---- what is said ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Answered:
    """A prompt, the K answers that the model gave, and what it thinks of them."""

    place: tuple[int, ...]  # what its random numbers follow from, at the end the row of the data
    task: Task
    samples: list[Sample]  # [K]
    asked: list[np.ndarray | None]  # [K] judge prompts; None: the answer did not end, or finds no room
    shortened: list[bool]  # [K] was it too long for the judge?
    judgements: list[list[Sample]]  # [K][N], [] where nothing was asked
    judged: list[Judged]  # [K]

    def pair(self, choice: Choice) -> SampledPair | None:
        """The two answers of a choice, None if it found none."""
        if choice.why:
            return None
        samples = self.samples[choice.chosen], self.samples[choice.rejected]
        means = self.judged[choice.chosen].mean, self.judged[choice.rejected].mean
        return SampledPair(self.row, self.task.prompt.ids, *samples, *means, means[0] - means[1])

    @property
    def row(self) -> int:
        """Of the data."""
        return self.place[-1]

    @property
    def ended(self) -> list[list[bool]]:
        """[K][N] Did the judgement end by itself?"""
        return [[judgement.finish == "stop" for judgement in of_answer] for of_answer in self.judgements]

    def table(self, name: str, said: Callable[[Sample], str]) -> list[dict]:
        """Every judgement and what was read of it."""
        return [
            {
                "table": name,
                "row": self.row,
                "answer": k,
                "response": said(self.samples[k]),
                "judgement": said(judgement),
                "score": score,
            }
            for k, of_answer in enumerate(self.judgements)
            for judgement, score in zip(of_answer, self.judged[k].scores, strict=True)
        ]


class SelfJudge:
    """Sample responses, judgements and meta-judgements of one model."""

    def __init__(self, judge: Judge, meta_judge: MetaJudge, tokenizer: Tokenizer, stop: tuple[str, ...]):
        """`stop`: --stop."""
        self.judge, self.meta_judge, self.tokenizer, self.stop = judge, meta_judge, tokenizer, stop
        self.number = judge.config.judgements

    def said(self, sample: Sample) -> str:
        """A sample as text."""
        return sample.text(self.tokenizer, self.stop)

    def answers(
        self, tasks: Sequence[Task], places: Sequence[tuple[int, ...]], number: int, sample: Sampler
    ) -> list[Answered]:
        """`number` answers to each task, and judgements of those that ended.

        `places`: of each task the numbers that its random numbers follow from; the last one is its row.
        """
        streams = [(*place, ANSWER, 0) for place in places]
        answers = sample("generate", [task.prompt.ids for task in tasks], streams, number)
        asked = {
            (i, k): self.judge.prompt(tasks[i].prompt.row, self.said(answer))
            for i, samples in enumerate(answers)
            for k, answer in enumerate(samples)
            if answer.finish == "stop"
        }
        ids = {at: prompt for at, (prompt, _) in asked.items() if prompt is not None}
        streams = [(*places[i], JUDGEMENT, k) for i, k in ids]
        judgements = dict(zip(ids, sample("judge", list(ids.values()), streams, self.number), strict=True))
        found = []
        for i, (task, place) in enumerate(zip(tasks, places, strict=True)):
            numbers = [(i, k) for k in range(number)]
            found.append(
                Answered(
                    *(place, task, answers[i]),
                    asked=[ids.get(at) for at in numbers],
                    shortened=[at in asked and asked[at][1] for at in numbers],
                    judgements=[judgements.get(at, []) for at in numbers],
                    judged=[self.judged(judgements.get(at, []), answers[i][at[1]]) for at in numbers],
                )
            )
        return found

    def judged(self, judgements: Sequence[Sample], answer: Sample) -> Judged:
        """The scores of an answer; a truncated judgement gives none."""
        texts = [self.said(one) if one.finish == "stop" else None for one in judgements]
        return Judged(self.judge.scores(texts, self.said(answer)))

    def pairs(
        self, found: Sequence[Answered], length_control: float
    ) -> tuple[list[SampledPair | None], dict[str, float]]:
        """Of each prompt the better and the worse answer, None if there are none; and what is logged."""
        choices = [judge.choose(each.samples, each.judged, length_control) for each in found]
        pairs = [each.pair(choice) for each, choice in zip(found, choices, strict=True)]
        return pairs, statistics(found, choices, pairs)

    def tables(self, name: str, found: Sequence["Answered | Compared"]) -> list[dict]:
        """Every judgement, or verdict on two, and what was read of it, for samples.jsonl."""
        return [row for each in found for row in each.table(name, self.said)]

    def compare(self, found: Sequence[Answered], sample: Sampler) -> list["Compared"]:
        """Comparisons of the judgements of one answer to each prompt, where there is one to learn from."""
        subjects, asked = {}, {}  # of each prompt its answer; ids by prompt and judgements shown as A and B
        for i, each in enumerate(found):
            k = meta_judge.candidate(each.judged, each.ended)
            if k is not None:
                usable = meta_judge.usable(each.judged[k].scores, each.ended[k])
                texts = [judge.without_scores(self.said(one)) for one in each.judgements[k]]
                texts = [text if j in usable else None for j, text in enumerate(texts)]
                made = self.meta_judge.prompts(each.task.prompt.row, self.said(each.samples[k]), texts)
                subjects[i] = k
                asked |= {(i, *order): ids for order, ids in made.items()}
        streams = [(*found[i].place, META_JUDGEMENT, a * self.number + b) for i, a, b in asked]
        made = sample("meta_judge", list(asked.values()), streams, 1)
        verdicts: dict[int, dict[tuple[int, int], str]] = {i: {} for i in subjects}
        for (i, a, b), [one] in zip(asked, made, strict=True):
            verdicts[i][a, b] = self.said(one)
        return [Compared(found[i], k, verdicts[i]) for i, k in subjects.items()]


@dataclass(frozen=True, eq=False)
class Compared:
    """An answer, and what the model says of the judgements of it."""

    answered: Answered
    answer: int  # its number, k
    verdicts: dict[tuple[int, int], str]  # by the judgements shown as A and as B

    @property
    def winners(self) -> dict[tuple[int, int], str | None]:
        """The letter that each verdict gives."""
        return {order: meta_judge.parse_winner(text) for order, text in self.verdicts.items()}

    @property
    def strengths(self) -> np.ndarray:
        """[N] of the judgements, in nats; NaN for one without a verdict that counts."""
        number = len(self.answered.judgements[self.answer])
        return meta_judge.bradley_terry(meta_judge.tally(number, self.winners))

    def pair(self) -> SampledPair | None:
        """The strongest and the weakest judgement; None if there are no such two."""
        k, of, strengths = self.answer, self.answered, self.strengths
        judgements, scores = of.judgements[k], of.judged[k].scores
        picked = meta_judge.best_and_worst(strengths, scores, [one.ids for one in judgements])
        if picked is None:
            return None
        both, values = [judgements[j] for j in picked], [scores[j] for j in picked]
        return SampledPair(
            of.row, of.asked[k], *both, *values, gap=float(strengths[picked[0]] - strengths[picked[1]])
        )

    def table(self, name: str, said: Callable[[Sample], str]) -> list[dict]:
        """Every verdict and what was read of it, and how strong all verdicts make the two judgements."""
        judgements = [said(one) for one in self.answered.judgements[self.answer]]
        elo = [None if np.isnan(x) else round(x, 1) for x in meta_judge.elo(self.strengths).tolist()]
        return [
            {
                "table": name,
                "row": self.answered.row,
                "answer": self.answer,
                "a": judgements[a],
                "b": judgements[b],
                "verdict": self.verdicts[a, b],
                "winner": winner,
                "elo_a": elo[a],
                "elo_b": elo[b],
            }
            for (a, b), winner in self.winners.items()
        ]


# ---- what is logged --------------------------------------------------------------------------------------


def statistics(
    found: Sequence[Answered], choices: Sequence[Choice], pairs: Sequence[SampledPair | None]
) -> dict[str, float]:
    """Metrics of responses, of judgements, and of pairs, None where a prompt gave none."""
    answers = [sample for each in found for sample in each.samples]
    reasons = [choice.why for choice in choices]
    return {
        "response_lengths": float(np.mean([len(sample.ids) for sample in answers])),
        "bad_ends_per_GBS": float(np.mean([sample.finish == "length" for sample in answers])),
        "bad_samples_per_GBS": float(np.mean([why is not None for why in reasons])),
        **{f"bad_{name}": float(np.mean([why == name for why in reasons])) for name in judge.REASONS},
        "judge_asked": float(np.mean([ids is not None for each in found for ids in each.asked])),
        "judge_shortened": float(np.mean([short for each in found for short in each.shortened])),
        **judge.statistics(judged for each in found for judged in each.judged),
        **pair_statistics([pair for pair in pairs if pair is not None]),
    }


def pair_statistics(pairs: Sequence[SampledPair]) -> dict[str, float]:
    """Metrics of response pairs; {} without any."""
    if not pairs:
        return {}
    return {
        "chosen_lengths": float(np.mean([len(pair.chosen.ids) for pair in pairs])),
        "reject_lengths": float(np.mean([len(pair.rejected.ids) for pair in pairs])),
        "chosen_generated_rewards": float(np.mean([pair.chosen_reward for pair in pairs])),
        "rejected_generated_rewards": float(np.mean([pair.rejected_reward for pair in pairs])),
    }


def compare_with(truth: np.ndarray, found: Sequence[Answered]) -> dict[str, float]:
    """The judge's scores against others of the same answers, [prompts, K].

    judge_correlation is Pearson's, over the answers that have a score; 0 where either does not vary.
    """
    means = np.array([[judged.mean for judged in each.judged] for each in found], float)  # None becomes NaN
    known = ~np.isnan(means)
    x, y = means[known], truth[known]
    varies = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0  # the std of equal numbers need not be 0
    correlation = float(np.corrcoef(x, y)[0, 1]) if varies else 0.0
    return {"true_rewards": float(truth.mean()), "judge_correlation": correlation}


def comparison_statistics(compared: Sequence[Compared]) -> dict[str, float]:
    """Metrics of comparisons; without any no share of unreadable ones."""
    winners = [winner for each in compared for winner in each.winners.values()]
    unparsed = {"meta_unparsed": float(np.mean([winner is None for winner in winners]))} if winners else {}
    return {"meta_comparisons": len(winners), **unparsed}
