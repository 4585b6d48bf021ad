"""Run by test_logprobs.py under torchrun: each rank with its half of the vocabulary, results to files."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from align.logprobs import CHUNK, target_logprobs
from tests.test_logprobs import PADDED, VOCAB, inputs

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
for vocab in (VOCAB, PADDED // 4):
    hidden, weight, targets, grad = inputs(CHUNK + 9, vocab)
    weight = weight.chunk(size)[rank].clone().requires_grad_()
    hidden.requires_grad_()
    logprobs = target_logprobs(hidden, weight, targets, vocab, dist.group.WORLD)
    logprobs.backward(grad)
    found = {"logprobs": logprobs.detach(), "grad_hidden": hidden.grad, "grad_weight": weight.grad}
    torch.save(found, Path(sys.argv[1]) / f"{vocab}-{rank}.pt")
dist.barrier()
dist.destroy_process_group()
