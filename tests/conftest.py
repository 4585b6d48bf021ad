"""What the tests share: random tiny models of every family, models of the toy task, and torchrun."""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers

from align.data import toy
from tests.support.files import ROOT

FORKS = sys.platform == "linux" and not torch.cuda.is_available()  # macOS and CUDA want an exec after a fork
SIZES = dict(
    vocab_size=131,  # odd, so that the embedding is padded
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,  # large, so that a wrong mask or angle shows in the logits
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,  # transformers neither fills nor trains the embedding of a pad token
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN_ROPE = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=4.0,
    original_max_position_embeddings=32,
    beta_fast=8.0,  # so that there are pairs of all three kinds in a small head
)
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama_tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama3": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE),
    "mistral": transformers.MistralConfig(**SIZES, head_dim=24, sliding_window=7, tie_word_embeddings=False),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=24, tie_word_embeddings=False),
    "stablelm": transformers.StableLmConfig(**SIZES, use_qkv_bias=True, tie_word_embeddings=False),
    "nemotron": transformers.NemotronConfig(**SIZES, head_dim=24, tie_word_embeddings=False),
    "llama_bias": transformers.LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    ),
    "qwen3_yarn": transformers.Qwen3Config(
        **SIZES, head_dim=24, attention_bias=True, tie_word_embeddings=False, rope_parameters=YARN_ROPE
    ),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a randomly initialised Hugging Face model of each family, every tensor random."""
    directory = tmp_path_factory.mktemp("models")
    for seed, (name, config) in enumerate(FAMILIES.items()):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms start at one and biases at zero: a mix-up would not show
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(directory / name)
    return directory


def random_tiny(directory: Path) -> Path:
    """The tiny model with random weights, in a directory of its own."""
    config = transformers.AutoConfig.from_pretrained(ROOT / "assets/tiny")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for file in (ROOT / "assets/tiny").iterdir():
        if file.name != "config.json":
            shutil.copy(file, directory)
    return directory


@pytest.fixture(scope="session")
def toy_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ with prompts, sft/hf with a policy that mostly answers in letters, rm/hf with a reward model."""
    directory = tmp_path_factory.mktemp("toy_models")
    toy.write(directory / "data", num_train=640, num_val=16)
    toy.write_comparisons(directory / "data", num_train=64, num_val=16)
    common = "--max-seq-len 64 --max-epochs 3 --save-interval 0 --lr 3e-3 --min-lr 1e-3 --warmup-steps 2"
    sft, rm = (
        f"train_{name}.py --model {model} --train-data {directory}/data/train{kind}.jsonl "
        f"--output {directory}/{name} {common}"
        for name, model, kind in (("sft", "tiny", ""), ("rm", directory / "sft/hf", "_comparisons"))
    )
    fork_ranks(2, "tests/workers/resume.py", json.dumps([sft.split(), rm.split()]))
    return directory


@pytest.fixture(scope="session")
def toy_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ with prompts of three letters and templates, hf/ with a policy that answers, judges, meta-judges.

    None of it well, but mostly in the form that is asked for, with scores of all kinds; some answers do not
    end. Few letters make short judgements.
    """
    directory = tmp_path_factory.mktemp("toy_judge")
    data = directory / "data"
    with mock.patch.object(toy, "SIZES", (3,)):
        (train,), _ = toy.write(data, num_train=160, num_val=8)
        rows = toy.judge_rows(400, seed=1, after=0) + toy.meta_rows(600, seed=2, after=0)
    for question, answer in [json.loads(line)["messages"] for line in train.read_text().splitlines()[::10]]:
        rows.append({"messages": [question, {**answer, "content": " ".join([answer["content"]] * 8)}]})
    (data / "train_judge.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "judge.txt").write_text(toy.JUDGE_TEMPLATE)
    (data / "meta_judge.txt").write_text(toy.META_TEMPLATE)
    command = (
        f"train_sft.py --train-data {train} {data}/train_judge.jsonl --output {directory} --max-seq-len 160 "
        "--max-epochs 3 --save-interval 0 --lr 4e-3 --min-lr 5e-4 --warmup-steps 5"
    )
    fork_ranks(2, "tests/workers/resume.py", json.dumps([command.split()]))
    return directory


def torchrun(
    processes: int, *command: object, check: bool = True, timeout_s: float = 300
) -> subprocess.CompletedProcess:
    """Run `torchrun --nproc_per_node processes command...` in the repository's root, one thread a process."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        + [str(word) for word in command],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    return checked(done, check)


def fork_ranks(
    processes: int, *command: object, check: bool = True, timeout_s: float = 300
) -> subprocess.CompletedProcess:
    """As `torchrun`, but the ranks are forks of a warm process: for tests that are not about the start.

    Where these are not possible (FORKS), it is `torchrun`.
    """
    if not FORKS:
        return torchrun(processes, *command, check=check, timeout_s=timeout_s)
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": processes}
    world |= {"LOCAL_WORLD_SIZE": processes, "TORCHELASTIC_RUN_ID": "tests"}
    ranks = [{**world, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return checked(fork(ranks, command, timeout_s), check)


def fork_python(*command: object, check: bool = True, timeout_s: float = 300) -> subprocess.CompletedProcess:
    """Run `python command...` in the repository's root, in a fork of a warm process as `fork_ranks`."""
    if FORKS:
        return checked(fork([{}], command, timeout_s), check)
    words = [sys.executable, *map(str, command)]
    run = dict(cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout_s)
    return checked(subprocess.run(words, **run), check)


def fork(
    variables: list[dict[str, object]], command: Sequence[object], timeout_s: float
) -> subprocess.CompletedProcess:
    """How a script ends that is forked once for each of `variables`, beside those of `environment`."""
    environments = [environment() | {k: str(v) for k, v in more.items()} for more in variables]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        request = dict(command=list(map(str, command)), environments=environments, timeout_s=timeout_s)
        server = warm_process()
        server.stdin.write(json.dumps(request | {"out": str(out), "err": str(err)}) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        printed = [path.read_text(errors="replace") if path.exists() else "" for path in (out, err)]
    assert answer, "tests/support/fork_server.py has ended; see its stderr at the first test that used it"
    code = json.loads(answer)
    assert code is not None, f"{command} took over {timeout_s} s\n{printed[0]}\n{printed[1]}"
    return subprocess.CompletedProcess([*command], code, *printed)


@functools.cache
def warm_process() -> subprocess.Popen:
    """The process of tests/support/fork_server.py, which ends with this one."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "tests.support.fork_server"],
        cwd=ROOT,
        env={**environment(), "TORCHELASTIC_RUN_ID": "tests"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def checked(done: subprocess.CompletedProcess, check: bool) -> subprocess.CompletedProcess:
    """The same, which must have ended well if `check`."""
    failed = f"{done.args}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    assert not check or done.returncode == 0, failed
    return done


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def environment() -> dict[str, str]:
    """The environment of a test's process: our package on the path, one thread, no network."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline",
    }
