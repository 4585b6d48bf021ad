"""`--record`: all that the numbers of a step follow from, in OUTPUT/records/step_NNNNNN.

record.json has the script, the step, its metrics, and those of the first update of each model;
gradients_MODEL.safetensors the gradient of that update, before clipping, by the names of the Hugging Face
directory; arrays.safetensors these arrays, as far as the script has them. Sequences lie end to end, in the
order of the step in every layout.

| array | content |
|---|---|
| `rows` | [R] numbers of the training rows, from 0, rows that are left out of the data not counted |
| `lengths`, `ids`, `trained` | token ids of each sequence [S]; the ids, end to end, and which are trained |
| `logprobs` | [n] of the policy at the trained tokens, before the first update |
| `ref_logprobs` | [2P] by response in train_dpo.py, else [n] by token |
| `scores`, `targets` | [S, A] of a reward model, with margins or labels; [S] of the responses of a rollout |
| `ended` | [S] True for a response that is not truncated |
| `sampler_logprobs`, `model_logprobs` | [n] of the sampler: as drawn, and of the model without its filters |
| `old_logprobs`, `values`, `rewards`, `advantages`, `returns`, `counted` | [n], tokens of a rollout |
| `selected` | sequences of a rollout that rejection sampling trains on |
| `gaps` | [P] score of chosen less that of rejected, in self-rewarding |

A reward model reads its score at the last token: an id 0 follows it there, the only trained one.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from megatron.core.distributed import DistributedDataParallel
from safetensors.numpy import save_file
from torch import Tensor

from align.data.packing import Batch, BatchConfig, Example
from align.distributed import parallel
from align.training import batching, gradients


class Record:
    """The record of a step under way. Every rank calls the methods alike; rank 0 writes."""

    def __init__(self, directory: Path):
        """`directory`: of this step."""
        self.directory = directory
        self.arrays: dict[str, np.ndarray] = {}
        self.gradients: dict[str, dict[str, np.ndarray]] = {}  # by model
        self.updates: dict[str, dict[str, float]] = {}  # metrics of the first update, by model

    def put(self, **arrays: np.ndarray | Tensor | Sequence) -> None:
        """Add arrays that every rank has."""
        for name, array in arrays.items():
            self.arrays[name] = np.ascontiguousarray(
                array.detach().cpu() if isinstance(array, Tensor) else array
            )

    def put_examples(self, examples: Sequence[Example]) -> None:
        """Add the token ids of sequences, and which are trained."""
        self.put(
            lengths=[len(example.ids) for example in examples],
            ids=np.concatenate([example.ids for example in examples]),
            trained=np.concatenate([example.trained for example in examples]),
        )

    def put_outputs(
        self,
        name: str,
        model: DistributedDataParallel,
        rows: Sequence[Sequence[Example]],
        config: BatchConfig,
    ) -> None:
        """Add the model's outputs at trained targets, with the bits of training. Collective.

        `rows`: those that are trained next, as `batching.micro_batches` takes them.
        """
        self.put(**{name: np.concatenate(batching.per_example_outputs(model, rows, config))})

    def put_extra(self, name: str, batches: Sequence[Batch], extra: str) -> None:
        """Add extra[`extra`] of a step's micro-batches, whose rows are in extra["row"]. Collective."""
        own: dict[int, np.ndarray] = {}
        for batch in batches:
            numbers = batch.extra["row"].tolist()
            own |= dict(zip(numbers, batch.extra[extra].view(len(numbers), -1).cpu().numpy(), strict=True))
        by_row = {row: values for part in parallel.gather_over_dp(own) for row, values in part.items()}
        self.put(**{name: np.concatenate([by_row[row] for row in self.arrays["rows"].tolist()])})

    def put_update(self, name: str, model: DistributedDataParallel, metrics: Mapping[str, float]) -> None:
        """Add metrics and gradient, before clipping, of a model's first update in the step. Collective."""
        if name not in self.updates:
            self.updates[name] = dict(metrics)
            named = gradients.by_name(model)
            self.gradients[name] = {key: grad.float().cpu().numpy() for key, grad in named.items()}

    def write(self, script: str, step: int, total_steps: int, metrics: dict[str, float]) -> None:
        """Write the directory, which appears by one rename, on rank 0."""
        if not parallel.is_main():
            return
        unfinished = self.directory.with_suffix(".tmp")
        for path in (unfinished, self.directory):  # of a run that was interrupted
            shutil.rmtree(path, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save_file(self.arrays, unfinished / "arrays.safetensors")
        for model, named in self.gradients.items():
            save_file(named, unfinished / f"gradients_{model}.safetensors")
        facts = {"script": Path(script).name, "step": step, "total_steps": total_steps}
        facts |= {"metrics": metrics, "first_updates": self.updates}
        (unfinished / "record.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        unfinished.rename(self.directory)


def begin(output: Path, interval: int | None, step: int) -> Record | None:
    """The record of a step, from 0; None unless --record asks for it: the first step, and each N-th after it.

    So the checkpoint before a recorded step is there if --save-interval divides N.
    """
    if interval is None or step % interval:
        return None
    return Record(output / "records" / f"step_{step + 1:06d}")
