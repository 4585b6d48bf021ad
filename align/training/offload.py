"""Tensors in pinned host memory or in files: copies, weights that are swapped in, freed device memory."""

import contextlib
import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, UntypedStorage, nn


class HostStore:
    """Store of offloaded tensors: pinned host memory for a GPU's, files or memory for a CPU's."""

    def __init__(self, directory: Path | None = None):
        """`directory`: for the files, which have no names; None: tensors of a CPU are copied in memory."""
        self.directory = directory
        self.mapped: list[Tensor] = []
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def copy(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the host, from a GPU into pinned memory. Raises OSError if the disk is full."""
        tensor = tensor.detach()
        if tensor.is_cuda or self.directory is None or tensor.numel() == 0:
            return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)
        with tempfile.TemporaryFile(dir=self.directory) as file:
            if hasattr(os, "posix_fallocate"):  # else a full disk is a SIGBUS in copy_
                os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
            path = f"/dev/fd/{file.fileno()}"  # Python's mmap would keep a file open for each tensor
            mapped = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        self.mapped.append(mapped)
        return mapped.view(tensor.shape).copy_(tensor)

    def drop_pages(self) -> None:
        """Drop the files' pages from the process's memory: the system may write them out."""
        libc = ctypes.CDLL(None)
        for mapped in self.mapped:
            start, size = ctypes.c_void_p(mapped.data_ptr()), ctypes.c_size_t(mapped.nbytes)
            failed = libc.madvise(start, size, mmap.MADV_DONTNEED)
            assert not failed


class Weights:
    """A host copy of a module's weights, or only of some, which can be swapped into it."""

    def __init__(
        self,
        module: nn.Module,
        store: HostStore | None = None,
        has: Callable[[str], bool] = lambda name: True,
    ):
        """`has`: of a parameter's name, whether the copy has it; the others stay as they are."""
        self.store, self.has = store or HostStore(), has
        self.held = {name: self.store.copy(parameter) for name, parameter in self.parameters_of(module)}
        self.store.drop_pages()

    def parameters_of(self, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) of those that the copy has."""
        return (pair for pair in module.named_parameters() if self.has(pair[0]))

    @torch.no_grad()
    def follow(self, module: nn.Module) -> None:
        """Update the copy to the module's present weights."""
        for name, parameter in self.parameters_of(module):
            self.held[name].copy_(parameter)
        self.store.drop_pages()

    @contextlib.contextmanager
    def swapped_into(self, module: nn.Module) -> Iterator[None]:
        """Inside the block `module` computes with these weights.

        The parameters only point elsewhere meanwhile: what shares memory with them (Megatron's buffers, main
        weights) is not touched. Nothing inside the block may change weights.
        """
        own = {}
        for name, parameter in self.parameters_of(module):
            own[name] = parameter.data
            parameter.data = self.held[name].to(parameter.device, non_blocking=True)  # a CPU copies nothing
        try:
            yield
        finally:
            for name, parameter in self.parameters_of(module):
                parameter.data = own[name]
            self.store.drop_pages()


def offload_module(module: nn.Module, store: HostStore | None = None) -> Weights:
    """Offload a module's weights; it computes inside `with weights.swapped_into(module)` only."""
    weights = Weights(module, store)
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
    return weights


def storages(tensors: Iterable[Tensor]) -> dict[UntypedStorage, int]:
    """The storages behind tensors, each once, with its size in bytes."""
    return {storage: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}


def as_bytes(storage: UntypedStorage) -> Tensor:
    """A storage's memory, [bytes] uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def release(tensors: Iterable[Tensor]) -> dict[UntypedStorage, int]:
    """Free the memory behind tensors, whose values are lost. Returns the argument of `restore`."""
    sizes = storages(tensors)
    for storage in sizes:
        storage.resize_(0)
    return sizes


def restore(sizes: Mapping[UntypedStorage, int]) -> None:
    """Allocate memory again for tensors that were released; their values are undefined."""
    for storage, size in sizes.items():
        assert storage.nbytes() == 0, "this memory was not released"
        storage.resize_(size)
