"""The user's files stay, any console will do, and a reward function leaves no trace in training."""

import ast
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import generate
import prepare_data
from align import console
from align.data import toy
from align.data.prompts import Prompt
from align.data.tokenizer import load_tokenizer
from align.errors import UserError
from align.files import check_files, write_own
from align.generation.rollout import Sample
from align.rewards import sources
from align.tracking.run import Run, RunConfig
from tests.support.files import ROOT, TINY
from tests.support.launch import fork_ranks


def start(output: Path, main: bool = True, **flags: object) -> Run:
    return Run(RunConfig(output), flags, str(ROOT / "train_sft.py"), main)


def files(directory: Path) -> dict[Path, bytes | str]:
    """Content of all files and links below a directory."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_symlink() or path.is_file()]
    return {path: os.readlink(path) if path.is_symlink() else path.read_bytes() for path in paths}


# ---- --output ------------------------------------------------------------------------------------


def old_run(directory: Path) -> None:
    """OUTPUT of a run, with the model that it left."""
    start(directory)
    shutil.copytree(TINY, directory / "hf")


def put(name: str, text: str = "mine"):
    def make(directory: Path) -> None:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)

    return make


def linked(name: str, target: str):
    def make(directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        (directory / name).symlink_to(target)

    return make


def both(*makes):
    return lambda directory: [make(directory) for make in makes]


REFUSED = {  # what is there in "out", --output, other flags, words of the message
    "empty name": (None, "", {}, "is the current directory"),
    "current directory": (None, "../{cwd}", {}, "is the current directory"),
    "repository": (None, str(ROOT), {}, "is the directory of the code"),
    "root": (None, "/", {}, "is the root directory"),
    "home": (None, "~", {}, "is the home directory"),
    "too long": (None, "runs/" + 300 * "x", {}, "File name too long"),
    "file": (put("file"), "out/file", {}, "is a file: give a directory"),
    "below a file": (put("file"), "out/file/run", {}, "out/file is a file: give a path below a directory"),
    "dangling link": (linked("link", "nothing"), "out/link", {}, "out/link is a link to nothing"),
    "below a dangling link": (linked("link", "nothing"), "out/link/run", {}, "out/link is a link to nothing"),
    "model": (
        put("config.json", '{"model_type": "llama"}'),
        "out",
        {},
        "holds config.json, and no config.js",
    ),
    "weights": (put("model-00001-of-2.safetensors"), "out", {}, "holds model-00001-of-2.safetensors, and no"),
    "checkpoints": (put("checkpoints/mine.txt"), "out", {}, "holds checkpoints, and no config.json of a run"),
    "log": (put("log.txt"), "out", {}, "holds log.txt, and no config.json of a run"),
    "script": (put("train_sft.py"), "out", {}, "holds train_sft.py, and no config.json of a run"),
    "data": (put("a.jsonl"), "out", {"train_data": ("out/a.jsonl",)}, "--train-data out/a.jsonl is in --out"),
    "linked data": (
        both(put("a.jsonl"), linked("../b.jsonl", "out/a.jsonl")),
        *("out", {"val_data": ("b.jsonl",)}, "--val-data b.jsonl is in --output out"),
    ),
    "adapter": (
        both(old_run, put("adapter/adapter_config.json")),
        *("out", {"adapter": "out/adapter"}, "--adapter out/adapter is in --output out"),
    ),
    "export": (old_run, "out", {"model": "out/hf"}, "--model out/hf is in --output out"),
    "reward model": (
        old_run,
        "out",
        {"reward_model": Path("out/hf")},
        "--reward-model out/hf is in --output",
    ),
    "linked critic": (
        both(old_run, linked("../critic", "out/hf")),
        *("out", {"critic": Path("critic")}, "--critic critic is in --output out"),
    ),
    "linked output": (
        both(old_run, linked("../link", "out")),
        *("link", {"model": "out/hf"}, "--model out/hf is in --output link"),
    ),
    "link as export": (both(start, linked("hf", "../model")), "out", {}, "hf in it is a link"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_every_rank_before_anything_is_written(name, tmp_path, monkeypatch):
    make, output, flags, message = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    if make:
        make(Path("out"))
    before = files(tmp_path)
    for main in (True, False):
        with pytest.raises(UserError, match=message) as error:
            start(Path(os.path.expanduser(output.format(cwd=tmp_path.name))), main, **flags)
        assert len(str(error.value).splitlines()) == 1 and "--output" in str(error.value)
    assert files(tmp_path) == before and not Path("runs").exists()


def test_accepted(tmp_path, monkeypatch):
    """Unrelated files, a link to a directory, a run that goes on, with the flags that it had."""
    monkeypatch.chdir(tmp_path)
    for make in (
        put("notes.md"),
        put("data/rows.jsonl"),
        put("scripts/train_sft.py"),
        put("base/config.json"),
    ):
        make(Path("out"))
    Path("link").symlink_to("out")
    before = files(tmp_path)
    for _ in range(2):
        for main in (False, True, False):  # other ranks may look before and after rank 0 writes
            start(Path("link"), main, model="tiny", train_data=("out/data/rows.jsonl", "org/name"))
        put("hf/config.json")(Path("out"))
        put("reference.safetensors")(Path("out"))
    assert before.items() <= files(tmp_path).items()


def test_a_damaged_config_is_named(tmp_path):
    start(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not valid JSON"):
        start(tmp_path)


def test_toy_data_overwrites_no_other_file(tmp_path):
    (train,), (val,) = toy.write(tmp_path, num_train=3, num_val=2)
    before = files(tmp_path)
    assert toy.write(tmp_path, num_train=3, num_val=2) == ((train,), (val,)) and files(tmp_path) == before
    val.write_text("mine\n")
    with pytest.raises(UserError, match="val.jsonl has another content than the toy task"):
        toy.write(tmp_path, num_train=3, num_val=2)
    with pytest.raises(UserError, match="val.jsonl/a: (Not a directory|File exists)"):
        write_own(val / "a", "text")
    assert val.read_text() == "mine\n" and not list(tmp_path.glob("*.tmp"))


ROW = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c 1 d 2"}]}
PREPARED = {  # command: its input, and the file that --output would put in its place
    "judge --input {}/a.jsonl --output {}/a.jsonl": "a.jsonl",
    "judge --input {}/link --output {}/a.jsonl": "a.jsonl",
    "gsm8k --input {}/a.jsonl --output {}/a.jsonl": "a.jsonl",
    "dolly --input {}/train.jsonl --output {}": "train.jsonl",
    "oasst --input {}/val.jsonl --output {}": "val.jsonl",
    "hh --input {}/a.jsonl --test-input {}/test_prompts.jsonl --output {}": "test_prompts.jsonl",
}


@pytest.mark.parametrize("command", PREPARED)
def test_prepare_data_keeps_its_input(command, tmp_path, monkeypatch, capsys):
    for name in {PREPARED[command], "a.jsonl"}:
        (tmp_path / name).write_text((json.dumps(ROW) + "\n") * 3)
    (tmp_path / "link").symlink_to("a.jsonl")
    before = files(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *command.replace("{}", str(tmp_path)).split()])
    with pytest.raises(SystemExit):
        prepare_data.main()
    line = f"error: --output .*{PREPARED[command]} is --input: give another file\n"
    assert re.fullmatch(line, capsys.readouterr().err)
    assert files(tmp_path) == before


def test_generate_keeps_its_input(tmp_path, monkeypatch):
    monkeypatch.setattr(generate.parallel, "on_main", lambda make: make())
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    (tmp_path / "link").symlink_to(rows)
    for output, message in [
        (rows, "rows.jsonl is --input: give another file"),
        (tmp_path / "link", "link is --input: give another file"),
        (tmp_path, "is a directory: give a file"),
        (rows / "new.jsonl", "rows.jsonl is a file: give a path below a directory"),
        (Path("/dev/null"), "/dev/null is no regular file"),
    ]:
        with pytest.raises(UserError, match=message):
            generate.prepare_output(output, rows)
    generate.prepare_output(tmp_path / "new/answers.jsonl", Path("org/name"))
    check_files([rows], Path("org/name"))  # --input may be a data set of the Hub


# ---- the console ---------------------------------------------------------------------------------

RECORD = """
import sys
from pathlib import Path
from align import console
from align.tracking.run import Run, RunConfig
console.adapt()
run = Run(RunConfig(Path(sys.argv[1])), {}, "train_sft.py", True, 2)
run.resume_at(0)
run.say("an arrow \\u21b5")
run.log(1, {"train/loss": 1.0})
print("a library, without a flush \\u21b5")
run.log(2, {"train/loss": 1.0})
run.close(plots=False)
"""
CONSOLES = {  # how the shell starts it: the console is gone, and the variables of the environment
    "": (False, {"PYTHONIOENCODING": "ascii"}),
    "| cat": (False, {"PYTHONIOENCODING": "latin-1"}),
    ">&-": (False, {}),  # there is none, and nothing is lost
    ">&- 2>&-": (False, {"PYTHONIOENCODING": "ascii"}),
    "> /dev/full": (True, {}),
    "> /dev/full 2> /dev/full": (True, {}),
    "| true": (True, {}),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
@pytest.mark.parametrize("redirection", CONSOLES)
def test_any_console(redirection, tmp_path):
    is_gone, variables = CONSOLES[redirection]
    command = f'{sys.executable} -c "$CODE" {tmp_path}/run {redirection}'
    if redirection == "| true":
        command = f"(sleep 0.5; {command.split(' |')[0]}) | true"
    environment = {**os.environ, "CODE": RECORD, "PYTHONPATH": str(ROOT), **variables}
    shell = ["bash", "-o", "pipefail", "-c", command]
    done = subprocess.run(shell, env=environment, cwd=ROOT, capture_output=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, b"")
    log = (tmp_path / "run/log.txt").read_text(encoding="utf-8")
    assert "an arrow ↵" in log and log.count("the console is gone (") == is_gone
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    if "PYTHONIOENCODING" in variables and ">&-" not in redirection:
        assert done.stdout.startswith(b"an arrow \\u21b5\nstep 1/2") and b"\nstep 2/2" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_console_in_process(monkeypatch, capsys):
    """stderr's failure is silent, a lost answer of generate.py is an error; what is not UTF-8 gets no bar."""
    monkeypatch.setattr(generate.parallel, "is_main", lambda: True)
    monkeypatch.setattr(sys, "stderr", open("/dev/full", "w"))
    generate.say("lost")
    generate.say("to the null device")
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    with pytest.raises(UserError, match="the answer cannot be printed: No space left on device; --input and"):
        generate.emit("a response")
    for stream in (None, open(os.devnull), io.TextIOWrapper(io.BytesIO())):
        if stream:
            stream.close()
        monkeypatch.setattr(sys, "stdout", stream)
        assert not console.is_terminal() and console.write("x") and not console.write("x")


def test_every_text_file_is_utf8():
    """checkpoint_files.py writes JSON of ASCII characters."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("align/**/*.py")]
    for path in (path for path in paths if path.name != "checkpoint_files.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", None))
            words = [word.value for word in ast.walk(call) if isinstance(word, ast.Constant)]
            binary = name == "open" and (
                not isinstance(call.func, ast.Name) or {"rb", "wb", "ab"} & set(words)
            )
            if name in ("read_text", "write_text", "open") and not binary:
                assert "encoding" in {word.arg for word in call.keywords}, (path.name, call.lineno)


# ---- --reward-fn ---------------------------------------------------------------------------------

SPOILERS = {
    "gradients": lambda: torch.set_grad_enabled(False),
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "deterministic": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "directory": lambda: os.chdir("/"),
    "seeds": lambda: (random.seed(0), np.random.seed(0), torch.manual_seed(0)),
    "draws": lambda: (random.gauss(0, 1), np.random.randn(), torch.randn(1)),
}


def spoil(prompt: str, response: str, row: dict) -> float:
    """For --reward-fn: the toy's score, after all that a function can do to training."""
    for change in SPOILERS.values():
        change()
    return toy.reward(prompt, response, row)


def leave(prompt: str, response: str, row: dict) -> float:
    sys.exit(0)


def drawn(prompt: str, response: str, row: dict) -> float:
    return random.random() + np.random.random() + float(torch.rand(()))


def state() -> tuple:
    kind, keys, *rest = np.random.get_state()
    torch_settings = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
    kinds = (torch.get_deterministic_debug_mode(), os.getcwd(), random.getstate(), kind, keys.tolist(), rest)
    return *torch_settings, *kinds, torch.get_rng_state().tolist()


@pytest.fixture
def untouched(monkeypatch):
    """Assert that a test leaves the process as it was, and stand for a world of one rank."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "all_gather_object", lambda parts, part: parts.__setitem__(0, part))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    torch.set_grad_enabled(True)
    before = state()
    yield
    after = state()
    for (_, restore), value in zip(sources.SETTINGS, before, strict=False):
        restore(value)
    assert after == before


def score(name: str) -> np.ndarray:
    """Rewards by a function of this file: two prompts, two equal answers to each."""
    tokenizer = load_tokenizer(TINY)
    zeros = np.zeros(3, np.float32)
    sample = Sample(np.array(tokenizer.encode("a b"), np.int32), zeros, zeros, "stop")
    prompts = [Prompt(np.array(tokenizer.encode("sort: b a"), np.int32), {}) for _ in range(2)]
    return sources.RewardFunction(f"tests.tracking.test_output:{name}", tokenizer, ())(
        prompts, [[sample] * 2] * 2
    )


@pytest.mark.parametrize("name", SPOILERS)
def test_a_reward_function_leaves_no_trace(name, untouched, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SPOILERS", {name: SPOILERS[name]})
    assert score("spoil").tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_exit_of_a_reward_function_is_an_error(untouched):
    with pytest.raises(
        RuntimeError, match=r"--reward-fn tests.tracking.test_output:leave called sys.exit\(0\)"
    ) as error:
        score("leave")
    assert isinstance(error.value.__cause__, SystemExit)


def test_random_rewards_differ_and_come_again(untouched):
    first, before = score("drawn"), random.getstate()
    assert len(set(first.flat)) == 4
    random.seed(0)  # as after other steps
    assert (score("drawn") == first).all()
    random.setstate(before)


@pytest.mark.parametrize("statement", ["import sys; sys.exit(0)", "raise ValueError('no')", ""])
def test_import_of_a_module_leaves_no_trace(statement, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.chdir(tmp_path)
    name = f"module_{len(statement)}"
    code = "from tests.tracking import test_output\nfor change in test_output.SPOILERS.values(): change()\n"
    Path(f"{name}.py").write_text(f"{code}{statement}\ndef f(prompt, response, row): return 1\n")
    before = state()
    try:
        sources.import_function(f"{name}:f")
    except (RuntimeError, ValueError) as error:
        assert statement and str(error).startswith(
            f"--reward-fn {name}:f called sys.exit(0)" if "exit" in statement else "no"
        )
    assert state() == before


@pytest.mark.slow
def test_a_run_has_the_same_gradients(tmp_path):
    """Rejection sampling on the toy task, whose reward function is `spoil` or the plain one."""
    flags = "--max-steps 2 --prompts-per-step 4 --samples-per-prompt 4 --global-batch-size 4 --val-batches 1"
    flags += " --max-new-tokens 8 --save-interval 0 --truncated keep --warmup-steps 1"
    names = ("align.data.toy:reward", "tests.tracking.test_output:spoil")
    outputs = [tmp_path / name for name in ("plain", "spoil")]
    commands = [
        ["train_rs.py", *flags.split(), "--reward-fn", name, "--output", str(output)]
        for name, output in zip(names, outputs, strict=True)
    ]
    fork_ranks(1, "tests/workers/resume.py", json.dumps(commands))
    plain, spoilt = (
        [
            {name: value for name, value in json.loads(line).items() if not name.startswith(("time", "mem"))}
            for line in (output / "metrics.jsonl").read_text().splitlines()
        ]
        for output in outputs
    )
    assert plain == spoilt and all(row["train_optim/grad_norm"] > 0 for row in spoilt[1:])
