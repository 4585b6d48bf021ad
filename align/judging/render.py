"""Judge prompts in the format of an SFT row, and the question of a row as text."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from align.data import formats, jsonl, marker_chat, prompts, rows
from align.data.formats import FormatConfig
from align.data.tokenizer import Tokenizer
from align.errors import UserError


def one_turn(row: dict, text: str, tokenizer: Tokenizer, fmt: FormatConfig) -> np.ndarray:
    """Encode `text` as the only turn of a prompt in the format of `row`, [n] int32, of any length.

    The ids equal those of SFT on a row of this turn and a response: an empty system text, no labels, and in
    rows of --prompt-template the text in the one field before the response. Raises UserError.
    """
    row, _ = rows.sft_row(row, fmt.template_fields())
    if "messages" in row:
        messages = [{"role": "user", "content": text}]
        return prompts.format_prompt(row | {"messages": messages}, tokenizer, fmt)
    if "conversations" in row:
        markers = [formats.unescape(token) for token in fmt.chat_tokens]
        row = formats.hide_values(turn_of(row, text), tokenizer, markers)
        conversation, [(start, _)] = marker_chat.conversation_text(row, markers)
        ids = tokenizer.encode(conversation[:start])
    else:
        pieces = formats.template_pieces(fmt.prompt_template)
        values = template_values(pieces, tokenizer.hide(text), fmt)
        ids, _ = formats.encode_template(pieces, values, tokenizer)
    if not ids:
        raise UserError("the prompt is empty: a response must follow something")
    ids = formats.bos_prefix(tokenizer, formats.add_bos(tokenizer, fmt)) + ids
    formats.check_bos(ids, tokenizer)
    return np.array(ids, np.int32)


def turn_of(row: dict, text: str) -> dict:
    """A `conversations` row of `text` and an empty response, with the names of `row`'s speakers."""
    kind, masked, turns = marker_chat.check_conversation(row)
    user = next(name for name, _, _ in turns if name in masked)
    assistant, _, _ = turns[last_response(marker_chat.trained_turns(kind, masked, turns))]
    conversation = [{"from": user, "value": text}, {"from": assistant, "value": ""}]
    return {"system": "", "conversations": conversation, "mask": sorted(masked)}


def last_response(turns: Sequence[int]) -> int:
    """The last of the numbers of response turns. Raises UserError without one."""
    if not turns:
        raise UserError("no prompt: the row has no response")
    return turns[-1]


def template_values(pieces: list[tuple[str, str]], text: str, fmt: FormatConfig) -> dict[str, str]:
    """`text` as the value of the one field before the response, which is empty. Raises UserError."""
    *prompt_fields, response_field = [field for _, field in pieces]
    if (number := len(set(prompt_fields))) != 1:
        flag = f"--prompt-template {fmt.prompt_template!r}"
        before = f"{number} fields before the response {response_field!r}"
        raise UserError(f"{flag} has {before}: a prompt of one text needs just one")
    return {response_field: "", prompt_fields[0]: text.strip(" ")}


def question(row: dict, tokenizer: Tokenizer, fmt: FormatConfig) -> tuple[str, str]:
    """Question of a row's last response as text for a judge: the whole conversation, and its last turn.

    Turns are "User: ..." with a blank line between them; a single turn has no name. The system text is left
    out if there are other turns. In rows of --prompt-template both are the text before the response, cut as
    by SFT, without BOS and white space around it. Raises UserError.
    """
    row, _ = rows.sft_row(row, fmt.template_fields())
    if "messages" in row:
        turns = messages_turns(row)
    elif "conversations" in row:
        turns = conversations_turns(row)
    else:
        ids, trained, _ = formats.encode_row(row, tokenizer, replace(fmt, loss_on="answer"))
        bos = formats.bos_prefix(tokenizer, formats.add_bos(tokenizer, fmt))
        turns = [("", tokenizer.decode(ids[len(bos) : trained.index(True)]).strip())]
    return as_text(turns), turns[-1][1]


def as_text(turns: Sequence[tuple[str, str]]) -> str:
    """Join (name, text) of turns; a single turn has no name."""
    return turns[0][1] if len(turns) == 1 else "\n\n".join(f"{name}: {text}" for name, text in turns)


def messages_turns(row: dict) -> list[tuple[str, str]]:
    """(name, text) of the turns before the last response of a `messages` row. Raises UserError."""
    messages = row["messages"]
    formats.check_messages(messages)
    end = last_response([i for i, message in enumerate(messages) if message["role"] == "assistant"])
    turns = [(message["role"].capitalize(), message["content"]) for message in messages[:end]]
    return [turn for turn in turns if turn[0] != "System"] or turns


def conversations_turns(row: dict) -> list[tuple[str, str]]:
    """(name, text) of the turns before the last response of a `conversations` row. Raises UserError.

    If that response is the label of a turn, the turn's text is included.
    """
    kind, masked, turns = marker_chat.check_conversation(row)
    end = last_response(marker_chat.trained_turns(kind, masked, turns))
    is_label = kind == "TEXT_TO_VALUE" and turns[end][2] is not None
    before = [(name, text) for name, text, _ in turns[: end + is_label]]
    return before or [(marker_chat.SYSTEM_ROLE, jsonl.text_field(row, "system"))]
