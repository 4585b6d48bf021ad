"""Command line of a script: its Config from flags, its help, and errors in one line."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType, UnionType
from typing import TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from align import console
from align.errors import UserError
from align.help_text import help_text

C = TypeVar("C")
BORDER, RULE = re.compile(r"^[│|]|[│|]$"), "─╭╮╰╯+- "  # of the box around tyro's messages
GROUPS = (  # of flags, in the order of --help; "": those of the script itself
    *(
        "model",
        "lora",
        "text",
        "data",
        "format",
        "reward",
        "judge",
        "meta",
        "",
        "kl",
        "truncation",
        "sampling",
        "rollout",
        "audit",
    ),
    *("batch", "parallel", "optim", "loop", "checkpoint", "run", "offload"),
)

CONFIG, FLAG_TYPES = (tyro.conf.OmitArgPrefixes,), ConstructorRegistry()


def parse(
    config_class: type[C], words: Sequence[str] | None = None, prog: str | None = None, doc: str | None = None
) -> C:
    """`words`, or the command line, as a configuration. Raises UserError for a flag that it does not take.

    --help prints `doc`, or the docstring of the script, and the flags in GROUPS, and ends the process.
    """
    words, prog = (sys.argv[1:] if words is None else words), prog or Path(sys.argv[0]).name
    shown, box = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(box):
            return tyro.cli(config_class, args=words, prog=prog, config=CONFIG, registry=FLAG_TYPES)
    except SystemExit as end:
        if not end.code:
            is_help = not words[0].startswith("--tyro-")  # of completion in a shell
            console.write(help_text(config_class, prog, GROUPS, doc) if is_help else shown.getvalue())
            raise
        lines = [BORDER.sub("", line.strip()).strip() for line in box.getvalue().splitlines()]
        lines = [line for line in lines[1:] if line.strip(RULE) and not line.startswith("For full helptext")]
        text = " ".join(lines).partition(" Argument helptext: ")[0]
        raise UserError(re.sub(r"^Error parsing \w+: ", "", text)) from None


@FLAG_TYPES.primitive_rule
def optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Values of a flag that may be None: the values of its type, and that word."""
    kinds = [kind for kind in get_args(info.type) if kind is not NoneType]
    if get_origin(info.type) not in (Union, UnionType) or len(kinds) != 1:
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    return replace(
        spec,
        choices=spec.choices and (*spec.choices, "None"),
        instance_from_str=lambda words: None if words == ["None"] else spec.instance_from_str(words),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
    )
