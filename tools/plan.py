"""Memory of each phase of a run on a rank, and whether it fits, before any machine is asked for.

    python -m tools.plan --nodes 4 --gpus-per-node 8 --gpu-memory 80 \
        train_ppo.py --model DIR --tp 8 --reward-model RM --train-data prompts.jsonl

The flags of tools.plan come before the script's name; the script's own follow, read and checked by its
Config. Of a model only config.json is read; nothing is allocated and no GPU is needed. GB are 1e9 bytes, as
in a run's memory/... metrics. Exit status 0: it fits; 1: it does not; 2: a flag is wrong.

The arithmetic is in align/planning/memory.py, and with --simulate in step_time.py beside it; the phases of
each script are in estimate.py. `bench/plan.py` compares with the memory that runs on CPUs have taken. Of GPUs
nothing was compared yet. With Transformer Engine, --fp8 or not, activations are counted as with torch's
kernels in bf16.
"""

import bisect
import importlib.util
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from align import console
from align.command_line import parse
from align.errors import UserError, one_line
from align.planning import memory, step_time
from align.planning.memory import RankShape
from align.planning.phases import ITEMS, Cluster, Job, fullest_node, on_device, ranks
from align.training.config import CommonConfig

PROG = "python -m tools.plan"
# Bytes that a CPU's process gets with its first step, such as compiled kernels and threads: 0.04 to 0.06 GB
# in the cases of bench/plan.py.
FIRST_STEP = 0.05e9
REMEDIES = {  # item of a refusal: flags that make it smaller
    "process": (),
    "weights": ("--tp", "--pp", "--offload on"),
    "gradients": ("--tp", "--pp", "--offload on"),
    "optimizer": ("--tp", "--pp", "--offload on", "more nodes"),
    "frozen": ("--tp", "--pp", "--offload on"),
    "building": ("--tp", "--pp"),
    "copies": ("--rollout-tp", "--rollout-layout same"),
    "kv_cache": ("--rollout-slots", "--max-new-tokens", "--tp", "--rollout-tp"),
    "activations": ("--recompute full", "--micro-batch-tokens", "--tp", "--cp", "--pp"),
    "logits": ("--tp", "--micro-batch-tokens"),
    "update": ("--tp", "--pp"),
    "checkpoint": ("--pp over more nodes",),
    "pinned copies": ("--tp", "--pp", "more nodes", "--offload off"),
}


def split(arguments: Sequence[str]) -> tuple[list[str], Path, list[str]]:
    """The flags of tools.plan, the script, the script's flags. Raises UserError if no script is named."""
    for i, word in enumerate(arguments):
        if word.endswith(".py") and not word.startswith("--"):
            return list(arguments[:i]), Path(word), list(arguments[i + 1 :])
    raise UserError(f"which script? Name it after the flags of tools.plan: {PROG} --nodes 1 train_sft.py ...")


def load_script(path: Path) -> ModuleType:
    """A training script as a module; nothing of it runs. Raises UserError for a file that is none."""
    if not path.is_file():
        raise UserError(f"{path}: no such script")
    script = sys.modules.get(path.stem)
    if script is None or getattr(script, "__file__", None) != str(path.resolve()):
        spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
        assert spec and spec.loader
        script = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
    if not issubclass(getattr(script, "Config", type(None)), CommonConfig):
        raise UserError(f"{path} is no training script: it has no Config of align.training.config's kind")
    return script


def process_bytes() -> float:
    """Memory of a run's process beside its tensors: this one's, with the same imports, and FIRST_STEP."""
    if sys.platform != "linux":
        return 0.5e9 + FIRST_STEP  # as on Linux
    [resident] = re.findall(rb"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_bytes())
    return int(resident) * 1024.0 + FIRST_STEP


def report(job: Job, name: str) -> str | None:
    """Print the memory of each phase; returns why the run does not fit, None if it does."""
    cluster, layout, process = job.cluster, job.layout, process_bytes()
    stages = [replace(layout, stage=stage) for stage in range(layout.pp)]
    tables = [[(p.name, on_device(job, s, p, process)) for p in job.phases(s)] for s in stages]
    peaks = [max(sum(items.values()) for _, items in rows) for rows in tables]
    worst = peaks.index(max(peaks))
    print_models(job, name)
    if layout.pp > 1:
        by_stage = ", ".join(f"{i}: {peak / 1e9:.2f}" for i, peak in enumerate(peaks))
        print(f"peak of each pipeline stage in GB: {by_stage}; below stage {worst}")
    print("\n" + table(tables[worst]))
    phase, items = max(tables[worst], key=lambda row: sum(row[1].values()))
    if not cluster.gpu:
        without_save = [max(sum(i.values()) - i["checkpoint"] for _, i in rows) for rows in tables]
        return cpu_verdict(job, peaks, without_save, phase, items)
    limit = cluster.gpu_memory * cluster.usable
    print(f"\na GPU has {cluster.gpu_memory:.1f} GB, {limit:.1f} of them without the allowance")
    node = fullest_node(job, process)
    by_item = ", ".join(f"{item} {size / 1e9:.1f}" for item, size in node.items())
    total = sum(node.values()) / 1e9
    print(f"host memory of the fullest node in GB, all its ranks: {by_item}; sum {total:.1f}")
    print(f"largest --micro-batch-tokens that fits: {largest_micro_batch(job):,}")
    if sum(items.values()) / 1e9 > limit:
        return refusal(job, f'the phase "{phase}" takes', items, limit, "a GPU has")
    room = (cluster.host_memory or math.inf) * cluster.usable
    return refusal(job, "a node's ranks take", node, room, "its host has") if total > room else None


def print_models(job: Job, name: str) -> None:
    """Print machines, layout, precision and models."""
    cluster, layout = job.cluster, job.layout
    keys = ("tp", "cp", "pp", *(["vp"] if layout.vp > 1 else []), "dp")
    grid = " x ".join(f"{key} {getattr(layout, key)}" for key in keys)
    processes = f"{cluster.gpus_per_node} {'GPU' if cluster.gpu else 'CPU process'}s"
    precision = "bf16" if layout.item == 2 else "fp32"
    print(f"{name}: {cluster.nodes} nodes x {processes} ({grid}), {precision}")
    for kind, models in (("trained", job.trained), ("frozen", job.frozen)):
        for label, arch in models.items():
            whole = memory.weights(arch, RankShape(layout.item, layout.gpu))
            print(f"{kind}: {label}, {arch.family} with {whole / 1e9:.3f} G weights")


def table(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Phases and their items in GB, without items that are 0 in all; the peak is marked."""
    columns = [item for item in ITEMS if any(items[item] > 0 for _, items in rows)]
    peak = max(sum(items.values()) for _, items in rows)
    lines = [f"{'GB':<18}" + "".join(f"{item:>12}" for item in (*columns, "sum"))]
    for name, items in rows:
        total = sum(items.values())
        sizes = "".join(f"{size / 1e9:>12.2f}" for size in (*(items[item] for item in columns), total))
        lines.append(f"{name:<18}{sizes}{'  <- peak' if total == peak else ''}")
    return "\n".join(lines)


def largest_micro_batch(job: Job) -> int:
    """Largest --micro-batch-tokens that fits a GPU, a multiple of 1024 up to 256 x 1024; 0: none fits."""

    def exceeds(thousands: int) -> bool:
        batch = replace(job.config.batch, micro_batch_tokens=1024 * thousands)
        return not replace(job.config, batch=batch).plan(job.cluster).fits()

    return 1024 * bisect.bisect_left(range(1, 257), True, key=exceeds)


def simulation(job: Job) -> str:
    """Seconds of each phase of a step, by item, on the pipeline stage that takes longest, and their sum."""
    stages = [replace(job.layout, stage=stage) for stage in range(job.layout.pp)]
    phases = [[(p.name, step_time.seconds(job, s, p)) for p in job.phases(s)] for s in stages]
    rows = [max(of_stages, key=lambda row: sum(row[1].values())) for of_stages in zip(*phases, strict=True)]
    rows = [(name, items) for name, items in rows if items]
    columns = [item for item in step_time.ITEMS if any(items.get(item) for _, items in rows)]
    lines = [f"{'seconds of a step':<18}" + "".join(f"{item:>15}" for item in (*columns, "sum"))]
    for name, items in rows:
        sizes = (*(items.get(item, 0.0) for item in columns), sum(items.values()))
        lines.append(f"{name:<18}" + "".join(f"{size:>15.3f}" for size in sizes))
    total = sum(sum(items.values()) for _, items in rows)
    return "\n".join([*lines, f"a step takes {total:.2f} s, estimated; no estimate was compared with a GPU"])


def refusal(job: Job, subject: str, items: Mapping[str, float], limit: float, owner: str) -> str:
    """Explain a run that does not fit: its largest item, and flags that make it or another one smaller."""
    total, by_size = sum(items.values()), sorted(items, key=lambda item: items[item], reverse=True)
    useless = {"--offload on"} if job.offloads or job.offload is None else {"--offload off"}
    if job.config.model.recompute == "full":
        useless.add("--recompute full")
    large = [item for item in by_size if items[item] > total / 10]
    flags = {item: [flag for flag in REMEDIES[item] if flag not in useless] for item in large}
    remedies = "; ".join(f"{item}: {', '.join(names)}" for item, names in flags.items() if names)
    largest = by_size[0]
    return (
        f"{subject} {total / 1e9:.1f} GB of the {limit:.1f} GB that {owner} for it. The largest item is "
        f"{largest}, {items[largest] / 1e9:.1f} GB. What would help, by item: {remedies}"
    )


def cpu_verdict(
    job: Job, peaks: Sequence[float], without_save: Sequence[float], phase: str, items: Mapping[str, float]
) -> str | None:
    """Check on CPUs that all ranks of a node together fit into its memory; returns as `report`.

    `peaks`, `without_save`: of each stage, with and without a save; `phase`, `items`: of the highest peak.
    """
    cluster = job.cluster
    assert cluster.host_memory is not None
    sizes = [peaks[stage] if writes else without_save[stage] for stage, writes in ranks(job)]
    node = cluster.gpus_per_node
    fullest = max(sum(sizes[i : i + node]) for i in range(0, cluster.world, node))
    limit = cluster.host_memory * cluster.usable
    print(f"\na node has {cluster.host_memory:.1f} GB, {limit:.1f} of them without the allowance;")
    print(f"its processes take {fullest / 1e9:.1f} GB together at most")
    if fullest / 1e9 <= limit:
        return None
    return refusal(job, f'the phase "{phase}" takes', items, limit / node, "each process of a node has")


def main(arguments: Sequence[str]) -> None:
    """Raises SystemExit with the reason if the run does not fit."""
    console.adapt()
    with one_line():
        if not arguments or arguments[0] in ("-h", "--help"):
            parse(Cluster, ["--help"], PROG, __doc__)
        own, path, script_flags = split(arguments)
        cluster = parse(Cluster, own, PROG, __doc__)
        config = parse(load_script(path).Config, script_flags, str(path))
        job = config.plan(cluster)
        reason = report(job, path.name)
        if cluster.simulate:
            print("\n" + simulation(job))
    if reason:
        raise SystemExit(f"does not fit: {reason}")
    print("it fits")


if __name__ == "__main__":
    main(sys.argv[1:])
