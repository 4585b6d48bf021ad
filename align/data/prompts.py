"""Prompts to sample from: jsonl rows to the token ids that a model is asked to continue.

A row is {"prompt"} or {"text"} in a string, {"prompt"} in messages, or an SFT row of {"messages"} or
{"conversations"} without its answer. The ids are those that stand before the response in
align/data/preferences.py. Nothing is ever cut: a prompt that is too long is dropped.

Or a row is any that SFT takes: a `Task`, to sample from what comes before its last answer or to train on.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from align.data import display, formats, jsonl, marker_chat, packing, preferences, rows, sft
from align.data.formats import BosChoice, FormatConfig, Tokenizer
from align.data.jsonl import BadRows, turns_field
from align.data.marker_chat import RowFormats
from align.data.packing import BatchConfig, Example
from align.errors import UserError
from align.flags import COUNT, COUNT_OR_0, check_ranges

T = TypeVar("T")
FIELDS = ("prompt", "text", "messages", "conversations")
VARIABLE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
ACCEPTED = """accepted is one of
  {"prompt"}, a string, continued as it stands, or a list of messages that ends before the answer;
  {"text"}, a string, continued as it stands;
  {"messages"}, a conversation: if its last message is the assistant's, that is the answer and left out;
  {"conversations"} of ShareGPT, {"instruction", "input"} of Alpaca, both without their answers;
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
    """Token ids to continue, and the row that they come from."""

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

    Raises UserError as load_prompts and check_ids do.
    """
    sets = load_each(files, lambda paths: load_prompts(paths, tokenizer, fmt), say)
    check_ids([prompt for prompts in sets.values() for prompt in prompts], vocab_size)
    first = next(prompts[0] for prompts in sets.values() if prompts)
    say(f"first prompt:\n{tokenizer.decode(first.ids.tolist())}")
    return sets


def load_each(
    files: Mapping[str, Sequence[Path]],
    load: Callable[[Sequence[Path]], tuple[list[T], dict[str, int]]],
    say: Callable[[str], None],
) -> dict[str, list[T]]:
    """Load the files of each data set by `load`, and log the counts by `say`; no files give nothing."""
    sets = {}
    for name, paths in files.items():
        sets[name], counts = load(paths) if paths else ([], {})
        if paths:
            say(f"{name} data: {display.describe(counts)}")
    return sets


def check_lengths(fmt: PromptFormat, max_new_tokens: int, config: BatchConfig, max_positions: int) -> None:
    """Raises UserError if prompt and answer may exceed the model's context or a micro-batch."""
    longest = fmt.max_prompt_len + max_new_tokens
    flags = f"--max-prompt-len {fmt.max_prompt_len} and --max-new-tokens {max_new_tokens}"
    if longest > max_positions:
        raise UserError(f"{flags} are beyond the model's context of {max_positions} tokens: lower one")
    if longest > config.micro_batch_tokens:
        raise UserError(f"{flags} are above --micro-batch-tokens {config.micro_batch_tokens}: raise that")


def check_ids(prompts: list[Prompt], vocab_size: int) -> None:
    """Raises UserError if a token id is beyond the model's vocabulary: the tokenizer is another model's."""
    largest = max(int(prompt.ids.max()) for prompt in prompts)
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer gives token {largest}, the model has {vocab_size}: --model holds the tokenizer "
            "of another model"
        )


def load_prompts(
    paths: list[Path], tokenizer: Tokenizer, fmt: PromptFormat
) -> tuple[list[Prompt], dict[str, int]]:
    """All prompts of these files, and counts for the log.

    Counts: prompts read; of these dropped_too_long (above max_prompt_len); tokens of the others, and of the
    longest of them (longest).
    Raises UserError naming file and line for a row that is wrong, and if no prompt is left.
    """
    counts = dict.fromkeys(("prompts", "dropped_too_long", "tokens", "longest"), 0)
    prompts, bad = [], BadRows(fmt.skip_bad_rows)
    for where, row in (numbered for path in paths for numbered in jsonl.read_jsonl(path, bad)):
        seen = formats.special_counts(tokenizer)
        try:
            ids = jsonl.at(where, format_prompt, row, tokenizer, fmt)
        except ValueError as error:
            bad.add(error)
            continue
        formats.count_special(seen, tokenizer, counts)
        counts["prompts"] += 1
        sft.count_unused(row, used_fields(row), counts, "for reward functions")
        if fmt.add_bos is False and is_chat(row):
            formats.count(counts, formats.UNCHANGED.format("--add-bos False"))
        if len(ids) > fmt.max_prompt_len:
            counts["dropped_too_long"] += 1
        else:
            prompts.append(Prompt(ids, row))
    counts |= bad.counts()
    if not prompts:
        raise UserError(
            f"{', '.join(map(str, paths))}: no prompt is left, all {counts['prompts']} are longer than "
            f"--max-prompt-len {fmt.max_prompt_len}: raise it"
        )
    lengths = [len(prompt.ids) for prompt in prompts]
    counts["tokens"], counts["longest"] = sum(lengths), max(lengths)
    return prompts, counts


def format_prompt(row: dict, tokenizer: Tokenizer, fmt: BosChoice) -> np.ndarray:
    """The ids that a model continues, [n] int32, of any length but never empty. Raises UserError."""
    rows.refuse(row, set())
    if is_alpaca(row):
        rows.check_no_system(row, "'instruction'", ())
        ids = preferences.encode_prompt(rows.alpaca_prompt(row), "instruction", tokenizer, fmt)
        formats.check_bos(ids, tokenizer)
        return np.array(ids, np.int32)
    field = prompt_field(row)
    if isinstance(row[field], str) and (field == "text" or not row.get("system")):
        rows.check_no_system(row, "'text'", ())
        check_answers(row, field)
        ids = preferences.encode_prompt(jsonl.text_field(row, field), field, tokenizer, fmt)
    elif field == "conversations" and rows.is_marker_row(row):
        ids = encode_conversation(row, tokenizer, fmt)
    else:
        chat = chat_before_answer(row, field)
        ids = encode_chat(chat, field, tokenizer, fmt)
    formats.check_bos(ids, tokenizer)
    return np.array(ids, np.int32)


def is_alpaca(row: dict) -> bool:
    """Whether a row's prompt is its instruction: in Alpaca's files "text" has the answer too."""
    return "instruction" in row and not {"prompt", "messages", "conversations"} & set(row)


def is_chat(row: dict) -> bool:
    """True for a row that the chat template renders."""
    if is_alpaca(row):
        return False
    field = prompt_field(row)
    if isinstance(row[field], str):
        return field == "prompt" and bool(row.get("system"))
    return field != "conversations" or not rows.is_marker_row(row)


def used_fields(row: dict) -> set[str]:
    """The fields of a row that `format_prompt` reads."""
    if is_alpaca(row):
        return {"instruction", "input"}
    return {*FIELDS, *rows.VARIABLES, "system", "mask", "type"}


def prompt_field(row: dict) -> str:
    """The one field of FIELDS that a row has, which holds what it may (UserError)."""
    given = [field for field in FIELDS if field in row]
    if given == ["prompt", "messages"] and is_copy(row["prompt"], row["messages"]):
        given = ["messages"]
    if not given:
        raise UserError(f"fields {', '.join(map(repr, row)) or 'none'}: {ACCEPTED}")
    if len(given) > 1:
        raise UserError(f"both {given[0]!r} and {given[1]!r}: a row has one of them; {ACCEPTED}")
    [field] = given
    kinds = {"prompt": (str, list), "text": (str,), "messages": (list,), "conversations": (list,)}[field]
    if not isinstance(row[field], kinds):
        raise UserError(f"field {field!r} is of type {type(row[field]).__name__}; {ACCEPTED}")
    return field


def is_copy(prompt: object, messages: object) -> bool:
    """True if a string is what a message says, as beside the conversations of UltraFeedback."""
    turns = messages if isinstance(messages, list) else []
    return isinstance(prompt, str) and prompt in [
        turn.get("content") for turn in turns if isinstance(turn, dict)
    ]


def check_answers(row: dict, field: str) -> None:
    """Raises UserError if beside a string there are whole conversations, as some sets of pairs have them.

    `preferences.format_pair` reads their messages and not the string: from it would come other ids than from
    training on the pairs.
    """
    answers = [f"{side}{suffix}" for side in ("chosen", "rejected") for suffix in ("", "_response")]
    if chats := [name for name in answers if isinstance(row.get(name), list)]:
        raise UserError(
            f"field {field!r} is a string, but the prompt of these pairs is in the messages of {chats[0]!r}: "
            f"to have the string continued give {field!r} alone, else the messages before the answer"
        )


def chat_before_answer(row: dict, field: str) -> dict:
    """The messages of a row that an answer is to follow, and the template's variables. Raises UserError."""
    if isinstance(row[field], str):
        turns = [{"role": "user", "content": jsonl.text_field(row, field)}]
    else:
        turns = turns_field(row, field)
    chat, _ = jsonl.at(f"field {field!r}", rows.chat_row, row, turns, {field})
    messages = chat["messages"]
    jsonl.at(f"field {field!r}", formats.check_messages, messages)
    if field != "prompt" and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if messages[-1]["role"] == "assistant":
        raise UserError(f"field {field!r}: what comes before the answer must not be the assistant's message")
    return chat | {"messages": messages}


def encode_conversation(row: dict, tokenizer: Tokenizer, fmt: BosChoice) -> list[int]:
    """Ids of a `conversations` row up to its last answer, in the model's markers. Raises UserError."""
    if not tokenizer.chat:
        raise UserError(
            "field 'conversations': the model was not trained on such rows (its prompt_format.json has no "
            "\"chat\"): train it with train_sft.py first, or give 'messages'"
        )
    row = formats.hide_values(row, tokenizer, tokenizer.chat.tokens)
    ids = tokenizer.encode(marker_chat.prompt_text(row, tokenizer.chat))
    return formats.bos_prefix(tokenizer, tokenizer.chat.bos if fmt.add_bos is None else fmt.add_bos) + ids


def encode_chat(chat: dict, field: str, tokenizer: Tokenizer, fmt: BosChoice) -> list[int]:
    """Ids of a chat up to where its answer begins. Raises UserError if there are none."""
    variables = formats.template_variables(chat)
    ids = tokenizer.encode(tokenizer.render(chat["messages"], add_generation_prompt=True, **variables))
    if not ids:
        raise UserError(f"field {field!r}: the chat template makes no token of it")
    return formats.bos_before_chat(tokenizer, fmt) + ids


# --------------------------------------------------------------------------------------------------
# Rows that SFT takes


@dataclass(frozen=True, eq=False)
class Task:
    """A row of SFT data: a prompt that its last answer answers, and what SFT would train on."""

    prompt: Prompt
    example: Example


def load_sft_sets(
    files: Mapping[str, Sequence[Path]],
    tokenizer: Tokenizer,
    fmt: FormatConfig,
    vocab_size: int,
    say: Callable[[str], None],
    row_formats: RowFormats,
) -> dict[str, list[Task]]:
    """The tasks of data sets, by name; `say` logs their number and the first prompt.

    `row_formats` counts the formats of their rows.

    Raises UserError as load_tasks and packing.check_ids do.
    """
    sets = load_each(files, lambda paths: load_tasks(paths, tokenizer, fmt, row_formats), say)
    packing.check_ids([task.example for tasks in sets.values() for task in tasks], vocab_size)
    first = next(tasks[0] for tasks in sets.values() if tasks)
    say(f"first prompt:\n{tokenizer.decode(first.prompt.ids.tolist())}")
    return sets


def load_tasks(
    paths: Sequence[Path], tokenizer: Tokenizer, fmt: FormatConfig, row_formats: RowFormats | None = None
) -> tuple[list[Task], dict[str, int]]:
    """All tasks of these files, and counts for the log.

    Counts: those of `sft.load_sft`, with tokens and trained_tokens of the tasks; dropped_without_prompt (of
    the rows that SFT would keep: nothing comes before the last answer, or it begins beyond max_seq_len);
    tokens of the longest prompt (longest_prompt).
    Raises UserError naming file and line for a row that is wrong, and if no task is left.
    """
    names = ("rows", "cut_prompts", "cut_answers", "dropped", "dropped_without_prompt")
    counts, tasks = dict.fromkeys(names, 0), []
    for where, row, whole in sft.read_sft(list(paths), tokenizer, fmt, counts, row_formats):
        start = jsonl.at(where, answer_start, row, whole, tokenizer, fmt)
        bos = int(whole.ids[0] == tokenizer.bos_id)
        if bos < start < fmt.max_seq_len:
            tasks.append(Task(Prompt(whole.ids[:start], row), formats.cut_end(whole, fmt)))
        else:
            counts["dropped_without_prompt"] += 1
    if not tasks:
        raise UserError(
            f"{', '.join(map(str, paths))}: no prompt is left, in all {counts['rows']} rows the last answer "
            f"begins beyond --max-seq-len {fmt.max_seq_len}, or nothing comes before it"
        )
    longest = max(len(task.prompt.ids) for task in tasks)
    counts |= sft.count_tokens([task.example for task in tasks])
    return tasks, counts | {"longest_prompt": longest}


def answer_start(row: dict, whole: Example, tokenizer: Tokenizer, fmt: FormatConfig) -> int:
    """Index in `whole`, the row's example, of its last response. Raises UserError if there is none."""
    trained = whole.trained
    if trained[1]:  # by loss_on "all", or as token 0, which is never trained, is the answer's
        known, _ = rows.sft_row(row, fmt.template_fields())
        trained = formats.encode_row(known, tokenizer, replace(fmt, loss_on="answer"))[1]
    starts = np.flatnonzero(np.diff(np.array(trained, np.int8), prepend=0) == 1)
    if not len(starts):
        raise UserError("no prompt: the row has no answer")
    return int(starts[-1])


def one_turn(row: dict, text: str, tokenizer: Tokenizer, fmt: FormatConfig) -> np.ndarray:
    """A prompt in the format of `row` of which `text` is the only turn, [n] int32, of any length.

    As SFT would see it in a row of this turn and an answer: the system says nothing, labels are left out, and
    in rows of --prompt-template the text stands in the one field before the answer. Raises UserError.
    """
    row, _ = rows.sft_row(row, fmt.template_fields())
    if "messages" in row:
        asked = {"messages": [{"role": "user", "content": text}]}
        return format_prompt({**row, **asked}, tokenizer, fmt)
    if "conversations" in row:
        markers = [formats.unescape(token) for token in fmt.chat_tokens]
        row = formats.hide_values(turn_of(row, text), tokenizer, markers)
        ids = tokenizer.encode(text_before_answer(row, fmt))
    else:
        pieces = formats.template_pieces(fmt.prompt_template)
        values = template_values(pieces, tokenizer.hide(text), fmt)
        ids, _ = formats.encode_template(pieces, values, tokenizer)
    if not ids:
        raise UserError("the prompt is empty: an answer must follow something")
    ids = formats.bos_prefix(tokenizer, formats.add_bos(tokenizer, fmt)) + ids
    formats.check_bos(ids, tokenizer)
    return np.array(ids, np.int32)


def turn_of(row: dict, text: str) -> dict:
    """A `conversations` row of `text` and an empty answer, by who asks first and answers last in `row`."""
    kind, masked, turns = marker_chat.check_conversation(row)
    asking = next(name for name, _, _ in turns if name in masked)
    answering, _, _ = turns[last_answer(marker_chat.answering(kind, masked, turns))]
    said = [{"from": asking, "value": text}, {"from": answering, "value": ""}]
    return {"system": "", "conversations": said, "mask": sorted(masked)}


def text_before_answer(row: dict, fmt: FormatConfig) -> str:
    """The text of a `conversations` row up to where its only answer begins."""
    text, [(start, _)] = marker_chat.conversation_text(
        row, [formats.unescape(token) for token in fmt.chat_tokens]
    )
    return text[:start]


def last_answer(turns: Sequence[int]) -> int:
    """The last of the numbers of the turns that are answers. Raises UserError if there is none."""
    if not turns:
        raise UserError("no prompt: the row has no answer")
    return turns[-1]


def template_values(pieces: list[tuple[str, str]], text: str, fmt: FormatConfig) -> dict[str, str]:
    """`text` as the value of the one field before the answer, which is empty. Raises UserError."""
    *asking, answer = [field for _, field in pieces]
    if len(set(asking)) != 1:
        raise UserError(
            f"--prompt-template {fmt.prompt_template!r} has {len(set(asking))} fields before the answer "
            f"{answer!r}: a prompt of one text needs just one"
        )
    return {answer: "", asking[0]: text.strip(" ")}


def question(row: dict, tokenizer: Tokenizer, fmt: FormatConfig) -> tuple[str, str]:
    """Question of a row's last response as text for a judge: all of the conversation, and its last turn.

    Turns are "User: ..." with a blank line between them, but a single one has no name. What the system says
    is left out where anybody else speaks. Of rows of --prompt-template both are what the model reads before
    the answer, cut where SFT cuts it, without BOS and white space around it. Raises UserError.
    """
    row, _ = rows.sft_row(row, fmt.template_fields())
    if "messages" in row:
        turns = messages_turns(row)
    elif "conversations" in row:
        turns = conversations_turns(row)
    else:
        turns = [("", text_before_field(row, tokenizer, fmt))]
    return as_text(turns), turns[-1][1]


def as_text(turns: Sequence[tuple[str, str]]) -> str:
    """(name, text) of turns as one text; a single turn has no name."""
    return turns[0][1] if len(turns) == 1 else "\n\n".join(f"{name}: {text}" for name, text in turns)


def messages_turns(row: dict) -> list[tuple[str, str]]:
    """(name, text) of the turns before the last answer of a `messages` row. Raises UserError."""
    messages = row["messages"]
    formats.check_messages(messages)
    end = last_answer([i for i, message in enumerate(messages) if message["role"] == "assistant"])
    turns = [(message["role"].capitalize(), message["content"]) for message in messages[:end]]
    return [turn for turn in turns if turn[0] != "System"] or turns


def conversations_turns(row: dict) -> list[tuple[str, str]]:
    """(name, text) of the turns before the last answer of a `conversations` row. Raises UserError.

    If that answer is the label of a turn, its text comes before it.
    """
    kind, masked, turns = marker_chat.check_conversation(row)
    end = last_answer(marker_chat.answering(kind, masked, turns))
    is_label = kind == "TEXT_TO_VALUE" and turns[end][2] is not None
    before = [(name, text) for name, text, _ in turns[: end + is_label]]
    return before or [(marker_chat.SYSTEM_ROLE, jsonl.text_field(row, "system"))]


def text_before_field(row: dict, tokenizer: Tokenizer, fmt: FormatConfig) -> str:
    """Token ids before the response of a --prompt-template row, without BOS."""
    ids, trained, _ = formats.encode_row(row, tokenizer, replace(fmt, loss_on="answer"))
    bos = formats.bos_prefix(tokenizer, formats.add_bos(tokenizer, fmt))
    return tokenizer.decode(ids[len(bos) : trained.index(True)]).strip()


# --------------------------------------------------------------------------------------------------
# Prompts from a text with variables


class Template:
    """A text with variables in it: {{ name }}, the spaces are optional."""

    def __init__(self, path: Path, flag: str, names: Sequence[str]):
        """Reads the file as it is, to the last line end.

        Raises UserError, naming `flag`: it cannot be read, lacks one of `names`, or has another variable.
        """
        try:
            self.text = Path(path).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{flag} {path} must be a text file in UTF-8: {error}") from error
        found = [name.strip() for name in VARIABLE.findall(self.text)]
        if missing := [name for name in names if name not in found]:
            raise UserError(f"{flag} {path} lacks the variable {{{{ {missing[0]} }}}}")
        if unknown := [name for name in found if name not in names]:
            raise UserError(
                f"{flag} {path} has the variable {{{{ {unknown[0]} }}}}: it may have {', '.join(names)}"
            )

    def fill(self, **texts: str) -> str:
        """The text with each variable replaced, in one pass: what stands in `texts` stays as it is."""
        return fill(self.text, texts)


def fill(template: str, texts: Mapping[str, str]) -> str:
    """A text with each variable replaced, in one pass: what stands in `texts` stays as it is."""
    return VARIABLE.sub(lambda match: texts[match[1].strip()], template)
