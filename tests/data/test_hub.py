"""Models and data of the Hugging Face Hub, from a stand-in for its server, and without any."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import train_sft
from align.data import hub
from align.errors import UserError
from tests.support.files import ROOT, write_rows
from tests.support.hub_server import COMMIT, serve
from tests.support.launch import environment
from tests.support.models import random_tiny


def chats(prefix: str, count: int) -> list[dict]:
    """Rows as UltraFeedback has them: null fields beside those that mean something."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"{prefix} {i}", "tool_calls": None},
                {"role": "assistant", "content": f"b{i}", "tool_calls": None},
            ],
            "system": None,
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and two data sets as repositories of the Hub."""
    root = tmp_path_factory.mktemp("hub")
    model = random_tiny(root / "models/org/model")
    (model / "original").mkdir()
    (model / "original/consolidated.safetensors").write_text("another format of the weights")
    (model / "training_args.bin").write_text("a pickle")
    parquet, lines = root / "datasets/org/parquet/data", root / "datasets/org/lines"
    parquet.mkdir(parents=True), lines.mkdir(parents=True)
    for split in ("train", "test"):
        table = pyarrow.Table.from_pylist(chats(split, 6))
        pyarrow.parquet.write_table(table, parquet / f"{split}-00000-of-00001.parquet")
    write_rows(lines / "train.jsonl", chats("line", 3))
    return root


def run(home: Path, url: str, *command: object, offline: bool = False) -> subprocess.CompletedProcess:
    """`python command...` with a cache of its own, in a new process: the Hub's address is read at import."""
    hub_is = {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_OFFLINE": str(int(offline))}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(
        words, cwd=ROOT, env=environment() | hub_is, capture_output=True, text=True, timeout=300
    )


READ = """
import json, sys
from pathlib import Path
from align.data import hub
from align.data.jsonl import read_jsonl

for name in sys.argv[1:]:
    try:
        read = hub.local_model if name.startswith("org/model") else lambda path: list(read_jsonl(path))
        print(json.dumps(read(Path(name)), default=str))
    except ValueError as error:
        print(json.dumps(str(error)))
"""


def read(home: Path, url: str, *names: str, offline: bool = False) -> dict[str, list | str]:
    """The rows of data sets, the directories of models, or the error, by name."""
    done = run(home, url, "-c", READ, *names, offline=offline)
    assert done.returncode == 0, done.stderr
    return dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.slow
def test_training_from_the_hub_and_again_without_a_network(root, tmp_path):
    flags = (
        *("--model", "org/model", "--train-data", "org/parquet", "--val-data", "org/parquet:test"),
        *("--global-batch-size", 2, "--max-steps", 2, "--max-seq-len", 64, "--output", tmp_path / "run"),
    )
    with serve(root) as (url, asked):
        done = run(tmp_path, url, "train_sft.py", *flags)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "run/log.txt").read_text()
    assert f"from org/model ({COMMIT})" in log and "6 rows" in log
    assert "train 0" in log and "⟦b0" in log  # the first example, of the split "train"
    assert not [path for path in asked if "original" in path or "training_args" in path]
    again = read(tmp_path, url, "org/model", "org/parquet:test", offline=True)  # from the cache
    assert COMMIT in again["org/model"] and len(again["org/parquet:test"]) == 6


FOUND = {  # rows, the first one's question
    "org/parquet:test": (6, "test 0"),
    "org/parquet@main:train": (6, "train 0"),
    "org/parquet/default:train[2:4]": (2, "train 2"),
    "org/lines": (3, "line 0"),
}
MISSING = {
    "org/parquet:validation": "Unknown split",
    "org/parquet/main:train": "BuilderConfig 'main' not found",
    "org/none": "404",
    "org/model_of_nobody": "404",
}


def test_what_the_hub_has_and_has_not(root, tmp_path):
    with serve(root) as (url, _):
        contents = read(tmp_path, url, *FOUND, *MISSING)
    for name, (count, first) in FOUND.items():
        turns = [{"role": "user", "content": first}, {"role": "assistant", "content": "b" + first[-1]}]
        assert len(contents[name]) == count
        assert contents[name][0] == [f"{name}: row 1", {"messages": turns}]  # without the null fields
    for name, words in MISSING.items():
        assert (
            contents[name].startswith(f"{name} is no ")
            and words in contents[name]
            and "\n" not in contents[name]
        )
        assert "Without a network" not in contents[name]


def test_without_a_network(tmp_path):
    url = "http://127.0.0.1:9"  # nobody listens
    contents = read(tmp_path, url, "org/model", "org/parquet", offline=True)
    assert "Without a network run `hf download org/model --local-dir DIR`" in contents["org/model"]
    assert "`hf download --repo-type dataset org/parquet --local-dir DIR`" in contents["org/parquet"]
    assert read(tmp_path, url, "org/model")["org/model"].startswith("org/model is no directory here")


@pytest.mark.parametrize(
    "path, is_data",
    [
        ("org/name", True),
        ("org/name:train", True),
        ("org/name/config@v1.0:train[:10%]", True),
        ("data.jsonl", False),
        ("org/rows.jsonl", False),  # a mistyped file
        ("org/rows.json.gz", False),
        ("tests/name", False),  # tests is a directory here
        ("/org/name", False),
        ("a/b/c/d", False),
    ],
)
def test_which_paths_are_of_the_hub(monkeypatch, path, is_data):
    monkeypatch.chdir(ROOT)
    assert hub.is_data(Path(path)) == is_data


def test_validation_data_names_its_split():
    with pytest.raises(UserError, match="--val-data org/name: name a split"):
        train_sft.Config(train_data=(Path("org/name"),), val_data=(Path("org/name"),))
    train_sft.Config(train_data=(Path("org/name"),), val_data=(Path("org/name:test"),))
