"""Tokenizers behind one small surface: Hugging Face directories and SentencePiece `.model` files.

Two rules hold for both. `encode` never adds a special token: whoever builds a sequence puts BOS and EOS where
they belong. And pad may be the same id as end of text (GPT-2B, SmolLM2): no caller may find padding by
`ids == pad_id`.
"""

import datetime
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tokenizers
import transformers
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from align.data import chat_template, marker_chat, plain_text, sentencepiece_json
from align.data.marker_chat import MarkerChat
from align.data.sentencepiece_json import SPACE
from align.data.tokenizer_files import (
    JSON_FILES,
    add_configured_tokens,
    generation_stop_ids,
    read_backend,
    read_hugging_face,
)
from align.errors import UserError
from align.files import read_object, shown

HUGGING_FACE_FILES = (  # whatever of these a directory has makes up its tokenizer
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers fills one from the others
USER_DEFINED = ModelProto.SentencePiece.USER_DEFINED
CHECKED_TEXTS = 200  # of a run's first ones


@dataclass(frozen=True)
class TextConfig:
    """Treatment of chats and of the texts in them."""

    special_tokens_in_text: Literal["split", "refuse", "allow"] = "split"
    """special tokens spelled out in a message, or in a value of --prompt-template: encode them as the plain
    text that they are (split), end with an error (refuse), or take them for control tokens (allow)"""
    chat_template_kwargs: str = ""
    """variables of the chat template for all rows, a JSON object such as '{"enable_thinking": false}'; a
    row's own "chat_template_kwargs" win. They become defaults of the chat template in OUTPUT/hf"""
    template_date: str = ""
    """YYYY-MM-DD, the date that a chat template sees (strftime_now); default: the day on which the run began,
    also after a resume"""

    def variables(self) -> dict:
        """`chat_template_kwargs`, read. Raises UserError."""
        try:
            found = json.loads(self.chat_template_kwargs or "{}")
        except ValueError as error:
            raise UserError(f"--chat-template-kwargs: not valid JSON: {error}") from error
        if not isinstance(found, dict):
            raise UserError(f"--chat-template-kwargs must be a JSON object, not a {type(found).__name__}")
        return found

    def day(self, default: datetime.date) -> datetime.date:
        """`template_date`, read. Raises UserError."""
        if not self.template_date:
            return default
        try:
            return datetime.date.fromisoformat(self.template_date)
        except ValueError as error:
            raise UserError(f"--template-date {self.template_date!r} must be a date YYYY-MM-DD") from error

    def __post_init__(self):
        self.variables()
        self.day(datetime.date.today())


def load(
    path: Path,
    say: Callable[[str], None] | None = None,
    config: TextConfig = TextConfig(),
    day: datetime.date | None = None,
) -> "HuggingFaceTokenizer | SentencePieceTokenizer":
    """Load the tokenizer of a model directory or of a SentencePiece `.model` file; no code of it runs.

    It follows the marker chat that the directory's prompt_format.json names. Raises UserError if there is no
    tokenizer at `path`.

    Args:
        say: logs the date that the chat template writes, ids that differ from transformers', the first of
            CHECKED_TEXTS texts that its ids do not decode to, and the first special token in a text.
        day: the day on which the run began (default: today).
    """
    path = Path(path)
    if path.suffix == ".model" and path.is_file():
        tokenizer = SentencePieceTokenizer(path)
    elif any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = HuggingFaceTokenizer(path)
    elif (path / "tokenizer.model").is_file():
        tokenizer = SentencePieceTokenizer(path / "tokenizer.model")
    else:
        raise UserError(
            f"{path} holds no tokenizer: name a directory with a tokenizer.json, or a SentencePiece .model "
            "file"
        )
    if chat := path.is_dir() and marker_chat.read(path):
        tokenizer.follow(chat)
    tokenizer.config, tokenizer.variables = config, config.variables()
    tokenizer.day = config.day(day or datetime.date.today())
    if isinstance(tokenizer.chat_template, dict) and tokenizer.variables:
        raise UserError(f"--chat-template-kwargs: {path} has several chat templates: leave one")
    check_variables(tokenizer, path)
    if say and (line := tokenizer.about_date()):
        say(line)
    if say:
        if warning := tokenizer.differs_from_class():
            say(warning)
        tokenizer.say, tokenizer.unchecked = say, CHECKED_TEXTS
    return tokenizer


def check_variables(tokenizer: "HuggingFaceTokenizer | SentencePieceTokenizer", path: Path) -> None:
    """Raise UserError for a variable, or a date, that no chat template of a model reads."""
    templates = tokenizer.chat_template or ""
    text = "\n".join(templates.values()) if isinstance(templates, dict) else templates
    flags = {name: f"--chat-template-kwargs {name!r}" for name in tokenizer.variables}
    if tokenizer.config.template_date:
        flags["strftime_now"] = f"--template-date {tokenizer.config.template_date}"
    for name in [name for name in flags if not chat_template.reads(text, name)]:
        what = "whose chat template does not read it" if text else "which has no chat template"
        raise UserError(f"{flags[name]} has no effect with {path}, {what}: leave it out")


class Base:
    """The part that both tokenizers share: the check that ids decode to their text, and marker chats."""

    say: Callable[[str], None] | None = None
    unchecked = 0  # texts that are still to be checked
    config = TextConfig()
    variables: dict = {}
    control: frozenset[str] = frozenset()  # names of special tokens that `encode` would find in a text
    special: re.Pattern | None = None  # matches them
    markers: frozenset[str] = frozenset()  # of chats, that `hide_markers` has seen
    texts_with_special = 0  # that `hide` has seen
    strings_with_special = 0  # that `as_it_stands` has seen
    chat: MarkerChat | None = None
    chat_template: str | dict[str, str] | None = None  # several by name, such as "default" and "tool_use"
    day = datetime.date.today()  # the chat template's date
    stop_strings: tuple[str, ...] = ()
    is_continued = False  # text behind a special token is encoded as inside a text, without a first space

    def differs_from_class(self) -> str:
        """A warning if transformers would give other ids, else ""."""
        return ""

    def check_round_trip(self, text: str, ids: list[int]) -> None:
        """Say once if `ids`, those of `text`, decode to another text."""
        self.unchecked -= 1
        if (decoded := self.decode(ids)) != text:
            same = len(os.path.commonprefix([decoded, text]))
            part = slice(max(0, same - 20), same + 40)
            self.unchecked = 0
            self.say(f"decoding does not give the text back: {text[part]!r} becomes {decoded[part]!r}")

    def hide(self, text: str) -> str:
        """`text`, a value of a row, so that `encode` takes no part of it for a special token.

        Raises UserError for a special token if --special-tokens-in-text refuses them, and for characters of
        the plane that hides them.
        """
        if plain_text.HIDDEN.search(text):
            raise UserError(
                "a text has characters of Unicode's private plane 16, which are used to mark tokens"
            )
        mode = self.config.special_tokens_in_text
        found = self.special and mode != "allow" and self.special.search(text)
        if not found:
            return text
        if mode == "refuse":
            raise UserError(f"special token {found[0]!r} in a text: see --special-tokens-in-text")
        if self.say and not self.texts_with_special:
            self.say(
                f"special token {found[0]!r} in {text[:80]!r}: such tokens in texts are encoded as plain text"
            )
        self.texts_with_special += 1
        return plain_text.hide(text, self.special)

    def as_it_stands(self, text: str) -> str:
        """`text`, a whole prompt or text of a row, whose special tokens are control tokens; counts those."""
        self.strings_with_special += bool(self.special and self.special.search(text))
        return text

    def hide_markers(self, markers: Sequence[str]) -> None:
        """Take the markers of a chat for special tokens from now on, where they can be told from text."""
        if self.markers >= set(markers):
            return
        self.markers |= set(markers)
        self.control |= {marker for marker in markers if marker.strip() and self.is_control(marker)}
        self.special, self.plain = plain_text.any_of(self.control), []

    def encode_hidden(self, text: str, continued: bool) -> list[int]:
        """Ids of a text with special tokens that `hide` has hidden, as if the tokenizer did not know them.

        As the tokenizer itself does, the text is cut at the special tokens that are meant as such.
        """
        parts = re.split(f"({self.special.pattern})", text)
        ids, before = [], ""
        for i, part in enumerate(parts):
            if i % 2 or not plain_text.HIDDEN.search(part):
                before += part
                continue
            ids += self.encode_part(before, ids, continued)
            is_first = not ids and not before
            plain = self.encode_plain(plain_text.reveal(part), is_first, continued)
            if found := self.control.intersection(map(self.decode, ([i] for i in plain))):
                raise UserError(
                    f"{min(found)!r} stands in a text, and this tokenizer has no other tokens for it: see "
                    "--special-tokens-in-text"
                )
            ids, before = ids + plain, ""
        return ids + self.encode_part(before, ids, continued)

    def encode_part(self, text: str, ids: list[int], continued: bool) -> list[int]:
        """Ids of the part of a text that follows `ids`: it begins with a special token if there are any."""
        return self.encode(text, continued or (self.is_continued and bool(ids))) if text else []

    def hide_in(self, value: Any) -> Any:
        """Messages, or other values of a row, with all texts in them hidden; the names of roles stay."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, list):
            return [self.hide_in(one) for one in value]
        if isinstance(value, dict):
            return {name: one if name == "role" else self.hide_in(one) for name, one in value.items()}
        return value

    def render(self, messages: list[dict], add_generation_prompt: bool = False, **variables: object) -> str:
        """A chat as text, through the chat template, which `variables` are passed to ("tools", others).

        Raises UserError if the model has no template, and if the template refuses the messages.
        """
        template, messages, variables = self.template_input(messages, variables)
        return chat_template.render(template, messages, add_generation_prompt, **variables)

    def marked_answers(self, messages: list[dict], **variables: object) -> list[tuple[int, int]] | None:
        """Spans of the responses in the rendered chat, in characters, by {% generation %} of the template.

        None for a template without such marks.
        """
        if not self.chat_template or not chat_template.marks_answers(self.template()):
            return None
        template, messages, variables = self.template_input(messages, variables)
        return chat_template.answer_spans(template, messages, **variables)

    def template_input(self, messages: list[dict], variables: dict) -> tuple[str, list[dict], dict]:
        """Template, messages and all variables of a chat. Raises UserError for what no token comes from."""
        variables = self.variables | variables
        template = self.template(with_tools=variables.get("tools") is not None)
        names = [name for name, value in variables.items() if value is not None]
        names += ["tool_calls"] * any(message.get("tool_calls") for message in messages)
        if unread := [name for name in names if not chat_template.reads(template, name)]:
            raise UserError(
                f"the chat template does not read {unread[0]!r}: take a model, or a chat_template.jinja, "
                "that does, or leave it out of the row"
            )
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
        """A line for the log about the date that the chat template writes, else ""."""
        if not self.chat_template:
            return ""
        if chat_template.reads_clock(template := self.template()):
            return "WARNING: the chat template writes the time in a way that is not pinned to the run"
        if template == self.chat_template:
            return ""
        return f"the chat template writes the date {self.day} (--template-date)"

    def follow(self, chat: MarkerChat) -> None:
        """Render chats by the template of `chat`, and end answers at its turn marker.

        The marker is one of `stop_ids` if it is a single token after an end of turn, else one of
        `stop_strings`.
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
        """Write chat_template.jinja with --chat-template-kwargs, and the end signal of a marker chat.

        The end signal goes into generation_config.json. A turn marker of several tokens is a stop string:
        `generate` of transformers then asks for `tokenizer=`, and other programs need it as their own stop
        string.
        """
        if self.chat_template and (self.chat or self.variables):
            template = chat_template.with_defaults(self.chat_template, self.variables)
            (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        if not self.chat:
            return
        path = directory / "generation_config.json"
        config = read_object(path, required=False)
        stops = generation_stop_ids(directory)
        config["eos_token_id"] = sorted(stops | self.stop_ids, key=lambda i: (i != self.eos_id, i))
        if self.stop_strings:
            config["stop_strings"] = list(self.stop_strings)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class HuggingFaceTokenizer(Base):
    """The tokenizer of a Hugging Face directory.

    Ids are those of its tokenizer.json, whatever the class that the config names would make of that file;
    transformers gives the names of special tokens and renders the chat template.

    Attributes: `eos_id`, `bos_id` (may be None), `pad_id`, `adds_bos` (the tokenizer by itself puts BOS in
    front), `vocab_size` (largest id + 1), `stop_ids` and `stop_strings` (what ends an answer), `chat`.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        path = directory / "tokenizer.json"
        backend = read_backend(path) if path.is_file() else None
        config, *_ = [read_object(directory / name, required=False) for name in (*JSON_FILES, "config.json")]
        self.hf = read_hugging_face(directory)
        if not self.hf.is_fast:
            raise UserError(
                f"{directory}: {type(self.hf).__name__} has no fast version: add a tokenizer.json"
            )
        self.backend = backend or self.hf.backend_tokenizer
        add_configured_tokens(self.backend, directory)
        eos_id = self.hf.eos_token and self.backend.token_to_id(self.hf.eos_token)
        if eos_id is None:
            raise UserError(
                f"{directory} names no end-of-text token: set eos_token in tokenizer_config.json, to a "
                "token of the vocabulary"
            )
        self.eos_id: int = eos_id
        self.bos_id: int | None = self.hf.bos_token and self.backend.token_to_id(self.hf.bos_token)
        pad_id = self.hf.pad_token and self.backend.token_to_id(self.hf.pad_token)
        self.pad_id: int = self.eos_id if pad_id is None else pad_id
        adds_bos = config.get("add_bos_token")
        if adds_bos not in (None, True, False):
            raise UserError(f"{directory}/tokenizer_config.json: add_bos_token must be true or false")
        if adds_bos is None:
            adds_bos = self.backend.encode("x").ids[0] == self.bos_id
        self.adds_bos: bool = self.bos_id is not None and bool(adds_bos)
        self.vocab_size: int = max(self.ids_by_token.values()) + 1
        self.stop_ids: set[int] = {self.eos_id} | generation_stop_ids(directory)
        self.chat_template = self.hf.chat_template
        if not isinstance(self.chat_template, str | dict | None):
            raise UserError(f"{directory}: the chat template must be text, not {shown(self.chat_template)}")
        self.no_template = (
            f"{directory} has no chat template: put a chat_template.jinja there, or use rows with "
            "'conversations' or with the fields of --prompt-template instead of 'messages'"
        )
        self.special_tokens = self.hf.special_tokens_map
        added = self.backend.get_added_tokens_decoder().values()
        self.control = frozenset(token.content for token in added if token.special)
        self.special = plain_text.any_of(self.control)
        self.plain: list[tokenizers.Tokenizer] = []  # without special tokens: as made for encode_plain
        adds_space = (self.backend.id_to_token(self.encode("a")[0]) or "").startswith(SPACE)
        drops_space = self.encode(" a") == self.encode("a")
        self.inner = without_dummy_prefix(self.backend) if adds_space or drops_space else None

    @property
    def ids_by_token(self) -> dict[str, int]:
        """The vocabulary: two tokenizers with the same one give the same ids to the same tokens."""
        return self.backend.get_vocab(with_added_tokens=True)

    def differs_from_class(self) -> str:
        """A warning if the class that transformers takes changes what tokenizer.json says, else ""."""
        own, theirs = (json.loads(t.to_str()) for t in (self.backend, self.hf.backend_tokenizer))
        changed = [part for part in ("normalizer", "pre_tokenizer", "decoder") if own[part] != theirs[part]]
        if not changed:
            return ""
        return (
            f"tokenizer.json of {self.directory} is used as it stands: {type(self.hf).__name__} of "
            f"transformers {transformers.__version__} changes its {', '.join(changed)}"
        )

    def encode(self, text: str, continued: bool = False) -> list[int]:
        """Token ids of `text`; a special token spelled out in it becomes that token, as chat templates need.

        `continued`: as `text` comes out after earlier text, without the space that Llama-2-like tokenizers
        put in front.
        """
        if plain_text.HIDDEN.search(text):
            return self.encode_hidden(text, continued)
        if continued and self.inner:
            return self.inner.encode(text, add_special_tokens=False).ids
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if self.unchecked:
            self.check_round_trip(text, ids)
        return ids

    def is_control(self, marker: str) -> bool:
        """True if `marker` is a token of its own, and there are others that spell it out."""
        number, text = self.backend.token_to_id(marker), f"x{marker}x"
        if number is None or number not in self.backend.encode(text).ids:
            return False
        plain = plain_text.without_tokens(self.backend, [marker])
        ids = plain.encode(text, add_special_tokens=False).ids
        return number not in ids and marker in plain.decode(ids, skip_special_tokens=False)

    def encode_plain(self, text: str, is_first: bool, continued: bool) -> list[int]:
        """Ids of a part of a text in which special tokens are none."""
        if not self.plain:
            kinds = (self.backend, self.inner, plain_text.without_first_prefix(self.backend))
            self.plain = [plain_text.without_tokens(kind, self.control) for kind in kinds if kind]
        kind = 0 if is_first and not continued else 1 if continued and self.inner else -1
        return self.plain[kind].encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens spelled out; an id beyond the vocabulary as <id 32000>."""
        text, start = "", 0
        for end in [*(i for i, number in enumerate(ids) if number >= self.vocab_size), len(ids)]:
            text += self.backend.decode(ids[start:end], skip_special_tokens=False)
            text += f"<id {ids[end]}>" if end < len(ids) else ""
            start = end + 1
        return text

    def follow(self, chat: MarkerChat) -> None:
        """As above; a chat_template.jinja of the directory that was written for `chat`, or edited, stays."""
        super().follow(chat)
        if marker_chat.read(self.directory) == chat and self.hf.chat_template:
            self.chat_template = self.hf.chat_template

    def save(self, directory: Path) -> None:
        """Copy the tokenizer's files as they are, so that other programs read just what they read before."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name in HUGGING_FACE_FILES:
            if (self.directory / name).is_file():
                shutil.copyfile(self.directory / name, Path(directory) / name)
        self.save_chat(Path(directory))


class SentencePieceTokenizer(Base):
    """A bare SentencePiece model (GPT-2B, Llama 2); methods and attributes as in HuggingFaceTokenizer."""

    adds_bos = False
    is_continued = True  # text behind a marker is inside the text

    def __init__(self, path: Path):
        self.path = path
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: not a SentencePiece model: {error}") from error
        self.model = ModelProto.FromString(self.sp.serialized_model_proto())
        self.inner = processor(inside(self.model))
        if self.sp.eos_id() < 0:
            raise UserError(
                f"{path}: the model has no end-of-text piece, which training needs to end answers"
            )
        self.eos_id: int = self.sp.eos_id()
        self.bos_id: int | None = self.sp.bos_id() if self.sp.bos_id() >= 0 else None
        self.pad_id: int = self.sp.pad_id() if self.sp.pad_id() >= 0 else self.eos_id
        self.vocab_size: int = self.sp.get_piece_size()
        self.stop_ids: set[int] = {self.eos_id} | generation_stop_ids(path.parent)
        self.special_tokens = {"bos_token": "" if self.bos_id is None else self.sp.id_to_piece(self.bos_id)}
        self.plain: list[sentencepiece.SentencePieceProcessor] = []  # without markers; first, inside
        self.no_template = (
            f"{path} has no chat template: instead of 'messages' use 'conversations' rows or rows with the "
            "fields of --prompt-template"
        )

    @property
    def ids_by_token(self) -> dict[str, int]:
        """The vocabulary, as above."""
        return {self.sp.id_to_piece(i): i for i in range(self.vocab_size)}

    def encode(self, text: str, continued: bool = False) -> list[int]:
        """Token ids of `text`; control pieces spelled out in it stay text. `continued`: as above."""
        if plain_text.HIDDEN.search(text):
            return self.encode_hidden(text, continued)
        if continued:
            return self.encode_inside(text, self.inner)
        ids = self.sp.encode(text)
        if self.unchecked:
            self.check_round_trip(text, ids)
        return ids

    def encode_inside(self, text: str, inner: sentencepiece.SentencePieceProcessor) -> list[int]:
        """Ids of a text behind other text."""
        normalized = self.sp.normalize(
            "x" + text
        )  # the model's own rules for spaces, as they act after a letter
        return inner.encode(normalized[normalized.index("x") + 1 :])

    def is_control(self, marker: str) -> bool:
        """As above."""
        if marker not in {piece.piece for piece in self.model.pieces if piece.type == USER_DEFINED}:
            return False
        plain = processor(plain_text.without_pieces(self.model, [marker]))
        return marker in plain.decode(plain.encode(f"x{marker}x"))

    def encode_plain(self, text: str, is_first: bool, continued: bool) -> list[int]:
        """As above."""
        if not self.plain:
            model = plain_text.without_pieces(self.model, self.control)
            self.plain = [processor(model), processor(inside(model))]
        first, inner = self.plain
        return first.encode(text) if is_first and not continued else self.encode_inside(text, inner)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, control pieces such as `</s>` spelled out; an id that has no piece as <id 32000>."""
        text, start = "", 0
        for end in range(len(ids) + 1):
            if end == len(ids) or ids[end] >= self.vocab_size or self.sp.is_control(ids[end]):
                model = self.inner if text else self.sp  # only the first run can carry the dummy prefix
                text += model.decode(ids[start:end])
                if end < len(ids):
                    known = ids[end] < self.vocab_size
                    text += self.sp.id_to_piece(ids[end]) if known else f"<id {ids[end]}>"
                start = end + 1
        return text

    def save(self, directory: Path) -> None:
        """Write the model, and its translation that transformers.AutoTokenizer loads (same ids)."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, Path(directory) / "tokenizer.model")
        sentencepiece_json.translate(self.model).save(str(Path(directory) / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.sp.id_to_piece(self.eos_id),
            "pad_token": self.sp.id_to_piece(self.pad_id),
            "unk_token": self.sp.id_to_piece(self.sp.unk_id()),
            "clean_up_tokenization_spaces": False,
        }
        if self.bos_id is not None:
            config["bos_token"] = self.sp.id_to_piece(self.bos_id)
        (Path(directory) / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2) + "\n", encoding="utf-8"
        )
        self.save_chat(Path(directory))


def processor(model: ModelProto) -> sentencepiece.SentencePieceProcessor:
    """Encoder of a SentencePiece model."""
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def inside(model: ModelProto) -> ModelProto:
    """The same SentencePiece model for text behind other text: no space is added in front, none removed."""
    changed = ModelProto()
    changed.CopyFrom(model)
    changed.normalizer_spec.add_dummy_prefix = False
    changed.normalizer_spec.remove_extra_whitespaces = False
    return changed


def without_dummy_prefix(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer for text from inside a sequence: at its start no space is added and none removed."""
    spec = json.loads(tokenizer.to_str())
    normalizer, pre_tokenizer = spec["normalizer"] or {}, spec["pre_tokenizer"] or {}
    steps = [
        {**step, "strip_left": False} if step["type"] == "Strip" else step
        for step in normalizer.get("normalizers", [normalizer] if normalizer else [])
        if step["type"] != "Prepend"
    ]
    spec["normalizer"] = {"type": "Sequence", "normalizers": steps}
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer] if pre_tokenizer else []):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
    return tokenizers.Tokenizer.from_str(json.dumps(spec))
