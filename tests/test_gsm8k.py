"""The reward of GSM8K: which number of a response counts, and when it is the answer."""

import pytest

from align.gsm8k import last_number, reward


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 apples.", 7.0),
        ("It costs $1,234.50 in all.", 1234.5),
        ("#### -12", -12.0),
        ("about .5 litres", 0.5),
        ("7.", 7.0),
        ("none at all", None),
        ("", None),
        ("10 - 4", 4.0),
        ("10-4", 4.0),
        ("x = -.25", -0.25),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [("so 7", "7", 1.0), ("7.0", "7", 1.0), ("1,000", "1000", 1.0), ("8", "7", 0.0), ("seven", "7", 0.0)],
)
def test_reward(response, answer, expected):
    assert reward("a question", response, {"answer": answer}) == expected
