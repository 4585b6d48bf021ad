"""Times, speeds and means of metrics."""

import math
import time


class Clock:
    """Clock of phases: each `lap` ends a phase, `shares` sums up the phases since its last call."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to phase `name`, perhaps several times in a step."""
        assert name != "step", "the sum of all phases has this name"
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def total(self, *phases: str) -> float:
        """Seconds of these phases since `shares` was last called."""
        return sum(self.seconds.get(name, 0.0) for name in phases)

    def shares(self) -> dict[str, float]:
        """`time/step` in seconds and `time/<phase>` as shares of it, which sum to 1; resets the clock."""
        total = sum(self.seconds.values())
        shares = {f"time/{name}": seconds / total for name, seconds in self.seconds.items()}
        self.seconds.clear()  # `last` stays: no time is lost between two steps
        return {"time/step": total, **shares}


def speed(num_matmul_params: int, tokens: int, computed: int, seconds: float) -> dict[str, float]:
    """Tokens per second of a step, and the arithmetic per second.

    `computed`: tokens, shared ones counted once. Each takes 6 operations per weight, 2 forward and 4
    backward; attention, recomputation and reference do not count, the output layer counts for every token.
    `num_matmul_params` leaves out the input embedding, which is a look-up.
    """
    flops = 6.0 * num_matmul_params * computed
    return {"time/tokens_per_s": tokens / seconds, "time/tflops_per_s": flops / seconds / 1e12}


def mean_of(updates: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over several updates; {} without any."""
    return {name: sum(update[name] for update in updates) / len(updates) for name in (updates or [{}])[0]}


def with_std(metrics: dict[str, float]) -> dict[str, float]:
    """Replace each NAME_square (beside NAME_mean) by NAME_std = sqrt(E[x^2] - E[x]^2)."""
    result = dict(metrics)
    for name in [name for name in metrics if name.endswith("_square")]:
        stem = name.removesuffix("_square")
        result[f"{stem}_std"] = math.sqrt(max(result.pop(name) - result[f"{stem}_mean"] ** 2, 0.0))
    return result


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share of `count` independent trials (Wilson 1927)."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return middle - half, middle + half
