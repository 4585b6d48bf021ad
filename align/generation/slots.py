"""Device-side decoding state, and the one-token decode step.

All of a step stays on the device: the newest tokens, their positions and the random numbers are there, and
what was drawn is the next step's input. The host only looks on, so it may be a step behind, and on a GPU one
CUDA graph is the whole step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from align.generation import sampling
from align.generation.inference import InferenceModel, Prefix
from align.generation.sampling import SamplingConfig

SMALLER = 4  # each graph is for so many times fewer slots than the next: each costs two steps and some memory


@dataclass(frozen=True)
class Drawn:
    """One token for each of some slots, perhaps still on its way to the host."""

    values: Tensor  # [3, n] float64: tokens, log-probs, log-probs under the model as it is
    arrived: torch.cuda.Event | None

    def numpy(self) -> np.ndarray:
        """The values; waits for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.numpy()


def send(values: Tensor) -> Drawn:
    """Copy values to the host, from a GPU without waiting."""
    copy = values.to("cpu", non_blocking=True, copy=True)
    if not values.is_cuda:
        return Drawn(copy, None)
    arrived = torch.cuda.Event()
    arrived.record()
    return Drawn(copy, arrived)


class Slots:
    """The state of the sequences in an engine's slots, of which the first so many are in use.

    Slots out of use stay at position 0. Where a step computes them too, what it draws for them is ignored.
    """

    def __init__(self, engine: InferenceModel, config: SamplingConfig, slots: int, most: int):
        """`most` is the length of the longest answer, in tokens."""
        device = engine.device
        self.engine, self.config, self.slots = engine, config, slots
        self.rows = torch.arange(slots, device=device)
        # tokens: the newest ones, at these positions; counts: tokens drawn; in_use: 1 or 0
        self.tokens, self.positions, self.counts, self.in_use = torch.zeros(
            4, slots, dtype=torch.int64, device=device
        )
        # One for each token, and one more: the host may learn of an answer's end a step late.
        self.uniforms = torch.zeros(slots, most + 1, dtype=torch.float64, device=device)
        self.seen = None  # [slots, V], for the repetition penalty
        if config.repetition_penalty != 1.0:
            self.seen = torch.zeros(slots, engine.known_ids, dtype=torch.bool, device=device)
        self.graphs = Graphs() if engine.graphed else None

    @property
    def ahead(self) -> int:
        """Steps that are worth starting before the results of the one before are looked at."""
        return 0 if self.graphs is None else 1

    def start(
        self, slots: list[int], prefixes: list[Prefix], prompts: list[np.ndarray], uniforms: list[np.ndarray]
    ) -> Drawn:
        """Let slots continue prompts, with so many random numbers each; what is drawn first, [3, n]."""
        device, numbers = self.engine.device, np.zeros((len(slots), self.uniforms.shape[1]))
        for row, given in zip(numbers, uniforms, strict=True):
            row[: len(given)] = given
        for slot, prefix in zip(slots, prefixes, strict=True):
            self.engine.place(prefix, slot)
        chosen = torch.tensor(slots, device=device)
        self.uniforms[chosen] = torch.from_numpy(numbers).to(device)
        # of the prompt's last token: the step counts on
        self.positions[chosen] = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        self.counts[chosen], self.in_use[chosen] = 0, 1
        if self.seen is not None:
            for slot, prompt in zip(slots, prompts, strict=True):
                self.seen[slot] = False
                self.seen[slot, torch.from_numpy(prompt.astype(np.int64)).to(device)] = True
        first = not self.engine.stages.after
        return send(self.draw(torch.stack([p.logits for p in prefixes]) if first else None, chosen))

    def step(self, count: int, longest: int) -> Drawn:
        """A token for each of the first `count` slots, of `longest` tokens at most: [3, count or more]."""
        self.engine.reserve(longest)
        if self.graphs is None:
            return send(self.next_tokens(count))
        return send(self.graphs(self.next_tokens, graph_size(count, self.slots), self.engine.capacity))

    def next_tokens(self, count: int) -> Tensor:
        """The step itself: [3, count] on the device. Collective over tp and pp."""
        logits = self.engine.decode(self.tokens[:count], self.positions[:count])
        return self.draw(logits, slice(count))

    def draw(self, logits: Tensor | None, chosen: slice | Tensor) -> Tensor:
        """Draw a token for each of the chosen slots from logits [n, V], and note it: [3, n] on the device."""
        rows = self.rows[chosen]
        if logits is None:
            drawn = torch.zeros(3, len(rows), dtype=torch.float64, device=rows.device)
        else:
            uniforms = self.uniforms[rows, self.counts[chosen]]
            seen = None if self.seen is None else self.seen[chosen]
            drawn = torch.stack([x.double() for x in sampling.pick(logits, uniforms, self.config, seen)])
        tokens = self.engine.stages.from_last(drawn)[0].long()
        self.tokens[chosen] = tokens
        self.positions[chosen] += self.in_use[chosen]
        self.counts[chosen] += self.in_use[chosen]
        if self.seen is not None:
            self.seen.index_put_((rows, tokens), self.in_use[chosen].bool())
        return drawn

    def move(self, source: int, target: int, length: int) -> None:
        """Let a slot go on with another's sequence, of which `length` tokens have keys and values."""
        self.engine.move(source, target, length)
        state = (self.tokens, self.positions, self.counts, self.uniforms, self.seen)
        for tensor in (x for x in state if x is not None):
            tensor[target] = tensor[source]

    def release(self, count: int) -> None:
        """From now on the first `count` slots are in use."""
        for tensor in (self.positions, self.counts, self.in_use):
            tensor[count:] = 0


def graph_size(count: int, slots: int) -> int:
    """For how many of the slots a graph is made that serves the first `count` of them."""
    size = slots
    while count <= size // SMALLER:
        size //= SMALLER
    return size


class Graphs:
    """A step as CUDA graphs, one for each number of rows: each costs the host one launch.

    The step must use the same memory as long as its capacity is the same, and not wait for the device. Its
    first call for a number of rows runs as it is, which also loads or compiles its kernels, and is captured
    afterwards: to capture a step runs nothing.

    The step is not kept: whoever owns the graphs would own itself, and its memory would wait for the
    collector of such circles.
    """

    def __init__(self):
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.capacity = 0

    def __call__(self, step: Callable[[int], Tensor], rows: int, capacity: int) -> Tensor:
        """Result of step(rows), in memory that a later call overwrites."""
        if capacity != self.capacity:  # keys and values have moved
            self.forget()
            self.capacity = capacity
        if rows not in self.captured:
            result = step(rows)
            self.captured[rows] = self.capture(step, rows)
            return result
        graph, result = self.captured[rows]
        graph.replay()
        return result

    def capture(self, step: Callable[[int], Tensor], rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph, and where it leaves its result. Graphs run one at a time, so they share their memory."""
        others = [graph.pool() for graph, _ in self.captured.values()]
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's own thread may look at its events meanwhile.
        with torch.cuda.graph(graph, pool=others[0] if others else None, capture_error_mode="thread_local"):
            result = step(rows)
        return graph, result

    def forget(self) -> None:
        """Drop all graphs: some of the memory that they use has moved."""
        if self.captured:
            torch.cuda.synchronize()  # one may be running
            self.captured.clear()
