"""Reward functions, for --reward-fn tests.support.rewards:NAME."""

import zlib

from align.data import toy


def reward(prompt: str, response: str, row: dict) -> float:
    """For --reward-fn: the toy's score, and up to 1 that each answer has of its own.

    So answers of a random model differ in what they are worth, and one that differs shows in the mean reward.
    """
    return toy.reward(prompt, response, row) + zlib.crc32(response.encode("utf-8", "replace")) / 2**32


def tenth(prompt: str, response: str, row: dict) -> float:
    """0.1, of which three times the sum, divided by 3, is another number."""
    return 0.1


def of_some_prompts(prompt: str, response: str, row: dict) -> float:
    """`reward`, but 0 for all answers to about every second prompt: groups of one reward."""
    return zlib.crc32(prompt.encode()) % 2 * reward(prompt, response, row)
