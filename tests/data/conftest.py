"""Tokenizers of Llama 2: a real SentencePiece model, and the same with a chat template."""

import shutil
from importlib.resources import files

import pytest

from align.data.hf_tokenizer import HuggingFaceTokenizer
from align.data.sentencepiece_tokenizer import SentencePieceTokenizer
from align.data.tokenizer import load_tokenizer

LLAMA_CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    """A real SentencePiece model, which puts a dummy prefix in front of every text."""
    directory = tmp_path_factory.mktemp("llama")
    shutil.copy(files("mistral_common") / "data" / "tokenizer.model.v1", directory / "tokenizer.model")
    return load_tokenizer(directory)


@pytest.fixture(scope="session")
def llama_chat(llama, tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    """The same as a Hugging Face directory, with a chat template like Llama 2's, which brings its own BOS."""
    directory = tmp_path_factory.mktemp("llama_chat")
    llama.save(directory)
    (directory / "tokenizer.model").unlink()
    (directory / "chat_template.jinja").write_text(LLAMA_CHAT)
    return load_tokenizer(directory)
