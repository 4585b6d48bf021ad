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
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "train.jsonl", directory / "val.jsonl"
    for path, rows in zip(paths, toy_rows(num_train, num_val, mistakes, seed), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths[:1], paths[1:]


def toy_rows(num_train: int, num_val: int, mistakes: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Chats to train on and to validate on, all with different prompts.

    A share `mistakes` of the training answers has two neighbours swapped; the validation answers are right.
    Raises ValueError if the task does not have that many prompts, or if `mistakes` is no share.
    """
    if num_train + num_val > NUM_PROMPTS // 2:  # beyond, drawing prompts that are new takes long
        raise ValueError(
            f"--train-rows {num_train} and --val-rows {num_val}: "
            f"the toy task has prompts for {NUM_PROMPTS // 2} rows in all"
        )
    if not 0 <= mistakes <= 1:
        raise ValueError(f"--mistakes {mistakes} must be between 0 and 1")
    rng = random.Random(seed)
    prompts: dict[tuple[str, ...], None] = {}  # a set that keeps its order
    while len(prompts) < num_train + num_val:
        prompts[tuple(rng.sample(LETTERS, rng.choice(SIZES)))] = None
    wrong = set(rng.sample(range(num_train), round(mistakes * num_train)))
    rows = [toy_row(letters, i in wrong, rng) for i, letters in enumerate(prompts)]
    return rows[:num_train], rows[num_train:]


def toy_row(letters: tuple[str, ...], wrong: bool, rng: random.Random) -> dict:
    """One chat; `wrong` swaps two neighbours of the answer: different letters, so it is never right."""
    answer = sorted(letters)
    if wrong:
        i = rng.randrange(len(answer) - 1)
        answer[i], answer[i + 1] = answer[i + 1], answer[i]
    user, assistant = "sort: " + " ".join(letters), " ".join(answer)
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


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
