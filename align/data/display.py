"""Examples as readable text, for the log."""

import numpy as np

from align.data.packing import Example
from align.data.tokenizer import Tokenizer


def show(example: Example, tokenizer: Tokenizer) -> str:
    """An example as text: trained tokens inside ⟦ ⟧, line ends as ↵, other control characters as escapes."""
    starts = [0, *(np.flatnonzero(np.diff(example.trained)) + 1).tolist()]
    # decoded from the row's start: a piece alone may lose its first space
    texts = [tokenizer.decode(example.ids[:end].tolist()) for end in [*starts, len(example.ids)]]
    pieces = [text[len(before) :] for before, text in zip(texts, texts[1:], strict=False)]
    marked = [f"⟦{p}⟧" if example.trained[start] else p for start, p in zip(starts, pieces, strict=True)]
    return "".join(visible(character) for character in "".join(marked))


def visible(character: str) -> str:
    """A printable character, or an escape in its place."""
    if character == "\n":
        return "↵\n"
    return character if character.isprintable() else character.encode("unicode_escape").decode()
