"""Interface and common part of the tokenizers: special tokens, chat templates, round-trip check."""

import datetime
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.data import chat_template, plain_text
from align.data.jsonl import write_object
from align.data.marker_chat import MarkerChat
from align.errors import UserError
from align.files import read_object, shown

REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers fills one from the others


class Tokenizer(ABC):
    """A tokenizer; HuggingFaceTokenizer and SentencePieceTokenizer are the two kinds."""

    eos_id: int
    bos_id: int | None
    pad_id: int
    adds_bos: bool  # by itself it puts BOS in front
    vocab_size: int  # largest id + 1
    stop_ids: set[int]  # they and `stop_strings` end a response
    special_tokens: dict[str, str]
    no_template: str  # message without a chat template
    plain: list  # tokenizers without special tokens; filled by `encode_plain`
    say: Callable[[str], None] | None = None
    unchecked = 0  # texts whose round trip is still to be checked
    special_tokens_in_text = "split"  # or "refuse", "allow": see TextConfig
    variables: dict = {}  # of the chat template, for all rows
    control: frozenset[str] = frozenset()  # names of special tokens that `encode` would find in a text
    special: re.Pattern | None = None  # matches a name of `control`
    markers: frozenset[str] = frozenset()  # chat markers that `hide_markers` hides
    texts_with_special = 0  # counted by `hide`
    strings_with_special = 0  # counted by `as_it_stands`
    chat: MarkerChat | None = None
    chat_template: str | dict[str, str] | None = None  # several by name, such as "default" and "tool_use"
    day = datetime.date.today()  # the chat template's date
    stop_strings: tuple[str, ...] = ()
    is_continued = False  # text after a special token is encoded as inside a text, without a first space

    @property
    @abstractmethod
    def ids_by_token(self) -> dict[str, int]: ...

    @abstractmethod
    def encode(self, text: str, continued: bool = False) -> list[int]: ...

    @abstractmethod
    def encode_plain(self, text: str, is_first: bool, continued: bool) -> list[int]:
        """Encode a text in which nothing is a special token."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str: ...

    @abstractmethod
    def is_control(self, marker: str) -> bool:
        """True if `encode` finds a token of this name in a text."""

    @abstractmethod
    def save(self, directory: Path) -> None: ...

    def check_variables(self, path: Path, template_date: str) -> None:
        """Raise UserError for a variable or a date that no chat template reads; `path`: of the model."""
        templates = self.chat_template or ""
        text = "\n".join(templates.values()) if isinstance(templates, dict) else templates
        flags = {name: f"--chat-template-kwargs {name!r}" for name in self.variables}
        if template_date:
            flags["strftime_now"] = f"--template-date {template_date}"
        for name in [name for name in flags if not chat_template.reads(text, name)]:
            reason = "whose chat template does not read it" if text else "which has no chat template"
            raise UserError(f"{flags[name]} has no effect with {path}, {reason}: leave it out")

    def differs_from_class(self) -> str:
        """A warning if transformers would give other ids, else ""."""
        return ""

    def check_round_trip(self, text: str, ids: list[int]) -> None:
        """Log, at most once, that the ids of `text` decode to another text."""
        self.unchecked -= 1
        if (decoded := self.decode(ids)) != text:
            equal = len(os.path.commonprefix([decoded, text]))
            part = slice(max(0, equal - 20), equal + 40)
            self.unchecked = 0
            assert self.say is not None
            self.say(f"decoding does not give the text back: {text[part]!r} becomes {decoded[part]!r}")

    def hide(self, text: str) -> str:
        """Hide the special tokens in a value of a row, so that `encode` finds none.

        Raises UserError for one that --special-tokens-in-text refuses, and for the characters that hide.
        """
        if plain_text.HIDDEN.search(text):
            raise UserError("a text has characters of Unicode's private plane 16, which mark hidden tokens")
        match = self.special and self.special.search(text)
        if not match or self.special_tokens_in_text == "allow":
            return text
        if self.special_tokens_in_text == "refuse":
            raise UserError(f"special token {match[0]!r} in a text: see --special-tokens-in-text")
        if self.say and not self.texts_with_special:
            self.say(f"special token {match[0]!r} in {text[:80]!r}: all such are encoded as plain text")
        self.texts_with_special += 1
        return plain_text.hide(text, match.re)

    def replace_refused(self, text: str) -> str:
        """A sampled text with U+FFFD in place of all that `hide` refuses."""
        text = plain_text.HIDDEN.sub("\ufffd", text)
        if self.special and self.special_tokens_in_text == "refuse":
            return self.special.sub("\ufffd", text)
        return text

    def as_it_stands(self, text: str) -> str:
        """Return a whole prompt or text of a row, whose special tokens are control tokens, and count it."""
        self.strings_with_special += bool(self.special and self.special.search(text))
        return text

    def hide_markers(self, markers: Sequence[str]) -> None:
        """Treat the markers of a chat as special tokens from now on, where they differ from plain text."""
        if self.markers >= set(markers):
            return
        self.markers |= set(markers)
        self.control |= {marker for marker in markers if marker.strip() and self.is_control(marker)}
        self.special, self.plain = plain_text.any_of(self.control), []

    def encode_hidden(self, text: str, continued: bool) -> list[int]:
        """Encode hidden special tokens as plain text; the others cut the text, as in the tokenizer itself."""
        assert self.special is not None
        parts = re.split(f"({self.special.pattern})", text)
        ids: list[int] = []
        before = ""
        for i, part in enumerate(parts):
            if i % 2 or not plain_text.HIDDEN.search(part):
                before += part
                continue
            ids += self.encode_part(before, ids, continued)
            is_first = not ids and not before
            plain = self.encode_plain(plain_text.reveal(part), is_first, continued)
            if control := self.control.intersection(map(self.decode, ([i] for i in plain))):
                special = f"{min(control)!r} in a text, for which this tokenizer has no other tokens"
                raise UserError(f"{special}: see --special-tokens-in-text")
            ids, before = ids + plain, ""
        return ids + self.encode_part(before, ids, continued)

    def encode_part(self, text: str, ids: list[int], continued: bool) -> list[int]:
        """Encode the part of a text that follows `ids`; it begins with a special token if there are any."""
        return self.encode(text, continued or (self.is_continued and bool(ids))) if text else []

    def hide_in(self, value: Any) -> Any:
        """Apply `hide` to all texts in messages, or in another value of a row, except names of roles."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, list):
            return [self.hide_in(item) for item in value]
        if isinstance(value, dict):
            return {name: item if name == "role" else self.hide_in(item) for name, item in value.items()}
        return value

    def render(self, messages: list[dict], add_generation_prompt: bool = False, **variables: object) -> str:
        """Render a chat with variables of the template ("tools", others). Raises UserError."""
        template, messages, variables = self.template_input(messages, variables)
        variables |= {"add_generation_prompt": add_generation_prompt}
        return chat_template.render(template, messages, **variables)

    def marked_responses(self, messages: list[dict], **variables: object) -> list[tuple[int, int]] | None:
        """Spans of the responses in the rendered chat, in characters; None without {% generation %}."""
        if not self.chat_template or not chat_template.marks_responses(self.template()):
            return None
        template, messages, variables = self.template_input(messages, variables)
        return chat_template.response_spans(template, messages, **variables)

    def template_input(self, messages: list[dict], variables: dict) -> tuple[str, list[dict], dict]:
        """Template, messages and all variables of a chat. Raises UserError for what the template ignores."""
        variables = self.variables | variables
        template = self.template(with_tools=variables.get("tools") is not None)
        names = [name for name, value in variables.items() if value is not None]
        names += ["tool_calls"] * any(message.get("tool_calls") for message in messages)
        if unread := [name for name in names if not chat_template.reads(template, name)]:
            rule = "take a model, or a chat_template.jinja, that does, or leave it out of the row"
            raise UserError(f"the chat template does not read {unread[0]!r}: {rule}")
        return template, self.hide_in(messages), self.special_tokens | self.hide_in(variables)

    def template_reads(self, name: str) -> bool:
        """True if the chat template mentions a field of a message; some fields have several names."""
        aliases = REASONING if name in REASONING else (name,)
        return any(chat_template.reads(self.template(), alias) for alias in aliases)

    def template(self, with_tools: bool = False) -> str:
        """The chat template with the date of the run in it. Raises UserError if there is none."""
        if not self.chat_template:
            raise UserError(self.no_template)
        template = self.chat_template
        if isinstance(template, dict):
            template = template["tool_use" if with_tools and "tool_use" in template else "default"]
        return chat_template.with_date(template, self.day)

    def about_date(self) -> str:
        """A line for the log about the date that the chat template writes, or ""."""
        if not self.chat_template:
            return ""
        if chat_template.reads_clock(template := self.template()):
            return "WARNING: the chat template writes the time in a way that is not pinned to the run"
        if template == self.chat_template:
            return ""
        return f"the chat template writes the date {self.day} (--template-date)"

    def follow(self, chat: MarkerChat) -> None:
        """Render chats by the template of `chat`, and end responses at its turn marker.

        The marker joins `stop_ids` if it is a single token after an end of turn, else it is a stop string.
        """
        self.chat, self.chat_template = chat, chat.template()
        self.hide_markers(chat.tokens)
        marker = self.encode(chat.turn_start, continued=True)
        joined = self.encode(chat.end_of_turn + chat.turn_start, continued=True)
        if len(marker) == 1 and joined[-1:] == marker:
            self.stop_ids = self.stop_ids | set(marker)
        else:
            self.stop_strings = (chat.turn_start,)

    def save_chat(self, directory: Path) -> None:
        """Write chat_template.jinja with --chat-template-kwargs, and a turn marker to generation_config.json.

        A marker of several tokens is a stop string: `generate` of transformers then needs `tokenizer=`, and
        other programs need it as their own stop string.
        """
        if self.chat_template and (self.chat or self.variables):
            assert isinstance(self.chat_template, str)  # several take no variables: load_tokenizer
            template = chat_template.with_defaults(self.chat_template, self.variables)
            (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        if not self.chat:
            return
        path = directory / "generation_config.json"
        config = read_object(path, required=False)
        stops = generation_stop_ids(directory) | self.stop_ids
        config["eos_token_id"] = sorted(stops, key=lambda i: (i != self.eos_id, i))
        if self.stop_strings:
            config["stop_strings"] = list(self.stop_strings)
        write_object(path, config)


def generation_stop_ids(directory: Path) -> set[int]:
    """Stop ids of transformers: `eos_token_id` of generation_config.json, else of config.json, or none."""
    for path in (directory / "generation_config.json", directory / "config.json"):
        stop = read_object(path, required=False).get("eos_token_id")
        if stop is None:
            continue
        ids = stop if isinstance(stop, list) else [stop]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise UserError(f"{path}: eos_token_id = {shown(stop)} must be a token id, or a list of them")
        return set(ids)
    return set()
