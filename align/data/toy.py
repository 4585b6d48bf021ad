"""The toy task of the demo: sort letters. Small enough for the tiny model, with a score that needs no judge.

user:      sort: d b a c
assistant: a b c d

For self-rewarding the model learns to judge responses, and to find the right one of two judgements. A
judgement lists the places, the right letter in capitals before the letter of the response, with "=" if they
are equal, else "/". A verdict lists them as well, with the winner after each place that the loser has wrong.

user:      judge: sort: d b a c -> a b d c
assistant: Aa= Bb= Cd/ Dc/ Score: 2

user:      compare: sort: d b a c -> a b d c
           A: Aa= Bb= Dd= Cc=
           B: Aa= Bb= Cd/ Dc/
assistant: Aa= Bb= Cd/B Dc/B Winner: Judgement B
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from align.data.templates import fill
from align.errors import UserError
from align.files import write_own

Paths = tuple[tuple[Path, ...], tuple[Path, ...]]  # of --train-data and of --val-data
LETTERS = "abcdefghij"
SIZES = (3, 4, 5, 6)  # letters in one prompt
NUM_PROMPTS = 720 + 5040 + 30240 + 151200  # ordered choices of 3, 4, 5, 6 out of 10
MAX_SCORE = 5  # of a judgement; the least is 0
JUDGE_TEMPLATE = "judge: {{ prompt }} -> {{ response }}"
META_TEMPLATE = "compare: {{ prompt }} -> {{ response }}\nA: {{ judgement_a }}\nB: {{ judgement_b }}"
MISSING = "-"  # the letter in a judgement where the response is too short or too long
# kinds of mistakes in a judgement, with their frequencies: those of the model are mostly of the first two
MISTAKES = {"right": 50, "response": 25, "order": 15, "mark": 10}
# kinds of responses to judge, with their frequencies: the model's own are mostly right or one swap away, and
# shuffled ones make it read the response
FLAWS = {
    **{"none": 20, "swap": 25, "swaps": 10, "shuffled": 25},
    **{"turned": 5, "short": 4, "long": 4, "replaced": 7},
}


def write(
    directory: Path, num_train: int = 4000, num_val: int = 200, mistakes: float = 0.4, seed: int = 1234
) -> Paths:
    """Write train.jsonl and val.jsonl, and return their paths for --train-data and --val-data."""
    return write_parts(directory, "", toy_rows(num_train, num_val, mistakes, seed))


def write_comparisons(directory: Path, num_train: int = 2000, num_val: int = 200, seed: int = 1234) -> Paths:
    """Write train_comparisons.jsonl and val_comparisons.jsonl, and return their paths like `write`."""
    return write_parts(directory, "_comparisons", comparisons(num_train, num_val, seed))


def write_templates(directory: Path) -> tuple[Path, Path]:
    """Write judge.txt and meta_judge.txt, and return their paths."""
    paths = directory / "judge.txt", directory / "meta_judge.txt"
    for path, template in zip(paths, (JUDGE_TEMPLATE, META_TEMPLATE), strict=True):
        write_own(path, template)
    return paths


def write_parts(directory: Path, suffix: str, parts: tuple[list[dict], list[dict]]) -> Paths:
    """Write train{suffix}.jsonl and val{suffix}.jsonl, and return their paths."""
    paths = directory / f"train{suffix}.jsonl", directory / f"val{suffix}.jsonl"
    for path, rows in zip(paths, parts, strict=True):
        write_own(path, "".join(json.dumps(row) + "\n" for row in rows))
    return paths[:1], paths[1:]


def toy_rows(num_train: int, num_val: int, mistakes: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Chats for training and validation, all with different prompts.

    A share `mistakes` of the training responses has two neighbours swapped; validation responses are right.
    Raises UserError if the task has too few prompts, or if `mistakes` is no share.
    """
    check_count(num_train + num_val, f"--train-rows {num_train} and --val-rows {num_val}")
    if not 0 <= mistakes <= 1:
        raise UserError(f"--mistakes {mistakes} must be between 0 and 1")
    rng = random.Random(seed)
    prompts = draw_prompts(num_train + num_val, rng)
    wrong = set(rng.sample(range(num_train), round(mistakes * num_train)))
    rows = []
    for i, letters in enumerate(prompts):
        response = swapped(sorted(letters), rng) if i in wrong else sorted(letters)
        rows.append({"messages": [question(letters), reply(response)]})
    return rows[:num_train], rows[num_train:]


def comparisons(num_train: int, num_val: int, seed: int, after: int = 4200) -> tuple[list[dict], list[dict]]:
    """Pairs for training and validation: the right response over one with two neighbours swapped.

    All prompts differ, also from the first `after` of `toy_rows` with this seed (4200: of `write` with its
    defaults). Raises UserError if the task has too few prompts.
    """
    flags = f"--train-comparisons {num_train} and --val-comparisons {num_val} after {after} rows"
    check_count(after + num_train + num_val, flags)
    rng = random.Random(seed)
    rows = []
    for letters in draw_prompts(after + num_train + num_val, rng)[after:]:
        task, right = question(letters), sorted(letters)
        wrong = swapped(right, rng)
        rewards = {"chosen_reward": 1.0, "rejected_reward": toy_score(task["content"], " ".join(wrong))}
        rows.append({"prompt": [task], "chosen": [reply(right)], "rejected": [reply(wrong)], **rewards})
    return rows[:num_train], rows[num_train:]


def judge_rows(num: int, seed: int, after: int = 6400) -> list[dict]:
    """Chats in which the assistant judges a response: JUDGE_TEMPLATE, then reasons and a score.

    All prompts differ, also from the first `after` of `toy_rows` and `comparisons` with this seed (6400: of
    `write` and `write_comparisons` with their defaults). Raises UserError if there are too few.
    """
    rows = []
    for task, right, rng in tasks_to_judge(num, seed, after, f"--judge-rows {num}"):
        response = flawed(right, rng)
        judgement = f"{reasons(right, response)} Score: {judge_score(right, response)}"
        prompt = fill(JUDGE_TEMPLATE, {"prompt": task, "response": " ".join(response)})
        rows.append(chat(prompt, judgement))
    return rows


def meta_rows(num: int, seed: int, after: int = 6400) -> list[dict]:
    """Chats in which the assistant finds the right one of two judgements, shown without their scores.

    Prompts as in `judge_rows`. The right judgement is A or B by chance.
    """
    rows = []
    for task, right, rng in tasks_to_judge(num, seed, after, f"--meta-rows {num}"):
        response = flawed(right, rng)
        judgement, wrong = reasons(right, response), wrong_reasons(right, response, rng)
        winner = rng.choice("AB")
        a, b = (judgement, wrong) if winner == "A" else (wrong, judgement)
        fields = {"prompt": task, "response": " ".join(response), "judgement_a": a, "judgement_b": b}
        verdict = f"{marked(judgement, wrong, winner)} Winner: Judgement {winner}"
        rows.append(chat(fill(META_TEMPLATE, fields), verdict))
    return rows


def tasks_to_judge(
    num: int, seed: int, after: int, flag: str
) -> Iterator[tuple[str, list[str], random.Random]]:
    """Yield user's text, right response and the generator for `num` prompts after the first `after`."""
    check_count(after + num, f"{flag} after {after} rows")
    rng = random.Random(seed)
    for letters in draw_prompts(after + num, rng)[after:]:
        yield question(letters)["content"], sorted(letters), rng


def flawed(right: list[str], rng: random.Random) -> list[str]:
    """A response to judge: right, or with a flaw of one of the kinds in FLAWS."""
    [kind] = rng.choices(list(FLAWS), list(FLAWS.values()))
    i = rng.randrange(len(right))
    match kind:
        case "none":
            return right
        case "swap":
            return swapped(right, rng)
        case "swaps":
            return swapped(swapped(right, rng), rng)
        case "shuffled":
            return rng.sample(right, len(right))
        case "turned":  # no letter is where it belongs
            return [*right[1:], right[0]]
        case "short":
            return [*right[:i], *right[i + 1 :]]
        case "long":
            return [*right[:i], rng.choice(LETTERS), *right[i:]]
    return [*right[:i], rng.choice(LETTERS), *right[i + 1 :]]


def reasons(right: list[str], response: list[str]) -> str:
    """The judgement without its score: "Aa= Bc/ Cb/". Capitals are the right letters, in sorted order."""
    places = zip_longest(right, response, fillvalue=MISSING)
    return " ".join(f"{a.upper()}{b}{'=' if a == b else '/'}" for a, b in places)


def judge_score(right: list[str], response: list[str]) -> int:
    """The score of a judgement, from 0 to MAX_SCORE: `toy_score`, scaled and rounded."""
    return round(MAX_SCORE * toy_score("sort: " + " ".join(right), " ".join(response)))


def wrong_reasons(right: list[str], response: list[str], rng: random.Random) -> str:
    """A judgement with one mistake: a letter in neither prompt nor response, a wrong order or mark."""
    [kind] = rng.choices(list(MISTAKES), list(MISTAKES.values()))
    i = rng.randrange(len(right))
    if kind == "right":
        return reasons(sorted([*right[:i], other_letter(right, rng), *right[i + 1 :]]), response)
    if kind == "response" and response:
        i = rng.randrange(len(response))
        return reasons(right, [*response[:i], other_letter(response[i], rng), *response[i + 1 :]])
    if kind == "order":
        return reasons(swapped(right, rng), response)
    places = reasons(right, response).split(" ")
    places[i] = places[i].translate(str.maketrans("=/", "/="))
    return " ".join(places)


def other_letter(letters: Sequence[str], rng: random.Random) -> str:
    """A random letter outside `letters`."""
    return rng.choice([letter for letter in LETTERS if letter not in letters])


def marked(judgement: str, wrong: str, winner: str) -> str:
    """The right judgement, with the winner's letter after each place that the wrong one lacks."""
    pairs = zip(judgement.split(" "), wrong.split(" "), strict=True)
    return " ".join(place if place == other else place + winner for place, other in pairs)


def chat(prompt: str, response: str) -> dict:
    """A row of one prompt and one response."""
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]}


def check_count(count: int, flags: str) -> None:
    """Raise UserError if the task has too few prompts: near the last one, drawing a new one takes long."""
    if count > NUM_PROMPTS // 2:
        raise UserError(f"{flags}: the toy task has prompts for {NUM_PROMPTS // 2} rows in all")


def draw_prompts(count: int, rng: random.Random) -> list[tuple[str, ...]]:
    """`count` different prompts; the first of them do not depend on `count`."""
    prompts: dict[tuple[str, ...], None] = {}  # a set that keeps its order
    while len(prompts) < count:
        prompts[tuple(rng.sample(LETTERS, rng.choice(SIZES)))] = None
    return list(prompts)


def question(letters: tuple[str, ...]) -> dict:
    """The user's message."""
    return {"role": "user", "content": "sort: " + " ".join(letters)}


def reply(letters: list[str]) -> dict:
    """The assistant's message."""
    return {"role": "assistant", "content": " ".join(letters)}


def swapped(letters: list[str], rng: random.Random) -> list[str]:
    """The letters with two neighbours swapped: different letters, so sorted ones are no longer sorted."""
    i = rng.randrange(len(letters) - 1)
    return [*letters[:i], letters[i + 1], letters[i], *letters[i + 2 :]]


def toy_score(prompt: str, response: str) -> float:
    """Share of positions with the right letter, from 0 to 1; missing and extra letters are mistakes.

    `prompt` may be a whole rendered chat; its last task counts. Raises UserError without a task.
    """
    tasks = re.findall(rf"sort:((?: [{LETTERS}])+)", prompt)
    if not tasks:
        raise UserError(f"{prompt!r} is no toy task: it must hold something like 'sort: d b a c'")
    right, letters = sorted(tasks[-1].split()), response.split()
    hits = sum(r == letter for r, letter in zip(right, letters, strict=False))
    return hits / max(len(right), len(letters))


def reward(prompt: str, response: str, row: dict) -> float:
    """`toy_score` as a --reward-fn."""
    return toy_score(prompt, response)
