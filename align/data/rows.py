"""Rows as people have them, in the few forms that data, prompts and pairs are made of.

Forms of a row after this: {"messages"} with what the chat template reads beside them ("tools",
"chat_template_kwargs"), {"conversations"} with NeMo-Aligner's "mask" or "type", {"prompt", "completion"}
in strings, and the fields of --prompt-template. A row in one of them stays as it is.

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

from align.data.jsonl import text_field, turns_field
from align.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
KNOWN = {role: role for role in ROLES} | {"developer": "system"}
SHAREGPT = {  # names of its `from`; NeMo-Aligner's own, User and Assistant, are not among them
    **KNOWN,
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"},
    **{"observation": "tool", "function_response": "tool"},
}
WEIGHTS = ("weight", "train", "trainable", "loss_mask")  # of a message: is it trained?
VARIABLES = ("tools", "chat_template_kwargs")
REFUSED = {  # would change what is learnt, and is not implemented
    "functions": "give 'tools'",
    "function_call": "give 'tool_calls' in a message",
    "documents": "write them into a message",
    "history": "give 'messages'",
    **{name: "only text is read" for name in ("image", "images", "video", "videos", "audio", "audios")},
}


def sft_row(row: dict, template_fields: Sequence[str]) -> tuple[dict, set[str]]:
    """A row to be trained on in one of its forms, and the names of the fields that it was made of.

    `template_fields` are those of --prompt-template. Raises UserError.
    """
    refuse(row, set(template_fields))
    if "messages" in row:
        return chat_row(row, turns_field(row, "messages"), {"messages"})
    if "conversations" in row:
        return conversations_row(row)
    if set(template_fields) <= set(row) and ("instruction" not in row or "instruction" in template_fields):
        check_no_system(row, "the fields of --prompt-template", template_fields)
        return row, set(template_fields)
    if "prompt" in row and "completion" in row:
        if "label" in row:
            raise UserError(
                "fields 'prompt', 'completion', 'label': rows of KTO without pairs are not implemented; "
                "--loss kto_pair of train_dpo.py takes 'prompt', 'chosen', 'rejected'"
            )
        return completion_row(row)
    if "instruction" in row and set(template_fields) == {"input", "output"}:
        check_no_system(row, "'instruction'", ())
        return {"input": alpaca_prompt(row), "output": text_field(row, "output")}, ALPACA
    missing = [name for name in template_fields if name not in row]
    if missing and not set(template_fields) & set(row):
        raise UserError(f"fields {', '.join(map(repr, row)) or 'none'}: {FORMS}")
    return row, set(template_fields)


def form_of(row: dict, template_fields: Sequence[str]) -> str:
    """The form of a row that `sft_row` gives: messages, conversations, completion or template."""
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
    given = text_field(row, "input").strip(" ") if row.get("input") is not None else ""
    return f"{instruction}\n\n{given}" if given else instruction


def completion_row(row: dict) -> tuple[dict, set[str]]:
    """A {"prompt", "completion"} row: as it is if both are strings and no system speaks, else messages."""
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
        raise UserError(
            "fields 'prompt' and 'completion' must be two strings or two lists of messages, not "
            f"{kinds[0].__name__} and {kinds[1].__name__}"
        )
    untrained = [turn | {"weight": 0} if is_answer(turn) else turn for turn in before]
    return chat_row(row, untrained + after, used)


def one_or_more(row: dict, field: str) -> list[dict]:
    """The messages of a field that holds one or a list of them."""
    return [row[field]] if isinstance(row[field], dict) else turns_field(row, field)


def is_answer(turn: dict) -> bool:
    """Whether a turn, of messages or of ShareGPT, is the assistant's."""
    return SHAREGPT.get(turn.get("role", turn.get("from"))) == "assistant"


def conversations_row(row: dict) -> tuple[dict, set[str]]:
    """A `conversations` row: in NeMo-Aligner's form as it is, in ShareGPT's as messages."""
    if is_marker_row(row):
        return row, {"system", "conversations", "mask", "type"}
    return chat_row(row, turns_field(row, "conversations"), {"conversations"})


def is_marker_row(row: dict) -> bool:
    """True for a `conversations` row of NeMo-Aligner's: by its fields, or as no name is one of ShareGPT's."""
    if "mask" in row or "type" in row:
        return True
    turns = row["conversations"]
    names = [turn.get("role", turn.get("from")) for turn in turns if isinstance(turn, dict)]
    return not any(isinstance(name, str) and name in SHAREGPT for name in names)


def chat_row(row: dict, turns: Sequence[dict], used: set[str]) -> tuple[dict, set[str]]:
    """A row of messages and template variables, of turns and what stands beside them. Raises UserError."""
    messages = with_system(row, [message(turn, i) for i, turn in enumerate(turns)])
    chat = {"messages": messages} | template_variables(row)
    return chat, {*used, "system", *VARIABLES}


def template_variables(row: dict) -> dict:
    """The fields tools and chat_template_kwargs of a row where they are not empty. Raises UserError."""
    found = {}
    for name, kind in zip(VARIABLES, (list, dict), strict=True):
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except ValueError as error:
                raise UserError(f"field {name!r} is text that is not valid JSON: {error}") from error
        if value in (None, "", [], {}):
            continue
        inside = value if kind is list else []
        if not isinstance(value, kind) or not all(isinstance(one, dict) for one in inside):
            what = "a list of objects" if kind is list else "an object"
            raise UserError(f"field {name!r} must be {what}, not {type(value).__name__}")
        found[name] = value
    return found


def with_system(row: dict, messages: list[dict]) -> list[dict]:
    """Messages with the text of the field `system` as the first one. Raises UserError if they differ."""
    if not row.get("system"):
        return messages
    first = {"role": "system", "content": text_field(row, "system")}
    if messages[0]["role"] != "system":
        return [first, *messages]
    if messages[0]["content"] != first["content"]:
        raise UserError("field 'system' and the system's message differ: a chat has one of them")
    return messages


def message(turn: dict, i: int) -> dict:
    """A turn with "role" and "content", whose "weight" is 0 if it is not trained. Raises UserError."""
    try:
        made = turn if "role" in turn or "from" not in turn else sharegpt_message(turn)
        role = KNOWN.get(text_field(made, "role"))
        if role is None:
            raise UserError(f"role {made['role']!r} is not one of {', '.join(ROLES)}")
        if made.get("function_call"):
            raise UserError("field 'function_call' is not implemented: give 'tool_calls'")
        content, calls = text_of(made), tool_calls(made)
        weights = [made[name] for name in WEIGHTS if made.get(name) is not None]
        if any(weight not in (0, 1) for weight in weights):
            raise UserError(f"the weight of a message is 0 or 1, not {weights}")
        if role != "assistant" and any(weights):
            raise UserError(f"a message of the role {role!r} is never trained: its weight cannot be 1")
    except ValueError as error:
        raise UserError(f"message {i}: {error}") from error
    if (role, content) != (made["role"], made.get("content")):
        made = made | {"role": role, "content": content}
    if calls != made.get("tool_calls"):
        made = made | {"tool_calls": calls}
    return made | {"weight": 0} if weights and not all(weights) else made


def tool_calls(made: dict) -> list[dict] | None:
    """The tool calls of a message, their arguments as objects: chat templates write them as JSON again.

    OpenAI's form has them as JSON text. Raises UserError for text of anything else.
    """
    calls = made.get("tool_calls")
    if not isinstance(calls, list):
        return calls
    return [with_arguments(call) for call in calls]


def with_arguments(call: object) -> object:
    """A tool call, in OpenAI's form or without its "function", whose arguments are no text."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": with_arguments(call["function"])}
    if not isinstance(call.get("arguments"), str):
        return call
    return call | {"arguments": parse_object("arguments", call["arguments"] or "{}")}


def parse_object(name: str, text: str) -> dict:
    """The object that a field has as JSON text. Raises UserError."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"field {name!r} is text that is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"field {name!r} must be an object, not {type(value).__name__}")
    return value


def check_calls(i: int, message: dict, rendered: str) -> None:
    """Raises UserError if `rendered`, the text of message `i`, lacks the name of a tool that it calls."""
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, dict) else {}
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name not in rendered and json.dumps(name)[1:-1] not in rendered:
            raise UserError(
                f"message {i}: the chat template leaves out its call of the tool {name!r}: take a model, or "
                "a chat_template.jinja, that writes tool calls"
            )


def sharegpt_message(turn: dict) -> dict:
    """A turn of "from" and "value" as a message; a `function_call` is one tool call of the assistant's."""
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    name = text_field(turn, "from")
    if name == "function_call":
        function = parse_object("value", text_field(turn, "value"))
        call = {"type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call], **rest}
    return {"role": SHAREGPT.get(name, name), "content": text_field(turn, "value"), **rest}


def text_of(made: dict) -> str | None:
    """The content of a message as text; None beside tool calls. Raises UserError."""
    content = made.get("content")
    if content is None and made.get("tool_calls"):
        return None
    if not isinstance(content, list) or not content:
        return text_field(made, "content")
    for part in content:
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            raise UserError("field 'content' has a part that is not text, and only text is read")
    return "".join(text_field(part, "text") for part in content)


def by_turns(row: dict, turns: str) -> Iterator[dict]:
    """The chats that a `messages` row is trained as: itself (whole), or one for each answer or the last.

    Such a chat ends with its answer, the only one of it that is trained.
    """
    if "messages" not in row or turns == "whole":
        yield row
        return
    messages = row["messages"]
    answers = [i for i, made in enumerate(messages) if is_trained(made)]
    before = [made | {"weight": 0} if is_trained(made) else made for made in messages]
    chosen = answers[-1:] if turns == "last" else answers
    yield from (row | {"messages": [*before[:i], messages[i]]} for i in chosen)
    if not answers:
        yield row


def is_trained(made: dict) -> bool:
    """Whether a message is an answer to be trained."""
    return made["role"] == "assistant" and made.get("weight") != 0


def check_no_system(row: dict, beside: str, used: Sequence[str]) -> None:
    """Raises UserError for a system text where nothing has a place for it."""
    if row.get("system") and "system" not in used:
        raise UserError(f"field 'system' has no place beside {beside}: give 'messages'")


def refuse(row: dict, used: set[str]) -> None:
    """Raises UserError for a field that would change what is learnt and is not implemented."""
    for name, advice in REFUSED.items():
        if row.get(name) and name not in used:
            raise UserError(f"field {name!r} is not implemented: {advice}")
