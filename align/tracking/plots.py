"""Curves of a run: its metrics.jsonl as a grid of small panels, OUTPUT/plots/curves.png."""

import json
import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from align.errors import UserError

PANELS_PER_ROW = 4
SMOOTH_ABOVE = 50  # points; shorter curves are not smoothed
COLORS = {"train": "#1f5a99", "val": "#d9641e", "test": "#7d3c98", "time": "#6b6b6b"}
SHARED = ("train", "val", "test")  # groups whose metrics of one name share a panel
TOGETHER = {  # groups in one panel
    "ledger": "ledger/..., tokens and prompts",
    "memory": "memory/..., GB",
    "time": "time/..., shares of a step",
}
ALONE = ("time/step", "time/tokens_per_s", "time/tflops_per_s")  # in another unit than their group
EXACT = ("train/lr",)  # without noise, not smoothed
OTHER_COLOR = "#3c6e47"
SAME_AS = {"train_rollouts": "train", "train_optim": "train", "val_rollouts": "val"}  # drawn like others

Curve = tuple[list[int], list[float]]  # steps, values


def draw(run_directory: Path) -> list[Path]:
    """Draw all metrics of a run. Returns the pictures written, none if nothing was logged."""
    panels = arrange(read_curves(run_directory / "metrics.jsonl"))
    if not panels:
        return []
    rows, width = math.ceil(len(panels) / PANELS_PER_ROW), min(len(panels), PANELS_PER_ROW)
    figure = Figure(figsize=(3.1 * width, 2.2 * rows + 0.4), layout="constrained")
    axes = list(figure.subplots(rows, width, squeeze=False).flat)
    for axis, (name, curves) in zip(axes, panels.items(), strict=False):
        draw_panel(axis, name, curves)
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.suptitle(run_directory.resolve().name, fontsize=10, weight="bold")
    figure.supxlabel("step", fontsize=8)
    path = run_directory / "plots" / "curves.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return [path]


def read_curves(path: Path) -> dict[str, Curve]:
    """Read {metric: (steps, values)}, in the order of first appearance. Raises UserError without a file."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give the --output directory of a run")
    curves: dict[str, Curve] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        step = row.pop("step")
        for name, value in row.items():
            steps, values = curves.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return curves


def arrange(curves: dict[str, Curve]) -> dict[str, dict[str, Curve]]:
    """Arrange {panel: {metric: curve}}: train, val and test share panels and are first, time is last."""
    seen = [group for group in map(group_of, curves) if group not in (*SHARED, "time")]
    groups = [*SHARED, *seen, "time"]
    panels: dict[str, dict[str, Curve]] = {}
    for name in sorted(curves, key=lambda name: groups.index(group_of(name))):
        group = group_of(name)
        panel = name.partition("/")[2] if group in SHARED else name
        if group in TOGETHER and name not in ALONE:
            panel = TOGETHER[group]
        panels.setdefault(panel, {})[name] = curves[name]
    return panels


def group_of(name: str) -> str:
    """The part of a metric's name before the slash, or the group that it is drawn like."""
    group = name.partition("/")[0]
    return SAME_AS.get(group, group)


def draw_panel(axis: Axes, panel: str, curves: dict[str, Curve]) -> None:
    """Draw a panel; a long curve is drawn faintly with its moving average on top."""
    together = panel in TOGETHER.values()
    for i, (name, (steps, values)) in enumerate(curves.items()):
        group = group_of(name)
        color = f"C{i}" if together else COLORS.get(group, OTHER_COLOR)
        label = name.partition("/")[2] if together else group
        marker = "o" if group in ("val", "test") or len(steps) == 1 else ""
        if len(steps) > SMOOTH_ABOVE and not marker and name not in EXACT:
            axis.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
            values = moving_average(values, len(values) // 20).tolist()
        axis.plot(steps, values, color=color, linewidth=1.1, marker=marker, markersize=2.5, label=label)
    if len(curves) > 1:
        axis.legend(fontsize=5.5 if together else 7, frameon=False, ncols=2 if together else 1)
    axis.set_title(panel if together or len(curves) > 1 else next(iter(curves)), fontsize=8)
    clean(axis)


def clean(axis: Axes) -> None:
    """Style an axis: thin grey lines, small plain numbers, whole steps."""
    axis.grid(color="#e4e4e4", linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["bottom", "left"]].set(color="#8a8a8a", linewidth=0.6)
    axis.tick_params(labelsize=6.5, length=2, color="#8a8a8a")
    axis.ticklabel_format(axis="y", scilimits=(-3, 5), useOffset=False)
    axis.yaxis.get_offset_text().set_fontsize(6.5)
    axis.locator_params("x", integer=True, nbins=5, min_n_ticks=1)


def moving_average(values: list[float], window: int) -> np.ndarray:
    """Mean over a centred window, which is shorter at both ends."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
