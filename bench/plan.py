"""Memory of runs on CPUs, estimated by tools.plan and measured: each phase's peak, the highest of all ranks.

    python bench/plan.py                    # all cases
    python bench/plan.py --only sft ppo_on

Models are random, with some 50 to 115 million weights. Measured is resident memory with each larger tensor
mapped by itself (plan_cases.py: "exact"): the sum of all allocations of a moment, which tools.plan
computes. --allocator run measures with glibc as runs have it: it keeps freed memory, with gaps between
tensors, so a phase's peak includes all phases before it. The allowance for CPUs is for that.

A random model judges nothing, and its answers are no text: of self-rewarding only sampling and saving are
compared.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from align import command_line  # noqa: E402
from align.planning.phases import Cluster, on_device  # noqa: E402
from bench import plan_cases  # noqa: E402
from tools import plan  # noqa: E402

LARGE = dict(
    vocab_size=16384,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=64,
)
SMALL = LARGE | dict(vocab_size=8192, hidden_size=640, num_hidden_layers=8, num_attention_heads=8)
TIED = LARGE | dict(vocab_size=49152, tie_word_embeddings=True)
LENGTH, PROMPT = 512, 128  # tokens of the rows, and of the prompts

SFT = "train_sft.py --model {large} --train-data {data}/rows.jsonl --loss-on all {rows}"
DPO = "train_dpo.py --model {large} --train-data {data}/pairs.jsonl {pairs}"
SAMPLED = (
    "--train-data {data}/prompts.jsonl --model {small} --max-prompt-len 128 --max-new-tokens 128 "
    "--micro-batch-tokens 2048 --max-steps 1 --truncated keep"
)
PPO = f"train_ppo.py {SAMPLED} --reward-model {{small_rm}} --prompts-per-step 16 --global-batch-size 16"
RS = (
    f"train_rs.py {SAMPLED} --reward-model {{small_rm}} --prompts-per-step 8 --samples-per-prompt 2 "
    "--global-batch-size 8"
)
CASES = {  # name: processes, command
    "sft": (1, SFT),
    "sft_bf16": (1, f"{SFT} --precision bf16"),
    "sft_full": (1, f"{SFT} --recompute full"),
    "sft_selective": (1, f"{SFT} --recompute selective"),
    "sft_tied": (1, SFT.replace("{large}", "{tied}")),
    "sft_tp2": (2, f"{SFT} --tp 2"),
    "sft_sequence_parallel": (2, f"{SFT} --tp 2 --sequence-parallel"),
    "sft_pp2": (2, f"{SFT} --pp 2"),
    "sft_cp2": (2, f"{SFT} --cp 2"),
    "sft_dp2": (2, SFT),
    "sft_dp2_full": (2, f"{SFT} --recompute full"),
    "dpo_swap": (1, f"{DPO} --reference swap"),
    "rm": (1, DPO.replace("train_dpo", "train_rm")),
    "ppo_off": (1, f"{PPO} --offload off"),
    "ppo_on": (1, f"{PPO} --offload on"),
    "ppo_tp2_on": (2, f"{PPO} --offload on --tp 2"),
    "grpo": (
        1,
        f"train_grpo.py {SAMPLED} --reward-model {{small_rm}} --samples-per-prompt 7 "
        "--prompts-per-step 4 --global-batch-size 28",
    ),
    "rs": (1, RS),
    "rs_tp2": (2, f"{RS} --tp 2"),
    "self_reward": (
        1,
        "train_self_reward.py --model {small} --train-data {data}/tasks.jsonl --judge-template {judge} "
        "--max-seq-len 128 --max-new-tokens 128 --micro-batch-tokens 2048 --global-batch-size 8 "
        "--iterations 1 --steps-per-iteration 1",
    ),
}
SIZES = {  # micro-batches are full: 4 rows of 512, or 2 pairs of 512 a side, of which 256 are the prompt
    "rows": "--global-batch-size 8 --micro-batch-tokens 2048 --max-seq-len 512 --max-steps 2",
    "pairs": "--global-batch-size 4 --micro-batch-tokens 1536 --max-seq-len 512 --max-steps 2",
}


@dataclass(frozen=True)
class Config:
    """Flags of this benchmark."""

    only: tuple[str, ...] = ()
    """names of cases (default: all)"""
    allocator: Literal["exact", "run"] = "exact"
    """allocator of the measured run: see above"""
    json: Path | None = None
    """file of all figures"""


def prepare(directory: Path) -> dict[str, str]:
    """Write models and data. Returns their names in the cases' commands."""
    models = {"large": (0, LARGE), "tied": (0, TIED), "small": (0, SMALL), "small_rm": (1, SMALL)}
    for name, (labels, sizes) in models.items():
        plan_cases.write_model(directory / name, labels, **sizes)
    plan_cases.write_data(directory / "data", 32, LENGTH, PROMPT)
    (directory / "judge.txt").write_text("{{ prompt }} {{ response }}")
    places = {name: str(directory / name) for name in (*models, "data")}
    return {**places, **SIZES, "judge": str(directory / "judge.txt")}


def measured(processes: int, command: list[str], allocator: str, directory: Path) -> list[dict[str, float]]:
    """Run a script. Returns GB by phase of each rank."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with tempfile.TemporaryDirectory(dir=directory) as out:
        worker = [str(ROOT / "bench" / "plan_cases.py"), out, allocator]
        done = subprocess.run(
            [*start, *worker, *command, "--output", f"{out}/run"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{command} failed:\n{done.stderr[-3000:]}")
        return [json.loads(Path(out, f"{rank}.json").read_text()) for rank in range(processes)]


def planned(processes: int, command: list[str], process: float) -> list[dict[str, float]]:
    """Estimate GB by phase of each pipeline stage. `process`: GB of the process itself."""
    cluster = Cluster(gpus_per_node=processes, device="cpu", host_memory=1000)
    script = plan.load_script(ROOT / command[0])
    job = command_line.parse(script.Config, command[1:]).plan(cluster)
    stages = [replace(job.layout, stage=stage) for stage in range(job.layout.pp)]
    return [
        {p.name: sum(on_device(job, s, p, process * 1e9).values()) / 1e9 for p in job.phases(s)}
        for s in stages
    ]


def compare(case: str, process: float, names: dict[str, str], config: Config, directory: Path) -> list[dict]:
    """Plan and measurement in GB of each measured phase of a case, the highest of all ranks."""
    processes, line = CASES[case]
    command = line.format(**names).format(**names).split()
    ranks = measured(processes, command, config.allocator, directory)
    stages = planned(processes, command, process)
    phases = [phase for phase in stages[0] if phase != "judge" and any(phase in rank for rank in ranks)]
    return [
        {
            "case": case,
            "phase": phase,
            "plan": max(stage[phase] for stage in stages),
            "measured": max(rank.get(phase, 0.0) for rank in ranks),
        }
        for phase in phases
    ]


def main(config: Config) -> None:
    """Print plan, measurement and their ratio for each phase of each case."""
    alone = "from tools import plan; plan.load_script(plan.Path('train_ppo.py')); print(plan.process_bytes())"
    process = float(subprocess.run([sys.executable, "-c", alone], cwd=ROOT, capture_output=True).stdout) / 1e9
    print(f"plan's own process: {process:.3f} GB; all in GB")
    print(f"{'':<22}{'phase':<20}{'plan':>8}{'measured':>10}{'ratio':>8}")
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as directory:
        names = prepare(Path(directory))
        for case in config.only or CASES:
            for row in compare(case, process, names, config, Path(directory)):
                ratio = row["plan"] / row["measured"]
                sizes = f"{row['plan']:>8.3f}{row['measured']:>10.3f}{ratio:>8.3f}"
                print(f"{case:<22}{row['phase']:<20}{sizes}", flush=True)
                rows.append(row)
            if config.json:
                config.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
