"""Plain loops over transformers' models, one text at a time, with torch's own AdamW."""

from collections import Counter
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from align.data.packing import Example
from tools.conformance.losses import ADAM_EPS
from tools.conformance.rows import STEPS

PAIR_METRICS = (
    "acc",
    "rewards_chosen_mean",
    "rewards_rejected_mean",
    "rewards_margin_mean",
    "rewards_all_mean",
)


def as_input(example: Example) -> Tensor:
    """All ids, [1, n] int64."""
    return torch.tensor(example.ids[None]).long()


def answer_logprob(lm: torch.nn.Module, example: Example) -> Tensor:
    """log p(trained tokens | what is before them), float64."""
    ids, trained = as_input(example), torch.tensor(example.trained[1:])
    logprobs = lm(ids[:, :-1]).logits[0].log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0][trained].double().sum()


def pair_loss(
    chosen: Tensor, rejected: Tensor, margin: float, num_pairs: int
) -> tuple[Tensor, dict[str, float]]:
    """One pair's part of the mean loss, -log sigmoid(chosen - rejected - margin), and of the mean metrics."""
    metrics = (chosen > rejected, chosen, rejected, chosen - rejected, (chosen + rejected) / 2)
    parts = {
        name: float(metric.detach()) / num_pairs for name, metric in zip(PAIR_METRICS, metrics, strict=True)
    }
    return -F.logsigmoid(chosen - rejected - margin) / num_pairs, parts


def plain_training(
    module: torch.nn.Module, parts: Callable[[int], Iterator[tuple[Tensor, dict[str, float]]]], lr: float
) -> list[dict[str, float]]:
    """Loss, gradient norm and other metrics of each step; parts(step) gives the terms of their sums."""
    groups = [[p for p in module.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.98),
        eps=ADAM_EPS,
    )
    history = []
    for step in range(STEPS):
        sums = Counter(loss=0.0)
        for loss, metrics in parts(step):
            loss.backward()
            sums.update({"loss": float(loss.detach()), **metrics})
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append({**sums, "grad_norm": float(norm)})
    return history
