"""Offloaded state returns bit for bit, training is unchanged, and the memory is freed meanwhile."""

import json
import os
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor

from align.distributed import parallel
from align.tracking.metrics import Clock
from align.training import offload, phases
from align.training.offload import HostStore, Weights
from align.training.phases import Phases
from tests.support.launch import fork_ranks, torchrun
from tests.support.resume import fingerprint

MEASURES = os.access("/proc/self/clear_refs", os.W_OK)
SETTINGS = {
    1: [dict(family="llama", precision="fp32"), dict(family="qwen3", precision="bf16")],
    2: [
        dict(family="llama", precision="fp32"),
        dict(family="llama_tied", precision="bf16"),
        dict(family="llama", precision="bf16", tp=2),
        dict(family="llama_tied", precision="fp32", pp=2),
    ],
}


@pytest.fixture(scope="module", autouse=True)
def world():
    with parallel.start(parallel.ParallelConfig()):
        yield


# ---- shelf -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "files"])
def store(request, tmp_path) -> HostStore:
    return HostStore(tmp_path / "waits" if request.param == "files" else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7, 5), (1000, 1001)])
def test_a_copy_is_equal_and_its_own(store, dtype, shape):
    tensor = (torch.randn(shape) * 50).to(dtype)
    copy, kept = store.copy(tensor), tensor.clone()
    tensor.zero_()
    store.drop_pages()
    assert (copy.dtype, copy.shape, copy.requires_grad) == (dtype, torch.Size(shape), False)
    assert torch.equal(copy, kept)
    copy.copy_(kept.flip(0) if shape else kept)
    store.drop_pages()
    assert torch.equal(copy, kept.flip(0) if shape else kept)


def test_files_have_no_names_and_do_not_stay_open(tmp_path):
    store, opened = HostStore(tmp_path), len(os.listdir("/dev/fd"))
    copies = [store.copy(torch.full((100,), float(i))) for i in range(50)]
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/dev/fd")) == opened
    assert all(torch.equal(copy, torch.full((100,), float(i))) for i, copy in enumerate(copies))


def test_shelves_make_their_directory(tmp_path):
    HostStore(tmp_path / "a" / "b").copy(torch.ones(3))
    assert os.listdir(tmp_path / "a" / "b") == []


# ---- lent and parked weights -----------------------------------------------------------------------------


def test_lent_weights_compute_and_leave_no_trace(store):
    torch.manual_seed(0)
    module, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    shared = module.weight.data  # as Megatron's buffers share memory with parameters
    kept, before = Weights(module, store), module(x).detach()
    with torch.no_grad():
        module.weight.add_(1.0)
    trained = module(x).detach()
    with kept.swapped_into(module):
        assert torch.equal(module(x), before)
    assert torch.equal(module(x), trained)
    assert module.weight.data.data_ptr() == shared.data_ptr()
    shared.zero_()  # an optimizer's update of the buffer is one of the parameter
    assert torch.equal(module.weight, torch.zeros(2, 3))
    with kept.swapped_into(module):
        assert torch.equal(module(x), before)


def test_weights_follow_a_module(store):
    """From then on they are those that it had; training after that does not change them."""
    torch.manual_seed(0)
    module, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    kept = Weights(module, store)
    places = {name: tensor.data_ptr() for name, tensor in kept.held.items()}
    for _ in range(2):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        now = module(x).detach()
        with kept.swapped_into(module):
            assert not torch.equal(module(x), now)
        kept.follow(module)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        with kept.swapped_into(module):
            assert torch.equal(module(x), now)
        assert not module(x).any()
    assert {name: tensor.data_ptr() for name, tensor in kept.held.items()} == places  # and takes no memory
    assert not any(tensor.requires_grad for tensor in kept.held.values())


def test_an_error_gives_the_weights_back():
    module = torch.nn.Linear(2, 2)
    kept, own = Weights(module), module.weight.data_ptr()
    with pytest.raises(FloatingPointError), kept.swapped_into(module):
        raise FloatingPointError
    assert module.weight.data_ptr() == own


def test_parked_weights_hold_no_memory(store):
    torch.manual_seed(0)
    module, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    before = module(x)
    weights = offload.offload_module(module, store)
    for _ in range(2):
        assert [parameter.untyped_storage().nbytes() for parameter in module.parameters()] == [0, 0]
        with weights.swapped_into(module):
            assert torch.equal(module(x), before)


def test_shelves_of_different_weights_are_their_own():
    assert Weights(torch.nn.Linear(1, 1)).store is not Weights(torch.nn.Linear(1, 1)).store


# ---- released memory -------------------------------------------------------------------------------------


def test_released_memory_comes_back_under_every_view():
    whole = torch.arange(10.0)
    views = [whole[2:5], whole[5:].view(5, 1)]  # neither reaches the beginning
    sizes = offload.release(views)
    assert list(sizes.values()) == [40]
    assert whole.untyped_storage().nbytes() == 0
    offload.restore(sizes)
    whole.copy_(torch.arange(10.0) * 2)
    assert views[0].tolist() == [4, 6, 8] and views[1].flatten().tolist() == [10, 12, 14, 16, 18]


def test_memory_is_restored_once():
    tensor = torch.ones(3)
    sizes = offload.release([tensor])
    offload.restore(sizes)
    with pytest.raises(AssertionError, match="was not released"):
        offload.restore(sizes)


# ---- phases, of stand-ins for models ---------------------------------------------------------------------

WIDTH = 1600  # a matrix [WIDTH, WIDTH] of fp32 is 10.24 MB, two make 0.02 GB


class Recorder(HostStore):
    """A store that remembers how many bytes each new copy took."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.bytes_copied: list[int] = []

    def copy(self, tensor: Tensor) -> Tensor:
        self.bytes_copied.append(tensor.nbytes)
        return super().copy(tensor)


def stand_in(main_weights: bool) -> tuple[torch.nn.Module, SimpleNamespace]:
    """A module with gradients in one buffer, and AdamW with main weights of its own, or with the module's."""
    module = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)))
    buffer = torch.zeros(2, WIDTH, WIDTH)
    for weight, gradient in zip(module.parameters(), buffer, strict=True):
        weight.main_grad = gradient
    weights = [weight.detach().clone() if main_weights else weight.detach() for weight in module.parameters()]
    adam = torch.optim.AdamW(weights)
    for weight in weights:
        moments = {name: torch.rand_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        adam.state[weight] = {"step": torch.ones(()), **moments}
    return module, SimpleNamespace(optimizer=adam, is_stub_optimizer=False)


@pytest.fixture
def make(tmp_path) -> Callable[..., SimpleNamespace]:
    """Phases of a policy with main weights in the weights themselves, and a critic with its own."""

    def make(enabled: bool = True) -> SimpleNamespace:
        models = {"policy": stand_in(False), "critic": stand_in(True)}
        store, clock, lines = Recorder(tmp_path / "waits"), Clock(), []
        phase = Phases(clock, lines.append, store, enabled=False)
        for name, pair in models.items():
            phase.add(name, *pair)  # and stays where it is
        phase.enabled = enabled
        return SimpleNamespace(
            phase=phase,
            models=models,
            store=store,
            clock=clock,
            lines=lines,
        )

    return make


def test_what_is_told_when_a_phase_comes_first(make):
    setting = make()
    for _ in range(2):
        with setting.phase("generate", policy="weights"):
            pass
        with setting.phase("train", critic="all"):
            pass
        with setting.phase("train", policy="all"):
            pass
        with setting.phase("score"):
            pass
        with setting.phase("save", policy="all", critic="all"):
            pass
    assert setting.lines == [
        "generate policy: resident policy weights 0.02 GB; offloaded policy gradients (dropped) 0.02, "
        "policy optimizer 0.04, critic 0.10 GB",
        "train critic: resident critic 0.10 GB; offloaded policy 0.08 GB",
        "train policy: resident policy 0.08 GB; offloaded critic 0.10 GB",
        "score: resident nothing; offloaded policy 0.08, critic 0.10 GB",
        "save policy critic: resident policy 0.08, critic 0.10 GB; offloaded nothing",
    ]


def values(setting: SimpleNamespace, name: str) -> dict[str, list[Tensor]]:
    """Tensors of a stand-in by part."""
    module, optimizer = setting.models[name]
    states = optimizer.optimizer.state
    return {
        "weights": [weight.data for weight in module.parameters()],
        "gradients": [weight.main_grad for weight in module.parameters()],
        "main": list(states),
        "moments": [state[key] for state in states.values() for key in ("exp_avg", "exp_avg_sq")],
        "steps": [state["step"] for state in states.values()],
    }


def test_a_model_waits_once_it_is_added(tmp_path):
    """So that the next one finds room."""
    phase, (module, adam) = Phases(Clock(), print, HostStore(tmp_path), enabled=True), stand_in(True)
    before = module[0].weight.detach().clone()
    phase.add("policy", module, adam)
    assert module[0].weight.untyped_storage().nbytes() == 0
    with phase("train", policy="all"):
        assert torch.equal(module[0].weight, before)


def test_what_did_not_change_is_not_copied_again(make):
    """Weights that only computed have their copy already; those that were trained have not."""
    setting, copied = make(), []
    weight = values(setting, "policy")["weights"][0]
    with setting.phase("score"):
        pass
    copies = setting.phase.parts["policy", "weights"].copies
    for needs, value in (({"policy": "weights"}, 1.0), ({"policy": "all"}, 2.0)):
        with setting.phase("any", **needs):
            weight.data.fill_(value)
        with setting.phase("score"):
            copied.append(float(copies[weight.untyped_storage()].view(torch.float32)[0]))
    assert copied[0] != 1.0 and copied[1] == 2.0


def test_values_return_and_gradients_are_dropped(make):
    setting = make()
    for _ in range(3):
        before = {
            name: {
                kind: [x.clone() for x in tensors_of] for kind, tensors_of in values(setting, name).items()
            }
            for name in setting.models
        }
        with setting.phase("score"):
            for name in setting.models:
                sizes = {
                    kind: [x.untyped_storage().nbytes() for x in tensors_of]
                    for kind, tensors_of in values(setting, name).items()
                }
                assert sizes.pop("steps") == [4, 4]  # too small to move
                assert not any(map(sum, sizes.values()))
        with setting.phase("train", policy="all", critic="all"):
            for name in setting.models:
                tensors_of = values(setting, name)
                assert tensors_of.pop("gradients")[1].untyped_storage().nbytes() == 2 * 4 * WIDTH**2
                for kind, tensors in tensors_of.items():
                    assert all(map(torch.equal, tensors, before[name][kind])), (name, kind)
                for tensor in tensors_of["weights"] + tensors_of["moments"] + tensors_of["main"]:
                    tensor.data.add_(1.0)  # the next time these are to return
    mib = 4 * WIDTH**2
    assert sorted(setting.store.bytes_copied) == [mib] * (
        2 + 4 + 2 + 2 + 4
    )  # once: weights, moments, main weights


def test_main_weights_that_are_the_weights_stay_so(make):
    setting = make()
    with setting.phase("score"):
        pass
    with setting.phase("train", policy="all", critic="all"):
        for name, same in (("policy", 1.0), ("critic", 0.0)):
            tensors_of = values(setting, name)
            with torch.no_grad():
                tensors_of["weights"][0].zero_()
                tensors_of["main"][0].fill_(1.0)
            assert tensors_of["weights"][0].mean() == same


def test_an_optimizer_may_make_new_tensors(make):
    """As when a checkpoint is loaded, or in Transformer Engine's first step. The old ones are let go."""
    setting = make()
    state = next(iter(setting.models["critic"][1].optimizer.state.values()))
    for value in (1.0, 2.0):
        with setting.phase("score"):
            pass
        with setting.phase("train", critic="all"):
            old = weakref.ref(state["exp_avg"].untyped_storage())
            state["exp_avg"] = torch.full_like(state["exp_avg"], value)
    with setting.phase("score"):
        pass
    assert old() is None
    with setting.phase("train", critic="all"):
        assert state["exp_avg"].mean() == 2.0


def test_only_what_must_move_moves(make):
    setting = make()
    with setting.phase("generate", policy="weights"):
        first, copies = values(setting, "policy")["weights"][0].data_ptr(), list(setting.store.bytes_copied)
    with setting.phase("logprobs", policy="weights"):
        assert values(setting, "policy")["weights"][0].data_ptr() == first
    with setting.phase("both", policy="weights", critic="weights"):
        assert values(setting, "policy")["weights"][0].data_ptr() == first
        assert not sum(x.untyped_storage().nbytes() for x in values(setting, "critic")["moments"])
    assert setting.store.bytes_copied == copies


def test_what_waits_goes_before_what_is_needed_comes(make, monkeypatch):
    """Between two phases that need different models there is never more than one of them."""
    setting, most = make(), []
    with setting.phase("train", policy="all"):
        pass

    def resident() -> int:
        tensors = [
            x for name in setting.models for tensors_of in values(setting, name).values() for x in tensors_of
        ]
        return sum(offload.storages(tensors).values())

    come = phases.Part.onload
    monkeypatch.setattr(phases.Part, "onload", lambda part: (come(part), most.append(resident())))
    with setting.phase("train", critic="all"):
        pass
    assert max(most) == resident()
    with setting.phase("train", policy="all"):
        assert max(most) > resident()  # the critic is the larger one


def test_weights_are_lent_while_the_own_wait(make):
    setting, x = make(), torch.randn(2, WIDTH)
    module = setting.models["policy"][0]
    kept, before = Weights(module, setting.store), module(x)
    with torch.no_grad():
        module[0].weight.mul_(2.0)
    trained = module(x)
    with setting.phase("reference"), kept.swapped_into(module):
        assert torch.equal(module(x), before)
    with setting.phase("logprobs", policy="weights"):
        assert torch.equal(module(x), trained)


def test_not_enabled_nothing_moves_but_all_is_measured(make):
    setting = make(enabled=False)
    before = {
        name: [x.data_ptr() for x in sum(values(setting, name).values(), [])] for name in setting.models
    }
    with setting.phase("score"):
        after = {
            name: [x.data_ptr() for x in sum(values(setting, name).values(), [])] for name in setting.models
        }
    assert after == before and setting.store.bytes_copied == []
    assert setting.lines == ["score: resident policy 0.08, critic 0.10 GB; offloaded nothing"]
    assert set(setting.clock.seconds) == {"other", "offload", "score"}
    assert list(setting.phase.memory()) == (["memory/score"] if MEASURES else [])


def test_time_of_moves_and_of_phases(make, monkeypatch):
    """The moves before a phase count as "offload", the phase by its name, whatever model it is of."""
    setting, now = make(), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(setting.phase, "move", lambda kept: now.__setitem__(0, now[0] + 1.0))
    setting.clock.last = 0.0
    for needs in ({"policy": "all"}, {"critic": "all"}):
        with setting.phase("train", **needs):
            now[0] += 10.0
    assert setting.clock.seconds == {"other": 0.0, "offload": 2.0, "train": 20.0}


def test_an_unknown_model_or_need_is_refused(make):
    setting = make()
    for needs in ({"policy": "weight"}, {"teacher": "all"}, {"policy": True}):
        with pytest.raises(AssertionError), setting.phase("score", **needs):
            pass


def test_peaks_by_phase(make, monkeypatch):
    """Each time counts from the phase's start to its end, the larger one of a phase, until they are told."""
    setting, events, numbers = make(), [], iter([150, 50, 10, 60, 70, 20])
    monkeypatch.setattr(setting.phase, "move", lambda kept: events.append("move"))
    monkeypatch.setattr(phases, "start_peak", lambda: events.append("start") or True)
    monkeypatch.setattr(phases, "peak_bytes", lambda: events.append("read") or next(numbers) * 10**6)

    def run(name: str, **needs: str) -> None:
        with setting.phase(name, **needs):
            events.append("phase")

    run("train", policy="all")
    run("train", critic="all")
    run("train", policy="all")
    run("train", critic="all")
    run("logprobs", critic="weights", policy="weights")
    told = {"memory/train_policy": 0.15, "memory/train_critic": 0.06, "memory/logprobs_critic_policy": 0.07}
    peaks = setting.phase.memory()
    assert peaks == told and list(peaks) == list(told)
    assert setting.phase.memory() == {}
    run("train", policy="all")
    assert setting.phase.memory() == {"memory/train_policy": 0.02}
    assert events == ["move", "start", "phase", "read"] * 6


def test_peaks_that_the_system_does_not_count(make, monkeypatch):
    setting = make()
    monkeypatch.setattr(phases, "start_peak", lambda: False)
    monkeypatch.setattr(phases, "peak_bytes", lambda: 10**6)
    with setting.phase("train", policy="all"):
        pass
    assert setting.phase.memory() == {}


@pytest.mark.skipif(not MEASURES, reason="this system does not count peaks of memory anew")
def test_a_peak_is_seen_and_counted_anew():
    """600 MB for a moment; of them 300, because the process has other pages that come and go."""
    parallel.free_memory()  # what is free already would take the 600 MB
    assert phases.start_peak()
    before = phases.peak_bytes()
    torch.ones(600 * 10**6, dtype=torch.uint8, device=parallel.device())
    parallel.free_memory()  # which cpu.keep_memory has the process keep
    high = phases.peak_bytes()
    assert phases.start_peak()
    assert high - before > 300e6
    assert high - phases.peak_bytes() > 300e6


# ---- a GPU's two streams, played on the CPU --------------------------------------------------------------


class SideStream:
    """The side stream at its slowest: it copies only when the main stream, which never lags, waits for it.

    Memory that was released before a copy from it ran holds garbage by then, unless the stream is recorded.
    """

    def __init__(self):
        self.pending: list[list[Tensor]] = []  # destination, source
        self.recorded: set[torch.UntypedStorage] = set()
        self.follows, self.active, self.copied = False, False, 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        copy, resize = Tensor.copy_, torch.UntypedStorage.resize_
        main = SimpleNamespace(wait_event=lambda event: event(), synchronize=lambda: None)
        monkeypatch.setattr(torch.UntypedStorage, "is_cuda", property(lambda storage: True))
        monkeypatch.setattr(phases, "side_stream", lambda: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        monkeypatch.setattr(Tensor, "record_stream", lambda x, _: self.recorded.add(x.untyped_storage()))
        monkeypatch.setattr(Tensor, "copy_", lambda x, y, **how: self.queue(x, y, copy, how))
        monkeypatch.setattr(torch.UntypedStorage, "resize_", lambda *call: self.release(*call, resize))
        self.copy = copy

    def wait_stream(self, stream: object) -> None:
        self.follows = True

    def __enter__(self) -> None:
        self.active = True

    def __exit__(self, *error: object) -> None:
        self.active = self.follows = False

    def queue(self, x: Tensor, y: Tensor, copy: Callable, how: dict[str, bool]) -> Tensor:
        if not self.active:
            return copy(x, y)
        assert self.follows, "the main stream may still compute what is copied"
        self.pending.append([x, y])
        if not how.get("non_blocking"):
            self.run(len(self.pending))
        return x

    def release(self, storage: torch.UntypedStorage, size: int, resize: Callable) -> None:
        for entry in self.pending:
            if entry[1].untyped_storage() == storage:
                entry[1] = entry[1].clone() if storage in self.recorded else torch.full_like(entry[1], 0xCD)
        self.recorded.discard(storage)
        resize(storage, size)

    def record_event(self) -> Callable[[], None]:
        now = self.copied + len(self.pending)
        return lambda: self.run(now - self.copied)

    def run(self, count: int) -> None:
        for x, y in self.pending[:count]:
            self.copy(x, y)
        self.pending, self.copied = self.pending[count:], self.copied + max(count, 0)


def test_copies_that_leave_run_beside_and_are_complete_when_they_return(make, monkeypatch):
    setting, side = make(), SideStream()
    side.install(monkeypatch)
    beside = []
    for step in range(3):
        with setting.phase("train", policy="all", critic="all"):
            for name in setting.models:
                for tensor in sum(
                    (values(setting, name)[kind] for kind in ("weights", "main", "moments")), []
                ):
                    tensor.mul_(1.5).add_(step)
            before = {name: values(setting, name) for name in setting.models}
            before = {
                name: {k: [x.clone() for x in v] for k, v in tensors_of.items()}
                for name, tensors_of in before.items()
            }
        with setting.phase("score"):
            beside.append(len(side.pending))
        with setting.phase("generate", policy="weights"):
            assert torch.equal(setting.models["policy"][0][1].weight, before["policy"]["weights"][1])
            assert step == 0 or side.pending  # the critic's copies are not waited for
        with setting.phase("save", policy="all", critic="all"):
            for name, tensors_of in before.items():
                for kind in ("weights", "main", "moments"):
                    assert all(map(torch.equal, values(setting, name)[kind], tensors_of[kind])), (
                        step,
                        name,
                        kind,
                    )
    # the first copies make their places, and wait; then: 2 + 4 tensors of the policy, 2 + 6 of the critic
    assert beside == [0, 14, 14]


# ---- training, in several layouts ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SETTINGS)
def trained(request, models, tmp_path_factory) -> tuple[Path, list[list[dict]]]:
    """A folder, and by rank and setting the training without moves and with moves."""
    output, processes = tmp_path_factory.mktemp("trained"), request.param
    cases = json.dumps(SETTINGS[processes])
    fork_ranks(processes, "tests/workers/offload.py", "train", models, output, cases)
    return output, [json.loads((output / f"train{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
def test_training_does_not_notice(trained):
    """Losses, gradient norms, log-probs, values, weights, main weights and moments, bit for bit."""
    for rank in trained[1]:
        for plain, moved in rank:
            assert moved["history"] == plain["history"]
            assert moved["bits"] == plain["bits"]


@pytest.mark.slow
def test_each_step_changes_something(trained):
    """Else the test before this one would prove nothing."""
    for rank in trained[1]:
        for plain, _ in rank:
            for earlier, later in pairwise(plain["history"]):
                assert later["policy_grad_norm"] != earlier["policy_grad_norm"] > 0
                assert later["critic_grad_norm"] != earlier["critic_grad_norm"] > 0
                assert later["generate"] != later["reference"]  # the policy is no longer what it was
            assert plain["history"][0]["generate"] == plain["history"][0]["reference"]


@pytest.mark.slow
def test_checkpoints_do_not_notice(trained):
    output, ranks = trained
    for number in range(len(ranks[0])):
        for name in ("policy", "critic"):
            hashes = {}
            for kind in ("plain", "moved"):
                place = output / str(number) / name / kind
                (place / "hf").mkdir()
                hashes[kind] = fingerprint(place)
            moment = "optimizer.state.exp_avg_sq.decoder.final_layernorm.weight"
            assert moment in hashes["plain"] and hashes["moved"] == hashes["plain"]


@pytest.mark.slow
def test_every_rank_reports_the_same_phases(trained):
    labels = "generate_policy score reference both_policy_critic train_critic train_policy save_policy_critic"
    for number in range(len(trained[1][0])):
        moved = [rank[number][1] for rank in trained[1]]
        for run in moved:
            assert [line.split(":")[0].replace(" ", "_") for line in run["lines"]] == labels.split()
            assert run["memory"] == moved[0]["memory"]
            assert list(run["memory"]) == [f"memory/{label}" for label in labels.split()] * MEASURES


# ---- memory ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["files", "memory"])
def measured(request, tmp_path_factory) -> tuple[bool, dict]:
    """Memory of a model of about 200 MB in several phases, and whether it is offloaded to files."""
    directory = tmp_path_factory.mktemp("measured")
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=8)
    config = transformers.LlamaConfig(
        vocab_size=131,
        num_key_value_heads=8,
        max_position_embeddings=64,
        architectures=["LlamaForCausalLM"],
        **sizes,
    )
    config.save_pretrained(directory)
    torchrun(1, "tests/workers/offload.py", "memory", directory, directory, json.dumps([request.param]))
    return request.param, json.loads((directory / "memory0.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(not MEASURES, reason="this system does not count peaks of memory anew")
def test_resident_memory_falls_and_rises(measured):
    in_files, sizes = measured
    weights, gradients = sizes["sizes"]["weights"], sizes["sizes"]["gradients"]
    moments, resident = sizes["sizes"]["moments"], sizes["resident"]
    assert sizes["sizes"]["main"] > 0.9 * weights > 180e6
    all_parts = weights + gradients + moments
    for phase in ("score", "later"):  # copies in memory are there all the time
        assert 0.8 * all_parts < resident["start"] - resident[phase] < 1.1 * all_parts
    if in_files:
        assert 0.8 * weights < resident["generate"] - resident["score"] < 1.2 * weights
        assert abs(resident["train"] - resident["start"]) < 0.1 * all_parts
        peaks = sizes["peaks"]
        assert peaks["memory/start_policy"] - peaks["memory/score"] > 0.8 * all_parts / 1e9
        assert peaks["memory/generate_policy"] * 1e9 < resident["generate"] + 0.2 * weights
    assert sizes["second"] == {}
