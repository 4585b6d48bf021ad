"""Self-rewarding: sample responses, judge them, compare the judgements, and build preference pairs.

K responses to each prompt are sampled; each that ended is judged N times, and two of them become a pair to
train on. The judgements of one response to a prompt are compared, which gives a pair of judgements. The
script samples, with the weights of its choice:

    sample(kind, ids, streams, number) -> samples by prompt

`kind` is "generate", "judge" or "meta_judge", `ids` are the prompts, `streams` the stream ids of their random
numbers, and `number` is the number of samples of each prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from align.data.sft_tasks import Task
from align.data.tokenizer import Tokenizer
from align.generation.rollout import Sample
from align.judging import judge, meta_judge
from align.judging.judge import Choice, Judge, Judged
from align.judging.meta_judge import MetaJudge, Order
from align.judging.pairs import SampledPair

RESPONSE, JUDGEMENT, META_JUDGEMENT = 0, 1, 2  # stream ids of random numbers

Ids = list[np.ndarray]
Streams = list[tuple[int, ...]]
Sampler = Callable[[str, Ids, Streams, int], list[list[Sample]]]


@dataclass(frozen=True, eq=False)
class JudgedResponses:
    """A prompt, the K responses of the model, and its judgements of them."""

    place: tuple[int, ...]  # stream id of its random numbers, with the row of the data at the end
    task: Task
    samples: list[Sample]  # [K]
    judge_prompts: list[np.ndarray | None]  # [K]; None: the response did not end, or does not fit
    shortened: list[bool]  # [K] True if the response was too long for the judge
    judgements: list[list[Sample]]  # [K][N], [] without a judge prompt
    judged: list[Judged]  # [K]

    def pair(self, choice: Choice) -> SampledPair | None:
        """The two responses of a choice, None without a pair."""
        if choice.chosen is None or choice.rejected is None:
            return None
        chosen, rejected = self.judged[choice.chosen].mean, self.judged[choice.rejected].mean
        assert chosen is not None and rejected is not None
        samples = self.samples[choice.chosen], self.samples[choice.rejected]
        return SampledPair(self.row, self.task.prompt.ids, *samples, chosen, rejected, gap=chosen - rejected)

    @property
    def row(self) -> int:
        """Row of the data."""
        return self.place[-1]

    @property
    def ended(self) -> list[list[bool]]:
        """[K][N] True for a judgement that is not truncated."""
        return [[judgement.finish == "stop" for judgement in judgements] for judgements in self.judgements]

    def table(self, name: str, text_of: Callable[[Sample], str]) -> list[dict]:
        """Every judgement and its score."""
        return [
            {
                "table": name,
                "row": self.row,
                "answer": k,
                "response": text_of(self.samples[k]),
                "judgement": text_of(judgement),
                "score": score,
            }
            for k, judgements in enumerate(self.judgements)
            for judgement, score in zip(judgements, self.judged[k].scores, strict=True)
        ]


def by_stream(rollout: Sequence[JudgedResponses]) -> tuple[Streams, list[list[Sample]]]:
    """Responses and judgements of a rollout by the stream ids that they were sampled with."""
    streams, samples = [], []
    for prompt in rollout:
        groups = [((*prompt.place, RESPONSE, 0), prompt.samples)]
        groups += [((*prompt.place, JUDGEMENT, k), own) for k, own in enumerate(prompt.judgements) if own]
        streams += [stream for stream, _ in groups]
        samples += [own for _, own in groups]
    return streams, samples


class SelfJudge:
    """Sample responses, judgements and meta-judgements of one model."""

    def __init__(self, judge: Judge, meta_judge: MetaJudge, tokenizer: Tokenizer, stop: tuple[str, ...]):
        """`stop`: --stop."""
        self.judge, self.meta_judge, self.tokenizer, self.stop = judge, meta_judge, tokenizer, stop
        self.number = judge.config.judgements

    def text_of(self, sample: Sample) -> str:
        """A sample as text, without characters that no text of a judge prompt may have."""
        return self.tokenizer.replace_refused(sample.text(self.tokenizer, self.stop))

    def responses(
        self, tasks: Sequence[Task], places: Sequence[tuple[int, ...]], number: int, sample: Sampler
    ) -> list[JudgedResponses]:
        """Sample `number` responses to each task, and judge those that ended; `places`: stream ids."""
        streams: Streams = [(*place, RESPONSE, 0) for place in places]
        samples = sample("generate", [task.prompt.ids for task in tasks], streams, number)
        judge_prompts = {
            (i, k): self.judge.prompt(tasks[i].prompt.row, self.text_of(response))
            for i, responses in enumerate(samples)
            for k, response in enumerate(responses)
            if response.finish == "stop"
        }
        ids = {key: prompt for key, (prompt, _) in judge_prompts.items() if prompt is not None}
        streams = [(*places[i], JUDGEMENT, k) for i, k in ids]
        judgements = dict(zip(ids, sample("judge", list(ids.values()), streams, self.number), strict=True))
        keys = [[(i, k) for k in range(number)] for i in range(len(tasks))]
        return [
            JudgedResponses(
                place=places[i],
                task=task,
                samples=samples[i],
                judge_prompts=[ids.get(key) for key in keys[i]],
                shortened=[key in judge_prompts and judge_prompts[key][1] for key in keys[i]],
                judgements=[judgements.get(key, []) for key in keys[i]],
                judged=[self.judged(judgements.get(key, []), samples[i][key[1]]) for key in keys[i]],
            )
            for i, task in enumerate(tasks)
        ]

    def judged(self, judgements: Sequence[Sample], response: Sample) -> Judged:
        """The scores of a response; a truncated judgement gives none."""
        texts = [self.text_of(judgement) if judgement.finish == "stop" else None for judgement in judgements]
        return Judged(self.judge.scores(texts, self.text_of(response)))

    def pairs(
        self, rollout: Sequence[JudgedResponses], length_control: float
    ) -> tuple[list[SampledPair | None], dict[str, float]]:
        """The pair of each prompt, None without one, and metrics."""
        choices = [judge.choose(prompt.samples, prompt.judged, length_control) for prompt in rollout]
        pairs = [prompt.pair(choice) for prompt, choice in zip(rollout, choices, strict=True)]
        return pairs, statistics(rollout, choices, pairs)

    def tables(self, name: str, results: Sequence["JudgedResponses | ComparedJudgements"]) -> list[dict]:
        """Every judgement, or verdict on two, and its score or winner, for samples.jsonl."""
        return [row for result in results for row in result.table(name, self.text_of)]

    def compare(self, rollout: Sequence[JudgedResponses], sample: Sampler) -> list["ComparedJudgements"]:
        """Compare the judgements of one response to each prompt, if their scores differ."""
        candidates: dict[int, int] = {}  # response by prompt
        prompts: dict[tuple[int, int, int], np.ndarray] = {}  # ids by prompt and judgements shown as A and B
        for i, judged in enumerate(rollout):
            k = meta_judge.candidate(judged.judged, judged.ended)
            if k is None:
                continue
            usable = meta_judge.usable(judged.judged[k].scores, judged.ended[k])
            texts = [
                judge.without_scores(self.text_of(judgement)) if j in usable else None
                for j, judgement in enumerate(judged.judgements[k])
            ]
            response = self.text_of(judged.samples[k])
            orders = self.meta_judge.prompts(judged.task.prompt.row, response, texts)
            candidates[i] = k
            prompts |= {(i, *order): ids for order, ids in orders.items()}
        streams = [(*rollout[i].place, META_JUDGEMENT, a * self.number + b) for i, a, b in prompts]
        samples = sample("meta_judge", list(prompts.values()), streams, 1)
        verdicts: dict[int, dict[Order, str]] = {i: {} for i in candidates}
        for (i, a, b), [verdict] in zip(prompts, samples, strict=True):
            verdicts[i][a, b] = self.text_of(verdict)
        return [ComparedJudgements(rollout[i], k, verdicts[i]) for i, k in candidates.items()]


@dataclass(frozen=True, eq=False)
class ComparedJudgements:
    """A response, and the model's comparisons of its judgements."""

    responses: JudgedResponses
    response: int  # its number, k
    verdicts: dict[Order, str]

    @property
    def winners(self) -> dict[Order, str | None]:
        """The letter of each verdict."""
        return {order: meta_judge.parse_winner(text) for order, text in self.verdicts.items()}

    @property
    def strengths(self) -> np.ndarray:
        """[N] strengths of the judgements, in nats; NaN without a valid verdict."""
        number = len(self.responses.judgements[self.response])
        return meta_judge.bradley_terry(meta_judge.tally(number, self.winners))

    def pair(self) -> SampledPair | None:
        """The strongest and the weakest judgement; None without such a pair."""
        k, strengths = self.response, self.strengths
        judgements, scores = self.responses.judgements[k], self.responses.judged[k].scores
        picked = meta_judge.best_and_worst(strengths, scores, [judgement.ids for judgement in judgements])
        if picked is None:
            return None
        best, worst = picked
        ids, chosen, rejected = self.responses.judge_prompts[k], scores[best], scores[worst]
        assert ids is not None and chosen is not None and rejected is not None
        samples, gap = (judgements[best], judgements[worst]), float(strengths[best] - strengths[worst])
        return SampledPair(self.responses.row, ids, *samples, chosen, rejected, gap)

    def table(self, name: str, text_of: Callable[[Sample], str]) -> list[dict]:
        """Every verdict, its winner, and the Elo ratings of the two judgements by all verdicts."""
        judgements = [text_of(judgement) for judgement in self.responses.judgements[self.response]]
        elo = [None if np.isnan(x) else round(x, 1) for x in meta_judge.elo(self.strengths).tolist()]
        return [
            {
                "table": name,
                "row": self.responses.row,
                "answer": self.response,
                "a": judgements[a],
                "b": judgements[b],
                "verdict": self.verdicts[a, b],
                "winner": winner,
                "elo_a": elo[a],
                "elo_b": elo[b],
            }
            for (a, b), winner in self.winners.items()
        ]


def statistics(
    rollout: Sequence[JudgedResponses], choices: Sequence[Choice], pairs: Sequence[SampledPair | None]
) -> dict[str, float]:
    """Metrics of responses, judgements and pairs, None for a prompt without a pair."""
    responses = [sample for prompt in rollout for sample in prompt.samples]
    reasons = [choice.why for choice in choices]
    return {
        "response_lengths": float(np.mean([len(sample.ids) for sample in responses])),
        "bad_ends_per_GBS": float(np.mean([sample.finish == "length" for sample in responses])),
        "bad_samples_per_GBS": float(np.mean([reason is not None for reason in reasons])),
        **{f"bad_{name}": float(np.mean([reason == name for reason in reasons])) for name in judge.REASONS},
        "judge_asked": float(np.mean([p is not None for prompt in rollout for p in prompt.judge_prompts])),
        "judge_shortened": float(np.mean([short for prompt in rollout for short in prompt.shortened])),
        **judge.statistics(judged for prompt in rollout for judged in prompt.judged),
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


def compare_with(true_rewards: np.ndarray, rollout: Sequence[JudgedResponses]) -> dict[str, float]:
    """Compare the judge's scores with true rewards of the same responses, [prompts, K].

    judge_correlation is Pearson's, over the responses with a score; 0 if either is constant.
    """
    means = np.array([[judged.mean for judged in prompt.judged] for prompt in rollout], float)  # None: NaN
    has_score = ~np.isnan(means)
    x, y = means[has_score], true_rewards[has_score]
    varies = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0  # the std of equal numbers need not be 0
    correlation = float(np.corrcoef(x, y)[0, 1]) if varies else 0.0
    return {"true_rewards": float(true_rewards.mean()), "judge_correlation": correlation}


def comparison_statistics(comparisons: Sequence[ComparedJudgements]) -> dict[str, float]:
    """Number of comparisons, and the share of unreadable verdicts if there are any."""
    winners = [winner for comparison in comparisons for winner in comparison.winners.values()]
    unparsed = {"meta_unparsed": float(np.mean([winner is None for winner in winners]))} if winners else {}
    return {"meta_comparisons": len(winners), **unparsed}
