"""Preference data: pairs of a chosen and a rejected response, and labelled texts, as token ids.

A row is {"prompt", "chosen", "rejected"} in strings or in messages, {"chosen", "rejected"} in whole
conversations, or, for reward models, two {"text"} lines. The ids of a prompt equal those of generation from
it. Nothing is ever truncated: a side that is too long drops its pair.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.data import display, formats, jsonl, row_counts, rows
from align.data.jsonl import BadRows, turns_field
from align.data.packing import Example
from align.data.stored_rows import StoredRows, store
from align.data.tokenizer import Tokenizer
from align.errors import UserError
from align.flags import COUNT_OR_0, LENGTH, check_ranges
from align.losses.supervised import MISSING

REWARDS = ("chosen_reward", "rejected_reward")
Lines = Iterator[tuple[str, dict]] | None  # ("file:line", row) of a file with {"text"} lines
RESPONSES = ("chosen", "rejected", "chosen_response", "rejected_response")
USED = {  # fields of pairs and labelled texts
    *("prompt", "instruction", "input", "conversations", "messages", "text", "system", "margin", "label"),
    *(*RESPONSES, *REWARDS, *rows.VARIABLES),
}
ACCEPTED = """accepted are
  {"prompt", "chosen", "rejected"}, three strings;
  {"prompt", "chosen", "rejected"}, a list of messages and for each response one assistant message;
  {"instruction", "input"} or {"conversations"} of ShareGPT in place of "prompt";
  {"chosen", "rejected"}, two conversations that differ in their last message, which is the assistant's
    (beside them "prompt" may be a string, which is not read);
  {"text"}, {"text"}: two lines, the chosen text and the rejected one (reward models only).
"chosen_response" and "rejected_response" are other names of "chosen" and "rejected"."""


@dataclass(frozen=True)
class PreferenceFormat:
    """Format of preference rows."""

    max_seq_len: int = 1024
    """most tokens of one side of a pair, prompt and response; a pair beyond is dropped and counted"""
    add_bos: bool | None = None
    """put BOS in front of each row; None: as the tokenizer does by itself (messages: as the template does)"""
    append_eos: bool = True
    """end plain text with EOS, or as turns end in a model that was trained on 'conversations' rows, unless it
    ends with a stop token; messages end as the template ends them"""
    skip_bad_rows: int = 0
    """most rows that are wrong in any way to leave out, with a line in the log, before the run ends"""

    def __post_init__(self):
        check_ranges(self, max_seq_len=LENGTH, skip_bad_rows=COUNT_OR_0)


@dataclass(frozen=True, eq=False)
class Pair:
    """Two responses to one prompt. `trained` marks the response; it is all False for {"text"} lines."""

    chosen: Example
    rejected: Example
    margin: float = 0.0  # by how much the chosen score should exceed the rejected one
    reward_gap: float = 1.0  # reward of chosen minus reward of rejected
    has_rewards: bool = False  # True if its row states them

    @property
    def examples(self) -> tuple[Example, Example]:
        """Both sides, chosen first."""
        return self.chosen, self.rejected

    @property
    def num_inputs(self) -> int:
        """Input tokens of both sides."""
        return self.chosen.num_inputs + self.rejected.num_inputs

    @property
    def scored(self) -> tuple[Example, ...]:
        """Both sides as inputs of a reward model."""
        return tuple(map(as_scored, self.examples))

    @property
    def target(self) -> np.ndarray:
        """[1], the margin."""
        return np.array([self.margin])


@dataclass(frozen=True, eq=False)
class Labelled:
    """A text with a label for each attribute, MISSING (-100) for an unrated one."""

    example: Example  # as an input of a reward model
    label: np.ndarray  # [num_attributes] float32

    @property
    def scored(self) -> tuple[Example, ...]:
        """The one input of a reward model."""
        return (self.example,)

    @property
    def target(self) -> np.ndarray:
        """[1, num_attributes], the label."""
        return self.label[None]


def load_pairs(
    paths: list[Path], tokenizer: Tokenizer, fmt: PreferenceFormat, text_lines: bool = False
) -> tuple[StoredRows[Pair], dict[str, int]]:
    """Load all pairs of these files, and counts for the log.

    `text_lines`: accept {"text"} lines, in which the response has no marked start.
    Counts: pairs read; with_rewards (their rows state them); dropped_too_long (a side is above max_seq_len);
    dropped_identical (equal sides state no preference); tokens and response_tokens of the remaining pairs.
    Raises UserError naming file and line for a wrong row, and if no pair is left.
    """
    names = ("pairs", "with_rewards", "dropped_too_long", "dropped_identical", "tokens", "response_tokens")
    counts, bad = dict.fromkeys(names, 0), BadRows(fmt.skip_bad_rows)
    pairs = store(read_pairs(paths, tokenizer, fmt, text_lines, counts, bad))
    for side in (side for pair in pairs for side in pair.examples):
        row_counts.count_empty(side, tokenizer, counts)
    counts |= bad.counts()
    check_left(len(pairs), counts["pairs"], counts["dropped_too_long"], paths, fmt)
    tokens = row_counts.count_tokens(side for pair in pairs for side in pair.examples)
    return pairs, counts | {"tokens": tokens["tokens"], "response_tokens": tokens["trained_tokens"]}


def read_pairs(
    paths: list[Path],
    tokenizer: Tokenizer,
    fmt: PreferenceFormat,
    text_lines: bool,
    counts: dict[str, int],
    bad: BadRows,
) -> Iterator[Pair]:
    """Yield the pairs that `load_pairs` keeps, and add to its counts. Raises UserError for a wrong row."""
    for lines in (jsonl.read_jsonl(path, bad) for path in paths):
        for location, row in lines:
            special_before = row_counts.special_counts(tokenizer)
            try:
                pair = make_pair(location, row, lines if text_lines else None, tokenizer, fmt)
            except ValueError as error:
                if "text" in row:  # else the lines after it would be paired wrongly
                    raise
                bad.add(error)
                continue
            row_counts.count_unused(row, used_fields(row), counts)
            row_counts.count_special(special_before, tokenizer, counts)
            count_unchanged(row, fmt, counts)
            counts["pairs"] += 1
            counts["with_rewards"] += pair.has_rewards
            if max(len(side.ids) for side in pair.examples) > fmt.max_seq_len:
                counts["dropped_too_long"] += 1
            elif np.array_equal(pair.chosen.ids, pair.rejected.ids):
                counts["dropped_identical"] += 1
            else:
                yield pair


def check_rewards(counts: dict[str, int], flag: str, loss: str) -> None:
    """Raise UserError if no pair of the data of `flag` states rewards, which the loss needs."""
    if not counts["with_rewards"]:
        raise UserError(f"--loss {loss} needs pairs with {' and '.join(map(repr, REWARDS))}: {flag} has none")


def check_left(left: int, read: int, too_long: int, paths: list[Path], fmt: PreferenceFormat) -> None:
    """Raise UserError, with the reason, if no row of `paths` is left."""
    reason = f"{too_long} of {read} are longer than --max-seq-len {fmt.max_seq_len}"
    rest = ": raise it" if too_long == read else f", the sides of the other {read - too_long} are identical"
    if not left:
        raise UserError(f"{', '.join(map(str, paths))}: nothing is left, {reason}{rest}")


def count_unchanged(row: dict, fmt: PreferenceFormat, counts: dict[str, int]) -> None:
    """Count a row of messages beside flags that change plain text only."""
    row = with_prompt(row)
    if "text" in row or ("messages" not in row and any(isinstance(row.get(name), str) for name in RESPONSES)):
        return
    for flag, value in (("--add-bos False", fmt.add_bos), ("--no-append-eos", fmt.append_eos)):
        if value is False:
            row_counts.count(counts, row_counts.UNCHANGED.format(flag))


def used_fields(row: dict) -> set[str]:
    """The fields that are read for a pair; not a string "prompt" beside whole conversations."""
    has_conversations = isinstance(row.get("chosen", row.get("chosen_response")), list)
    ignored = {"prompt"} if has_conversations and isinstance(row.get("prompt"), str) else set()
    return USED - {"messages"} - ignored


def make_pair(location: str, row: dict, lines: Lines, tokenizer: Tokenizer, fmt: PreferenceFormat) -> Pair:
    """Format a row, or a {"text"} line and the next of `lines`, as a pair. Raises UserError."""
    if "label" in row:
        advice = "train_rm.py --loss regression reads labelled texts"
        raise UserError(f"{location}: a labelled text is no side of a pair: {advice}")
    if "text" not in row:
        sides = jsonl.located(location, format_pair, row, tokenizer, fmt)
    elif lines is not None:
        chosen = jsonl.located(location, format_text, row, tokenizer, fmt)
        below, rejected_row = next(lines, ("the end of the file", {}))
        check_rejected_line(location, below, rejected_row)
        sides = chosen, jsonl.located(below, format_text, rejected_row, tokenizer, fmt)
    else:
        advice = "give 'prompt', 'chosen' and 'rejected' instead"
        raise UserError(f"{location}: 'text' does not say where the response begins: {advice}")
    return Pair(*sides, *jsonl.located(location, pair_numbers, row))


def check_rejected_line(location: str, below: str, row: dict) -> None:
    """Raise UserError if `row`, at `below`, is not the rejected line of the chosen one at `location`."""
    if "text" not in row:
        rule = f"must be followed by its rejected one, which {below} is not"
        raise UserError(f"{location}: a chosen 'text' line {rule} (lines are chosen, rejected, chosen, ...)")
    if misplaced := [field for field in ("margin", *REWARDS) if field in row]:
        raise UserError(f"{below}: a rejected 'text' line: field {misplaced[0]!r} belongs to the chosen one")


def pair_numbers(row: dict) -> tuple[float, float, bool]:
    """Read `margin`, `reward_gap`, `has_rewards` of a row. Raises UserError for invalid values."""
    margin = number(row["margin"], "field 'margin'") if "margin" in row else 0.0
    if margin < 0:
        raise UserError(f"field 'margin' is {margin}, it must not be negative")
    fields = [field for field in REWARDS if field in row]
    if len(fields) == 1:
        raise UserError(f"field {fields[0]!r} stands alone: give both of {', '.join(REWARDS)}, or neither")
    if not fields:
        return margin, 1.0, False
    chosen, rejected = (number(row[field], f"field {field!r}") for field in REWARDS)
    return margin, chosen - rejected, True


def number(value: object, name: str) -> float:
    """`value` as a float, a finite number of float32, in which training computes (UserError)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name} must be a number, not {type(value).__name__}")
    if not abs(value) <= float(np.finfo(np.float32).max):  # false for NaN too
        raise UserError(f"{name} must be a finite number of single precision, not {value}")
    return float(value)


def format_pair(row: dict, tokenizer: Tokenizer, fmt: PreferenceFormat) -> list[Example]:
    """Format the chosen and the rejected side of a row. Raises UserError."""
    rows.refuse(row, set())
    fields = [response_field(row, "chosen"), response_field(row, "rejected")]
    row = with_prompt(row)
    prompt_type, *response_types = types = [type(row.get("prompt")), *(type(row[field]) for field in fields)]
    if types == [str, str, str]:
        prompt = jsonl.text_field(row, "prompt")
        return [format_response(prompt, jsonl.text_field(row, field), tokenizer, fmt) for field in fields]
    if prompt_type is list and set(response_types) <= {dict, list}:
        messages = turns_field(row, "prompt")
        turns = [[*messages, *response_message(row, field)] for field in fields]
    elif prompt_type in (str, type(None)) and response_types == [list, list]:
        turns = [turns_field(row, field) for field in fields]
    else:
        names = zip(("prompt", *fields), types, strict=True)
        raise UserError(f"{', '.join(f'{name!r}: {kind.__name__}' for name, kind in names)}: {ACCEPTED}")
    chats = [
        jsonl.located(f"field {field!r}", rows.chat_row, row, side_turns, {field})[0]
        for side_turns, field in zip(turns, fields, strict=True)
    ]
    sides = [format_chat(chat, field, tokenizer, fmt) for chat, field in zip(chats, fields, strict=True)]
    if chats[0]["messages"][:-1] != chats[1]["messages"][:-1]:
        raise UserError("the conversations must be equal but for their last message, and they are not")
    return sides


def with_prompt(row: dict) -> dict:
    """Fill "prompt" from its other names; strings beside a system text become messages."""
    if "prompt" not in row and "instruction" in row:
        row = row | {"prompt": rows.alpaca_prompt(row)}
    if "prompt" not in row and "conversations" in row:
        row = row | {"prompt": row["conversations"]}
    if row.get("system") and isinstance(row.get("prompt"), str):
        changed: dict[str, Any] = {"prompt": [{"role": "user", "content": jsonl.text_field(row, "prompt")}]}
        for name in RESPONSES:
            if isinstance(row.get(name), str):
                changed[name] = {"role": "assistant", "content": jsonl.text_field(row, name)}
        row = row | changed
    return row


def response_field(row: dict, name: str) -> str:
    """The one field of a row named `name` or `name`_response. Raises UserError for none or both."""
    fields = [field for field in (name, f"{name}_response") if field in row]
    if len(fields) == 2:
        raise UserError(f"both {fields[0]!r} and {fields[1]!r}: a row has one of them")
    if not fields or "text" in row:
        raise UserError(f"fields {', '.join(map(repr, row)) or 'none'}: {ACCEPTED}")
    return fields[0]


def response_message(row: dict, field: str) -> list[dict]:
    """The one message of a response to a list of messages, in a list. Raises UserError."""
    messages = rows.one_or_more(row, field)
    if len(messages) != 1:
        raise UserError(f"field {field!r} must be one message, the response to 'prompt', not {len(messages)}")
    return messages


def format_chat(chat: dict, field: str, tokenizer: Tokenizer, fmt: PreferenceFormat) -> Example:
    """Format a conversation, trained on its last message up to the last stop token, as in generation."""
    messages, variables = chat["messages"], formats.template_variables(chat)
    jsonl.located(f"field {field!r}", formats.check_messages, messages)
    if messages[-1]["role"] != "assistant":
        raise UserError(f"field {field!r} ends with the role {messages[-1]['role']!r}, not the assistant's")
    text = tokenizer.render(messages, **variables)
    ids = tokenizer.encode(text)
    start, end = formats.response_span(messages, len(messages) - 1, text, ids, tokenizer, variables)
    bos = formats.bos_before_chat(tokenizer, fmt)
    return make_example(bos + ids[:start], ids[start:end], tokenizer)


def format_response(prompt: str, response: str, tokenizer: Tokenizer, fmt: PreferenceFormat) -> Example:
    """Encode prompt and response of plain text apart: the response does not change the prompt's ids."""
    prompt_ids = formats.encode_prompt(prompt, "prompt", tokenizer, fmt)
    response_ids = encode_ended(response, tokenizer, fmt, continued=True)
    if not response_ids:
        raise UserError("a response is empty, and --no-append-eos leaves nothing of it")
    return make_example(prompt_ids, response_ids, tokenizer)


def format_text(row: dict, tokenizer: Tokenizer, fmt: PreferenceFormat) -> Example:
    """Format a {"text"} line, of which nothing is trained. Raises UserError."""
    if "prompt" in row or "chosen" in row or "rejected" in row:
        raise UserError(f"fields {', '.join(map(repr, row))}: {ACCEPTED}")
    text = jsonl.text_field(row, "text")
    if not tokenizer.encode(text):
        raise UserError("field 'text' is empty")
    bos = formats.bos_prefix(tokenizer, formats.add_bos(tokenizer, fmt))
    return make_example(bos + encode_ended(text, tokenizer, fmt), [], tokenizer)


def encode_ended(
    text: str, tokenizer: Tokenizer, fmt: PreferenceFormat, continued: bool = False
) -> list[int]:
    """Encode a text with the end of --append-eos, that of sampled responses."""
    ids = tokenizer.encode(tokenizer.as_it_stands(text), continued)
    if not fmt.append_eos:
        return ids
    stops = [i for i, token in enumerate(ids) if token in tokenizer.stop_ids]
    # a rendered chat, with its last line end
    if stops and not tokenizer.decode(ids[stops[-1] + 1 :]).strip():
        return ids[: stops[-1] + 1]
    if tokenizer.chat:
        return tokenizer.encode(tokenizer.chat.end(text), continued)
    return ids + [tokenizer.eos_id]


def make_example(context: list[int], response: list[int], tokenizer: Tokenizer) -> Example:
    """An example that trains `response` after `context`. Raises UserError for two BOS at the start."""
    formats.check_bos(context + response, tokenizer)
    trained = [False] * len(context) + [True] * len(response)
    return Example(np.array(context + response, np.int32), np.array(trained, bool))


def as_scored(example: Example) -> Example:
    """Append an id 0, the only trained one: the input of a reward model.

    In `packing.collate` the last id is a target only. So the last place of the packed sequence is the
    example's last real token, `batch.mask` is 1 there only, and the score is read there.
    """
    trained = np.zeros(len(example.ids) + 1, bool)
    trained[-1] = True
    return Example(np.append(example.ids, np.int32(0)), trained)


def load_labelled(
    paths: list[Path], tokenizer: Tokenizer, fmt: PreferenceFormat, num_attributes: int
) -> tuple[StoredRows[Labelled], dict[str, int]]:
    """Load all labelled texts of these files, and counts for the log.

    A row is {"text", "label"} or {"messages", "label"}, whose last message is scored. Counts: texts read;
    dropped_too_long; tokens of the others. Raises UserError naming file and line for a wrong row, and if no
    text is left.
    """
    counts = dict.fromkeys(("texts", "dropped_too_long", "tokens"), 0)
    texts = store(read_labelled(paths, tokenizer, fmt, num_attributes, counts))
    check_left(len(texts), counts["texts"], counts["dropped_too_long"], paths, fmt)
    return texts, counts


def read_labelled(
    paths: list[Path],
    tokenizer: Tokenizer,
    fmt: PreferenceFormat,
    num_attributes: int,
    counts: dict[str, int],
) -> Iterator[Labelled]:
    """Yield the texts that `load_labelled` keeps, and add to its counts. Raises UserError for a wrong row."""
    bad = BadRows(fmt.skip_bad_rows)
    for location, row in (numbered for path in paths for numbered in jsonl.read_jsonl(path, bad)):
        special_before = row_counts.special_counts(tokenizer)
        try:
            example = jsonl.located(location, format_labelled, row, tokenizer, fmt)
            label = jsonl.located(location, label_field, row, num_attributes)
        except ValueError as error:
            bad.add(error)
            continue
        row_counts.count_unused(row, USED, counts)
        row_counts.count_special(special_before, tokenizer, counts)
        count_unchanged(row, fmt, counts)
        counts["texts"] += 1
        if len(example.ids) > fmt.max_seq_len:
            counts["dropped_too_long"] += 1
            continue
        counts["tokens"] += len(example.ids)
        yield Labelled(as_scored(example), np.array(label, np.float32))
    counts.update(bad.counts())


def format_labelled(row: dict, tokenizer: Tokenizer, fmt: PreferenceFormat) -> Example:
    """Format the text or the chat of a labelled row. Raises UserError."""
    if "messages" not in row:
        return format_text(row, tokenizer, fmt)
    if "text" in row:
        raise UserError("both 'text' and 'messages': a row has one of them")
    chat, _ = rows.chat_row(row, turns_field(row, "messages"), {"messages"})
    return format_chat(chat, "messages", tokenizer, fmt)


def label_field(row: dict, num_attributes: int) -> list[float]:
    """The label of a row: `num_attributes` numbers, not all of them missing (UserError)."""
    label = row.get("label")
    if not isinstance(label, list) or len(label) != num_attributes:
        actual = f"a list of {len(label)}" if isinstance(label, list) else type(label).__name__
        raise UserError(f"field 'label' must be a list of {num_attributes} numbers, not {actual}")
    numbers = [number(value, f"field 'label', number {i}") for i, value in enumerate(label)]
    if all(value == MISSING for value in numbers):
        raise UserError(f"field 'label': all {num_attributes} attributes are missing ({MISSING})")
    return numbers


def texts(pair: Pair, tokenizer: Tokenizer) -> dict[str, str]:
    """Decode prompt, chosen and rejected response; the prompt of {"text"} lines is empty."""
    start = int(pair.chosen.trained.argmax())  # the first trained token
    prompt = tokenizer.decode(pair.chosen.ids[:start].tolist())
    # decoded with the prompt: a response alone may lose its first space
    chosen, rejected = (tokenizer.decode(side.ids.tolist())[len(prompt) :] for side in pair.examples)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def show(pair: Pair, tokenizer: Tokenizer) -> str:
    """A pair for the log, marked and escaped as by `display.show`: the prompt once, then each response."""
    shown = {name: "".join(map(display.visible, text)) for name, text in texts(pair, tokenizer).items()}
    if not pair.chosen.trained.any():
        return f"chosen: {shown['chosen']}\nrejected: {shown['rejected']}"
    return f"prompt: {shown['prompt']}\nchosen: ⟦{shown['chosen']}⟧\nrejected: ⟦{shown['rejected']}⟧"
