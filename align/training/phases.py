"""Phases of a training step: the model state that each needs on the device, its time, its peak of memory.

Parts of a model in training are offloaded as storages, the memory behind tensors. An offloaded storage has 0
bytes, and every view of it (parameters, Megatron's buffers, the optimizer's shards) is right again after the
onload. New tensors would part the views: in fp32 the optimizer's main weights are views of Megatron's buffer
of weights, and the model would learn nothing more.

A GPU offloads on a stream of its own while the next phase computes; that phase waits for its onloads only.
"""

import contextlib
import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, UntypedStorage

from align.distributed import parallel
from align.tracking.metrics import Clock
from align.training import optim
from align.training.offload import HostStore, as_bytes, release, restore, storages

NEEDS = {"weights": ("weights",), "all": ("weights", "gradients", "optimizer")}  # of a phase: kinds of parts
CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class OffloadConfig:
    """Offload of model state that the current phase does not need."""

    offload: Literal["auto", "on", "off"] = "auto"
    """on: state that a phase does not need is offloaded, to pinned host memory beside a GPU, on a CPU to
    files in OUTPUT. auto: on with GPUs that cannot hold all models at once, by tools/plan.py"""

    @property
    def enabled(self) -> bool:
        return self.offload == "on"  # resolve_offload decides auto

    def store(self, output: Path) -> HostStore:
        """Destination of offloading. Frozen weights of a GPU are offloaded in any case."""
        return HostStore(output if self.enabled else None)


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """The GPU stream of all offloads."""
    return torch.cuda.Stream()


@contextlib.contextmanager
def on_side_stream(enabled: bool) -> Iterator[torch.cuda.Stream | None]:
    """Run the block's kernels on the side stream, after all queued work; without `enabled` at once."""
    if not enabled:
        yield None
        return
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream


class Part:
    """One kind of tensors of a model in training, resident on its device or offloaded."""

    def __init__(self, tensors: Callable[[], list[Tensor]], store: HostStore | None):
        """`tensors` lists them, anew each time: an optimizer may add some. No `store`: values are dropped."""
        self.tensors, self.store = tensors, store
        self.copies: dict[UntypedStorage, Tensor] = {}  # allocated once, then overwritten
        self.changed = True  # since the last copy
        self.copied: torch.cuda.Event | None = None  # on a GPU: the last copies are complete
        self.offloaded: dict[UntypedStorage, int] = {}  # with their sizes

    @property
    def nbytes(self) -> int:
        return sum((self.offloaded or storages(self.tensors())).values())

    def offload(self) -> None:
        """Copy to the store and free the device memory. A GPU copies beside the work that is queued next."""
        if self.offloaded:
            return
        if self.changed and self.store:
            resident = storages(self.tensors())
            with on_side_stream(any(storage.is_cuda for storage in resident)) as stream:
                self.copies = {storage: self.copy(self.store, storage, stream) for storage in resident}
                self.copied = None if stream is None else stream.record_event()
            self.changed = False
        # On a GPU the allocator reuses this memory only after the copies from it, or, when it is short of
        # memory, waits for them.
        self.offloaded = release(self.tensors())

    def copy(self, store: HostStore, storage: UntypedStorage, stream: torch.cuda.Stream | None) -> Tensor:
        """Copy a storage to the store, over its last copy if there is one."""
        last_copy, values = self.copies.get(storage), as_bytes(storage)
        if stream is not None:
            values.record_stream(stream)
        if last_copy is None:
            return store.copy(values)
        return last_copy.copy_(values, non_blocking=True)

    def onload(self) -> None:
        """Copy back to the device, unless resident."""
        restore(self.offloaded)
        if self.offloaded and self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)
        for storage in self.offloaded if self.store else ():
            as_bytes(storage).copy_(self.copies[storage], non_blocking=True)
        self.offloaded = {}


def parts_of(
    model: DistributedDataParallel, optimizer: MegatronOptimizer, store: HostStore
) -> dict[str, Part]:
    """Parts of a model in training. Gradients are dropped: engine.forward_backward starts from 0."""

    def weights() -> list[Tensor]:
        return [parameter.data for parameter in model.parameters()]

    def gradients() -> list[Tensor]:
        return [weight.main_grad for weight in model.parameters() if weight.requires_grad]

    def main_weights_and_moments() -> list[Tensor]:
        tensors, of_weights = [], storages(weights())  # fp32 main weights are views of these
        for adam in optim.adams(optimizer):
            tensors += [weight.data for group in adam.optimizer.param_groups for weight in group["params"]]
            tensors += [value for state in adam.optimizer.state.values() for value in state.values()]
        tensors = [value for value in tensors if isinstance(value, Tensor) and value.numel() > 1]
        return [tensor for tensor in tensors if tensor.untyped_storage() not in of_weights]

    return {
        "weights": Part(weights, store),
        "gradients": Part(gradients, None),
        "optimizer": Part(main_weights_and_moments, store),
    }


class Phases:
    """Phases of a step: resident state, time and peak memory of each.

    with phase("logprobs", policy="weights", critic="weights"):
        ...
    """

    def __init__(self, clock: Clock, say: Callable[[str], None], store: HostStore, enabled: bool):
        """`say` logs the resident state of each phase once; not `enabled`: nothing is offloaded."""
        self.clock, self.say, self.store, self.enabled = clock, say, store, enabled
        self.parts: dict[tuple[str, str], Part] = {}  # by model and kind
        self.models: set[str] = set()
        self.logged: set[str] = set()  # labels of phases: "train policy"
        self.peaks: dict[str, float] = {}  # GB by label

    def add(self, name: str, model: DistributedDataParallel, optimizer: MegatronOptimizer) -> None:
        """Add a model in training; it is offloaded until a phase needs it."""
        self.models.add(name)
        self.parts |= {(name, kind): part for kind, part in parts_of(model, optimizer, self.store).items()}
        if self.enabled:
            self.move(set())

    @contextlib.contextmanager
    def __call__(self, name: str, /, **needs: str) -> Iterator[None]:
        """`needs`: "weights" of a model, or "all" of it to train it. The rest is offloaded meanwhile."""
        assert needs.keys() <= self.models and set(needs.values()) <= NEEDS.keys(), needs
        label = " ".join([name, *needs])
        kinds = {model: NEEDS[need] for model, need in needs.items()}
        kept = {key for key in self.parts if not self.enabled or key[1] in kinds.get(key[0], ())}
        finish_queue()
        self.clock.lap("other")
        if self.enabled:
            self.move(kept)
        if label not in self.logged:
            self.logged.add(label)
            self.say(f"{label}: {self.describe(kept)}")
        measured = start_peak()
        self.clock.lap("offload")
        with torch.autograd.profiler.record_function(label):
            yield
            finish_queue()
        self.clock.lap(name)
        for (model, _), part in self.parts.items():
            part.changed |= needs.get(model) == "all"
        if measured:
            self.peaks[label] = max(peak_bytes() / 1e9, self.peaks.get(label, 0.0))

    def move(self, kept: set[tuple[str, str]]) -> None:
        """Offload, then onload: there may be no room for both."""
        excess = [key for key, part in self.parts.items() if key not in kept and not part.offloaded]
        if excess:
            free_host_memory()  # freed by the last phase: copies to files take memory, too
        for key in excess:
            self.parts[key].offload()
            self.store.drop_pages()
        if excess:
            free_host_memory()
        for key in kept:
            self.parts[key].onload()
            self.store.drop_pages()
        finish_queue()  # the onload's time counts here, not in the phase

    def describe(self, kept: set[tuple[str, str]]) -> str:
        """Resident and offloaded state of this rank, in GB."""
        sizes: dict[str, Counter[str]] = {"resident": Counter(), "offloaded": Counter()}
        for (model, kind), part in self.parts.items():
            is_whole = len({other for owner, other in kept if owner == model}) in (0, len(NEEDS["all"]))
            state = "resident" if (model, kind) in kept else "offloaded"
            dropped = " (dropped)" if state == "offloaded" and part.store is None else ""
            sizes[state][model if is_whole else f"{model} {kind}{dropped}"] += part.nbytes
        texts = []
        for state, of_state in sizes.items():
            names = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in of_state.items())
            texts.append(f"{state} {names} GB" if names else f"{state} nothing")
        return "; ".join(texts)

    def memory(self) -> dict[str, float]:
        """`memory/<phase>_<models>`: peak GB since the last call, the highest of all ranks. Collective.

        Of tensors on a GPU, of the process on a CPU; {} where the system has no such count.
        """
        values = torch.tensor(list(self.peaks.values()), dtype=torch.float64, device=parallel.device())
        dist.all_reduce(values, dist.ReduceOp.MAX)
        names = [f"memory/{label.replace(' ', '_')}" for label in self.peaks]
        self.peaks = {}
        return dict(zip(names, values.tolist(), strict=True))


def finish_queue() -> None:
    """Wait for the GPU's computation, not for offloads beside it, so that times are those of their phase."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def free_host_memory() -> None:
    """Return free host memory to the system; nothing with a GPU, where that would wait for the offloads."""
    if not torch.cuda.is_available():
        parallel.free_memory()


def start_peak() -> bool:
    """Reset the peak of memory; False where the system cannot, such as macOS."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    if os.access(CLEAR_REFS, os.W_OK):
        CLEAR_REFS.write_text("5", encoding="utf-8")  # from the kernel's Documentation/filesystems/proc.rst
        return True
    return False


def peak_bytes() -> int:
    """Peak since `start_peak`: of tensors on a GPU, of the process's resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    [peak] = re.findall(rb"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_bytes())
    return int(peak) * 1024
