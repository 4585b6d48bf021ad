"""Raw data sets to the jsonl that training reads. Each is a file that you have; nothing is downloaded.

python prepare_data.py dolly --input databricks-dolly-15k.jsonl --output data/dolly
python prepare_data.py oasst --input 2023-04-12_oasst_all.trees.jsonl.gz --output data/oasst
python prepare_data.py gsm8k --input gsm8k_train.jsonl.gz --output data/gsm8k_train.jsonl
python prepare_data.py toy --output data/toy
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tyro

from align.data import read_jsonl, text_field
from align.toy import toy_rows

OASST_ROLES = {"prompter": "User", "assistant": "Assistant"}
OASST_LABELS = ("quality", "toxicity", "humor", "creativity")
OASST_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def main() -> None:
    """Run the subcommand named on the command line."""
    tyro.extras.subcommand_cli_from_dict({"dolly": dolly, "oasst": oasst, "gsm8k": gsm8k, "toy": toy})


def dolly(input: Path, output: Path, val_fraction: float = 0.05, seed: int = 1234) -> None:
    """databricks-dolly-15k to {"input", "output", "category"}: instruction and context in random order.

    Args:
        input: databricks-dolly-15k.jsonl
        output: directory for train.jsonl and val.jsonl
        val_fraction: share of the rows that goes to val.jsonl
        seed: of the order of rows and of the order inside a row
    """
    rng = random.Random(seed)
    rows = [convert(where, row, dolly_row, rng) for where, row in read_jsonl(input)]
    rng.shuffle(rows)
    write_split(output, *split(rows, val_fraction))


def dolly_row(row: dict, rng: random.Random) -> dict:
    """One row; instruction and context are joined by a blank line, an empty context is left out."""
    instruction, context = text_field(row, "instruction"), text_field(row, "context").strip()
    parts = [instruction, context] if context else [instruction]
    rng.shuffle(parts)
    return {
        "input": "\n\n".join(parts),
        "output": text_field(row, "response"),
        "category": text_field(row, "category"),
    }


def oasst(input: Path, output: Path, val_fraction: float = 0.05, seed: int = 10) -> None:
    """OpenAssistant trees to {"system", "conversations", "mask", "type"}: every thread, with its labels.

    Args:
        input: 2023-04-12_oasst_all.trees.jsonl.gz
        output: directory for train.jsonl and val.jsonl
        val_fraction: share of the trees whose threads go to val.jsonl
        seed: of the order of trees
    """
    trees = [convert(where, row, oasst_rows) for where, row in read_jsonl(input)]
    random.Random(seed).shuffle(trees)
    train, val = split(trees, val_fraction)
    write_split(output, [row for tree in train for row in tree], [row for tree in val for row in tree])


def oasst_rows(tree: dict) -> list[dict]:
    """The threads of one tree from root to leaf, without those of a single message."""
    root = tree.get("prompt")
    if not isinstance(root, dict):
        raise ValueError("field 'prompt' must be the object at the root of a message tree")
    return [
        {"system": OASST_SYSTEM, "mask": "User", "type": "VALUE_TO_TEXT", "conversations": thread}
        for thread in oasst_threads(root)
        if len(thread) > 1
    ]


def oasst_threads(message: dict) -> Iterator[list[dict]]:
    """All threads from `message` down to a leaf, as lists of {"from", "value", "label"}."""
    role = text_field(message, "role")
    if role not in OASST_ROLES:
        raise ValueError(f"role {role!r} is not one of {', '.join(OASST_ROLES)}")
    label = oasst_label(message.get("labels") or {}) if role == "assistant" else None
    turn = {"from": OASST_ROLES[role], "value": text_field(message, "text"), "label": label}
    replies = message.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise ValueError("field 'replies' must be a list of messages")
    for reply in replies:
        for thread in oasst_threads(reply):
            yield [turn, *thread]
    if not replies:
        yield [turn]


def oasst_label(labels: dict) -> str | None:
    """Mean labels from 0..1 to "quality:4,toxicity:0,..." on a scale of 0..4; None if a message has none."""
    scaled = []
    for name in OASST_LABELS:
        if name in labels:
            value = labels[name].get("value") if isinstance(labels[name], dict) else None
            if not isinstance(value, int | float):
                raise ValueError(f"label {name!r} must hold a number in 'value'")
            scaled.append(f"{name}:{round(4 * value)}")
    return ",".join(scaled) or None


def gsm8k(input: Path, output: Path, limit: int | None = None) -> None:
    """GSM8K {"question", "answer"} to {"messages"}: the question by the user, the answer by the assistant.

    Args:
        input: train.jsonl or test.jsonl of grade-school-math, plain or .gz
        output: the jsonl file to write
        limit: only so many rows, from the start of the file
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit} must be at least 1")
    rows = [convert(where, row, gsm8k_row) for where, row in read_jsonl(input)[:limit]]
    write_jsonl(output, rows)


def gsm8k_row(row: dict) -> dict:
    """One row as a chat of two messages."""
    question, answer = text_field(row, "question"), text_field(row, "answer")
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def toy(
    output: Path, train_rows: int = 4000, val_rows: int = 200, mistakes: float = 0.4, seed: int = 1234
) -> None:
    """The sorting task of the demo as {"messages"} rows; no prompt of val.jsonl is in train.jsonl.

    Args:
        output: directory for train.jsonl and val.jsonl
        train_rows: rows of train.jsonl
        val_rows: rows of val.jsonl, all answered right
        mistakes: share of the answers in train.jsonl that have two neighbours swapped
        seed: of the prompts and the mistakes
    """
    write_split(output, *toy_rows(train_rows, val_rows, mistakes, seed))


def convert(where: str, row: dict, convert_row: Callable, *args: object) -> Any:
    """`convert_row(row, *args)`; what is wrong with the row is reported with its place ("file:line")."""
    try:
        return convert_row(row, *args)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def split(items: list, val_fraction: float) -> tuple[list, list]:
    """Items to train on and, from the end, to validate on. Raises ValueError if one part would be empty."""
    num_train = int(len(items) * (1 - val_fraction))
    if not 0 < num_train < len(items):
        raise ValueError(
            f"--val-fraction {val_fraction} of {len(items)} must leave some to train and to validate on"
        )
    return items[:num_train], items[num_train:]


def write_split(directory: Path, train: list[dict], val: list[dict]) -> None:
    """Write train.jsonl and val.jsonl. Raises ValueError if one would be empty."""
    if not train or not val:
        raise ValueError(
            f"{directory}: {len(train)} rows to train on and {len(val)} to validate on: both need some"
        )
    write_jsonl(directory / "train.jsonl", train)
    write_jsonl(directory / "val.jsonl", val)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write one object a line and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
