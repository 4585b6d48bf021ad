"""Tokenizers behind one small surface: Hugging Face directories and SentencePiece `.model` files.

Two rules hold for both. `encode` never adds a special token: whoever builds a sequence puts BOS and EOS where
they belong. And pad may be the same id as end of text (GPT-2B, SmolLM2): no caller may find padding by
`ids == pad_id`.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import sentencepiece
import tokenizers
import transformers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from align import marker_chat, sentencepiece_json
from align.config_fields import JSON_FILES, read_object, shown
from align.marker_chat import MarkerChat
from align.sentencepiece_json import SPACE

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
HIDDEN = re.compile("[\U00100000-\U0010fffd]")  # characters of special tokens that are text: ord - HIDE
HIDE = 0x100000  # private use, plane 16
CHECKED_TEXTS = 200  # of a run's first ones


@dataclass(frozen=True)
class TextConfig:
    """What chats and the texts in them become."""

    special_tokens_in_text: Literal["split", "refuse", "allow"] = "split"
    """special tokens spelled out in a message, or in a value of --prompt-template: encode them as the plain
    text that they are (split), end with an error (refuse), or take them for control tokens (allow)"""
    chat_template_kwargs: str = ""
    """variables of the chat template for all rows, a JSON object such as '{"enable_thinking": false}'; a
    row's own "chat_template_kwargs" win"""

    def variables(self) -> dict:
        """`chat_template_kwargs`, read. Raises ValueError."""
        try:
            found = json.loads(self.chat_template_kwargs or "{}")
        except ValueError as error:
            raise ValueError(f"--chat-template-kwargs: not valid JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"--chat-template-kwargs must be a JSON object, not a {type(found).__name__}")
        return found

    def __post_init__(self):
        self.variables()


def load(
    path: Path, say: Callable[[str], None] | None = None, config: TextConfig = TextConfig()
) -> "HuggingFaceTokenizer | SentencePieceTokenizer":
    """The tokenizer of a model directory or of a SentencePiece `.model` file; nothing is downloaded or run.

    It follows the marker chat that the directory's prompt_format.json names. `say` is told if transformers
    would give other ids, if one of the first CHECKED_TEXTS texts does not come back from its ids, and of the
    first special token that stands in a text. Raises ValueError if there is no tokenizer at `path`.
    """
    path = Path(path)
    if path.suffix == ".model" and path.is_file():
        tokenizer = SentencePieceTokenizer(path)
    elif any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = HuggingFaceTokenizer(path)
    elif (path / "tokenizer.model").is_file():
        tokenizer = SentencePieceTokenizer(path / "tokenizer.model")
    else:
        raise ValueError(
            f"{path} holds no tokenizer: name a directory with a tokenizer.json, or a SentencePiece .model "
            "file"
        )
    if chat := path.is_dir() and marker_chat.read(path):
        tokenizer.follow(chat)
    tokenizer.config, tokenizer.variables = config, config.variables()
    if say:
        if warning := tokenizer.differs_from_class():
            say(warning)
        tokenizer.say, tokenizer.unchecked = say, CHECKED_TEXTS
    return tokenizer


class Base:
    """The part that both tokenizers share: the check that ids decode to their text, and marker chats."""

    say: Callable[[str], None] | None = None
    unchecked = 0  # texts that are still to be checked
    config = TextConfig()
    variables: dict = {}
    special: re.Pattern | None = None  # special tokens that `encode` would find in a text
    texts_with_special = 0  # that `hide` has seen
    chat: MarkerChat | None = None
    chat_template: str | None = None
    stop_strings: tuple[str, ...] = ()

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

        Their characters are moved to a private plane, as many as there were. Raises ValueError for a special
        token if --special-tokens-in-text refuses them, and for characters of that plane.
        """
        if HIDDEN.search(text):
            raise ValueError(
                "a text has characters of Unicode's private plane 16, which are used to mark tokens"
            )
        mode = self.config.special_tokens_in_text
        found = self.special and mode != "allow" and self.special.search(text)
        if not found:
            return text
        if mode == "refuse":
            raise ValueError(f"special token {found[0]!r} in a text: see --special-tokens-in-text")
        if self.say and not self.texts_with_special:
            self.say(
                f"special token {found[0]!r} in {text[:80]!r}: such tokens in texts are encoded as plain text"
            )
        self.texts_with_special += 1
        return self.special.sub(lambda match: "".join(chr(ord(c) + HIDE) for c in match[0]), text)

    def hide_in(self, value: Any) -> Any:
        """Messages, or other values of a row, with all texts in them hidden; the names of roles stay."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, list):
            return [self.hide_in(one) for one in value]
        if isinstance(value, dict):
            return {name: one if name == "role" else self.hide_in(one) for name, one in value.items()}
        return value

    def marked_answers(self, messages: list[dict], **variables: object) -> list[tuple[int, int]] | None:
        """None: the template of a marker chat marks no answers."""

    def check_template_reads(self, messages: list[dict], variables: dict) -> None:
        """Raises ValueError for a variable, or for tool calls, that the chat template does not mention."""
        names = [name for name, value in variables.items() if value is not None]
        names += ["tool_calls"] * any(message.get("tool_calls") for message in messages)
        if unread := [name for name in names if not re.search(rf"\b{re.escape(name)}\b", self.chat_template)]:
            raise ValueError(f"the chat template does not read {unread[0]!r}: leave it out of the row")

    def follow(self, chat: MarkerChat) -> None:
        """Render chats by the template of `chat`, and end answers at its turn marker.

        The marker is one of `stop_ids` if it is a single token after an end of turn, else one of
        `stop_strings`.
        """
        self.chat, self.chat_template = chat, chat.template()
        marker = self.encode(chat.turn_start, continued=True)
        joined = self.encode(chat.end_of_turn + chat.turn_start, continued=True)
        if len(marker) == 1 and joined[-1:] == marker:
            self.stop_ids = self.stop_ids | set(marker)
        else:
            self.stop_strings = (chat.turn_start,)

    def save_chat(self, directory: Path) -> None:
        """Write chat_template.jinja and the end signal in generation_config.json, if there is a marker chat.

        A turn marker of several tokens is a stop string: `generate` of transformers then asks for
        `tokenizer=`, and other programs need it as their own stop string.
        """
        if not self.chat:
            return
        (directory / "chat_template.jinja").write_text(self.chat_template)
        path = directory / "generation_config.json"
        config = read_object(path, required=False)
        stops = generation_stop_ids(directory)
        config["eos_token_id"] = sorted(stops | self.stop_ids, key=lambda i: (i != self.eos_id, i))
        if self.stop_strings:
            config["stop_strings"] = list(self.stop_strings)
        path.write_text(json.dumps(config, indent=2) + "\n")


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
            raise ValueError(
                f"{directory}: {type(self.hf).__name__} has no fast version: add a tokenizer.json"
            )
        self.backend = backend or self.hf.backend_tokenizer
        add_configured_tokens(self.backend, directory)
        eos_id = self.hf.eos_token and self.backend.token_to_id(self.hf.eos_token)
        if eos_id is None:
            raise ValueError(
                f"{directory} names no end-of-text token: set eos_token in tokenizer_config.json, to a "
                "token of the vocabulary"
            )
        self.eos_id: int = eos_id
        self.bos_id: int | None = self.hf.bos_token and self.backend.token_to_id(self.hf.bos_token)
        pad_id = self.hf.pad_token and self.backend.token_to_id(self.hf.pad_token)
        self.pad_id: int = self.eos_id if pad_id is None else pad_id
        adds_bos = config.get("add_bos_token")
        if adds_bos is None:
            adds_bos = self.backend.encode("x").ids[0] == self.bos_id
        self.adds_bos: bool = self.bos_id is not None and bool(adds_bos)
        self.vocab_size: int = max(self.ids_by_token.values()) + 1
        self.stop_ids: set[int] = {self.eos_id} | generation_stop_ids(directory)
        self.chat_template = self.hf.chat_template
        control = [
            token.content for token in self.backend.get_added_tokens_decoder().values() if token.special
        ]
        longest_first = sorted(map(re.escape, control), key=len, reverse=True)
        self.special = re.compile("|".join(longest_first)) if control else None
        self.plain: list[tokenizers.Tokenizer] = []  # without special tokens: as made for encode_hidden
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
        if HIDDEN.search(text):
            return self.encode_hidden(text, continued)
        if continued and self.inner:
            return self.inner.encode(text, add_special_tokens=False).ids
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if self.unchecked:
            self.check_round_trip(text, ids)
        return ids

    def encode_hidden(self, text: str, continued: bool) -> list[int]:
        """Ids of a text with special tokens that `hide` has hidden, as if the tokenizer did not know them.

        As the tokenizer itself does, the text is cut at the special tokens that are meant as such.
        """
        if not self.plain:
            self.plain = [
                without_special_tokens(one)
                for one in (self.backend, self.inner, without_first_prefix(self.backend))
                if one
            ]
        parts = re.split(f"({self.special.pattern})", text)
        ids, waiting = [], ""
        for i, part in enumerate(parts):
            if i % 2 or not HIDDEN.search(part):
                waiting += part
                continue
            ids += self.encode(waiting, continued) if waiting else []
            first = not ids and not waiting
            plain = self.plain[0 if first and not continued else 1 if continued and self.inner else -1]
            shown = HIDDEN.sub(lambda match: chr(ord(match[0]) - HIDE), part)
            ids += plain.encode(shown, add_special_tokens=False).ids
            waiting, continued = "", continued and not ids
        return ids + (self.encode(waiting) if waiting else [])

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
        self.hf.chat_template = self.chat_template

    def render(self, messages: list[dict], add_generation_prompt: bool = False, **variables: object) -> str:
        """A chat as text, through the chat template, which `variables` are passed to ("tools", others).

        Raises ValueError if the model has no template, and if the template refuses the messages.
        """
        if not self.chat_template:
            raise ValueError(
                f"{self.directory} has no chat template: put a chat_template.jinja there, or use rows with "
                "'conversations' or with the fields of --prompt-template instead of 'messages'"
            )
        variables = self.variables | variables
        self.check_template_reads(messages, variables)
        messages, variables = self.hide_in(messages), self.hide_in(variables)
        try:
            return self.hf.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    def marked_answers(self, messages: list[dict], **variables: object) -> list[tuple[int, int]] | None:
        """Where the answers are in the rendered chat, in characters, by {% generation %} of the template.

        None for a template without such marks.
        """
        if not re.search(r"{%-?\s*generation\b", self.chat_template or ""):
            return None
        _, [spans] = render_jinja_template(
            [self.hide_in(messages)],
            chat_template=self.chat_template,
            return_assistant_tokens_mask=True,
            **self.hf.special_tokens_map | self.hide_in(self.variables | variables),
        )
        return spans

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

    def __init__(self, path: Path):
        self.path = path
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path}: not a SentencePiece model: {error}") from error
        inner = ModelProto.FromString(self.sp.serialized_model_proto())  # for text from inside a sequence
        inner.normalizer_spec.add_dummy_prefix = False
        inner.normalizer_spec.remove_extra_whitespaces = False
        self.inner = sentencepiece.SentencePieceProcessor(model_proto=inner.SerializeToString())
        if self.sp.eos_id() < 0:
            raise ValueError(
                f"{path}: the model has no end-of-text piece, which training needs to end answers"
            )
        self.eos_id: int = self.sp.eos_id()
        self.bos_id: int | None = self.sp.bos_id() if self.sp.bos_id() >= 0 else None
        self.pad_id: int = self.sp.pad_id() if self.sp.pad_id() >= 0 else self.eos_id
        self.vocab_size: int = self.sp.get_piece_size()
        self.stop_ids: set[int] = {self.eos_id} | generation_stop_ids(path.parent)

    @property
    def ids_by_token(self) -> dict[str, int]:
        """The vocabulary, as above."""
        return {self.sp.id_to_piece(i): i for i in range(self.vocab_size)}

    def encode(self, text: str, continued: bool = False) -> list[int]:
        """Token ids of `text`; control pieces spelled out in it stay text. `continued`: as above."""
        if not continued:
            ids = self.sp.encode(text)
            if self.unchecked:
                self.check_round_trip(text, ids)
            return ids
        # the model's own rules for spaces, as they act after a letter
        normalized = self.sp.normalize("x" + text)
        return self.inner.encode(normalized[normalized.index("x") + 1 :])

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

    def render(self, messages: list[dict], add_generation_prompt: bool = False, **variables: object) -> str:
        """A chat as text in the marker format. Raises ValueError without one: the model has no template."""
        if not self.chat_template:
            raise ValueError(
                f"{self.path} has no chat template: instead of 'messages' use 'conversations' rows or rows "
                "with the fields of --prompt-template"
            )
        variables = self.variables | variables
        self.check_template_reads(messages, variables)
        bos = self.sp.id_to_piece(self.bos_id) if self.bos_id is not None else ""
        try:
            [text], _ = render_jinja_template(
                [messages],
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                bos_token=bos,
                **variables,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        return text

    def save(self, directory: Path) -> None:
        """Write the model, and its translation that transformers.AutoTokenizer loads (same ids)."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, Path(directory) / "tokenizer.model")
        proto = ModelProto.FromString(self.sp.serialized_model_proto())
        sentencepiece_json.translate(proto).save(str(Path(directory) / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.sp.id_to_piece(self.eos_id),
            "pad_token": self.sp.id_to_piece(self.pad_id),
            "unk_token": self.sp.id_to_piece(self.sp.unk_id()),
            "clean_up_tokenization_spaces": False,
        }
        if self.bos_id is not None:
            config["bos_token"] = self.sp.id_to_piece(self.bos_id)
        (Path(directory) / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        self.save_chat(Path(directory))


def generation_stop_ids(directory: Path) -> set[int]:
    """What transformers stops at: `eos_token_id`, one or several, of generation_config.json or config.json.

    The second is read where the first is missing or names none; empty if both name none.
    """
    for path in (directory / "generation_config.json", directory / "config.json"):
        stop = read_object(path, required=False).get("eos_token_id")
        if stop is None:
            continue
        ids = stop if isinstance(stop, list) else [stop]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"{path}: eos_token_id = {shown(stop)} must be a token id, or a list of them")
        return set(ids)
    return set()


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer that a tokenizer.json describes, without its limit of length and its padding."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the class of all errors of tokenizers
        raise ValueError(f"{path}: no tokenizer can be made of it: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def read_hugging_face(directory: Path) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer that transformers makes of a directory."""
    try:
        return AutoTokenizer.from_pretrained(
            directory, use_fast=True, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{directory}: transformers cannot load its tokenizer: {error}") from error


def add_configured_tokens(backend: tokenizers.Tokenizer, directory: Path) -> None:
    """Add the tokens of tokenizer_config.json and added_tokens.json that tokenizer.json lacks.

    Raises ValueError for one that would get another id than the one it is given there.
    """
    config, added = (
        read_object(directory / name, required=False)
        for name in ("tokenizer_config.json", "added_tokens.json")
    )
    listed = {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    listed |= {i: {"content": token} for token, i in added.items() if i not in listed}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    for i, token in sorted(listed.items()):
        if vocabulary.get(token["content"]) == i:
            continue
        fields = {name: value for name, value in token.items() if name not in ("content", "__type")}
        backend.add_tokens([AddedToken(token["content"], **fields)])
        if backend.token_to_id(token["content"]) != i:
            raise ValueError(
                f"{directory}: token {token['content']!r} has the id {i} in tokenizer_config.json, and "
                f"{backend.token_to_id(token['content'])} in tokenizer.json"
            )


def save_pad_token(directory: Path) -> None:
    """Give the reward model in a directory a pad token that no text ends with, in all its files.

    transformers reads the score at the last token that is not padding, found by its id. Were that id also the
    end of a text (SmolLM2, GPT-2B), the score would be read one token early. Without a token to spare there
    is no pad token at all, and transformers refuses batches that would need one.
    """
    hf = read_hugging_face(directory)
    ends = {hf.eos_token_id, hf.bos_token_id} | generation_stop_ids(directory)
    special = [i for i, token in sorted(hf.added_tokens_decoder.items()) if token.special]
    spare = [i for i in (hf.pad_token_id, hf.unk_token_id, *special) if i not in {None, *ends}]
    pad_id = spare[0] if spare else None
    config = read_object(directory / "config.json") | {"pad_token_id": pad_id}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (directory / name).is_file():
            fields = read_object(directory / name)
            fields["pad_token"] = None if pad_id is None else hf.convert_ids_to_tokens(pad_id)
            (directory / name).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


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


def without_special_tokens(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer for text in which special tokens are no tokens."""
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["special"]]
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def without_first_prefix(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer for text behind a special token, where Metaspace's scheme "first" adds no space."""
    text = json.dumps(json.loads(tokenizer.to_str()))
    return tokenizers.Tokenizer.from_str(
        text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    )
