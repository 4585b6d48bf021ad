"""One step of a run beside an independent reference: tokens, masks, log-probs, rewards, loss, gradients.

    python -m tools.check train_dpo.py --model runs/sft/hf --train-data pairs.jsonl --lr 1e-6

The words are a script and its flags, as one runs it; its first step is run into a directory of its own, with
--max-steps 1 --record 1. Then the same step is computed from the files, with transformers in float64, and
compared stage by stage. The exit status is 1 if a stage differs. --processes N runs the script by torchrun.
In step 1 policy and reference are one model, and KL is 0: --step 2 compares the second step. --keep DIR keeps
the run; a run that is there is compared again.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align import errors
from align.command_line import parse
from align.errors import UserError
from align.files import ROOT
from tools import check_algorithms
from tools.check_stages import Stage, Step

SCRIPTS = [path.stem for path in sorted(ROOT.glob("train_*.py"))]
FLAGS = ("--record", "1", "--constant-steps", "0")


def run_script(script: str, words: Sequence[str], processes: int) -> None:
    """Run a script. Raises UserError with its last line if it fails."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"WANDB_MODE": "disabled"}
    done = subprocess.run(
        [*launcher, str(ROOT / f"{script}.py"), *words], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(f"{script}.py ended with status {done.returncode}: {lines[-1] if lines else ''}")


def flags_of_run(module: Any, words: Sequence[str], steps: int, output: Path) -> tuple[list[str], Any]:
    """Flags of the first steps of the user's run, and the configuration that they give."""
    config = parse(module.Config, words, module.__name__)
    if config.checkpoint.resume_from is not None:
        raise UserError("--resume-from: the check starts from --model, leave it out")
    if getattr(config, "lora", None) and config.lora.enabled:
        raise UserError(
            "--lora-rank, --adapter: the reference has no adapters, tests/model/test_lora.py compares them "
            "with peft: leave it out"
        )
    words = [*words, *FLAGS, "--max-steps", str(steps), "--output", str(output)]
    if hasattr(module.Config, "critic_warmup_steps"):
        words += ["--critic-warmup-steps", "0"]
    if config.val_data:
        words += ["--val-batches", "1"]
    return words, parse(module.Config, words, module.__name__)


def run_until(step: int, run: Callable[[int], None], output: Path) -> None:
    """Run the steps up to one; the weights before it are then in OUTPUT/before, unless it is the first.

    `run(steps)` starts or continues the run in `output` with that number of steps.
    """
    if step > 1:
        run(step - 1)
        (output / "hf").rename(output / "before")
    run(step)


def table(stages: Sequence[Stage]) -> str:
    """The stages as lines of text."""
    lines = [f"{'stage':<20}{'numbers':>10}{'largest error':>16}{'bound':>11}  result"]
    for stage in stages:
        if stage.note and not stage.count:
            lines.append(f"{stage.name:<20}{'':>37}  not checked: {stage.note}")
            continue
        result = "DIFFERENT" if stage.first else "equal"
        numbers = f"{stage.count:>10,}{stage.error:>16.2e}{stage.bound:>11.1e}"
        lines.append(f"{stage.name:<20}{numbers}  {result}" + (f" ({stage.note})" if stage.note else ""))
    if wrong := [stage for stage in stages if stage.first]:
        lines += [
            "",
            f"first difference: {wrong[0].name}, {wrong[0].first}",
            f"likely cause: {wrong[0].cause}",
        ]
    return "\n".join(lines)


def check(script: str, words: Sequence[str], processes: int, keep: Path, step: int = 1) -> list[Stage]:
    """Run the steps up to one, unless `keep`, the directory of the run, has it, and compare it."""
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(script)

    def run(steps: int) -> None:
        own, _ = flags_of_run(module, words, steps, keep)
        run_script(script, [*own, *["--resume-with-changes"] * (steps == step > 1)], processes)

    _, config = flags_of_run(module, words, step, keep)
    if not (keep / "records" / f"step_{step:06d}" / "record.json").is_file():
        run_until(step, run, keep)
    return check_algorithms.run(Step(script, config, keep, step))


def main(words: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m tools.check",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "script", help=f"one of {', '.join(name + '.py' for name in SCRIPTS)}; then its flags"
    )
    parser.add_argument("--processes", type=int, default=1, help="ranks, started by torchrun (default: 1)")
    parser.add_argument("--step", type=int, default=1, help="step that is compared (default: 1)")
    parser.add_argument("--keep", type=Path, help="directory of the run (default: a temporary one)")
    own, flags = parser.parse_known_args(words)
    script = Path(own.script).stem
    if script not in SCRIPTS:
        raise UserError(f"{own.script} is no training script: give one of {', '.join(SCRIPTS)}")
    with tempfile.TemporaryDirectory() as folder:
        stages = check(script, flags, own.processes, own.keep or Path(folder) / "run", own.step)
    print(table(stages))
    return int(any(stage.first for stage in stages))


if __name__ == "__main__":
    with errors.one_line():
        sys.exit(main())
