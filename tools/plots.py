"""Draw the curves of runs again, while they train or afterwards: python -m tools.plots runs/sft runs/dpo"""

from pathlib import Path

import tyro

from align import console
from align.errors import one_line
from align.tracking.plots import draw


def main(run_directories: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Write RUN/plots/curves.png for each run directory and print the paths."""
    for directory in run_directories:
        for path in draw(directory):
            print(path)


if __name__ == "__main__":
    console.adapt()
    with one_line():
        tyro.cli(main, description=__doc__)
