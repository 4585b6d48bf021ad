"""Meta-judging: verdicts as models write them, Bradley-Terry against slow oracles, and batches by hand."""

import itertools
import json
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from align.data.formats import FormatConfig
from align.data.templates import Template
from align.data.tokenizer import load_tokenizer
from align.errors import UserError
from align.judging import meta_judge, render
from align.judging.judge import Judged
from align.judging.meta_judge import MetaJudge, MetaJudgeConfig
from align.judging.pairs import Buffer, mix, num_judgement_pairs
from tests.support.files import ROOT

ASSET = ROOT / "assets" / "meta_judge.txt"
NAMES = ("prompt", "response", "judgement_a", "judgement_b")


@dataclass(frozen=True)
class Pair:
    """A preference pair as the buffer sees it."""

    name: str
    chosen_reward: float = 0.0


# Flags and the template


def test_defaults():
    config = MetaJudgeConfig()
    assert (config.meta_judge, config.meta_judge_fraction, config.meta_judge_class_cap) == (False, 0.15, 0.4)
    assert config.meta_judge_template == ASSET


def test_flags_at_the_ends_of_their_ranges():
    for fraction, cap in [(1e-9, 1.0), (0.999, 1e-9)]:
        config = MetaJudgeConfig(True, fraction, cap)
        assert (config.meta_judge_fraction, config.meta_judge_class_cap) == (fraction, cap)


def test_the_template_takes_four_texts_and_asks_for_what_is_parsed():
    template = Template(ASSET, "--meta-judge-template", NAMES)
    text = template.fill(prompt="PPP", response="RRR", judgement_a="first", judgement_b="second")
    assert "{{" not in text and "}}" not in text
    for piece in (
        "<question>\nPPP\n</question>",
        "<response>\nRRR\n</response>",
        "<judgement_a>\nfirst\n</judgement_a>",
        "<judgement_b>\nsecond\n</judgement_b>",
    ):
        assert text.count(piece) == 1
    assert text.endswith('"Winner: Judgement A" or "Winner: Judgement B".\n')
    assert max(map(len, text.splitlines())) <= 110
    assert meta_judge.parse_winner(text) is None  # a judge that repeats the request has not decided


# What is compared


def test_usable_judgements_gave_a_score_and_ended():
    assert meta_judge.usable((3.0, None, 0.0, 4.0, None), (True, True, True, False, False)) == [0, 2]
    assert meta_judge.usable((), ()) == []


ALL = (True, True, True)


@pytest.mark.parametrize(
    "answers, chosen",
    [
        ([], None),
        ([((), ())], None),  # not judged
        ([((3.0, 3.0, 3.0), ALL)], None),
        ([((0.1, 0.1, 0.1), ALL)], None),  # whose mean, summed in floats, is another number
        ([((3.0, None, None), ALL)], None),
        ([((3.0, None, 5.0), ALL)], 0),
        ([((3.0, 4.0, 5.0), (True, False, False))], None),
        ([((3.0, 4.0, 4.0), (False, True, True))], None),  # varies only with one that did not end
        ([((3.0, 4.0, 5.0), ALL), ((1.0, 3.0, 5.0), ALL), ((2.0, 2.0, 5.0), ALL)], 1),  # 2/3, 8/3, 2
        ([((2.0, 2.0, 5.0), ALL), ((1.0, 3.0, 5.0), (True, True, False))], 0),  # 2, 1 of the two that ended
        ([((1.0, 1.0, 2.0), ALL), ((2.0, 1.0, 1.0), ALL)], 0),  # a tie
        ([((2.0, 1.0, 1.0), ALL), ((1.0, 1.0, 2.0), ALL)], 0),
        ([((), ()), ((4.0, 4.0, 4.0), ALL), ((4.0, 5.0, 4.0), ALL), ((0.0, 0.0, 1.0), ALL)], 2),
        (
            [((0.0, 5.0), (True, True)), ((0.0, 5.0, 2.5), ALL)],
            0,
        ),  # 6.25 and 4.17: a variance, no sum
    ],
)
def test_the_answer_of_the_highest_variance(answers, chosen):
    judged, ended = [Judged(scores) for scores, _ in answers], [ends for _, ends in answers]
    assert meta_judge.candidate(judged, ended) == chosen


def test_ties_of_variance_are_exact():
    """All orders and shifts of three scores have one variance; with rounding some would beat the first."""
    judged = [
        Judged(tuple(float(score + shift) for score in scores))
        for shift in (0, 1, 2, 3)
        for scores in itertools.permutations((0, 1, 1))
    ]
    for start in range(len(judged)):
        turned = judged[start:] + judged[:start]
        assert meta_judge.candidate(turned, [ALL] * len(turned)) == 0


def test_a_judgement_without_word_on_its_end_is_an_error():
    with pytest.raises(ValueError):
        meta_judge.candidate([Judged((3.0, 4.0, 5.0))], [(True, True)])


def test_comparisons_in_both_orders():
    assert meta_judge.comparisons(["a", "b", "c"]) == [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)]


def test_comparisons_leave_out_the_equal_the_empty_and_the_unusable():
    texts = ["a", "a", "", None, "b", ""]
    assert meta_judge.comparisons(texts) == [(0, 4), (4, 0), (1, 4), (4, 1)]
    for none in ([], ["a"], ["a", "a"], ["", ""], ["a", None], [None, None]):
        assert meta_judge.comparisons(none) == []


# Prompts

ROW = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
SHORT = "{{ prompt }}|{{ response }}|{{ judgement_a }}|{{ judgement_b }}"


def short_judge(tmp_path: Path, room: int) -> MetaJudge:
    (tmp_path / "short.txt").write_text(SHORT)
    config = MetaJudgeConfig(meta_judge=True, meta_judge_template=tmp_path / "short.txt")
    return MetaJudge(config, load_tokenizer(ROOT / "assets" / "tiny"), FormatConfig(), room)


def test_prompts_show_both_orders_as_one_turn(tmp_path):
    judge = short_judge(tmp_path, 1000)
    asked = judge.prompts(ROW, "The {{ prompt }}.", ["one", "two", None])
    assert list(asked) == [(0, 1), (1, 0)]
    for order, text in {
        (0, 1): "Why?|The {{ prompt }}.|one|two",
        (1, 0): "Why?|The {{ prompt }}.|two|one",
    }.items():
        expected = render.one_turn(ROW, text, judge.tokenizer, judge.fmt)
        assert asked[order].dtype == np.int32 and asked[order].tolist() == expected.tolist()


def test_prompts_beyond_the_room_are_left_out(tmp_path):
    """With the tiny tokenizer a letter is a token, so that the two longer judgements alone are too long."""
    texts = ["a", "bb", "ccc"]
    asked = short_judge(tmp_path, 1000).prompts(ROW, "So.", texts)
    longest = {order: len(ids) for order, ids in asked.items()}
    assert longest[0, 2] == longest[0, 1] + 1 and longest[1, 2] == longest[0, 1] + 2
    room = longest[0, 2]
    assert list(short_judge(tmp_path, room).prompts(ROW, "So.", texts)) == [(0, 1), (1, 0), (0, 2), (2, 0)]
    assert list(short_judge(tmp_path, room - 1).prompts(ROW, "So.", texts)) == [(0, 1), (1, 0)]
    assert short_judge(tmp_path, room - 2).prompts(ROW, "So.", texts) == {}


def test_a_template_without_any_room_is_refused(tmp_path):
    longest = len(render.one_turn(ROW, "x|x|x|x", load_tokenizer(ROOT / "assets" / "tiny"), FormatConfig()))
    short_judge(tmp_path, longest).check(ROW)
    with pytest.raises(UserError, match=rf"short.txt alone is longer than the {longest - 1} tokens that"):
        short_judge(tmp_path, longest - 1).check(ROW)


def test_both_orders_go_if_one_is_too_long(tmp_path, monkeypatch):
    """If tokens merge, the two orders can have different lengths: 6 with "b" first, else 5."""
    monkeypatch.setattr(render, "one_turn", lambda row, text, *_: np.zeros(5 + ("|b|" in text), np.int32))
    lengths = {
        order: len(ids) for order, ids in short_judge(tmp_path, 6).prompts(ROW, "", ["a", "b"]).items()
    }
    assert lengths == {(0, 1): 5, (1, 0): 6}
    assert short_judge(tmp_path, 5).prompts(ROW, "", ["a", "b"]) == {}


# Verdicts

WINNERS = (
    ("Winner: Judgement A", "A"),
    ("Winner: Judgement B", "B"),
    ("Winner: Judgment B.", "B"),
    ("**Winner:** Judgement A", "A"),
    ("**Winner**: Judgement A", "A"),
    ("Winner: **Judgement A**", "A"),
    ("**Winner: Judgement B**", "B"),
    ("_Winner:_ _Judgement B_", "B"),
    ("Winner: [Judgement A]", "A"),
    ("Winner: Judgement [B].", "B"),
    ("Winner: `Judgement B`!", "B"),
    ('"Winner: Judgement B"', "B"),
    ("Winner: <judgement_a>", "A"),
    ("winner: judgement b", "B"),
    ("WINNER: JUDGEMENT A", "A"),
    ("Winner: A", "A"),
    ("Winner: (B)", "B"),
    ("Winner:B", "B"),
    ("Winner = A", "A"),
    ("Winner - Judgement B", "B"),
    ("Winner — Judgement A", "A"),
    ("Winner is Judgement A", "A"),
    ("So the winner is judgement B, because it reads the response as it is.", "B"),
    ("Winner: Judgement A. Judgement B gave a point for nothing.", "A"),
    ("### Winner:\n\nJudgement B", "B"),
    ("Judgement A is short.\r\nWinner: Judgement B\r\n\r\n", "B"),
    # the last statement decides
    ("Winner: Judgement A\nOn reflection:\nWinner: Judgement B", "B"),
    ("Winner: Judgement A\nWinner: tie", None),
    ("Winner: tie\nWinner: Judgement A", "A"),
    ("Winner: Judgement A\nThis winner explains each point.", "A"),
    ("The winner is hard to tell.\nWinner: Judgement A", "A"),
    ("The winner is hard to tell. Winner: Judgement A", None),  # one line, two statements
    ("Winner: Judgement A. Yes: winner: Judgement A", "A"),
    ('"Winner: Judgement A" or "Winner: Judgement B"', None),
    ("Winner: Judgement A. No: winner: Judgement B", None),
    # no verdict
    ("", None),
    ("Judgement A", None),
    ("Judgement A is the winner.", None),
    ("Winner:", None),
    ("Winner Judgement A", None),
    ("Winners: Judgement A", None),
    ("Breadwinner: A", None),
    ("Winner: tie", None),
    ("Winner: neither", None),
    ("Winner: both", None),
    ("Winner: A tie", None),
    ("Winner: Judgement C", None),
    ("Winner: Judgement Above", None),
    ("Winner: Judgement AB", None),
    ("Winner: better", None),
    ("Winner: Judgement A or B", None),
    ("Winner: Judgement A and B", None),
    ("Winner: Judgement A and Judgement B", None),
    ("Winner: Judgement A/B", None),
    ("Winner: Judgement A / B", None),
    ("Winner: Judgement A|B", None),
    ("Winner: Judgement A, B", None),
    ("Winner: [Judgement A] or [Judgement B]", None),
    ("Winner: Judgement A equals Judgement B", None),
    ("Winner: A.B", None),
    ("Winner: Judgement 1", None),
)


@pytest.mark.parametrize("text, winner", WINNERS)
def test_parse_winner(text, winner):
    assert meta_judge.parse_winner(text) == winner
    assert (
        meta_judge.parse_winner(f"The winner should be exact.\nWinner: tie\n{text}\nThat is all.") == winner
    )


def test_tally_of_every_two_verdicts():
    for first, second, wins in [
        ("A", "B", (1.0, 0.0)),  # both orders for player 0
        ("B", "A", (0.0, 1.0)),
        ("A", "A", (0.5, 0.5)),  # always the first place
        ("B", "B", (0.5, 0.5)),
        ("A", None, (0.0, 0.0)),
        (None, "A", (0.0, 0.0)),
        ("B", None, (0.0, 0.0)),
        (None, "B", (0.0, 0.0)),
        (None, None, (0.0, 0.0)),
    ]:
        for verdicts in ({(0, 1): first, (1, 0): second}, {(1, 0): second, (0, 1): first}):
            tally = meta_judge.tally(2, verdicts)
            assert tally.dtype == np.float64
            assert tally.tolist() == [[0.0, wins[0]], [wins[1], 0.0]]


def test_tally_finds_results_by_player():
    """0 and 1 are not compared, 2 and 3 in one order only; 2 beats 0, 1 beats 2, 0 and 3 tie."""
    verdicts = {(0, 2): "B", (2, 0): "A", (1, 2): "A", (2, 1): "B", (2, 3): "A", (3, 0): "B", (0, 3): "B"}
    wins = np.zeros((4, 4))
    wins[2, 0] = wins[1, 2] = 1.0
    wins[0, 3] = wins[3, 0] = 0.5
    assert meta_judge.tally(4, verdicts).tolist() == wins.tolist()
    assert meta_judge.tally(3, {}).tolist() == np.zeros((3, 3)).tolist()


# Bradley-Terry


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def objective(wins: np.ndarray, strengths: np.ndarray, prior: float) -> float:
    """By its definition, pair by pair."""
    games = itertools.product(range(len(wins)), repeat=2)
    fit = sum(wins[a, b] * math.log(sigmoid(strengths[a] - strengths[b])) for a, b in games)
    return fit - prior / 2 * float((strengths**2).sum())


def gradient(wins: np.ndarray, strengths: np.ndarray, prior: float) -> np.ndarray:
    """By hand: each win of a over b pulls a up and b down by the odds that were against it."""
    pull = -prior * strengths
    for a, b in itertools.product(range(len(wins)), repeat=2):
        against = wins[a, b] * sigmoid(strengths[b] - strengths[a])
        pull[a] += against
        pull[b] -= against
    return pull


def ascent(wins: np.ndarray, prior: float) -> np.ndarray:
    """The maximum by plain gradient ascent, at a rate below 2 over the largest curvature."""
    strengths = np.zeros(len(wins))
    rate = 1 / (prior + (wins + wins.T).sum(1).max())
    for _ in range(200_000):
        pull = gradient(wins, strengths, prior)
        if np.abs(pull).max() < 1e-11:
            return strengths
        strengths = strengths + rate * pull
    raise AssertionError("no convergence")


def random_wins(rng: np.random.Generator, number: int) -> np.ndarray:
    """As they come from verdicts: of each pair a win, a loss, a tie or nothing."""
    wins = np.zeros((number, number))
    for a, b in itertools.combinations(range(number), 2):
        wins[a, b], wins[b, a] = [(1, 0), (0, 1), (0.5, 0.5), (0, 0)][rng.integers(4)]
    return wins


def root(falling: Callable[[float], float]) -> float:
    """Zero of a falling function between 0 and 10, by bisection."""
    low, high = 0.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return low


@pytest.mark.parametrize("prior", [1.0, 0.25, 4.0])
def test_one_win_between_two_players(prior):
    """By symmetry t_b = -t_a, and the derivative in t_a is 0: s(-2 t_a) = prior t_a."""
    strength = root(lambda t: sigmoid(-2 * t) - prior * t)
    strengths = meta_judge.bradley_terry(np.array([[0.0, 1.0], [0.0, 0.0]]), prior)
    np.testing.assert_allclose(strengths, [strength, -strength], rtol=0, atol=1e-12)


def test_the_prior_is_1_if_none_is_given():
    wins = np.array([[0.0, 1.0], [0.0, 0.0]])
    assert meta_judge.bradley_terry(wins).tolist() == meta_judge.bradley_terry(wins, 1.0).tolist()


def test_a_weak_prior_leaves_the_log_odds():
    """3 wins to 1 between two: their strengths differ by log 3."""
    strengths = meta_judge.bradley_terry(np.array([[0.0, 3.0], [1.0, 0.0]]), prior=1e-9)
    assert strengths[0] - strengths[1] == pytest.approx(math.log(3), abs=1e-7)


def test_ties_alone_make_all_equal():
    wins = np.full((4, 4), 0.5)
    np.fill_diagonal(wins, 0)
    assert meta_judge.bradley_terry(wins).tolist() == [0.0] * 4


def test_one_sided_results_are_finite_and_in_order():
    """0 > 1, 0 > 2, 1 > 2. By symmetry t = (x, 0, -x) with s(-x) + s(-2 x) = x."""
    wins = np.zeros((3, 3))
    wins[0, 1] = wins[0, 2] = wins[1, 2] = 1.0
    strengths = meta_judge.bradley_terry(wins)
    strength = root(lambda x: sigmoid(-x) + sigmoid(-2 * x) - x)
    assert 0.5 < strength < 0.7
    np.testing.assert_allclose(strengths, [strength, 0.0, -strength], rtol=0, atol=1e-12)


def test_elo_by_hand():
    """Even odds differ by 0, 10 to 1 by 400, as in chess."""
    ratings = meta_judge.elo(np.array([0.0, math.log(10), -math.log(10), np.nan]))
    np.testing.assert_allclose(ratings, [1000, 1400, 600, np.nan], rtol=1e-15)


def test_a_pair_that_was_left_out_shifts_nobody():
    """0 > 2 and 2 > 1 with 0 and 1 not compared. Taken in the order of all pairs it would be 0 > 1, 2 < 0."""
    verdicts = {(0, 2): "A", (2, 0): "B", (1, 2): "B", (2, 1): "A"}
    strengths = meta_judge.bradley_terry(meta_judge.tally(3, verdicts))
    assert strengths[0] > strengths[2] > strengths[1]


def test_a_player_without_comparisons_has_no_strength_and_no_effect():
    wins = np.zeros((3, 3))
    wins[0, 2] = 1.0
    strengths = meta_judge.bradley_terry(wins)
    assert np.isnan(strengths).tolist() == [False, True, False]
    np.testing.assert_array_equal(
        strengths[[0, 2]], meta_judge.bradley_terry(np.array([[0.0, 1.0], [0.0, 0.0]]))
    )
    assert np.isnan(meta_judge.bradley_terry(np.zeros((2, 2)))).all()
    assert len(meta_judge.bradley_terry(np.zeros((0, 0)))) == 0


@pytest.mark.parametrize("prior", [1.0, 0.1])
def test_it_is_the_maximum_that_gradient_ascent_finds(prior):
    rng = np.random.default_rng(0)
    for number in (2, 3, 4, 5, 6):
        for wins in (random_wins(rng, number), random_wins(rng, number) * rng.uniform(0.1, 5)):
            strengths, expected = meta_judge.bradley_terry(wins, prior), ascent(wins, prior)
            played = (wins + wins.T).any(1)
            assert np.isnan(strengths).tolist() == (~played).tolist()
            np.testing.assert_allclose(strengths[played], expected[played], rtol=0, atol=1e-9)


def test_nothing_near_it_is_higher():
    rng = np.random.default_rng(1)
    for _ in range(20):
        wins = random_wins(rng, 4)
        best = np.nan_to_num(meta_judge.bradley_terry(wins, 0.5))
        for nudge in rng.normal(0, 1e-2, (20, 4)):
            assert objective(wins, best + nudge, 0.5) < objective(wins, best, 0.5)


def test_the_gradient_is_zero_to_1e_12():
    rng = np.random.default_rng(2)
    for _ in range(50):
        wins = random_wins(rng, 7)
        strengths = np.nan_to_num(meta_judge.bradley_terry(wins))
        assert (
            np.abs(gradient(wins, strengths, 1.0)).max() <= 1e-12 * wins.sum() + 1e-13
        )  # the sum's own rounding
        assert abs(strengths.sum()) < 1e-10


def test_a_full_newton_step_too_far_is_halved():
    """Very unequal numbers of games and a weak prior: full steps would go to and fro for ever."""
    wins = np.zeros((5, 5))
    wins[0, 1] = wins[1, 2] = wins[3, 0] = 1000.0
    wins[1, 0] = wins[4, 2] = 10.0
    wins[1, 3] = wins[4, 3] = 1.0
    strengths = meta_judge.bradley_terry(wins, prior=0.01)
    assert np.abs(gradient(wins, strengths, 0.01)).max() <= 1e-12 * 3022 + 1e-12


def test_strengths_follow_the_players():
    """Whoever is called what, each player has the same strength."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        wins, order = random_wins(rng, 6), rng.permutation(6)
        np.testing.assert_allclose(
            meta_judge.bradley_terry(wins[np.ix_(order, order)]),
            meta_judge.bradley_terry(wins)[order],
            rtol=0,
            atol=1e-10,
        )


# The pair


def ids(*rows: str) -> list[np.ndarray]:
    return [np.array([ord(letter) for letter in row], np.int32) for row in rows]


NAN = math.nan


@pytest.mark.parametrize(
    "strengths, scores, texts, pair",
    [
        ([0.0, 1.0, -1.0], (1.0, 2.0, 3.0), "abc", (1, 2)),
        ([-1.0, 0.0, 1.0], (1.0, 2.0, 3.0), "abc", (2, 0)),
        ([NAN, 0.5, NAN, -0.5], (None, 2.0, None, 3.0), "abcd", (1, 3)),
        ([0.5, 0.5, -0.5, -0.5], (1.0, 2.0, 3.0, 4.0), "abcd", (0, 2)),  # the first of several
        (
            [0.5, 0.5 + 1e-12, -0.5, -0.5 - 1e-12],
            (1.0, 2.0, 3.0, 4.0),
            "abcd",
            (0, 2),
        ),  # ties but for rounding
        ([NAN, NAN], (1.0, 2.0), "ab", None),
        ([0.5, NAN], (1.0, 2.0), "ab", None),
        ([], (), "", None),
        ([0.3, 0.3], (1.0, 2.0), "ab", None),
        ([0.3, 0.3 + 5e-10], (1.0, 2.0), "ab", None),
        ([0.3, 0.3 + 2e-9], (1.0, 2.0), "ab", (1, 0)),
        ([1.0, 0.0, -1.0], (3.0, 2.0, 3.0), "abc", None),  # the same score
        ([1.0, 0.0, -1.0], (3.0, 3.0, 2.0), "abc", (0, 2)),  # only the two of the pair count
        ([1.0, 0.0, -1.0], (3.0, 2.0, 1.0), "aba", None),  # the same tokens
        ([1.0, 0.0, -1.0], (3.0, 2.0, 1.0), "aab", (0, 2)),
    ],
)
def test_best_and_worst(strengths, scores, texts, pair):
    assert meta_judge.best_and_worst(np.array(strengths), scores, ids(*texts)) == pair


def test_tokens_of_which_one_begins_with_the_other_are_not_the_same():
    assert meta_judge.best_and_worst(np.array([1.0, -1.0]), (3.0, 2.0), ids("ab", "a")) == (0, 1)


# The buffer


def offers(buffer: Buffer, scores: list[float]) -> list[bool]:
    return [buffer.offer(Pair(str(i), score)) for i, score in enumerate(scores)]


def names(pairs: list[Pair]) -> list[str]:
    return [pair.name for pair in pairs]


def test_one_score_alone_is_soon_full():
    """Classes 0..5 count 1 each. Fives: 1/6, 2/7, 3/8 are below 0.4; 4/9 is not, and so it stays."""
    buffer = Buffer(0.0, 5.0, 0.4)
    assert offers(buffer, [5.0] * 5) == [True, True, True, False, False]
    assert buffer.counts == {0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 4}
    assert len(buffer) == 3


def test_the_cap_depends_on_the_order_of_the_offers():
    """Others make room: after a zero 4/10 = 0.4 is still full, after a two 4/11 is not, and then 5/12 is."""
    buffer = Buffer(0.0, 5.0, 0.4)
    scores = [5.0, 5.0, 5.0, 5.0, 0.0, 5.0, 2.0, 5.0, 5.0]
    assert offers(buffer, scores) == [True, True, True, False, True, False, True, True, False]
    assert names(buffer.take(9)) == ["0", "1", "2", "4", "6", "7"]
    other = Buffer(0.0, 5.0, 0.4)
    assert offers(other, [0.0, 2.0, 5.0, 5.0, 5.0, 5.0, 5.0]) == [True] * 6 + [False]


def test_scores_are_rounded_down_to_their_class():
    buffer = Buffer(0.0, 5.0, 0.4)
    assert offers(buffer, [4.0, 4.5, 4.99, 4.2, 5.0]) == [True, True, True, False, True]
    assert buffer.counts == {0: 1, 1: 1, 2: 1, 3: 1, 4: 4, 5: 2}


def test_classes_of_bounds_that_are_no_whole_numbers():
    buffer = Buffer(-0.5, 2.7, 0.5)
    assert buffer.counts == {-1: 1, 0: 1, 1: 1, 2: 1}
    assert offers(buffer, [-0.2, 2.7, 0.3]) == [True] * 3
    assert buffer.counts == {-1: 2, 0: 2, 1: 1, 2: 2}


def test_a_cap_of_1_lets_all_in():
    assert all(offers(Buffer(0.0, 1.0, 1.0), [1.0] * 100))


@pytest.mark.parametrize(
    "low, high, cap", [(0.0, 1.0, 0.4), (0.0, 1.0, 0.5), (0.0, 0.9, 1.0), (1.0, 5.0, 0.2)]
)
def test_a_cap_that_lets_nothing_in_is_refused(low, high, cap):
    with pytest.raises(UserError, match=f"--meta-judge-class-cap {cap} must be above 1/"):
        Buffer(low, high, cap)


def test_the_oldest_leave_first_and_go_on_counting():
    buffer = Buffer(0.0, 5.0, 0.4)
    offers(buffer, [1.0, 2.0, 3.0])
    assert names(buffer.take(2)) == ["0", "1"] and len(buffer) == 1
    assert buffer.offer(Pair("new", 1.0))
    assert names(buffer.take(0)) == [] and names(buffer.take(5)) == ["2", "new"] and len(buffer) == 0
    assert buffer.counts == {0: 1, 1: 3, 2: 2, 3: 2, 4: 1, 5: 1}


def test_clear_starts_an_iteration():
    buffer = Buffer(0.0, 5.0, 0.4)
    offers(buffer, [5.0] * 4)
    buffer.clear()
    assert len(buffer) == 0 and buffer.counts == dict.fromkeys(range(6), 1)
    assert offers(buffer, [5.0] * 4) == [True, True, True, False]


def test_a_buffer_goes_through_json():
    """The state in a checkpoint suffices to go on."""
    buffer = Buffer(0.0, 5.0, 0.4)
    offers(buffer, [5.0, 5.0, 5.0, 1.0])
    text = json.dumps(
        {"waiting": [vars(pair) for pair in buffer.pairs], "counts": list(buffer.counts.items())}
    )
    state, again = json.loads(text), Buffer(0.0, 5.0, 0.4)
    again.pairs, again.counts = deque(Pair(**row) for row in state["waiting"]), dict(state["counts"])
    assert again.pairs == buffer.pairs and again.counts == buffer.counts
    assert offers(again, [5.0, 0.0]) == offers(buffer, [5.0, 0.0]) == [False, True]


# The batch


@pytest.mark.parametrize(
    "good, waiting, size, fraction, number",
    [
        (20, 10, 20, 0.15, 3),  # exactly 3 of 20
        (20, 2, 20, 0.15, 2),  # no more than there are
        (20, 0, 20, 0.15, 0),
        (0, 10, 20, 0.15, 0),  # all bad: pairs of judgements alone are not trained
        (0, 10, 20, 0.99, 0),
        (1, 10, 20, 0.15, 0),  # 1 of 2 is a half
        (5, 10, 20, 0.15, 0),  # 1 of 6 is above 0.15
        (6, 10, 20, 0.15, 1),  # 1 of 7 is below
        (17, 10, 20, 0.15, 3),  # 3 bad places, 3 of 20
        (16, 10, 20, 0.15, 2),  # 2 of 18; 3 of 19 is above 0.15
        (18, 10, 20, 0.15, 3),  # 2 bad places and a good one's
        (20, 10, 20, 0.01, 0),
        (20, 10, 20, 0.05, 1),
        (100, 99, 100, 0.29, 29),  # 0.29 * 100 is 28.999999999999996 in floats
        (100, 99, 100, 0.07, 7),
        (100, 99, 100, 0.0699, 6),
        (1, 10, 4, 0.5, 1),  # 1 of 2
        (1, 10, 4, 0.75, 3),  # 3 of 4
        (1, 10, 4, 0.99, 3),  # never all
        (4, 10, 4, 0.75, 3),
        (1, 10, 1, 0.99, 0),
    ],
)
def test_num_meta_by_hand(good, waiting, size, fraction, number):
    assert num_judgement_pairs(good, waiting, size, fraction) == number


def test_num_meta_is_the_most_in_whole_numbers():
    """Against percentages in integers, where nothing is rounded."""
    for size, percent, waiting in itertools.product((1, 2, 7, 20, 64), range(1, 100, 7), (0, 1, 5, 64)):
        for good in range(size + 1):
            allowed = [m for m in range(waiting + 1) if 100 * m <= percent * min(size, good + m)]
            assert num_judgement_pairs(good, waiting, size, percent / 100) == allowed[-1]


def filled(number: int) -> Buffer:
    buffer = Buffer(0.0, 5.0, 1.0)
    for i in range(number):
        assert buffer.offer(Pair(f"judge {i}", 3.0))
    return buffer


@pytest.mark.parametrize(
    "pairs, waiting, fraction, batch",
    [
        ("abcd", 5, 0.5, ["a", "b", "judge 0", "judge 1"]),  # the last good ones make place
        ("abcd", 1, 0.5, ["a", "b", "c", "judge 0"]),
        ("a-cd", 5, 0.25, ["a", "c", "d", "judge 0"]),  # the bad one does
        ("-bc-", 5, 0.5, ["b", "c", "judge 0", "judge 1"]),
        ("-b--", 5, 0.5, ["b", "judge 0"]),  # bad places are left over
        ("a-cd", 5, 0.5, ["a", "c", "judge 0", "judge 1"]),  # one of each
        ("a-cd", 0, 0.5, ["a", "c", "d"]),
        ("abcd", 5, 0.1, ["a", "b", "c", "d"]),
        ("----", 5, 0.5, []),
        ("", 5, 0.5, []),
    ],
)
def test_mix(pairs, waiting, fraction, batch):
    buffer = filled(waiting)
    offered = [None if name == "-" else Pair(name) for name in pairs]
    assert names(mix(offered, buffer, fraction)) == batch
    num_answers = sum(name.startswith("judge") for name in batch)
    assert names(list(buffer.pairs)) == [f"judge {i}" for i in range(num_answers, waiting)]


def test_more_judgements_than_one_batch_takes_come_with_the_next():
    buffer = filled(3)
    first, second = (mix([Pair(name) for name in "abcd"], buffer, 0.5) for _ in range(2))
    assert names(first) == ["a", "b", "judge 0", "judge 1"]
    assert names(second) == ["a", "b", "c", "judge 2"]
