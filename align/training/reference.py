"""Log-probabilities of the reference model, which training starts from, for micro-batches of pairs.

Three ways with equal numbers: `Precomputed` before training begins, or in each step `Swapped`, with adapters
`BaseModel`. All use the forward pass of training on the same micro-batches. So before the first update policy
and reference agree to the last bit, which `check_start` checks.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from align.data.packing import Batch, to_device
from align.data.preferences import Pair
from align.distributed import parallel
from align.errors import UserError
from align.model import gpt, lora
from align.model.config import ModelConfig
from align.training import checkpoint, engine, tables
from align.training.checkpoint import CheckpointConfig
from align.training.config import CommonConfig
from align.training.offload import HostStore, Weights

SAMPLES, SAMPLE_BYTES = 32, 65536  # of a weight file, for weights_id
START_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 1.0}  # nats a response, if passes may differ in bits
SequenceLogprobs = Callable[[Batch, Tensor], Tensor]  # log-probs [T] of a micro-batch -> one per sequence


class Swapped:
    """Reference weights in host memory, swapped into the policy for a forward pass."""

    def __init__(self, model: DistributedDataParallel, sequence_logprobs: SequenceLogprobs):
        """`model`: not yet trained; its weights are copied."""
        self.model, self.sequence_logprobs = model, sequence_logprobs
        self.weights = Weights(model.module)

    def attach(self, batches: list[Batch], name: str) -> None:
        """Set extra["ref"] of each micro-batch, [2P] in nats. Collective."""
        with self.weights.swapped_into(self.model.module):
            ref_logprobs = engine.outputs(self.model, batches, self.sequence_logprobs)
        for batch, logprobs in zip(batches, ref_logprobs, strict=True):
            batch.extra["ref"] = logprobs


class BaseModel:
    """The base model of adapters, the policy with these switched off: no second copy of the weights."""

    def __init__(self, model: DistributedDataParallel, sequence_logprobs: SequenceLogprobs):
        self.model, self.sequence_logprobs = model, sequence_logprobs

    def attach(self, batches: list[Batch], name: str) -> None:
        """Set extra["ref"] of each micro-batch, [2P] in nats. Collective."""
        with lora.switched_off(self.model.module):
            ref_logprobs = engine.outputs(self.model, batches, self.sequence_logprobs)
        for batch, logprobs in zip(batches, ref_logprobs, strict=True):
            batch.extra["ref"] = logprobs


class ReferenceWeights:
    """Context in which a policy has the weights of its reference: swapped in, or with adapters the base's.

    needs: of a phase (`phases.Phases`) around it.
    """

    def __init__(self, model: DistributedDataParallel, store: HostStore, config: CommonConfig):
        """`model`: not yet trained; without adapters its weights are copied to the store.

        Raises UserError if the run began with another reference.
        """
        check_same(config.run.output, config.model.path, config.checkpoint)
        has_adapters = gpt.stages(model)[0].adapters is not None
        self.needs = {"policy": "weights"} if has_adapters else {}
        self.enter: Callable[[], AbstractContextManager] = (
            partial(lora.switched_off, model.module)
            if has_adapters
            else partial(Weights(model.module, store).swapped_into, model.module)
        )

    def __call__(self) -> AbstractContextManager:
        return self.enter()


class Precomputed:
    """Tables by data set, [pairs, 2] float64 in nats, kept in a file for a continued run."""

    def __init__(
        self,
        model: DistributedDataParallel,
        sequence_logprobs: SequenceLogprobs,
        micro_batches: Callable[[str, Sequence[int]], list[Batch]],
        uses: dict[str, Iterable[Sequence[int]]],
        path: Path,
        fingerprint: str,
    ):
        """
        Args:
            model: not yet trained.
            micro_batches: packs rows of a named data set; their numbers are in extra["row"].
            uses: by data set, the rows of each batch of the run.
            fingerprint: of all that the tables depend on; a file with another fingerprint is replaced.
        """
        stored = parallel.on_main(lambda: tables.read(path, fingerprint))
        self.tables: dict[str, np.ndarray] = {} if stored is None else stored
        if stored is not None:
            return
        for name, batches in uses.items():
            by_row: dict[int, list[float]] = {}
            for rows in without_repeats(batches):
                local = micro_batches(name, rows)
                outputs = engine.outputs(model, local, sequence_logprobs)
                for batch, logprobs in zip(local, outputs, strict=True):
                    pairs = logprobs.view(-1, 2).tolist()
                    by_row |= dict(zip(batch.extra["row"].tolist(), pairs, strict=True))
            self.tables[name] = gather_table(by_row)
        if parallel.is_main():
            tables.write(path, fingerprint, self.tables)

    def attach(self, batches: list[Batch], name: str) -> None:
        """Set extra["ref"] of each micro-batch, [2P] in nats."""
        for batch in batches:
            logprobs = self.tables[name][batch.extra["row"].cpu().numpy()].reshape(-1)
            batch.extra["ref"] = to_device(torch.from_numpy(logprobs), parallel.device())


def without_repeats(batches: Iterable[Sequence[int]]) -> list[list[int]]:
    """Batches of several epochs without the rows of earlier batches; the first epoch's do not change."""
    seen: set[int] = set()
    result = []
    for batch in batches:
        if new := [row for row in batch if row not in seen]:
            seen.update(new)
            result.append(new)
    return result


def gather_table(by_row: dict[int, list[float]]) -> np.ndarray:
    """Merge {row: values} of all data parallel ranks to an array; rows of no rank are NaN. Collective."""
    merged = {row: values for part in parallel.gather_over_dp(by_row) for row, values in part.items()}
    table = np.full((max(merged, default=-1) + 1, 2), np.nan)
    for row, values in merged.items():
        table[row] = values
    return table


def fingerprint(start: ModelConfig, pairs: Mapping[str, Sequence[Pair]], *settings: object) -> str:
    """sha256 of all that the bits of reference log-probs depend on: weights, machine, tokens, settings."""
    machine = (torch.__version__, parallel.device_name(), torch.get_num_threads(), parallel.layout_sizes())
    inputs = (weights_id(start.path), str(start.dtype), start.attention, machine, settings)
    digest = hashlib.sha256(repr(inputs).encode())
    for name in pairs:
        digest.update(repr((name, len(pairs[name]))).encode())
        for example in (example for pair in pairs[name] for example in pair.examples):
            digest.update(repr(len(example.ids)).encode() + example.ids.tobytes() + example.trained.tobytes())
    return digest.hexdigest()


def weights_id(directory: Path) -> str:
    """sha256 of a model directory: config.json, and the size and SAMPLES pieces of each weight file.

    Training changes every matrix, so pieces distinguish models, and reading them takes no time.
    """
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(repr((path.name, size)).encode())
        with open(path, "rb") as file:
            for i in range(SAMPLES):
                file.seek(i * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def check_same(
    output: Path, directory: Path, config: CheckpointConfig, role: Literal["reference", "base"] = "reference"
) -> None:
    """Record a model that a run needs unchanged. Raises UserError if the run began with another.

    `role`: the reference of a loss, in OUTPUT/reference.txt, or the base of adapters, in OUTPUT/base.txt.
    """
    if not parallel.is_main():
        return
    path, model_id = output / f"{role}.txt", weights_id(directory)
    continues = config.resume and checkpoint.newest(output / "checkpoints") is not None
    if continues and path.is_file() and path.read_text(encoding="utf-8").strip() != model_id:
        raise UserError(
            f"--model {directory} is not the model that this run began with, which is its {role}: give "
            "that one, or another --output, or --no-resume"
        )
    path.write_text(model_id + "\n", encoding="utf-8")


def attach_kl(
    batches: list[Batch], model: DistributedDataParallel, sequence_logprobs: SequenceLogprobs, num_pairs: int
) -> None:
    """Set extra["kl_chosen"] and "kl_rejected" of a step's micro-batches, for losses.preference.kto_pair.

    Mean log-ratios of chosen and of rejected responses, at least 0, from a forward pass. Collective.
    """
    total = torch.zeros(2, dtype=torch.float64, device=parallel.device())
    for batch, logprobs in zip(batches, engine.outputs(model, batches, sequence_logprobs), strict=True):
        total += (logprobs - batch.extra["ref"]).view(-1, 2).sum(0)
    kl = (parallel.sum_over_dp(total) / num_pairs).clamp(min=0)
    for batch in batches:
        batch.extra.update(kl_chosen=kl[0], kl_rejected=kl[1])


def start_bound(flag: float | None, dtype: torch.dtype, is_exact: bool) -> float:
    """--audit-start or its default; `is_exact`: two passes over the same micro-batches have the same bits."""
    default = 0.0 if is_exact else START_BOUNDS[dtype]
    return default if flag is None else flag


def check_start(metrics: dict[str, float], loss: str, beta: float, bound: float) -> None:
    """Check that policy and reference start as one model; RuntimeError if they are computed differently.

    Args:
        metrics: of the first update, computed before it.
        bound: on the mean |log-ratio| of a response, in nats. With log-ratios r the loss of dpo is
            -log s(beta (r_w - r_l)), whose slope is at most beta: so it is within 2 beta `bound` of ln 2.
    """
    deviation = abs(metrics["preference_loss"] - math.log(2)) if loss == "dpo" else 0.0
    is_near = deviation <= 1e-12 * math.log(2) + 2 * beta * bound
    if not (metrics["logratio_abs_mean"] <= bound and is_near):
        raise RuntimeError(
            "before the first update the policy is the reference, but their log-probs differ by "
            f"{metrics['logratio_abs_mean']} nats a sequence (--audit-start {bound:g}) and the loss is "
            f"{metrics['preference_loss']}. "
            "On GPUs try --deterministic; delete OUTPUT/reference.safetensors if another machine made it"
        )
