"""Bugs in the code of this project: a few words of a function replaced, in memory.

The words must be there: where the code has changed, its bug has to be seeded anew.
"""

from collections.abc import Callable

import pytest

from tools.conformance.planted import Changes as Bug
from tools.conformance.planted import mutant, seeded

__all__ = ["Bug", "assert_fails_with", "mutant", "seeded"]


def assert_fails_with(bug: Bug, test: Callable[[], None]) -> None:
    """A test passes, fails with this bug, and passes again."""
    test()
    with seeded(bug), pytest.raises(AssertionError):
        test()
    test()
