"""Self-rewarding: prompts and random streams of judge and meta-judge, and the pairs made of their verdicts.

No model: what it says is written down here. With the tiny tokenizer a token is a byte; 257, 258 are
<|im_start|> (BOS) and <|im_end|> (EOS).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from align.data import packing
from align.data.formats import FormatConfig
from align.data.packing import Example
from align.data.prompts import Prompt
from align.data.sft_tasks import Task
from align.errors import UserError
from align.generation.rollout import Sample
from align.judging import judge, self_judge
from align.judging.judge import Choice, Judge, JudgeConfig, Judged
from align.judging.meta_judge import MetaJudge, MetaJudgeConfig
from align.judging.pairs import Buffer, SampledPair
from align.judging.self_judge import ComparedJudgements, JudgedResponses, SelfJudge
from train_self_reward import TRAIN, VAL

BOS, EOS = 257, 258
ASKED = [BOS, *b"assistant\n"]  # where an answer begins
ROOMY = 10**6


@pytest.fixture
def make(tmp_path, tiny) -> Callable[..., SelfJudge]:
    """Makes a SelfJudge with short templates."""
    (tmp_path / "judge.txt").write_text("Q: {{ prompt }}\nA: {{ response }}\n")
    meta = "{{ prompt }}|{{ response }}|{{ judgement_a }}|{{ judgement_b }}"
    (tmp_path / "meta.txt").write_text(meta)

    def make(judgements: int = 2, room: int = ROOMY, stop: tuple[str, ...] = ()) -> SelfJudge:
        judge_config = JudgeConfig(judgements, tmp_path / "judge.txt")
        meta_config = MetaJudgeConfig(meta_judge=True, meta_judge_template=tmp_path / "meta.txt")
        judges = (
            Judge(judge_config, tiny, FormatConfig(), room),
            MetaJudge(meta_config, tiny, FormatConfig(), room),
        )
        return SelfJudge(*judges, tiny, stop)

    return make


def words(text: str, ended: bool = True) -> Sample:
    """A sample that says so, with log-probs that no other one has."""
    ids = np.array([*text.encode(), *([EOS] if ended else [])], np.int32)
    logprobs, model_logprobs = -np.random.default_rng([*text.encode()]).random((2, len(ids)), np.float32)
    return Sample(ids, logprobs, model_logprobs, "stop" if ended else "length")


def task(question: str) -> Task:
    """A row of one turn; its ids are not those of its text, so that the two cannot be mixed up."""
    roles = {"user": question, "assistant": "of the data"}
    row = {"messages": [{"role": role, "content": text} for role, text in roles.items()]}
    ids = np.array([10, 20, len(question)], np.int32)
    return Task(Prompt(ids, row), Example(ids, np.zeros(3, bool)))


def turn(text: str) -> list[int]:
    """A user's turn and where the answer to it begins, by hand."""
    return [BOS, *b"user\n", *text.encode(), EOS, 10, *ASKED]


class Script:
    """Says what is written down, by kind, prompt and number, and notes what it is asked."""

    def __init__(self, **said: list[list[Sample]]):
        self.said, self.calls = said, []

    def __call__(self, kind: str, ids: Sequence, streams: Sequence, number: int) -> list[list[Sample]]:
        self.calls.append((kind, [one.tolist() for one in ids], list(streams), number))
        assert [len(samples) for samples in self.said[kind]] == [number] * len(ids) == [number] * len(streams)
        return self.said[kind]


# ---- answers ---------------------------------------------------------------------------------------------


def test_answers_that_ended_are_judged_each(make):
    answers = [[words("a"), words("bb", ended=False)], [words("ccc"), words("")]]
    judgements = [
        [words("Fine. Score: 4"), words("Bad. Score: 1")],
        [words("No idea."), words("Score: 5")],
        [words("Score: 3, long", ended=False), words("Score: 3")],
    ]
    script = Script(generate=answers, judge=judgements)
    tasks, places = [task("one"), task("two")], [(TRAIN, 7, 3), (TRAIN, 7, 5)]
    judged = make().responses(tasks, places, 2, script)
    assert script.calls == [
        ("generate", [[10, 20, 3], [10, 20, 3]], [(0, 7, 3, 0, 0), (0, 7, 5, 0, 0)], 2),
        (
            "judge",
            [turn("Q: one\nA: a\n"), turn("Q: two\nA: ccc\n"), turn("Q: two\nA: \n")],
            [(0, 7, 3, 1, 0), (0, 7, 5, 1, 0), (0, 7, 5, 1, 1)],
            2,
        ),
    ]
    first, second = judged
    assert [(each.row, each.place, each.task) for each in judged] == [
        (3, places[0], tasks[0]),
        (5, places[1], tasks[1]),
    ]
    assert first.samples == answers[0] and second.samples == answers[1]
    assert first.judgements == [judgements[0], []] and second.judgements == judgements[1:]
    assert first.judged == [Judged((4.0, 1.0)), Judged(())]
    assert second.judged == [Judged((None, 5.0)), Judged((None, 3.0))]  # the second one's first was cut off
    assert first.ended == [[True, True], []] and second.ended == [[True, True], [False, True]]
    assert first.judge_prompts[0].tolist() == turn("Q: one\nA: a\n") and first.judge_prompts[1] is None
    assert [ids.tolist() for ids in second.judge_prompts] == script.calls[1][1][1:]
    assert first.shortened == second.shortened == [False, False]


def test_answers_that_are_shortened_or_find_no_room(make):
    """The second question is two letters longer: beside it nothing but an empty answer finds room."""
    room = len(turn("Q: one\nA: ab\n"))
    answers = [[words("abcd"), words("ab"), words("abcd", ended=False)], [words("é"), words("z"), words("")]]
    judgements = [[words(f"Score: {score}")] for score in (1, 2, 3)]
    script = Script(generate=answers, judge=judgements)
    places = [(VAL, 0, 0), (VAL, 0, 1)]
    first, second = make(1, room).responses([task("one"), task("three")], places, 3, script)
    _, asked, streams, _ = script.calls[1]
    assert asked == [turn("Q: one\nA: ab\n"), turn("Q: one\nA: ab\n"), turn("Q: three\nA: \n")]
    assert streams == [(VAL, 0, 0, 1, 0), (VAL, 0, 0, 1, 1), (VAL, 0, 1, 1, 2)]
    assert first.shortened == [True, False, False] and second.shortened == [True, True, False]
    assert [ids is None for ids in first.judge_prompts + second.judge_prompts] == [
        False,
        False,
        True,
        True,
        True,
        False,
    ]
    assert [each.scores for each in first.judged + second.judged] == [(1.0,), (2.0,), (), (), (), (3.0,)]
    assert second.judgements == [[], [], judgements[2]]


def test_where_no_answer_ended_nothing_is_judged_but_all_ranks_ask(make):
    script = Script(generate=[[words("a", ended=False)] * 2], judge=[])
    [answers] = make().responses([task("one")], [(VAL, 0, 0)], 2, script)
    assert script.calls[1] == ("judge", [], [], 2)
    assert answers.judged == [Judged(())] * 2 and answers.judgements == [[], []] == answers.ended


def test_what_ends_an_answer_is_not_shown_to_the_judge(make):
    """And a score behind what ended the judgement does not count."""
    script = Script(generate=[[words("yes##no", ended=False)]], judge=[[words("Score: 2 ##Score: 4")]])
    object.__setattr__(script.said["generate"][0][0], "finish", "stop")
    [answers] = make(1, stop=("##",)).responses([task("one")], [(VAL, 0, 0)], 1, script)
    assert script.calls[1][1] == [turn("Q: one\nA: yes\n")] and answers.judged == [Judged((2.0,))]


@pytest.mark.parametrize("refuses", [False, True])
def test_a_response_may_have_any_characters(make, tiny, monkeypatch, refuses):
    """Private ones, which mark hidden tokens, and special tokens where rows must not have them."""
    monkeypatch.setattr(tiny, "special_tokens_in_text", "refuse" if refuses else "split")
    special = "<|im_start|>"
    script = Script(generate=[[words(f"a\U00100041b{special}")]], judge=[[words("Score: 2")]])
    make(1).responses([task("one")], [(VAL, 0, 0)], 1, script)
    assert script.calls[1][1] == [turn(f"Q: one\nA: a\ufffdb{chr(0xFFFD) if refuses else special}\n")]


def test_all_random_numbers_are_different(make):
    """Over answers, judgements and comparisons, steps, rows, training and validation.

    numpy fills up short lists with zeros, so that lists of several lengths might be the same to it.
    """
    places = [(TRAIN, 0, 0), (TRAIN, 0, 1), (TRAIN, 1, 0), (TRAIN, 2, 1), (VAL, 0, 0), (VAL, 0, 1)]
    script = Script(
        generate=[[words(letter) for letter in "abcd"] for _ in places],
        judge=[[words(f"{letter} Score: {j}") for j, letter in enumerate("xyz")] for _ in range(24)],
        meta_judge=[[words("Winner: A")] for _ in range(36)],
    )
    asker = make(3)
    asker.compare(asker.responses([task("q")] * 6, places, 4, script), script)
    drawn = [
        (1234, *stream, i)
        for _, _, streams, number in script.calls
        for stream in streams
        for i in range(number)
    ]
    assert len(drawn) == 6 * 4 + 24 * 3 + 36
    assert len({len(numbers) for numbers in drawn}) == 1
    states = {tuple(np.random.SeedSequence(numbers).generate_state(4)) for numbers in drawn}
    assert len(states) == len(drawn)


# ---- pairs of answers ------------------------------------------------------------------------------------


def answered(*scores: Sequence[float | None], row: int = 3) -> JudgedResponses:
    """Answers "answer 0", "answer 1!", ... of 9 + k tokens with such scores; () is one that did not end."""
    samples = [words(f"answer {k}" + "!" * k, ended=bool(of)) for k, of in enumerate(scores)]
    return JudgedResponses(
        *((TRAIN, 7, row), task("three"), samples),
        judge_prompts=[np.array([BOS, row, k], np.int32) if of else None for k, of in enumerate(scores)],
        shortened=[False] * len(scores),
        judgements=[[words(f"reason {j} Score: {s}") for j, s in enumerate(of)] for of in scores],
        judged=[Judged(tuple(of)) for of in scores],
    )


def test_the_pair_of_a_choice():
    answer = answered((4.0, None, 1.0), (), (5.0, 5.0, 4.0))
    pair = answer.pair(Choice(2, 0))
    assert pair.row == 3 and pair.ids is answer.task.prompt.ids
    assert pair.chosen is answer.samples[2] and pair.rejected is answer.samples[0]
    assert (pair.chosen_reward, pair.rejected_reward) == (14 / 3, 2.5)
    assert pair.gap == 14 / 3 - 2.5
    assert pair.samples == (answer.samples[2], answer.samples[0])
    assert [answer.pair(Choice(why=why)) for why in judge.REASONS] == [None] * 4


def test_pairs_of_a_batch_keep_their_places(make):
    answers = [
        answered((1.0,), (2.0,)),
        answered((3.0,), (3.0,)),
        answered((5.0,), ()),
        answered((5.0,), (0.0,)),
    ]
    pairs, logged = make(1).pairs(answers, 0.0)
    assert [pair and (pair.chosen_reward, pair.rejected_reward) for pair in pairs] == [
        *((2.0, 1.0), None, None, (5.0, 0.0))
    ]
    assert logged["bad_samples_per_GBS"] == 0.5 and logged["chosen_generated_rewards"] == 3.5


def test_length_control_takes_the_shortest_of_the_best(make):
    """Scores 4.5 and 5 are within a tenth of the spread from the best; the first one is shorter."""
    answers = [answered((4.5,), (5.0,), (0.0,), (0.5,))]
    chosen = {rho: make(1).pairs(answers, rho)[0][0] for rho in (0.0, 0.1)}
    assert [chosen[rho].chosen is answers[0].samples[k] for rho, k in ((0.0, 1), (0.1, 0))] == [True, True]
    assert [chosen[rho].rejected is answers[0].samples[k] for rho, k in ((0.0, 2), (0.1, 3))] == [True, True]


def sample(*ids: int) -> Sample:
    return Sample(
        np.array(ids, np.int32), np.zeros(len(ids), np.float32), np.ones(len(ids), np.float32), "stop"
    )


def pair_of_samples(chosen: Sample, rejected: Sample, ids: Sequence[int] = (7, 8, 9)) -> SampledPair:
    return SampledPair(0, np.array(ids, np.int32), chosen, rejected, 4.0, 1.0, 3.0)


def test_just_the_tokens_of_a_sample_are_trained():
    """p = 3, r = 6: index t predicts token t + 1, so p - 1 .. r - 2 are 2, 3, 4, and the last is the stop.

    algorithms.md 7.5: NeMo-Aligner trained the last token of the prompt and not the stop token.
    """
    chosen, rejected = pair_of_samples(sample(31, 32, EOS), sample(41, EOS)).examples
    batch = packing.collate([[chosen], [rejected]], multiple=4)
    assert batch.lengths == [5, 4]
    assert batch.mask.tolist() == [0, 0, 1, 1, 1] + [0, 0, 1, 1] + [0, 0, 0]
    assert batch.targets[:9].tolist() == [8, 9, 31, 32, EOS] + [8, 9, 41, EOS]
    assert batch.tokens[:9].tolist() == [7, 8, 9, 31, 32] + [7, 8, 9, 41]
    assert batch.targets[batch.mask.bool()].tolist() == [31, 32, EOS, 41, EOS]


def test_two_samples_share_their_prompt_but_for_what_is_trained():
    """Place p - 1 has a target of each: it is both's own. Even a common first token is trained twice."""
    for first in (41, 31):
        batch = packing.collate([pair_of_samples(sample(31, 32, EOS), sample(first, EOS)).examples])
        assert batch.lengths == [5, 2] and batch.prefixes == [(0, 0), (0, 2)]
        assert batch.mask.tolist() == [0, 0, 1, 1, 1] + [1, 1]
        assert batch.tokens.tolist() == [7, 8, 9, 31, 32] + [9, first]
        assert batch.positions.tolist() == [0, 1, 2, 3, 4] + [2, 3]
        assert batch.targets[batch.mask.bool()].tolist() == [31, 32, EOS, first, EOS]


@pytest.mark.parametrize("prompt", [[7], [7, 8, 9]])
def test_samples_of_a_stop_token_alone(prompt):
    [chosen, _] = pair_of_samples(sample(EOS), sample(31, EOS), prompt).examples
    batch = packing.collate([[chosen]])
    assert batch.mask.tolist() == [0] * (len(prompt) - 1) + [1] and batch.targets[-1] == EOS


def test_the_texts_of_a_pair(make, tiny):
    pair = pair_of_samples(words("good"), words("bad"), [*b"Why?"])
    assert pair.texts(tiny, make().text_of) == {
        "prompt": "Why?",
        "chosen": "good",
        "rejected": "bad",
        "chosen_reward": 4.0,
        "rejected_reward": 1.0,
    }


# ---- comparisons -----------------------------------------------------------------------------------------


def judged_answer(
    judgements: Sequence[Sample], scores: Sequence[float | None], row: int = 3
) -> JudgedResponses:
    """An answer "no" with a single judgement, and one, "yes", with those given."""
    return JudgedResponses(
        *((TRAIN, 7, row), task("three"), [words("no"), words("yes")]),
        judge_prompts=[np.array([1, row], np.int32), np.array([2, row], np.int32)],
        shortened=[False] * 2,
        judgements=[[words("It is. Score: 3")] * len(judgements), list(judgements)],
        judged=[Judged((3.0,) * len(scores)), Judged(tuple(scores))],
    )


def test_what_is_compared_and_what_is_not(make):
    """Reasons without scores; not where nothing varies, reasons are equal or empty, or one did not end."""
    judgements = [
        words("Clear.\nScore: 5"),
        words("Vague.\nScore: 1"),
        words("Score: 4\nClear."),
        words("Cut off.\nScore: 2", ended=False),
        words("Score: 3"),
        words("No score."),
    ]
    scores = (5.0, 1.0, 4.0, 2.0, 3.0, None)
    same = judged_answer(judgements, (3.0,) * 6, row=8)
    answers = [
        same,
        judged_answer(judgements, scores),
        answered((), row=4),
        judged_answer(judgements, scores, 9),
    ]
    orders = [(0, 1), (1, 0), (1, 2), (2, 1)]
    shown = ["Clear.|Vague.", "Vague.|Clear.", "Vague.|Clear.", "Clear.|Vague."]
    verdicts = [[words(f"{number} Winner: {letter}")] for number, letter in enumerate("ABBAABAX")]
    script = Script(meta_judge=verdicts)
    first, second = make(6).compare(answers, script)
    assert script.calls == [
        (
            "meta_judge",
            [turn(f"three|yes|{texts}") for texts in shown] * 2,
            [(TRAIN, 7, row, 2, 6 * a + b) for row in (3, 9) for a, b in orders],
            1,
        )
    ]
    assert (first.responses, first.response, second.responses, second.response) == (
        answers[1],
        1,
        answers[3],
        1,
    )
    assert first.verdicts == {order: f"{i} Winner: {'ABBA'[i]}" for i, order in enumerate(orders)}
    assert first.winners == dict(zip(orders, "ABBA", strict=True))
    assert second.winners == dict(zip(orders, ["A", "B", "A", None], strict=True))


def test_a_pair_that_is_too_long_moves_no_other_one(make):
    """The first of three judgements is too long to be shown: the verdict is about the second and third."""
    judgements = [words("Long reasons. Score: 5"), words("Bad. Score: 1"), words("Good. Score: 4")]
    answer = judged_answer(judgements, (5.0, 1.0, 4.0))
    script = Script(meta_judge=[[words("Winner: B")], [words("Winner: A")]])
    [one] = make(3, len(turn("three|yes|Good.|Bad."))).compare([answer], script)
    assert script.calls[0][1:3] == (
        [turn("three|yes|Bad.|Good."), turn("three|yes|Good.|Bad.")],
        [(TRAIN, 7, 3, 2, 5), (TRAIN, 7, 3, 2, 7)],
    )
    assert one.winners == {(1, 2): "B", (2, 1): "A"}
    pair = one.pair()
    assert (pair.chosen, pair.rejected) == (judgements[2], judgements[1])
    assert (pair.chosen_reward, pair.rejected_reward) == (4.0, 1.0)


def test_where_nothing_can_be_compared_there_is_no_pair_but_all_ranks_ask(make):
    judgements = [words("Score: 5"), words("Score: 1")]
    script = Script(meta_judge=[])
    [one] = make().compare([judged_answer(judgements, (5.0, 1.0))], script)
    assert make().compare([], script) == []
    assert script.calls == [("meta_judge", [], [], 1)] * 2
    assert one.verdicts == {} and one.pair() is None


def root(function: Callable[[float], float]) -> float:
    """Zero of a function that falls from above 0 at 0 to below 0 at 10, by bisection."""
    low, high = 0.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return low


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def verdicts(**winners: str | None) -> dict[tuple[int, int], str]:
    """v01="A": shown as A and B, judgements 0 and 1; A won."""
    return {(int(name[1]), int(name[2])): f"Winner: {letter}" for name, letter in winners.items()}


THREE = [words("best Score: 4"), words("even Score: 2"), words("also Score: 0")]


def test_the_pair_of_judgements_by_hand():
    """0 wins against 1 and 2, which tie: by symmetry t = (x, -x/2, -x/2), where 2 s(-3x/2) = x."""
    verdicts_ = verdicts(v01="A", v10="B", v02="A", v20="B", v12="A", v21="A")
    answer = judged_answer(THREE, (4.0, 2.0, 0.0))
    pair = ComparedJudgements(answer, 1, verdicts_).pair()
    assert pair.chosen is THREE[0] and pair.rejected is THREE[1]  # of the two weakest the first
    assert (pair.row, pair.chosen_reward, pair.rejected_reward) == (3, 4.0, 2.0)
    assert pair.ids is answer.judge_prompts[1]  # what the judgements continue
    assert pair.gap == pytest.approx(1.5 * root(lambda x: 2 * logistic(-1.5 * x) - x), rel=1e-9)


def test_a_lower_score_may_be_the_better_judgement():
    """Two players and one win: t = (-x, x) where s(-2x) = x."""
    pair = ComparedJudgements(judged_answer(THREE, (4.0, 2.0, 0.0)), 1, verdicts(v02="B", v20="A")).pair()
    assert pair.chosen is THREE[2] and pair.rejected is THREE[0]
    assert (pair.chosen_reward, pair.rejected_reward) == (0.0, 4.0)
    assert pair.gap == pytest.approx(2 * root(lambda x: logistic(-2 * x) - x), rel=1e-9)


@pytest.mark.parametrize(
    ("verdicts_", "scores"),
    [
        (verdicts(v01="A", v10="A"), (4.0, 2.0, 0.0)),  # a tie
        (verdicts(v01="A", v10="C"), (4.0, 2.0, 0.0)),  # one order is not clear
        (verdicts(v01="A", v10="B"), (4.0, 4.0, 0.0)),  # the same score
        ({}, (4.0, 2.0, 0.0)),
    ],
)
def test_no_pair_of_judgements(verdicts_, scores):
    assert ComparedJudgements(judged_answer(THREE, scores), 1, verdicts_).pair() is None


# ---- tables ----------------------------------------------------------------------------------------------


def test_the_table_of_judgements(make):
    asker, answers = make(), answered((4.0, None), (), (1.0, 2.0), row=9)
    first = {"table": "t", "row": 9, "answer": 0, "response": "answer 0"}
    last = {"table": "t", "row": 9, "answer": 2, "response": "answer 2!!"}
    assert asker.tables("t", [answers]) == [
        {**first, "judgement": "reason 0 Score: 4.0", "score": 4.0},
        {**first, "judgement": "reason 1 Score: None", "score": None},
        {**last, "judgement": "reason 0 Score: 1.0", "score": 1.0},
        {**last, "judgement": "reason 1 Score: 2.0", "score": 2.0},
    ]


def test_the_table_of_comparisons(make):
    """Two players and one win: 1000 -+ 400 x / ln 10, where s(-2x) = x. Judgement 1 has no verdict."""
    answer = judged_answer(THREE, (4.0, 2.0, 0.0))
    clear = ComparedJudgements(answer, 1, verdicts(v02="A", v20="B"))
    void = ComparedJudgements(answer, 1, verdicts(v01="A", v10="X"))
    best, even, also = (f"{text} Score: {score}" for text, score in (("best", 4), ("even", 2), ("also", 0)))
    lead = 400 / math.log(10) * root(lambda x: logistic(-2 * x) - x)
    common = {"table": "c", "row": 3, "answer": 1}
    strong, weak = round(1000 + lead, 1), round(1000 - lead, 1)
    won = {"verdict": "Winner: A", "winner": "A", "elo_a": strong, "elo_b": weak}
    lost = {"verdict": "Winner: B", "winner": "B", "elo_a": weak, "elo_b": strong}
    unknown = {"elo_a": None, "elo_b": None}
    assert make().tables("c", [clear, void]) == [
        {**common, "a": best, "b": also, **won},
        {**common, "a": also, "b": best, **lost},
        {**common, "a": best, "b": even, "verdict": "Winner: A", "winner": "A", **unknown},
        {**common, "a": even, "b": best, "verdict": "Winner: X", "winner": None, **unknown},
    ]
    assert strong == 1058.6  # x = 0.337


# ---- statistics ------------------------------------------------------------------------------------------


def test_statistics_by_hand():
    """Three prompts: a pair with means 4 and 1; one whose second answer did not end; and equal means."""
    answers = [answered((5.0, 3.0), (1.0, None)), answered((2.0, 2.0), ()), answered((3.0, 3.0), (3.0, 3.0))]
    answers[1].shortened[0] = True
    answers[2].judge_prompts[1] = None
    choices = [Choice(0, 1), Choice(why="few"), Choice(why="tied")]
    pairs = [each.pair(choice) for each, choice in zip(answers, choices, strict=True)]
    assert self_judge.statistics(answers, choices, pairs) == pytest.approx(
        {
            "response_lengths": (9 + 10 + 9 + 9 + 9 + 10) / 6,  # with the stop token, where there is one
            "bad_ends_per_GBS": 1 / 6,
            "bad_samples_per_GBS": 2 / 3,
            "bad_few": 1 / 3,
            "bad_tied": 1 / 3,
            "bad_overlap": 0.0,
            "bad_identical": 0.0,
            "judge_asked": 4 / 6,
            "judge_shortened": 1 / 6,
            "judge_mean": (4 + 1 + 2 + 3 + 3) / 5,
            "judge_variance": 1 / 5,
            "judge_agreement": 3 / 4,
            "judge_unparsed": 1 / 10,
            "chosen_lengths": 9,
            "reject_lengths": 10,
            "chosen_generated_rewards": 4,
            "rejected_generated_rewards": 1,
        }
    )


def test_statistics_of_pairs_by_hand():
    answers = answered((5.0,), (1.0,), (2.0,))
    pairs = [answers.pair(Choice(0, 1)), answers.pair(Choice(2, 1))]
    assert self_judge.pair_statistics(pairs) == {
        "chosen_lengths": (9 + 11) / 2,
        "reject_lengths": 10.0,
        "chosen_generated_rewards": 3.5,
        "rejected_generated_rewards": 1.0,
    }
    assert self_judge.pair_statistics([]) == {}


def test_the_judge_against_the_truth():
    """Means 4, 2, 3 against 1, 0, 2: deviations (1, -1, 0) and (0, -1, 1), so r = 1 / sqrt(2 * 2)."""
    answers = [answered((5.0, 3.0), ()), answered((2.0, None), (3.0, 3.0))]
    truth = np.array([[1.0, 9.0], [0.0, 2.0]])
    compared = self_judge.compare_with(truth, answers)
    assert compared == pytest.approx({"true_rewards": 3.0, "judge_correlation": 0.5})


@pytest.mark.parametrize(
    ("answers", "truth"),
    [
        ([answered((3.0,), (3.0,), (3.0,))], [[1.0, 2.0, 3.0]]),
        ([answered((3.0,), (1.0,), (2.0,))], [[2.0, 2.0, 2.0]]),
        ([answered((0.1,), (0.1,), (0.1,))], [[0.1, 0.1, 0.1]]),  # whose mean in floats is another number
        ([answered(*[(2.0, 2.0, 3.0)] * 10)], [[*range(9), 20.0]]),
        ([answered((3.0,), (), (None,))], [[1.0, 2.0, 3.0]]),
        ([answered((), (), ())], [[1.0, 2.0, 3.0]]),
    ],
)
def test_without_variation_there_is_no_correlation(answers, truth):
    expected = {"true_rewards": float(np.mean(truth)), "judge_correlation": 0.0}
    assert self_judge.compare_with(np.array(truth), answers) == expected


def test_statistics_of_comparisons_by_hand():
    answer = judged_answer(THREE, (4.0, 2.0, 0.0))
    compared = [
        ComparedJudgements(answer, 1, verdicts(v01="A", v10="C")),
        ComparedJudgements(answer, 1, {}),
        ComparedJudgements(answer, 1, verdicts(v02="A", v20="B")),
    ]
    assert self_judge.comparison_statistics(compared) == {"meta_comparisons": 4, "meta_unparsed": 0.25}
    assert self_judge.comparison_statistics(compared[1:2]) == {"meta_comparisons": 0}
    assert self_judge.comparison_statistics([]) == {"meta_comparisons": 0}


# ---- a buffer through a file -----------------------------------------------------------------------------


def contents(buffer: Buffer) -> tuple:
    """All that a buffer holds, in its order and with its bits."""
    waiting = []
    for pair in buffer.pairs:
        arrays = [pair.ids, *(x for one in pair.samples for x in (one.ids, one.logprobs, one.model_logprobs))]
        values = [pair.row, pair.chosen_reward, pair.rejected_reward, pair.gap]
        bits = [(array.dtype, array.shape, array.tobytes()) for array in arrays]
        waiting.append((*bits, *map(repr, values), pair.chosen.finish, pair.rejected.finish))
    return dict(buffer.counts), waiting


def odd_pairs() -> list[SampledPair]:
    """Pairs with every kind of float32 in them, ids beyond 16 bits, and samples that were cut."""
    odd = np.array([0.1, -0.0, 1e-45, -3.4028235e38, -1 / 3, -1e-8, -np.inf], np.float32)
    pairs = []
    for number, score in enumerate((5.0, 0.3, -1.0, 4.7)):
        ids = np.arange(len(odd), dtype=np.int32) * 49152 + number
        chosen = Sample(ids, odd, odd[::-1].copy(), "stop")
        rejected = words(f"cut {number}", ended=False)
        pairs.append(SampledPair(number, ids[:2], chosen, rejected, score, 0.1 + 0.2, score - (0.1 + 0.2)))
    return pairs


def test_a_buffer_through_json_is_the_same_to_the_last_bit(tmp_path):
    buffer, later = (Buffer(-1.0, 5.0, 0.4) for _ in range(2))
    assert [buffer.offer(pair) for pair in odd_pairs()] == [True] * 4
    assert [pair.row for pair in buffer.take(1)] == [0]  # which goes on counting
    buffer.save(tmp_path, {})
    later.load(tmp_path, {})
    assert contents(later) == contents(buffer)
    assert later.counts == {-1: 2, 0: 2, 1: 1, 2: 1, 3: 1, 4: 2, 5: 2}
    assert [pair.row for pair in later.pairs] == [1, 2, 3]


def test_a_buffer_goes_on_as_if_it_had_not_been_written(tmp_path):
    buffer, later = (Buffer(0.0, 5.0, 0.4) for _ in range(2))
    fives = [pair_of_samples(words("a"), words("b")) for _ in range(8)]
    accepted = [buffer.offer(pair) for pair in fives[:2]]
    buffer.save(tmp_path, {})
    later.load(tmp_path, {})
    assert [later.offer(pair) for pair in fives[2:]] == [buffer.offer(pair) for pair in fives[2:]]
    assert accepted == [True, True] and contents(later) == contents(buffer)
    # with n pairs the share of their class is (1 + n) / (6 + n): of 0.4 it is at n = 2.33
    assert len(later) == 3


def test_an_empty_buffer_through_json(tmp_path):
    buffer, later = (Buffer(0.0, 5.0, 0.4) for _ in range(2))
    buffer.save(tmp_path, {})
    later.load(tmp_path, {})
    assert contents(later) == contents(buffer) == ({score: 1 for score in range(6)}, [])


def test_a_buffer_of_another_run_is_refused(tmp_path):
    buffer = Buffer(0.0, 5.0, 0.4)
    with pytest.raises(UserError, match="is none of train_self_reward.py: give another --output"):
        buffer.load(tmp_path, {})
    flags = {"steps of an iteration": 10, "--rollout-ahead": 2}
    buffer.save(tmp_path, flags)
    buffer.load(tmp_path, flags)
    with pytest.raises(UserError, match="--rollout-ahead: 3, in the run that is to be continued 2: its ref"):
        buffer.load(tmp_path, {**flags, "--rollout-ahead": 3})
