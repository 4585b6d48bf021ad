"""--overlap-param-gather: the numbers of a run without it, bit for bit.

Buckets are small, and weights of other ranks are NaN from the optimizer step to their gather.
"""

import json
import shutil
from pathlib import Path

import pytest

from align.data import toy
from tests.support.files import reproducible_metrics
from tests.support.launch import fork_ranks
from tests.support.resume import assert_same_end, command, fingerprint

pytestmark = pytest.mark.slow

OVERLAP = "--overlap-param-gather"
STEPS = "--max-steps 6 --val-interval 3 --save-interval 2 --save-top-k 99".split()
CASES = {  # script, ranks, flags
    "sft": ("train_sft.py", 2, ""),
    "sft-bf16": ("train_sft.py", 2, "--precision bf16 --recompute full"),
    "sft-pp2": ("train_sft.py", 4, "--pp 2"),
    "sft-vp2": ("train_sft.py", 4, "--pp 2 --vp 2"),
    "sft-cp2": ("train_sft.py", 2, "--cp 2"),
    "rm": ("train_rm.py", 2, ""),
    "dpo": ("train_dpo.py", 2, ""),
    "dpo-kto": ("train_dpo.py", 2, "--reference swap --loss kto_pair"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of chats and of comparisons."""
    directory = tmp_path_factory.mktemp("data")
    toy.write(directory, num_train=80, num_val=8)
    toy.write_comparisons(directory, num_train=80, num_val=8)
    return directory


def run(ranks: int, commands: list[list]) -> None:
    """Run commands one after the other with the worker."""
    words = [[str(word) for word in words] for words in commands]
    fork_ranks(ranks, "tests/workers/param_gather.py", json.dumps(words), timeout_s=500)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> Path:
    """A folder of each case without and with the flag, and of runs that turn it on or off at a checkpoint."""
    directory = tmp_path_factory.mktemp("runs")

    def words(name: str, suffix: str, *more: object) -> list:
        script, _, flags = CASES[name]
        return command(script, data, directory / f"{name}{suffix}", *STEPS, *flags.split(), *more)

    for ranks in (2, 4):
        names = [name for name in CASES if CASES[name][1] == ranks]
        run(ranks, [words(name, "") for name in names])
        run(ranks, [words(name, "-overlap", OVERLAP) for name in names])
    for suffix in ("-on", "-off"):
        shutil.copytree(directory / "sft-overlap", directory / f"sft{suffix}")
    middle = "checkpoints/step_00000002"
    on = ("--resume-from", directory / "sft-on" / middle, OVERLAP)
    off = ("--resume-from", directory / "sft-off" / middle)
    run(2, [words("sft", "-on", *on), words("sft", "-off", *off)])
    return directory


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_the_same(name, runs):
    """Metrics with validations, checkpoints of weights and moments, the exported model."""
    output, expected = runs / f"{name}-overlap", runs / name
    assert reproducible_metrics(output) == reproducible_metrics(expected)
    assert fingerprint(output) == fingerprint(expected)
    ways = [
        ", weights gathered during the forward pass" in (run / "log.txt").read_text()
        for run in (output, expected)
    ]
    assert ways == [True, False]


@pytest.mark.parametrize("suffix", ["-on", "-off"])
def test_checkpoint_continues_with_and_without(suffix, runs):
    """From a checkpoint in the middle of a run with the flag."""
    assert_same_end(runs / f"sft{suffix}", runs / "sft")
