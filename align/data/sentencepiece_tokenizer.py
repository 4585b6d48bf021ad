"""The tokenizer of a SentencePiece `.model` file."""

import shutil
from pathlib import Path

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from align.data import plain_text, sentencepiece_json
from align.data.base_tokenizer import Tokenizer, generation_stop_ids
from align.data.jsonl import write_object
from align.errors import UserError

USER_DEFINED = ModelProto.SentencePiece.USER_DEFINED


class SentencePieceTokenizer(Tokenizer):
    """A bare SentencePiece model (GPT-2B, Llama 2)."""

    adds_bos = False
    is_continued = True  # text after a marker is inside the text

    def __init__(self, path: Path):
        self.path = path
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: not a SentencePiece model: {error}") from error
        self.model = ModelProto.FromString(self.sp.serialized_model_proto())
        self.inner = processor(inside(self.model))
        if self.sp.eos_id() < 0:
            raise UserError(f"{path}: the model has no end-of-text piece, with which training ends responses")
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
        """Vocabulary: {token: id}."""
        return {self.sp.id_to_piece(i): i for i in range(self.vocab_size)}

    def encode(self, text: str, continued: bool = False) -> list[int]:
        """Encode a text; control pieces spelled out in it stay text. `continued`: it continues other text."""
        if plain_text.HIDDEN.search(text):
            return self.encode_hidden(text, continued)
        if continued:
            return self.encode_inside(text, self.inner)
        ids = self.sp.encode(text)
        if self.unchecked:
            self.check_round_trip(text, ids)
        return ids

    def encode_inside(self, text: str, inner: sentencepiece.SentencePieceProcessor) -> list[int]:
        """Encode a text that follows other text."""
        # the model's own rules for spaces, as they act after a letter
        normalized = self.sp.normalize("x" + text)
        return inner.encode(normalized[normalized.index("x") + 1 :])

    def is_control(self, marker: str) -> bool:
        """True if `marker` is a user-defined piece, and other pieces can spell it out."""
        if marker not in {piece.piece for piece in self.model.pieces if piece.type == USER_DEFINED}:
            return False
        plain = processor(plain_text.without_pieces(self.model, [marker]))
        return marker in plain.decode(plain.encode(f"x{marker}x"))

    def encode_plain(self, text: str, is_first: bool, continued: bool) -> list[int]:
        """Encode a part of a text as plain text, markers included."""
        if not self.plain:
            model = plain_text.without_pieces(self.model, self.control)
            self.plain = [processor(model), processor(inside(model))]
        first, inner = self.plain
        return first.encode(text) if is_first and not continued else self.encode_inside(text, inner)

    def decode(self, ids: list[int]) -> str:
        """Decode ids, control pieces such as `</s>` spelled out; an id without a piece as <id 32000>."""
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
        """Write the model, and its translation for transformers.AutoTokenizer (same ids)."""
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, directory / "tokenizer.model")
        sentencepiece_json.translate(self.model).save(str(directory / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.sp.id_to_piece(self.eos_id),
            "pad_token": self.sp.id_to_piece(self.pad_id),
            "unk_token": self.sp.id_to_piece(self.sp.unk_id()),
            "clean_up_tokenization_spaces": False,
        }
        if self.bos_id is not None:
            config["bos_token"] = self.sp.id_to_piece(self.bos_id)
        write_object(directory / "tokenizer_config.json", config)
        self.save_chat(directory)


def processor(model: ModelProto) -> sentencepiece.SentencePieceProcessor:
    """Encoder of a SentencePiece model."""
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def inside(model: ModelProto) -> ModelProto:
    """A SentencePiece model for text that follows other text: no space is added in front, none removed."""
    changed = ModelProto()
    changed.CopyFrom(model)
    changed.normalizer_spec.add_dummy_prefix = False
    changed.normalizer_spec.remove_extra_whitespaces = False
    return changed
