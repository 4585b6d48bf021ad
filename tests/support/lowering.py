"""The CUDA code that torch.compile writes, on a machine without a GPU: Inductor for a pretended H100."""

import ast
import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
import torch._inductor.scheduler
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

H100 = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    gcnArchName="",
)


@dataclass(frozen=True)
class Lowered:
    """kernels: names of the Triton kernels; buffers: (shape, dtype) of each tensor that they allocate."""

    kernels: list[str]
    buffers: list[tuple[tuple[int, ...], torch.dtype]]


def lower(function: Callable, *arguments: object) -> Lowered:
    """Lower a function of tensors, each given as its (shape, dtype), and of numbers."""
    arguments = [torch.empty(a[0], dtype=a[1]) if isinstance(a, tuple) else a for a in arguments]
    graph = traced(function, *arguments)
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
    fake = FakeTensorMode(shape_env=ShapeEnv())
    with pretended_gpu(), V.set_fake_mode(fake), V.set_debug_handler(DebugContext()):
        with fake:
            tensors = [torch.empty(a.shape, dtype=a.dtype, device="cuda:0") for a in inputs]
        FakeTensorProp(graph, fake).propagate(*tensors)
        lowering = GraphLowering(graph, shape_env=fake.shape_env)
        with V.set_graph_handler(lowering):
            lowering.run(*tensors)
            code = lowering.codegen()[0].value
    allocations = re.findall(r"= empty_strided_cuda\((\([^()]*\)), \([^()]*\), torch\.(\w+)\)", code)
    return Lowered(
        kernels=re.findall(r"def (triton_\w+)", code),
        buffers=[(ast.literal_eval(shape), getattr(torch, dtype)) for shape, dtype in allocations],
    )


def traced(function: Callable, *arguments: object) -> torch.fx.GraphModule:
    """The graph that torch.compile hands to Inductor; nothing is computed."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return lambda *inputs: [None] * len(graph.graph.output_node().args[0])

    backend = aot_autograd(fw_compiler=keep, decompositions=select_decomp_table())
    torch._dynamo.reset()
    torch.compile(function, dynamic=False, backend=backend)(*arguments)
    return graphs[0]


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Let Inductor generate code for an H100 that is not there."""
    properties = staticmethod(lambda *device: H100)
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "get_device_properties", properties.__func__),
            (torch.cuda, "get_device_capability", lambda *device: (H100.major, H100.minor)),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "device_count", lambda: 1),
            (CudaInterface, "get_device_properties", properties),
            (CudaInterface.Worker, "get_device_properties", properties),
            (torch._inductor.scheduler, "has_triton", lambda *device: True),
            (torch.utils._triton, "triton_hash_with_backend", lambda: ""),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield
