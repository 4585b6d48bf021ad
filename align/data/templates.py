"""Text templates with {{ variables }}: the prompts of judges."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from align.errors import UserError

VARIABLE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)


class Template:
    """Text with variables {{ name }}, the spaces optional."""

    def __init__(self, path: Path, flag: str, names: Sequence[str]):
        """Read a file, the value of `flag`. Raises UserError unless its variables are `names`."""
        try:
            self.text = Path(path).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{flag} {path} must be a text file in UTF-8: {error}") from error
        variables = [name.strip() for name in VARIABLE.findall(self.text)]
        if missing := [name for name in names if name not in variables]:
            raise UserError(f"{flag} {path} lacks the variable {{{{ {missing[0]} }}}}")
        if unknown := [name for name in variables if name not in names]:
            rule = f"it may have {', '.join(names)}"
            raise UserError(f"{flag} {path} has the variable {{{{ {unknown[0]} }}}}: {rule}")

    def fill(self, **texts: str) -> str:
        """`fill` of the text."""
        return fill(self.text, texts)


def fill(template: str, texts: Mapping[str, str]) -> str:
    """Replace each variable of a template, in one pass: variables inside `texts` are not replaced."""
    return VARIABLE.sub(lambda match: texts[match[1].strip()], template)
