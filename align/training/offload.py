"""Offload model state that the current phase does not need, to pinned host memory or files.

Parts of a model in training move as storages, the memory behind tensors. A storage that waits has 0 bytes,
and every view of it (parameters, Megatron's buffers, the optimizer's shards) is right again when they are
back. New tensors would part them: in fp32 the optimizer's main weights are views of Megatron's buffer of
weights, and the model would learn nothing more.

A GPU copies what leaves on a stream of its own, while the next phase computes; that phase waits only for what
it needs to come.
"""

import contextlib
import ctypes
import functools
import mmap
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, UntypedStorage, nn

from align.distributed import parallel
from align.tracking.metrics import Clock
from align.training import optim

NEEDS = {"weights": ("weights",), "all": ("weights", "gradients", "optimizer")}  # need: parts
CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class OffloadConfig:
    """Offload of model state that the current phase does not need."""

    offload: Literal["auto", "on", "off"] = "auto"
    """on: state that a phase does not need is offloaded, to pinned host memory beside a GPU, on a CPU to
    files in OUTPUT. auto: on with a GPU"""

    @property
    def enabled(self) -> bool:
        return self.offload == "on" or (self.offload == "auto" and torch.cuda.is_available())

    def shelf(self, output: Path) -> "Shelf":
        """Destination of offloading. Frozen weights of a GPU are offloaded in any case."""
        return Shelf(output if self.enabled else None)


class Shelf:
    """Store of offloaded tensors: pinned host memory for a GPU's, files for a CPU's where possible.

    What is in a file stays there for the life of the Shelf.
    """

    def __init__(self, directory: Path | None = None):
        """`directory`: for the files, which have no names; None: tensors of a CPU wait in memory."""
        self.directory, self.mapped = directory, []
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy that waits here, from a GPU in pinned memory. Raises OSError if the disk is full."""
        tensor = tensor.detach()
        if tensor.is_cuda or self.directory is None or tensor.numel() == 0:
            return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)
        with tempfile.TemporaryFile(dir=self.directory) as file:
            if hasattr(os, "posix_fallocate"):  # else a full disk is a SIGBUS in copy_
                os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
            path = f"/dev/fd/{file.fileno()}"  # Python's mmap would keep a file open for each tensor
            place = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        self.mapped.append(place)
        return place.view(tensor.shape).copy_(tensor)

    def forget(self) -> None:
        """Take the files' pages out of the process's memory: the system may write them out."""
        libc = ctypes.CDLL(None)
        for place in self.mapped:
            start, size = ctypes.c_void_p(place.data_ptr()), ctypes.c_size_t(place.nbytes)
            failed = libc.madvise(start, size, mmap.MADV_DONTNEED)
            assert not failed


class Weights:
    """A copy of a module's weights on a shelf, which can take their place for a while."""

    def __init__(self, module: nn.Module, shelf: Shelf | None = None):
        self.shelf = shelf or Shelf()
        self.held = {name: self.shelf.copy(parameter) for name, parameter in module.named_parameters()}
        self.shelf.forget()

    @torch.no_grad()
    def follow(self, module: nn.Module) -> None:
        """Hold the weights that the module has now."""
        for name, parameter in module.named_parameters():
            self.held[name].copy_(parameter)
        self.shelf.forget()

    @contextlib.contextmanager
    def lent_to(self, module: nn.Module) -> Iterator[None]:
        """Inside the block `module` computes with these weights; its own stay where they are, or wait.

        The parameters only point elsewhere meanwhile: what shares memory with them (Megatron's buffers, main
        weights) is not touched. Nothing inside the block may change weights.
        """
        own = {}
        for name, parameter in module.named_parameters():
            own[name] = parameter.data
            parameter.data = self.held[name].to(parameter.device, non_blocking=True)  # a CPU copies nothing
        try:
            yield
        finally:
            for name, parameter in module.named_parameters():
                parameter.data = own[name]
            self.shelf.forget()


def park(module: nn.Module, shelf: Shelf | None = None) -> Weights:
    """Move a module's weights to a shelf; it computes inside `with weights.lent_to(module)` only."""
    weights = Weights(module, shelf)
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
    return weights


def storages(tensors: Iterable[Tensor]) -> dict[UntypedStorage, int]:
    """The memory behind tensors, each piece once, with its size in bytes."""
    return {storage: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}


def as_bytes(storage: UntypedStorage) -> Tensor:
    """A storage's memory, [bytes] uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def release(tensors: Iterable[Tensor]) -> dict[UntypedStorage, int]:
    """Give back the memory behind tensors, whose values are lost; returns what `restore` needs."""
    sizes = storages(tensors)
    for storage in sizes:
        storage.resize_(0)
    return sizes


def restore(sizes: Mapping[UntypedStorage, int]) -> None:
    """Memory again for tensors that were released; their values are not defined."""
    for storage, size in sizes.items():
        assert storage.nbytes() == 0, "this memory was not released"
        storage.resize_(size)


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """The GPU stream of all copies that leave."""
    return torch.cuda.Stream()


@contextlib.contextmanager
def beside(enabled: bool) -> Iterator[torch.cuda.Stream | None]:
    """Run the block's kernels on the side stream, after all queued work; without `enabled` at once."""
    if not enabled:
        yield None
        return
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream


class Part:
    """Some tensors of a model in training, which are on its device, or wait."""

    def __init__(self, tensors: Callable[[], list[Tensor]], shelf: Shelf | None):
        """`tensors` lists them, anew each time: an optimizer may make more. No `shelf`: values are lost."""
        self.tensors, self.shelf = tensors, shelf
        self.copies: dict[UntypedStorage, Tensor] = {}  # made once, then used again
        self.changed = True  # since it was copied
        self.left: torch.cuda.Event | None = None  # on a GPU: its last copies are complete
        self.waiting: dict[UntypedStorage, int] = {}  # with their sizes

    @property
    def nbytes(self) -> int:
        return sum((self.waiting or storages(self.tensors())).values())

    def leave(self) -> None:
        """Off the device, unless it waits already. A GPU copies beside what is queued next."""
        if self.waiting:
            return
        if self.changed and self.shelf:
            held = storages(self.tensors())
            with beside(any(storage.is_cuda for storage in held)) as stream:
                self.copies = {storage: self.copy(storage, stream) for storage in held}
                self.left = None if stream is None else stream.record_event()
            self.changed = False
        # On a GPU the allocator hands this memory out again only after the copies from it, or, when it is
        # short of memory, waits for them.
        self.waiting = release(self.tensors())

    def copy(self, storage: UntypedStorage, stream: torch.cuda.Stream | None) -> Tensor:
        """A storage's copy on the shelf, in the place of its last one if it has one."""
        known, now = self.copies.get(storage), as_bytes(storage)
        if stream is not None:
            now.record_stream(stream)
        return self.shelf.copy(now) if known is None else known.copy_(now, non_blocking=True)

    def come(self) -> None:
        """Back to the device, unless it is there already."""
        restore(self.waiting)
        if self.waiting and self.left is not None:
            torch.cuda.current_stream().wait_event(self.left)
        for storage in self.waiting if self.shelf else ():
            as_bytes(storage).copy_(self.copies[storage], non_blocking=True)
        self.waiting = {}


def parts_of(model: DistributedDataParallel, optimizer: MegatronOptimizer, shelf: Shelf) -> dict[str, Part]:
    """Of a model in training. Gradients are dropped: engine.forward_backward starts from 0."""

    def weights() -> list[Tensor]:
        return [parameter.data for parameter in model.parameters()]

    def main_weights_and_moments() -> list[Tensor]:
        found, others = [], storages(weights())  # fp32 main weights lie there, and move with them
        for adam in optim.adams(optimizer):
            found += [weight.data for group in adam.optimizer.param_groups for weight in group["params"]]
            found += [value for state in adam.optimizer.state.values() for value in state.values()]
        found = [value for value in found if isinstance(value, Tensor) and value.numel() > 1]
        return [tensor for tensor in found if tensor.untyped_storage() not in others]

    return {
        "weights": Part(weights, shelf),
        "gradients": Part(lambda: [weight.main_grad for weight in model.parameters()], None),
        "optimizer": Part(main_weights_and_moments, shelf),
    }


class Phases:
    """The phases of a step: what each needs on the device, how long it takes, its peak of memory.

    with phase("logprobs", policy="weights", critic="weights"):
        ...
    """

    def __init__(self, clock: Clock, say: Callable[[str], None], shelf: Shelf, enabled: bool):
        """`say` is told where everything is when a phase comes first; not `enabled`: nothing moves."""
        self.clock, self.say, self.shelf, self.enabled = clock, say, shelf, enabled
        self.parts: dict[tuple[str, str], Part] = {}  # by model and kind
        self.models: set[str] = set()
        self.known: set[str] = set()  # labels of phases: "train policy"
        self.peaks: dict[str, float] = {}  # GB by label

    def add(self, name: str, model: DistributedDataParallel, optimizer: MegatronOptimizer) -> None:
        """One more model in training, which waits from here on until a phase needs it."""
        self.models.add(name)
        self.parts |= {(name, kind): part for kind, part in parts_of(model, optimizer, self.shelf).items()}
        if self.enabled:
            self.move(set())

    @contextlib.contextmanager
    def __call__(self, name: str, /, **needs: str) -> Iterator[None]:
        """`needs`: of which models the "weights", or "all", to train them. The rest waits meanwhile."""
        assert needs.keys() <= self.models and set(needs.values()) <= NEEDS.keys(), needs
        label = " ".join([name, *needs])
        kept = {key for key in self.parts if not self.enabled or key[1] in NEEDS.get(needs.get(key[0]), ())}
        finish_queue()
        self.clock.lap("other")
        if self.enabled:
            self.move(kept)
        if label not in self.known:
            self.known.add(label)
            self.say(f"{label}: {self.describe(kept)}")
        measured = start_peak()
        self.clock.lap("offload")
        yield
        finish_queue()
        self.clock.lap(name)
        for (model, _), part in self.parts.items():
            part.changed |= needs.get(model) == "all"
        if measured:
            self.peaks[label] = max(peak_bytes() / 1e9, self.peaks.get(label, 0.0))

    def move(self, kept: set[tuple[str, str]]) -> None:
        """Offload first and onload then: there may be no room for both."""
        leaving = [key for key, part in self.parts.items() if key not in kept and not part.waiting]
        if leaving:
            free_host_memory()  # what the last phase left free: copies to files take memory, too
        for key in leaving:
            self.parts[key].leave()
            self.shelf.forget()
        if leaving:
            free_host_memory()
        for key in kept:
            self.parts[key].come()
            self.shelf.forget()
        finish_queue()  # the time that the phase waits counts here

    def describe(self, kept: set[tuple[str, str]]) -> str:
        """Resident and offloaded state of this rank, in GB."""
        sizes = {"resident": Counter(), "waiting": Counter()}
        for (model, kind), part in self.parts.items():
            whole = len({other for owner, other in kept if owner == model}) in (0, len(NEEDS["all"]))
            where = "resident" if (model, kind) in kept else "waiting"
            dropped = " (dropped)" if where == "waiting" and part.shelf is None else ""
            sizes[where][model if whole else f"{model} {kind}{dropped}"] += part.nbytes
        lists = {
            where: [f"{name} {size / 1e9:.2f}" for name, size in sizes[where].items()] for where in sizes
        }
        return "; ".join(
            f"{where} {', '.join(found) + ' GB' if found else 'nothing'}" for where, found in lists.items()
        )

    def memory(self) -> dict[str, float]:
        """`memory/<phase>_<models>`: peak GB since the last call, of all ranks the highest. Collective.

        On a GPU of its tensors, on a CPU of the process; {} where the system does not tell.
        """
        values = torch.tensor(list(self.peaks.values()), dtype=torch.float64, device=parallel.device())
        dist.all_reduce(values, dist.ReduceOp.MAX)
        names = [f"memory/{label.replace(' ', '_')}" for label in self.peaks]
        self.peaks = {}
        return dict(zip(names, values.tolist(), strict=True))


def finish_queue() -> None:
    """Wait for the GPU's computation, not for copies that leave beside it: times are those of their phase."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def free_host_memory() -> None:
    """On a GPU nothing: giving memory back to it would wait for the copies that leave."""
    if not torch.cuda.is_available():
        parallel.free_memory()


def start_peak() -> bool:
    """Count the peak of memory anew; False where the system cannot, such as macOS."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    if os.access(CLEAR_REFS, os.W_OK):
        CLEAR_REFS.write_text("5", encoding="utf-8")  # from the kernel's Documentation/filesystems/proc.rst
        return True
    return False


def peak_bytes() -> int:
    """Since then: on a GPU of tensors, on a CPU the resident memory of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return int(re.search(rb"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_bytes())[1]) * 1024
