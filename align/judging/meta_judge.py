"""Meta-judging (Meta-Rewarding, arXiv 2407.19594): which of two judgements of one answer is the better?

The policy is asked this about its own judgements, each two of them in both orders. A Bradley-Terry model of
the verdicts gives each judgement a strength; the best and the worst become a preference pair that trains the
policy as a judge. No model in here, and no process group.
"""

import itertools
import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np

from align.data import prompts
from align.data.formats import FormatConfig, Tokenizer
from align.data.prompts import Template
from align.errors import UserError
from align.files import ASSETS
from align.flags import above, between, check_ranges, refuse_unused
from align.judging.judge import Judged

NAMES = ("prompt", "response", "judgement_a", "judgement_b")  # variables of the template
SAME = 1e-9  # strengths, in nats, that differ by no more are equal: the solver's rounding is far below
# "Winner:", "**Winner:**", "winner is"; an underscore may be markup, so \b would not do
STATEMENT = re.compile(r"""(?<![^\W_])winner[*_`"']*(?:\s*[:=]|\s+[-–—]\s|\s+is\b)""", re.I)
VERDICT = re.compile(  # what follows it: "Judgement A", "[B].", "**judgment a**, because ..."
    r"""
    [\W_]* (?: judge?ment [\W_]* )? (?P<letter> [AB] ) [*_`"'\])}>]*
    (?: \s* $                                # nothing else on the line
      | [.;!] (?!\w)                         # or the end of the sentence
      | ,? \s+ (?: because | since | as ) \b # or the reason; not "or B", "and B", "/B", nor "A tie"
    )
    """,
    re.I | re.X | re.M,
)


@dataclass(frozen=True)
class MetaJudgeConfig:
    """Meta-rewarding: preference pairs of the policy's own judgements."""

    meta_judge: bool = False
    """meta-rewarding: the policy compares its own judgements, and trains on pairs of them as well"""
    meta_judge_fraction: float = 0.15
    """largest share of judgement pairs among the pairs of a step; above 0.15 judges were seen to collapse to
    the highest score"""
    meta_judge_class_cap: float = 0.4
    """largest share of one score, rounded down, among the chosen judgements"""
    meta_judge_template: Path = ASSETS / "meta_judge.txt"
    """meta-judge prompt: text file with {{ prompt }}, {{ response }}, {{ judgement_a }} and {{ judgement_b }}
    in it, given to the policy as one user turn"""

    def __post_init__(self):
        check_ranges(self, meta_judge_fraction=between(0, 1), meta_judge_class_cap=above(0, 1))
        if not self.meta_judge:
            names = "meta_judge_fraction meta_judge_class_cap meta_judge_template"
            refuse_unused(self, MetaJudgeConfig, names, "without --meta-judge")


# What is compared


def usable(scores: Sequence[float | None], ended: Sequence[bool]) -> list[int]:
    """Numbers of the judgements of one answer that gave a score and ended. Both arguments [judgements]."""
    pairs = enumerate(zip(scores, ended, strict=True))
    return [i for i, (score, end) in pairs if score is not None and end]


def candidate(judged: Sequence[Judged], ended: Sequence[Sequence[bool]]) -> int | None:
    """Index of the response to meta-judge: the one whose scores have the highest variance.

    Args:
        judged: [answers]; one that was not judged has no scores.
        ended: [answers][judgements] did the judgement end by itself?

    Returns:
        The first answer with the highest variance of usable scores; None if there is no variance above 0.
    """
    variances = [  # exact but for one last rounding: equal scores give 0, and equal spreads a tie
        Judged(tuple(of.scores[i] for i in usable(of.scores, ends))).variance
        for of, ends in zip(judged, ended, strict=True)
    ]
    highest = max(variances, default=0.0)
    return variances.index(highest) if highest > 0 else None


def comparisons(texts: Sequence[str | None]) -> list[tuple[int, int]]:
    """Pairs of judgements to compare, as (shown as A, shown as B), the two orders of a pair side by side.

    Args:
        texts: [judgements] without their scores, which the comparison must not see; None: not usable.

    Returns:
        (0, 1), (1, 0), (0, 2), (2, 0), ... without those of equal texts, of which none can be the better, and
        of empty ones, which were nothing but a score.
    """
    return [
        order
        for i, j in itertools.combinations(range(len(texts)), 2)
        if texts[i] and texts[j] and texts[i] != texts[j]
        for order in ((i, j), (j, i))
    ]


class MetaJudge:
    """Meta-judge prompts: two judgements of one response, to be compared."""

    def __init__(self, config: MetaJudgeConfig, tokenizer: Tokenizer, fmt: FormatConfig, room: int):
        """`room`: most tokens of a prompt."""
        self.template = Template(config.meta_judge_template, "--meta-judge-template", NAMES)
        self.config, self.tokenizer, self.fmt, self.room = config, tokenizer, fmt, room

    def check(self, row: dict) -> None:
        """Raises UserError if there is no room for anything but the template, in the format of `row`."""
        text = self.template.fill(**dict.fromkeys(NAMES, "x"))
        if len(prompts.one_turn(row, text, self.tokenizer, self.fmt)) > self.room:
            raise UserError(
                f"--meta-judge-template {self.config.meta_judge_template} alone is longer than the "
                f"{self.room} tokens that --max-new-tokens leaves of the model's context and of half of "
                "--micro-batch-tokens"
            )

    def prompts(
        self, row: dict, response: str, texts: Sequence[str | None]
    ) -> dict[tuple[int, int], np.ndarray]:
        """Prompts of all comparisons of an answer's judgements, [n] int32, by (shown as A, shown as B).

        A pair of which one order has no room is left out, and what states a winner itself: it may be quoted.
        `row`: of SFT data, which `response` answers; `texts`: as `comparisons` takes them.
        """
        if STATEMENT.search(response):
            return {}
        texts = [None if text is None or STATEMENT.search(text) else text for text in texts]
        question, _ = prompts.question(row, self.tokenizer, self.fmt)
        asked = {}
        for i, j in comparisons(texts):
            shown = {"judgement_a": texts[i], "judgement_b": texts[j]}
            text = self.template.fill(prompt=question, response=response, **shown)
            asked[i, j] = prompts.one_turn(row, text, self.tokenizer, self.fmt)
        return {(i, j): ids for (i, j), ids in asked.items() if max(len(ids), len(asked[j, i])) <= self.room}


# Verdicts


def parse_winner(text: str) -> Literal["A", "B"] | None:
    """Winner by the last statement such as "Winner: Judgement A"; None if that is not clear.

    Bold, brackets, a full stop, either spelling and any case are accepted; a tie, both or another name are
    not, and no earlier statement counts in their place. Statements on the last one's line must agree with it:
    they do not where '"Winner: Judgement A" or "Winner: Judgement B"', the question's end, is repeated.
    """
    statements = list(STATEMENT.finditer(text))
    if not statements:
        return None
    line = text.rfind("\n", 0, statements[-1].start())
    found = [VERDICT.match(text, match.end()) for match in statements if match.start() > line]
    letters = {match and match["letter"].upper() for match in found}
    return letters.pop() if len(letters) == 1 else None


def tally(number: int, verdicts: Mapping[tuple[int, int], str | None]) -> np.ndarray:
    """Wins of each judgement over each other one.

    A judgement wins if both orders prefer it. The same letter twice is a preference for a place: a tie. An
    order without a clear verdict makes the comparison void.

    Args:
        number: n, of judgements.
        verdicts: by (shown as A, shown as B) the letter that won, None where none could be parsed. By who
            played, so that a pair which was left out shifts nobody else's results.

    Returns:
        [n, n] float64, W[a, b] = wins of a over b; of a tie each of the two has half.
    """
    wins = np.zeros((number, number))
    for (i, j), verdict in verdicts.items():
        swapped = verdicts.get((j, i))
        if verdict and swapped:  # half a win for each order that prefers i; (j, i) comes in its own turn
            wins[i, j] = (verdict == "A") / 2 + (swapped == "B") / 2
    return wins


def bradley_terry(wins: np.ndarray, prior: float = 1.0) -> np.ndarray:
    """Strengths t of players with P(a beats b) = s(t_a - t_b), s the logistic function (Bradley and Terry).

        maximise  sum_ab W[a, b] log s(t_a - t_b) - prior / 2 |t|^2

    The Gaussian prior keeps the strength of one who always wins finite and makes the maximum unique. Newton's
    method, in float64, until no part of the gradient is above 1e-12 of the number of games (or of 1).

    Args:
        wins: [n, n] W, wins of a over b, 0 or more.
        prior: inverse variance of a strength, above 0.

    Returns:
        [n] t in nats, their mean 0; NaN for a player without any comparison.
    """

    def objective(t: np.ndarray) -> float:
        return -(wins * np.logaddexp(0, t - t[:, None])).sum() - prior / 2 * t @ t

    t = np.zeros(len(wins))
    while True:
        upset = np.exp(-np.logaddexp(0, t[:, None] - t))  # [n, n] P(b beats a)
        gradient = (wins * upset).sum(1) - (wins * upset).sum(0) - prior * t
        if np.abs(gradient).max(initial=0.0) <= 1e-12 * max(1.0, wins.sum()):
            break
        weights = (wins + wins.T) * upset * upset.T
        curvature = np.diag(weights.sum(1) + prior) - weights  # minus the Hessian: positive definite
        step, present = np.linalg.solve(curvature, gradient), objective(t)
        while objective(t + step) < present - 1e-12 * max(1.0, -present):  # lower by more than rounding
            step /= 2
        t = t + step
    return np.where((wins + wins.T).any(1), t, np.nan)


def elo(strengths: np.ndarray) -> np.ndarray:
    """Strengths in nats as Elo ratings: 1000 on average, and 400 more for odds of 10 to 1."""
    return 1000 + 400 / math.log(10) * strengths


def best_and_worst(
    strengths: np.ndarray, scores: Sequence[float | None], ids: Sequence[np.ndarray]
) -> tuple[int, int] | None:
    """The judgements of a preference pair by number: the strongest and the weakest, the first of several.

    Of each judgement, [n]: strength in nats (NaN: not compared), the score that it gave, its tokens. None if
    fewer than two were compared, or if the two are equally strong, gave one score or are the same tokens.
    """
    if np.isnan(strengths).all():
        return None
    best = int(np.flatnonzero(strengths >= np.nanmax(strengths) - SAME)[0])
    worst = int(np.flatnonzero(strengths <= np.nanmin(strengths) + SAME)[0])  # if all are equal, the best
    same_score, same_ids = scores[best] == scores[worst], np.array_equal(ids[best], ids[worst])
    return None if same_score or same_ids else (best, worst)


# What is trained


class Pair(Protocol):
    """Fields of a preference pair that the buffer needs."""

    @property
    def chosen_reward(self) -> float: ...  # the score that the chosen judgement gave


P = TypeVar("P", bound=Pair)


class Buffer(Generic[P]):
    """Pairs of judgements that wait to be trained on, with no score among the chosen in too large a share."""

    def __init__(self, low: float, high: float, cap: float):
        """--judge-low and --judge-high, and the share at which a class, scores rounded down to one, is full.

        Raises UserError if the cap lets no pair in: from the beginning each class counts as one.
        """
        self.classes, self.cap = range(math.floor(low), math.floor(high) + 1), cap
        if 1 / len(self.classes) >= cap:
            raise UserError(
                f"--meta-judge-class-cap {cap} must be above 1/{len(self.classes)}: --judge-low {low} to "
                f"--judge-high {high} has {len(self.classes)} classes of scores"
            )
        self.clear()

    def clear(self) -> None:
        """The start of an iteration: nothing waits, and each class counts 1."""
        self.waiting: deque[P] = deque()
        self.counts = dict.fromkeys(self.classes, 1)  # pairs taken in since then, plus 1, by chosen score

    def __len__(self) -> int:
        return len(self.waiting)

    def offer(self, pair: P) -> bool:
        """Takes a pair in, unless the class of its chosen score is full. Was it taken in?"""
        number = math.floor(pair.chosen_reward)
        if self.counts[number] / sum(self.counts.values()) >= self.cap:
            return False
        self.counts[number] += 1
        self.waiting.append(pair)
        return True

    def take(self, number: int) -> list[P]:
        """The `number` oldest pairs, at most all, which then wait no longer; they go on counting."""
        return [self.waiting.popleft() for _ in range(min(number, len(self)))]


def num_meta(good: int, waiting: int, size: int, fraction: float) -> int:
    """Number of judgement pairs in a batch: the largest m with m <= fraction min(size, good + m).

    They take the places of bad pairs of answers first, then of good ones; the minimum is what is trained.

    Args:
        good: pairs of answers that can be trained.
        waiting: pairs of judgements that there are.
        size: places in the batch.
        fraction: --meta-judge-fraction.
    """
    most = range(min(waiting, size) + 1)
    return max(m for m in most if m <= fraction * min(size, good + m) + 1e-9)  # 0.29 * 100 is below 29


def mix(pairs: Sequence[P | None], buffer: Buffer[P], fraction: float) -> list[P]:
    """A batch: the good pairs of answers in their order, then pairs of judgements out of the buffer.

    `pairs`: one for each place, None where it is bad; if there is no place for all good ones, the last go.
    """
    good = [pair for pair in pairs if pair is not None]
    taken = buffer.take(num_meta(len(good), len(buffer), len(pairs), fraction))
    return good[: len(pairs) - len(taken)] + taken
