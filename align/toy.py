"""The toy task of the demo: sort letters. Small enough for the tiny model, with a score that needs no judge.

user:      sort: d b a c
assistant: a b c d
"""

import json
import random
import re
from pathlib import Path

LETTERS = "abcdefghij"
SIZES = (3, 4, 5, 6)  # letters in one prompt
NUM_PROMPTS = 720 + 5040 + 30240 + 151200  # ordered choices of 3, 4, 5, 6 out of 10


def write(
    directory: Path, num_train: int = 4000, num_val: int = 200, mistakes: float = 0.4, seed: int = 1234
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Write train.jsonl and val.jsonl, and return their paths as --train-data and --val-data take them."""
    return write_parts(directory, "", toy_rows(num_train, num_val, mistakes, seed))


def write_comparisons(
    directory: Path, num_train: int = 2000, num_val: int = 200, seed: int = 1234
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Write train_comparisons.jsonl and val_comparisons.jsonl, and return their paths like `write`."""
    return write_parts(directory, "_comparisons", comparisons(num_train, num_val, seed))


def write_parts(
    directory: Path, suffix: str, parts: tuple[list[dict], list[dict]]
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Write train{suffix}.jsonl and val{suffix}.jsonl, and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / f"train{suffix}.jsonl", directory / f"val{suffix}.jsonl"
    for path, rows in zip(paths, parts, strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths[:1], paths[1:]


def toy_rows(num_train: int, num_val: int, mistakes: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Chats to train on and to validate on, all with different prompts.

    A share `mistakes` of the training answers has two neighbours swapped; the validation answers are right.
    Raises ValueError if the task does not have that many prompts, or if `mistakes` is no share.
    """
    check_count(num_train + num_val, f"--train-rows {num_train} and --val-rows {num_val}")
    if not 0 <= mistakes <= 1:
        raise ValueError(f"--mistakes {mistakes} must be between 0 and 1")
    rng = random.Random(seed)
    prompts = draw_prompts(num_train + num_val, rng)
    wrong = set(rng.sample(range(num_train), round(mistakes * num_train)))
    rows = []
    for i, letters in enumerate(prompts):
        right = sorted(letters)
        answer = swapped(right, rng) if i in wrong else right
        rows.append({"messages": [question(letters), reply(answer)]})
    return rows[:num_train], rows[num_train:]


def comparisons(num_train: int, num_val: int, seed: int, after: int = 4200) -> tuple[list[dict], list[dict]]:
    """Pairs to train on and to validate on: the right answer over one with two neighbours swapped.

    All prompts differ, also from the first `after` that `toy_rows` draws with this seed (4200: those of
    `write` as it comes). Raises ValueError if the task does not have that many prompts.
    """
    flags = f"--train-comparisons {num_train} and --val-comparisons {num_val} after {after} rows"
    check_count(after + num_train + num_val, flags)
    rng = random.Random(seed)
    rows = []
    for letters in draw_prompts(after + num_train + num_val, rng)[after:]:
        right = sorted(letters)
        wrong = swapped(right, rng)
        task = question(letters)
        rewards = {"chosen_reward": 1.0, "rejected_reward": toy_score(task["content"], " ".join(wrong))}
        rows.append({"prompt": [task], "chosen": [reply(right)], "rejected": [reply(wrong)], **rewards})
    return rows[:num_train], rows[num_train:]


def check_count(count: int, flags: str) -> None:
    """Raises ValueError if the task has too few prompts: near the last one, drawing a new one takes long."""
    if count > NUM_PROMPTS // 2:
        raise ValueError(f"{flags}: the toy task has prompts for {NUM_PROMPTS // 2} rows in all")


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


def toy_score(prompt: str, answer: str) -> float:
    """Share of positions that hold the right letter, from 0 to 1; missing and extra letters are mistakes.

    `prompt` may be a whole rendered chat; its last task counts. Raises ValueError if it holds none.
    """
    tasks = re.findall(rf"sort:((?: [{LETTERS}])+)", prompt)
    if not tasks:
        raise ValueError(f"{prompt!r} is no toy task: it must hold something like 'sort: d b a c'")
    right, given = sorted(tasks[-1].split()), answer.split()
    hits = sum(r == g for r, g in zip(right, given, strict=False))
    return hits / max(len(right), len(given))


def reward(prompt: str, response: str, row: dict) -> float:
    """The score as --reward-fn wants it."""
    return toy_score(prompt, response)
