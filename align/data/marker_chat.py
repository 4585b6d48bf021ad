"""Marker chats: rows of {"system", "conversations", "mask", "type"} as text, and their chat template.

The layout is `SYS System EON system EOT`, then for each turn `TURN from EON [LABEL label EON] value EOT`, and
a last TURN if a response ends the row; --chat-tokens names the markers SYS, TURN, LABEL, EOT and EON. TURN
ends a response: it is the last token that a response is trained on, and sampling stops there.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from align.data.jsonl import text_field, turns_field
from align.errors import UserError
from align.files import read_object, shown
from align.flags import refuse_unused

Kind = Literal["VALUE_TO_TEXT", "TEXT_TO_VALUE", None]  # a label precedes its response, or is the response
SYSTEM_ROLE = "System"  # the name in the header


@dataclass(frozen=True)
class MarkerChat:
    """The chat format of a model that was trained on `conversations` rows."""

    tokens: tuple[str, ...]
    """SYS, TURN, LABEL, EOT, EON, without escapes"""
    user: str = "User"
    """`from` of the turns that are not trained"""
    assistant: str = "Assistant"
    """`from` of the turns that are trained"""
    system: str = ""
    """system text of a chat without a system message"""
    kind: Kind = None
    label: str | None = None
    """VALUE_TO_TEXT: label of the response to sample by default; None for no label"""
    bos: bool = False
    """the text starts with BOS"""

    @property
    def turn_start(self) -> str:
        """TURN, which ends a response."""
        return self.tokens[1]

    @property
    def end_of_turn(self) -> str:
        """EOT, between a response and TURN."""
        return self.tokens[3]

    def end(self, response: str) -> str:
        """Append the EOT and TURN that a response lacks."""
        if response.endswith(self.turn_start):
            return response
        return response.removesuffix(self.end_of_turn) + self.end_of_turn + self.turn_start

    def template(self) -> str:
        """The chat template (Jinja) that renders a chat of user and assistant as a training row.

        A message may have a "label". With VALUE_TO_TEXT a response without one has the default label, so that
        a prompt is a prefix of the whole chat ("label": false for none, as transformers drops null), and the
        variable `label` is that of the response to sample. With TEXT_TO_VALUE the generation prompt asks for
        the label of the last message.
        """
        system_start, turn_start, label_start, end_of_turn, end_of_name = map(quote, self.tokens)
        name = f"{turn_start} ~ names[message.role] ~ {end_of_name}"
        value = f"message.content ~ {end_of_turn}"
        label = f"({label_start} ~ own_label ~ {end_of_name} if own_label is string else '')"
        prompt = quote(self.tokens[1] + self.assistant + self.tokens[4])
        default = quote(self.label) if self.label else "none"
        has_labels = self.kind == "VALUE_TO_TEXT"
        has_own = "message.label is defined or message.role != 'assistant'"
        to_come = f"({label_start} ~ next_label ~ {end_of_name} if next_label is string else '')"
        turn, next_turn = {
            None: ([name, value], [prompt]),
            "VALUE_TO_TEXT": ([name, label, value], [prompt, to_come]),
            "TEXT_TO_VALUE": ([name, value, label], [label_start]),
        }[self.kind]
        header = [system_start, quote(SYSTEM_ROLE), end_of_name, "system", end_of_turn]
        lines = [
            f'{{%- set names = {{"user": {quote(self.user)}, "assistant": {quote(self.assistant)}}} -%}}',
            "{%- set has_system = messages and messages[0].role == 'system' -%}",
            f"{{%- set system = messages[0].content if has_system else {quote(self.system)} -%}}",
            "{%- set turns = messages[1:] if has_system else messages -%}",
            *[f"{{%- set next_label = label if label is defined else {default} -%}}"] * has_labels,
            output(["bos_token"] * self.bos + header),
            "{%- for message in turns -%}",
            "{%- if message.role not in names -%}",
            "{{- raise_exception('roles are user and assistant, system first only, not ' ~ message.role) -}}",
            "{%- endif -%}",
            f"{{%- set own_label = message.label if {has_own} else {default} -%}}",
            output(turn),
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}",
            output(next_turn),
            "{%- elif turns and turns[-1].role == 'assistant' -%}",
            output([turn_start]),
            "{%- endif -%}",
        ]
        return "\n".join(lines) + "\n"


def quote(text: str) -> str:
    """A string literal of Jinja."""
    return json.dumps(text, ensure_ascii=False)


def output(expressions: Sequence[str]) -> str:
    """A Jinja statement that prints expressions end to end."""
    return f"{{{{- {' ~ '.join(expressions)} -}}}}"


def read(directory: Path) -> MarkerChat | None:
    """The chat in a directory's prompt_format.json, None without one. Raises UserError for another form."""
    path = Path(directory) / "prompt_format.json"
    fields = read_object(path, required=False).get("chat")
    if fields is None:
        return None
    try:
        chat = MarkerChat(**fields | {"tokens": tuple(fields["tokens"])})
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}: chat = {shown(fields)} is no marker chat: {error}") from error
    texts = [*chat.tokens, chat.user, chat.assistant, chat.system, chat.label or ""]
    if len(chat.tokens) != 5 or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path}: chat = {shown(fields)} must have five tokens, all texts strings")
    if chat.kind not in get_args(Kind) or not isinstance(chat.bos, bool):
        raise UserError(f"{path}: kind {chat.kind!r} or bos {chat.bos!r} of the chat is unknown")
    return chat


def conversation_text(row: dict, chat_tokens: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a `conversations` row and the spans [first, last) of its characters that are trained.

    With type VALUE_TO_TEXT a turn's label precedes its value, with TEXT_TO_VALUE it follows `value EOT`,
    without a type it is left out. Trained are the turns of roles that `mask` does not name: value and EOT
    (with TEXT_TO_VALUE label and EON) and the TURN that follows, which ends the response. The first turn has
    no prompt and is not trained (with TEXT_TO_VALUE it may be: the label responds to the turn's own text).
    """
    system_start, turn_start, label_start, end_of_turn, end_of_name = chat_tokens
    kind, masked, turns = check_conversation(row)
    trained = trained_turns(kind, masked, turns)
    text = f"{system_start}{SYSTEM_ROLE}{end_of_name}{text_field(row, 'system')}{end_of_turn}"
    spans = []
    for i, (role, value, label) in enumerate(turns):
        text += f"{turn_start}{role}{end_of_name}"
        context, response = "", f"{value}{end_of_turn}"
        if label is not None and kind == "VALUE_TO_TEXT":
            context = f"{label_start}{label}{end_of_name}"
        elif label is not None and kind == "TEXT_TO_VALUE":
            context, response = f"{value}{end_of_turn}{label_start}", f"{label}{end_of_name}"
        if i in trained:
            first = len(text) + len(context)
            spans.append((first, first + len(response) + len(turn_start)))
        text += context + response
    return text + (turn_start if turns[-1][0] not in masked else ""), spans


def trained_turns(kind: str | None, masked: set[str], turns: list[tuple[str, str, str | None]]) -> list[int]:
    """Numbers of the trained turns of a `conversations` row; arguments from `check_conversation`."""
    starts_at = 0 if kind == "TEXT_TO_VALUE" else 1
    return [i for i, (role, _, _) in enumerate(turns) if i >= starts_at and role not in masked]


def check_conversation(row: dict) -> tuple[str | None, set[str], list[tuple[str, str, str | None]]]:
    """Read `type`, roles in `mask`, and turns (role, value, label) of a `conversations` row (UserError)."""
    kind, mask = row.get("type"), row.get("mask", "User")
    if kind not in (None, "VALUE_TO_TEXT", "TEXT_TO_VALUE"):
        raise UserError(f"field 'type' must be VALUE_TO_TEXT, TEXT_TO_VALUE or null, not {kind!r}")
    roles = [mask] if isinstance(mask, str) else mask
    if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
        raise UserError(f"field 'mask' must be a role or a list of roles, not {mask!r}")
    turns = [check_turn(turn, i) for i, turn in enumerate(turns_field(row, "conversations"))]
    if not any(role in roles for role, _, _ in turns):
        raise UserError(f"field 'mask' excludes {', '.join(roles) or 'no role'}, but no turn is 'from' there")
    return kind, set(roles), turns


def check_turn(turn: dict, i: int) -> tuple[str, str, str | None]:
    """Read role, value and label (or None) of turn `i`."""
    try:
        label = None if turn.get("label") is None else text_field(turn, "label")
        return text_field(turn, "from"), text_field(turn, "value"), label
    except ValueError as error:
        raise UserError(f"turn {i}: {error}") from error


def prompt_text(row: dict, chat: MarkerChat) -> str:
    """The text of a `conversations` row up to its last response, or the next one after a masked last turn.

    With TEXT_TO_VALUE up to the label of the last turn. Raises UserError.
    """
    kind, masked, turns = check_conversation(row)
    role, value, label = turns[-1]
    conversation = row["conversations"]
    if kind == "TEXT_TO_VALUE":
        conversation = [*conversation[:-1], {"from": role, "value": value, "label": label or ""}]
    elif role in masked:
        conversation = [*conversation, {"from": chat.assistant, "value": "", "label": chat.label}]
    text, spans = conversation_text(row | {"conversations": conversation}, chat.tokens)
    if not spans or (kind == "TEXT_TO_VALUE" and role in masked):
        raise UserError("no prompt: the last turn is no response and asks for none")
    return text[: spans[-1][0]]


USED_BY = {  # form of a row: its fields, and the flags that change the tokens of this form only
    "template": ("the fields of --prompt-template", "prompt_template truncation_field truncation_side"),
    "conversations": ("'conversations' with 'mask' or 'type'", "chat_tokens"),
    "messages": ("'messages'", "turns"),
}


@dataclass(frozen=True)
class RowFormats:
    """Counts of the formats of a training set's rows, and of names, types and labels in `conversations`."""

    rows: Counter = field(default_factory=Counter)  # messages, conversations, template
    forms: Counter = field(default_factory=Counter)  # the same, and completion, which is not a template
    users: Counter = field(default_factory=Counter)
    assistants: Counter = field(default_factory=Counter)
    systems: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    labels: Counter = field(default_factory=Counter)

    def add(self, row: dict, form: str) -> None:
        """Count a row that was read without error; `form` from `rows.form_of`."""
        name = "template" if form == "completion" else form
        self.forms[form] += 1
        self.rows[name] += 1
        if name != "conversations":
            return
        kind, masked, turns = check_conversation(row)
        responses = [turns[i] for i in trained_turns(kind, masked, turns)]
        self.users.update(role for role, _, _ in turns if role in masked)
        self.assistants.update(role for role, _, _ in responses)
        self.labels.update(label for _, _, label in responses)
        self.systems[row["system"]] += 1
        self.kinds[kind] += 1

    def check_used(self, fmt: object, default: object) -> None:
        """Raise UserError for a flag of a FormatConfig about a form that no row has."""
        for form, (fields, names) in USED_BY.items():
            if self.forms and not self.forms[form]:
                refuse_unused(fmt, default, names, f"on --train-data, which has no rows of {fields}")

    def chat(self, tokens: Sequence[str], bos: bool) -> MarkerChat | None:
        """Infer the chat of the `conversations` rows; None without such rows.

        The system text of more than half of the rows is the default; so is the most frequent label, if more
        than half of the responses have a label in front. `tokens`: the markers, without escapes; `bos`: rows
        start with BOS. Raises UserError if there are `messages` rows too.
        """
        if not self.rows["conversations"]:
            return None
        if self.rows["messages"]:
            counts = f"{self.rows['conversations']:,} rows of 'conversations' and {self.rows['messages']:,}"
            rule = "a model has one chat format: convert the rows of the other"
            raise UserError(f"--train-data has {counts} of 'messages', and {rule}")
        kind = most_common(self.kinds, None)
        [(system, count)] = self.systems.most_common(1)
        labels = Counter({label: number for label, number in self.labels.items() if label})
        has_label = 2 * labels.total() > self.labels.total() and kind == "VALUE_TO_TEXT"
        return MarkerChat(
            tokens=tuple(tokens),
            user=most_common(self.users, MarkerChat.user),
            assistant=most_common(self.assistants, MarkerChat.assistant),
            system=system if 2 * count > self.systems.total() else "",
            kind=kind,
            label=most_common(labels, None) if has_label else None,
            bos=bos,
        )

    def differences(self) -> list[str]:
        """Lines for the log: properties with several values, of which a model's chat has one."""
        counters = {
            "formats (stored: the chat template of conversations, and --prompt-template)": self.rows,
            "user names": self.users,
            "assistant names": self.assistants,
            "types": self.kinds,
        }
        return [
            f"training rows have several {name}: "
            + ", ".join(f"{value!r} {count:,}" for value, count in counter.most_common())
            for name, counter in counters.items()
            if len(counter) > 1
        ]


def most_common(counter: Counter, default: Any) -> Any:
    """The most frequent value, or `default` of an empty counter."""
    return counter.most_common(1)[0][0] if counter else default
