"""Shared by the benchmarks on pairs: the rows, their tokens for TRL, the check of the work.

Rows are {"prompt": [messages], "chosen": [one assistant message], "rejected": [...]}. Both sides of a
benchmark get the same token ids: those of the chat template up to the end of the answer's turn. TRL's own
preparation would keep what the template puts behind it, a newline in ChatML; a reward model would read its
score there, and DPO would train it. Preparation is not timed on either side.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import common
from common import Measured

BATCH = 4  # pairs a step
MAX_SEQ_LEN = 1024  # tokens of a prompt and one answer
MICRO_BATCH_TOKENS = 2 * MAX_SEQ_LEN  # of a forward pass of ours: a pair stays together
FIELDS = ("prompt", "chosen", "rejected")
TOLERANCE = {  # losses in nats, the norm of the gradient relative
    "fp32": {"losses": 1e-5, "grad_norm": 1e-4},
    "bf16": {"losses": 1e-2, "grad_norm": 5e-2},  # TRL keeps fp32 weights under autocast, ours are bf16
}
FIGURES = {  # columns of the table: what check_same_work compares
    "first loss": lambda run: f"{run.losses[0]:.6f}",
    "second loss": lambda run: f"{run.losses[1]:.6f}",
    "grad norm": lambda run: f"{run.grad_norms[0]:.4f}",
}


def read(path: Path, steps: int) -> list[dict[str, list[dict]]]:
    """Return the pairs of all steps, BATCH each, the warm-up step's first."""
    rows = common.read_rows(path, FIELDS, BATCH, steps)
    return [{field: row[field] for field in FIELDS} for row in rows]


def load_ours(rows: list[dict[str, list[dict]]], model: Path) -> list:
    """Return the pairs as our package reads them, `align.data.preferences.Pair`."""
    from align.data import preferences
    from align.data.tokenizer import load_tokenizer

    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        fmt = preferences.PreferenceFormat(max_seq_len=MAX_SEQ_LEN)
        pairs, counts = preferences.load_pairs(
            [Path(file.name)], load_tokenizer(model), fmt, text_lines=False
        )
    if len(pairs) != len(rows):
        raise ValueError(f"--data has pairs that our package drops: leave them out ({counts})")
    return pairs


def our_tokens(data: list) -> list[int]:
    """Return the real tokens of each step of some `align.data.preferences.Pair`."""
    return common.sums_by_step([len(pair.chosen.ids) + len(pair.rejected.ids) for pair in data], BATCH)


def our_distinct_tokens(data: list) -> list[int]:
    """Return the same with each prompt counted once: the first text whole, of the second the answer."""
    return common.sums_by_step(
        [len(pair.chosen.ids) + int(pair.rejected.trained.sum()) for pair in data], BATCH
    )


def trl_distinct_tokens(rows: list[dict[str, list[int]]]) -> list[int]:
    """Return the same of some rows of `tokenize`."""
    return common.sums_by_step([sum(map(len, row.values())) for row in rows], BATCH)


def weights_per_token(model: Path, run: Measured) -> float:
    """Return the weights that a real token must be multiplied with, on average over the measured steps.

    Counted is what the loss needs, whatever a trainer computes: a prompt once for both answers, and the
    output layer for the tokens that carry loss only (none, if the loss is not one of tokens).
    """
    body, whole = common.matmul_parameters(model, head=False), common.matmul_parameters(model)
    needed = body * sum(run.distinct_tokens[1:])
    if run.trained_tokens is not None:
        needed += (whole - body) * sum(run.trained_tokens[1:])
    return needed / sum(run.tokens[1:])


def tokenize(row: dict[str, list[dict]], tokenizer: Any) -> dict[str, list[int]]:
    """Return a pair as `prompt_ids` (with the header of the answer), `chosen_ids` and `rejected_ids`.

    Raises:
        ValueError: a text of more than MAX_SEQ_LEN tokens.
    """
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    ids = {"prompt_ids": prompt}
    for side in ("chosen", "rejected"):
        whole = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False)
        assert whole[: len(prompt)] == prompt
        end = whole.index(tokenizer.eos_token_id, len(prompt)) + 1
        if end > MAX_SEQ_LEN:
            raise ValueError(f"a text of --data has {end} tokens, more than {MAX_SEQ_LEN}: leave it out")
        ids[f"{side}_ids"] = whole[len(prompt) : end]
    return ids


def check_same_work(runs: dict[str, list[Measured]], dtype: str) -> None:
    """Raise RuntimeError unless the first runs of all trainers agree.

    That is: the same tokens in every step, and within TOLERANCE the losses of the first two steps and the
    norm of the first gradient. The second loss, after one update, shows that the optimizer is the same, too.
    """
    tolerance = TOLERANCE[dtype]
    name, *others = runs
    first = runs[name][0]
    for other in others:
        run = runs[other][0]
        where = f"not the same work: {name} and {other}:"
        counts, other_counts = ((r.tokens, r.distinct_tokens, r.trained_tokens) for r in (first, run))
        if counts != other_counts:
            raise RuntimeError(f"{where} tokens by step, all, distinct and trained: {counts}, {other_counts}")
        for loss, other_loss in zip(first.losses[:2], run.losses[:2], strict=True):
            if abs(loss - other_loss) > tolerance["losses"]:
                raise RuntimeError(f"{where} losses {first.losses[:2]} and {run.losses[:2]}, {tolerance}")
        if abs(first.grad_norms[0] / run.grad_norms[0] - 1) > tolerance["grad_norm"]:
            raise RuntimeError(
                f"{where} gradient norms {first.grad_norms[0]} and {run.grad_norms[0]}, {tolerance}"
            )
