"""Meta-judging (Meta-Rewarding, arXiv 2407.19594): pairwise comparison of judgements of one response.

The policy compares its own judgements, each two of them in both orders. A Bradley-Terry model of the verdicts
gives each judgement a strength; the best and the worst become a preference pair that trains the policy as a
judge. No model in here, and no process group.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from align.data.formats import FormatConfig
from align.data.templates import Template
from align.data.tokenizer import Tokenizer
from align.errors import UserError
from align.files import ASSETS
from align.flags import above, between, check_ranges, refuse_unused
from align.judging import render
from align.judging.judge import Judged

Order = tuple[int, int]  # numbers of the judgements shown as A and as B
NAMES = ("prompt", "response", "judgement_a", "judgement_b")  # variables of the template
SAME = 1e-9  # nats; strengths that differ by less are equal: the solver's rounding is far below
# "Winner:", "**Winner:**", "winner is"; an underscore may be markup, so \b would not do
STATEMENT = re.compile(r"""(?<![^\W_])winner[*_`"']*(?:\s*[:=]|\s+[-–—]\s|\s+is\b)""", re.I)
VERDICT = re.compile(  # after STATEMENT: "Judgement A", "[B].", "**judgment a**, because ..."
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


def usable(scores: Sequence[float | None], ended: Sequence[bool]) -> list[int]:
    """Numbers of the judgements of one response with a score and an end. Both arguments [judgements]."""
    pairs = enumerate(zip(scores, ended, strict=True))
    return [i for i, (score, end) in pairs if score is not None and end]


def candidate(judged: Sequence[Judged], ended: Sequence[Sequence[bool]]) -> int | None:
    """Index of the response to meta-judge: the first with the highest variance of usable scores.

    None without a variance above 0. `judged`: [responses]; `ended`: [responses][judgements], not truncated.
    """
    variances = [  # exact but for one last rounding: equal scores give 0, and equal spreads a tie
        Judged(tuple(response.scores[i] for i in usable(response.scores, ends))).variance
        for response, ends in zip(judged, ended, strict=True)
    ]
    highest = max(variances, default=0.0)
    return variances.index(highest) if highest > 0 else None


def comparisons(texts: Sequence[str | None]) -> list[Order]:
    """Pairs of judgements to compare, in both orders: (0, 1), (1, 0), (0, 2), (2, 0), ...

    Without pairs of equal texts, and without empty ones, which were scores only. `texts`: [judgements]
    without their scores, which the comparison must not show; None: not usable.
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
        """Raise UserError if the template alone is too long, in the format of `row`."""
        text = self.template.fill(**dict.fromkeys(NAMES, "x"))
        if len(render.one_turn(row, text, self.tokenizer, self.fmt)) > self.room:
            room = f"the {self.room} tokens that --max-new-tokens leaves of the model's context"
            flag = f"--meta-judge-template {self.config.meta_judge_template}"
            raise UserError(f"{flag} alone is longer than {room} and of half of --micro-batch-tokens")

    def prompts(self, row: dict, response: str, texts: Sequence[str | None]) -> dict[Order, np.ndarray]:
        """Prompts of all comparisons of a response's judgements, [n] int32.

        Without pairs of which an order is too long, or a text states a winner, which the verdict could quote.
        `row`: of SFT data, the prompt of `response`; `texts`: as in `comparisons`.
        """
        if STATEMENT.search(response):
            return {}
        texts = [None if text is None or STATEMENT.search(text) else text for text in texts]
        question, _ = render.question(row, self.tokenizer, self.fmt)
        prompts = {}
        for i, j in comparisons(texts):
            a, b = texts[i], texts[j]
            assert a is not None and b is not None
            text = self.template.fill(prompt=question, response=response, judgement_a=a, judgement_b=b)
            prompts[i, j] = render.one_turn(row, text, self.tokenizer, self.fmt)
        fitting = {order for order, ids in prompts.items() if len(ids) <= self.room}
        return {(i, j): prompts[i, j] for i, j in prompts if {(i, j), (j, i)} <= fitting}


def parse_winner(text: str) -> str | None:
    """Read the winner, "A" or "B", from the last statement such as "Winner: Judgement A"; None if unclear.

    Bold, brackets, a full stop, either spelling and any case are accepted; a tie, both or another name are
    not, and no earlier statement counts in their place. Statements on the last one's line must agree with it,
    unlike in a repetition of the question's end, '"Winner: Judgement A" or "Winner: Judgement B"'.
    """
    statements = list(STATEMENT.finditer(text))
    if not statements:
        return None
    line = text.rfind("\n", 0, statements[-1].start())
    verdicts = [VERDICT.match(text, match.end()) for match in statements if match.start() > line]
    letters = {match and match["letter"].upper() for match in verdicts}
    return letters.pop() if len(letters) == 1 else None


def tally(number: int, verdicts: Mapping[Order, str | None]) -> np.ndarray:
    """Count the wins of each of n = `number` judgements: [n, n] float64, W[a, b] = wins of a over b.

    A judgement wins if both orders prefer it. The same letter twice is a position bias: a tie, half a win for
    each. An order without a clear verdict (None in `verdicts`) makes the comparison void.
    """
    wins = np.zeros((number, number))
    for (i, j), verdict in verdicts.items():
        swapped = verdicts.get((j, i))
        if verdict and swapped:  # half a win for each order that prefers i; (j, i) is counted by itself
            wins[i, j] = (verdict == "A") / 2 + (swapped == "B") / 2
    return wins


def bradley_terry(wins: np.ndarray, prior: float = 1.0) -> np.ndarray:
    """Fit the Bradley-Terry model P(a beats b) = s(t_a - t_b), s the logistic function, t the strengths.

        maximise  sum_ab W[a, b] log s(t_a - t_b) - prior / 2 |t|^2

    The Gaussian prior keeps the strength of an undefeated player finite, and the maximum unique. Newton's
    method, in float64, until no part of the gradient is above 1e-12 of the number of games (or of 1).
    `wins`: [n, n] W, 0 or more; `prior`: inverse variance of a strength, above 0. Returns [n] t in nats, of
    mean 0; NaN for a player without any comparison.
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
    """Numbers of the strongest and the weakest judgement, of several the first.

    Arguments [n] by judgement: strength in nats (NaN: not compared), score, tokens. None if fewer than two
    were compared, or if the two have equal strengths, scores or tokens.
    """
    if np.isnan(strengths).all():
        return None
    best = int(np.flatnonzero(strengths >= np.nanmax(strengths) - SAME)[0])
    worst = int(np.flatnonzero(strengths <= np.nanmin(strengths) + SAME)[0])  # if all are equal, the best
    is_equal = scores[best] == scores[worst] or np.array_equal(ids[best], ids[worst])
    return None if is_equal else (best, worst)
