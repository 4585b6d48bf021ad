"""The batch files on a real Slurm: its controller and the daemons of two nodes, all on this machine.

`make test-slurm` runs it. Its name keeps it out of `make test`, which must pass without Slurm.

The nodes are called by addresses of the loopback interface, so that no name has to be added to /etc/hosts.
Each has one "GPU", which is /dev/null, and a stand-in for nvidia-smi; training runs on the CPU.
"""

import contextlib
import ctypes
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import pytest

from tests.support.files import ROOT

BIN = Path(sys.executable).parent  # torchrun is installed beside python
NODES = ("127.0.0.1", "127.0.0.2")
DAEMONS = ("slurmctld", "slurmd")
FINAL = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")  # states that a job does not leave
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"  # not on the PATH of every user
TIMEOUT_S = 300  # of each run; about 30 are enough on two quiet cores
SFT = ["--global-batch-size", "4", "--val-batches", "1", "--save-interval", "2"]
PPO = ["--prompts-per-step", "4", "--global-batch-size", "4", "--max-new-tokens", "4", "--val-batches", "1"]
PPO += ["--critic-lr", "1e-5", "--reward-fn", "tests.real_slurm:reward"]
CHANGED = "--resume-with-changes"  # --max-steps decides the learning rate
PPO += ["--truncated", "keep", "--max-steps", "10"]
# the partition is the batch files' placeholder, which makes them valid as they are
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
# a requeued job waits this long
AuthInfo=cred_expire=5
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
# minutes of grace: a loaded machine is no failure
OverTimeLimit=2
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} Gres=gpu:1
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} Gres=gpu:1
PartitionName=YOUR_PARTITION Nodes=ALL Default=YES State=UP
"""


def reward(prompt: str, response: str, row: dict) -> float:
    """Score a response by its length. Takes SLOW_S seconds, but in a job that Slurm has requeued."""
    if "SLURM_RESTART_COUNT" not in os.environ:
        time.sleep(float(os.environ.get("SLOW_S", "0")))
    return float(len(response))


# --------------------------------------------------------------------------- the cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start the daemons, yield an environment in which Slurm's commands reach them, then stop all."""
    folder = tmp_path_factory.mktemp("slurm")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment["PATH"] = f"{folder}/bin:{BIN}:{environment['PATH']}:{SBIN}"
    for name in DAEMONS:
        assert shutil.which(name, path=environment["PATH"]), f"{name} is missing: apt-get install slurm-wlm"
    environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    write_config(folder)
    commands = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    with contextlib.ExitStack() as stack:
        for number, command in enumerate(commands):
            stack.enter_context(daemon(command, environment, folder / f"daemon{number}.log"))
        wait_for(lambda: query(environment, "sinfo", "--noheader", "--format=%D %t") == "2 idle", folder)
        yield environment
        subprocess.run(["scancel", "--user", getpass.getuser()], env=environment)
        wait_for(lambda: query(environment, "squeue", "--noheader") == "", folder)


def write_config(folder: Path) -> None:
    """Write slurm.conf, gres.conf and the stand-in for nvidia-smi; make the nodes' directories."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(1 + len(NODES))]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    host = socket.gethostname().split(".")[0]
    values = dict(folder=folder, host=host, user=getpass.getuser(), nodes=NODES, ports=ports)
    (folder / "slurm.conf").write_text(CONFIG.format(**values, cpus=os.cpu_count()))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null Flags=no_gpu_env\n")
    for name in ("bin", *NODES):
        (folder / name).mkdir()
    (folder / "bin/nvidia-smi").write_text("#!/bin/bash\necho 0, 4, 0\n")
    (folder / "bin/nvidia-smi").chmod(0o755)


def spawn(command: Sequence[str], environment: dict[str, str], output: IO | int) -> subprocess.Popen:
    """Start a program that ends when pytest dies, however that dies."""
    pr_set_pdeathsig = 1  # from linux/prctl.h
    return subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM),
    )


@contextlib.contextmanager
def daemon(command: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    """Run a daemon in the foreground, during the body."""
    with log.open("wb") as file:
        process = spawn(command, environment, file)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


def query(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()


def wait_for(condition: Callable[[], bool], folder: Path, timeout_s: float = TIMEOUT_S) -> None:
    """Poll until the condition holds; a failure shows the last lines of the files in `folder`."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            paths = sorted([*folder.glob("*.log"), *folder.glob("*.out"), *folder.glob("*/slurm/*")])
            texts = [f"--- {path}\n" + path.read_text(errors="replace")[-3000:] for path in paths]
            pytest.fail(f"nothing after {timeout_s} s\n" + "\n".join(texts))
        time.sleep(0.2)


# --------------------------------------------------------------------------- a user of it


@pytest.fixture
def job(cluster, tmp_path) -> dict[str, str]:
    """Environment of a user who trains the tiny model."""
    command = [sys.executable, "prepare_data.py", "toy", "--output", tmp_path / "data"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    data = {"TRAIN_DATA": str(tmp_path / "data/train.jsonl"), "VAL_DATA": str(tmp_path / "data/val.jsonl")}
    return cluster | data | {"MODEL": "tiny", "OUTPUT": str(tmp_path / "run")}


def sbatch(job: dict[str, str], *words: str) -> str:
    """Submit to both nodes and return the job's number; its log is beside OUTPUT."""
    log = Path(job["OUTPUT"]).parent / "%j.out"
    command = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=1", f"--output={log}", *words]
    result = subprocess.run(command, env=job, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def terminal(
    job: dict[str, str], *command: str, meanwhile: Callable[[], None] = lambda: None
) -> tuple[int, str]:
    """Run srun or salloc as in a terminal; returns its status and what it prints."""
    process = spawn(command, job, subprocess.PIPE)
    try:
        meanwhile()
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    return process.returncode, output


def state(job: dict[str, str], number: str) -> dict[str, str]:
    """Fields of a job that Slurm knows."""
    words = query(job, "scontrol", "--oneliner", "show", "job", number).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def ended(job: dict[str, str], number: str) -> tuple[str, str]:
    """Wait for a job's end; returns its state and its log."""
    folder = Path(job["OUTPUT"]).parent
    wait_for(lambda: state(job, number)["JobState"] in FINAL, folder)
    return state(job, number)["JobState"], (folder / f"{number}.out").read_text()


def steps(job: dict[str, str]) -> list[int]:
    """The logged steps of the run in OUTPUT."""
    path = Path(job["OUTPUT"]) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [
        json.loads(line)["step"] for line in lines if line.endswith("\n")
    ]  # the last one may be half-written


def processes(**variables: str) -> list[int]:
    """Ids of the processes with these environment variables."""
    wanted, pids = {f"{name}={value}".encode() for name, value in variables.items()}, []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted <= set(path.read_bytes().split(b"\0")):
                pids.append(int(path.parent.name))
    return pids


def kill_rank_1(job: dict[str, str]) -> None:
    """Kill the training process of the second node once there is a checkpoint; wait until all others end."""
    folder, output = Path(job["OUTPUT"]).parent, {"OUTPUT": job["OUTPUT"]}
    wait_for(lambda: len(steps(job)) > 4, folder)
    [pid] = processes(RANK="1", **output)
    os.kill(pid, signal.SIGKILL)
    wait_for(
        lambda: not [*processes(RANK="0", **output), *processes(RANK="1", **output)], folder, timeout_s=60
    )


def assert_complete(job: dict[str, str], num_steps: int) -> None:
    """Every step was logged exactly once, both nodes took part, and the finished model is there."""
    output = Path(job["OUTPUT"])
    assert steps(job) == list(range(num_steps + 1))
    assert "2 processes" in (output / "log.txt").read_text()
    assert (output / "hf/config.json").is_file()


# --------------------------------------------------------------------------- sbatch


def test_sbatch_names_the_node_of_a_killed_process_and_the_next_job_continues(job):
    number = sbatch(job, "slurm/sft.sbatch", *SFT, "--max-steps", "2000")
    kill_rank_1(job)
    outcome, log = ended(job, number)
    assert outcome == "FAILED"
    assert log.count(": 1 GPUs, sound and free") == 2
    assert "srun: error: 127.0.0.2: task 1: " in log
    assert "Signal 9 (SIGKILL) received by PID" in (Path(job["OUTPUT"]) / f"slurm/{number}-1.err").read_text()
    assert state(job, number)["Restarts"] == "0" and "complete" not in log

    done = steps(job)[-1]
    number = sbatch(job, "slurm/sft.sbatch", *SFT, "--max-steps", str(done + 1), CHANGED)
    outcome, log = ended(job, number)
    assert outcome == "COMPLETED", log
    assert f"complete: {job['OUTPUT']}/hf" in log
    assert "continuing after step" in (Path(job["OUTPUT"]) / "log.txt").read_text()
    assert_complete(job, done + 1)


def test_sbatch_is_requeued_at_its_time_limit_and_completes(job):
    number = sbatch(job | {"SLOW_S": "1", "MARGIN_S": "50"}, "--time=1", "slurm/ppo.sbatch", *PPO)
    wait_for(lambda: state(job, number)["Restarts"] == "1", Path(job["OUTPUT"]).parent)
    subprocess.run(["scontrol", "update", f"JobId={number}", "TimeLimit=10"], env=job, check=True)
    done = steps(job)[-1]
    assert 1 <= done < 10
    outcome, log = ended(job, number)
    assert outcome == "COMPLETED", log
    assert "stopped before the end: requeue to continue" in log
    assert state(job, number)["Restarts"] == "1"
    assert f"continuing after step {done}\n" in (Path(job["OUTPUT"]) / "log.txt").read_text()
    assert_complete(job, 10)


# --------------------------------------------------------------------------- srun


def test_srun_stops_at_the_time_limit_and_the_same_command_completes(job):
    srun, script = ["srun", "--nodes=2", "--gpus-per-node=1"], ["slurm/ppo.sbatch", *PPO]
    status, output = terminal(job | {"SLOW_S": "1", "MARGIN_S": "50"}, *srun, "--time=1", *script)
    assert status == 75, output
    assert "stopped before the end: give the same command again to continue" in output
    assert 1 <= steps(job)[-1] < 10
    status, output = terminal(job, *srun, "--time=10", *script)
    assert status == 0, output
    assert "at most MARGIN_S=900 s: training stops after half of it" in output
    assert f"complete: {job['OUTPUT']}/hf" in output
    assert_complete(job, 10)


def test_srun_inside_salloc(job):
    """Several tasks per node, which salloc passes on, are refused; the flags that are named instead work."""
    salloc = ["salloc", "--nodes=2", "--gpus-per-node=1"]
    several, script = [*salloc, "--ntasks-per-node=2", "srun"], ["slurm/sft.sbatch", *SFT, "--max-steps"]
    status, output = terminal(job, *several, *script, "2000")
    assert status == 1
    [advice] = [line for line in output.splitlines() if "tasks" in line and "srun: error" not in line]
    assert advice.startswith("4 tasks on 2 nodes") and advice.endswith("give srun --nodes=2 --ntasks=2")

    one_each = [*several, "--nodes=2", "--ntasks=2", *script, "2000"]
    status, output = terminal(job, *one_each, meanwhile=lambda: kill_rank_1(job))
    assert status != 0
    assert "127.0.0.2: torchrun ended with status 1" in output
    assert "Signal 9 (SIGKILL) received by PID" in output

    done = steps(job)[-1]
    status, output = terminal(job, *salloc, "srun", *script, str(done + 1), CHANGED)
    assert status == 0, output
    assert "continuing after step" in output
    assert_complete(job, done + 1)


def test_srun_without_gpus_says_what_to_give(job):
    status, output = terminal(job, "srun", "--nodes=2", "slurm/sft.sbatch")
    assert status == 1
    assert output.count("no GPUs: give --gpus-per-node or PROCESSES_PER_NODE") == 1
