"""Are the sampler and the trainer the same model? Asked after every rollout, before its first update.

Both have the same weights then, so the log-prob that a token was sampled with (untempered) and the one that
training computes of it must agree. A mask or position that is off by one, stale weights, dropout, another
temperature, a wrong cache: whatever makes the two differ shows here, and stops the run.
"""

import math

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from align import engine, parallel
from align.generate import Sample
from align.packing import Batch

# Most that the log-probs may differ by, in nats: on average, and at one token. For SmolLM2-135M, whose logits
# reach 37, rounding alone makes it 4e-6 and 4e-5 in fp32, and 0.03 and 0.3 in bf16.
BOUND = {torch.float32: (5e-5, 1e-3), torch.bfloat16: (0.1, 2.0)}


def values(answers: list[tuple[int, int, Sample]]) -> dict[str, list]:
    """What `check` needs with micro-batches of answers, [(row of the data, number of the answer, answer)]."""
    places = [
        torch.tensor([(row, number, i) for i in range(len(sample.ids))]).numpy()
        for row, number, sample in answers
    ]
    return {"sampled": [sample.model_logprobs for _, _, sample in answers], "place": places}


def check(model: DistributedDataParallel, batches: list[Batch]) -> dict[str, float]:
    """How much sampled and trained log-probs differ, on average and at most, in nats. Collective.

    Args:
        batches: micro-batches of answers, every token of them trained, with `values`; the model still has
            the weights that they were sampled with.

    Raises:
        RuntimeError: they differ by more than BOUND; the message names the token where they do so most.
    """

    def differences(batch: Batch, logprobs: Tensor) -> Tensor:
        trained = logprobs[batch.mask.bool()]
        return torch.stack([batch.extra["sampled"].float(), trained])  # [2, tokens]

    found = torch.cat(engine.outputs(model, batches, differences), 1).double().cpu()
    places = torch.cat([batch.extra["place"] for batch in batches]).cpu()
    errors = (found[0] - found[1]).abs()
    worst = int(errors.argmax()) if len(errors) else None
    mine = (0.0, None, None)
    if worst is not None:
        mine = (float(errors[worst]), places[worst].tolist(), found[:, worst].tolist())
    everyone = parallel.gather_over_dp((*mine, float(errors.sum()), len(errors)))
    largest, place, both, _, _ = max(everyone, key=lambda item: (math.isnan(item[0]), item[0]))
    mean = sum(item[3] for item in everyone) / max(1, sum(item[4] for item in everyone))
    most_mean, most = BOUND[model.module.config.params_dtype]
    if not (mean <= most_mean and largest <= most):  # so written, NaN is refused too
        row, number, token = place
        raise RuntimeError(
            f"audit: token {token} of answer {number} to row {row} was sampled with log-prob {both[0]:.6f}, "
            f"training says {both[1]:.6f}. They differ by {largest:.2g} (bound {most:.2g}), on average by "
            f"{mean:.2g} (bound {most_mean:.2g}): the sampler and the trainer do not compute the same model"
        )
    return {"audit/logprob_error": mean, "audit/logprob_error_max": largest}
