"""Run by test_inference.py: answers as on a GPU, by stand-ins for what only a GPU has.

`Graph` stands in for a CUDA graph: it notes each operation of a captured step with the very tensors that it
read and wrote, undoes what they did, and does them again at each replay, on the same tensors. What a CUDA
graph cannot hold is refused: operations that hand a value to the host, or whose shapes depend on values.
"""

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace, TracebackType
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from align.distributed import parallel
from align.distributed.parallel import ParallelConfig
from align.generation import generator, inference, sampling
from align.generation.inference import InferenceModel, why_no_graphs
from align.model.gpt import Policy
from tests.workers import generator as worker

aten = torch.ops.aten
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.lift_fresh)


class Graph:
    """torch.cuda.CUDAGraph, of operations on the CPU."""

    captured: list["Graph"] = []

    def __init__(self) -> None:
        Graph.captured.append(self)
        self.operations: list[tuple] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for operation, args, kwargs, results in self.operations:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(new, torch.ScriptObject):  # of a collective
                    new.wait()
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def pool(self) -> tuple[int, int]:
        return (0, 1)


class Capture(TorchDispatchMode):
    """torch.cuda.graph: what is done inside goes to the graph, and is undone at the end."""

    def __init__(self, graph: Graph, pool: tuple[int, int] | None, capture_error_mode: str):
        super().__init__()
        self.graph, self.before = graph, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs = kwargs or {}
        chosen = tree_leaves(args[1]) if operation.overloadpacket is aten.index else []
        if operation.overloadpacket in WAITS or any(x is not None and x.dtype == torch.bool for x in chosen):
            raise RuntimeError(f"{operation}: a CUDA graph cannot wait for the host")
        for argument, value in zip(operation._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((value, value.clone()))
        results = operation(*args, **kwargs)
        self.graph.operations.append((operation, args, kwargs, results))
        return results

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        left = super().__exit__(kind, error, trace)
        for tensor, values in reversed(self.before):
            tensor.copy_(values)
        return left


def why_none_on_gpu(policy: Policy, tp_graphs: bool) -> str | None:
    """`why_no_graphs` as if the policy were on a GPU."""
    on_gpu = SimpleNamespace(pg_collection=policy.pg_collection, frequencies=SimpleNamespace(is_cuda=True))
    return why_no_graphs(on_gpu, tp_graphs)


@contextmanager
def graphs() -> Iterator[None]:
    """Steps are graphs, the stand-ins, where a GPU's are."""
    Graph.captured.clear()
    with ExitStack() as stack:
        for module, name, replacement in (
            (torch.cuda, "CUDAGraph", Graph),
            (torch.cuda, "graph", Capture),
            (torch.cuda, "synchronize", lambda: None),
            (torch.cuda, "memory_reserved", lambda: 0),
            (torch.cuda, "memory_allocated", lambda: 0),
            (torch.cuda, "mem_get_info", lambda: (2**30, 2**30)),
            (inference, "why_no_graphs", why_none_on_gpu),
            (generator, "why_no_graphs", why_none_on_gpu),
            (sampling, "_top_p_floor", sampling._top_p_floor_by_bisection),  # as on a GPU
        ):
            stack.enter_context(mock.patch.object(module, name, replacement))
        yield


def broken(case: dict) -> str:
    """The message for a model with a weight that is not a number."""
    broken_generator = worker.build(case)
    with torch.no_grad():
        next(iter(broken_generator.policy.decoder.layers)).mlp.linear_fc2.weight[0, 0] = torch.nan
    with mock.patch.object(worker, "build", lambda case: broken_generator):
        try:
            return str(worker.run(case))
        except FloatingPointError as error:
            return str(error)


def answers(case: dict) -> dict:
    """Samples of a case as on a CPU and, by TRITON_INTERPRET, as on a GPU: its kernels, or its graphs."""
    if case.get("keep"):  # as on a GPU: no copies of the weights
        with mock.patch.object(inference, "pack", lambda weight: weight):
            return answers(case | {"keep": False, "again": True})
    results = {"plain": worker.run(case)}
    case = case | {"keep": case.get("again", False)}
    if os.environ.get("TRITON_INTERPRET") == "1":
        with mock.patch.object(inference.InferenceModel, "on_gpu", True):
            results["gpu"] = worker.run(case)
    else:
        with graphs():
            gc.disable()
            results["gpu"] = worker.run(case)
            results["left"] = sum(isinstance(kept, InferenceModel) for kept in gc.get_objects())
            gc.enable()
            results["replays"] = [graph.replays for graph in Graph.captured]
    return results


if __name__ == "__main__":
    cases_path, results_path = map(Path, sys.argv[1:])
    generator.InferenceModel = worker.Recorder
    with parallel.start(ParallelConfig()):
        cases = json.loads(cases_path.read_text())
        results = {name: answers(case) for name, case in cases.items()}
        results["broken"] = broken(next(iter(cases.values())))
        if parallel.is_main():
            results_path.write_text(json.dumps(results))
