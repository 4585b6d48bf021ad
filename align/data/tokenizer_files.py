"""The files of a tokenizer's directory: reading, checks, and the changes of an export."""

import json
from pathlib import Path

import tokenizers
import transformers
from tokenizers import AddedToken
from transformers import AutoTokenizer

from align.data.base_tokenizer import generation_stop_ids
from align.data.jsonl import write_object
from align.errors import UserError
from align.files import read_object

JSON_FILES = (  # read by transformers, which refuses damaged ones with errors of its own
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"),
)


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """Load a tokenizer.json without its truncation and padding."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the class of all errors of tokenizers
        raise UserError(f"{path}: no tokenizer can be made of it: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def read_hugging_face(directory: Path) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer of a directory by transformers."""
    options = {"use_fast": True, "local_files_only": True, "trust_remote_code": False}
    try:
        return AutoTokenizer.from_pretrained(directory, **options)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{directory}: transformers cannot load its tokenizer: {error}") from error


def add_configured_tokens(backend: tokenizers.Tokenizer, directory: Path) -> None:
    """Add tokens of tokenizer_config.json and added_tokens.json; UserError if an id differs between files."""
    names = ("tokenizer_config.json", "added_tokens.json")
    config, added = (read_object(directory / name, required=False) for name in names)
    listed = {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    listed |= {i: {"content": token} for token, i in added.items() if i not in listed}
    for i, token in listed.items():
        if not isinstance(token.get("content"), str):
            raise UserError(f"{directory}/tokenizer_config.json: added token {i} has no string as content")
    vocabulary = backend.get_vocab(with_added_tokens=True)
    for i, token in sorted(listed.items()):
        if vocabulary.get(token["content"]) == i:
            continue
        fields = {name: value for name, value in token.items() if name not in ("content", "__type")}
        backend.add_tokens([AddedToken(token["content"], **fields)])
        if (other := backend.token_to_id(token["content"])) != i:
            ids = f"the id {i} in tokenizer_config.json, and {other} in tokenizer.json"
            raise UserError(f"{directory}: token {token['content']!r} has {ids}")


def save_pad_token(directory: Path) -> None:
    """Set a pad token that ends no text, in all files of a reward model's directory.

    transformers reads the score at the last token whose id is not the pad id. If that id also ends a text
    (SmolLM2, GPT-2B), the score is read one token early. Without a spare token the pad token is removed, and
    transformers refuses batches that need one.
    """
    hf = read_hugging_face(directory)
    ends = {hf.eos_token_id, hf.bos_token_id} | generation_stop_ids(directory)
    special = [i for i, token in sorted(hf.added_tokens_decoder.items()) if token.special]
    spare = [i for i in (hf.pad_token_id, hf.unk_token_id, *special) if i not in {None, *ends}]
    pad_id = spare[0] if spare else None
    config = read_object(directory / "config.json") | {"pad_token_id": pad_id}
    write_object(directory / "config.json", config)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (directory / name).is_file():
            fields = read_object(directory / name)
            fields["pad_token"] = None if pad_id is None else hf.convert_ids_to_tokens(pad_id)
            text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
            (directory / name).write_text(text, encoding="utf-8")
