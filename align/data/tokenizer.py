"""Flags and loading of a model's tokenizer.

Two rules hold for every tokenizer. `encode` never adds a special token: the code that builds a sequence adds
BOS and EOS. And pad may be the same id as end of text (GPT-2B, SmolLM2), so padding is never found by
`ids == pad_id`.
"""

import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from align.data import marker_chat
from align.data.base_tokenizer import Tokenizer
from align.errors import UserError

CHECKED_TEXTS = 200  # the first texts of a run, whose ids must decode to them


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
        """Parse `chat_template_kwargs`. Raises UserError."""
        try:
            variables = json.loads(self.chat_template_kwargs or "{}")
        except ValueError as error:
            raise UserError(f"--chat-template-kwargs: not valid JSON: {error}") from error
        if not isinstance(variables, dict):
            raise UserError(f"--chat-template-kwargs must be a JSON object, not a {type(variables).__name__}")
        return variables

    def day(self, default: datetime.date) -> datetime.date:
        """Parse `template_date`. Raises UserError."""
        if not self.template_date:
            return default
        try:
            return datetime.date.fromisoformat(self.template_date)
        except ValueError as error:
            raise UserError(f"--template-date {self.template_date!r} must be a date YYYY-MM-DD") from error

    def __post_init__(self):
        self.variables()
        self.day(datetime.date.today())


def load_tokenizer(
    path: Path,
    say: Callable[[str], None] | None = None,
    config: TextConfig = TextConfig(),
    day: datetime.date | None = None,
) -> Tokenizer:
    """Load the tokenizer of a model directory or of a SentencePiece `.model` file; no code of it runs.

    It renders the marker chat of the directory's prompt_format.json. `say` logs the date that the chat
    template writes, ids that differ from transformers', the first of CHECKED_TEXTS texts that its ids do not
    decode to, and the first special token in a text; `day`: on which the run began, today by default. Raises
    UserError without a tokenizer.
    """
    from align.data.hf_tokenizer import HuggingFaceTokenizer  # here: transformers takes seconds to import
    from align.data.sentencepiece_tokenizer import SentencePieceTokenizer

    path = Path(path)
    if path.suffix == ".model" and path.is_file():
        tokenizer: Tokenizer = SentencePieceTokenizer(path)
    elif any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = HuggingFaceTokenizer(path)
    elif (path / "tokenizer.model").is_file():
        tokenizer = SentencePieceTokenizer(path / "tokenizer.model")
    else:
        rule = "name a directory with a tokenizer.json, or a SentencePiece .model file"
        raise UserError(f"{path} holds no tokenizer: {rule}")
    if chat := path.is_dir() and marker_chat.read(path):
        tokenizer.follow(chat)
    tokenizer.special_tokens_in_text, tokenizer.variables = config.special_tokens_in_text, config.variables()
    tokenizer.day = config.day(day or datetime.date.today())
    if isinstance(tokenizer.chat_template, dict) and tokenizer.variables:
        raise UserError(f"--chat-template-kwargs: {path} has several chat templates: leave one")
    tokenizer.check_variables(path, config.template_date)
    if say:
        for line in filter(None, (tokenizer.about_date(), tokenizer.differs_from_class())):
            say(line)
        tokenizer.say, tokenizer.unchecked = say, CHECKED_TEXTS
    return tokenizer
