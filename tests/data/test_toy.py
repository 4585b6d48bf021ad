"""Judgements of the toy task: right by construction, checked against their prompts by other means."""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

import prepare_data
from align.data import formats, sft, toy
from align.data.templates import Template
from align.data.tokenizer import load_tokenizer
from align.errors import UserError
from align.judging import judge, meta_judge
from tests.support.files import TINY, read_jsonl


def chats(rows: list[dict]) -> list[tuple[str, str]]:
    """The user's and the assistant's text, row by row."""
    assert all([message["role"] for message in row["messages"]] == ["user", "assistant"] for row in rows)
    return [tuple(message["content"] for message in row["messages"]) for row in rows]


def judged(prompt: str, answer: str) -> tuple[list[str], int]:
    """The places of a right judgement and its score, in halves to round them without floats."""
    right, letters = sorted(prompt), answer.split(" ")
    places, hits = [], 0
    for i in range(max(len(right), len(letters))):
        wanted = right[i] if i < len(right) else "-"
        letter = letters[i] if i < len(letters) else "-"
        hits += wanted == letter
        places.append(wanted.upper() + letter + ("=" if wanted == letter else "/"))
    whole, rest = divmod(5 * hits, len(places))
    up = 2 * rest > len(places) or (2 * rest == len(places) and whole % 2)  # a half goes to the even number
    return places, whole + up


JUDGE = re.compile(r"judge: sort: ([a-j ]+) -> ([a-j ]+)")
META = re.compile(r"compare: sort: ([a-j ]+) -> ([a-j ]+)\nA: (.+)\nB: (.+)")


def test_a_judgement_worked_by_hand():
    assert toy.reasons(list("abcd"), list("abdc")) == "Aa= Bb= Cd/ Dc/"
    assert toy.judge_score(list("abcd"), list("abdc")) == 2  # 2.5, to the even number
    assert toy.reasons(list("abc"), ["a"]) == "Aa= B-/ C-/"
    assert toy.judge_score(list("abc"), ["a"]) == 2  # 1.67
    assert toy.reasons(list("ab"), ["a", "bc", "d"]) == "Aa= Bbc/ -d/"
    assert toy.judge_score(list("ab"), []) == 0
    assert toy.marked("Aa= Bb= Cd/ Dc/", "Aa= Bb= Dd= Cc=", "B") == "Aa= Bb= Cd/B Dc/B"


def test_judgements_are_right():
    rows = toy.judge_rows(2000, seed=3, after=50)
    scores = Counter()
    for asked, judgement in chats(rows):
        letters, answer = JUDGE.fullmatch(asked).groups()
        places, score = judged(letters.replace(" ", ""), answer)
        assert judgement == " ".join(places) + f" Score: {score}"
        assert score == round(5 * toy.toy_score("sort: " + letters, answer))
        assert judge.parse_score(judgement, 0, 5) == score
        assert judge.without_scores(judgement) == " ".join(places)
        scores[score] += 1
    assert set(scores) == {0, 1, 2, 3, 4, 5}
    assert min(scores.values()) > 60 and min(scores[5], scores[2], scores[3]) > 300
    assert toy.judge_rows(2000, seed=3, after=50) == rows != toy.judge_rows(2000, seed=4, after=50)
    assert toy.judge_rows(100, seed=3, after=50) != rows[:100]


def test_the_winner_is_the_right_judgement():
    rows = toy.meta_rows(2000, seed=3, after=50)
    winners, places_wrong = Counter(), Counter()
    for asked, verdict in chats(rows):
        letters, answer, *judgements = META.fullmatch(asked).groups()
        right, _ = judged(letters.replace(" ", ""), answer)
        winner = "A" if judgements[0].split(" ") == right else "B"
        loser = judgements["BA".index(winner)].split(" ")
        assert judgements["AB".index(winner)].split(" ") == right != loser
        wrong = [place != other for place, other in zip(right, loser, strict=True)]
        marked = [place + winner * flag for place, flag in zip(right, wrong, strict=True)]
        assert verdict == " ".join(marked) + f" Winner: Judgement {winner}"
        assert meta_judge.parse_winner(verdict) == winner
        winners[winner] += 1
        places_wrong[sum(wrong)] += 1
    assert set(places_wrong) == {1, 2, 3, 4, 5, 6} and places_wrong[1] > 900 and places_wrong[2] > 300
    assert min(winners.values()) > 900
    assert toy.meta_rows(2000, seed=3, after=50) == rows != toy.meta_rows(2000, seed=4, after=50)


def test_toy_files_for_judging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both templates and the mixed rows; no prompt is shared with any other file, and train.jsonl stays."""
    numbers = "--train-rows 300 --val-rows 20 --train-comparisons 30 --val-comparisons 10"
    flags = [*numbers.split(), "--judge-rows", "80", "--meta-rows", "40"]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "toy", "--output", str(tmp_path), *flags])
    prepare_data.main()
    fields = ["prompt", "response", "judgement_a", "judgement_b"]
    for name, names in (("judge.txt", fields[:2]), ("meta_judge.txt", fields)):
        template = Template(tmp_path / name, "--template", names)
        assert re.findall(r"{{ (\w+) }}", template.text) == names

    rows = read_jsonl(tmp_path / "train_judge.jsonl")
    kinds = [asked.split(":")[0] for asked, _ in chats(rows)]
    assert Counter(kinds) == {"judge": 80, "compare": 40}
    assert "compare" in kinds[:20] and "judge" in kinds[-20:]  # mixed
    prompts = [re.search(r"sort:( [a-j])+", asked)[0] for asked, _ in chats(rows)]
    for name in ("train", "val"):
        prompts += [asked for asked, _ in chats(read_jsonl(tmp_path / f"{name}.jsonl"))]
        prompts += [row["prompt"][0]["content"] for row in read_jsonl(tmp_path / f"{name}_comparisons.jsonl")]
    assert len(set(prompts)) == len(prompts) == 300 + 20 + 30 + 10 + 80 + 40
    assert read_jsonl(tmp_path / "train.jsonl") == toy.toy_rows(300, 20, mistakes=0.4, seed=1234)[0]

    examples, _ = sft.load_sft(
        [tmp_path / "train_judge.jsonl"], load_tokenizer(TINY), formats.FormatConfig(max_seq_len=192)
    )
    assert len(examples) == 120 and max(len(example.ids) for example in examples) < 192


def test_too_many_judgements():
    with pytest.raises(UserError, match="--judge-rows 90000 after 6400 rows: the toy task has prompts for"):
        toy.judge_rows(90000, seed=0)
    with pytest.raises(UserError, match="--meta-rows 90000 after 6400 rows: the toy task has prompts for"):
        toy.meta_rows(90000, seed=0)
