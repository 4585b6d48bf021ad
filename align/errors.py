"""Errors of users, reported as one line."""

import contextlib
import re
import sys
from collections.abc import Iterator

from align import console


class UserError(ValueError):
    """An unusable flag, file, row or directory, in one line with its name, its value and the rule.

    A script ends with this line and status 2. Any other error is a bug and keeps its traceback.
    """


def user_message(error: BaseException) -> str | None:
    """The line for a UserError or an OSError of a file; None for every other error."""
    if isinstance(error, UserError):
        return " ".join(str(error).splitlines())
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None


def summary(error: Exception) -> str:
    """The start of an error's message without its dot, or the name of the error's class."""
    text = str(error).strip() or type(error).__name__
    return re.split(r"(?<=\w)\.? *\n|(?<=\w)\. ", text)[0].rstrip(".")


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """End the process after a user's error in the body: one line on stderr, status 2, no traceback."""
    try:
        yield
    except BrokenPipeError:  # the reader of stdout, such as `head`, has ended
        raise SystemExit(1) from None
    except (UserError, OSError) as error:
        if (message := user_message(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        console.write("", end="")  # flushes what is buffered, also to a pipe without a reader
