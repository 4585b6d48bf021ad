"""Sentences to train tokenizers on, and tokenizers that are none."""

from collections.abc import Collection

SENTENCES = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "How many clips did Natalia sell altogether in April and May?",
    "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting.",
    "The quick brown fox jumps over the lazy dog while the other foxes look on and wonder.",
]


class Letters:
    """A tokenizer in which every token is one character: id i is chr(offset + i).

    stop_ids: tokens that end a response.
    """

    stop_strings, chat = (), None

    def __init__(self, vocab_size: int = 131, stop_ids: Collection[int] = (2,), offset: int = 0x100):
        self.vocab_size, self.stop_ids, self.offset = vocab_size, set(stop_ids), offset

    def encode(self, text: str, continued: bool = False) -> list[int]:
        return [ord(character) - self.offset for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(self.offset + i) for i in ids)
