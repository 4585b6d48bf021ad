"""--help: the script's docstring and its flags in groups, without the imports that a run needs."""

import json
import re
import subprocess
import sys

import pytest

from align import command_line, help_imports
from tests.support.files import ROOT
from tests.support.launch import environment

SCRIPTS = sorted(path.name for path in (*ROOT.glob("train_*.py"), ROOT / "generate.py"))
IMPORTED = """
import io, json, runpy, sys
from contextlib import redirect_stdout
shown = {}
for script in sys.argv[1:]:
    sys.argv[:] = [script, "--help"]
    with redirect_stdout(io.StringIO()) as text:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            shown[script] = [end.code or 0, text.getvalue()]
real = [name for name, module in sys.modules.items() if getattr(module, "__file__", None)]
print(json.dumps([shown, real]))
"""


@pytest.fixture(scope="module")
def helps() -> tuple[dict[str, str], set[str]]:
    """{script: its --help}, and the modules that were imported for them."""
    words = [sys.executable, "-c", IMPORTED, *SCRIPTS]
    env = environment() | {"COLUMNS": "80"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shown, modules = json.loads(done.stdout)
    assert sorted(shown) == SCRIPTS and not any(code for code, _ in shown.values())
    return {script: text for script, (_, text) in shown.items()}, set(modules)


def test_help_imports_none_of_the_heavy_libraries(helps):
    _, modules = helps
    assert "torch" in modules and "tyro" in modules
    heavy = {"megatron", "megatron.core", "transformers", "tokenizers", "wandb", "torch._dynamo"}
    assert not modules & (heavy | {"matplotlib", "datasets", "pyarrow", "math_verify"})


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_docstring_and_groups_with_captions(script, helps):
    text = helps[0][script]
    usage, first, *_ = text.split("\n\n")
    assert usage == f"usage: {script} [--flag value ...]"
    assert f'"""{" ".join(first.split())}\n' in (ROOT / script).read_text(), "not its docstring"
    captions = re.findall(r"^([a-z_.]+): (.+(?:\n\S.*)?)\n  --", text, flags=re.MULTILINE)
    names = [script if name == script else name for name, _ in captions]
    order = [name or script for name in command_line.GROUPS]
    assert names[0] == "model" and names == [name for name in order if name in names]
    assert all("Config(" not in caption for _, caption in captions)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_flag_has_one_default_and_a_plain_type(script, helps):
    text = helps[0][script]
    assert "{None" not in text and "|None" not in text
    for part in re.split(r"\n  (?=--[a-z])", text)[1:]:
        assert len(re.findall(r"\(default", part)) <= 1, part
        assert "(default: None)" not in " ".join(part.split()) or "None:" in part, part
    commands = [line for line in text.splitlines() if line.startswith("    ") and "--" in line]
    assert all(len(line) <= 80 for line in text.splitlines() if line not in commands)


def test_commands_in_a_docstring_stay_as_they_are(helps):
    assert "--reward-model runs/rm/hf \\\n        --train-data" in helps[0]["train_ppo.py"]


def test_files_of_the_project_are_shown_from_its_root_on(helps):
    assert "(default: assets/judge.txt)" in " ".join(helps[0]["train_self_reward.py"].split())


@pytest.mark.parametrize(
    ("words", "is_help"),
    [
        ("--help", True),
        ("-h", True),
        ("gsm8k --help", True),
        ("", False),
        ("--tp 2 --help", False),  # a help, too, but of full imports
        ("--prompt -h", False),
        ("--help --tp 2", False),
    ],
)
def test_only_a_bare_help_has_light_imports(words, is_help):
    assert help_imports.only_help(words.split()) == is_help


@pytest.mark.parametrize(
    "script", ["train_ppo.py", "prepare_data.py", "-m tools.plots", "-m tools.prepare_model"]
)
def test_head_closes_the_pipe_without_a_traceback(script):
    command = f"{sys.executable} {script} --help | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout.startswith("usage: ") and done.stdout.count("\n") == 1 and done.stderr == ""
