"""Counts and the first example of data, for the log."""

import numpy as np

from align.data.formats import Tokenizer
from align.data.packing import Example


def describe(counts: dict[str, int]) -> str:
    """The counts of `load_sft` as words for the log; what did not happen is left out."""
    words = {name: name if "'" in name else name.replace("_", " ") for name in counts}  # no field's own name
    words |= {
        name: f"{words[name]} (--max-seq-len)" for name in ("cut_prompts", "cut_answers") if name in words
    }
    return ", ".join(f"{value:,} {words[name]}" for name, value in counts.items() if value)


def show(example: Example, tokenizer: Tokenizer) -> str:
    """An example as text: trained tokens inside ⟦ ⟧, line ends as ↵, other control characters as escapes."""
    starts = [0, *(np.flatnonzero(np.diff(example.trained)) + 1).tolist()]
    # decoded from the row's start each time: a piece alone may lose its first space
    texts = [tokenizer.decode(example.ids[:end].tolist()) for end in [*starts, len(example.ids)]]
    pieces = [text[len(before) :] for before, text in zip(texts, texts[1:], strict=False)]
    marked = [f"⟦{p}⟧" if example.trained[start] else p for start, p in zip(starts, pieces, strict=True)]
    return "".join(visible(character) for character in "".join(marked))


def visible(character: str) -> str:
    """A character as it is if it can be seen, else as an escape."""
    if character == "\n":
        return "↵\n"
    return character if character.isprintable() else character.encode("unicode_escape").decode()
