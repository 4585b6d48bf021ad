"""Runs that are stopped or killed and started again: their commands, and all that they leave."""

import contextlib
import hashlib
import io
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from align.tracking.output import complete_checkpoints
from align.training import checkpoint
from tests.support.files import reproducible_metrics
from tests.support.launch import Launcher

STEPS, SAVE_INTERVAL = 32, 8  # an epoch has 20


@dataclass(frozen=True)
class Case:
    """A command that is killed at the first `usual` of `kinds`, unless RESUME_KILLS says how many.

    No kind may come when too few steps are left for it: "steps" makes one more checkpoint, "save" none. In
    flags, {judge} is the folder of `toy_judge`.
    """

    script: str
    flags: str
    usual: int
    kinds: str

    def words(self, judge: Path) -> list[str]:
        """Its flags, word by word."""
        return self.flags.format(judge=judge).split()

    def kinds_of_kills(self) -> list[str]:
        """Kinds of kills of this run, in order."""
        return self.kinds.split()[: int(os.environ.get("RESUME_KILLS", self.usual))]


SELF_REWARD = (  # its --max-epochs, --lr and --micro-batch-tokens win over those of `command`
    "--model {judge}/hf --train-data {judge}/data/train.jsonl --val-data {judge}/data/val.jsonl "
    "--judge-template {judge}/data/judge.txt --meta-judge-template {judge}/data/meta_judge.txt --meta-judge "
    "--meta-judge-fraction 0.4 --samples-per-prompt 2 --judgements 2 --temperature 0.8 --rollout-ahead 3 "
    "--max-new-tokens 38 --sft-weight 0.1 --val-batches 1 --max-epochs 1 --lr 1e-4 --micro-batch-tokens 256"
)
CASES = {  # bf16: main weights in fp32
    "sft": Case(
        "train_sft.py", "--precision bf16", 2, "save steps start steps save start steps start save export"
    ),
    "sft_lora": Case(
        "train_sft.py",
        "--precision bf16 --lora-rank 4 --lora-targets q_proj v_proj gate_proj down_proj",
        1,
        "save steps start steps save start steps start save export",
    ),
    "rm": Case(
        "train_rm.py", "--precision bf16", 1, "save steps start steps save start steps start save export"
    ),
    "dpo": Case("train_dpo.py", "", 2, "reference steps save start steps start save steps start export"),
    "rs": Case(
        "train_rs.py", "--deterministic", 1, "steps save start steps start save steps start save export"
    ),
    "ppo": Case(
        "train_ppo.py",
        "--deterministic --critic-lr 1e-3 --kl-target 0.1 --kl-horizon 100",
        2,
        "save steps start steps save start steps start save export",
    ),
    "ppo_lora": Case(
        "train_ppo.py",
        "--deterministic --critic-lr 1e-3 --lora-rank 4 --kl-coef 0.1",
        1,
        "steps save start steps start save steps start save export",
    ),
    "self_reward": Case(
        "train_self_reward.py",
        f"--deterministic {SELF_REWARD} --steps-per-iteration 14 --iterations 3",
        1,
        "steps save start steps start save steps start save export",
    ),
    "self_reward_lora": Case(
        "train_self_reward.py",
        f"--deterministic {SELF_REWARD} --steps-per-iteration 14 --iterations 3 --lora-rank 4 --lr 1e-3",
        1,
        "steps save start steps start save steps start save export",
    ),
}
COMPARISONS = ("train_rm.py", "train_dpo.py")
LAST = {
    "rm": 18,
    "dpo": 24,
    "dpo_lora": 20,
    "rs": 24,
    "ppo": 20,
}  # steps of the runs that go on in another layout
ROLLOUTS = (  # two updates in a step; hardly an answer of the random tiny model ends
    "--prompts-per-step 4 --truncated keep --global-batch-size 4 --max-prompt-len 48 "
    "--reward-fn tests.support.rewards:reward"
)
BATCHES = {  # by script, else TEXTS
    "train_self_reward.py": "--global-batch-size 4 --max-seq-len 36",
    "train_rs.py": f"{ROLLOUTS} --samples-per-prompt 4 --keep-top 2 --max-new-tokens 12",
    "train_ppo.py": f"{ROLLOUTS} --samples-per-prompt 2 --max-new-tokens 6 --val-batches 1",
    "train_grpo.py": f"{ROLLOUTS} --samples-per-prompt 2 --max-new-tokens 6 --val-batches 1",
}
TEXTS = "--global-batch-size 4 --max-seq-len 64"


def command(script: str, data: Path, output: Path, *more: object) -> list[str]:
    """A script with flags: the tiny model, big steps, validations at other steps than saves."""
    kind = "_comparisons" if script in COMPARISONS else ""
    common = (
        f"{script} --train-data {data}/train{kind}.jsonl --val-data {data}/val{kind}.jsonl --output {output} "
        f"{BATCHES.get(script, TEXTS)} --micro-batch-tokens 128 --max-epochs 2 --max-steps {STEPS} --lr 1e-3 "
        f"--warmup-steps 3 --save-interval {SAVE_INTERVAL} --val-interval 10"
    )
    return [*common.split(), *map(str, more)]


def printed(output: Path) -> Path:
    """File with what the last run that was started in OUTPUT prints."""
    return output.with_suffix(".out")


def steps_printed(output: Path) -> int:
    """Steps that the last run of OUTPUT has printed, itself and not one before it."""
    return sum(line.startswith("step ") for line in printed(output).read_text().splitlines())


def wait_for(happened: Callable[[], object], launcher: subprocess.Popen | Launcher, output: Path) -> None:
    """Wait until something happens in a run; fail if the run ends before."""
    end = time.monotonic() + 200
    while not happened():
        assert launcher.poll() is None, f"ended too early:\n{printed(output).read_text()[-8000:]}"
        assert time.monotonic() < end, f"never happened:\n{printed(output).read_text()[-8000:]}"
        time.sleep(0.0002)  # an export of the tiny model takes a few milliseconds


def finish(launcher: subprocess.Popen | Launcher, output: Path) -> None:
    """Wait for the end of a run, which must be a good one."""
    assert launcher.wait(timeout=300) == 0, printed(output).read_text()[-8000:]


def ranks(launcher: subprocess.Popen | Launcher) -> list[psutil.Process]:
    """The processes that a launcher has started, rank 0 first."""
    return sorted(psutil.Process(launcher.pid).children(recursive=True), key=lambda process: process.pid)


def samples(output: Path) -> str | None:
    """samples.jsonl, None for a script that writes none."""
    path = output / "samples.jsonl"
    return path.read_text() if path.exists() else None


def kept(output: Path) -> list[str]:
    """Names of the checkpoints of a run."""
    return [path.name for path in complete_checkpoints(output / "checkpoints")]


def fingerprint(output: Path) -> dict[str, str]:
    """sha256 by name of all that the newest checkpoint holds, and of the files of model and adapter."""
    path = checkpoint.newest(output / "checkpoints")
    state = contents(path)
    for folder in path.iterdir():
        if folder.is_dir():  # of another model
            state |= {f"{folder.name}/{name}": value for name, value in contents(folder).items()}
    state |= {file.name: file.read_bytes() for file in path.glob("*.json") if file.name != "state.json"}
    state["state.json"] = {k: v for k, v in checkpoint.read_state(path).items() if k != "files"}
    for folder in ("hf", "adapter"):
        state |= {f"{folder}/{file.name}": file.read_bytes() for file in (output / folder).glob("*")}
    return {name: sha256(value) for name, value in state.items()}


def contents(path: Path) -> dict[str, object]:
    """All that a checkpoint holds of one model in training."""
    reader = dcp.FileSystemReader(path)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else io.BytesIO()
        for name, entry in reader.read_metadata().state_dict_metadata.items()
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return {**state, "common": dist_checkpointing.load_common_state_dict(str(path))}


def sha256(value: object) -> str:
    """Hash of a tensor's bits, of bytes, or of nested containers of numbers and tensors."""
    if isinstance(value, torch.Tensor):
        value = (
            str((value.dtype, value.shape)).encode()
            + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    if isinstance(value, dict):
        value = [(name, sha256(value[name])) for name in sorted(value)]
    elif isinstance(value, list | tuple):
        value = [sha256(item) for item in value]
    return hashlib.sha256(value if isinstance(value, bytes) else repr(value).encode()).hexdigest()


def assert_same_end(output: Path, expected: Path) -> None:
    """Weights, main weights, Adam, random states, metrics, samples and exported model, bit for bit."""
    assert reproducible_metrics(output) == reproducible_metrics(expected)
    assert samples(output) == samples(expected)
    actual, expected_ = fingerprint(output), fingerprint(expected)
    trained = norm = "decoder.final_layernorm.weight"
    if (expected / "adapter").exists():
        trained = "decoder.layers.mlp.linear_fc2.lora_A"
        assert "adapter/adapter_model.safetensors" in expected_
        whole = ("critic/", "adapter/", "hf/")  # the critic has no adapters
        assert not [name for name in expected_ if ".weight" in name and not name.startswith(whole)]
    moment = f"optimizer.state.exp_avg_sq.{trained}"
    assert {moment, "rng/shard_1_2", "state.json", "hf/model.safetensors"} <= set(expected_)
    has_critic = any("train_optim/critic_loss" in row for row in reproducible_metrics(expected))
    critic = {f"critic/optimizer.state.exp_avg_sq.{norm}", "critic/score.weight"}
    assert (critic <= set(expected_)) == has_critic
    rewards_itself = any("train/iteration" in row for row in reproducible_metrics(expected))
    reference = {f"reference/{trained}", "judgements.json"}
    assert (reference <= set(expected_)) == rewards_itself
    assert actual == expected_


def assert_ledger_closed(output: Path) -> None:
    """Assert that each prompt of a pass is used once, and that every sampled token has one fate.

    Metrics and the checkpoint's record of used rows, against the permutation of the pass; no effect on a run
    that samples nothing.
    """
    rows = [row for row in reproducible_metrics(output) if "ledger/pass" in row]
    if not rows:
        return
    state = checkpoint.read_state(checkpoint.newest(output / "checkpoints"))
    data = state["identity"]["data"]
    size, pass_steps = data["rows_per_step"], data["rows"] // data["rows_per_step"]
    places = [divmod(step, pass_steps) for step in range(STEPS)]
    used = [(row["step"], row["ledger/pass"], row["ledger/prompts_used"]) for row in rows]
    assert used == [(step + 1, n, size * (place + 1)) for step, (n, place) in enumerate(places)]
    number, place = places[-1]
    order = np.random.default_rng([data["seed"], number]).permutation(data["rows"])[: size * (place + 1)]
    assert state["prompts_used"] == {"prompts": len(order), "checksum": sum((int(i) + 1) ** 2 for i in order)}
    counts = [{name: x for name, x in row.items() if name.startswith("ledger/tokens_")} for row in rows]
    sums = {name: sum(row[name] for row in counts) for name in counts[0]}
    sampled, waiting = sums.pop("ledger/tokens_sampled"), counts[-1].get("ledger/tokens_waiting", 0)
    sums.pop("ledger/tokens_waiting", None)
    assert sampled == sum(sums.values()) + waiting
    assert sampled > 0 and sums["ledger/tokens_trained"] > 0


def kill_all(launcher: subprocess.Popen | Launcher, output: Path) -> None:
    """kill -9 of the launcher and its ranks."""
    psutil.Process(launcher.pid).suspend()  # so that it starts no rank after they were listed
    family = [psutil.Process(launcher.pid), *ranks(launcher)]
    for process in family:
        process.kill()
    launcher.wait()
    psutil.wait_procs(family)
    time.sleep(0.2)
    assert not [process for process in psutil.process_iter() if writes(process, printed(output))]


def writes(process: psutil.Process, path: Path) -> bool:
    """Whether a process has a file open: all that a launcher starts print to one."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return str(path) in {file.path for file in process.open_files()}
    return False


def self_reward_run(data: Path, judge: Path, output: Path) -> list:
    """A short run, saved after step 8, where an iteration of six steps and two of the next are over."""
    flags = f"{SELF_REWARD} --steps-per-iteration 6 --iterations 2".format(judge=judge)
    return ["train_self_reward.py", data, output, *flags.split()]
