"""The error that a user can mend, and the one line that it ends with."""

import contextlib
import sys
from collections.abc import Iterator

from align import console


class UserError(ValueError):
    """A flag, file, row or directory that cannot be used: one line with its name, its value and the rule.

    Scripts end on it with that line and status 2. Any other error is a fault of code and keeps its traceback.
    """


def user_message(error: BaseException) -> str | None:
    """The line for a UserError or a file that the system refuses; None for every other error."""
    if isinstance(error, UserError):
        return " ".join(str(error).splitlines())
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """End the process on a user's error in the body: one line on stderr, status 2, no traceback."""
    try:
        yield
    except Exception as error:
        if (message := user_message(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        console.flush()
