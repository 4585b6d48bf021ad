"""Device-side decoding state, and the one-token decode step.

The newest tokens, their positions and the random numbers are on the device, and the tokens drawn are the next
step's input. So the host may read results one step later, and on a GPU one CUDA graph is the whole step.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from align.data.packing import to_device
from align.generation import sampling
from align.generation.inference import InferenceModel, PrefilledPrompt
from align.generation.sampling import SamplingConfig

SMALLER = 4  # ratio of the slots of successive graphs: each graph costs two steps and some memory


class Drawn:
    """One token for each of some slots, copied to the host, from a GPU asynchronously."""

    def __init__(self, values: Tensor):
        """`values`: [3, n] float64: tokens, log-probs, log-probs under the model as it is."""
        self.values = values.to("cpu", non_blocking=True, copy=True)
        self.copied = torch.cuda.Event() if values.is_cuda else None
        if self.copied is not None:
            self.copied.record()

    def numpy(self) -> np.ndarray:
        """The values, once they are copied."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.numpy()


class Slots:
    """State of the sequences in an engine's slots, of which the first are in use.

    Slots out of use stay at position 0. A step may compute them too; their tokens are ignored.
    """

    def __init__(self, engine: InferenceModel, config: SamplingConfig, slots: int, most: int):
        """`slots`: most sequences, as many as the engine's; `most`: tokens of the longest response."""
        device = engine.device
        self.engine, self.config, self.slots = engine, config, slots
        self.rows = torch.arange(slots, device=device)
        # tokens: the newest ones, at these positions; counts: tokens drawn; in_use: 1 or 0
        self.tokens, self.positions, self.counts, self.in_use = torch.zeros(
            4, slots, dtype=torch.int64, device=device
        )
        # One for each token, and for a step before the host has read the response's end, and while it waits.
        self.uniforms = torch.zeros(slots, most + 2, dtype=torch.float64, device=device)
        self.seen: Tensor | None = None  # [slots, V], for the repetition penalty
        if config.repetition_penalty != 1.0:
            self.seen = torch.zeros(slots, engine.known_ids, dtype=torch.bool, device=device)
        self.graphs = Graphs() if engine.graphed else None

    @property
    def ahead(self) -> int:
        """Steps to launch before the results of the previous one are read."""
        return 0 if self.graphs is None else 1

    def start(
        self,
        slots: list[int],
        prefilled: list[PrefilledPrompt],
        prompts: list[np.ndarray],
        uniforms: list[np.ndarray],
    ) -> Drawn:
        """Start responses to prompts in these slots, with their random numbers; first tokens, [3, n]."""
        padded, lengths = np.zeros((len(slots), self.uniforms.shape[1])), [len(prompt) for prompt in prompts]
        for row, numbers in zip(padded, uniforms, strict=True):
            row[: len(numbers)] = numbers
        for slot, prefill in zip(slots, prefilled, strict=True):
            self.engine.place(prefill, slot)
        # of the prompt's last token; `draw` advances them
        chosen, last = self.copy(np.array([slots, lengths]) - [[0], [1]])
        self.uniforms[chosen], self.positions[chosen] = self.copy(padded), last
        self.counts[chosen], self.in_use[chosen] = 0, 1
        if self.seen is not None:
            rows, ids = self.copy(np.stack([np.repeat(slots, lengths), np.concatenate(prompts)]))
            self.seen[chosen] = False
            self.seen[rows, ids] = True
        is_last_stage = not self.engine.stages.after
        logits = [prefill.logits for prefill in prefilled if prefill.logits is not None]
        return Drawn(self.draw(torch.stack(logits) if is_last_stage else None, chosen))

    def copy(self, values: np.ndarray) -> Tensor:
        """Copy an array to the device, to a GPU without a wait."""
        return to_device(torch.from_numpy(values), self.engine.device)

    def step(self, count: int, longest: int) -> Drawn:
        """Decode a token of the first `count` slots, of `longest` tokens at most: [3, count or more]."""
        self.engine.reserve(longest)
        if self.graphs is None:
            return Drawn(self.next_tokens(count))
        return Drawn(self.graphs(self.next_tokens, graph_size(count, self.slots), self.engine.capacity))

    def next_tokens(self, count: int) -> Tensor:
        """The step itself: [3, count] on the device. Collective over tp and pp."""
        logits = self.engine.decode(self.tokens[:count], self.positions[:count])
        return self.draw(logits, slice(count))

    def draw(self, logits: Tensor | None, chosen: slice | Tensor) -> Tensor:
        """Draw a token for each chosen slot from logits [n, V], and store it: [3, n] on the device."""
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
        """Move a sequence to another slot; `length` of its tokens have keys and values."""
        self.engine.move(source, target, length)
        state = (self.tokens, self.positions, self.counts, self.in_use, self.uniforms, self.seen)
        for tensor in (x for x in state if x is not None):
            tensor[target] = tensor[source]

    def stop(self, slots: np.ndarray) -> None:
        """Hold ended sequences where they are: steps compute them until their slots are filled anew."""
        self.in_use[self.copy(slots)] = 0

    def release(self, count: int) -> None:
        """Take all slots but the first `count` out of use."""
        for tensor in (self.positions, self.counts, self.in_use):
            tensor[count:] = 0


def graph_size(count: int, slots: int) -> int:
    """Slots of the smallest graph for the first `count` of them."""
    size = slots
    while count <= size // SMALLER:
        size //= SMALLER
    return size


class Graphs:
    """CUDA graphs of a step, one for each number of rows, each one launch for the host.

    The step must use the same memory while its capacity stays the same, and not synchronise with the device.
    Its first call for a number of rows runs uncaptured, which also loads or compiles its kernels, and is
    captured afterwards: a capture runs nothing.

    The step is not stored: its owner also owns the graphs, and the memory of such a reference cycle is freed
    late, by the garbage collector.
    """

    def __init__(self):
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.capacity = 0

    def __call__(self, step: Callable[[int], Tensor], rows: int, capacity: int) -> Tensor:
        """Result of step(rows), in memory that a later call overwrites."""
        if capacity != self.capacity:  # keys and values are in new memory
            if self.captured:
                torch.cuda.synchronize()  # a graph may be running
            self.captured, self.capacity = {}, capacity
        if rows not in self.captured:
            result = step(rows)
            self.captured[rows] = self.capture(step, rows)
            return result
        graph, result = self.captured[rows]
        graph.replay()
        return result

    def capture(self, step: Callable[[int], Tensor], rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Capture a graph and its result. Graphs run one at a time, so they share their memory."""
        others = [graph.pool() for graph, _ in self.captured.values()]
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's own thread may query its events meanwhile.
        with torch.cuda.graph(graph, pool=others[0] if others else None, capture_error_mode="thread_local"):
            result = step(rows)
        return graph, result
