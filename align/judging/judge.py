"""LLM-as-a-judge (Self-Rewarding Language Models, arXiv 2401.10020): the policy scores its own responses.

A template turns a question and a response into a judge prompt, the score is read from the end of the policy's
judgement, and the scores of all responses to a prompt decide the pair to train on. No model in here.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, pvariance  # exact but for one last rounding: equal scores have no variance
from typing import Literal, get_args

import numpy as np

from align.data.formats import FormatConfig
from align.data.templates import Template
from align.data.tokenizer import Tokenizer
from align.errors import UserError
from align.files import ASSETS
from align.flags import REPEATS, SCORE, check_ranges
from align.generation.rollout import Sample
from align.judging import render

Reason = Literal["few", "tied", "overlap", "identical"]
REASONS: tuple[Reason, ...] = get_args(Reason)
SAME = 1e-9  # of the range of means, far above rounding and far below a difference of judgements

NUMBER = re.compile(r"\d+(?:\.\d+)?")
# read as spaces: marks of Markdown, JSON, LaTeX and XML around a statement, and white space but line ends
MARKS = str.maketrans(dict.fromkeys("*_`\"'$\\[]{}<#\t\r\u00a0\u202f", " "))
STATEMENT = re.compile(  # of a text without MARKS; repetitions are bounded, so that no text takes long
    r"""
    [ ]{0,8} (?: \b (?: final | total | overall ) [ ]{1,4} ){0,2}
    \b (?: score | points ) \b               # whole words: neither Scoreboard nor Scores
    (?: [ ]{1,4} for (?: [ ]{1,4} \w+ ){1,6}? )?          # Score for this response: 4
    (?: [ ]{0,4} \( (?P<range> [^()\n]{0,40} ) \) )?      # Score (0-5): 4
    (?: [ ]{0,8} (?: [:：=|—–] | -{1,3} (?=[ ]) )         # Score: 4, Score = 4, Score - 4
      | >                                                 # <score>4</score>
      | [ ]{1,4} (?P<prose> is | of ) \b                  # the score is 4, a score of 4
      | (?= [ ]{0,8} \n )                                 # a heading
    )
    (?: [ ]{0,8}                                          # the number on the same line
      | \s{0,8} \n [ ]{0,8}                               # or on one below, with nothing else: no list item
        (?= [-−–(]{0,2} [\d.]+ [^\w\n]{0,8} (?: points? | out | of | \d | \n | \Z ) )
    )
    (?: (?: total (?: [ ] points )? | boxed ) [ >]{1,4} )?  # Score: <total points> 4, $\boxed{4}$
    \(?
    (?: \d+ (?: [ ]? \+ [ ]? \d+ )+ [ ]? = [ ]? )?        # 1 + 1 + 1 = 3
    (?P<value> [-−–]? (?: \d+ (?: \.\d+ )? | \.\d+ ) )
    (?P<more> \w+ | [ ]?%                                 # 1e3, 4th, 80 %: no plain number
      | [.,:]\d+                                          # 4,5: four and a half, or 4 and 5?
      | [ ]{0,3} (?: [-−–+±×] | (?: to | or | and ) \b ) [ ]{0,3} \d+  # 4-5, 4 or 5, 1 + 1
    )?
    (?: [ ]{0,3} points? \b )?
    (?: [ ]{0,3} \(?                                      # 4/5, 4 out of a possible 5
        (?: / | (?: out [ ]{1,3} )? of \b (?: [ ]{1,3} [a-z]+ ){0,3}? ) [ ]{0,3} (?P<scale> \d+ (?: \.\d+ )? )
    )?
    (?: [ ]{0,3} points? \b )?
    [.)>]{0,2} [ ]{0,8}
    """,
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True)
class JudgeConfig:
    """Judging of responses."""

    judgements: int = 3
    """judgements per response, whose mean is its score"""
    judge_template: Path = ASSETS / "judge.txt"
    """judge prompt: text file with {{ prompt }} and {{ response }} in it, given to the judge as one user
    turn"""
    judge_low: float = 0.0
    """lowest valid score: a judgement below it is not counted"""
    judge_high: float = 5.0
    """highest valid score: a judgement above it is not counted, nor one on another scale, such as 4/10"""

    def __post_init__(self):
        check_ranges(self, judgements=REPEATS, judge_low=SCORE, judge_high=SCORE)
        if self.judge_low >= self.judge_high:
            raise UserError(f"--judge-low {self.judge_low} must be below --judge-high {self.judge_high}")


class Judge:
    """Judge prompts, and the scores in judgements."""

    def __init__(self, config: JudgeConfig, tokenizer: Tokenizer, fmt: FormatConfig, room: int):
        """`room`: most tokens of a judge prompt."""
        self.config, self.tokenizer, self.fmt, self.room = config, tokenizer, fmt, room
        self.template = Template(config.judge_template, "--judge-template", ("prompt", "response"))

    def prompt(self, row: dict, response: str) -> tuple[np.ndarray | None, bool]:
        """The judge prompt of a response to an SFT row, [n] int32, n <= room; True if the whole is too long.

        A prompt that is too long has the last turn in place of the whole conversation, then a truncated
        response. None if not even a character of the response fits: that response is not judged (NeMo-Aligner
        had a dummy question judged in its place, and the score counted).
        """
        conversation, turn = render.question(row, self.tokenizer, self.fmt)
        ids = self.encode(row, conversation, response)
        if len(ids) <= self.room:
            return ids, False
        ids, kept = self.encode(row, turn, response), self.tokenizer.encode(response)
        while len(ids) > self.room:  # the shorter text may have other tokens: one cut may not suffice
            kept = kept[: -(len(ids) - self.room)]
            shorter = self.tokenizer.decode(kept).rstrip("\ufffd")  # half a character
            if not shorter:
                return None, True
            ids = self.encode(row, turn, shorter)
        return ids, True

    def check(self, row: dict) -> None:
        """Raise UserError if the template alone is too long, in the format of `row`."""
        if len(self.encode(row, "x", "x")) > self.room:
            room = f"the {self.room} tokens that --max-new-tokens leaves of the model's context"
            trained = "with --meta-judge, of half of --micro-batch-tokens as well: trained on in pairs"
            flag = f"--judge-template {self.config.judge_template}"
            raise UserError(f"{flag} alone is longer than {room} ({trained})")

    def encode(self, row: dict, question: str, response: str) -> np.ndarray:
        """Ids [n] int32 of a judge prompt of any length, in the format of `row`."""
        text = self.template.fill(prompt=question, response=response)
        return render.one_turn(row, text, self.tokenizer, self.fmt)

    def scores(self, texts: Sequence[str | None], response: str) -> tuple[float | None, ...]:
        """Read the scores of judgements of a response; None for a judgement without one in range.

        If the deciding statement of a judgement is in the response, as in a quotation, no judgement counts:
        the response can neither raise its score nor select its judgements.
        """
        if any(text is not None and quotes(text, response) for text in texts):
            return (None,) * len(texts)
        low, high = self.config.judge_low, self.config.judge_high
        return tuple(None if text is None else parse_score(text, low, high) for text in texts)


def statements(text: str) -> list[re.Match]:
    """Statements of a score in a judgement, such as "**Total points:** 3/5"; spans are in `text`."""
    return list(STATEMENT.finditer(text.translate(MARKS)))


def parse_score(text: str, low: float, high: float) -> float | None:
    """Read the last score of a judgement; None without one.

    "a score of 4" and "the score is 4" count only without a statement of the form "Score: 4", after which
    they explain other scores. The last statement decides, never an earlier one: None if its number is outside
    [low, high] or unclear (4-5, 4 or 5, 4,5, 80 %), or if it names another best score than `high` (4/10). A
    sum counts with its result: "Score: 1 + 1 + 1 = 3".
    """
    last = deciding(text)
    if last is None:
        return None
    best = [float(number) for number in NUMBER.findall(f"{last['range'] or ''} {last['scale'] or ''}")]
    if last["more"] or (best and max(best) != high):
        return None
    value = float(re.sub("[−–]", "-", last["value"]))
    return value if low <= value <= high else None


def deciding(text: str) -> re.Match | None:
    """The statement that decides the score of a judgement."""
    matches = statements(text)
    return ([match for match in matches if not match["prose"]] or matches)[-1] if matches else None


def quotes(judgement: str, response: str) -> bool:
    """True if the deciding statement of a judgement is in the response as well, as in a quotation."""
    last = deciding(judgement)
    return last is not None and bare(last) in map(bare, statements(response))


def bare(statement: re.Match) -> str:
    """The characters of a statement without case, white space, and trailing marks."""
    return "".join(statement[0].lower().split()).strip(".)>")


def without_scores(text: str) -> str:
    """A judgement without the statements of `parse_score`, stripped: its reasons only."""
    spans = [match.span() for match in statements(text)]
    starts, ends = [0, *(end for _, end in spans)], [*(start for start, _ in spans), len(text)]
    return " ".join(text[start:end] for start, end in zip(starts, ends, strict=True)).strip()


@dataclass(frozen=True)
class Judged:
    """Scores of the judgements of one response."""

    scores: tuple[float | None, ...]  # [judgements], None: no score could be read; () if not judged

    @property
    def valid(self) -> list[float]:
        """The scores that could be read."""
        return [score for score in self.scores if score is not None]

    @property
    def mean(self) -> float | None:
        """Mean score of the response; None without a score."""
        return mean(self.valid) if self.valid else None

    @property
    def variance(self) -> float:
        """Population variance of the scores, 0 without any."""
        return pvariance(self.valid) if self.valid else 0.0

    @property
    def agreement(self) -> float | None:
        """Share of equal scores among all pairs of scores; None with fewer than two."""
        pairs = list(combinations(self.valid, 2))
        return sum(a == b for a, b in pairs) / len(pairs) if pairs else None


def statistics(judged: Iterable[Judged]) -> dict[str, float]:
    """Means over judged responses; a mean over nothing is left out.

    judge_mean, judge_variance: of responses with a score. judge_agreement: of responses with two.
    judge_unparsed: share of judgements without a readable score.
    """
    responses = list(judged)
    values: dict[str, list] = {
        "judge_mean": [response.mean for response in responses if response.valid],
        "judge_variance": [response.variance for response in responses if response.valid],
        "judge_agreement": [r.agreement for r in responses if r.agreement is not None],
        "judge_unparsed": [score is None for response in responses for score in response.scores],
    }
    return {name: float(np.mean(numbers)) for name, numbers in values.items() if numbers}


@dataclass(frozen=True)
class Choice:
    """Numbers of the two responses to train on, or the reason for none."""

    chosen: int | None = None
    rejected: int | None = None
    why: Reason | None = None


def choose(samples: Sequence[Sample], judged: Sequence[Judged], length_control: float) -> Choice:
    """Choose a pair of the responses to one prompt (both arguments [responses]) that ended and have a mean.

    `length_control` is rho in [0, 1]. The chosen response has a mean in [(1 - rho) max + rho min, max], the
    rejected one in [min, (1 - rho) min + rho max]:
        rho = 0: the response whose scores have the lowest variance, of several the first;
        rho > 0: the shortest chosen and the longest rejected, in tokens; of several the one with the higher
            mean as chosen and with the lower as rejected, of these the first.
    No pair if fewer than two responses are left ("few"), if their means are equal ("tied"), if both sides are
    the same response or have the same tokens ("identical"), and if the chosen one has the lower mean
    ("overlap"). The same response on both sides, or the lower mean chosen, is possible for rho >= 0.5 only.
    """
    pairs = enumerate(zip(samples, judged, strict=True))
    means = {k: j.mean for k, (sample, j) in pairs if sample.finish == "stop" and j.mean is not None}
    if len(means) < 2:
        return Choice(why="few")
    low, high = min(means.values()), max(means.values())
    if low == high:
        return Choice(why="tied")
    # max and min become 1 and 0 exactly, so that no side is ever empty
    scaled = {k: (m - low) / (high - low) for k, m in means.items()}
    good = [k for k in scaled if scaled[k] >= 1 - length_control - SAME]
    bad = [k for k in scaled if scaled[k] <= length_control + SAME]
    if length_control > 0:
        chosen = min(good, key=lambda k: (len(samples[k].ids), -means[k]))
        rejected = min(bad, key=lambda k: (-len(samples[k].ids), means[k]))
    else:
        chosen, rejected = (min(side, key=lambda k: judged[k].variance) for side in (good, bad))
    if means[chosen] < means[rejected]:
        return Choice(why="overlap")
    if np.array_equal(samples[chosen].ids, samples[rejected].ids):
        return Choice(why="identical")
    return Choice(chosen, rejected)
