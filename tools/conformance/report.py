"""Results as a table in the terminal, a JSON file for each Megatron-Core version, and a Markdown page."""

import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from tools.conformance.cases import Case, describe
from tools.conformance.compare import BOUND, Cell
from tools.conformance.grid import Row
from tools.conformance.planted import BUGS

COLUMNS = (
    *("outputs", "loss", "gradients", "gradient norm", "weights", "metrics"),
    *("checkpoint", "resume"),
)
FLOAT64_COLUMNS = COLUMNS[:5]
RESULTS = "<!-- results: written by make conformance -->"  # in the page; what is above it is kept


def about(rows: Sequence[Row], float64: Mapping[tuple[str, str], Mapping[str, Cell]], seconds: float) -> dict:
    """Everything that a report shows, in the types of JSON."""
    gpu = torch.cuda.is_available()
    return {
        "megatron": version("megatron-core"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if gpu else cpu_name(),
        "backend": "nccl" if gpu else "gloo",
        "date": date.today().isoformat(),
        "seconds": round(seconds),
        "bound": BOUND,
        "cases": [to_json(row) for row in rows if not row.planted],
        "planted": [to_json(row) for row in rows if row.planted],
        "float64": [
            {"algorithm": a, "family": f, "cells": {name: (c.error, c.place) for name, c in cells.items()}}
            for (a, f), cells in float64.items()
        ],
    }


def to_json(row: Row) -> dict:
    """A row without the metrics of its steps."""
    changed = {name: value for name, value in asdict(row.case).items() if value != getattr(Case, name)}
    result = {"cells": row.result.cells, "refused": row.result.refused}
    return {"processes": row.processes, "planted": row.planted, "case": changed, **result}


def cpu_name() -> str:
    """Model name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def bound(column: str, backend: str, limit: float) -> float:
    """Largest error that a cell may have: none of a resume on a CPU, where passes repeat to the last bit."""
    return 0.0 if column == "resume" and backend == "gloo" else limit


def above(cells: Mapping[str, Sequence], report: Mapping) -> list[str]:
    """Columns whose error is above the bound, in the order in which a step computes them."""
    names = [name for name in COLUMNS if name in cells]
    wrong = [name for name in names if cells[name][0] > bound(name, report["backend"], report["bound"])]
    late = [name for name in wrong if "step" in cells[name][1] and not cells[name][1].endswith("step 1")]
    return [name for name in wrong if name not in late] + late


def failures(report: Mapping) -> list[str]:
    """Lines for cells above their bounds, and for planted bugs that no cell shows."""
    lines = []
    for row in report["cases"]:
        lines += [f"{name_of(row)}: {x} {shown(row['cells'][x])}" for x in above(row["cells"], report)]
    for row in report["float64"]:
        wrong = above(row["cells"], report)
        lines += [
            f"{row['algorithm']}, {row['family']}, float64: {x} {shown(row['cells'][x])}" for x in wrong
        ]
    silent = [row for row in report["planted"] if not row["refused"] and not above(row["cells"], report)]
    return lines + [f"no cell shows the planted bug: {row['planted']}" for row in silent]


def shown(cell: Sequence) -> str:
    """An error with its place."""
    return f"{number(cell[0])} at {cell[1]}"


def number(error: float) -> str:
    """An error in as few characters as its size needs."""
    return "0" if error == 0 else "inf" if math.isinf(error) else f"{error:.0e}".replace("e-0", "e-")


def name_of(row: Mapping) -> str:
    """Algorithm, family and layout of a case."""
    case = Case(**row["case"])
    return f"{case.algorithm}, {case.family}, {describe(case, row['processes'])}"


# ---- tables --------------------------------------------------------------------------------------


def text_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Columns of equal width."""
    table = [list(header), *map(list, lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    padded = ("  ".join(x.ljust(width) for x, width in zip(line, widths, strict=True)) for line in table)
    return "\n".join(line.rstrip() for line in padded)


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    rule = "|".join("---" for _ in header)
    return "\n".join(
        [f"| {' | '.join(header)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)]
    )


def grid_lines(report: Mapping, bold: str) -> list[list[str]]:
    """A line for each case; `bold`: put around errors above the bound, with their places."""
    lines = []
    for row in report["cases"]:
        case, cells = Case(**row["case"]), row["cells"]
        line = [str(row["processes"]), describe(case, row["processes"]), case.family, case.algorithm]
        wrong = above(cells, report)
        if row["refused"]:
            lines.append([*line, f"not possible: {row['refused']}", *[""] * (len(COLUMNS) - 1)])
            continue
        texts = [number(cells[name][0]) if name in cells else "" for name in COLUMNS]
        marked = [
            f"{bold}{shown(cells[name])}{bold}" if name in wrong else text
            for name, text in zip(COLUMNS, texts, strict=True)
        ]
        lines.append(line + marked)
    return lines


def float64_lines(report: Mapping, bold: str) -> list[list[str]]:
    """A line for each algorithm and family."""
    lines = []
    for row in report["float64"]:
        cells, wrong = row["cells"], above(row["cells"], report)
        texts = [
            f"{bold}{shown(cells[x])}{bold}" if x in wrong else number(cells[x][0]) for x in FLOAT64_COLUMNS
        ]
        lines.append([row["algorithm"], row["family"], *texts])
    return lines


def error_of(row: Mapping) -> str:
    """The error of a planted bug, up to the first path in it."""
    return str(row["refused"]).partition(": /")[0]


def planted_lines(report: Mapping) -> list[list[str]]:
    """A line for each planted bug: its case, and the first difference."""
    lines = []
    for row in report["planted"]:
        finding = BUGS[row["planted"]].finding
        wrong = above(row["cells"], report)
        first = f"{wrong[0]}: {shown(row['cells'][wrong[0]])}" if wrong else error_of(row) or "none"
        others = ", ".join(wrong[1:])
        lines.append([row["planted"], str(finding or ""), name_of(row), first.replace("|", "/"), others])
    return lines


GRID_HEADER = ("processes", "layout", "model", "algorithm", *COLUMNS)
FLOAT64_HEADER = ("algorithm", "model", *FLOAT64_COLUMNS)
PLANTED_HEADER = ("planted bug", "finding", "case", "first difference", "also above the bound")


def terminal(report: Mapping) -> str:
    """The report for a terminal."""
    parts = [describe_run(report), text_table(GRID_HEADER, grid_lines(report, ""))]
    if report["float64"]:
        parts += ["one process against float64:", text_table(FLOAT64_HEADER, float64_lines(report, ""))]
    if report["planted"]:
        parts += [text_table(PLANTED_HEADER, planted_lines(report))]
    return "\n\n".join(parts)


def describe_run(report: Mapping) -> str:
    """Versions, machine, date and bounds in one sentence."""
    versions = (
        f"Megatron-Core {report['megatron']}, torch {report['torch']}, transformers {report['transformers']}"
    )
    where = f"Python {report['python']}, {report['device']}, {report['backend']}, {report['date']}"
    return f"{versions}, {where}; {report['seconds']} s; fp32, bound {report['bound']:.0e}."


def section(report: Mapping) -> str:
    """The report as a section of the page."""
    errors = [cell[0] for row in report["cases"] for cell in row["cells"].values()]
    largest = f"the largest error {number(max(errors, default=0.0))}"
    largest = f"{len(report['cases'])} cases, {len(errors)} cells, {largest}."
    parts = [f"## Megatron-Core {report['megatron']}", f"{describe_run(report)} {largest}"]
    if report["planted"]:
        parts += [
            "### Planted bugs",
            markdown_table(PLANTED_HEADER, planted_lines(report)),
        ]
    parts += ["### One process against float64", markdown_table(FLOAT64_HEADER, float64_lines(report, "**"))]
    parts += ["### Layouts against one process", markdown_table(GRID_HEADER, grid_lines(report, "**"))]
    return "\n\n".join(parts)


def write_page(report: Mapping, page: Path) -> None:
    """Replace this version's results in the folder beside a page, and write the page of all versions."""
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    (folder / f"{report['megatron']}.json").write_text(json.dumps(report, indent=1) + "\n")
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    kept = page.read_text().partition(RESULTS)[0].rstrip()
    page.write_text("\n\n".join([kept, RESULTS, *map(section, reports)]) + "\n")
