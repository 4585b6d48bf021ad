"""Run by test_logprobs.py on every rank, results to files.

`values OUTPUT`: target_logprobs with and without entropies, each rank with its half of the vocabulary.
`policy OUTPUT MODEL LAYOUTS`: what a policy with entropy gives in each layout, and the norm of its gradient.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from align.data import packing
from align.data.packing import Batch
from align.distributed import parallel
from align.model import architecture, gpt, huggingface
from align.model.config import ModelConfig
from align.model.logprobs import CHUNK, target_logprobs
from align.training import batching, engine, optim
from tools.conformance.rows import RANDOM

HIDDEN, VOCAB, PADDED = 16, 37, 64
TEMPERATURES = (0.7, 1.0, 1.3)


def inputs(tokens: int, vocab: int = VOCAB, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [n, H], weight [PADDED, H] (padding rows are large, to show in a sum), targets [n], grad [n]."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=random)
    weight = torch.randn(PADDED, HIDDEN, generator=random)
    weight[vocab:] *= 10
    targets = torch.randint(vocab, (tokens,), generator=random)
    return hidden, weight, targets, torch.randn(tokens, generator=random)


def entropy_grad(tokens: int) -> Tensor:
    """A gradient [n, 2] of log-probs and entropies."""
    return torch.randn(tokens, 2, generator=torch.Generator().manual_seed(1))


def values(output: Path) -> None:
    """Values and gradients of both functions; once the second rank has nothing but padding rows."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for vocab in (VOCAB, PADDED // 4):
        whole, rows, targets, grad = inputs(CHUNK + 9, vocab)
        for temperature in TEMPERATURES:
            results = []
            for entropy in (False, True):
                hidden, weight = (
                    whole.clone().requires_grad_(),
                    rows.chunk(size)[rank].clone().requires_grad_(),
                )
                result = target_logprobs(
                    hidden, weight, targets, vocab, dist.group.WORLD, temperature, entropy
                )
                result.backward(grad if result.dim() == 1 else entropy_grad(len(result)))
                results.append((result.detach(), hidden.grad, weight.grad))
            torch.save(results, output / f"{vocab}-{temperature}-{rank}.pt")


def policy_loss(batch: Batch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss to which every token's log-prob and entropy adds something else than another token's."""
    logprobs, entropies = output.unbind(1)
    weight = (1 + batch.targets.double()) * batch.mask
    return -(weight * (logprobs.double() + 0.5 * entropies.double().square())).sum(), {}


def policies(output: Path, directory: Path, layouts: list[dict]) -> None:
    """[T, 2] of the first rows, [T] without entropy, the loss and the norm of its gradient, by main rank."""
    arch = architecture.read_config(directory)
    config, policies_ = ModelConfig(str(directory), precision="fp32"), []
    for flags in layouts:
        layout = parallel.ParallelConfig(**flags)
        mpu.destroy_model_parallel()
        parallel.make_grid(layout)
        policy = gpt.build_policy(arch, config, layout, TEMPERATURES[0], entropy=True)
        huggingface.load(policy, huggingface.open_source(directory, arch, 0))
        ddp = gpt.distributed(policy)
        optimizer = optim.build(ddp, optim.OptimConfig())
        batch = packing.collate([[example] for example in RANDOM.examples(0)], batching.alignment(ddp))
        both = engine.outputs(ddp, [batch], lambda _, out: out)[0]
        policy.entropy = False
        logprobs = engine.outputs(ddp, [batch], lambda _, out: out)[0]
        policy.entropy = True
        loss = engine.forward_backward(ddp, [batch], policy_loss, 1000.0)["loss"]
        policies_.append((batch.mask.bool(), both, logprobs, loss, optim.step(optimizer, 0.0)))
    if parallel.is_main():
        torch.save(policies_, output / "policies.pt")


if __name__ == "__main__":
    with parallel.start(parallel.ParallelConfig()):
        if sys.argv[1] == "values":
            values(Path(sys.argv[2]))
        else:
            policies(Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
