"""Row formats: a row to token ids and a mask of the trained ones.

The format of a row follows from its fields (align/data/rows.py): `messages` (the model's chat template),
`conversations` (turns with the markers of --chat-tokens), `prompt` and `completion`, or the fields of
--prompt-template.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from align.data import rows
from align.data.jsonl import text_field
from align.data.marker_chat import conversation_text
from align.data.packing import Example
from align.data.tokenizer import Tokenizer
from align.errors import UserError
from align.flags import COUNT_OR_0, LENGTH, check_ranges


class BosChoice(Protocol):
    """A row format with the field that `add_bos` needs."""

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
                template = f"--prompt-template {self.prompt_template!r}"
                raise UserError(f"--truncation-field {field!r} is not in {template}")
        if not self.chat_tokens[1]:
            raise UserError("--chat-tokens: the second, which starts a turn and ends a response, is empty")

    def template_fields(self) -> list[str]:
        """The fields of `prompt_template`, the response last."""
        return [field for _, field in template_pieces(self.prompt_template)]

    def truncation_fields(self) -> list[str]:
        """The fields that are truncated."""
        if self.truncation_field is None:
            fields = self.template_fields()
            return ["input"] if "input" in fields[:-1] else fields[:-1]
        return [field.strip() for field in self.truncation_field.split(",")]


def format_parts(row: dict, tokenizer: Tokenizer, fmt: FormatConfig) -> list[tuple[dict, Example, bool]]:
    """Encode the parts of a row by --turns, up to the first that is too long. Raises UserError."""
    parts = []
    for part in rows.by_turns(row, fmt.turns):
        example, cut_prompt = format_normalised(part, tokenizer, fmt)
        parts.append((part, example, cut_prompt))
        if not cut_end(example, fmt).trained.any():
            break
    return parts


def cut_end(example: Example, fmt: FormatConfig) -> Example:
    """The first max_seq_len tokens of an example."""
    return Example(example.ids[: fmt.max_seq_len], example.trained[: fmt.max_seq_len])


def format_sft(row: dict, tokenizer: Tokenizer, fmt: FormatConfig) -> tuple[Example, bool]:
    """Encode a row as an example of any length; True if truncation fields were cut. Raises UserError."""
    return format_normalised(rows.sft_row(row, fmt.template_fields())[0], tokenizer, fmt)


def format_normalised(row: dict, tokenizer: Tokenizer, fmt: FormatConfig) -> tuple[Example, bool]:
    """`format_sft` of a row from `rows.sft_row`."""
    ids, trained, cut_prompt = encode_row(row, tokenizer, fmt)
    example = Example(np.array(ids, dtype=np.int32), np.array(trained, dtype=bool))
    if fmt.loss_on == "all":
        example.trained[:] = True
    example.trained[:1] = False
    if not example.trained.any():
        raise UserError("no trained token: the row has no response")
    check_bos(ids, tokenizer)
    return example, cut_prompt


def encode_row(row: dict, tokenizer: Tokenizer, fmt: FormatConfig) -> tuple[list[int], list[bool], bool]:
    """Encode a row: ids, mask of the responses (loss_on "answer"), True if truncation fields were cut."""
    form = rows.form_of(row, fmt.template_fields())
    if form == "template":
        return format_template(row, tokenizer, fmt)
    encoders = {"messages": format_messages, "conversations": format_conversations}
    return *encoders.get(form, format_completion)(row, tokenizer, fmt), False


def check_bos(ids: list[int], tokenizer: Tokenizer) -> None:
    """Raise UserError if a row starts with two BOS."""
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id:
        raise UserError("two BOS at the start: the text brings its own, so use --add-bos False")


def bos_prefix(tokenizer: Tokenizer, add_bos: bool) -> list[int]:
    """[BOS] with `add_bos`, else []. Raises UserError if the tokenizer has no BOS."""
    if not add_bos:
        return []
    if tokenizer.bos_id is None:
        raise UserError("--add-bos True: this tokenizer has no BOS token")
    return [tokenizer.bos_id]


def bos_before_chat(tokenizer: Tokenizer, fmt: BosChoice) -> list[int]:
    """BOS of --add-bos True before rendered messages, unless the template adds its own."""
    return bos_prefix(tokenizer, fmt.add_bos is True and not (tokenizer.chat and tokenizer.chat.bos))


def add_bos(tokenizer: Tokenizer, fmt: BosChoice) -> bool:
    """True if rows other than messages start with BOS."""
    return tokenizer.adds_bos if fmt.add_bos is None else fmt.add_bos


def count_prefix_tokens(prefix: str, text: str, ids: list[int], tokenizer: Tokenizer) -> int:
    """Number of `ids`, the tokens of `text`, in its beginning `prefix`.

    Raises UserError if `prefix` does not begin the text, or if its tokens do not begin `ids`: sampling after
    it would then start inside a token, from ids that were never trained.
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
            f"{prefix[-20:]!r} | {text[len(prefix) :][:20]!r}; change the text there (strip the response?)"
        )
    return len(prefix_ids)


def format_messages(row: dict, tokenizer: Tokenizer, fmt: FormatConfig) -> tuple[list[int], list[bool]]:
    """Encode a {"messages": [{"role", "content"}, ...]} row: ids and mask of the trained ones.

    Assistant turns are trained, from the end of the template's generation prompt to the last stop token; of
    turns beyond max_seq_len only the first is marked.
    """
    messages, variables = row["messages"], template_variables(row)
    check_messages(messages)
    text = tokenizer.render(messages, **variables)
    ids = tokenizer.encode(text)
    trained = [False] * len(ids)
    responses = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    marked = tokenizer.marked_responses(messages, **variables)
    if marked is not None and len(marked) != len(responses):
        marks = f"the chat template marks {len(marked)} responses by {{% generation %}}"
        raise UserError(f"{marks}, {len(responses)} messages are the assistant's")
    for k, i in enumerate(responses if fmt.loss_on == "answer" else []):
        if not rows.is_trained(messages[i]):
            continue
        if marked is None:
            start, end = response_span(messages, i, text, ids, tokenizer, variables)
        else:
            start, end = (count_prefix_tokens(text[:place], text, ids, tokenizer) for place in marked[k])
            rows.check_calls(i, messages[i], text[slice(*marked[k])])
            check_end(i, ids[start:end], text[: marked[k][1]], tokenizer)
        trained[start:end] = [True] * (end - start)
        if start >= fmt.max_seq_len:  # so are all later turns; each would render the chat once more
            break
    bos = bos_before_chat(tokenizer, fmt)
    return bos + ids, [False] * len(bos) + trained


def template_variables(row: dict) -> dict:
    """Variables of the chat template in a row, beside its messages."""
    return {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}


def response_span(
    messages: list[dict], i: int, text: str, ids: list[int], tokenizer: Tokenizer, variables: dict
) -> tuple[int, int]:
    """Span [start, end) of message `i`, a response, in `ids`, the tokens of the rendered chat `text`.

    From the end of the template's generation prompt to the last stop token or a stop string (else UserError).
    """
    prompt = tokenizer.render(messages[:i], add_generation_prompt=True, **variables)
    through_response = tokenizer.render(messages[: i + 1], **variables)
    start = count_prefix_tokens(prompt, text, ids, tokenizer)
    end = count_prefix_tokens(through_response, text, ids, tokenizer)
    check_end(i, ids[start:end], through_response, tokenizer)
    rows.check_calls(i, messages[i], through_response.removeprefix(prompt))
    if through_response.endswith(tokenizer.stop_strings):
        return start, end
    return start, max(t for t in range(start, end) if ids[t] in tokenizer.stop_ids) + 1


def check_end(i: int, ids: list[int], text: str, tokenizer: Tokenizer) -> None:
    """Raise UserError if message `i`, with the tokens `ids` at the end of `text`, has no end of turn."""
    if not text.endswith(tokenizer.stop_strings) and not tokenizer.stop_ids.intersection(ids):
        raise UserError(
            f"end of turn not trained: the chat template ends message {i} without a stop token: "
            "add the id of its end-of-turn token to eos_token_id in generation_config.json"
        )


def check_messages(messages: list[dict]) -> None:
    """Raise UserError if the first message is a response."""
    if messages[0]["role"] == "assistant":
        raise UserError("message 0: the first message must not be the assistant's, it would answer nothing")


def format_completion(row: dict, tokenizer: Tokenizer, fmt: FormatConfig) -> tuple[list[int], list[bool]]:
    """Encode a {"prompt", "completion"} row of strings, unchanged: ids and mask, the completion with EOS."""
    prompt, completion = (tokenizer.as_it_stands(text_field(row, name)) for name in ("prompt", "completion"))
    context = bos_prefix(tokenizer, add_bos(tokenizer, fmt)) + tokenizer.encode(prompt)
    response = tokenizer.encode(completion, continued=bool(context)) + [tokenizer.eos_id]
    return context + response, [False] * len(context) + [True] * len(response)


def hide_values(row: dict, tokenizer: Tokenizer, markers: Sequence[str]) -> dict:
    """Hide special tokens, and the markers of the chat, in the texts of a `conversations` row."""
    tokenizer.hide_markers(markers)
    return row | {name: tokenizer.hide_in(row[name]) for name in ("system", "conversations") if name in row}


def format_conversations(row: dict, tokenizer: Tokenizer, fmt: FormatConfig) -> tuple[list[int], list[bool]]:
    """Encode a {"system", "conversations": [{"from", "value", "label"}], "mask", "type"} row: ids, mask."""
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
    """Encode a row with the fields of --prompt-template: ids, mask, True if truncation fields were cut.

    Spaces around values are dropped. Response and EOS are trained; an empty response is EOS alone.
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
    """Parse a prompt template: [(text before the field, field), ...]; the last field is the response.

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
    for literal, field, _, _ in parsed:  # text around a doubled brace is split
        text += literal
        if field is not None:
            pieces.append((text, field))
            text = ""
    if text or not pieces:
        raise UserError(f"{flag} must end with the field of the response, as '{{input}} {{output}}' does")
    return pieces


def encode_template(
    pieces: list[tuple[str, str]], values: dict[str, str], tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """Encode prompt and response (with EOS) of a filled template.

    Spaces before the response (and a separator that is all white space) are encoded with it, so that " Paris"
    can be one token: a prompt ends with its last word, in training as in generation. An empty response is EOS
    alone.
    """
    separator, response_field = pieces[-1]
    kept = "" if separator.isspace() else separator.rstrip(" ")
    prompt = "".join(literal + values[field] for literal, field in pieces[:-1]) + kept
    response = values[response_field]
    if not prompt:
        return [], tokenizer.encode(response) + [tokenizer.eos_id]
    response = separator[len(kept) :] + response if response else ""
    return tokenizer.encode(prompt), tokenizer.encode(response, continued=True) + [tokenizer.eos_id]


def cut_evenly(fields: dict[str, list[int]], excess: int, side: str) -> dict[str, list[int]]:
    """Remove `excess` tokens from the fields, evenly, but no more from a field than it has."""
    shorter, left = dict(fields), excess
    nonempty = [field for field in fields if fields[field]]
    for i, field in enumerate(nonempty):
        ids = fields[field]
        count = min(len(ids), -(-left // (len(nonempty) - i)))
        shorter[field] = ids[count:] if side == "left" else ids[: len(ids) - count]
        left -= count
    return shorter


def unescape(text: str) -> str:
    """Replace backslash escapes, as typed on a command line, by their characters."""
    try:
        return text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError as error:
        raise UserError(f"{text!r} holds a backslash that starts no escape: write two for one") from error


def encode_prompt(text: str, field: str, tokenizer: Tokenizer, fmt: BosChoice) -> list[int]:
    """Encode a prompt of plain text, the value of `field`, with its BOS. Raises UserError if it is empty."""
    ids = tokenizer.encode(tokenizer.as_it_stands(text))
    if not ids:
        raise UserError(f"field {field!r} is empty: a response must follow something")
    return bos_prefix(tokenizer, add_bos(tokenizer, fmt)) + ids
