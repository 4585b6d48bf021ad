"""Samples in files: read for the same question only, the same to the last bit, and never half of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from align.distributed import parallel
from align.generation import rollout_cache
from align.generation.rollout import Sample
from align.generation.sampling import SamplingConfig
from align.training import tables
from align.training.offload import HostStore, Weights

ODD = np.array([0.1, -0.0, 1e-45, -3.4028235e38, -np.inf, -1 / 3], np.float32)  # every kind of float32


@pytest.fixture(scope="module", autouse=True)
def world():
    with parallel.start(parallel.ParallelConfig()):
        yield


def sample(length: int, finish: str, first: int = 0) -> Sample:
    """`length` tokens from `first` on, with log-probs that tell them apart."""
    ids = np.arange(first, first + length, dtype=np.int32)
    return Sample(ids, np.resize(ODD, length) - np.float32(first), np.resize(ODD[::-1], length), finish)


SOME = [[sample(3, "stop"), sample(7, "length", 100)], [sample(1, "stop", 49151), sample(7, "stop", 5)]]
UNEQUAL = [[], [sample(2, "stop"), sample(4, "length", 9), sample(1, "length")], [], [sample(6, "stop")], []]


def bits(samples: list[list[Sample]]) -> list[list[tuple]]:
    """Samples as what can be compared, types included."""
    return [
        [
            *(
                (one.finish, *((x.dtype, x.tobytes()) for x in (one.ids, one.logprobs, one.model_logprobs)))
                for one in of_prompt
            )
        ]
        for of_prompt in samples
    ]


class Made:
    """Makes the samples that it was given, and counts."""

    def __init__(self, samples: list[list[Sample]]):
        self.samples, self.times = samples, 0

    def __call__(self) -> list[list[Sample]]:
        self.times += 1
        return self.samples


def path_in(directory: Path) -> Path:
    return directory / "rollouts" / "step_00000012_generate.safetensors"


# ---- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "samples", [SOME, UNEQUAL, [[sample(5, "length")]], [[], []], []], ids=lambda x: str(len(x))
)
def test_samples_are_made_once_and_then_read(tmp_path, samples):
    """No samples of some prompt, none of any, no prompt at all: an answer that did not end is not judged."""
    path, make = path_in(tmp_path), Made(samples)
    first = rollout_cache.cached(path, "a", make)
    assert bits(first) == bits(samples) and make.times == 1
    written = path.stat().st_mtime_ns, path.stat().st_ino
    for _ in range(2):
        assert bits(rollout_cache.cached(path, "a", make)) == bits(samples)
    assert make.times == 1 and (path.stat().st_mtime_ns, path.stat().st_ino) == written
    assert list(path.parent.iterdir()) == [path]


def test_samples_of_something_else_are_replaced(tmp_path):
    path, old, new = path_in(tmp_path), Made(SOME), Made(UNEQUAL)
    rollout_cache.cached(path, "a", old)
    assert rollout_cache.read(path, "b") is None
    assert bits(rollout_cache.cached(path, "b", new)) == bits(UNEQUAL) and new.times == 1
    assert bits(rollout_cache.cached(path, "b", new)) == bits(UNEQUAL) and new.times == 1
    assert bits(rollout_cache.cached(path, "a", old)) == bits(SOME) and old.times == 2


def test_a_half_written_file_is_never_read(tmp_path, monkeypatch):
    """A kill while the file is written leaves another name, which the next file overwrites."""
    path, make = path_in(tmp_path), Made(SOME)
    save_file = tables.save_file

    def killed(arrays: dict, to: Path, metadata: dict) -> None:
        save_file(arrays, to, metadata)
        Path(to).write_bytes(Path(to).read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(tables, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        rollout_cache.cached(path, "a", make)
    [left] = path.parent.iterdir()
    assert left != path and rollout_cache.read(path, "a") is None
    monkeypatch.undo()
    assert bits(rollout_cache.cached(path, "a", make)) == bits(SOME) and make.times == 2
    assert list(path.parent.iterdir()) == [path]
    assert bits(rollout_cache.read(path, "a")) == bits(SOME)


def test_other_ranks_make_and_read_but_do_not_write(tmp_path, monkeypatch):
    path, make = path_in(tmp_path), Made(SOME)
    monkeypatch.setattr(rollout_cache.parallel, "is_main", lambda: False)
    monkeypatch.setattr(rollout_cache.parallel, "on_main", lambda read: None)  # the main rank found nothing
    assert rollout_cache.cached(path, "a", make) is SOME and not path.exists()
    monkeypatch.setattr(rollout_cache.parallel, "on_main", lambda read: UNEQUAL)
    assert rollout_cache.cached(path, "a", make) is UNEQUAL and make.times == 1


def test_files_of_finished_steps_are_deleted(tmp_path):
    names = [
        f"step_{step:08d}_{kind}.safetensors" for step in (1, 9, 10, 100) for kind in ("judge", "generate")
    ]
    others = ["step_00000001_judge.tmp", "notes.txt", "reference.safetensors"]
    for name in names + others:
        (tmp_path / name).write_text("")
    rollout_cache.discard(tmp_path, before=10)
    assert {path.name for path in tmp_path.iterdir()} == {*names[4:], *others}
    rollout_cache.discard(tmp_path / "missing", before=10)


# ---- what a file was made of -----------------------------------------------------------------------------


def ids_of(*prompts: list[int]) -> list[np.ndarray]:
    return [np.array(ids, np.int32) for ids in prompts]


def test_made_of_tells_every_difference():
    config, streams = SamplingConfig(), [(0, 1, 2), (0, 1, 3)]

    def made_of(weights="w", config=config, seed=1, number=4, prompts=([1, 2], [3]), streams=streams) -> str:
        return rollout_cache.fingerprint(weights, (config, seed, number), ids_of(*prompts), streams)

    others = [
        made_of(weights="v"),
        *(made_of(config=SamplingConfig(**flags)) for flags in ({"top_k": 5}, {"stop": ("a",)})),
        made_of(config=SamplingConfig(temperature=0.9)),
        made_of(config=SamplingConfig(max_new_tokens=255)),
        made_of(seed=2),
        made_of(number=3),
        made_of(prompts=([1, 2], [4])),
        made_of(prompts=([1], [2, 3])),  # the same ids in a row
        made_of(prompts=([1, 2, 3], [])),
        made_of(prompts=([3], [1, 2])),
        made_of(prompts=([1, 2],)),
        made_of(prompts=([1, 2], [3], [])),
        *(made_of(prompts=([first], [3])) for first in (2, 2 + 2**8, 2 + 2**16)),
        made_of(streams=[(0, 1, 2), (0, 1, 4)]),
        made_of(streams=[(0, 1, 3), (0, 1, 2)]),
        made_of(streams=[(0, 1, 2)]),
    ]
    assert len({made_of(), *others}) == len(others) + 1
    assert made_of() == made_of(config=SamplingConfig(), streams=list(streams))


def test_ids_of_another_integer_type_are_the_same_question():
    wide = [ids.astype(np.int64) for ids in ids_of([1, 2], [3])]
    assert rollout_cache.fingerprint("w", 1, wide, []) == rollout_cache.fingerprint(
        "w", 1, ids_of([1, 2], [3]), []
    )


@pytest.fixture
def make() -> Callable[[], nn.Module]:
    """Makes a module with a vector, a matrix of more numbers than are looked at, and one in bfloat16."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(100, 3), nn.Linear(3 * rollout_cache.NUMBERS, 2, bias=False))
        return module.append(nn.Linear(5, 1, bias=False, dtype=torch.bfloat16))

    return make


@pytest.mark.parametrize("number", range(4))
def test_a_change_of_any_tensor_shows(make, number, tmp_path):
    module = make()
    held = Weights(module, HostStore(tmp_path))
    first = rollout_cache.weights_digest(held)
    assert first == rollout_cache.weights_digest(held) == rollout_cache.weights_digest(Weights(make()))
    with torch.no_grad():
        list(module.parameters())[number].mul_(1.01)
    assert rollout_cache.weights_digest(held) == first  # a copy does not change by itself
    held.follow(module)
    assert rollout_cache.weights_digest(held) == rollout_cache.weights_digest(Weights(module)) != first


def test_equal_tensors_under_other_names_are_other_weights(make):
    module, other = make(), nn.ModuleDict({"other": make()})
    assert rollout_cache.weights_digest(Weights(module)) != rollout_cache.weights_digest(Weights(other))


def test_weights_of_every_rank_count(make, monkeypatch):
    held = Weights(make())

    def of_two_ranks(other: str, main: bool) -> str:
        monkeypatch.setattr(parallel, "gather", lambda own: [own, other] if main else [other, own])
        return rollout_cache.weights_digest(held)

    assert len({of_two_ranks("a", True), of_two_ranks("b", True), of_two_ranks("a", False)}) == 3
