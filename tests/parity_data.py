"""The rows that parity and invariance tests train on."""

import numpy as np

from align.packing import Example

LR, STEPS, VOCAB = 1e-3, 3, 131


def examples(step: int, rows: int = 6) -> list[Example]:
    """Rows of random tokens of different lengths, with a random prompt each that is not trained."""
    random = np.random.default_rng(step)
    made = []
    for _ in range(rows):
        length = int(random.integers(5, 50))
        prompt = int(random.integers(1, length - 1))
        ids = random.integers(0, VOCAB, length, dtype=np.int32)
        made.append(Example(ids, np.arange(length) >= prompt))
    return made
