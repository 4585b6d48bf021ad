"""What the tests share: random tiny models of every family, models of the toy task, and torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers

from align import toy

ROOT = Path(__file__).parent.parent
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
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama_tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama3": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE),
    "mistral": transformers.MistralConfig(**SIZES, head_dim=24, sliding_window=7, tie_word_embeddings=False),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=24, tie_word_embeddings=False),
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
    torchrun(2, "tests/resume_worker.py", json.dumps([sft.split(), rm.split()]))
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
    torchrun(2, "tests/resume_worker.py", json.dumps([command.split()]))
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
    assert not check or done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done


def environment() -> dict[str, str]:
    """The environment of a test's process: our package on the path, one thread, no network."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline",
    }
