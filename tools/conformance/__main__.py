"""Compare every number of a training step in many parallel layouts with one process, and with float64.

    python -m tools.conformance                                   # random small models, 1, 2 and 4 processes
    python -m tools.conformance --model DIR --data rows.jsonl     # a model and rows of your own

Layouts are tensor, pipeline, context, sequence and data parallelism, micro-batches, order of rows,
recomputation, shared prompts; algorithms are SFT, DPO, ranking, regression, PPO, GRPO and PPO's critic. The
result is a table of the largest relative errors. docs/conformance.md has that of the random models. Exit
status 1: an error is above its bound.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

from align import console
from align.command_line import parse
from align.data import jsonl, packing, preferences, sft
from align.data.formats import FormatConfig
from align.data.packing import Example
from align.data.preferences import Pair
from align.data.tokenizer import load_tokenizer
from align.errors import UserError, one_line
from tools.conformance import grid, models, report, rows
from tools.conformance.cases import CASES, of_model, quick
from tools.conformance.planted import BUGS
from tools.conformance.rows import ROWS, STEPS
from tools.conformance.worker import Job

PROG = "python -m tools.conformance"


@dataclass(frozen=True)
class Config:
    processes: tuple[int, ...] = (1, 2, 4)
    """numbers of processes; layouts exist for 1, 2 and 4. On GPUs each process has one"""
    model: Path | None = None
    """Hugging Face directory of a language model (default: random small models of seven families)"""
    data: Path | None = None
    """JSON lines of SFT rows or of preference pairs, for --model"""
    quick: bool = False
    """one case of each algorithm and layout, without checkpoints"""
    planted: bool = False
    """plant known bugs of parallel training one by one, and show the cell that each of them changes"""
    output: Path = Path("runs/conformance")
    """directory of results.json and results.md"""
    page: Path | None = None
    """Markdown page to write as well, with a section for each Megatron-Core version that has written it"""

    def __post_init__(self):
        if unknown := set(self.processes) - set(CASES):
            raise UserError(f"--processes {min(unknown)}: there are layouts for 1, 2 and 4")
        if (self.model is None) != (self.data is None):
            raise UserError("--model and --data belong together: give both, or neither")
        if self.model and (self.planted or self.page):
            raise UserError("--planted and --page are for the random models: leave --model out")
        gpus = torch.cuda.device_count()
        if gpus and max(self.processes) > gpus:
            raise UserError(f"--processes {max(self.processes)}: this machine has {gpus} GPUs")


def main(config: Config) -> None:
    start, cases = time.monotonic(), {n: CASES[n] for n in sorted({1, *config.processes})}
    with tempfile.TemporaryDirectory() as folder:
        if config.model:
            job, are_pairs = own_rows(config, Path(folder))
            cases = {n: of_model(own, "model", are_pairs, job.scale) for n, own in cases.items()}
        else:
            transformers.utils.logging.set_verbosity_error()
            transformers.utils.logging.disable_progress_bar()
            models.write_models(Path(folder, "models"))
            job = Job({name: str(Path(folder, "models", name)) for name in models.FAMILIES}, folder)
        if config.quick:
            cases = {n: quick(own) for n, own in cases.items()}
        job = replace(job, checkpoints=not config.quick)
        measured = grid.run(
            job, cases, [name for name, bug in BUGS.items() if config.planted and bug.processes in cases]
        )
        float64 = grid.against_float64(job, [case for own in cases.values() for case in own])
    result = report.about(measured, float64, time.monotonic() - start)
    result = json.loads(json.dumps(result))
    config.output.mkdir(parents=True, exist_ok=True)
    Path(config.output, "results.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(config.output, "results.md").write_text(report.section(result) + "\n")
    if config.page:
        report.write_page(result, config.page)
    console.write(report.terminal(result))
    if failures := report.failures(result):
        raise SystemExit("\n".join([f"{len(failures)} above the bounds:", *failures]))
    console.write("all cells are within their bounds")


def own_rows(config: Config, folder: Path) -> tuple[Job, bool]:
    """The job of the user's model and rows, and whether these are pairs."""
    assert config.model and config.data
    tokenizer = load_tokenizer(config.model)
    _, first = next(iter(jsonl.read_jsonl(config.data)))
    are_pairs = any(name.startswith("chosen") for name in first)
    stored: Sequence[Example] | Sequence[Pair]
    if are_pairs:
        stored, _ = preferences.load_pairs([config.data], tokenizer, preferences.PreferenceFormat())
    else:
        stored, _ = sft.load_sft([config.data], tokenizer, FormatConfig())
    packing.check_size(len(stored), STEPS * ROWS + 1, "--data", "the 19 rows of")
    path = folder / "rows.json"
    rows.store(stored, path)
    source = rows.StoredRows(path)
    longest = max(sum(example.num_inputs + 1 for example in row) for row in source.rows)
    scale = -(-longest // min(case.micro_batch_tokens for case in CASES[1]))
    return Job({"model": str(config.model.resolve())}, str(folder), data=str(path), scale=scale), are_pairs


if __name__ == "__main__":
    console.adapt()
    with one_line():
        main(parse(Config, None, PROG, __doc__))
