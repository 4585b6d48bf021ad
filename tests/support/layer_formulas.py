"""Norm, gate and rotation as plain formulas, and a count of what torch.compile compiles."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

EPS = 1e-5


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def centred_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return norm(x, weight) + bias


def gate(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return first / (1 + (-first).exp()) * second


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Each pair (i, i + d/2) as a complex number, multiplied by exp(i angle); angles [T, d/2]."""
    pairs = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([pairs.real, pairs.imag], -1)


def counting(backend: str) -> tuple[Callable, list]:
    """A backend of torch.compile, and a list that has an item for everything that it has compiled."""
    seen = []

    def compile_and_count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        seen.append(graph)
        return lookup_backend(backend)(graph, inputs)

    return compile_and_count, seen
