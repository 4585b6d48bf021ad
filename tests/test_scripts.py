"""The real commands: what a user types, what comes out, and what is said when it cannot work."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import train_sft
from align import data, tokenizer
from tests.conftest import ROOT, environment, torchrun

TINY = ROOT / "assets" / "tiny"
QUICK = ("--global-batch-size", 4, "--max-steps", 3, "--warmup-steps", 1, "--lr", 1e-3)


def python(*command: object) -> subprocess.CompletedProcess:
    """Run `python command...` from the repository's root, as a user does without torchrun."""
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(count: int, seed: int) -> list[str]:
    """Random short words."""
    random = np.random.default_rng(seed)
    return ["".join(random.choice(list("abcdefg"), random.integers(1, 9))) for _ in range(count)]


def chats(count: int, seed: int) -> list[dict]:
    roles = ("user", "assistant") * 2
    return [
        {"messages": [{"role": role, "content": word} for role, word in zip(roles, some, strict=True)]}
        for some in (words(4, seed + i) for i in range(count))
    ]


def conversations(count: int) -> list[dict]:
    return [
        {
            "system": "Answer.",
            "mask": "User",
            "conversations": [{"from": "User", "value": word}, {"from": "Assistant", "value": word[::-1]}],
        }
        for word in words(count, 0)
    ]


def read_metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


# ---- help ----------------------------------------------------------------------------------------


def field_names(config: type) -> set[str]:
    """The fields of a configuration and of the configurations in it."""
    kinds = {f.name: f.default_factory for f in fields(config) if is_dataclass(f.default_factory)}
    names = {f.name for f in fields(config)} - set(kinds)
    return names.union(*map(field_names, kinds.values()))


def test_help_shows_every_flag_with_its_text(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = python("train_sft.py", "--help")
    assert done.returncode == 0
    shown = {
        re.match("--([a-z0-9-]+)", part)[1]: part for part in re.split(r"\n│ (?=--[a-z])", done.stdout)[1:]
    }
    assert set(shown) == {name.replace("_", "-") for name in field_names(train_sft.Config)}
    assert {"model", "tp", "lr", "max-seq-len", "monitor", "wandb-project"} <= set(shown)
    for flag, part in shown.items():
        # neither its type nor its default is a text
        text = re.sub(r"\(default:.*|\{.*?\}|--\S+", "", part, flags=re.DOTALL)
        assert len(re.findall("[a-z]{2,}", text)) >= 2, f"--{flag} has no text: {part}"


# ---- a run on two processes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """OUTPUT of three steps of the tiny model on two tensor parallel ranks."""
    folder = tmp_path_factory.mktemp("scripts")
    train, val = (
        write_rows(folder / "train.jsonl", chats(24, 0)),
        write_rows(folder / "val.jsonl", chats(7, 99)),
    )
    files = ("--train-data", train, "--val-data", val)
    done = torchrun(2, "train_sft.py", "--tp", 2, *files, *QUICK, "--output", folder / "out")
    assert "2 processes (tp 2 x cp 1 x pp 1 x dp 1) on CPU, gloo" in done.stdout
    assert re.search(r"first example, trained tokens in brackets:\n.*⟦[a-g]+<\|im_end\|>⟧", done.stdout, re.S)
    return folder / "out"


def test_run_directory(run):
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "train_sft.py", "log.txt", "metrics.jsonl", "plots", "checkpoints", "hf"} <= names
    metrics = read_metrics(run)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert {"train/loss", "train/grad_norm", "train/lr", "time/tokens_per_s", "time/step"} <= set(metrics[1])
    assert "val/loss" in metrics[0] and "val/loss" in metrics[3]
    assert metrics[3]["val/loss"] < metrics[0]["val/loss"]
    assert json.loads((run / "config.json").read_text())["flags"]["tp"] == 2
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000003"]


def test_transformers_opens_the_result_and_finds_the_same_loss(run):
    """val/loss is the mean over all trained tokens of what transformers, row by row, gives them."""
    policy, info = transformers.AutoModelForCausalLM.from_pretrained(run / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    rows, _ = data.load_sft([run.parent / "val.jsonl"], tokenizer.load(run / "hf"), data.FormatConfig())
    total, count = 0.0, 0
    for row in rows:
        ids, trained = torch.tensor(row.ids[None]).long(), torch.tensor(row.trained[1:])
        with torch.no_grad():
            logprobs = policy(ids[:, :-1]).logits[0].double().log_softmax(-1)
        total -= logprobs.gather(1, ids[0, 1:, None])[trained].sum().item()
        count += int(trained.sum())
    assert read_metrics(run)[-1]["val/loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_result_brings_tokenizer_chat_template_and_generation_config(run):
    text = transformers.AutoTokenizer.from_pretrained(run / "hf")
    start = transformers.AutoTokenizer.from_pretrained(TINY)
    messages = [{"role": "user", "content": "abc"}]
    for options in ({"tokenize": False}, {"tokenize": False, "add_generation_prompt": True}):
        assert text.apply_chat_template(messages, **options) == start.apply_chat_template(messages, **options)
    assert text("abc").input_ids == start("abc").input_ids
    assert transformers.GenerationConfig.from_pretrained(run / "hf").eos_token_id == 258
    assert (
        json.loads((run / "hf" / "prompt_format.json").read_text())["prompt_template"] == "{input} {output}"
    )


def poisoned(run: Path, directory: Path, poison: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the run's result with some weights spoilt."""
    directory.mkdir()
    for path in (run / "hf").iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    poison(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_a_nan_stops_the_run_and_names_step_and_rank(run, tmp_path):
    """Only the row with a z meets the NaN, so one of two ranks does; its number is in the message."""

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][ord("z")] = float("nan")

    rows = [{"input": "a", "output": "b"}] * 3 + [{"input": "zzzzzzzzzzzz", "output": "b"}]
    rows = write_rows(tmp_path / "z.jsonl", rows)  # the longest row is dealt first, to rank 0
    bad = poisoned(run, tmp_path / "bad", poison)
    flags = ("--model", bad, "--train-data", rows, "--output", tmp_path / "out")
    done = torchrun(2, "train_sft.py", *flags, *QUICK, check=False)
    assert done.returncode != 0
    assert re.search(
        r"rank [01] of 2 failed: step 1: the loss is nan, from the data of rank 0\n", done.stderr
    )
    assert not (tmp_path / "out" / "hf").exists() and not (tmp_path / "out" / "checkpoints").exists()


# ---- other ways to run ---------------------------------------------------------------------------


def test_bf16_without_torchrun_with_template_rows_and_wandb_offline(tmp_path):
    rows = [{"question": word, "answer": word[::-1]} for word in words(24, 0)]
    rows = write_rows(tmp_path / "rows.jsonl", rows)
    formats = ("--prompt-template", "Q: {question}\\nA: {answer}", "--truncation-field", "question")
    flags = ("--train-data", rows, "--precision", "bf16", "--wandb-project", "test", *formats)
    done = python("train_sft.py", *flags, *QUICK, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 processes" in done.stdout and "bfloat16" in done.stdout
    assert re.search(r"Q: [a-g]+↵\nA:⟦ [a-g]+<\|im_end\|>⟧", done.stdout)
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "out")]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))
    exported = load_file(tmp_path / "out" / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    saved = json.loads((tmp_path / "out" / "hf" / "prompt_format.json").read_text())
    assert saved["prompt_template"] == "Q: {question}\\nA: {answer}"


def test_conversations_rows(attempts):
    found = attempts["conversations"]
    assert found["error"] is None
    assert [row["step"] for row in read_metrics(found["output"])] == [1, 2, 3]


# ---- mistakes ------------------------------------------------------------------------------------


MISTAKES = {  # name: flags, the words of the message; GOOD and BAD are files that the fixture writes
    "unknown": (("--learning-rate", "1e-5"), r"Unrecognized options: --learning-rate"),
    "tp": (
        ("--tp", "3"),
        r"--tp 3 x --pp 1 x --cp 1 = 3 does not divide the 1 processes: start a multiple of 3",
    ),
    "sequence": (("--sequence-parallel",), r"--sequence-parallel has no effect with --tp 1"),
    "context": (
        ("--max-seq-len", "4096"),
        r"--max-seq-len 4096 is beyond the model's context of 1024 tokens",
    ),
    "budget": (
        ("--micro-batch-tokens", "512"),
        r"--max-seq-len 1024 is above --micro-batch-tokens 512: raise",
    ),
    "batch": (("--global-batch-size", "0"), r"--global-batch-size 0 must be at least 1"),
    "interval": (("--val-interval", "0"), r"--val-interval 0 must be at least 1"),
    "steps": (("--max-steps", "-1"), r"--max-steps -1 must be at least 1"),
    "micro": (("--micro-batch-size", "0"), r"--micro-batch-size 0 must be at least 1"),
    "time": (("--max-time", "90"), r"--max-time '90' is not of the form HH:MM:SS"),
    "model": (("--model", "no/such/model"), r"--model no/such/model: no config.json there"),
    "choice": (("--precision", "fp16"), r"invalid choice 'fp16' for argument '--precision'"),
    "no training data": (("--val-data", "GOOD"), r"--val-data without --train-data: give both"),
    "few rows": (("--train-data", "GOOD"), r"--train-data has 24 usable rows.*lower --global-batch-size 32"),
    "no file": (("--train-data", "missing.jsonl"), r"missing.jsonl: cannot be read"),
    "bad row": (("--train-data", "GOOD", "BAD"), r"bad.jsonl:2: not valid JSON"),
    "tail": (
        ("--train-data", "GOOD", "--global-batch-size", "4", "--constant-steps", "9"),
        r"--warmup-steps 10 and --constant-steps 9 leave no step of 6",
    ),
    "rates": (
        ("--train-data", "GOOD", "--global-batch-size", "4", "--lr", "1e-7"),
        r"--min-lr 1e-06 is above --lr 1e-07",
    ),
    "monitor": (
        ("--train-data", "GOOD", "--val-data", "GOOD", "--global-batch-size", "4", "--monitor", "val/nope"),
        r"--monitor val/nope is no metric of this run; it has val/loss",
    ),
    "training monitor": (
        ("--train-data", "GOOD", "--global-batch-size", "4", "--monitor", "train/nope"),
        r"--monitor train/nope is no metric of this run; it has train/grad_norm, train/loss, train/lr",
    ),
    "template": (
        ("--prompt-template", "{a}{b} end"),
        r"--prompt-template.*must end with the field of the answer",
    ),
    "wandb": (("--wandb-name", "x"), r"--wandb-name x needs --wandb-project"),
}


@pytest.fixture(scope="module")
def attempts(tmp_path_factory) -> dict[str, dict]:
    """What came of each command of MISTAKES (and one that is none), all in one process that imports once."""
    folder = tmp_path_factory.mktemp("attempts")
    good = write_rows(folder / "good.jsonl", chats(24, 0))
    bad = folder / "bad.jsonl"
    bad.write_text('{"input": "a", "output": "b"}\n{"input": \n')
    files = {"GOOD": str(good), "BAD": str(bad)}
    commands = {name: [files.get(word, word) for word in flags] for name, (flags, _) in MISTAKES.items()}
    rows = write_rows(folder / "conversations.jsonl", conversations(24))
    commands["conversations"] = ["--train-data", str(rows), *map(str, QUICK)]
    for i, command in enumerate(commands.values()):
        command += ["--output", str(folder / f"out{i}")]
    (folder / "commands.json").write_text(json.dumps(list(commands.values())))
    done = python("tests/scripts_worker.py", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "errors.json").read_text())
    return {
        name: {"error": error, "output": folder / f"out{i}"}
        for i, (name, error) in enumerate(zip(commands, found, strict=True))
    }


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_with_flag_and_rule(attempts, name):
    error = attempts[name]["error"]
    assert error is not None, "the command ran"
    assert re.search(MISTAKES[name][1], error), error
    assert not (attempts[name]["output"] / "checkpoints").exists()
