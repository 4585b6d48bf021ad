"""The batch files with stand-ins for Slurm's programs: what the real Slurm of real_slurm.py cannot show.

That is: exact command lines, containers, GPUs that are not sound, long time limits, many nodes, mistakes.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro

from align.errors import UserError
from tests.support.files import ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
NAMES = [path.stem for path in SCRIPTS]
BIN = Path(sys.executable).parent  # torchrun and shellcheck are installed beside python

# Each stand-in appends its arguments to a file of its own name, then does as much of the real program's work
# as the script needs: srun runs the command that follows its options, torchrun "trains" by running $TRAINING.
STAND_INS = {
    "squeue": 'echo "$TIME_LEFT"',
    "scontrol": "",
    "scancel": "",
    "sleep": "",
    "srun": 'while [[ $1 == -* ]]; do shift; done; SLURM_NODEID=0 exec "$@"',
    "torchrun": 'eval "$TRAINING"',
    "nvidia-smi": 'eval "$GPUS"',
    "hostname": "echo gpu-b7",
    "nproc": "echo ${OMP_NUM_THREADS:-8}",  # as the real one
}
EIGHT_GPUS = 'for index in {0..7}; do echo "$index, 4, 0"; done'
# what srun adds on the second of the last two nodes, in a step of the job
STEP = {"SLURM_STEP_ID": "7", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
STEP |= {"SLURM_STEP_NODELIST": "gpu-a[1-2]", "SLURM_NODEID": "1", "SLURMD_NODENAME": "gpu-a2"}
FIRST = {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURMD_NODENAME": "gpu-a1"}
FINISH = 'mkdir -p "$OUTPUT/hf"; echo "{}" >"$OUTPUT/hf/config.json"'


@pytest.fixture
def job(tmp_path) -> dict[str, str]:
    """Environment of a Slurm job of three nodes in a project of empty scripts, which the tests change."""
    for name in NAMES:
        (tmp_path / f"train_{name}.py").touch()
    (tmp_path / "slurm").mkdir()
    for name in ("launch.sh", "health.sh"):
        shutil.copy(ROOT / "slurm" / name, tmp_path / "slurm")
    (tmp_path / "records").mkdir()
    write_stand_ins(tmp_path / "bin", list(STAND_INS))
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "RECORDS": str(tmp_path / "records"),
        "TIME_LEFT": "4:00:00",
        "TRAINING": FINISH,
        "GPUS": EIGHT_GPUS,
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_NODELIST": "gpu-b7,gpu-a[1-2]",
        "SLURM_GPUS_ON_NODE": "8",
        "MODEL": "models/llama",
        "TRAIN_DATA": "a.jsonl b.jsonl",
        "VAL_DATA": "val.jsonl",
        "OUTPUT": "runs/sft",
    }


def write_stand_ins(folder: Path, names: list[str]) -> None:
    folder.mkdir()
    for name in names:
        record = f'printf "%s\\n" "$@" >>"$RECORDS/{name}"'
        (folder / name).write_text(f"#!/bin/bash\n{record}\n{STAND_INS[name]}\n")
        (folder / name).chmod(0o755)


def submit(
    job: dict[str, str], *flags: str, name: str = "sft", cwd: Path | None = None
) -> subprocess.CompletedProcess:
    """Run a batch file as sbatch does: a copy of it, called slurm_script, in the directory of submission."""
    folder = Path(job["RECORDS"]).parent
    script = shutil.copy(ROOT / f"slurm/{name}.sbatch", folder / "slurm_script")
    return subprocess.run(
        ["bash", script, *flags], env=job, cwd=cwd or folder, capture_output=True, text=True, timeout=300
    )


def step(job: dict[str, str], *flags: str, name: str = "sft") -> subprocess.CompletedProcess:
    """Run a batch file as srun does on one node: the file itself, as a program."""
    command = [ROOT / f"slurm/{name}.sbatch", *flags]
    folder = Path(job["RECORDS"]).parent
    return subprocess.run(command, env=STEP | job, cwd=folder, capture_output=True, text=True, timeout=300)


def arguments(job: dict[str, str], program: str) -> list[str]:
    """Arguments of a stand-in's call; empty if it never ran."""
    path = Path(job["RECORDS"]) / program
    return path.read_text().splitlines() if path.exists() else []


def value(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


def example(path: Path, name: str) -> list[str]:
    """Words of the command in a text that submits a script, in comments or not."""
    lines = re.sub(r"^#? +", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    [command] = [line for line in lines if f"sbatch --nodes 4 slurm/{name}.sbatch " in line]
    return shlex.split(command)


def example_config(name: str) -> object:
    """The configuration that training reads from the command in slurm/README.md."""
    words = example(ROOT / "slurm/README.md", name)
    variables = dict(word.split("=", 1) for word in words[: words.index("sbatch")])
    flags_of_variables = {"MODEL": "--model", "REWARD_MODEL": "--reward-model", "OUTPUT": "--output"}
    flags_of_variables |= {"TRAIN_DATA": "--train-data", "VAL_DATA": "--val-data", "TEST_DATA": "--test-data"}
    flags = [flag for name, text in variables.items() for flag in (flags_of_variables[name], *text.split())]
    flags += words[words.index(f"slurm/{name}.sbatch") + 1 :]
    module = importlib.import_module(f"train_{name}")
    return tyro.cli(module.Config, args=flags, config=(tyro.conf.OmitArgPrefixes,))


# --------------------------------------------------------------------------- the files


@pytest.mark.parametrize(
    "script", [*SCRIPTS, ROOT / "slurm/launch.sh", ROOT / "slurm/health.sh"], ids=lambda path: path.name
)
def test_shellcheck(script):
    shellcheck = shutil.which("shellcheck", path=f"{BIN}:{os.environ['PATH']}")
    assert shellcheck is not None, "shellcheck is missing: pip install -r requirements.txt"
    result = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_sees_every_sbatch_line(script):
    """sbatch stops reading its lines at the first command, and takes nothing but the option from a line."""
    lines = script.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.split()[1:] for line in lines if line.startswith("#SBATCH")]
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])
    assert all(len(option) == 1 for option in options)
    for needed in ("--ntasks-per-node=1", "--requeue", "--open-mode=append", f"--job-name={script.stem}"):
        assert [needed] in options


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_git_has_the_run_bit_that_srun_needs(script):
    listed = subprocess.run(["git", "ls-files", "--stage", script], cwd=ROOT, capture_output=True, text=True)
    assert listed.stdout.startswith("100755 ") if listed.stdout else os.access(script, os.X_OK)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_is_one_that_training_takes(name):
    assert example(ROOT / f"slurm/{name}.sbatch", name) == example(ROOT / "slurm/README.md", name)
    assert example_config(name).parallel.tp == 8


def test_the_example_of_self_rewarding_fits_a_context_of_4096_tokens():
    config = example_config("self_reward")
    config.check_lengths(4096)
    with pytest.raises(UserError, match="--max-seq-len 2048 is beyond the model's context of 2047 tokens"):
        config.check_lengths(2047)
    assert (config.iterations, config.length_control) == (3, (0.0, 0.0, 0.1))
    assert config.meta.meta_judge and config.meta.meta_judge_fraction <= 0.15
    assert config.batch.global_batch_size == 64
    assert (config.optim.lr, config.optim.min_lr) == (3e-7, 1e-7)


# --------------------------------------------------------------------------- the launch


@pytest.mark.parametrize("name", NAMES)
def test_one_torchrun_per_node_meets_at_the_first_node(job, name):
    result = submit(job, "--tp", "8", "--prompt-template", "{input}\\n {output}", name=name)
    assert result.returncode == 0, result.stderr
    srun = arguments(job, "srun")
    per_node = ["--nodes=3", "--ntasks=3", "--ntasks-per-node=1"]
    health = [*per_node, "--kill-on-bad-exit=0", "bash", "slurm/health.sh", "8"]
    assert srun[: len(health)] == health
    options = srun[len(health) : srun.index("-c") - 1]
    assert options == [
        *per_node,
        "--cpu-bind=none",
        "--kill-on-bad-exit=1",
        "--output=runs/sft/slurm/%j-%n.out",
        "--error=runs/sft/slurm/%j-%n.err",
        "--open-mode=append",
    ]
    torchrun = ["--node_rank", "0", "--nnodes", "3", "--nproc_per_node", "8", "--master_addr", "gpu-b7"]
    torchrun += ["--master_port", "24567", "--rdzv_id", "1234567", "--", f"train_{name}.py"]
    flags = ["--model", "models/llama", "--train-data", "a.jsonl", "b.jsonl", "--val-data", "val.jsonl"]
    flags += ["--output", "runs/sft", "--max-time", "03:45:00"]
    flags += ["--tp", "8", "--prompt-template", "{input}\\n {output}"]
    assert arguments(job, "torchrun") == torchrun + flags
    assert (Path(job["RECORDS"]).parent / "runs/sft/slurm").is_dir()


@pytest.mark.parametrize("files", ["easy.jsonl", "easy.jsonl  hard.jsonl", "easy.jsonl\nhard.jsonl\n"])
def test_test_data_goes_to_the_reward_model_before_the_users_flags(job, files):
    result = submit(job | {"TEST_DATA": files}, "--tp", "8", name="rm")
    assert result.returncode == 0, result.stderr
    flags = ["--max-time", "03:45:00", "--test-data", *files.split(), "--tp", "8"]
    assert arguments(job, "torchrun")[-len(flags) :] == flags


@pytest.mark.parametrize("name", ["rs", "ppo"])
@pytest.mark.parametrize(
    "model, variables",
    [("runs/rm/hf", ["--reward-model", "runs/rm/hf"]), ("a b/hf", ["--reward-model", "a b/hf"]), ("", [])],
)
def test_the_reward_model_goes_before_the_users_flags(job, name, model, variables):
    result = submit(job | {"REWARD_MODEL": model}, "--reward-fn", "rules:score", name=name)
    assert result.returncode == 0, result.stderr
    flags = ["--max-time", "03:45:00", *variables, "--reward-fn", "rules:score"]
    assert arguments(job, "torchrun")[-len(flags) :] == flags


def test_templates_of_the_judge_are_arguments_like_any_other(job):
    flags = ["--judge-template", "my judge.txt", "--meta-judge", "--meta-judge-template", "{{ a }} $HOME.txt"]
    flags += ["--length-control", "0", "0", "0.1"]
    result = submit(job | {"REWARD_MODEL": "runs/rm/hf"}, *flags, name="self_reward")
    assert result.returncode == 0, result.stderr
    assert arguments(job, "torchrun")[-len(flags) - 2 :] == ["--max-time", "03:45:00", *flags]


def test_files_on_several_lines_are_all_passed(job):
    result = submit(
        job | {"TRAIN_DATA": "a.jsonl\n  b.jsonl\nc.jsonl\n", "VAL_DATA": "\nval.jsonl\nmore.jsonl"}
    )
    assert result.returncode == 0, result.stderr
    torchrun = arguments(job, "torchrun")
    start, end = torchrun.index("--train-data"), torchrun.index("--output")
    files = ["a.jsonl", "b.jsonl", "c.jsonl", "--val-data", "val.jsonl", "more.jsonl"]
    assert torchrun[start + 1 : end] == files


def test_a_single_node_and_another_number_of_processes(job):
    job |= {"SLURM_JOB_NODELIST": "only", "SLURM_JOB_NUM_NODES": "1"}
    job |= {"PROCESSES_PER_NODE": "2", "RDZV_PORT": "29500"}
    assert submit(job).returncode == 0
    torchrun = arguments(job, "torchrun")
    assert value(torchrun, "--nnodes") == "1"
    assert value(torchrun, "--nproc_per_node") == "2"
    assert (value(torchrun, "--master_addr"), value(torchrun, "--master_port")) == ("only", "29500")


def test_a_node_list_longer_than_a_pipe_is_no_failure(job):
    job["SLURM_JOB_NODELIST"] = ",".join(f"node{i:05}" for i in range(9000))
    assert submit(job).returncode == 0
    assert value(arguments(job, "torchrun"), "--master_addr") == "node00000"


def test_the_projects_environment_is_used_where_there_is_one(job):
    folder = Path(job["RECORDS"]).parent
    (folder / ".venv").mkdir()
    shutil.move(folder / "bin/torchrun", folder / "only-here")
    (folder / ".venv/bin").mkdir()
    shutil.move(folder / "only-here", folder / ".venv/bin/torchrun")
    assert submit(job).returncode == 0
    assert arguments(job, "torchrun")


def test_container_flags_only_with_a_container(job):
    assert submit(job).returncode == 0
    assert not any("container" in argument for argument in arguments(job, "srun"))


@pytest.mark.parametrize("mounts, expected", [("", "{0}:{0}"), ("/data:/data", "{0}:{0},/data:/data")])
def test_container(job, mounts, expected):
    folder = Path(job["RECORDS"]).parent
    job |= {"CONTAINER": "nvcr.io#nvidia/pytorch:25.06-py3", "CONTAINER_MOUNTS": mounts}
    assert submit(job).returncode == 0
    srun = arguments(job, "srun")
    assert srun[srun.index("-c") - 4 : srun.index("-c") - 1] == [
        "--container-image=nvcr.io#nvidia/pytorch:25.06-py3",
        f"--container-mounts={expected.format(folder)}",
        f"--container-workdir={folder}",
    ]


# --------------------------------------------------------------------------- health


@pytest.mark.parametrize(
    "gpus, report",
    [
        ("echo 0, 4, 0", "gpu-b7: 1 GPUs of 8 answer"),
        (EIGHT_GPUS.replace("4, 0", "2049, 0"), "gpu-b7: GPU 7: 2049 MiB are in use by others"),
        (EIGHT_GPUS.replace("4, 0", "4, 3"), "gpu-b7: GPU 0: 3 uncorrected memory errors"),
        ("echo No devices were found; exit 6", "gpu-b7: nvidia-smi fails: No devices were found"),
    ],
)
def test_a_node_that_is_not_sound_is_named_and_nothing_trains(job, gpus, report):
    result = submit(job | {"GPUS": gpus})
    assert result.returncode == 1
    assert report in result.stdout
    assert report in (Path(job["RECORDS"]).parent / "runs/sft/slurm/health.txt").read_text()
    assert "start again with --exclude=NODES" in result.stderr
    assert arguments(job, "torchrun") == []
    assert "requeue" not in arguments(job, "scontrol")


@pytest.mark.parametrize(
    "gpus", [EIGHT_GPUS.replace("4, 0", "2048, 0"), EIGHT_GPUS.replace("4, 0", "4, [N/A]")]
)
def test_memory_up_to_the_limit_and_gpus_without_error_correction_are_sound(job, gpus):
    assert submit(job | {"GPUS": gpus}).returncode == 0


@pytest.mark.parametrize("change", [{"HEALTH_CHECK": "off"}, {"PROCESSES_PER_NODE": "2"}])
def test_without_gpus_or_when_it_is_off_nothing_is_checked(job, change):
    if "PROCESSES_PER_NODE" in change:
        del job["SLURM_GPUS_ON_NODE"]
    assert submit(job | change | {"GPUS": "exit 1"}).returncode == 0
    assert arguments(job, "nvidia-smi") == []


# --------------------------------------------------------------------------- time and requeueing


@pytest.mark.parametrize(
    "left, max_time",
    [
        ("1-02:03:04", "25:48:04"),
        ("10-00:00:00", "239:45:00"),
        ("4:00:00", "03:45:00"),
        ("08:09:08", "07:54:08"),  # 08 and 09 are no octal numbers
        ("59:59", "00:44:59"),
        ("15:01", "00:00:01"),
    ],
)
def test_training_stops_a_margin_before_the_time_limit(job, left, max_time):
    job["TIME_LEFT"] = left
    assert submit(job).returncode == 0
    assert arguments(job, "squeue") == ["--noheader", "--jobs", "1234567", "--format", "%L"]
    assert value(arguments(job, "torchrun"), "--max-time") == max_time


@pytest.mark.parametrize(
    "left, max_time",
    [("30:00", "00:29:00"), ("1:01", "00:00:01"), ("1:00", "00:00:30"), ("0:25", "00:00:12")],
)
def test_a_margin_above_the_time_left_gives_advice_and_half_of_it(job, left, max_time):
    result = submit(job | {"TIME_LEFT": left, "MARGIN_S": "60"})
    assert result.returncode == 0
    assert value(arguments(job, "torchrun"), "--max-time") == max_time
    advice = (
        f"time left is {left}, at most MARGIN_S=60 s: training stops after half of it. Raise --time, or set"
    )
    assert result.stderr.startswith(advice) == (left in ("1:00", "0:25"))


def test_numbers_with_leading_zeros_are_decimal(job):
    assert submit(job | {"MARGIN_S": "0090", "PROCESSES_PER_NODE": "08"}).returncode == 0
    assert value(arguments(job, "torchrun"), "--max-time") == "03:58:30"
    assert value(arguments(job, "torchrun"), "--nproc_per_node") == "8"


def test_no_time_limit_no_max_time(job):
    job["TIME_LEFT"] = "UNLIMITED"
    assert submit(job).returncode == 0
    assert "--max-time" not in arguments(job, "torchrun")


@pytest.mark.parametrize(
    "left, message",
    [
        ("INVALID", "squeue gives 'INVALID' as the time left, which is not a time"),
        ("", "squeue gives '' as the time left"),
    ],
)
def test_a_time_that_is_none_ends_the_job(job, left, message):
    job["TIME_LEFT"] = left
    result = submit(job)
    assert result.returncode == 1
    assert message in result.stderr
    assert arguments(job, "srun") == []


def test_a_job_that_slurm_does_not_requeue_says_how_to_continue(job):
    """As where the cluster forbids it, and in a shell of salloc's."""
    job["TRAINING"] = "exit 0"
    (Path(job["RECORDS"]).parent / "bin/scontrol").write_text("#!/bin/bash\nexit 1\n")
    result = submit(job)
    assert result.returncode == 75
    assert "stopped before the end: give the same command again to continue" in result.stderr


def test_an_edit_of_the_common_part_disturbs_no_running_job(job):
    job["TRAINING"] = 'for line in {1..500}; do echo "exit 9"; done >slurm/launch.sh'
    assert submit(job).returncode == 0
    assert arguments(job, "scontrol")[-2:] == ["requeue", "1234567"]


def test_a_half_written_export_is_not_complete(job):
    job["TRAINING"] = 'mkdir -p "$OUTPUT/hf"'
    assert submit(job).returncode == 0
    assert arguments(job, "scontrol")[-2:] == ["requeue", "1234567"]


def test_a_failure_after_the_export_is_reported_and_not_requeued(job):
    job["TRAINING"] = FINISH + "; exit 3"
    result = submit(job)
    assert result.returncode == 3
    assert "complete" not in result.stdout
    assert "requeue" not in arguments(job, "scontrol")


# --------------------------------------------------------------------------- inside a step of srun's


@pytest.mark.parametrize("name", NAMES)
def test_each_node_starts_its_own_torchrun_and_the_first_node_reports(job, name):
    flags = ["--tp", "8", "--prompt-template", "{input}\\n {output}"]
    result = step(job, *flags, name=name)
    assert (result.returncode, arguments(job, "srun")) == (0, [])
    assert result.stdout == "gpu-b7: 8 GPUs, sound and free\n"
    torchrun = ["--node_rank", "1", "--nnodes", "2", "--nproc_per_node", "8", "--master_addr", "gpu-a1"]
    torchrun += ["--master_port", "24567", "--rdzv_id", "1234567.7", "--", f"train_{name}.py"]
    assert arguments(job, "torchrun")[: len(torchrun)] == torchrun
    assert arguments(job, "torchrun")[-len(flags) - 2 :] == ["--max-time", "03:45:00", *flags]
    assert "complete: runs/sft/hf" in step(job | FIRST, name=name).stdout


@pytest.mark.parametrize(
    "flags, own, expected",
    [
        (["--tp", "1"], {}, "unset"),
        (["--lr", "1e-5"], {}, "unset"),
        (["--tp", "2", "--lr", "1e-5"], {}, "1"),
        (["--tp=16"], {}, "1"),
        (["--tp", "8"], {"CUDA_DEVICE_MAX_CONNECTIONS": "4"}, "4"),
    ],
)
def test_tensor_parallel_ranks_start_kernels_in_their_order(job, flags, own, expected):
    print_it = 'echo "${CUDA_DEVICE_MAX_CONNECTIONS:-unset}" >"$RECORDS/connections"; ' + FINISH
    assert submit(job | own | {"TRAINING": print_it}, *flags).returncode == 0
    assert (Path(job["RECORDS"]) / "connections").read_text() == expected + "\n"


@pytest.mark.parametrize(
    "nodes, first",
    [("n[08-11,14],m3", "n08"), ("a,b[1-2]", "a"), ("rack[0-3]n[4-7],x", "rack0n4"), ("n1-a[10]", "n1-a10")],
)
def test_the_first_of_a_list_of_nodes(job, nodes, first):
    assert step(job | {"SLURM_STEP_NODELIST": nodes}).returncode == 0
    assert value(arguments(job, "torchrun"), "--master_addr") == first


@pytest.mark.parametrize("change", [{}, FIRST])
def test_a_node_that_fails_ends_the_step_and_is_named(job, change):
    job |= {"TRAINING": FINISH + "; exit 3"} | change
    result = step(job)
    assert result.returncode == 3
    name = (STEP | job)["SLURMD_NODENAME"]
    assert result.stderr == f"{name}: torchrun ended with status 3\n"
    assert arguments(job, "scancel") == ["--signal=KILL", "1234567.7"]


def test_a_node_that_is_not_sound_ends_the_step(job):
    result = step(job | {"GPUS": "echo 0, 4, 0"})
    assert result.returncode == 1
    assert "gpu-b7: 1 GPUs of 8 answer" in result.stderr
    assert arguments(job, "scancel") == ["--signal=KILL", "1234567.7"]
    assert arguments(job, "torchrun") == []


def test_a_signal_is_left_to_torchrun_which_saves(job):
    """Slurm sends SIGTERM to every process of a step; bash must not end before training has saved."""
    job["TRAINING"] = "kill -TERM $PPID $(ps -o ppid= -p $PPID); touch saved; exit 1"
    assert step(job).returncode == 1
    assert (Path(job["RECORDS"]).parent / "saved").exists()
    assert arguments(job, "scancel") == []  # the other nodes still save


def test_a_container_has_no_programs_of_slurms(job):
    """srun --container-image: squeue, scancel and the project's .venv are of the node outside."""
    folder = Path(job["RECORDS"]).parent
    for name in ("squeue", "scancel", "scontrol"):
        (folder / "bin" / name).unlink()
    for name in ("bash", "env", "date", "mkdir", "touch"):
        (folder / "bin" / name).symlink_to(shutil.which(name))
    job["PATH"] = str(folder / "bin")
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/torchrun").write_text("#!/bin/bash\nexit 9\n")
    (folder / ".venv/bin/torchrun").chmod(0o755)
    end = str(int(time.time()) + 4 * 3600)
    assert step(job | {"SLURM_JOB_END_TIME": end}).returncode == 0
    assert "03:44:50" <= value(arguments(job, "torchrun"), "--max-time") <= "03:45:00"
    result = step(job | FIRST | {"TRAINING": "exit 3"})
    assert result.returncode == 3
    assert "give --max-time to stop before the time limit" in result.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        ({"SLURM_STEP_NUM_TASKS": "16"}, "16 tasks on 2 nodes, but torchrun is one task per node"),
        (
            {"CONTAINER": "pytorch:25.06"},
            "CONTAINER is for sbatch: give srun --container-image=pytorch:25.06",
        ),
        (
            {"SLURM_GPUS_ON_NODE": ""},
            "no GPUs: give --gpus-per-node or PROCESSES_PER_NODE (srun does not read",
        ),
    ],
)
def test_a_mistake_is_one_line_for_all_nodes(job, change, message):
    assert (step(job | change).returncode, step(job | change).stderr) == (1, "")
    result = step(job | FIRST | change)
    assert result.returncode == 1
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1
    assert arguments(job, "torchrun") == []


def test_too_few_cores_are_said_and_no_hindrance(job):
    result = step(job | FIRST | {"PROCESSES_PER_NODE": "9", "OMP_NUM_THREADS": "1", "HEALTH_CHECK": "off"})
    assert result.returncode == 0
    assert result.stderr.startswith("9 processes share 8 CPU cores of a node: give --exclusive or --cpus")


def test_a_job_that_was_submitted_from_within_a_step_is_none(job):
    """sbatch passes the variables of that step on to the new job."""
    assert submit(STEP | job).returncode == 0
    assert value(arguments(job, "torchrun"), "--nnodes") == "3"


def test_a_shell_of_sallocs_is_no_step(job):
    """Slurm counts it as the interactive step, whose id is 0xfffffffa."""
    assert step(job | {"SLURM_STEP_ID": "4294967290"}).returncode == 0
    assert value(arguments(job, "torchrun"), "--nnodes") == "3"


# --------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "change, flags, message",
    [
        ({"MARGIN_S": "15m"}, "", "MARGIN_S=15m must be a whole number"),
        ({"MARGIN_S": "-5"}, "", "MARGIN_S=-5 must be a whole number"),
        ({"PROCESSES_PER_NODE": "8x"}, "", "PROCESSES_PER_NODE=8x must be a whole number"),
        ({"RDZV_PORT": "any"}, "", "RDZV_PORT=any must be a whole number"),
        ({"HEALTH_CHECK": "of"}, "", "HEALTH_CHECK=of must be on or off"),
        ({"TRAIN_DATA": " \t"}, "", "TRAIN_DATA=' \t' VAL_DATA='val.jsonl': give each at least one file"),
        ({}, "--output runs/other", "--output is given twice"),
        ({}, "--tp 8 --output=runs/other", "--output is given twice"),
        ({}, "--model other", "--model is given twice"),
        ({}, "--train_data other.jsonl", "--train-data is given twice"),
        ({}, "--val-data other.jsonl", "--val-data is given twice"),
        ({"REWARD_MODEL": "runs/rm"}, "--reward-model other", "--reward-model is given twice"),
        ({}, "--lr 1e-5 --tp 8 --lr 1e-6", "--lr is given twice"),
        ({}, "--no-resume", "--no-resume: a job that is requeued would start there again"),
        ({}, "--resume-from runs/x", "--resume-from: a job that is requeued would start there again"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_starts(job, change, flags, message):
    result = submit(job | change, *flags.split(), name="ppo")
    assert result.returncode == 1
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1
    assert arguments(job, "torchrun") == arguments(job, "srun") == []


def test_a_step_which_is_never_requeued_may_start_over(job):
    assert step(job | FIRST, "--no-resume").returncode == 0


@pytest.mark.parametrize(
    "variable, message",
    [
        ("SLURM_JOB_ID", "SLURM_JOB_ID: start a .sbatch file with sbatch or srun"),
        ("MODEL", "MODEL: give MODEL, the Hugging Face directory"),
        ("TRAIN_DATA", "TRAIN_DATA: give TRAIN_DATA"),
        ("VAL_DATA", "VAL_DATA: give VAL_DATA"),
        ("OUTPUT", "OUTPUT: give OUTPUT"),
        ("SLURM_GPUS_ON_NODE", "no GPUs: give --gpus-per-node or PROCESSES_PER_NODE"),
    ],
)
def test_a_missing_variable_is_named_and_nothing_starts(job, variable, message):
    del job[variable]
    result = submit(job)
    assert result.returncode != 0
    assert message in result.stderr
    assert arguments(job, "srun") == []


@pytest.mark.parametrize("name", NAMES)
def test_submitting_from_another_directory_is_refused(job, name, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = submit(job, name=name, cwd=elsewhere)
    assert result.returncode == 1
    assert f"train_{name}.py is not in {elsewhere}: submit from the project's root" in result.stderr
    assert arguments(job, "srun") == []


def test_a_squeue_that_fails_ends_the_job(job):
    path = Path(job["RECORDS"]).parent / "bin/squeue"
    path.write_text("#!/bin/bash\nexit 7\n")
    assert submit(job).returncode == 7
    assert arguments(job, "srun") == []
