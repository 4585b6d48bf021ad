"""The judge: what counts as a score, judge prompts by their token counts, which pair is chosen, all by hand.

With the tiny tokenizer a token is a byte; 257, 258 are <|im_start|> (BOS) and <|im_end|> (EOS).
"""

import time
from pathlib import Path

import numpy as np
import pytest

from align.data.formats import FormatConfig
from align.data.templates import Template
from align.errors import UserError
from align.generation.rollout import Sample
from align.judging import judge, render
from align.judging.judge import (
    Choice,
    Judge,
    JudgeConfig,
    Judged,
    choose,
    parse_score,
    statistics,
    without_scores,
)
from tests.support.tokenizers import Letters

BOS, EOS = 257, 258
ASKED = [BOS, *b"assistant\n"]  # where an answer begins, with the newline


@pytest.fixture
def short(tmp_path: Path) -> JudgeConfig:
    """A judge with a template of 8 bytes beside its variables."""
    (tmp_path / "short.txt").write_bytes(b"Q: {{ prompt }}\nA: {{response}}\n")
    return JudgeConfig(judge_template=tmp_path / "short.txt")


# Configuration


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"judge_low": 5.0}, "--judge-low 5.0 .* --judge-high 5.0"),
    ],
)
def test_flags_that_are_refused(flags, named):
    with pytest.raises(UserError, match=named):
        JudgeConfig(**flags)


# Templates


def test_a_template_is_filled_in_one_pass_and_nothing_is_stripped(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("\n é {{a}}{{  b\t}}\r\n{{ a }}{ {{\n\n".encode())
    template = Template(path, "--flag", ("a", "b"))
    assert template.fill(a=r"\1\n{{ b }}", b="{{a}}") == ("\n é \\1\\n{{ b }}{{a}}\r\n\\1\\n{{ b }}{ {{\n\n")


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"{{ prompt }}", r"lacks the variable \{\{ response \}\}"),
        (b"{{ prompt }} {{ response }} {{ answer }}", r"has the variable \{\{ answer \}\}"),
        (b"{{ prompt }} {{ response }} {{}}", r"has the variable \{\{  \}\}"),
        (b"{{ prompt }} {{ Response }}", r"lacks the variable \{\{ response \}\}"),
        (b"{{ prompt }} {{ response }} \xff", "UTF-8"),
        (None, "No such file"),
    ],
)
def test_templates_that_are_refused(tmp_path, content, complaint):
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"--judge-template .*t.txt .*{complaint}"):
        Template(path, "--judge-template", ("prompt", "response"))


def test_the_default_template():
    path = JudgeConfig().judge_template
    template = Template(path, "--judge-template", ("prompt", "response"))
    filled = template.fill(prompt="PROMPT", response="RESPONSE")
    assert "<question>\nPROMPT\n</question>" in filled and "<response>\nRESPONSE\n</response>" in filled
    assert filled.endswith("\nScore: <total points>\n") and "100 words" in filled
    assert filled.count("\n- ") == 5  # criteria, a point each
    assert max(map(len, filled.splitlines())) <= 80
    assert parse_score(filled, 0, 5) is None  # a judge that repeats the request has not given a score


# Scores

SCORES = {
    # the form that is asked for, and decorated
    "It answers the question.\n\nScore: 4": 4,
    "Score: 0": 0,
    "Score: 4\n": 4,
    "SCORE: 3": 3,
    "Score: **4**": 4,
    "**Score:** 4": 4,
    "**Score: 4**": 4,
    "__Score__: 4": 4,
    "Score: `4`": 4,
    "Score: [3]": 3,
    "Score: <4>": 4,
    "Score: (4)": 4,
    "Score: $\\boxed{4}$": 4,
    "Score: <total points> 4": 4,
    '{"score": 4, "reason": "short"}': 4,
    "<score>4</score>": 4,
    "| **Score** | 4/5 |": 4,
    # other words, separators and places
    "Points: 2": 2,
    "Final score: 3 out of 5": 3,
    "Total score: \n5": 5,
    "# Score\n4": 4,
    "Score:\n\n### 4": 4,
    "## Score\n\n**4**\n\nIt is short.": 4,
    "score - 4": 4,
    "Score -- 4": 4,
    "Score — 4": 4,
    "Score = 4.5": 4.5,
    "Score: .5": 0.5,
    "Score：4": 4,
    "Score:\u00a04": 4,
    "the score is 4": 4,
    "I give it a score of 3.": 3,
    "The final score for this response is 4.": 4,
    # what may follow
    "Score: 4.": 4,
    "Score: 4 points": 4,
    "Score: 4 points: 1 for relevance, 3 for the rest": 4,
    "Score: 4/5 points: 1 for relevance, 3 for the rest": 4,
    "Score: 4, because points of a list are missing": 4,
    "Score: 4\n- 5 facts": 4,
    # scales
    "Score:4/5": 4,
    "Score: 4.0 / 5.0": 4,
    "Score: 4 (out of 5)": 4,
    "Score: 4 points out of a possible 5": 4,
    "Score (0-5): 4": 4,
    "Score (out of 5): 4": 4,
    "Score: 4/10": None,
    "Score: 4 out of 10": None,
    "Score: 4 of 10": None,
    "Score: 4 (out of 10)": None,
    "Score: 4 points out of a possible 10": None,
    "Score (1-10): 4": None,
    # sums
    "Score: 1 + 1 + 1 = 3": 3,
    "Score: 1+1+0=2": 2,
    "Score: 1 + 1 + 1": None,
    # out of range, unclear, or no plain number
    "Score: 45": None,
    "Score: 5.01": None,
    "Score: 6": None,
    "Score: -1": None,
    "Score: −1": None,
    "Score: –1": None,
    "Score: 4,5": None,
    "Score: 4:1": None,
    "Score: 4-5": None,
    "Score: 4 – 5": None,
    "Score: 4 or 5": None,
    "Score: 1e3": None,
    "Score: 4th": None,
    "Score: 4%": None,
    "Score: 4 %": None,
    "Score: 4.5.1": None,
    # no score at all
    "": None,
    "Score:": None,
    "Score: N/A": None,
    "Score: <total points>": None,
    "score: ten": None,
    "Scores range from 0 to 5": None,
    "underscore: 3": None,
    "Scoreboard 3": None,
    "Scoreboard: 3": None,
    "Scores: 3": None,
    "I award 3": None,
    "a score 4": None,
    "Score-4": None,
    "a score > 4": None,
    "Key points:\n1. It is short.\n2. It is wrong.": None,
    "Key points\n1. It is short.": None,
    # the last statement, and none before it
    "Points: 2\nScore: 5": 5,
    "Score: 5\nScore: 2": 2,
    "Score: 4\nScore: 45": None,
    "Score: 4\nScore: 4-5": None,
    "Score: 3\n\nKey points:\n1. It is short.": 3,
    "Score: 3. For a score of 5 it would have to be shorter.": 3,
    "Score: 45. A score of 4 would be too low.": None,
    "a score of 2, no, the score is 3": 3,
}


@pytest.mark.parametrize("text", SCORES)
def test_scores(text):
    assert parse_score(text, 0, 5) == SCORES[text]


def test_scores_of_another_range():
    assert parse_score("Score: 4/10", 0, 10) == 4
    assert parse_score("Score: 10", 0, 10) == 10
    assert parse_score("Score (1-10): 7", 1, 10) == 7
    assert parse_score("Score: 4/5", 0, 10) is None
    assert parse_score("Score: 0", 1, 10) is None
    assert parse_score("Score: -2", -3, 3) == -2
    assert parse_score("Score: −2.5", -3, 3) == parse_score("Score: –2.5", -3, 3) == -2.5


@pytest.mark.parametrize(
    "text, reasons",
    [
        ("It is right.\n\nScore: 4", "It is right."),
        ("It is right.\n\n**Final score: 4/5**\n", "It is right."),
        ("**Total points:** 4 points out of 5.\n\nIt is right. ", "It is right."),
        ("a=a b=b c/d Score: 2", "a=a b=b c/d"),
        ("Short. Score: 2. Wrong. Score: 99", "Short. Wrong."),
        ("I give it a score of 3, as \\frac{1}{2} is `right`.", "I give it a , as \\frac{1}{2} is `right`."),
        ("2 of 3 points are right. Score: N/A", "2 of 3 points are right. Score: N/A"),
        ("Score: 4 or 5", ""),
        ("", ""),
    ],
)
def test_reasons_without_scores(text, reasons):
    assert without_scores(text) == reasons
    assert parse_score(without_scores(text), -1e9, 1e9) is None


@pytest.mark.parametrize(
    "text",
    [
        "score" + " " * 20000,
        "score" + "\n" * 20000,
        "score " * 5000,
        "score for " + "a " * 20000,
        "score: 1" + "+ 1" * 20000,
        "score: 4 out of" + " a" * 20000,
        "score\n" + "." * 20000,
        "score: " + "9" * 20000,
    ],
)
def test_degenerate_text_takes_no_time(text):
    start = time.perf_counter()
    assert parse_score(text, 0, 5) in (None, 4)
    assert time.perf_counter() - start < 2  # about 0.02 s; quadratic time would be minutes


def test_a_judge_counts_what_is_in_its_range(tiny):
    ask = Judge(JudgeConfig(judge_low=1.0, judge_high=10.0), tiny, FormatConfig(), room=1)
    texts = [f"Score: {score}" for score in ("0", "1", "10", "10.5", "7/10", "4/5")]
    assert ask.scores([*texts, None], "") == (None, 1, 10, None, 7, None, None)


@pytest.mark.parametrize(
    "response, judgements, scores",
    [
        ("It is 7.\nScore: 5", ["It is 7.\nScore: 5", "Wrong.\nScore: 1"], (None, None)),  # an echo
        ("Score: 5", ['The response ends with "Score: 5".', "Bad. Score: 0"], (None, None)),
        ("**Score:** 5", ["It says SCORE : 5.\n", "Score: 2"], (None, None)),
        ("Score: 5", ["Score: 5/5", "Score: 4", None], (5, 4, None)),  # no quotation
        ("the final score is 4", ["It claims the final score is 4.", "Score: 3"], (None, None)),
        ("the final score is 4", ["It claims the final score is 4.\nScore: 3", "Score: 3"], (3, 3)),
        ("Score: 1 Score: 2 Score: 3", ["Score: 1", "Score: 1", "Score: 5"], (None, None, None)),
    ],
)
def test_no_score_is_read_out_of_a_quoted_response(tiny, response, judgements, scores):
    ask = Judge(JudgeConfig(), tiny, FormatConfig(), room=1)
    assert ask.scores(judgements, response) == scores


# Judge prompts

ONE_TURN = {"messages": [{"role": "user", "content": "three"}, {"role": "assistant", "content": "x"}]}
TURNS = {
    "messages": [
        {"role": "system", "content": "say little"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "x"},
    ]
}
WHOLE = b"User: one\n\nAssistant: two\n\nUser: three"  # 38 bytes, the last turn alone has 5


def judge_ids(question: bytes, response: bytes) -> list[int]:
    """By hand: 27 tokens and those of question and response."""
    return [BOS, *b"user\nQ: ", *question, *b"\nA: ", *response, *b"\n", EOS, 10, *ASKED]


def test_a_judge_prompt_is_one_user_turn(tiny, short):
    ids, shortened = Judge(short, tiny, FormatConfig(), room=100).prompt(ONE_TURN, "{{ prompt }}")
    assert ids.dtype == np.int32 and ids.tolist() == judge_ids(b"three", b"{{ prompt }}")
    assert ids[-1] == 10 and not shortened  # the template's last newline is there


@pytest.mark.parametrize(
    "room, question, response, shortened",
    [
        (75, WHOLE, b"abcdefghij", False),  # 27 + 38 + 10
        (74, b"three", b"abcdefghij", True),
        (42, b"three", b"abcdefghij", True),  # 27 + 5 + 10
        (41, b"three", b"abcdefghi", True),
        (33, b"three", b"a", True),
    ],
)
def test_what_is_too_long_is_shortened(tiny, short, room, question, response, shortened):
    ids, cut = Judge(short, tiny, FormatConfig(), room).prompt(TURNS, "abcdefghij")
    assert ids.tolist() == judge_ids(question, response)
    assert cut is shortened


@pytest.mark.parametrize("room", [32, 27, 1, 0])
def test_without_room_for_any_of_the_response_there_is_no_prompt(tiny, short, room):
    assert Judge(short, tiny, FormatConfig(), room).prompt(TURNS, "abcdefghij") == (None, True)


def test_a_template_without_any_room_is_refused(tiny, short):
    longest = len(Judge(short, tiny, FormatConfig(), 1000).encode(ONE_TURN, "x", "x"))
    Judge(short, tiny, FormatConfig(), longest).check(ONE_TURN)
    message = rf"--judge-template \S+short.txt alone is longer than the {longest - 1} tokens that"
    with pytest.raises(UserError, match=message):
        Judge(short, tiny, FormatConfig(), longest - 1).check(ONE_TURN)


def test_an_empty_response_is_judged_where_it_finds_room(tiny, short):
    ids, shortened = Judge(short, tiny, FormatConfig(), 32).prompt(TURNS, "")
    assert ids.tolist() == judge_ids(b"three", b"") and shortened
    assert Judge(short, tiny, FormatConfig(), 31).prompt(TURNS, "") == (None, True)


def test_no_half_character_is_left(tiny, short):
    def cut(response: str, room: int) -> np.ndarray | None:
        return Judge(short, tiny, FormatConfig(), room).prompt(ONE_TURN, response)[0]

    assert cut("aéb", 35).tolist() == judge_ids(b"three", "aé".encode())  # 36 are too many
    assert cut("aéb", 34).tolist() == judge_ids(b"three", b"a")
    assert cut("é", 33) is None  # 34 are too many, and half of the response is no character


def test_a_response_is_cut_until_it_fits(short, monkeypatch):
    # as if in a whole prompt two letters were a token: 8 too many, so 8 letters go, then 4 too many, 2, 1
    lengths = []

    def one_turn(row: dict, text: str, *_: object) -> np.ndarray:
        ids = np.array([*text.encode()][1::2], np.int32)
        lengths.append(len(ids))
        return ids

    monkeypatch.setattr(render, "question", lambda row, tokenizer, fmt: ("long " * 20, "q"))
    monkeypatch.setattr(render, "one_turn", one_turn)
    ids, shortened = Judge(short, Letters(offset=0), FormatConfig(), room=12).prompt({}, "b" * 31)
    assert ids.tolist() == [*b"Q: q\nA: " + b"b" * 16 + b"\n"][1::2] and shortened
    assert lengths == [69, 20, 16, 14, 13, 12]  # the whole conversation, the last turn, four cuts


def test_judge_prompts_in_the_other_formats(tiny, short):
    chat = {
        "system": "s",
        "conversations": [{"from": "Ann", "value": "three"}, {"from": "Bob", "value": "x"}],
        "mask": "Ann",
    }
    markers = FormatConfig(chat_tokens=("<s>", "<t>", "<l>", r"\n", r"\n"))
    ids, _ = Judge(short, tiny, markers, room=100).prompt(chat, "r")
    assert tiny.decode(ids.tolist()) == "<s>System\n\n<t>Ann\nQ: three\nA: r\n\n<t>Bob\n"
    fmt = FormatConfig(prompt_template="Ask {input}\nSay {output}")
    ids, _ = Judge(short, tiny, fmt, room=100).prompt({"input": "three", "output": "x"}, "r")
    assert tiny.decode(ids.tolist()) == "Ask Q: Ask three\nSay\nA: r\n\nSay"


# Judgements


def test_what_the_judgements_of_an_answer_say():
    judged = Judged((4.0, None, 1.0, 4.0))
    assert judged.valid == [4.0, 1.0, 4.0]
    assert judged.mean == 3.0 and judged.variance == 2.0  # (1 + 4 + 1) / 3
    assert judged.agreement == pytest.approx(1 / 3)  # (4, 4) of (4, 1), (4, 4), (1, 4)
    assert Judged((0.1,) * 3).mean == 0.1 and Judged((0.1,) * 3).variance == 0  # rounding makes no difference
    assert Judged((0.1, 0.2, 0.3)).mean == Judged((0.3, 0.2, 0.1)).mean


@pytest.mark.parametrize(
    "scores, mean, agreement", [((), None, None), ((None, None), None, None), ((0.0, None), 0.0, None)]
)
def test_few_judgements(scores, mean, agreement):
    judged = Judged(scores)
    assert (judged.mean, judged.variance, judged.agreement) == (mean, 0.0, agreement)


def test_statistics_by_hand():
    judged = [Judged((5.0, 3.0, 5.0, 3.0)), Judged((2.0, None, None, None)), Judged(()), Judged((None,) * 4)]
    assert statistics(iter(judged)) == pytest.approx(
        {
            "judge_mean": 3.0,  # (4 + 2) / 2
            "judge_variance": 0.5,  # (1 + 0) / 2
            "judge_agreement": 1 / 3,  # of one answer, 2 of 6
            "judge_unparsed": 7 / 12,
        }
    )


def test_statistics_leave_out_what_is_not_defined():
    assert statistics([]) == statistics([Judged(())]) == {}
    assert statistics([Judged((None, None))]) == {"judge_unparsed": 1.0}
    assert statistics([Judged((1.0, 2.0))])["judge_agreement"] == 0.0
    assert statistics([Judged((1.0,))]) == {"judge_mean": 1.0, "judge_variance": 0.0, "judge_unparsed": 0.0}


# The pair


def sample(length: int, finish: str = "stop", token: int = 7) -> Sample:
    """An answer of so many tokens, all the same but the last."""
    ids = np.array([token] * (length - 1) + [EOS], np.int32)
    return Sample(ids, np.zeros(length, np.float32), np.zeros(length, np.float32), finish)


def pick(answers: list[tuple], rho: float) -> Choice:
    """`choose` of (length, score, score, ...); the token tells equally long answers apart."""
    samples = [sample(length, token=k) for k, (length, *_) in enumerate(answers)]
    return choose(samples, [Judged(tuple(scores)) for _, *scores in answers], rho)


def test_best_and_worst_without_length_control():
    # means 3, 4, 4, 1, 1: of the best number 2 has no variance, of the worst number 3
    answers = [(2, 3.0, 3.0), (3, 5.0, 3.0), (9, 4.0, 4.0), (2, 1.0, 1.0), (9, 2.0, 0.0)]
    assert pick(answers, 0.0) == Choice(2, 3)
    assert pick([(5, 2.0), (1, 4.0), (5, 4.0), (5, 1.0), (9, 1.0)], 0.0) == Choice(
        1, 3
    )  # first of equal ones
    assert pick([(5, 2.0), (1, 2.0, None), (1, 3.0)], 0.0) == Choice(2, 0)


# means 5, 4.5, 4.4, 0.6, 0.5, 0: with rho = 0.1 the pools are [4.5, 5] and [0, 0.5]
SIX = [(8, 5.0), (5, 4.5), (4, 4.4), (9, 0.6), (7, 0.5), (6, 0.0)]


@pytest.mark.parametrize(
    "rho, chosen, rejected",
    [
        (0.0, 0, 5),
        (0.05, 0, 5),  # [4.75, 5] and [0, 0.25]
        (0.1, 1, 4),  # the ends of the pools belong to them
        (0.12, 2, 3),  # [4.4, 5] and [0, 0.6]
        (0.5, 2, 3),  # [2.5, 5] and [0, 2.5]
        (1.0, 2, 3),  # shortest and longest of all
    ],
)
def test_length_control_by_hand(rho, chosen, rejected):
    assert pick(SIX, rho) == Choice(chosen, rejected)


def test_ends_of_pools_in_thirds():
    # means 10/3, 3, 0 and 14/3, 5/3, 4/3: with rho = 0.1 a pool ends at the second, but for rounding
    good = [(9, 4.0, 3.0, 3.0), (2, 3.0, 3.0, 3.0), (5, 0.0, 0.0, 0.0)]
    bad = [(5, 5.0, 5.0, 4.0), (9, 2.0, 2.0, 1.0), (6, 2.0, 1.0, 1.0)]
    assert pick(good, 0.1) == Choice(1, 2) and pick(bad, 0.1) == Choice(0, 1)
    assert pick(good, 0.1 - 1e-6) == Choice(0, 2) and pick(bad, 0.1 - 1e-6) == Choice(0, 2)


def test_equal_lengths_are_decided_by_the_mean_and_then_by_the_order():
    assert pick([(4, 4.8), (4, 5.0), (6, 0.2), (6, 0.0)], 0.1) == Choice(1, 3)
    assert pick([(4, 5.0), (4, 5.0), (6, 0.0), (6, 0.0)], 0.1) == Choice(0, 2)


@pytest.mark.parametrize("rho", [1e-12, 0.1, 0.3, 1 / 3, 0.7, 1.0])
def test_no_pool_is_ever_empty(rho):
    rng = np.random.default_rng(1)
    for _ in range(200):
        scores = rng.choice([0.1, 0.3, 4.3, 4.3 + 1e-15, 1e-300, 4.7], size=2, replace=False)
        assert pick([(3, float(scores[0])), (3, float(scores[1]))], rho).why in (None, "identical")


def test_one_answer_can_be_both_best_and_worst():
    # rho = 0.6: pools [2, 5] and [0, 3]; number 1 is the shortest of the one, the longest of the other
    assert pick([(9, 5.0), (5, 2.5), (4, 0.0)], 0.6) == Choice(why="identical")
    assert pick([(9, 5.0), (5, 2.5), (4, 0.0)], 0.4) == Choice(0, 2)  # [3, 5] and [0, 2]


def test_equal_tokens_are_no_pair():
    judged = [Judged((4.0,)), Judged((1.0,)), Judged((2.0,))]
    assert choose([sample(3), sample(3), sample(4)], judged, 0.0) == Choice(why="identical")
    assert choose([sample(3), sample(3, token=8), sample(4)], judged, 0.0) == Choice(0, 1)


def test_only_answers_that_ended_and_have_a_score_are_chosen():
    samples = [sample(3, "length"), sample(4), sample(5), sample(6), sample(7)]
    judged = [Judged((5.0,)), Judged((None, None)), Judged((3.0,)), Judged((4.0,)), Judged(())]
    assert choose(samples, judged, 0.0) == Choice(3, 2)
    assert choose(samples[:3], judged[:3], 0.0) == Choice(why="few")
    assert choose(samples[:2], judged[:2], 0.0) == choose([], [], 0.0) == Choice(why="few")
    assert choose(samples[:4], [Judged((4.0,))] * 4, 0.5) == Choice(why="tied")
    with pytest.raises(ValueError):
        choose(samples, judged[:4], 0.0)


def test_what_was_judged_worse_is_never_preferred():
    """rho = 0.7 of means 5, 3.5, 3 and 1: pools [2.2, 5] and [1, 3.8], shortest 3.0 and longest 3.5."""
    answers = [(40, 5.0), (50, 3.5), (10, 3.0), (20, 1.0)]
    assert pick(answers, 0.7) == Choice(why="overlap")
    assert pick(answers, 0.5) == Choice(2, 3)  # [3, 5] and [1, 3]: longest of 3.0 and 1.0


def test_means_are_equal_if_their_judgements_are_in_another_order():
    assert pick([(3, 0.1, 0.2, 0.3), (4, 0.3, 0.2, 0.1)], 0.0) == Choice(why="tied")


def test_the_reasons_that_there_are():
    assert judge.REASONS == ("few", "tied", "overlap", "identical")
