"""Normalise rows of other projects' formats to a few forms.

Forms of a normalised row: {"messages"} with variables of the chat template beside them ("tools",
"chat_template_kwargs"), {"conversations"} with NeMo-Aligner's "mask" or "type", {"prompt", "completion"}
in strings, and the fields of --prompt-template. A row in one of them is not changed.

| a row of | is read as |
|---|---|
| ShareGPT: "conversations" of "from", "value" (human, gpt, system, tool), without "mask" | messages |
| "prompt", "completion" in messages | messages, of which the completion is trained |
| Alpaca: "instruction", "input", "output" | {input} = instruction, blank line, input; {output} |
| "system" beside messages or a prompt | a first message of the system |
| "tools", "chat_template_kwargs" (or JSON text of them) | variables of the chat template |
| a message with "weight", "train", "trainable", "loss_mask" 0 or false | not trained |
| content in parts of text | their texts, joined |
| `arguments` of a tool call in JSON text; ShareGPT's "function_call" | an object; a tool call |
| role "developer" | system |
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from align.data.jsonl import text_field, turns_field
from align.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
KNOWN = {role: role for role in ROLES} | {"developer": "system"}
SHAREGPT = {  # names of its `from`; NeMo-Aligner's own, User and Assistant, are not among them
    **KNOWN,
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"},
    **{"observation": "tool", "function_response": "tool"},
}
WEIGHTS = ("weight", "train", "trainable", "loss_mask")  # fields of a message; 0: not trained
VARIABLES = ("tools", "chat_template_kwargs")
REFUSED = {  # fields that would change training and are not implemented
    "functions": "give 'tools'",
    "function_call": "give 'tool_calls' in a message",
    "documents": "write them into a message",
    "history": "give 'messages'",
    **{name: "only text is read" for name in ("image", "images", "video", "videos", "audio", "audios")},
}


def sft_row(row: dict, template_fields: Sequence[str]) -> tuple[dict, set[str]]:
    """Normalise a training row, beside the names of the fields that are read. Raises UserError."""
    refuse(row, set(template_fields))
    if "messages" in row:
        return chat_row(row, turns_field(row, "messages"), {"messages"})
    if "conversations" in row and is_marker_row(row):
        return row, {"system", "conversations", "mask", "type"}  # NeMo-Aligner's
    if "conversations" in row:
        return chat_row(row, turns_field(row, "conversations"), {"conversations"})
    if set(template_fields) <= set(row) and ("instruction" not in row or "instruction" in template_fields):
        check_no_system(row, "the fields of --prompt-template", template_fields)
        return row, set(template_fields)
    if "prompt" in row and "completion" in row:
        if "label" in row:
            advice = "--loss kto_pair of train_dpo.py takes 'prompt', 'chosen', 'rejected'"
            raise UserError(f"field 'label': rows of KTO without pairs are not implemented; {advice}")
        return completion_row(row)
    if "instruction" in row and set(template_fields) == {"input", "output"}:
        check_no_system(row, "'instruction'", ())
        return {"input": alpaca_prompt(row), "output": text_field(row, "output")}, ALPACA
    missing = [name for name in template_fields if name not in row]
    if missing and not set(template_fields) & set(row):
        raise UserError(f"fields {', '.join(map(repr, row)) or 'none'}: {FORMS}")
    return row, set(template_fields)


def form_of(row: dict, template_fields: Sequence[str]) -> str:
    """The form of a normalised row: messages, conversations, completion or template."""
    forms = ["messages", "conversations"]
    if not set(template_fields) <= set(row):
        forms.append("completion")
    return next((name for name in forms if name in row), "template")


ALPACA = {"instruction", "input", "output"}
FORMS = (
    "a row has 'messages', 'conversations', 'prompt' and 'completion', 'instruction' and 'output', or the "
    "fields of --prompt-template, 'input' and 'output' by default: for others give --prompt-template "
    "'{question} {answer}'"
)


def alpaca_prompt(row: dict) -> str:
    """Instruction, blank line, input; the instruction alone if the input is missing, null or empty."""
    instruction = text_field(row, "instruction").strip(" ")
    extra = text_field(row, "input").strip(" ") if row.get("input") is not None else ""
    return f"{instruction}\n\n{extra}" if extra else instruction


def completion_row(row: dict) -> tuple[dict, set[str]]:
    """Normalise a {"prompt", "completion"} row: strings without a system text stay, else messages."""
    used = {"prompt", "completion"}
    kinds = [type(row["prompt"]), type(row["completion"])]
    if kinds == [str, str] and not row.get("system"):
        return {name: text_field(row, name) for name in ("prompt", "completion")}, used
    if kinds == [str, str]:
        before = [{"role": "user", "content": text_field(row, "prompt")}]
        after = [{"role": "assistant", "content": text_field(row, "completion")}]
    elif kinds[0] is list and kinds[1] in (list, dict):
        before, after = turns_field(row, "prompt"), one_or_more(row, "completion")
    else:
        names = " and ".join(kind.__name__ for kind in kinds)
        rule = "must be two strings or two lists of messages"
        raise UserError(f"fields 'prompt' and 'completion' {rule}, not {names}")
    untrained = [turn | {"weight": 0} if is_response(turn) else turn for turn in before]
    return chat_row(row, untrained + after, used)


def one_or_more(row: dict, field: str) -> list[dict]:
    """The messages of a field that holds one or a list of them."""
    return [row[field]] if isinstance(row[field], dict) else turns_field(row, field)


def is_response(turn: dict) -> bool:
    """True if a turn, of messages or of ShareGPT, is the assistant's."""
    return SHAREGPT.get(turn.get("role", turn.get("from", ""))) == "assistant"


def is_marker_row(row: dict) -> bool:
    """True for NeMo-Aligner's `conversations` rows: by their fields, or without any name of ShareGPT's."""
    if "mask" in row or "type" in row:
        return True
    turns = row["conversations"]
    names = [turn.get("role", turn.get("from")) for turn in turns if isinstance(turn, dict)]
    return not any(isinstance(name, str) and name in SHAREGPT for name in names)


def chat_row(row: dict, turns: Sequence[dict], used: set[str]) -> tuple[dict, set[str]]:
    """Normalise turns, and the fields beside them, to messages and template variables. Raises UserError."""
    messages = with_system(row, [message(turn, i) for i, turn in enumerate(turns)])
    chat = {"messages": messages} | template_variables(row)
    return chat, {*used, "system", *VARIABLES}


def template_variables(row: dict) -> dict:
    """The fields tools and chat_template_kwargs of a row, if not empty. Raises UserError."""
    variables: dict[str, Any] = {}
    for name, kind in zip(VARIABLES, (list, dict), strict=True):
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            value = parse_field(name, value)
        if value in (None, "", [], {}):
            continue
        items = value if kind is list else []
        if not isinstance(value, kind) or not all(isinstance(item, dict) for item in items):
            rule = "a list of objects" if kind is list else "an object"
            raise UserError(f"field {name!r} must be {rule}, not {type(value).__name__}")
        variables[name] = value
    return variables


def with_system(row: dict, messages: list[dict]) -> list[dict]:
    """Put the text of the field `system` first in the messages. Raises UserError if they have another."""
    if not row.get("system"):
        return messages
    first = {"role": "system", "content": text_field(row, "system")}
    if messages[0]["role"] != "system":
        return [first, *messages]
    if messages[0]["content"] != first["content"]:
        raise UserError("field 'system' and the system's message differ: a chat has one of them")
    return messages


def message(turn: dict, i: int) -> dict:
    """Normalise a turn to "role" and "content", and "weight" 0 if it is not trained. Raises UserError."""
    try:
        result = turn if "role" in turn or "from" not in turn else sharegpt_message(turn)
        role = KNOWN.get(text_field(result, "role"))
        if role is None:
            raise UserError(f"role {result['role']!r} is not one of {', '.join(ROLES)}")
        if result.get("function_call"):
            raise UserError("field 'function_call' is not implemented: give 'tool_calls'")
        content, calls = text_of(result), tool_calls(result)
        weights = [result[name] for name in WEIGHTS if result.get(name) is not None]
        if any(weight not in (0, 1) for weight in weights):
            raise UserError(f"the weight of a message is 0 or 1, not {weights}")
        if role != "assistant" and any(weights):
            raise UserError(f"a message of the role {role!r} is never trained: its weight cannot be 1")
    except ValueError as error:
        raise UserError(f"message {i}: {error}") from error
    if (role, content) != (result["role"], result.get("content")):
        result = result | {"role": role, "content": content}
    if calls != result.get("tool_calls"):
        result = result | {"tool_calls": calls}
    return result | {"weight": 0} if weights and not all(weights) else result


def tool_calls(message: dict) -> list[dict] | None:
    """Tool calls, their arguments as objects and not OpenAI's JSON text: templates write JSON (UserError)."""
    calls = message.get("tool_calls")
    return [with_arguments(call) for call in calls] if isinstance(calls, list) else calls


def with_arguments(call: Any) -> Any:
    """Parse the arguments of a tool call, in OpenAI's form or without its "function"."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": with_arguments(call["function"])}
    if not isinstance(call.get("arguments"), str):
        return call
    return call | {"arguments": parse_object("arguments", call["arguments"] or "{}")}


def parse_field(name: str, text: str) -> object:
    """Parse the JSON text of a field. Raises UserError."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"field {name!r} is text that is not valid JSON: {error}") from error


def parse_object(name: str, text: str) -> dict:
    """Parse the JSON text of a field as an object. Raises UserError."""
    value = parse_field(name, text)
    if not isinstance(value, dict):
        raise UserError(f"field {name!r} must be an object, not {type(value).__name__}")
    return value


def check_calls(i: int, message: dict, rendered: str) -> None:
    """Raise UserError if `rendered`, the text of message `i`, lacks the name of a tool that it calls."""
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, dict) else {}
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name not in rendered and json.dumps(name)[1:-1] not in rendered:
            reason = f"the chat template leaves out its call of the tool {name!r}"
            rule = "take a model, or a chat_template.jinja, that writes tool calls"
            raise UserError(f"message {i}: {reason}: {rule}")


def sharegpt_message(turn: dict) -> dict:
    """Convert a turn of "from" and "value"; a `function_call` becomes a tool call of the assistant's."""
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    name = text_field(turn, "from")
    if name == "function_call":
        function = parse_object("value", text_field(turn, "value"))
        call = {"type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call], **rest}
    return {"role": SHAREGPT.get(name, name), "content": text_field(turn, "value"), **rest}


def text_of(message: dict) -> str | None:
    """The content of a message as text; None beside tool calls. Raises UserError."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return None
    if not isinstance(content, list) or not content:
        return text_field(message, "content")
    for part in content:
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            raise UserError("field 'content' has a part that is not text, and only text is read")
    return "".join(text_field(part, "text") for part in content)


def by_turns(row: dict, turns: str) -> Iterator[dict]:
    """Split a `messages` row by --turns: itself, or chats that end with their only trained response."""
    if "messages" not in row or turns == "whole":
        yield row
        return
    messages = row["messages"]
    responses = [i for i, turn in enumerate(messages) if is_trained(turn)]
    before = [turn | {"weight": 0} if is_trained(turn) else turn for turn in messages]
    ends = responses[-1:] if turns == "last" else responses
    yield from (row | {"messages": [*before[:i], messages[i]]} for i in ends)
    if not responses:
        yield row


def is_trained(message: dict) -> bool:
    """True for a response that is trained."""
    return message["role"] == "assistant" and message.get("weight") != 0


def check_no_system(row: dict, beside: str, used: Sequence[str]) -> None:
    """Raise UserError for a system text in a form without one."""
    if row.get("system") and "system" not in used:
        raise UserError(f"field 'system' has no place beside {beside}: give 'messages'")


def refuse(row: dict, used: set[str]) -> None:
    """Raise UserError for a field that would change training and is not implemented."""
    for name, advice in REFUSED.items():
        if row.get(name) and name not in used:
            raise UserError(f"field {name!r} is not implemented: {advice}")
