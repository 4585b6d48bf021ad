"""Operations that make the host wait for the GPU, noted on a CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal)
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class Waits(TorchDispatchMode):
    """Names of the operations that hand a value, or a size that depends on values, to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kind = operation.overloadpacket
        indices = tree_leaves(args[1]) if kind in INDEXED else []
        if kind in WAITS or any(x is not None and x.dtype == torch.bool for x in indices):
            self.names.append(str(kind))
        return operation(*args, **(kwargs or {}))
