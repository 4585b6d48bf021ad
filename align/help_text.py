"""Text of a script's --help: its docstring, then its flags in groups, each with a caption.

Flags are the fields of a Config and of the configurations in it, their texts the docstrings below the fields.
"""

import ast
import inspect
import re
import shlex
import shutil
import sys
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from align.files import ROOT
from align.flags import flag_of

INDENT = 26  # columns of a flag's text
MAX_WIDTH = 110


def help_text(config_class: type, prog: str, order: Sequence[str], doc: str | None = None) -> str:
    """The whole text.

    Args:
        order: names of the groups, which are fields that are configurations, "data" for the plain fields that
            `config_class` inherits, and "" for its own; a group that it does not name follows its own.
        doc: text at the top, by default the docstring of the module of `config_class`.
    """
    width = min(MAX_WIDTH, shutil.get_terminal_size().columns)
    doc = inspect.cleandoc(doc or sys.modules[config_class.__module__].__doc__ or "")
    parts = [f"usage: {prog} [--flag value ...]", *(wrap(part, width) for part in doc.split("\n\n"))]
    groups = dict(group_flags(config_class))
    for name in sorted(groups, key=lambda name: order.index(name if name in order else "")):
        caption, flags = groups[name]
        if flags:
            head = wrap(f"{name or Path(prog).name}: {caption}", width)
            parts.append("\n".join([head, *(entry(*flag, width) for flag in flags)]))
    return "\n\n".join(parts)


def wrap(paragraph: str, width: int) -> str:
    """A paragraph in lines of `width`; with indented lines, such as commands, cut at joins only."""
    if any(line.startswith(" ") for line in paragraph.splitlines()):
        return re.sub(r"(?<=\S)   +", " \\\\\n        ", paragraph)
    return textwrap.fill(paragraph, width, break_on_hyphens=False)


Flag = tuple[str, Any, Any, str]  # name of the field, type, default, text


def group_flags(config_class: type) -> Iterator[tuple[str, tuple[str, list[Flag]]]]:
    """(name, (caption, flags)) of each group."""
    flags, hints = flags_of(config_class), get_type_hints(config_class)
    own = inspect.get_annotations(config_class)
    yield "data", ("Training and validation rows", [flag for flag in flags if flag[0] not in own])
    yield "", (caption_of(config_class) or "Flags of this script", [flag for flag in flags if flag[0] in own])
    for field in fields(config_class):
        if is_dataclass(field.default):
            yield field.name, (caption_of(hints[field.name]), flags_of(hints[field.name], field.default))


def flags_of(config_class: type, defaults: Any = None) -> list[Flag]:
    """The plain fields of a configuration; `defaults`: an instance that has other ones."""
    texts, hints = field_docstrings(config_class), get_type_hints(config_class)
    return [
        (f.name, hints[f.name], getattr(defaults, f.name, f.default), texts.get(f.name, ""))
        for f in fields(config_class)
        if not is_dataclass(f.default)
    ]


def caption_of(config_class: type) -> str:
    """The first paragraph of a dataclass's docstring; empty for the signature that `dataclass` writes."""
    doc = config_class.__doc__ or ""
    return "" if doc.startswith(f"{config_class.__name__}(") else " ".join(doc.split("\n\n")[0].split())[:-1]


def field_docstrings(config_class: type) -> dict[str, str]:
    """The strings below the fields of a dataclass and of its bases, each in one line."""
    texts = {}
    for base in reversed(config_class.__mro__[:-1]):
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for above, node in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(above, ast.AnnAssign) and isinstance(node, ast.Expr):
                texts[ast.unparse(above.target)] = " ".join(ast.literal_eval(node.value).split())
    return texts


def entry(name: str, hint: Any, default: Any, text: str, width: int) -> str:
    """A flag, the form of its value, its text and its default."""
    flag = flag_of(name)
    head = f"  {flag}, --no-{flag[2:]}" if hint is bool else f"  {flag} {form(hint)}"
    if len(head) > width:  # many choices
        head = textwrap.fill(head.replace(",", ", "), width, subsequent_indent=" " * 6)
    lines = textwrap.wrap(
        f"{text}{default_note(default, text)}", width - INDENT, break_on_hyphens=False, break_long_words=False
    )
    if len(head) < INDENT - 1:
        head, lines = f"{head:<{INDENT}}{lines[0]}", lines[1:]
    return "\n".join([head, *(" " * INDENT + line for line in lines)])


def form(hint: Any) -> str:
    """FLOAT, {a,b}, PATH ..., or INT INT, of a value on the command line."""
    origin, arguments = get_origin(hint), [x for x in get_args(hint) if x is not types.NoneType]
    if origin in (Union, types.UnionType):
        return "|".join(map(form, arguments))
    if origin is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if origin is tuple:
        return " ".join("..." if x is ... else form(x) for x in arguments)
    return "{True,False}" if hint is bool else hint.__name__.upper()


def default_note(default: Any, text: str) -> str:
    """` (default: ...)`; nothing for an empty default, whose meaning the text has, unless that names None."""
    if default in (None, (), "") and "None:" not in text:
        return ""
    values = default if isinstance(default, tuple) else (default,)
    return f" (default: {' '.join(map(shown, values))})"


def shown(value: object) -> str:
    """A value as one types it; a file of this project, such as a template, from the project's root on."""
    if isinstance(value, Path) and value.is_relative_to(ROOT):
        value = value.relative_to(ROOT)
    return shlex.quote(str(value))
