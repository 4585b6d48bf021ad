"""Repairs of Megatron-Core 0.16 on every device. megatron_on_cpu.py has those for CPUs."""

import torch
from megatron.core.resharding.refit import CopyService, NCCLCopyService


def copy_service() -> CopyService | str:
    """Copy service that moves weights from one layout to another, on the current stream.

    A stream of its own would not wait for the parts that Megatron cuts out of the weights on the current one.
    """
    if not torch.cuda.is_available():
        return "gloo"
    service = NCCLCopyService()
    service._copy_stream = torch.cuda.current_stream()
    return service
