"""Prompts to sample from: jsonl rows to token ids.

A row is {"prompt"} or {"text"} in a string, {"prompt"} in messages, or an SFT row of {"messages"} or
{"conversations"} without its response. The ids equal those before the response in align/data/preferences.py.
A prompt is never truncated: one that is too long is dropped.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from align.data import formats, jsonl, marker_chat, packing, row_counts, rows
from align.data.formats import BosChoice
from align.data.jsonl import BadRows, turns_field
from align.data.packing import BatchConfig
from align.data.stored_rows import StoredRows, store
from align.data.tokenizer import Tokenizer
from align.errors import UserError
from align.flags import COUNT, COUNT_OR_0, check_ranges

T = TypeVar("T")
FIELDS = ("prompt", "text", "messages", "conversations")
ACCEPTED = """accepted is one of
  {"prompt"}, a string, continued unchanged, or a list of messages that ends before the response;
  {"text"}, a string, continued unchanged;
  {"messages"}, a conversation: if its last message is the assistant's, that is the response and left out;
  {"conversations"} of ShareGPT, {"instruction", "input"} of Alpaca, both without their responses;
  {"system", "conversations", "mask"}, the same for a model that was trained on such rows.
Fields of other names may stand beside it."""


@dataclass(frozen=True)
class PromptFormat:
    """Format of prompt rows."""

    max_prompt_len: int = 512
    """most tokens of a prompt; a longer one is dropped and counted"""
    add_bos: bool | None = None
    """put BOS in front of each row; None: as the tokenizer does by itself (messages: as the template does)"""
    skip_bad_rows: int = 0
    """most rows that are wrong in any way to leave out, with a line in the log, before the run ends"""

    def __post_init__(self):
        check_ranges(self, max_prompt_len=COUNT, skip_bad_rows=COUNT_OR_0)


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids to continue, and their row."""

    ids: np.ndarray  # [n] int32
    row: dict  # unchanged: a reward function may read its other fields


def load_sets(
    files: Mapping[str, Sequence[Path]],
    tokenizer: Tokenizer,
    fmt: PromptFormat,
    vocab_size: int,
    say: Callable[[str], None],
) -> dict[str, Sequence[Prompt]]:
    """Load and check the prompts of data sets, by name; `say` logs their number and the first prompt."""
    sets = load_each(files, lambda paths: load_prompts(paths, tokenizer, fmt), say)
    packing.check_ids((prompt for prompts in sets.values() for prompt in prompts), vocab_size)
    first = next(prompts[0] for prompts in sets.values() if prompts)
    say(f"first prompt:\n{tokenizer.decode(first.ids.tolist())}")
    return sets


def load_each(
    files: Mapping[str, Sequence[Path]],
    load: Callable[[Sequence[Path]], tuple[StoredRows[T], dict[str, int]]],
    say: Callable[[str], None],
) -> dict[str, Sequence[T]]:
    """Load the files of each data set by `load`, and log the counts by `say`; no files give an empty list."""
    sets: dict[str, Sequence[T]] = {}
    for name, paths in files.items():
        sets[name], counts = load(paths) if paths else ([], {})
        if paths:
            say(f"{name} data: {row_counts.describe(counts)}")
    return sets


def check_lengths(fmt: PromptFormat, max_new_tokens: int, config: BatchConfig, max_positions: int) -> None:
    """Raise UserError if prompt and response may exceed the model's context or a micro-batch."""
    longest = fmt.max_prompt_len + max_new_tokens
    flags = f"--max-prompt-len {fmt.max_prompt_len} and --max-new-tokens {max_new_tokens}"
    if longest > max_positions:
        raise UserError(f"{flags} are beyond the model's context of {max_positions} tokens: lower one")
    if longest > config.micro_batch_tokens:
        raise UserError(f"{flags} are above --micro-batch-tokens {config.micro_batch_tokens}: raise that")


def load_prompts(
    paths: Sequence[Path], tokenizer: Tokenizer, fmt: PromptFormat
) -> tuple[StoredRows[Prompt], dict[str, int]]:
    """Load all prompts of these files, and counts for the log.

    Counts: prompts read; dropped_too_long (above max_prompt_len); of the others tokens, and of the longest.
    Raises UserError naming file and line for a wrong row, and if no prompt is left.
    """
    counts = dict.fromkeys(("prompts", "dropped_too_long", "tokens", "longest"), 0)
    prompts = store(read_prompts(paths, tokenizer, fmt, counts))
    if not prompts:
        reason = f"all {counts['prompts']} are longer than --max-prompt-len {fmt.max_prompt_len}: raise it"
        raise UserError(f"{', '.join(map(str, paths))}: no prompt is left, {reason}")
    lengths = [len(prompt.ids) for prompt in prompts]
    counts["tokens"], counts["longest"] = sum(lengths), max(lengths)
    return prompts, counts


def read_prompts(
    paths: Sequence[Path], tokenizer: Tokenizer, fmt: PromptFormat, counts: dict[str, int]
) -> Iterator[Prompt]:
    """Yield the prompts that `load_prompts` keeps; add to its counts. Raises UserError for a wrong row."""
    bad = BadRows(fmt.skip_bad_rows)
    for location, row in (numbered for path in paths for numbered in jsonl.read_jsonl(path, bad)):
        special_before = row_counts.special_counts(tokenizer)
        try:
            ids = jsonl.located(location, format_prompt, row, tokenizer, fmt)
        except ValueError as error:
            bad.add(error)
            continue
        row_counts.count_special(special_before, tokenizer, counts)
        counts["prompts"] += 1
        row_counts.count_unused(row, used_fields(row), counts, "for reward functions")
        if fmt.add_bos is False and form_of(row)[0] == "chat":
            row_counts.count(counts, row_counts.UNCHANGED.format("--add-bos False"))
        if len(ids) > fmt.max_prompt_len:
            counts["dropped_too_long"] += 1
        else:
            yield Prompt(ids, row)
    counts.update(bad.counts())


def format_prompt(row: dict, tokenizer: Tokenizer, fmt: BosChoice) -> np.ndarray:
    """Encode a row as prompt ids, [n] int32, of any length but never empty. Raises UserError."""
    rows.refuse(row, set())
    form, field = form_of(row)
    if form == "text":
        rows.check_no_system(row, repr(field), ())
        if field != "instruction":
            check_responses(row, field)
        text = rows.alpaca_prompt(row) if field == "instruction" else jsonl.text_field(row, field)
        ids = formats.encode_prompt(text, field, tokenizer, fmt)
    elif form == "conversation":
        ids = encode_conversation(row, tokenizer, fmt)
    else:
        ids = encode_chat(row, field, tokenizer, fmt)
    formats.check_bos(ids, tokenizer)
    return np.array(ids, np.int32)


def is_alpaca(row: dict) -> bool:
    """True if a row's prompt is its instruction: in Alpaca's files "text" has the response too."""
    return "instruction" in row and not {"prompt", "messages", "conversations"} & set(row)


def form_of(row: dict) -> tuple[Literal["text", "conversation", "chat"], str]:
    """The form of a prompt, and its field; the chat template renders a chat. Raises UserError."""
    field = "instruction" if is_alpaca(row) else prompt_field(row)
    if isinstance(row[field], str) and (field != "prompt" or not row.get("system")):
        return "text", field
    return "conversation" if field == "conversations" and rows.is_marker_row(row) else "chat", field


def used_fields(row: dict) -> set[str]:
    """The fields of a row that `format_prompt` reads."""
    if is_alpaca(row):
        return {"instruction", "input"}
    return {*FIELDS, *rows.VARIABLES, "system", "mask", "type"}


def prompt_field(row: dict) -> str:
    """The one field of FIELDS that a row has. Raises UserError for none, several, or a wrong type."""
    fields = [field for field in FIELDS if field in row]
    if fields == ["prompt", "messages"] and is_copy(row["prompt"], row["messages"]):
        fields = ["messages"]
    if not fields:
        raise UserError(f"fields {', '.join(map(repr, row)) or 'none'}: {ACCEPTED}")
    if len(fields) > 1:
        raise UserError(f"both {fields[0]!r} and {fields[1]!r}: a row has one of them; {ACCEPTED}")
    [field] = fields
    kinds = {"prompt": (str, list), "text": (str,), "messages": (list,), "conversations": (list,)}[field]
    if not isinstance(row[field], kinds):
        raise UserError(f"field {field!r} is of type {type(row[field]).__name__}; {ACCEPTED}")
    return field


def is_copy(prompt: object, messages: object) -> bool:
    """True if a string is the content of a message, as beside the conversations of UltraFeedback."""
    turns = messages if isinstance(messages, list) else []
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
    return isinstance(prompt, str) and prompt in contents


def check_responses(row: dict, field: str) -> None:
    """Raise UserError for a string beside whole conversations, as some sets of pairs have them.

    `preferences.format_pair` reads the messages, so the string would give other ids than training on pairs.
    """
    responses = [f"{side}{suffix}" for side in ("chosen", "rejected") for suffix in ("", "_response")]
    if chats := [name for name in responses if isinstance(row.get(name), list)]:
        raise UserError(
            f"field {field!r} is a string, but the prompt of these pairs is in the messages of {chats[0]!r}: "
            f"to have the string continued give {field!r} alone, else the messages before the response"
        )


def encode_chat(row: dict, field: str, tokenizer: Tokenizer, fmt: BosChoice) -> list[int]:
    """Encode the messages of a row up to the start of its response. Raises UserError."""
    if isinstance(row[field], str):
        turns = [{"role": "user", "content": jsonl.text_field(row, field)}]
    else:
        turns = turns_field(row, field)
    chat, _ = jsonl.located(f"field {field!r}", rows.chat_row, row, turns, {field})
    messages = chat["messages"]
    jsonl.located(f"field {field!r}", formats.check_messages, messages)
    if field != "prompt" and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if messages[-1]["role"] == "assistant":
        raise UserError(f"field {field!r}: the message before the response must not be the assistant's")
    variables = formats.template_variables(chat)
    ids = tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True, **variables))
    if not ids:
        raise UserError(f"field {field!r}: the chat template renders it as nothing")
    return formats.bos_before_chat(tokenizer, fmt) + ids


def encode_conversation(row: dict, tokenizer: Tokenizer, fmt: BosChoice) -> list[int]:
    """Encode a `conversations` row up to its last response, in the model's markers. Raises UserError."""
    if not tokenizer.chat:
        reason = 'the model was not trained on such rows (its prompt_format.json has no "chat")'
        raise UserError(f"field 'conversations': {reason}: train it with train_sft.py, or give 'messages'")
    row = formats.hide_values(row, tokenizer, tokenizer.chat.tokens)
    ids = tokenizer.encode(marker_chat.prompt_text(row, tokenizer.chat))
    return formats.bos_prefix(tokenizer, tokenizer.chat.bos if fmt.add_bos is None else fmt.add_bos) + ids
