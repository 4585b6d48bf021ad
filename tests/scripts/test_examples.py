"""The scripts of examples/, as a user runs them: small files in the raw formats, the tiny model, few steps.

They are bash, and start python and torchrun. Here those are stand-ins that have tests/support/launch.py fork
the process, because imports take longer than these runs; each process gets the words that the real one would
get.
"""

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from align.data import formats, prompts
from align.data.tokenizer import load_tokenizer
from tests.support.files import ROOT, read_jsonl
from tests.support.launch import fork_python, fork_ranks

SCRIPTS = ("sft", "lora", "sft_chat", "dpo", "reward_model", "ppo", "rejection_sampling", "self_rewarding")
LABELS = {"quality": 0.75, "toxicity": 0.0}
SIZES = {
    "MODEL": "tiny",
    "DEVICES": 1,
    "PRECISION": "fp32",
    "NEW_TOKENS": 64,
    "PROMPT_LEN": 256,
    "SFT_STEPS": 32,
    "SFT_BATCH": 8,
    "SFT_LR": 4e-3,
    "LORA_STEPS": 4,
    "JUDGE_STEPS": 2,
    "DPO_STEPS": 2,
    "RM_STEPS": 2,
    "RM_BATCH": 8,
    "PPO_STEPS": 2,
    "PPO_PROMPTS": 8,
    "RS_STEPS": 2,
    "RS_PROMPTS": 4,
    "SELF_STEPS": 1,
    "SELF_BATCH": 4,
    "SELF_SAMPLES": 2,
}
STAND_IN = """#!{python} -S
import json, os, socket, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "python" and (words[0] == "-" or "--chat" in words):  # they read stdin
    os.execv({python!r}, [{python!r}, *words])
with socket.socket(socket.AF_UNIX) as caller:
    caller.connect({address!r})
    with caller.makefile("rw") as file:
        file.write(json.dumps([name, words]) + "\\n")
        file.flush()
        code, out, err = json.loads(file.readline())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


def start(name: str, words: list[str]) -> subprocess.CompletedProcess:
    """Do what `python` or `torchrun` would do with these words."""
    if name == "python":
        return fork_python(*words, check=False)
    assert words[:2] == ["--standalone", "--nproc_per_node"]
    return fork_ranks(int(words[2]), *words[3:], check=False)


def serve(listener: socket.socket) -> None:
    """Answer the stand-ins until the socket is shut down."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, connection.makefile("rw") as file:
            done = start(*json.loads(file.readline()))
            file.write(json.dumps([done.returncode, done.stdout, done.stderr]) + "\n")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with bin/python and bin/torchrun, the stand-ins."""
    folder = tmp_path_factory.mktemp("environment")
    address = str(folder / "socket")
    (folder / "bin").mkdir()
    for name in ("python", "torchrun"):
        path = folder / "bin" / name
        path.write_text(STAND_IN.format(python=sys.executable, address=address))
        path.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield folder
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


# ---- raw files -----------------------------------------------------------------------------------


def question(number: int) -> str:
    """A question that no other number has."""
    return f"Is {number} odd?"


def answer(number: int) -> str:
    """The answer to `question(number)`: there are two, so that some are wrong and scores differ."""
    return ("no", "yes")[number % 2]


def tree(number: int) -> dict:
    """A message tree of OpenAssistant: a question and its answer."""
    labels = {name: {"value": value, "count": 3} for name, value in LABELS.items()}
    reply = {"role": "assistant", "text": answer(number), "labels": labels, "replies": []}
    return {
        "message_tree_id": str(number),
        "prompt": {"role": "prompter", "text": question(number), "replies": [reply]},
    }


def comparison(number: int) -> dict:
    """A row of HH-RLHF."""
    asked = f"\n\nHuman: {question(number)}\n\nAssistant:"
    return {"chosen": f"{asked} {answer(number)}", "rejected": f"{asked} {answer(number + 1)}"}


def triple(number: int) -> dict:
    """A row of Dolly, every other one with a context."""
    context = "Numbers." if number % 2 else ""
    return {"instruction": question(number), "context": context, "response": answer(number), "category": "qa"}


def write(path: Path, rows: list[dict]) -> None:
    """Write jsonl, compressed if its name says so."""
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w")
    with opened as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def output(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the outputs of all scripts, and the stdout of each in NAME.out."""
    folder = tmp_path_factory.mktemp("examples")
    write(folder / "databricks-dolly-15k.jsonl", [triple(i) for i in range(560)])
    write(folder / "2023-04-12_oasst_all.trees.jsonl.gz", [tree(i) for i in range(560)])
    write(folder / "hh_helpful_train.jsonl.gz", [comparison(i) for i in range(40)])
    write(folder / "hh_helpful_test.jsonl.gz", [comparison(i) for i in range(100, 116)])
    (folder / "judge.txt").write_text("{{ prompt }} {{ response }} Score?")
    variables = SIZES | {"VENV": environment, "DATA": folder, "OUTPUT": folder / "runs"}
    variables["JUDGE_TEMPLATE"] = folder / "judge.txt"
    for name in SCRIPTS:
        done = subprocess.run(
            ["bash", f"examples/{name}.sh", "--no-resume"],  # flags go to the training script
            cwd=ROOT,
            env=os.environ | {key: str(value) for key, value in variables.items()},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{name}: {done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        (folder / "runs" / f"{name}.out").write_text(done.stdout)
    return folder / "runs"


# ---- checks --------------------------------------------------------------------------------------


def test_every_script_is_tested():
    scripts = {path.stem for path in (ROOT / "examples").glob("*.sh")} - {"common"}
    assert scripts == set(SCRIPTS)


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck is not None, "shellcheck is missing: pip install -r requirements.txt"
    scripts = sorted(path.relative_to(ROOT) for path in (ROOT / "examples").glob("*.sh"))
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_each_ends_with_its_validation(output: Path):
    """The last lines: metrics before and after training, as numbers."""
    last = {
        "sft": ["val/loss"],
        "lora": ["val/loss"],
        "sft_chat": ["val/loss"],
        "dpo": ["val/loss", "val/acc", "val/rewards_chosen_mean", "val/rewards_rejected_mean"],
        "reward_model": ["val/loss", "val/acc", "test/acc"],
        "ppo": ["val_rollouts/rewards", "val_rollouts/response_lengths", "train_rollouts/init_policy_kl"],
        "rejection_sampling": ["val_rollouts/rewards", "val_rollouts/response_lengths"],
        "self_rewarding": ["train/bad_ends_per_GBS", "val/bad_ends_per_GBS", "val/bad_samples_per_GBS"],
    }
    for name, metrics in last.items():
        lines = (output / f"{name}.out").read_text().splitlines()[-len(metrics) :]
        assert [line.split(": ")[0] for line in lines] == metrics, name
        for line in lines:
            assert all(float(value) == float(value) for value in line.split(": ")[1].split(" -> ")), line


@pytest.mark.slow
def test_the_adapter_is_there(output: Path):
    fields = json.loads((output / "lora" / "adapter" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"]) == (16, 32)
    assert len(read_jsonl(output / "lora" / "answers.jsonl")) == 4


@pytest.mark.slow
def test_prompt_response_model_answers_the_template(output: Path):
    rows = read_jsonl(output / "sft" / "answers.jsonl")
    assert len(rows) == 4 and all(row["prompt"].find("odd?") > 0 for row in rows)
    assert [(row["response"], row["finish"]) for row in rows] == [
        (f" {row['output']}", "stop") for row in rows
    ]


@pytest.mark.slow
def test_chat_model_speaks_the_trained_format(output: Path):
    """The prompts of generate.py, and transformers' of hf/, have the ids that were trained on."""
    rows = read_jsonl(output / "sft_chat" / "answers.jsonl")
    assert len(rows) == 4 and {row["finish"] for row in rows} == {"stop"}
    assert {row["response"] for row in rows} & {"yes", "no"}
    hf = transformers.AutoTokenizer.from_pretrained(output / "sft_chat" / "hf")
    tiny = load_tokenizer(ROOT / "assets" / "tiny")  # the tokenizer of training
    trained_model = load_tokenizer(output / "sft_chat" / "hf")
    for row in read_jsonl(output / "data" / "oasst" / "val.jsonl"):
        trained, _ = formats.format_sft(row, tiny, formats.FormatConfig())
        asked, answered = row["conversations"]
        messages = [
            {"role": "user", "content": asked["value"]},
            {"role": "assistant", "content": answered["value"]},
        ]
        prompt = hf.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        assert prompt + [*f"{answered['value']}\n\x11".encode()] == trained.ids.tolist()
        assert hf.apply_chat_template(messages, return_dict=False) == trained.ids.tolist()
        for question in (row, {"messages": messages[:1]}, {"prompt": messages[:1]}):
            ids = prompts.format_prompt(question, trained_model, prompts.PromptFormat())
            assert ids.tolist() == prompt


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "ppo", "rs", "self_rewarding"])
def test_later_models_keep_it(name: str, output: Path):
    templates = [(output / run / "hf" / "chat_template.jinja").read_text() for run in ("sft_chat", name)]
    assert templates[0] == templates[1]


@pytest.mark.slow
def test_first_iteration_of_self_rewarding_has_ended_answers(output: Path):
    """Without --stop: the end signal is the turn marker of the model's rows."""
    rows = read_jsonl(output / "self_rewarding" / "metrics.jsonl")
    first = next(row for row in rows if row["step"] == 1)
    assert first["train/bad_ends_per_GBS"] < 0.5 and rows[0]["val/bad_ends_per_GBS"] < 0.5
