"""Process groups, seeds, and collectives.

Ranks form a grid of tensor (tp), context (cp), pipeline (pp) and data (dp) parallel groups, in Megatron's
order. Without torchrun a script is a world of one process.
"""

import contextlib
import ctypes
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from align.errors import UserError
from align.flags import COUNT, check_ranges, whole

T = TypeVar("T")
# Ranks wait for the longest responses and slowest rewards; NCCL's own limit would be 10 minutes.
LONGEST_WAIT = timedelta(hours=1)

PEAK_TFLOPS = {  # bf16 without sparsity, from NVIDIA's data sheets; the first name that fits
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "GB200": 2500.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}


@dataclass(frozen=True)
class ParallelConfig:
    """Parallel sizes, seed, and the watch over the ranks."""

    tp: int = 1
    """tensor parallel size: every matrix is split over this many ranks"""
    pp: int = 1
    """pipeline parallel size: the layers are split over this many ranks"""
    vp: int = 1
    """virtual pipeline size, the stages of each pipeline rank: above 1 the schedule is interleaved 1F1B, with
    a bubble smaller by this factor and as many more exchanges; needs --pp > 1"""
    cp: int = 1
    """context parallel size: the tokens of a micro-batch are split over this many ranks"""
    sequence_parallel: bool = False
    """split the activations between the tensor parallel regions as well (saves memory; needs --tp > 1)"""
    seed: int = 1234
    """seed of the data order and of every random number, from 0 to 2^32 - 1"""
    deterministic: bool = False
    """only deterministic kernels and reductions on GPUs, at some cost in speed (a CPU run always is)"""
    stall_limit: float = 1800.0
    """seconds without progress of any rank (a micro-batch, a decoded token, a reward, a save), after which
    the job ends and the rank at fault is named; 0: no limit, else at least 5"""

    def __post_init__(self):
        limit = "0, or from 5 to 1e9 seconds", lambda x: x == 0 or 5 <= x <= 1e9
        check_ranges(
            self, tp=COUNT, pp=COUNT, vp=COUNT, cp=COUNT, seed=whole(0, 2**32 - 1), stall_limit=limit
        )


@contextlib.contextmanager
def start(config: ParallelConfig) -> Iterator[dist.Store]:
    """Set up process groups and seeds for the body, which gets the groups' store; destroy them after it.

    Raises:
        UserError: the world size is not a multiple of tp * pp * cp, or two flags contradict each other.
    """
    check_grid(config)
    end_with_torchrun()
    end_forks_with_parent()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums are fp32, as on a CPU
    if config.tp > 1:
        use_one_queue()
    if config.deterministic:
        make_deterministic()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "nccl"
    else:
        from align.distributed import megatron_on_cpu  # here: never imported on GPUs

        megatron_on_cpu.enable()
        backend = "gloo"
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://", timeout=LONGEST_WAIT))
    else:  # not started by torchrun
        store, rank, world = dist.HashStore(), 0, 1
    dist.init_process_group(backend, timeout=LONGEST_WAIT, store=store, rank=rank, world_size=world)
    make_grid(config)
    yield store
    # Destroyed at the interpreter's exit, a rank whose gloo threads still run may abort.
    dist.barrier()
    mpu.destroy_model_parallel()
    dist.destroy_process_group()


def end_with_torchrun() -> None:
    """Ask the kernel to kill this rank when torchrun dies.

    After a kill -9 of torchrun alone the ranks would train on, and share OUTPUT with the next run's.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())


def end_forks_with_parent() -> None:
    """Have forks of this process, a reward function's pool for one, die with it: they share its memory.

    The kernel would kill them when the thread ends that forked, so only the main thread's are meant.
    """
    parents: list[int | None] = [None]

    def before() -> None:
        is_main = threading.current_thread() is threading.main_thread()
        parents[0] = os.getpid() if is_main else None

    def in_child() -> None:
        if parents[0] is not None:
            end_with_parent(parents[0])

    os.register_at_fork(before=before, after_in_child=in_child)


def end_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies; end at once if it is dead already.

    parent: its process number, read before anything could have killed it.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # from linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def make_grid(config: ParallelConfig) -> None:
    """Create Megatron's process groups, and set the seeds."""
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=config.tp,
        pipeline_model_parallel_size=config.pp,
        virtual_pipeline_model_parallel_size=config.vp if config.vp > 1 else None,
        context_parallel_size=config.cp,
        distributed_timeout_minutes=LONGEST_WAIT.total_seconds() / 60,
        create_gloo_process_groups=True,  # checkpoints gather on hosts
    )
    set_seeds(config.seed)


def set_seeds(seed: int) -> None:
    """Seed the random numbers of Python, numpy, torch and Megatron."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def check_grid(config: ParallelConfig) -> None:
    """Refuse sizes that do not fit each other or the world, before anything is built."""
    world, model = int(os.environ.get("WORLD_SIZE", 1)), config.tp * config.pp * config.cp
    if world % model:
        raise UserError(
            f"--tp {config.tp} x --pp {config.pp} x --cp {config.cp} = {model} does not divide the {world} "
            f"processes: start a multiple of {model} with torchrun --nproc_per_node"
        )
    if config.vp > 1 and config.pp == 1:
        raise UserError("--vp has no effect with --pp 1: leave it out or raise --pp")
    if config.sequence_parallel and config.tp == 1:
        raise UserError("--sequence-parallel has no effect with --tp 1: leave it out or raise --tp")


def use_one_queue() -> None:
    """Start kernels in the order of their launch, by which Megatron overlaps a layer's communication."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # before CUDA starts; the user's value wins


def use_expandable_segments() -> None:
    """Let torch extend segments of GPU memory: micro-batches differ in length, which fragments fixed ones.

    Not with TensorRT-LLM, which maps the weights into a process of its own: torch would hand it such memory
    by a system call that containers refuse (pytorch issue 165685).
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the newer name
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def make_deterministic() -> None:
    """Select deterministic reductions, and kernels of Transformer Engine and cuBLAS, on GPUs.

    Excludes NCCL's algorithms that add in the NVLink switches, in the order of arrival. "Tree" alone, which
    is often advised, leaves gathers and scatters without an algorithm, which NCCL 2.24 and later refuse.
    """
    os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def device() -> torch.device:
    """Device of this rank."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def is_exact(config: ParallelConfig) -> bool:
    """True if two passes over the same micro-batches have the same bits: on a CPU or with --deterministic."""
    return config.deterministic or device().type == "cpu"


def device_name() -> str:
    """Product name of this rank's device."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def peak_tflops(dtype: torch.dtype) -> float | None:
    """Peak of all ranks' matrix products in 10^12/s, for a data type of 16 bits on a known GPU."""
    known = [peak for name, peak in PEAK_TFLOPS.items() if name in device_name()]
    return known[0] * dist.get_world_size() if known and dtype.itemsize == 2 else None


def dp_size() -> int:
    """Number of data parallel ranks."""
    return mpu.get_data_parallel_world_size()


def dp_rank() -> int:
    return mpu.get_data_parallel_rank()


def is_main() -> bool:
    """True on global rank 0, which writes and prints."""
    return dist.get_rank() == 0


def layout_sizes() -> dict[str, int]:
    """The grid's sizes by name."""
    return {
        "tp": mpu.get_tensor_model_parallel_world_size(),
        "cp": mpu.get_context_parallel_world_size(),
        "pp": mpu.get_pipeline_model_parallel_world_size(),
        "dp": dp_size(),
    }


def layout() -> str:
    """Description of the grid, for the log."""
    grid = " x ".join(f"{key} {value}" for key, value in layout_sizes().items())
    if stages := mpu.get_virtual_pipeline_model_parallel_world_size():
        grid += f", {stages} stages a pipeline rank"
    # not megatron.core.__version__: 0.19 adds the commit of the repository that it runs in, whichever it is
    versions = f"torch {torch.__version__}, Megatron-Core {version('megatron-core')}"
    return f"{dist.get_world_size()} processes ({grid}) on {device_name()}, {dist.get_backend()}, {versions}"


def sum_over_dp(x: Tensor) -> Tensor:
    """Sum a tensor over the data parallel ranks, in place."""
    dist.all_reduce(x, group=mpu.get_data_parallel_group())
    return x


def gather(item: T) -> list[T]:
    """Gather the items of all ranks, in their order. Collective."""
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def gather_over_dp(item: T) -> list[T]:
    """Gather the items of all data parallel ranks, in their order. Collective."""
    items: list[Any] = [None] * dp_size()
    dist.all_gather_object(items, item, group=mpu.get_data_parallel_group())
    return items


def list_from_last_stage(tensors: list[Tensor]) -> list[Tensor]:
    """Broadcast the last pipeline stage's list of tensors, of any shapes, to every stage. Collective."""
    if mpu.get_pipeline_model_parallel_world_size() == 1:
        return tensors
    group, last = mpu.get_pipeline_model_parallel_group(), mpu.get_pipeline_model_parallel_last_rank()
    box = [[(tensor.shape, tensor.dtype) for tensor in tensors]]
    dist.broadcast_object_list(box, last, group=group)
    if not mpu.is_pipeline_last_stage():
        tensors = [torch.empty(shape, dtype=dtype, device=device()) for shape, dtype in box[0]]
    for tensor in tensors:
        dist.broadcast(tensor, last, group=group)
    return tensors


def free_memory() -> None:
    """Return cached free memory to the device or the operating system."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def on_main(make: Callable[[], T]) -> T:
    """Call a function on global rank 0 and broadcast its result, or its UserError, to every rank."""
    box: list[Any] = [None, None]  # result, mistake
    if is_main():
        try:
            box[0] = make()
        except UserError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1]:
        raise box[1]
    return box[0]


def parse_time(text: str) -> int:
    """HH:MM:SS (or D-HH:MM:SS, as Slurm writes it) in seconds."""
    match = re.fullmatch(r"(?:(\d{1,6})-)?(\d{1,6}):([0-5]\d):([0-5]\d)", text)
    if not match:
        raise UserError(f"--max-time {text!r} is not of the form HH:MM:SS")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class Stop:
    """Decision of all ranks to stop before the end: after SIGTERM or SIGUSR1, or when the time is up.

    The ranks agree on the step by a reduction.
    """

    def __init__(self, max_time: str | None):
        """max_time: HH:MM:SS from now, or None for no limit."""
        self.deadline = None if max_time is None else time.monotonic() + parse_time(max_time)
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: object) -> None:
        self.signal = number

    def reason(self) -> str | None:
        """Reason to stop after this step, or None. Collective."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        flags = torch.tensor([self.signal, int(late)], device=device())
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        number, late = flags.tolist()
        if number:
            return f"{signal.Signals(number).name} received"
        return "--max-time is over" if late else None
