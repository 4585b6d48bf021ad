"""Output to stdout and stderr of any encoding, also closed, full, or a pipe without a reader."""

import os
import sys
from typing import Literal


def adapt() -> None:
    """Escape characters outside a stream's encoding; replace a closed stream by the null device."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def write(text: str, end: str = "\n", to: Literal["stdout", "stderr"] = "stdout") -> str | None:
    """Print and flush; returns the error's text or None. The null device replaces a stream that fails."""
    stream = getattr(sys, to)
    try:
        stream.write(text + end)
        stream.flush()
        return None
    except (OSError, ValueError, AttributeError) as error:  # ValueError: closed, AttributeError: None
        null = open(os.devnull, "w", encoding="utf-8")
        try:
            os.dup2(null.fileno(), stream.fileno())
        except (OSError, ValueError, AttributeError):
            pass  # no descriptor to redirect
        setattr(sys, to, null)
        return getattr(error, "strerror", None) or str(error)


def is_terminal() -> bool:
    """True if stdout is a UTF-8 terminal."""
    try:
        return sys.stdout.isatty() and "utf" in (sys.stdout.encoding or "utf").lower()
    except (ValueError, AttributeError):  # as in `write`
        return False
