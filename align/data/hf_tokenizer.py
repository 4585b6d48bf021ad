"""The tokenizer of a Hugging Face directory."""

import json
import shutil
from pathlib import Path

import tokenizers
import transformers

from align.data import marker_chat, plain_text
from align.data.base_tokenizer import Tokenizer, generation_stop_ids
from align.data.marker_chat import MarkerChat
from align.data.sentencepiece_json import SPACE
from align.data.tokenizer_files import JSON_FILES, add_configured_tokens, read_backend, read_hugging_face
from align.errors import UserError
from align.files import read_object, shown

HUGGING_FACE_FILES = (  # whatever of these a directory has makes up its tokenizer
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a Hugging Face directory.

    Ids are those of its tokenizer.json, whatever the class that the config names would make of that file;
    transformers gives the names of special tokens and renders the chat template.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        path = directory / "tokenizer.json"
        backend = read_backend(path) if path.is_file() else None
        config, *_ = [read_object(directory / name, required=False) for name in (*JSON_FILES, "config.json")]
        self.hf = read_hugging_face(directory)
        if not self.hf.is_fast:
            kind = type(self.hf).__name__
            raise UserError(f"{directory}: {kind} has no fast version: add a tokenizer.json")
        self.backend = backend or self.hf.backend_tokenizer
        add_configured_tokens(self.backend, directory)
        eos_id = self.hf.eos_token and self.backend.token_to_id(self.hf.eos_token)
        if eos_id is None:
            rule = "set eos_token in tokenizer_config.json, to a token of the vocabulary"
            raise UserError(f"{directory} names no end-of-text token: {rule}")
        self.eos_id = eos_id
        self.bos_id = self.hf.bos_token and self.backend.token_to_id(self.hf.bos_token)
        pad_id = self.hf.pad_token and self.backend.token_to_id(self.hf.pad_token)
        self.pad_id = self.eos_id if pad_id is None else pad_id
        adds_bos = config.get("add_bos_token")
        if adds_bos not in (None, True, False):
            raise UserError(f"{directory}/tokenizer_config.json: add_bos_token must be true or false")
        if adds_bos is None:
            adds_bos = self.backend.encode("x").ids[0] == self.bos_id
        self.adds_bos = self.bos_id is not None and bool(adds_bos)
        self.vocab_size = max(self.ids_by_token.values()) + 1
        self.stop_ids = {self.eos_id} | generation_stop_ids(directory)
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
        self.plain: list[tokenizers.Tokenizer] = []
        adds_space = (self.backend.id_to_token(self.encode("a")[0]) or "").startswith(SPACE)
        drops_space = self.encode(" a") == self.encode("a")
        self.inner = without_dummy_prefix(self.backend) if adds_space or drops_space else None

    @property
    def ids_by_token(self) -> dict[str, int]:
        """Vocabulary: {token: id}."""
        return self.backend.get_vocab(with_added_tokens=True)

    def differs_from_class(self) -> str:
        """A warning if transformers' class changes what tokenizer.json says, else ""."""
        spec, hf_spec = (json.loads(t.to_str()) for t in (self.backend, self.hf.backend_tokenizer))
        changed = [part for part in ("normalizer", "pre_tokenizer", "decoder") if spec[part] != hf_spec[part]]
        kind = f"{type(self.hf).__name__} of transformers {transformers.__version__}"
        used = f"tokenizer.json of {self.directory} is used as it stands"
        return f"{used}: {kind} changes its {', '.join(changed)}" if changed else ""

    def encode(self, text: str, continued: bool = False) -> list[int]:
        """Encode a text; a special token spelled out in it becomes that token, as chat templates need.

        `continued`: the text continues earlier text, so that Llama-2-like tokenizers put no space in front.
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
        """True if `marker` is a token of its own, and other tokens can spell it out."""
        number, text = self.backend.token_to_id(marker), f"x{marker}x"
        if number is None or number not in self.backend.encode(text).ids:
            return False
        plain = plain_text.without_tokens(self.backend, [marker])
        ids = plain.encode(text, add_special_tokens=False).ids
        return number not in ids and marker in plain.decode(ids, skip_special_tokens=False)

    def encode_plain(self, text: str, is_first: bool, continued: bool) -> list[int]:
        """Encode a part of a text as plain text, special tokens included."""
        if not self.plain:
            kinds = (self.backend, self.inner, plain_text.without_first_prefix(self.backend))
            self.plain = [plain_text.without_tokens(kind, self.control) for kind in kinds if kind]
        kind = 0 if is_first and not continued else 1 if continued and self.inner else -1
        return self.plain[kind].encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Decode ids, special tokens spelled out; an id beyond the vocabulary as <id 32000>."""
        text, start = "", 0
        for end in [*(i for i, number in enumerate(ids) if number >= self.vocab_size), len(ids)]:
            text += self.backend.decode(ids[start:end], skip_special_tokens=False)
            text += f"<id {ids[end]}>" if end < len(ids) else ""
            start = end + 1
        return text

    def follow(self, chat: MarkerChat) -> None:
        """As in Tokenizer; keeps a chat_template.jinja of the directory written for `chat`, or edited."""
        super().follow(chat)
        if marker_chat.read(self.directory) == chat and self.hf.chat_template:
            self.chat_template = self.hf.chat_template

    def save(self, directory: Path) -> None:
        """Copy the tokenizer's files unchanged, and write the chat template."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in HUGGING_FACE_FILES:
            if (self.directory / name).is_file():
                shutil.copyfile(self.directory / name, directory / name)
        self.save_chat(directory)


def without_dummy_prefix(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer for text inside a sequence: no space is added or removed at its start."""
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
