"""Damage of a run directory is named in one line, and nothing that a stranger left there runs."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from align.training import checkpoint, checkpoint_files
from tests.support.files import MEGATRON_0_16, write_rows
from tests.support.launch import fork_python
from tests.support.rows import chats, comparisons

Damage = Callable[[Path], object]
LAST = "checkpoints/step_00000002"
COMMON = (
    "--max-seq-len 64 --global-batch-size 2 --max-steps 3 --warmup-steps 1 --save-interval 1 --save-top-k 9 "
    "--monitor train/loss"
)
RL = (
    "--prompts-per-step 2 --samples-per-prompt 2 --global-batch-size 4 --max-new-tokens 4 --truncated keep "
    "--max-prompt-len 64 --max-steps 3 --warmup-steps 1 --save-interval 1 --save-top-k 9 "
    "--reward-fn align.data.toy:reward --monitor train_rollouts/rewards"
)
SELF_REWARD = (
    "--samples-per-prompt 2 --judgements 2 --temperature 0.8 --rollout-ahead 3 --max-new-tokens 38 "
    "--global-batch-size 4 --max-seq-len 36 --steps-per-iteration 3 --iterations 1 --monitor train/loss "
    "--max-steps 3 --warmup-steps 1 --save-interval 1 --save-top-k 9"
)
STREAM = "step_00000001"  # of the step with which sampling began


def flip(path: Path) -> None:
    """One bit of the byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zeros(path: Path) -> None:
    """Up to 1 KB of zeros, from a third on."""
    content, third = path.read_bytes(), path.stat().st_size // 3
    count = min(1024, len(content) - third)
    path.write_bytes(content[:third] + bytes(count) + content[third + count :])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def delete(path: Path) -> None:
    path.unlink()


def line(text: str) -> Damage:
    """A line more at the front of a jsonl file."""
    return lambda path: path.write_text(text + "\n" + path.read_text())


def first_line_only(path: Path) -> None:
    path.write_text(path.read_text().splitlines(keepends=True)[0])


def of_step_1(path: Path) -> None:
    """The file, or folder, of the checkpoint before."""
    other = Path(str(path).replace("step_00000002", "step_00000001"))
    if path.is_dir():
        shutil.rmtree(path)
        shutil.copytree(other, path)
    else:
        shutil.copy(other, path)


def other_value(path: Path) -> None:
    """One value of a table, in a file that is whole."""
    arrays = load_file(path)
    with safe_open(path, "np") as file:
        described = file.metadata()
    arrays["train"][0, 0] -= 1e-3
    save_file(arrays, path, metadata=described)


def other_step(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 2', '"step": 1'))


COMMON_FILES = ("common.pt",) if MEGATRON_0_16 else ()  # later ones have it in .metadata
FILES = (".metadata", *COMMON_FILES, "metadata.json", "state.json", "__0_0.distcp")
DAMAGES: dict[tuple[str, str, str], tuple[Damage, str]] = {  # (run, file, kind): how, words of the message
    ("sft", f"{LAST}/{file}", kind.__name__): (kind, file)
    for file in FILES
    for kind in (flip, zeros, truncate, empty, delete)
}
DAMAGES |= {
    ("sft", f"{LAST}/__0_0.distcp", "of_step_1"): (of_step_1, "__0_0.distcp has other bytes"),
    ("sft", f"{LAST}/state.json", "other_step"): (other_step, "state.json has other values"),
    ("sft", "metrics.jsonl", "delete"): (delete, "metrics.jsonl: it must reach step 2"),
    ("sft", "metrics.jsonl", "empty"): (empty, "metrics.jsonl: it must reach step 2"),
    ("sft", "metrics.jsonl", "first_line_only"): (first_line_only, "metrics.jsonl: it must reach step 2"),
    ("sft", "metrics.jsonl", "blank"): (line(""), "metrics.jsonl:1: not valid JSON"),
    ("sft", "metrics.jsonl", "torn"): (line('{"step": 1, "tra'), "metrics.jsonl:1: not valid JSON"),
    ("sft", "metrics.jsonl", "list"): (line("[1]"), "metrics.jsonl:1: a row of a run has a step"),
    ("sft", "config.json", "truncate"): (truncate, "config.json: not valid JSON"),
    ("sft", "config.json", "empty"): (empty, "config.json: not valid JSON"),
    ("dpo", "reference.safetensors", "flip"): (flip, "reference.safetensors is damaged"),
    ("dpo", "reference.safetensors", "truncate"): (truncate, "reference.safetensors is damaged"),
    ("dpo", "reference.safetensors", "empty"): (empty, "reference.safetensors is damaged"),
    ("dpo", "reference.safetensors", "other_value"): (other_value, "reference.safetensors is damaged"),
    ("ppo", f"{LAST}/critic", "of_step_1"): (of_step_1, "critic/"),
    ("ppo", f"{LAST}/critic/.metadata", "truncate"): (truncate, "critic/.metadata has"),
    ("ppo", f"{LAST}/critic/__0_0.distcp", "flip"): (flip, "critic/__0_0.distcp has other bytes"),
    **{
        ("ppo", f"{LAST}/critic/{file}", "delete"): (delete, f"critic/{file} is missing")
        for file in COMMON_FILES
    },
    ("ppo", "samples.jsonl", "torn"): (line('{"step": 1, "tab'), "samples.jsonl:1: not valid JSON"),
    ("self_reward", f"{LAST}/reference", "of_step_1"): (of_step_1, "reference/"),
    ("self_reward", f"{LAST}/reference/__0_0.distcp", "flip"): (flip, "reference/__0_0.distcp has other"),
    ("self_reward", f"{LAST}/reference/.metadata", "delete"): (delete, "reference/.metadata is missing"),
}
DAMAGES |= {
    ("self_reward", f"{LAST}/judgements.json", kind.__name__): (kind, "judgements.json")
    for kind in (flip, truncate, empty, delete)
}
DAMAGES |= {  # sampled for the third step as well
    ("self_reward", f"rollouts/{STREAM}_{part}.safetensors", kind.__name__): (kind, f"{STREAM}_{part}")
    for part in ("generate", "judge")
    for kind in (flip, zeros, truncate, empty)
}


def attempt(folder: Path, commands: list[list[object]]) -> list[str | None]:
    """The errors of commands in one process; None for one that runs to its end."""
    folder.mkdir(exist_ok=True)
    (folder / "commands.json").write_text(json.dumps([list(map(str, words)) for words in commands]))
    fork_python("tests/workers/scripts.py", folder)
    return json.loads((folder / "errors.json").read_text())


@pytest.fixture(scope="module")
def runs(toy_judge: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[object]]]:
    """A folder with a run of each script after two of three steps, and the commands without --output."""
    folder = tmp_path_factory.mktemp("damage")
    rows = write_rows(folder / "rows.jsonl", chats(8, seed=0))
    pairs = write_rows(folder / "pairs.jsonl", comparisons(8, seed=0))
    prompts = [{"prompt": [{"role": "user", "content": f"sort: d {x} a c"}]} for x in "befghijk"]
    prompts = write_rows(folder / "prompts.jsonl", prompts)
    commands = {
        "sft": ["train_sft.py", "--train-data", rows, *COMMON.split()],
        "dpo": ["train_dpo.py", "--train-data", pairs, *COMMON.split()],
        "ppo": ["train_ppo.py", "--train-data", prompts, *RL.split()],
        "self_reward": ["train_self_reward.py", *SELF_REWARD.split()],
    }
    judge = {"--model": "hf", "--train-data": "data/train.jsonl", "--judge-template": "data/judge.txt"}
    commands["self_reward"] += [word for flag, path in judge.items() for word in (flag, toy_judge / path)]
    first = [*commands["self_reward"], "--output", folder / "self_reward", "--max-time", "00:00:00"]
    assert attempt(folder, [first]) == [None]
    rollouts = shutil.copytree(folder / "self_reward/rollouts", folder / "rollouts")
    commands_of_runs = [[*words, "--output", folder / name] for name, words in commands.items()]
    assert attempt(folder, commands_of_runs) == [None] * 4
    shutil.copytree(rollouts, folder / "self_reward/rollouts", dirs_exist_ok=True)
    for name in commands:  # back to step 2
        shutil.rmtree(folder / name / "checkpoints/step_00000003")
        shutil.rmtree(folder / name / "hf")
    return folder, commands


@pytest.fixture(scope="module")
def damaged(runs) -> dict[tuple[str, str, str], str | None]:
    folder, commands = runs
    attempts = []
    for number, ((run, file, _), (damage, _)) in enumerate(DAMAGES.items()):
        output = shutil.copytree(folder / run, folder / str(number))
        damage(output / file)
        attempts.append([*commands[run], "--output", output])
    errors = attempt(folder / "attempts", attempts)
    return dict(zip(DAMAGES, errors, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGES, ids=lambda what: " ".join(what))
def test_damage_is_named(damaged, what):
    error, words = damaged[what], DAMAGES[what][1]
    assert error is not None, "the run went on"
    assert words in error and "\n" not in error, error
    if LAST in what[1]:
        assert "--resume-from " in error and "step_00000001 goes on before it" in error


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(runs):
    folder, commands = runs
    output = shutil.copytree(folder / "sft", folder / "before")
    flip(output / LAST / "__0_0.distcp")
    earlier = output / "checkpoints/step_00000001"
    again = [*commands["sft"], "--output", output, "--resume-from", earlier]
    whole = [*commands["sft"], "--output", folder / "whole"]
    assert attempt(folder / "attempts", [again, whole]) == [None, None]

    def losses(run: Path) -> list[float]:
        return [json.loads(row)["train/loss"] for row in (run / "metrics.jsonl").read_text().splitlines()]

    assert losses(output) == losses(folder / "whole") and len(losses(output)) == 3


# ---- pickles -------------------------------------------------------------------------------------


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def plant_metadata(checkpoint_path: Path, mark: Path) -> None:
    (checkpoint_path / ".metadata").write_bytes(pickle.dumps(Planted(mark)))


def plant_by_path(checkpoint_path: Path, mark: Path) -> None:
    """A name with a dot, which newer pickles follow from an allowed module to another one."""
    call = f"touch {mark}".encode()
    module = b"torch.distributed.checkpoint.filesystem"
    text = b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c\x09os.system\x93"
    content = text + b"\x8c" + bytes([len(call)]) + call + b"\x85R."
    (checkpoint_path / ".metadata").write_bytes(content)


def plant_common(checkpoint_path: Path, mark: Path) -> None:
    torch.save({"step": Planted(mark)}, checkpoint_path / "common.pt")


def plant_bytes(checkpoint_path: Path, mark: Path) -> None:
    """In the random states, which lie in a .distcp file."""
    path = checkpoint_path / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    [index] = [index for index in metadata.storage_data if index.fqn.startswith("rng")]
    content = io.BytesIO()
    torch.save(Planted(mark), content)
    place = metadata.storage_data[index]
    file = checkpoint_path / place.relative_path
    place.offset, place.length = file.stat().st_size, len(content.getvalue())
    with open(file, "ab") as opened:
        opened.write(content.getvalue())
    path.write_bytes(pickle.dumps(metadata))


@pytest.mark.slow
@pytest.mark.parametrize("plant", [plant_metadata, plant_by_path, plant_common, plant_bytes])
@pytest.mark.parametrize("script", ["train", "generate"])
def test_planted_code_does_not_run(runs, tmp_path, plant, script):
    """With checksums that fit, as a stranger would make them."""
    folder, commands = runs
    output = shutil.copytree(folder / "sft", tmp_path / "run")
    path, mark = output / LAST, tmp_path / "it_ran"
    plant(path, mark)
    state = checkpoint.read_state(path)
    state["files"] = {name: checkpoint_files.checksum(path / name) for name in state["files"]}
    checkpoint_files.write_state(path, state)
    train = [*commands["sft"], "--output", output]
    ask = ["generate.py", "--model", path, "--prompt", "a", "--max-new-tokens", 1]
    [error] = attempt(tmp_path, [train if script == "train" else ask])
    assert error is not None and "is damaged, or not of a checkpoint" in error, error
    assert not mark.exists()


@pytest.mark.slow
def test_the_planted_code_would_run(runs, tmp_path):
    mark = tmp_path / "ran"
    plant_by_path(tmp_path, mark)
    with pytest.raises(Exception):  # noqa: B017, what it makes is no metadata
        pickle.loads((tmp_path / ".metadata").read_bytes()).state_dict_metadata  # noqa: B018
    assert mark.exists()
