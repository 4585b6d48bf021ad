"""Files of supervised fine-tuning to examples: token ids that know which of them are trained."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from align.data import rows
from align.data.formats import (
    UNCHANGED,
    FormatConfig,
    Tokenizer,
    add_bos,
    count,
    count_empty,
    count_special,
    count_unread,
    cut_end,
    format_parts,
    special_counts,
    unescape,
)
from align.data.jsonl import BadRows, at, read_jsonl
from align.data.marker_chat import MarkerChat, RowFormats
from align.data.packing import Example, num_trained
from align.errors import UserError


@dataclass(frozen=True)
class TrainedFormat:
    """The formats that a model was trained in, which later prompts must have: prompt_format.json."""

    rows: Literal["messages", "conversations", "template"]
    """format of most training rows"""
    prompt_template: str
    chat_tokens: tuple[str, str, str, str, str]
    add_bos: bool | None
    chat: MarkerChat | None
    """that of the model's chat template, if it is made of markers"""

    def save(self, directory: Path) -> None:
        """Write prompt_format.json."""
        (directory / "prompt_format.json").write_text(
            json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8"
        )


def adopt(
    formats: RowFormats, tokenizer: Tokenizer, fmt: FormatConfig, say: Callable[[str], None]
) -> TrainedFormat:
    """Let a tokenizer render, end and stop chats as the training rows do; `say` logs what is stored of them.

    Raises UserError for rows in two chat formats.
    """
    formats.check_used(fmt, FormatConfig)
    chat = formats.chat([unescape(token) for token in fmt.chat_tokens], add_bos(tokenizer, fmt))
    if chat:
        tokenizer.follow(chat)
    for line in formats.differences():
        say(line)
    if formats.rows["template"] and not chat and tokenizer.chat_template:
        say(
            "rows without messages go through --prompt-template, or stand as they are, and not through the "
            "chat template of the model, which knows nothing of what they teach"
        )
    if chat:
        label = f", label {chat.label!r}" if chat.label else ""
        say(
            f"chat template of the model: turns of {chat.user!r} and {chat.assistant!r}, "
            f"system {chat.system!r}{label} by default; an answer ends with {chat.end('')!r}"
        )
    rows = formats.rows.most_common(1)[0][0]
    return TrainedFormat(rows, fmt.prompt_template, fmt.chat_tokens, fmt.add_bos, tokenizer.chat)


# --------------------------------------------------------------------------------------------------
# SFT rows to examples


def load_sft(
    paths: list[Path], tokenizer: Tokenizer, fmt: FormatConfig, formats: RowFormats | None = None
) -> tuple[list[Example], dict[str, int]]:
    """All examples of these files, and counts for the log; `formats` counts the formats of their rows.

    Counts: rows read; of these cut_prompts (truncation fields were cut), cut_answers (cut on the right, the
    end is lost) and dropped (nothing trained is left); tokens and trained_tokens of the examples.
    Raises UserError naming file and line for a row that is wrong, and if no row is left.
    """
    counts = dict.fromkeys(("rows", "cut_prompts", "cut_answers", "dropped"), 0)
    examples = [cut_end(whole, fmt) for _, _, whole in read_sft(paths, tokenizer, fmt, counts, formats)]
    return examples, counts | count_tokens(examples)


def read_sft(
    paths: list[Path],
    tokenizer: Tokenizer,
    fmt: FormatConfig,
    counts: dict[str, int],
    formats: RowFormats | None = None,
) -> Iterator[tuple[str, dict, Example]]:
    """Every row of these files that `load_sft` keeps: "file:line", the row, its example of any length.

    Adds to the counts of rows, cut_prompts, cut_answers and dropped. Raises UserError as `load_sft` does.
    """
    fields, kept, bad = fmt.template_fields(), 0, BadRows(fmt.skip_bad_rows)
    for where, row in (numbered for path in paths for numbered in read_jsonl(path, bad)):
        seen = special_counts(tokenizer)
        try:
            made, used = at(where, rows.sft_row, row, fields)
            examples = at(where, format_parts, made, tokenizer, fmt)
        except ValueError as error:
            bad.add(error)
            continue
        counts["rows"] += 1
        form = rows.form_of(made, fields)
        count_unused(row, used, counts)
        if form == "messages" and fmt.add_bos is False:
            count(counts, UNCHANGED.format("--add-bos False"))
        count_unread(made.get("messages", ()), tokenizer, counts)
        for part, whole, cut_prompt in examples:
            counts["cut_prompts"] += cut_prompt
            if not cut_end(whole, fmt).trained.any():
                counts["dropped"] += 1
                continue
            kept += 1
            count_empty(whole, tokenizer, counts)
            counts["cut_answers"] += len(whole.ids) > fmt.max_seq_len
            if formats:
                formats.add(part, form)
            yield where, (row if part is made else row | part), whole
        count_special(seen, tokenizer, counts)
    counts.update(bad.counts())
    if not kept:
        raise UserError(
            f"{', '.join(map(str, paths))}: no row is left, all {counts['rows']} have their answers beyond "
            f"--max-seq-len {fmt.max_seq_len}: raise it"
        )


def count_unused(row: dict, used: set[str], counts: dict[str, int], use: str = "not used") -> None:
    """Count the fields of a row that no token comes from, by name and what is done with them."""
    for name in sorted(name for name in row.keys() - used if row[name] not in (None, "", [], {})):
        count(counts, f"rows with {name!r} ({use})")


def count_tokens(examples: list[Example]) -> dict[str, int]:
    """tokens and trained_tokens of examples, for the log."""
    return {"tokens": sum(len(example.ids) for example in examples), "trained_tokens": num_trained(examples)}
