"""Time of a step on GPUs, from sizes and speeds: the arithmetic of `tools.plan --simulate`.

Each item is an estimate in seconds: operations or bytes, over the share of the GPU's speed that kernels of
this kind are assumed to reach. Nothing here was fitted to a run, since no run on GPUs was measured. Lengths
are `fill` times the greatest ones. Letters as in memory.py; u is T H b / cp bytes, an activation of the
hidden size.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from align.model.architecture import Architecture
from align.planning import memory
from align.planning.memory import FP32, MicroBatchLoad, RankShape
from align.planning.phases import Cluster, Job, Phase
from align.planning.rollout_memory import RolloutLoad, cache_per_token, has_graphs

ITEMS = (
    *"products attention elementwise launches logits layer_exchange bubble exchange optimizer".split(),
    *"reshard prefill decode onload".split(),
)
PRODUCTS = 0.7  # share of the peak that matrix products reach
ATTENTION = 0.2  # share of the peak that FlashAttention 2 reaches on packs of short sequences
MEMORY = 0.76  # share of the data sheet's bandwidth: kernels reach 85 % of what a copy does
NETWORK = 0.8  # share of a link's bandwidth
LAUNCHES = 0.6e-3, 1.75e-3  # seconds of Python of a layer: forward; forward and backward
DECODE_KERNELS = 28e-6  # seconds that the starts of a layer's kernels take inside a CUDA graph
DECODE_LAUNCHES = 0.28e-3  # seconds of Python of a layer's decode step without a graph
REDUCE_LATENCY = 20e-6  # seconds of a small all-reduce in a node
OPTIMIZER_BYTES = 50  # of a weight: norm 4, clipping 8, AdamW 28, copy to bf16 6, zeroing 4
ACCUMULATION_BYTES = 8  # of a weight, in each micro-batch: read and write the fp32 gradient


def seconds(job: Job, s: RankShape, phase: Phase) -> dict[str, float]:
    """Seconds of a phase of a step on one pipeline stage, by item; {} for a phase that no step has."""
    cluster, load = job.cluster, phase.load
    if load is None:
        return {}
    arch = {**job.trained, **job.frozen}[phase.model]
    if isinstance(load, RolloutLoad):
        layout = phase.copy or s
        graphs = has_graphs(job.config.rollout, job.config.parallel, layout)
        items = rollout(arch, layout, load, cluster, phase.copy is not None, graphs)
    else:
        trains = phase.needs.get(phase.model) == "all"
        items = update(arch, s, filled(load, cluster.speeds.mean_length), cluster, trains)
    times = {name: phase.passes * value for name, value in items.items()}
    return times | {"onload": onload(job, s, phase) / (cluster.speeds.host_bandwidth * 1e9)}


def filled(load: MicroBatchLoad, fill: float) -> MicroBatchLoad:
    """The same rows with sequences of `fill` times the length, in as many micro-batches as these take."""
    places = load.tokens * load.count * fill
    count = max(1, math.ceil(places / load.tokens))
    return replace(load, tokens=round(places / count), count=count, longest=round(load.longest * fill))


def update(
    arch: Architecture, s: RankShape, load: MicroBatchLoad, cluster: Cluster, trains: bool
) -> dict[str, float]:
    """All micro-batches through all stages; `trains`: with backward passes and the optimizer's step.

    The schedule of Megatron (1F1B) takes as long as count + (pp - 1) / vp micro-batches of the slowest rank.
    """
    items = micro_batch(arch, s, load, cluster, trains)
    micro_batch_s = sum(items.values())
    items = {name: load.count * value for name, value in items.items()} | {
        "bubble": (s.pp - 1) / s.vp * micro_batch_s
    }
    if not trains:
        return items
    size, bandwidth = memory.weights(arch, s), cluster.speeds.memory_bandwidth * 1e9 * MEMORY
    share, link = (s.copies - 1) / s.copies, link_of(s.tp * s.copies, cluster)
    # Gradients are reduced during the last backward pass; with stages, hardly.
    hidden = 2 / 3 * micro_batch_s if s.pp == 1 else 0.0
    reduced, gathered = FP32 * size * share / link, s.item * size * share / link
    optimizer = (OPTIMIZER_BYTES / s.copies) * size / bandwidth
    return items | {"exchange": max(reduced - hidden, 0.0) + gathered, "optimizer": optimizer}


def micro_batch(
    arch: Architecture, s: RankShape, load: MicroBatchLoad, cluster: Cluster, trains: bool
) -> dict[str, float]:
    """One micro-batch through the layers of one stage, and through the output layer on the last."""
    peak, bandwidth = cluster.speeds.peak_tflops * 1e12, cluster.speeds.memory_bandwidth * 1e9 * MEMORY
    layers, places, again = arch.layers // s.pp, load.tokens / s.cp, s.recompute == "full"
    matrices, queries = memory.layer_matrices(arch, s.tp), memory.widths(arch, s)[0]
    passes = 3 + again if trains else 1  # a backward pass multiplies twice as often
    products = 2 * passes * places * matrices / (peak * PRODUCTS)
    attention_passes = 3.5 + (s.recompute != "none") if trains else 1
    keys = load.longest / 2  # mean of a causal query
    attention = 4 * attention_passes * places * keys * queries / (peak * ATTENTION)
    moved = places * s.item * elements(arch, s, trains)
    elementwise = (moved + (ACCUMULATION_BYTES * matrices if trains else 0)) / bandwidth
    items = {"products": products, "attention": attention, "elementwise": elementwise}
    waits = max(LAUNCHES[trains] - sum(items.values()), 0.0)
    items = {name: layers * value for name, value in (items | {"launches": waits}).items()}
    if s.last and not arch.labels:  # logits are computed again for their gradient, unless kept
        rows = memory.vocabulary(arch, s.tp)
        operations = 2 * (4 - s.keep_logits if trains else 1) * load.tokens / s.cp * rows * arch.hidden_size
        traffic = s.item * (5 if trains else 2) * places * rows
        items["logits"] = operations / (peak * PRODUCTS) + traffic / bandwidth
    return items | {"layer_exchange": layers * layer_exchange(arch, s, places, cluster, trains)}


def elements(arch: Architecture, s: RankShape, trains: bool) -> float:
    """Numbers per place that one layer's kernels read and write beside the products: norms, residuals,
    rotation, activation; in a backward pass also what FlashAttention reads and writes."""
    h, f, k = arch.hidden_size, arch.ffn_size / s.tp, memory.widths(arch, s)[1]
    hidden = h / (s.tp if s.sequence_parallel else 1)
    forward = 12 * hidden + 2 * h / s.tp + 2 * k + 3 * f
    backward = 16 * hidden + (4 + 11) * h / s.tp + 6 * k + 5 * f
    return forward + (backward if trains else 0)


def layer_exchange(arch: Architecture, s: RankShape, places: float, cluster: Cluster, trains: bool) -> float:
    """Seconds of one layer's exchanges: two all-reduces of tensor parallel ranks in each direction, and the
    gather of keys and values of context parallel ranks (in the backward pass a reduction)."""
    directions = 2 if trains else 1
    tensor = 2 * 2 * (s.tp - 1) / s.tp * places * s.item * arch.hidden_size / link_of(s.tp, cluster)
    keys = 2 * memory.widths(arch, s)[1] * places * s.item * (s.cp - 1) / link_of(s.tp * s.cp, cluster)
    return directions * (tensor + keys)


def rollout(
    arch: Architecture, s: RankShape, load: RolloutLoad, cluster: Cluster, reshards: bool, graphs: bool
) -> dict[str, float]:
    """Prefill of all prompts, then one decode step after another, on one copy of the model in layout `s`."""
    fill = cluster.speeds.mean_length
    count, prompt = load.prompts * load.per_prompt, round(load.prompt * fill)
    prefill = MicroBatchLoad(load.prompts * prompt, 1, prompt)
    items = {"prefill": s.pp * sum(micro_batch(arch, s, prefill, cluster, False).values())}
    if reshards:
        items["reshard"] = s.item * memory.weights(arch, s) / link_of(cluster.world, cluster)
    context = prompt + load.response * fill / 2
    decode = (
        steps * decode_step(arch, s, active, context, cluster, graphs)
        for steps, active in active_slots(response_lengths(count, load.response, fill), load.slots)
    )
    return items | {"decode": sum(decode)}


def response_lengths(count: int, longest: int, fill: float) -> list[int]:
    """Lengths longest * u^(1/fill - 1) for `count` quantiles u: mean fill * longest, a few near longest."""
    quantiles = (np.arange(count) + 0.5) / count
    lengths = np.maximum(1, np.rint(longest * quantiles ** (1 / fill - 1))).astype(int)
    return np.random.default_rng(0).permutation(lengths).tolist()


def active_slots(lengths: list[int], slots: int) -> Iterator[tuple[int, int]]:
    """(number of decode steps, sequences decoded in each), if an ended sequence is replaced at once."""
    ends = [0] * min(slots, len(lengths))
    finished = []
    for length in lengths:
        finished.append(heapq.heappop(ends) + length)
        heapq.heappush(ends, finished[-1])
    step = 0
    for ended, end in enumerate(sorted(finished)):
        if end > step:
            yield end - step, min(slots, len(lengths) - ended)
            step = end


def decode_step(
    arch: Architecture, s: RankShape, active: int, context: float, cluster: Cluster, graphs: bool
) -> float:
    """Seconds of one token of `active` sequences: each stage in turn reads its weights and KV cache once.

    `graphs`: a step is one CUDA graph, without the launches.
    """
    size = memory.weights(arch, replace(s, stage=s.pp - 1))
    moved = s.item * size + active * context * cache_per_token(arch, s)
    operations = 2 * size * active
    bandwidth, peak = (
        cluster.speeds.memory_bandwidth * 1e9 * MEMORY,
        cluster.speeds.peak_tflops * 1e12 * PRODUCTS,
    )
    layers = arch.layers // s.pp
    device = max(moved / bandwidth, operations / peak) + layers * DECODE_KERNELS
    if s.tp > 1:
        device += 2 * layers * REDUCE_LATENCY
    return s.pp * (device if graphs else max(device, layers * DECODE_LAUNCHES))


def onload(job: Job, s: RankShape, phase: Phase) -> float:
    """Bytes between host and GPU: of the parts of models in training that a phase needs, in and out, and of
    frozen models, in. A run hides some of it behind the phases before and after."""
    total = float(sum(s.item * memory.weights(job.frozen[name], s) for name in phase.frozen))
    if job.offloads:
        for name, need in phase.needs.items():
            arch = job.trained[name]
            states = memory.optimizer(arch, s) if need == "all" else 0.0
            total += 2 * (s.item * memory.weights(arch, s) + states)
    return total


def link_of(ranks: int, cluster: Cluster) -> float:
    """Bytes per second of a rank's link to the ranks of a group that spans so many neighbours."""
    within = ranks <= cluster.gpus_per_node
    return (cluster.speeds.node_bandwidth if within else cluster.speeds.network_bandwidth) * 1e9 * NETWORK
