"""Chat templates (Jinja), rendered as transformers does, within bounds of time and memory.

The sandbox is that of transformers: a template runs no other code. It may still loop or grow without end.
"""

import contextlib
import datetime
import functools
import json
import re
import resource
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jinja2

from align.errors import UserError

SECONDS = 10.0  # of one rendering
MEMORY = 1 << 30  # bytes that one of the first renderings may add to the process
LENGTH = 1 << 26  # characters of a rendered chat
WATCHED = 3  # first renderings of a template, whose memory is bounded
STRFTIME = re.compile(r"""strftime_now\s*\(\s*(["'])(?P<format>[^"'\\\n]*)\1\s*\)""")
ERRORS = (  # of code in a template
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError),
    *(TypeError, ValueError),
)
watched: Counter[str] = Counter()  # renderings of each template so far, up to WATCHED


def render(template: str, messages: list[dict], **variables: object) -> str:
    """Render a chat with variables of the template. Raises UserError if it refuses, or leaves the bounds."""
    [text], _ = bounded_render(template, messages, **variables)
    if len(text) > LENGTH:
        raise UserError(f"the chat template makes {len(text):,} characters of one chat")
    return text


def response_spans(template: str, messages: list[dict], **variables: object) -> list[tuple[int, int]]:
    """Spans [first, last) of the characters inside {% generation %}."""
    _, [spans] = bounded_render(template, messages, return_assistant_tokens_mask=True, **variables)
    return spans


def bounded_render(template: str, messages: list[dict], **variables: object) -> tuple[list[str], list]:
    """Texts and spans of one chat. Raises UserError as `render` does."""
    from transformers.utils.chat_template_utils import render_jinja_template  # takes seconds to import

    with bounded(template):
        return render_jinja_template([messages], chat_template=template, **variables)


@functools.lru_cache
def marks_responses(template: str) -> bool:
    """True if a template has {% generation %}."""
    return re.search(r"{%-?\s*generation\b", template) is not None


@functools.lru_cache
def reads(template: str, name: str) -> bool:
    """True if a variable's or a field's name occurs in a template."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


@contextlib.contextmanager
def bounded(template: str) -> Iterator[None]:
    """Convert errors of a template's code to UserError; bound its time, and at first its memory.

    Signals reach the main thread only: in another thread nothing is bounded.
    """
    limits = None
    is_main = threading.current_thread() is threading.main_thread()
    try:
        if is_main:
            limits = limit_memory(template)
            handle_alarm()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
        yield
    except TimeoutError as error:
        raise UserError(f"the chat template takes more than {SECONDS:g} s for one chat") from error
    except MemoryError as error:
        raise UserError(f"the chat template takes more than {MEMORY >> 30} GiB for one chat") from error
    except ERRORS as error:
        raise UserError(f"the chat template refuses these messages: {error}") from error
    finally:
        if is_main:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if limits:
            resource.setrlimit(resource.RLIMIT_AS, limits)


def limit_memory(template: str) -> tuple[int, int] | None:
    """Limit the process's growth to MEMORY for a template's first renderings. Returns the former limits."""
    if watched[template] == WATCHED:
        return None
    watched[template] += 1
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    lower = most if soft == resource.RLIM_INFINITY else min(most, soft)
    resource.setrlimit(resource.RLIMIT_AS, (lower, hard))
    return soft, hard


@functools.cache
def handle_alarm() -> None:
    """Have SIGALRM raise TimeoutError, from the first rendering on."""

    def out_of_time(signum: int, frame: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, out_of_time)


@functools.lru_cache
def with_date(template: str, day: datetime.date) -> str:
    """Replace each strftime_now("...") by its text for `day`, so that a run has one date to its end."""
    return STRFTIME.sub(lambda call: call[1] + day.strftime(call["format"]) + call[1], template)


def reads_clock(template: str) -> bool:
    """True if a template reads the clock in a way that `with_date` does not replace."""
    return re.search(r"strftime_now\s*\(", STRFTIME.sub("", template)) is not None


def with_defaults(template: str, variables: dict) -> str:
    """Prepend default values of a template's variables."""
    lines = [
        f"{{% set {name} = {name} if {name} is defined else {literal(value)} %}}\n"
        for name, value in variables.items()
    ]
    return "".join(lines) + template


def literal(value: object) -> str:
    """A JSON value in Jinja's syntax."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(name)}: {literal(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    if value is None:
        return "none"
    return json.dumps(value, ensure_ascii=False)
