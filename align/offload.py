"""Weights that wait in CPU memory."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Weights:
    """A frozen copy of a module's weights in CPU memory, which can take their place for a while."""

    def __init__(self, module: nn.Module):
        self.held = {name: copy_to_host(parameter) for name, parameter in module.named_parameters()}

    @contextlib.contextmanager
    def lent_to(self, module: nn.Module) -> Iterator[None]:
        """Inside the block `module` computes with these weights; its own stay where they are.

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


def park(module: nn.Module) -> Weights:
    """Move a module's weights to CPU memory; it computes inside `with weights.lent_to(module)` only."""
    weights = Weights(module)
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
    return weights


def copy_to_host(parameter: Tensor) -> Tensor:
    """A copy in CPU memory, pinned where there is a GPU, from where it goes back faster."""
    return torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda).copy_(parameter.detach())
