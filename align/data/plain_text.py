"""Special tokens in the texts of rows: hidden from the tokenizer, encoded as plain text.

`hide` moves their characters to Unicode's private plane 16, so that neither a chat template nor the tokenizer
reads them as control tokens. The encoder of such text moves them back and has no special tokens.
"""

import json
import re
from collections.abc import Collection

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto

HIDDEN = re.compile("[\U00100000-\U0010fffd]")
HIDE = 0x100000  # added to a character's code point
NEVER = "\U0010ffff"  # in no text
UNUSED = ModelProto.SentencePiece.UNUSED


def hide(text: str, special: re.Pattern) -> str:
    """Hide the parts of a text that `special` matches."""
    return special.sub(lambda match: "".join(chr(ord(c) + HIDE) for c in match[0]), text)


def reveal(text: str) -> str:
    """The inverse of `hide`."""
    return HIDDEN.sub(lambda match: chr(ord(match[0]) - HIDE), text)


def any_of(names: Collection[str]) -> re.Pattern | None:
    """A pattern that matches the longest of some names; None without names."""
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    return re.compile("|".join(longest_first)) if names else None


def without_tokens(tokenizer: tokenizers.Tokenizer, names: Collection[str]) -> tokenizers.Tokenizer:
    """A tokenizer without some of its added tokens: it encodes their names as other tokens."""
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in names]
    model = spec["model"]  # may have them as pieces of its own, as translations of SentencePiece models do
    if model["type"] == "Unigram":
        model["vocab"] = [[NEVER + piece if piece in names else piece, x] for piece, x in model["vocab"]]
    elif model.get("ignore_merges"):
        lone = set(names) - {"".join(merge) for merge in model["merges"]}
        model["vocab"] = {NEVER + piece if piece in lone else piece: i for piece, i in model["vocab"].items()}
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def without_first_prefix(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer for text after a special token, where Metaspace's scheme "first" adds no space."""
    text = json.dumps(json.loads(tokenizer.to_str()))
    never = text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    return tokenizers.Tokenizer.from_str(never)


def without_pieces(model: ModelProto, names: Collection[str]) -> ModelProto:
    """A SentencePiece model without some of its pieces."""
    changed = ModelProto()
    changed.CopyFrom(model)
    for piece in changed.pieces:
        if piece.piece in names:
            piece.type = UNUSED
    return changed
