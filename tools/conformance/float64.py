"""One step of each algorithm in float64, one sequence at a time, by tools/reference.py: no Megatron.

Nothing is packed, shared or split. The rows and recorded rollouts are those of the grid.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from align.data.packing import Example
from tools import reference
from tools.conformance import compare, rows
from tools.conformance.compare import Cell
from tools.conformance.losses import ADAM_EPS, BETA, CLIP, ENTROPY_COEF, KL_COEF, LABELS, LR, SEED, VALUE_CLIP
from tools.conformance.rows import DataSet, Recorded, Source

Values = dict[str, np.ndarray]  # of one row, by name


def outputs(model: reference.Model, example: Example, labels: int, with_entropy: bool) -> Tensor:
    """Log-probs [n], with entropies [n, 2], or values [n, A] at the n trained tokens of a sequence."""
    trained = torch.from_numpy(example.trained[1:].copy())
    if labels:  # the last id is a target only
        return reference.values(model, example.ids[:-1].tolist())[trained]
    if not with_entropy:
        return reference.token_logprobs(model, example.ids.tolist())[trained]
    logprobs = model(torch.from_numpy(example.ids[None].astype(np.int64))).logits[0, :-1].log_softmax(-1)
    own = logprobs.gather(1, torch.from_numpy(example.ids[1:, None].astype(np.int64)))[:, 0]
    return torch.stack([own, -(logprobs.exp() * logprobs).sum(1)], 1)[trained]


def row_loss(algorithm: str, parts: list[Tensor], values: Values, margin: float) -> Tensor:
    """Sum of a row's loss; `parts`: the outputs of its sequences."""
    if algorithm == "sft":
        return -parts[0].sum()
    if algorithm == "dpo":  # before the first update policy and reference agree
        chosen, rejected = (part.sum() - part.sum().detach() for part in parts)
        return reference.dpo(chosen, rejected, BETA)
    if algorithm == "ranking":
        return reference.ranking(parts[0][0, 0], parts[1][0, 0], margin)
    if algorithm == "regression":
        return reference.regression(parts[0][0], values["target"][0].astype(float).tolist())
    output = torch.cat(parts)
    tokens = {name: torch.from_numpy(x).double() for name, x in values.items()}
    if algorithm == "critic":
        return reference.value_loss(output[:, 0], tokens["values"], tokens["returns"], VALUE_CLIP).sum()
    loss = reference.policy_loss(output[:, 0], tokens["old"], tokens["advantages"], CLIP).sum()
    if algorithm == "ppo":
        return loss - ENTROPY_COEF * output[:, 1].sum()
    return loss + KL_COEF * reference.kl("k3", output[:, 0], tokens["ref"]).sum()


def of_rows(data: DataSet) -> Iterator[tuple[tuple[Example, ...], Values]]:
    """The examples of each row, and its values."""
    for number, row in enumerate(data.rows):
        yield row, {name: np.asarray(arrays[number]) for name, arrays in data.values.items()}


def compare_step(directory: Path, algorithm: str, source: Source, stored: dict) -> dict[str, Cell]:
    """Compare the first step of a stored reference of the grid with the same step in float64.

    stored: "steps", "outputs", "gradients", "weights" and "recorded" of worker.Measurement.record.
    """
    recorded: list[Recorded] = stored["recorded"]
    data = rows.data_set(algorithm, 0, rows.ROWS, source, recorded[0] if recorded else None)
    pairs = source.pairs(0) if algorithm == "ranking" else []
    margins = [pair.margin for pair in pairs] or [0.0] * rows.ROWS
    labels = LABELS[algorithm]
    model = reference.load(directory, labels, seed=SEED)
    all_outputs, total = [], 0.0
    for (row, values), margin in zip(of_rows(data), margins, strict=True):
        parts = [outputs(model, example, labels, algorithm in ("ppo", "grpo")) for example in row]
        loss = row_loss(algorithm, parts, values, margin) / sum(data.counts)
        loss.backward()
        total += float(loss.detach())
        all_outputs.append(torch.cat(parts).detach().numpy())
    gradients = {name: x.detach().clone() for name, x in reference.gradients(model).items()}
    norm = torch.sqrt(sum(((x**2).sum() for x in gradients.values()), start=torch.zeros(()).double()))
    first = stored["steps"][0]
    step = {**first, "loss": total, "grad_norm": float(norm)}  # sizes of metrics are the grid's
    return {
        "outputs": compare.outputs(stored["outputs"], all_outputs),
        "loss": compare.metrics([first], [step], names=["loss"]),
        "gradients": compare.tensors(stored["gradients"], gradients),
        "gradient norm": compare.metrics([first], [step], names=["grad_norm"]),
        "weights": compare.tensors(stored["weights"], updated(model, norm, LR[algorithm])),
    }


def updated(model: reference.Model, norm: Tensor, lr: float) -> dict[str, Tensor]:
    """Weights after a step of AdamW from the gradients in place, clipped to norm 1."""
    named = dict(model.named_parameters())
    for parameter in named.values():
        parameter.grad *= min(1.0, 1.0 / (float(norm) + 1e-6))
    groups = [
        {"params": [x for x in named.values() if x.dim() > 1], "weight_decay": 0.1},
        {"params": [x for x in named.values() if x.dim() == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=ADAM_EPS).step()
    return {name: parameter.detach() for name, parameter in named.items()}
