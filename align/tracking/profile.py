"""Profile of a few steps by torch.profiler: a trace and a table of kernels."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from align.errors import UserError

if TYPE_CHECKING:
    from torch.profiler import profile

NUM_ROWS = 60  # of the table


def parse_steps(text: str | None) -> range:
    """Steps of --profile START:STEPS, counted from 1; none without. Raises UserError for another form."""
    if text is None:
        return range(0)
    if not (match := re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)) or not int(match[1]) or not int(match[2]):
        raise UserError(f"--profile {text} must be START:STEPS, such as 10:3 for the steps 10, 11, 12")
    return range(int(match[1]), int(match[1]) + int(match[2]))


class Profiler:
    """Profiler of one rank, which writes DIRECTORY/rank_N.txt and DIRECTORY/rank_N.json.gz."""

    def __init__(self, steps: range, directory: Path, rank: int, say: Callable[[str], None]):
        self.steps, self.path, self.say = steps, directory / f"rank_{rank}", say
        self.profile: profile | None = None

    def start(self, step: int) -> None:
        """Begin a step, counted from 1, and with the first one of `steps` the profile."""
        if step in self.steps and self.profile is None:
            from torch.profiler import profile  # here: it is imported slowly

            self.profile = profile(record_shapes=True)  # of the CPU, and of CUDA where there is a GPU
            self.profile.start()

    def end(self, step: int, is_last: bool) -> None:
        """End a step; after the last one of `steps`, or of the run, the profile is written."""
        if self.profile is None or (step + 1 in self.steps and not is_last):
            return
        self.profile.stop()
        self.path.parent.mkdir(exist_ok=True)
        self.profile.export_chrome_trace(f"{self.path}.json.gz")
        sort_by = f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
        table = self.profile.key_averages().table(sort_by=sort_by, row_limit=NUM_ROWS)
        self.path.with_suffix(".txt").write_text(table, encoding="utf-8")
        self.say(f"--profile: {self.path}.txt has the kernels by time, {self.path}.json.gz the trace")
        self.profile = None
