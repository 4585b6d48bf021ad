"""Counts of rows for the log: read, cut, dropped, with fields that are not used."""

from collections.abc import Iterable, Sequence

from align.data import rows
from align.data.packing import Example
from align.data.tokenizer import Tokenizer

UNCHANGED = "rows of messages, on which {} has no effect"
MESSAGE_FIELDS = {"role", "content", "tool_calls", *rows.WEIGHTS}
IN_TEXT = "rows with special tokens in their text"
SPECIAL = (IN_TEXT, "rows with special tokens in a string, continued as it stands")


def count(counts: dict[str, int], name: str) -> None:
    """Increment the count of `name`, which the log shows if it is not 0."""
    counts[name] = counts.get(name, 0) + 1


def special_counts(tokenizer: Tokenizer) -> tuple[int, int]:
    """Numbers of texts and of whole strings with special tokens so far."""
    return tokenizer.texts_with_special, tokenizer.strings_with_special


def count_unread(messages: Sequence[dict], tokenizer: Tokenizer, counts: dict[str, int]) -> None:
    """Count the fields of messages that the chat template does not read."""
    names = {name for message in messages for name in message} - MESSAGE_FIELDS
    for name in sorted(names):
        if not tokenizer.template_reads(name):
            count(counts, f"rows with {name!r} in a message (not read by the chat template)")


def count_empty(example: Example, tokenizer: Tokenizer, counts: dict[str, int]) -> None:
    """Count an example that trains nothing but the end of a response."""
    trained = example.ids[example.trained]
    if len(trained) == 1 and int(trained[0]) in tokenizer.stop_ids:
        count(counts, "empty_answers")


def count_special(before: tuple[int, int], tokenizer: Tokenizer, counts: dict[str, int]) -> None:
    """Count a row with special tokens; `before`: `special_counts` at its start."""
    for name, old, new in zip(SPECIAL, before, special_counts(tokenizer), strict=True):
        if new > old:
            count(counts, name)


def count_unused(row: dict, used: set[str], counts: dict[str, int], use: str = "not used") -> None:
    """Count the fields of a row that are not encoded, by name and by their `use`."""
    for name in sorted(name for name in row.keys() - used if row[name] not in (None, "", [], {})):
        count(counts, f"rows with {name!r} ({use})")


def count_tokens(examples: Iterable[Example]) -> dict[str, int]:
    """tokens and trained_tokens of examples."""
    counts = {"tokens": 0, "trained_tokens": 0}
    for example in examples:
        counts["tokens"] += len(example.ids)
        counts["trained_tokens"] += int(example.trained.sum())
    return counts


def describe(counts: dict[str, int]) -> str:
    """Format nonzero counts for the log."""
    words = {name: name if "'" in name else name.replace("_", " ") for name in counts}  # no field's own name
    cut = [name for name in ("cut_prompts", "cut_answers") if name in words]
    words |= {name: f"{words[name]} (--max-seq-len)" for name in cut}
    return ", ".join(f"{value:,} {words[name]}" for name, value in counts.items() if value)
