"""Bugs in the code of this project: a few words of a function replaced, in memory.

The words must be there: where the code has changed, its bug has to be seeded anew.
"""

import contextlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Iterator
from unittest import mock

import pytest

Bug = dict[str, list[tuple[str, str]]]  # module.function or module.Class.method: [(words, others), ...]


def mutant(thing: object, changes: list[tuple[str, str]]) -> object:
    """A function or a method with words of its source replaced; LookupError unless each occurs there once."""
    function = inspect.unwrap(getattr(thing, "__func__", thing))
    source = textwrap.dedent(inspect.getsource(function))
    for words, others in changes:
        times = source.count(words)
        if times != 1:
            raise LookupError(f"{function.__qualname__} has {words!r} {times} times: seed this bug anew")
        source = source.replace(words, others)
    namespace: dict[str, Callable] = {}
    exec(source, function.__globals__, namespace)
    return namespace[function.__name__]


@contextlib.contextmanager
def seeded(bug: Bug) -> Iterator[None]:
    """Seed a bug for the time of a block."""
    with contextlib.ExitStack() as stack:
        for place, changes in bug.items():
            owner, name = pkgutil.resolve_name(place.rpartition(".")[0]), place.rpartition(".")[2]
            changed = mutant(inspect.getattr_static(owner, name), changes)
            stack.enter_context(mock.patch.object(owner, name, changed))
        yield


def assert_fails_with(bug: Bug, test: Callable[[], None]) -> None:
    """A test passes, fails with this bug, and passes again."""
    test()
    with seeded(bug), pytest.raises(AssertionError):
        test()
    test()
