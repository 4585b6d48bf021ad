"""Data: jsonl rows to token ids that know which of them are trained.

A row becomes an `Example` by the format that its fields say (align/data/rows.py): `messages` (the model's
chat template), `conversations` (turns with the markers of --chat-tokens), `prompt` and `completion`, or the
fields of --prompt-template. Batches of them are align/data/packing.py's job.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from align.data import rows
from align.data.jsonl import text_field
from align.data.marker_chat import MarkerChat, conversation_text
from align.data.packing import Example
from align.errors import UserError
from align.flags import COUNT_OR_0, LENGTH, check_ranges


class Tokenizer(Protocol):
    """Methods of a tokenizer that formats need; `align.data.tokenizer` has two tokenizers."""

    eos_id: int
    bos_id: int | None
    adds_bos: bool
    stop_ids: set[int]
    stop_strings: tuple[str, ...]
    chat: MarkerChat | None
    chat_template: str | dict[str, str] | None
    texts_with_special: int
    strings_with_special: int

    def follow(self, chat: MarkerChat) -> None: ...
    def hide(self, text: str) -> str: ...
    def hide_in(self, value: Any) -> Any: ...
    def hide_markers(self, markers: Sequence[str]) -> None: ...
    def as_it_stands(self, text: str) -> str: ...
    def template_reads(self, name: str) -> bool: ...
    def encode(self, text: str, continued: bool = False) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def marked_answers(self, messages: list[dict], **variables: object) -> list[tuple[int, int]] | None: ...
    def render(
        self, messages: list[dict], add_generation_prompt: bool = False, **variables: object
    ) -> str: ...


class BosChoice(Protocol):
    """Fields of a row format that `add_bos` needs; `FormatConfig` is one."""

    @property
    def add_bos(self) -> bool | None: ...


@dataclass(frozen=True)
class FormatConfig:
    """Format of training rows."""

    prompt_template: str = "{input} {output}"
    """template of rows without messages or conversations: their fields in braces, the response last"""
    truncation_field: str | None = None
    """template fields to truncate when such a row is too long (comma list; they share the cut evenly);
    default: input, or if the template has none, all fields before the response"""
    truncation_side: Literal["right", "left"] = "right"
    """end of the truncation fields that is cut"""
    chat_tokens: tuple[str, str, str, str, str] = (r"\x00", r"\x11", r"\x12", r"\n", r"\n")
    """markers of conversations rows: system-turn start, turn start, label start, end of turn, end of name"""
    loss_on: Literal["answer", "all"] = "answer"
    """train on the responses with their end-of-turn token, or on every token"""
    add_bos: bool | None = None
    """put BOS in front of each row; None: as the tokenizer does by itself (messages: as the template does)"""
    turns: Literal["whole", "each", "last"] = "whole"
    """messages with several responses: whole, one example trained on all of them; each, an example for each
    response, with the turns before it as the chat template renders them in inference; last, for the last
    one"""
    max_seq_len: int = 1024
    """maximum sequence length in tokens"""
    skip_bad_rows: int = 0
    """bad rows that are left out, each with a line in the log, before the run ends"""

    def __post_init__(self):
        check_ranges(self, max_seq_len=LENGTH, skip_bad_rows=COUNT_OR_0)
        for field in self.truncation_fields():
            if field not in self.template_fields():
                raise UserError(
                    f"--truncation-field {field!r} is not in --prompt-template {self.prompt_template!r}"
                )
        if not self.chat_tokens[1]:
            raise UserError(
                "--chat-tokens: the second, which starts a turn and ends an answer, must not be empty"
            )

    def template_fields(self) -> list[str]:
        """The fields of `prompt_template`, the answer last."""
        return [field for _, field in template_pieces(self.prompt_template)]

    def truncation_fields(self) -> list[str]:
        """The names in `truncation_field`."""
        if self.truncation_field is None:
            fields = self.template_fields()
            return ["input"] if "input" in fields[:-1] else fields[:-1]
        return [field.strip() for field in self.truncation_field.split(",")]


def count(counts: dict[str, int], name: str) -> None:
    """Count one more of `name`, which the log mentions only if there is one."""
    counts[name] = counts.get(name, 0) + 1


UNCHANGED = "rows of messages, on which {} has no effect"
MESSAGE_FIELDS = {"role", "content", "tool_calls", *rows.WEIGHTS}
SPECIAL = (
    "rows with special tokens in their text",
    "rows with special tokens in a string, continued as it stands",
)


def special_counts(tokenizer: Tokenizer) -> tuple[int, int]:
    """Texts and whole strings with special tokens that a tokenizer has seen."""
    return tokenizer.texts_with_special, tokenizer.strings_with_special


def count_unread(messages: Sequence[dict], tokenizer: Tokenizer, counts: dict[str, int]) -> None:
    """Count a chat with fields of messages that the chat template does not read."""
    names = {name for message in messages for name in message} - MESSAGE_FIELDS
    for name in sorted(names):
        if not tokenizer.template_reads(name):
            count(counts, f"rows with {name!r} in a message (not read by the chat template)")


def count_empty(example: Example, tokenizer: Tokenizer, counts: dict[str, int]) -> None:
    """Count an example of which the end of an answer is trained and nothing else."""
    trained = example.ids[example.trained]
    if len(trained) == 1 and int(trained[0]) in tokenizer.stop_ids:
        count(counts, "empty_answers")


def count_special(seen: tuple[int, int], tokenizer: Tokenizer, counts: dict[str, int]) -> None:
    """Count a row since whose start, at `seen`, there was a special token."""
    for name, before, now in zip(SPECIAL, seen, special_counts(tokenizer), strict=True):
        if now > before:
            count(counts, name)


def format_parts(row: dict, tokenizer: Tokenizer, fmt: FormatConfig) -> list[tuple[dict, Example, bool]]:
    """The rows that --turns makes of one, each with what `format_sft` gives, up to the first too long one.

    Raises UserError.
    """
    found = []
    for part in rows.by_turns(row, fmt.turns):
        found.append((part, *format_known(part, tokenizer, fmt)))
        if not cut_end(found[-1][1], fmt).trained.any():
            break
    return found


def cut_end(example: Example, fmt: FormatConfig) -> Example:
    """The first max_seq_len tokens of an example."""
    return Example(example.ids[: fmt.max_seq_len], example.trained[: fmt.max_seq_len])


def format_sft(row: dict, tokenizer: Tokenizer, fmt: FormatConfig) -> tuple[Example, bool]:
    """One row as an example of any length, and whether its truncation fields were cut. Raises UserError."""
    return format_known(rows.sft_row(row, fmt.template_fields())[0], tokenizer, fmt)


def format_known(row: dict, tokenizer: Tokenizer, fmt: FormatConfig) -> tuple[Example, bool]:
    """`format_sft` of a row in one of the forms that `rows.sft_row` gives."""
    ids, trained, cut_prompt = encode_row(row, tokenizer, fmt)
    example = Example(np.array(ids, dtype=np.int32), np.array(trained, dtype=bool))
    if fmt.loss_on == "all":
        example.trained[:] = True
    example.trained[:1] = False
    if not example.trained.any():
        raise UserError("no trained token: the row has no answer")
    check_bos(ids, tokenizer)
    return example, cut_prompt


def encode_row(row: dict, tokenizer: Tokenizer, fmt: FormatConfig) -> tuple[list[int], list[bool], bool]:
    """Ids, where its answers are (with loss_on "answer"), and whether truncation fields were cut."""
    form = rows.form_of(row, fmt.template_fields())
    if form == "template":
        return format_template(row, tokenizer, fmt)
    formats = {
        "messages": format_messages,
        "conversations": format_conversations,
        "completion": format_completion,
    }
    return *formats[form](row, tokenizer, fmt), False


def check_bos(ids: list[int], tokenizer: Tokenizer) -> None:
    """Raises UserError if a row starts with two BOS."""
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id:
        raise UserError("two BOS at the start: the text brings its own, so use --add-bos False")


def bos_prefix(tokenizer: Tokenizer, add_bos: bool) -> list[int]:
    """[BOS] or []. Raises UserError if BOS is asked for and the tokenizer has none."""
    if add_bos and tokenizer.bos_id is None:
        raise UserError("--add-bos True: this tokenizer has no BOS token")
    return [tokenizer.bos_id] if add_bos else []


def bos_before_chat(tokenizer: Tokenizer, fmt: BosChoice) -> list[int]:
    """The BOS that --add-bos True puts in front of rendered messages, unless the template has its own."""
    return bos_prefix(tokenizer, fmt.add_bos is True and not (tokenizer.chat and tokenizer.chat.bos))


def add_bos(tokenizer: Tokenizer, fmt: BosChoice) -> bool:
    """Whether rows other than messages start with BOS."""
    return tokenizer.adds_bos if fmt.add_bos is None else fmt.add_bos


def count_prefix_tokens(prefix: str, text: str, ids: list[int], tokenizer: Tokenizer) -> int:
    """Number of `ids`, the tokens of `text`, that belong to its beginning `prefix`.

    Raises UserError if `prefix` does not begin the text, or if its tokens do not begin `ids`: the boundary
    then lies inside a token, and a model that is asked to continue `prefix` would see what it was never
    trained on.
    """
    if prefix == text:
        return len(ids)
    if not text.startswith(prefix):
        raise UserError(
            "the chat template's rendering of a prefix is not a prefix of the whole: its first turns end in "
            f"{prefix[-40:]!r}, the whole differs; use --turns each, or a template that renders turn by turn"
        )
    prefix_ids = tokenizer.encode(prefix)
    if ids[: len(prefix_ids)] != prefix_ids:
        raise UserError(
            "the tokens of a prefix are not a prefix of the whole: a token reaches across "
            f"{prefix[-20:]!r} | {text[len(prefix) :][:20]!r}; change the text there (strip the answer?)"
        )
    return len(prefix_ids)


def format_messages(row: dict, tokenizer: Tokenizer, fmt: FormatConfig) -> tuple[list[int], list[bool]]:
    """A {"messages": [{"role", "content"}, ...]} row: ids and trained.

    Trained is each assistant turn, from what follows the template's generation prompt to the last stop token;
    of those beyond max_seq_len only the first is marked.
    """
    messages, variables = row["messages"], template_variables(row)
    check_messages(messages)
    text = tokenizer.render(messages, **variables)
    ids = tokenizer.encode(text)
    trained = [False] * len(ids)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    marked = tokenizer.marked_answers(messages, **variables)
    if marked is not None and len(marked) != len(answers):
        raise UserError(
            f"the chat template marks {len(marked)} answers by {{% generation %}}, {len(answers)} messages "
            "are the assistant's"
        )
    for k, i in enumerate(answers if fmt.loss_on == "answer" else []):
        if not rows.is_trained(messages[i]):
            continue
        if marked is None:
            start, end = answer_span(messages, i, text, ids, tokenizer, variables)
        else:
            start, end = (count_prefix_tokens(text[:place], text, ids, tokenizer) for place in marked[k])
            rows.check_calls(i, messages[i], text[slice(*marked[k])])
            check_end(i, ids[start:end], text[: marked[k][1]], tokenizer)
        trained[start:end] = [True] * (end - start)
        if start >= fmt.max_seq_len:  # so are all that follow; each would render the chat once more
            break
    bos = bos_before_chat(tokenizer, fmt)
    return bos + ids, [False] * len(bos) + trained


def template_variables(row: dict) -> dict:
    """Variables of the chat template beside the messages of a row."""
    return {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}


def answer_span(
    messages: list[dict], i: int, text: str, ids: list[int], tokenizer: Tokenizer, variables: dict
) -> tuple[int, int]:
    """Span of message `i`, a response, in `ids`, the tokens of the rendered chat `text`: [start, end).

    From what follows the template's generation prompt to the last stop token, or to a stop string. Raises
    UserError if there is none, and for a template that `count_prefix_tokens` refuses.
    """
    prompt, answered = (
        tokenizer.render(messages[:i], add_generation_prompt=True, **variables),
        tokenizer.render(messages[: i + 1], **variables),
    )
    start = count_prefix_tokens(prompt, text, ids, tokenizer)
    end = count_prefix_tokens(answered, text, ids, tokenizer)
    check_end(i, ids[start:end], answered, tokenizer)
    rows.check_calls(i, messages[i], answered.removeprefix(prompt))
    if tokenizer.stop_strings and answered.endswith(tokenizer.stop_strings):
        return start, end
    return start, max(t for t in range(start, end) if ids[t] in tokenizer.stop_ids) + 1


def check_end(i: int, ids: list[int], answered: str, tokenizer: Tokenizer) -> None:
    """Raises UserError if message `i`, with the tokens `ids`, the last of `answered`, does not end."""
    ends = tokenizer.stop_strings and answered.endswith(tokenizer.stop_strings)
    if not ends and not tokenizer.stop_ids.intersection(ids):
        raise UserError(
            f"end of turn not trained: the chat template ends message {i} without a stop token: "
            "add the id of its end-of-turn token to eos_token_id in generation_config.json"
        )


def check_messages(messages: list[dict]) -> None:
    """Raises UserError if nothing comes before the first answer."""
    if messages[0]["role"] == "assistant":
        raise UserError("message 0: the first message must not be the assistant's, it would answer nothing")


def format_completion(row: dict, tokenizer: Tokenizer, fmt: FormatConfig) -> tuple[list[int], list[bool]]:
    """A {"prompt", "completion"} row of strings, as they stand: ids and trained, the completion with EOS."""
    prompt, completion = (tokenizer.as_it_stands(text_field(row, name)) for name in ("prompt", "completion"))
    context = bos_prefix(tokenizer, add_bos(tokenizer, fmt)) + tokenizer.encode(prompt)
    response = tokenizer.encode(completion, continued=bool(context)) + [tokenizer.eos_id]
    return context + response, [False] * len(context) + [True] * len(response)


def hide_values(row: dict, tokenizer: Tokenizer, markers: Sequence[str]) -> dict:
    """A `conversations` row in whose texts special tokens, and the markers of the chat, are hidden."""
    tokenizer.hide_markers(markers)
    return row | {name: tokenizer.hide_in(row[name]) for name in ("system", "conversations") if name in row}


def format_conversations(row: dict, tokenizer: Tokenizer, fmt: FormatConfig) -> tuple[list[int], list[bool]]:
    """A {"system", "conversations": [{"from", "value", "label"}], "mask", "type"} row: ids and trained."""
    markers = [unescape(token) for token in fmt.chat_tokens]
    text, spans = conversation_text(hide_values(row, tokenizer, markers), markers)
    bos = bos_prefix(tokenizer, add_bos(tokenizer, fmt))
    ids = tokenizer.encode(text)
    trained = [False] * len(ids)
    for first, last in spans if fmt.loss_on == "answer" else []:
        start = count_prefix_tokens(text[:first], text, ids, tokenizer)
        end = count_prefix_tokens(text[:last], text, ids, tokenizer)
        trained[start:end] = [True] * (end - start)
        if start >= fmt.max_seq_len:
            break
    return bos + ids, [False] * len(bos) + trained


def format_template(row: dict, tokenizer: Tokenizer, fmt: FormatConfig) -> tuple[list[int], list[bool], bool]:
    """A row with the fields of --prompt-template: ids, trained, and whether truncation fields were cut.

    Spaces around values are dropped. Trained are the answer and EOS; an empty answer is EOS alone.
    """
    pieces = template_pieces(fmt.prompt_template)
    values = {field: tokenizer.hide(text_field(row, field).strip(" ")) for _, field in pieces}
    bos = bos_prefix(tokenizer, add_bos(tokenizer, fmt))
    prompt, response = encode_template(pieces, values, tokenizer)
    fields = {field: tokenizer.encode(values[field], continued=True) for field in fmt.truncation_fields()}
    cut_prompt = False
    while (excess := len(bos + prompt + response) - fmt.max_seq_len) > 0 and any(fields.values()):
        shorter = cut_evenly(fields, excess, fmt.truncation_side)
        for field in (field for field in fields if shorter[field] != fields[field]):
            # a cut may split a character, and half of one decodes to U+FFFD
            values[field] = tokenizer.hide(tokenizer.decode(shorter[field]).strip("\ufffd").strip(" "))
        fields = shorter
        prompt, response = encode_template(pieces, values, tokenizer)
        cut_prompt = True
    context = bos + prompt
    return context + response, [False] * len(context) + [True] * len(response), cut_prompt


def template_pieces(template: str) -> list[tuple[str, str]]:
    """A prompt template as [(text before the field, field), ...]; the last field is the answer.

    Raises UserError if the template is not plain text with `{field}`s, or does not end with one.
    """
    flag = f"--prompt-template {template!r}"
    try:
        parsed = list(string.Formatter().parse(unescape(template)))
    except ValueError as error:
        raise UserError(f"{flag}: {error} (write braces that are text twice)") from error
    for _, field, spec, conversion in parsed:
        if field is not None and (not field.isidentifier() or spec or conversion):
            raise UserError(f"{flag}: braces must hold the name of a field and nothing else")
    pieces, text = [], ""
    for literal, field, _, _ in parsed:  # text around a doubled brace comes in parts
        text += literal
        if field is not None:
            pieces.append((text, field))
            text = ""
    if text or not pieces:
        raise UserError(f"{flag} must end with the field of the answer, as '{{input}} {{output}}' does")
    return pieces


def encode_template(
    pieces: list[tuple[str, str]], values: dict[str, str], tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """Token ids of prompt and response (with EOS) of a filled template.

    Spaces before the answer (and a separator that is all white space) belong to the response, so that "
    Paris" can be one token: a prompt ends with its last word, in training as in generation. An empty answer
    is EOS alone.
    """
    separator, answer_field = pieces[-1]
    kept = "" if separator.isspace() else separator.rstrip(" ")
    prompt = "".join(literal + values[field] for literal, field in pieces[:-1]) + kept
    answer = values[answer_field]
    response = separator[len(kept) :] + answer if answer else ""
    if not prompt:
        return [], tokenizer.encode(answer) + [tokenizer.eos_id]
    return tokenizer.encode(prompt), tokenizer.encode(response, continued=True) + [tokenizer.eos_id]


def cut_evenly(fields: dict[str, list[int]], excess: int, side: str) -> dict[str, list[int]]:
    """`fields` without `excess` tokens in all, taken evenly, but no more from a field than it has."""
    cut, left = dict(fields), excess
    live = [field for field in fields if fields[field]]
    for i, field in enumerate(live):
        ids = fields[field]
        take = min(len(ids), -(-left // (len(live) - i)))
        cut[field] = ids[take:] if side == "left" else ids[: len(ids) - take]
        left -= take
    return cut


def unescape(text: str) -> str:
    """`text` with backslash escapes, as typed on a command line, replaced by what they stand for."""
    try:
        return text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError as error:
        raise UserError(f"{text!r} holds a backslash that starts no escape: write two for one") from error
