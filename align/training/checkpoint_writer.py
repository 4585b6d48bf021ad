"""A checkpoint's files on this rank: a copy of the state, written and hashed by a thread.

The copy is the state of one step; the next steps may change the weights while it is written. A thread ends
with its rank, and its error is the rank's: no process is forked that could survive or be lost alone.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item

from align.distributed import megatron_patches, parallel
from align.training.checkpoint_files import checksum

Bucket = tuple[str, str, tuple[list, list]]  # Megatron's: path, name, (objects, tensors) of one file


class Writer:
    """The files of a checkpoint on this rank. Collective."""

    def __init__(self, in_background: bool = False):
        """`in_background`: `write` returns once the state is copied, else once it is written."""
        self.in_background = in_background
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.parts: list[tuple[AsyncRequest, Future[dict[Path, list]]]] = []

    def write(self, path: Path, state: dict) -> None:
        """Write a sharded state to an existing directory."""
        live = storages(state)
        megatron_patches.use_thread_queue()
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        options = dict(sharded_strategy=strategy, async_sharded_save=True, **megatron_patches.ASYNC_SAVE)
        request = dist_checkpointing.save(state, str(path), **options)
        buckets = [copy(bucket, live) for bucket in request.preload_fn()] if request.preload_fn else []
        for _, _, (_, tensors) in request.async_fn_args[1] if buckets else []:
            tensors.clear()  # only `buckets` holds the copies, and only until they are written
        state.clear()  # what was gathered for it is freed before it is written
        self.parts.append((request, self.thread.submit(write_files, request, buckets)))
        if not self.in_background:
            self.parts[-1][1].result()

    def is_done(self) -> bool:
        """True once all ranks have written their files. Raises the error of this rank's thread."""
        pending = 0
        for _, written in self.parts:
            if written.done():
                written.result()
            else:
                pending += 1
        total = torch.tensor(pending, device=parallel.device())
        dist.all_reduce(total)
        return not total

    def finish(self) -> dict[Path, list]:
        """Wait for the files, then write their metadata. Returns [size, XXH3] of this rank's files."""
        own: dict[Path, list] = {}
        for request, written in self.parts:
            own |= written.result()
            for finalize in request.finalize_fns:
                finalize()
        self.thread.shutdown()
        self.parts.clear()
        return own


def storages(state: dict) -> set[int]:
    """Addresses of the memory behind the tensors of a sharded state."""
    shards = [item for item in nested_values(state) if isinstance(item, ShardedTensor)]
    return {shard.data.untyped_storage().data_ptr() for shard in shards if shard.data is not None}


def copy(bucket: Bucket, live: set[int]) -> Bucket:
    """Copy the tensors of a file that still share memory with the state; Megatron has copied the views."""
    path, name, (objects, tensors) = bucket
    shares = [tensor.untyped_storage().data_ptr() in live for _, tensor in tensors]
    tensors = [(item, x.clone() if own else x) for (item, x), own in zip(tensors, shares, strict=True)]
    return path, name, (objects, tensors)


def write_files(request: AsyncRequest, buckets: list[Bucket]) -> dict[Path, list]:
    """Write files and give Megatron's request the places of the items in them: [size, XXH3] by file."""
    results: dict[int, Any] = {}
    for i, (path, name, (objects, tensors)) in enumerate(buckets):
        [transforms], _ = request.async_fn.args
        with open(path, "wb") as stream:
            results[i] = [
                _write_item(transforms, stream, data, item, name, SerializationFormat.TORCH_SAVE)
                for item, data in objects + tensors
            ]
            stream.flush()
            os.fsync(stream.fileno())
        tensors.clear()
    if buckets:
        request.async_fn_args[2].put(results)
    return {Path(path): checksum(Path(path)) for path, _, _ in buckets}
