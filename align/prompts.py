"""Prompts to sample from: jsonl rows to the token ids that a model is asked to continue.

A row is {"prompt"} or {"text"} in a string, {"prompt"} in messages, or {"messages"}, an SFT row without its
answer. The ids are those that stand before the response in align/preferences.py. Nothing is ever cut: a
prompt that is too long is dropped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from align import data, preferences
from align.data import BosChoice, Tokenizer
from align.packing import BatchConfig

FIELDS = ("prompt", "text", "messages")
ACCEPTED = """accepted is one of
  {"prompt"}, a string, continued as it stands, or a list of messages that ends before the answer;
  {"text"}, a string, continued as it stands;
  {"messages"}, a conversation: if its last message is the assistant's, that is the answer and left out.
Fields of other names may stand beside it."""


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes a prompt."""

    max_prompt_len: int = 512
    """most tokens of a prompt; a longer one is dropped and counted"""
    add_bos: bool | None = None
    """put BOS in front of each row; None: as the tokenizer does by itself (messages: as the template does)"""

    def __post_init__(self):
        if self.max_prompt_len < 1:
            raise ValueError(f"--max-prompt-len {self.max_prompt_len}: a prompt needs at least 1 token")


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a model continues, and where it comes from."""

    ids: np.ndarray  # [n] int32
    row: dict  # as it came: a reward function may look at its other fields


def load_sets(
    files: Mapping[str, Sequence[Path]],
    tokenizer: Tokenizer,
    fmt: PromptFormat,
    vocab_size: int,
    say: Callable[[str], None],
) -> dict[str, list[Prompt]]:
    """The prompts of data sets, by name; `say` is told how many there are, and what the first one is.

    Raises ValueError as load_prompts and check_ids do.
    """
    sets = {}
    for name, paths in files.items():
        sets[name], counts = load_prompts(paths, tokenizer, fmt) if paths else ([], {})
        if paths:
            check_ids(sets[name], vocab_size)
            say(f"{name} data: {data.describe(counts)}")
    first = next(prompts[0] for prompts in sets.values() if prompts)
    say(f"first prompt:\n{tokenizer.decode(first.ids.tolist())}")
    return sets


def check_lengths(fmt: PromptFormat, max_new_tokens: int, config: BatchConfig, max_positions: int) -> None:
    """Raises ValueError if prompt and answer may exceed the model's context or a micro-batch."""
    longest = fmt.max_prompt_len + max_new_tokens
    flags = f"--max-prompt-len {fmt.max_prompt_len} and --max-new-tokens {max_new_tokens}"
    if longest > max_positions:
        raise ValueError(f"{flags} are beyond the model's context of {max_positions} tokens: lower one")
    if longest > config.micro_batch_tokens:
        raise ValueError(f"{flags} are above --micro-batch-tokens {config.micro_batch_tokens}: raise that")


def check_ids(prompts: list[Prompt], vocab_size: int) -> None:
    """Raises ValueError if a token id is beyond the model's vocabulary: the tokenizer is another model's."""
    largest = max(int(prompt.ids.max()) for prompt in prompts)
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer gives token {largest}, the model has {vocab_size}: --model holds the tokenizer "
            "of another model"
        )


def load_prompts(
    paths: list[Path], tokenizer: Tokenizer, fmt: PromptFormat
) -> tuple[list[Prompt], dict[str, int]]:
    """All prompts of these files, and counts for the log.

    Counts: prompts read; of these dropped_too_long (above max_prompt_len); tokens of the others, and of the
    longest of them (longest).
    Raises ValueError naming file and line for a row that is wrong, and if no prompt is left.
    """
    counts = dict.fromkeys(("prompts", "dropped_too_long", "tokens", "longest"), 0)
    prompts = []
    for where, row in (numbered for path in paths for numbered in data.read_jsonl(path)):
        ids = data.at(where, format_prompt, row, tokenizer, fmt)
        counts["prompts"] += 1
        if len(ids) > fmt.max_prompt_len:
            counts["dropped_too_long"] += 1
        else:
            prompts.append(Prompt(ids, row))
    if not prompts:
        raise ValueError(
            f"{', '.join(map(str, paths))}: no prompt is left, all {counts['prompts']} are longer than "
            f"--max-prompt-len {fmt.max_prompt_len}: raise it"
        )
    lengths = [len(prompt.ids) for prompt in prompts]
    counts["tokens"], counts["longest"] = sum(lengths), max(lengths)
    return prompts, counts


def format_prompt(row: dict, tokenizer: Tokenizer, fmt: BosChoice) -> np.ndarray:
    """The ids that a model continues, [n] int32, of any length but never empty. Raises ValueError."""
    field = prompt_field(row)
    if isinstance(row[field], str):
        check_answers(row, field)
        ids = preferences.encode_prompt(data.text_field(row, field), field, tokenizer, fmt)
    else:
        ids = encode_chat(messages_before_answer(row, field), field, tokenizer, fmt)
    data.check_bos(ids, tokenizer)
    return np.array(ids, np.int32)


def prompt_field(row: dict) -> str:
    """The one field of FIELDS that a row has, which holds what it may (ValueError)."""
    given = [field for field in FIELDS if field in row]
    if not given:
        raise ValueError(f"fields {', '.join(map(repr, row)) or 'none'}: {ACCEPTED}")
    if len(given) > 1:
        raise ValueError(f"both {given[0]!r} and {given[1]!r}: a row has one of them; {ACCEPTED}")
    [field] = given
    kinds = {"prompt": (str, list), "text": (str,), "messages": (list,)}[field]
    if not isinstance(row[field], kinds):
        raise ValueError(f"field {field!r} is of type {type(row[field]).__name__}; {ACCEPTED}")
    return field


def check_answers(row: dict, field: str) -> None:
    """Raises ValueError if beside a string there are whole conversations, as some sets of pairs have them.

    `preferences.format_pair` reads their messages and not the string: from it would come other ids than from
    training on the pairs.
    """
    answers = [f"{side}{suffix}" for side in ("chosen", "rejected") for suffix in ("", "_response")]
    if chats := [name for name in answers if isinstance(row.get(name), list)]:
        raise ValueError(
            f"field {field!r} is a string, but the prompt of these pairs is in the messages of {chats[0]!r}: "
            f"to have the string continued give {field!r} alone, else the messages before the answer"
        )


def messages_before_answer(row: dict, field: str) -> list[dict]:
    """The messages of a row that an answer is to follow. Raises ValueError."""
    messages = data.turns_field(row, field)
    data.at(f"field {field!r}", data.check_messages, messages)
    if field == "messages" and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"field {field!r}: what comes before the answer must not be the assistant's message")
    return messages


def encode_chat(messages: list[dict], field: str, tokenizer: Tokenizer, fmt: BosChoice) -> list[int]:
    """Ids of a chat up to where its answer begins. Raises ValueError if there are none."""
    ids = tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True))
    if not ids:
        raise ValueError(f"field {field!r}: the chat template makes no token of it")
    return data.bos_prefix(tokenizer, fmt.add_bos is True) + ids
