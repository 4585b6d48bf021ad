"""The reward of GSM8K: which part of a response is its answer, and when that is right. All by hand."""

import subprocess
import sys

import pytest

from align.rewards.gsm8k import reward

RIGHT = [  # response, answer
    *[("so 7", "7"), ("7.0", "7"), ("1,000", "1000"), ("7", "7.0"), ("1000", "1,000")],
    *[("She has 3 + 4 = 7 apples.", "7"), ("It costs $1,234.50 in all.", "1234.5"), ("#### -12", "-12")],
    *[("about .5 litres", "0.5"), ("x = -.25", "-0.25"), ("7.", "7"), ("Answer: 12.", "12")],
    *[("#### $9{,}500", "9500"), ("$9{,}500$", "9500"), ("1,234,567", "1234567"), ("$18", "18")],
    *[("\N{MINUS SIGN}5", "-5"), ("it is \N{MINUS SIGN}5 degrees", "-5"), ("1/2", "0.5")],
    *[(r"\frac{1}{2}", "0.5"), (r"$\frac{1}{2}$", "1/2"), (r"\(42\)", "42"), (r"\boxed{18} then 3", "18")],
    *[("18 dollars", "18"), ("5 cm", "5"), ("50%", "50"), ("**18**", "18"), ("12 or 13", "13")],
    *[
        ("#### 18\nI had 3 apples", "18"),
        ("2 + 2 = 4\n#### 4", "4"),
        ("#### 3\n#### 4", "4"),
        ("10 - 4", "6"),
    ],
]
WRONG = [
    *[("8", "7"), ("seven", "7"), ("", "3"), ("none at all", "3"), ("3,4", "34"), ("$9{,}500", "500")],
    *[("\N{MINUS SIGN}5", "5"), ("-5", "5"), ("1/2", "2"), ("####", "3"), ("#### 3 18", "17")],
    *[(r"\boxed{3} 18", "18"), (r"\frac{1}{", "1"), ("\\", "1"), ("7 + ", "8"), ("1.8", "18")],
]


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [(*case, 1.0) for case in RIGHT] + [(*case, 0.0) for case in WRONG],
)
def test_reward(response, answer, expected):
    assert reward("a question", response, {"answer": answer}) == expected


@pytest.mark.parametrize("response", ["9^9^9^9^9", "(" * 2000, r"\frac{" * 500, "1" * 10000, "\x00" * 50])
def test_hopeless_answers_end(response):
    assert reward("a question", response, {"answer": "7"}) == 0.0


@pytest.mark.slow
def test_sympy_is_not_imported_by_other_runs():
    code = "import align.rewards.sources, align.rewards.gsm8k, sys; sys.exit('math_verify' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
