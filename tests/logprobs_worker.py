"""Run by test_logprobs.py under torchrun: each rank with its half of the vocabulary, results to files."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from align.logprobs import CHUNK, target_logprobs

HIDDEN, VOCAB, PADDED = 16, 37, 64


def inputs(tokens: int, vocab: int = VOCAB, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [n, H], weight [PADDED, H] (padding rows are large, to show in a sum), targets [n], grad [n]."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=random)
    weight = torch.randn(PADDED, HIDDEN, generator=random)
    weight[vocab:] *= 10
    targets = torch.randint(vocab, (tokens,), generator=random)
    return hidden, weight, targets, torch.randn(tokens, generator=random)


def main(output: Path) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    for vocab in (VOCAB, PADDED // 4):
        hidden, weight, targets, grad = inputs(CHUNK + 9, vocab)
        weight = weight.chunk(size)[rank].clone().requires_grad_()
        hidden.requires_grad_()
        logprobs = target_logprobs(hidden, weight, targets, vocab, dist.group.WORLD)
        logprobs.backward(grad)
        found = {"logprobs": logprobs.detach(), "grad_hidden": hidden.grad, "grad_weight": weight.grad}
        torch.save(found, output / f"{vocab}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
