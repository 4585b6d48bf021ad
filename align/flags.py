"""Checks of flags: the range of a number, and flags without effect beside others.

A rule is a pair of its description and its test. Upper bounds are generous: far above any use, and low enough
that a step of the run ends and that products of a few of these numbers are finite in fp32.
"""

import math
from collections.abc import Callable

from align.errors import UserError

Rule = tuple[str, Callable[[object], bool]]


def is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def whole(low: int, high: int) -> Rule:
    return f"a whole number from {low} to {high}", lambda x: type(x) is int and low <= x <= high


def number(low: float, high: float) -> Rule:
    return f"a number from {low:g} to {high:g}", lambda x: is_number(x) and low <= x <= high


def above(low: float, high: float) -> Rule:
    return f"a number above {low:g}, at most {high:g}", lambda x: is_number(x) and low < x <= high


def below(low: float, high: float) -> Rule:
    return f"a number from {low:g}, below {high:g}", lambda x: is_number(x) and low <= x < high


def between(low: float, high: float) -> Rule:
    return f"a number above {low:g}, below {high:g}", lambda x: is_number(x) and low < x < high


COUNT = whole(1, 10**9)
COUNT_OR_0 = whole(0, 10**9)
LENGTH = whole(2, 10**9)  # tokens of a row, at least a context and a target
SAMPLES = whole(1, 10**5)  # responses to one prompt
REPEATS = whole(1, 10**3)  # repetitions of work that takes minutes or more
LEARNING_RATE = number(0, 10)  # Adam moves a weight by about this much in a step
COEFFICIENT = number(0, 1e6)
SCALE = number(1e-6, 1e6)
SCORE = number(-1e6, 1e6)
BOUND = number(0, math.inf)  # inf: no bound


def flag_of(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def check_ranges(config: object, **rules: Rule) -> None:
    """Raise UserError for a field, or an item of a tuple, that breaks its rule; None is no value."""
    for name, (words, holds) in rules.items():
        value = getattr(config, name)
        for x in value if isinstance(value, tuple) else (value,):
            if x is not None and not holds(x):
                raise UserError(f"{flag_of(name)} {x} must be {words}")


def refuse_unused(config: object, default: object, names: str, why: str) -> None:
    """Raise UserError if one of these fields, which have no effect, differs from `default`'s."""
    for name in names.split():
        if (value := getattr(config, name)) != getattr(default, name):
            shown = value if str(value).isprintable() else repr(value)  # a message is one line
            raise UserError(f"{flag_of(name)} {shown} has no effect {why}: leave it out")
