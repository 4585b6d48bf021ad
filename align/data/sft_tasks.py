"""SFT rows as tasks: a prompt to sample from, and the example that SFT trains on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from align.data import formats, jsonl, packing, row_counts, rows, sft
from align.data.formats import FormatConfig
from align.data.marker_chat import RowFormats
from align.data.packing import BatchConfig, Example
from align.data.prompts import Prompt, load_each
from align.data.stored_rows import StoredRows, store
from align.data.tokenizer import Tokenizer
from align.errors import UserError


@dataclass(frozen=True, eq=False)
class Task:
    """An SFT row: the prompt before its last response, and the example that SFT trains on."""

    prompt: Prompt
    example: Example


def check_lengths(fmt: FormatConfig, max_new_tokens: int, config: BatchConfig, max_positions: int) -> None:
    """Raise UserError if a prompt or judgement may not fit into the context, or a pair into a batch.

    Their sum may exceed the context: a response to a long prompt gets what is left of it, and a judge prompt
    is shortened to what --max-new-tokens leaves.
    """
    prompt, budget = fmt.max_seq_len, config.micro_batch_tokens
    flag, context = f"--max-new-tokens {max_new_tokens}", f"the model's context of {max_positions}"
    if prompt > max_positions:
        raise UserError(f"--max-seq-len {prompt} is beyond {context} tokens: lower it")
    if max_new_tokens >= max_positions:
        raise UserError(f"{flag} leaves a prompt no token of {context}: lower it")
    if 2 * (longest := min(prompt + max_new_tokens, max_positions)) > budget:
        raise UserError(
            f"--max-seq-len {prompt} and {flag} make sequences of {longest} tokens, of which a pair has two: "
            f"raise --micro-batch-tokens {budget}"
        )


def load_sft_sets(
    files: Mapping[str, Sequence[Path]],
    tokenizer: Tokenizer,
    fmt: FormatConfig,
    vocab_size: int,
    say: Callable[[str], None],
    row_formats: RowFormats,
) -> dict[str, Sequence[Task]]:
    """Load the tasks of data sets, by name; `say` logs their number and the first prompt.

    `row_formats` counts formats of rows. Raises UserError as load_tasks and packing.check_ids do.
    """
    sets = load_each(files, lambda paths: load_tasks(paths, tokenizer, fmt, row_formats), say)
    packing.check_ids((task.example for tasks in sets.values() for task in tasks), vocab_size)
    first = next(tasks[0] for tasks in sets.values() if tasks)
    say(f"first prompt:\n{tokenizer.decode(first.prompt.ids.tolist())}")
    return sets


def load_tasks(
    paths: Sequence[Path], tokenizer: Tokenizer, fmt: FormatConfig, row_formats: RowFormats | None = None
) -> tuple[StoredRows[Task], dict[str, int]]:
    """Load all tasks of these files, and counts for the log.

    Counts: as in `sft.load_sft`, and dropped_without_prompt (rows that SFT keeps, with nothing before the
    last response, or with its start beyond max_seq_len), and longest_prompt in tokens.
    Raises UserError naming file and line for a wrong row, and if no task is left.
    """
    names = ("rows", "cut_prompts", "cut_answers", "dropped", "dropped_without_prompt")
    counts = dict.fromkeys(names, 0)
    tasks = store(read_tasks(list(paths), tokenizer, fmt, counts, row_formats))
    if not tasks:
        reason = (
            f"in all {counts['rows']} rows the last response begins beyond --max-seq-len {fmt.max_seq_len}"
        )
        files = ", ".join(map(str, paths))
        raise UserError(f"{files}: no prompt is left, {reason}, or nothing comes before it")
    longest = max(len(task.prompt.ids) for task in tasks)
    counts |= row_counts.count_tokens(task.example for task in tasks)
    return tasks, counts | {"longest_prompt": longest}


def read_tasks(
    paths: list[Path],
    tokenizer: Tokenizer,
    fmt: FormatConfig,
    counts: dict[str, int],
    row_formats: RowFormats | None,
) -> Iterator[Task]:
    """Yield the tasks that `load_tasks` keeps, and add to its counts. Raises UserError for a wrong row."""
    for location, row, whole in sft.read_sft(paths, tokenizer, fmt, counts, row_formats):
        start = jsonl.located(location, response_start, row, whole, tokenizer, fmt)
        bos = int(whole.ids[0] == tokenizer.bos_id)
        if bos < start < fmt.max_seq_len:
            yield Task(Prompt(whole.ids[:start], row), formats.cut_end(whole, fmt))
        else:
            counts["dropped_without_prompt"] += 1


def response_start(row: dict, whole: Example, tokenizer: Tokenizer, fmt: FormatConfig) -> int:
    """Index of the row's last response in its example `whole`. Raises UserError without a response."""
    trained = whole.trained
    # with loss_on "all", or with a response from token 0 on, which is never trained
    if trained[1]:
        normalised, _ = rows.sft_row(row, fmt.template_fields())
        trained = np.array(formats.encode_row(normalised, tokenizer, replace(fmt, loss_on="answer"))[1])
    starts = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0) == 1)
    if not len(starts):
        raise UserError("no prompt: the row has no response")
    return int(starts[-1])
