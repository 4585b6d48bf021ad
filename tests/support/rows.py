"""Rows of chats and of comparisons, of random words."""

import numpy as np


def words(count: int, seed: int) -> list[str]:
    """Random short words."""
    random = np.random.default_rng(seed)
    return ["".join(random.choice(list("abcdefg"), random.integers(1, 9))) for _ in range(count)]


def chats(count: int, seed: int) -> list[dict]:
    roles = ("user", "assistant") * 2
    return [
        {"messages": [{"role": role, "content": word} for role, word in zip(roles, some, strict=True)]}
        for some in (words(4, seed + i) for i in range(count))
    ]


def comparisons(count: int, seed: int, **more: float) -> list[dict]:
    """Pairs of answers to random words; a right one has its word in order, a wrong one reversed."""
    return [
        {"prompt": word, "chosen": "".join(sorted(word)) + "a", "rejected": word[::-1] + "g", **more}
        for word in words(count, seed)
    ]


def chat(*contents: str) -> dict:
    """A messages row: user and assistant by turns."""
    roles = ("user", "assistant") * len(contents)
    turns = zip(roles, contents, strict=False)
    return {"messages": [{"role": role, "content": content} for role, content in turns]}
