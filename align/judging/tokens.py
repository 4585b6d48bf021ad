"""Ledger of self-rewarding's tokens, from their sampling to their fate, which may be some steps later.

A response waits for its step, a pair of judgements in the buffer. A judgement in no such pair is settled when
its score is read, a verdict when it is sampled.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from align.generation.rollout import Sample
from align.judging.pairs import Buffer, SampledPair
from align.judging.self_judge import Ids, JudgedResponses, Sampler, Streams
from align.training.ledger import Ledger, per_token

FATES = ("truncated", "unscored", "no_pair", "not_selected", "displaced")  # of untrained responses


def num_tokens(samples: Sequence[Sample]) -> int:
    """Tokens of samples."""
    return sum(len(sample.ids) for sample in samples)


def in_pairs(pairs: Sequence[SampledPair]) -> int:
    """Tokens of the samples of pairs."""
    return sum(num_tokens(pair.samples) for pair in pairs)


def response_fates(
    prompts: Sequence[JudgedResponses], pairs: Sequence[SampledPair | None], trained: Sequence[SampledPair]
) -> list[str]:
    """Fate of each response, one of FATES, or "" for those that are trained on.

    `pairs`: of each prompt, None without one; `trained`: pairs of the step, which may displace others.
    """
    kept = {id(sample) for pair in trained for sample in pair.samples}

    def fate(prompt: JudgedResponses, pair: SampledPair | None, k: int) -> str:
        sample = prompt.samples[k]
        if id(sample) in kept:
            return ""
        if sample.finish == "length":
            return "truncated"
        if prompt.judged[k].mean is None:
            return "unscored"
        if pair is None:
            return "no_pair"
        return "displaced" if sample in pair.samples else "not_selected"

    return [
        fate(prompt, pair, k)
        for prompt, pair in zip(prompts, pairs, strict=True)
        for k in range(len(prompt.samples))
    ]


def of_step(
    prompts: Sequence[JudgedResponses], pairs: Sequence[SampledPair | None], trained: Sequence[SampledPair]
) -> Ledger:
    """Ledger of the responses of a step and of the judgements that leave the buffer; arguments as above."""
    own = set(map(id, pairs))
    buffered = [pair for pair in trained if id(pair) not in own]
    responses = [(len(p.task.prompt.ids), sample.ids) for p in prompts for sample in p.samples]
    responses += [(len(pair.ids), sample.ids) for pair in buffered for sample in pair.samples]
    fates = [*response_fates(prompts, pairs, trained), *[""] * (2 * len(buffered))]
    return Ledger(responses, per_token(fates, responses, FATES))


class Account:
    """Sampled tokens of the step under way, and those that need no training to be settled."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Begin the next step."""
        self.sampled: Counter[str] = Counter()  # by kind, as the sampler returned them
        self.judgements = 0  # settled

    def counting(self, sample: Sampler) -> Sampler:
        """The sampler, which also counts the tokens that it returns."""

        def counted(kind: str, ids: Ids, streams: Streams, number: int) -> list[list[Sample]]:
            samples = sample(kind, ids, streams, number)
            self.sampled[kind] += sum(map(num_tokens, samples))
            return samples

        return counted

    def judge(self, prompts: Sequence[JudgedResponses], is_new: bool) -> None:
        """Settle the judgements of a rollout; not `is_new`: sampled again, by a continued run."""
        if is_new:
            self.judgements = sum(num_tokens(samples) for p in prompts for samples in p.judgements)
        else:
            self.clear()

    def admit(self, pairs: Sequence[SampledPair]) -> None:
        """Take pairs of judgements that the buffer has admitted out of the settled ones."""
        self.judgements -= in_pairs(pairs)

    def close(
        self,
        label: str,
        latest: Mapping[str, float],
        step: Ledger,
        later: Sequence[JudgedResponses],
        buffer: Buffer,
        is_last: bool,
    ) -> dict[str, float]:
        """Check the sums of a step, and return its metrics. Collective.

        Args:
            latest: metrics of the step before, which a continued run has from its checkpoint.
            later: responses that wait for later steps.
            is_last: the iteration ends, and what is in the buffer expires.

        Raises RuntimeError if tokens are lost or appear.
        """
        metrics = step.close(label)
        before, sampled = int(latest.get("ledger/tokens_waiting", 0)), sum(self.sampled.values())
        left = in_pairs(buffer.pairs)
        waiting = sum(num_tokens(prompt.samples) for prompt in later) + (0 if is_last else left)
        others = {
            "judgements": self.judgements,
            "verdicts": self.sampled["meta_judge"],
            "expired": left if is_last else 0,
        }
        settled = step.sampled + sum(others.values())
        if before + sampled != settled + waiting:
            raise RuntimeError(
                f"ledger: {label}: {before} tokens waited and {sampled} were sampled; {settled} are settled "
                f"and {waiting} wait, {settled + waiting - before - sampled:+} tokens"
            )
        self.clear()
        others |= {"sampled": sampled, "waiting": waiting}
        return metrics | {f"ledger/tokens_{name}": count for name, count in others.items()}
