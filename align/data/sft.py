"""SFT files to examples, and the formats that a model was trained in."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from align.data import row_counts, rows
from align.data.formats import FormatConfig, add_bos, cut_end, format_parts, unescape
from align.data.jsonl import BadRows, located, read_jsonl, write_object
from align.data.marker_chat import MarkerChat, RowFormats
from align.data.packing import Example
from align.data.stored_rows import StoredRows, store
from align.data.tokenizer import Tokenizer
from align.errors import UserError


@dataclass(frozen=True)
class TrainedFormat:
    """Formats that a model was trained in, and that its prompts must have: prompt_format.json."""

    rows: Literal["messages", "conversations", "template"]
    """format of most training rows"""
    prompt_template: str
    chat_tokens: tuple[str, str, str, str, str]
    add_bos: bool | None
    chat: MarkerChat | None
    """chat of the model's chat template, if it is a marker chat"""

    def save(self, directory: Path) -> None:
        """Write prompt_format.json."""
        write_object(directory / "prompt_format.json", asdict(self))


def adopt(
    formats: RowFormats, tokenizer: Tokenizer, fmt: FormatConfig, say: Callable[[str], None]
) -> TrainedFormat:
    """Make a tokenizer render, end and stop chats as the training rows do; `say` logs the formats stored.

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
            "rows without messages are formatted by --prompt-template, or are used unchanged, and not by the "
            "chat template of the model, which does not change with them"
        )
    if chat:
        label = f", label {chat.label!r}" if chat.label else ""
        say(
            f"chat template of the model: turns of {chat.user!r} and {chat.assistant!r}, "
            f"system {chat.system!r}{label} by default; a response ends with {chat.end('')!r}"
        )
    rows = formats.rows.most_common(1)[0][0]
    return TrainedFormat(rows, fmt.prompt_template, fmt.chat_tokens, fmt.add_bos, tokenizer.chat)


def load_sft(
    paths: list[Path], tokenizer: Tokenizer, fmt: FormatConfig, formats: RowFormats | None = None
) -> tuple[StoredRows[Example], dict[str, int]]:
    """Load all examples of these files, and counts for the log; `formats` counts the formats of their rows.

    Counts: rows read; of these cut_prompts (truncation fields were cut), cut_answers (cut on the right, the
    end is lost) and dropped (nothing trained is left); tokens and trained_tokens of the examples.
    Raises UserError naming file and line for a wrong row, and if no row is left.
    """
    counts = dict.fromkeys(("rows", "cut_prompts", "cut_answers", "dropped"), 0)
    wholes = (whole for _, _, whole in read_sft(paths, tokenizer, fmt, counts, formats))
    examples = store(cut_end(whole, fmt) for whole in wholes)
    return examples, counts | row_counts.count_tokens(examples)


def read_sft(
    paths: list[Path],
    tokenizer: Tokenizer,
    fmt: FormatConfig,
    counts: dict[str, int],
    formats: RowFormats | None = None,
) -> Iterator[tuple[str, dict, Example]]:
    """Yield every row of these files that `load_sft` keeps: "file:line", the row, its example of any length.

    Adds to the counts of rows, cut_prompts, cut_answers and dropped. Raises UserError as `load_sft` does.
    """
    fields, kept, bad = fmt.template_fields(), 0, BadRows(fmt.skip_bad_rows)
    for location, row in (numbered for path in paths for numbered in read_jsonl(path, bad)):
        special_before = row_counts.special_counts(tokenizer)
        try:
            normalised, used = located(location, rows.sft_row, row, fields)
            examples = located(location, format_parts, normalised, tokenizer, fmt)
        except ValueError as error:
            bad.add(error)
            continue
        counts["rows"] += 1
        form = rows.form_of(normalised, fields)
        row_counts.count_unused(row, used, counts)
        if form == "messages" and fmt.add_bos is False:
            row_counts.count(counts, row_counts.UNCHANGED.format("--add-bos False"))
        row_counts.count_unread(normalised.get("messages", ()), tokenizer, counts)
        for part, whole, cut_prompt in examples:
            counts["cut_prompts"] += cut_prompt
            if not cut_end(whole, fmt).trained.any():
                counts["dropped"] += 1
                continue
            kept += 1
            row_counts.count_empty(whole, tokenizer, counts)
            counts["cut_answers"] += len(whole.ids) > fmt.max_seq_len
            if formats:
                formats.add(part, form)
            yield location, (row if part is normalised else row | part), whole
        row_counts.count_special(special_before, tokenizer, counts)
    counts.update(bad.counts())
    if not kept:
        reason = f"have their responses beyond --max-seq-len {fmt.max_seq_len}: raise it"
        files = ", ".join(map(str, paths))
        raise UserError(f"{files}: no row is left, all {counts['rows']} {reason}")
