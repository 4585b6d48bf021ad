"""Small tensors, written as their numbers."""

import torch


def f64(*numbers: float) -> torch.Tensor:
    """The numbers as a float64 tensor."""
    return torch.tensor(numbers, dtype=torch.float64)
