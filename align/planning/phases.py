"""Phases of a run on one rank, each with the memory that it takes, and their sums.

A phase is what align/training/offload.py calls one; in scripts without offload it is a part of a step in
which memory has a peak of its own. The arithmetic is align/planning/memory.py's.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from align.errors import UserError
from align.flags import COUNT, above, below, check_ranges
from align.model.architecture import Architecture
from align.planning import memory, rollout_memory
from align.planning.memory import MicroBatchLoad, RankShape
from align.planning.rollout_memory import RolloutLoad

Load = MicroBatchLoad | RolloutLoad | None
ITEMS = (
    *"process weights gradients optimizer frozen building".split(),
    *"copies kv_cache activations logits update checkpoint".split(),
)
NEEDS = {  # of a model in training: parts on the device; "built": before it has an optimizer
    "none": (),
    "weights": ("weights",),
    "built": ("weights", "gradients"),
    "all": ("weights", "gradients", "optimizer"),
}


@dataclass(frozen=True)
class Speeds:
    """Speeds of --simulate, by default an H100's; no estimate has been compared with a run on GPUs."""

    mean_length: float = 1.0
    """mean length of prompts, responses and rows as a share of the greatest, above 0"""
    peak_tflops: float = 989.0
    """bf16 peak of a GPU without sparsity, in TFLOP/s"""
    memory_bandwidth: float = 3350.0
    """bandwidth of a GPU's memory, in GB/s"""
    node_bandwidth: float = 450.0
    """bandwidth of a GPU to the others of its node, in GB/s and direction"""
    network_bandwidth: float = 50.0
    """bandwidth of a GPU to other nodes, in GB/s and direction"""
    host_bandwidth: float = 50.0
    """bandwidth of a GPU to its host's memory, in GB/s and direction"""

    def __post_init__(self):
        check_ranges(self, mean_length=above(0, 1), peak_tflops=above(0, 1e6), memory_bandwidth=above(0, 1e6))
        check_ranges(self, node_bandwidth=above(0, 1e6), network_bandwidth=above(0, 1e6))
        check_ranges(self, host_bandwidth=above(0, 1e6))


@dataclass(frozen=True)
class Cluster:
    """Machines."""

    nodes: int = 1
    """machines"""
    gpus_per_node: int = 8
    """GPUs of a machine, one process on each; with --device cpu its processes"""
    device: Literal["gpu", "cpu"] = "gpu"
    """device that computes; auto flags of the script mean what they mean there"""
    gpu_memory: float = 80.0
    """memory of a GPU, in GB of 1e9 bytes"""
    host_memory: float | None = None
    """CPU memory of a machine, in GB of 1e9 bytes (default: offloaded state is printed, not checked);
    --device cpu needs it"""
    allowance: float | None = None
    """share of the memory that stays free (default: 0.1; cpu: 0.45). On a GPU for CUDA's context, NCCL's
    buffers and fragmentation, none of which plan computes; on a CPU for what glibc keeps between tensors, a
    fifth of what a training step takes and up to 0.43 while a checkpoint is written (bench/plan.py)"""
    simulate: bool = False
    """print the time of a step as well, estimated from sizes and speeds"""
    speeds: Speeds = Speeds()

    def __post_init__(self):
        check_ranges(self, nodes=COUNT, gpus_per_node=COUNT, allowance=below(0, 1))
        check_ranges(self, gpu_memory=above(0, 1e6), host_memory=above(0, 1e6))
        if self.device == "cpu" and self.host_memory is None:
            raise UserError("--device cpu needs --host-memory, the memory of one node in GB")
        if self.simulate and not self.gpu:
            raise UserError("--simulate estimates the time of GPUs: not with --device cpu")

    @property
    def gpu(self) -> bool:
        return self.device == "gpu"

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def usable(self) -> float:
        """The share of the memory that a plan may fill."""
        return 1 - ((0.1 if self.gpu else 0.45) if self.allowance is None else self.allowance)


@dataclass(frozen=True)
class Phase:
    """Memory of one phase on a rank's device."""

    name: str
    needs: Mapping[str, str] = field(default_factory=dict)  # of models in training: as Phases has it
    frozen: tuple[str, ...] = ()  # frozen models that compute in it
    items: Mapping[str, float] = field(default_factory=dict)  # bytes that are allocated in it alone
    model: str = ""  # the model that computes
    load: Load = None  # of a pass; None: no part of a step
    passes: float = 1.0  # of a step
    copy: RankShape | None = None  # layout of a copy of the weights that samples


@dataclass(frozen=True)
class Job:
    """A run: its models, and the function that lists its phases."""

    config: Any  # of the script
    cluster: Cluster
    trained: Mapping[str, Architecture]
    frozen: Mapping[str, Architecture]
    list_phases: Callable[["Job", RankShape], list[Phase]]
    offload: str | None = None  # --offload, None for a script without that flag

    @functools.cached_property
    def offloads(self) -> bool:
        """True if parts of models in training are offloaded; auto: if a GPU cannot hold all at once."""
        return self.offload == "on" or (
            self.offload == "auto" and self.cluster.gpu and not replace(self, offload="off").fits()
        )

    def fits(self) -> bool:
        """True if no phase of any pipeline stage takes more than a GPU has."""
        limit = self.cluster.gpu_memory * self.cluster.usable
        stages = [replace(self.layout, stage=stage) for stage in range(self.layout.pp)]
        sizes = (on_device(self, s, phase, 0.0) for s in stages for phase in self.phases(s))
        return all(sum(items.values()) / 1e9 <= limit for items in sizes)

    @property
    def layout(self) -> RankShape:
        """Setting of all models on the first stage."""
        p, model = self.config.parallel, self.config.model
        dp = self.cluster.world // (p.tp * p.pp * p.cp)
        precision = model.precision
        item = 2 if precision == "bf16" or (precision == "auto" and self.cluster.gpu) else 4
        sizes = p.tp, p.pp, p.cp, dp, 0
        flags = p.sequence_parallel, model.recompute, model.keep_logits
        return RankShape(item, self.cluster.gpu, *sizes, *flags, p.vp)

    def phases(self, s: RankShape) -> list[Phase]:
        """The phases on one pipeline stage, each with the peak of what it alone allocates."""
        return self.list_phases(self, s)

    def work(
        self, rows: int, sequences: int, length: int, prompt: int, entropy: bool = False
    ) -> MicroBatchLoad:
        """The largest micro-batch of an update of `rows` rows over all ranks.

        A row has `sequences` sequences of `length` tokens, of which they share the first `prompt`.
        """
        batch, s = self.config.batch, self.layout
        places = prompt + sequences * (length - prompt)
        rank_rows = -(-rows // s.dp)
        most = rank_rows if batch.micro_batch_size is None else min(rank_rows, batch.micro_batch_size)
        tokens = min(batch.micro_batch_tokens, most * places)
        shared = sequences * length / places if sequences > 1 else 1.0
        return MicroBatchLoad(tokens, -(-rank_rows * places // tokens), length, shared, entropy)

    def label(self, kind: str, name: str) -> str:
        """The name of a phase that needs a model in training, as the run's memory/... metrics spell it."""
        return kind if self.offload is None else f"{kind} {name}"


def build(job: Job, s: RankShape) -> Phase:
    """Megatron's buffers for the last model in training: its weights are there twice then."""
    name = list(job.trained)[-1]
    building = s.item * memory.weights(job.trained[name], s)
    return Phase(f"build {name}", {name: "built"}, (), {"building": building})


def train(job: Job, s: RankShape, name: str, work: MicroBatchLoad, updates: float = 1) -> Phase:
    """Forward, backward and the optimizer's step of a model, `updates` times in a step."""
    arch = job.trained[name]
    items, step = memory.training(arch, s, work), memory.update(arch, s)
    if step > sum(items.values()):
        items = {"update": step}
    return Phase(job.label("train", name), {name: "all"}, (), items, name, work, updates)


def computing(job: Job, kind: str, name: str, items: Mapping[str, float], load: Load, passes: float) -> Phase:
    """A phase in which a model computes, in training or frozen."""
    if name in job.frozen:
        return Phase(kind, {}, (name,), items, name, load, passes)
    return Phase(job.label(kind, name), {name: "weights"}, (), items, name, load, passes)


def forward(job: Job, s: RankShape, kind: str, name: str, work: MicroBatchLoad, passes: float = 1) -> Phase:
    """A pass of a model without a gradient, `passes` times in a step."""
    items = memory.forward_only({**job.trained, **job.frozen}[name], s, work)
    return computing(job, kind, name, items, work, passes)


def generate(
    job: Job,
    s: RankShape,
    kind: str,
    prompts: int,
    per_prompt: int,
    prompt: int,
    by: str = "policy",
    rollouts: float = 1,
) -> Phase:
    """Sampling `per_prompt` responses by a model, in steps and in validations, whichever takes more.

    `prompts`: of a rollout, over all ranks, of `prompt` tokens; `rollouts`: of a step.
    """
    config, arch, rollout = job.config, job.trained["policy"], job.config.rollout
    reshards = rollout.reshards(config.parallel)
    copy = RankShape(s.item, s.gpu, tp=rollout.rollout_tp) if reshards else None
    draws = [(prompts, per_prompt)]
    if config.val_data and by == "policy":  # a validation samples one response to each prompt
        batches = config.loop.val_batches
        draws.append((rollout.rollout_slots if batches is None else batches * config.rows_per_step, 1))
    replicas = job.cluster.world // rollout.rollout_tp if copy else s.copies
    loads = []
    for count, responses in draws:
        slots, share = min(rollout.rollout_slots, count * responses), -(-count // replicas)
        loads.append(RolloutLoad(slots, share, responses, prompt, config.sampling.max_new_tokens))
    sizes = [rollout_memory.sampling(arch, s, load, copy) for load in loads]
    items = max(sizes, key=lambda items: sum(items.values()))
    return replace(computing(job, kind, by, items, loads[0], rollouts), copy=copy)


def save(job: Job, s: RankShape, name: str) -> Phase:
    """A checkpoint; a GPU's is copied in its host's memory."""
    items = {} if s.gpu else {"checkpoint": memory.saving(job.trained[name], s) + snapshots(job, s, name)}
    return Phase(job.label("save", name), {name: "all"}, (), items)


def snapshots(job: Job, s: RankShape, saved: str | None = None) -> float:
    """Host memory of what --async-save writes meanwhile: all models in training but the one being `saved`."""
    others = [arch for name, arch in job.trained.items() if name != saved]
    return sum(memory.snapshot(arch, s) for arch in others) if job.config.checkpoint.async_save else 0.0


def on_device(job: Job, s: RankShape, phase: Phase, process: float) -> dict[str, float]:
    """Bytes by item on a rank's device in a phase.

    Without offload all of each model in training stays. A frozen model that does not compute is in host
    memory beside a GPU in any case, on a CPU in files if there is offload, else in place.
    """
    items = dict.fromkeys(ITEMS, 0.0) | dict(phase.items)
    items["process"] = 0.0 if s.gpu else process
    if not (s.gpu or "checkpoint" in phase.items or "building" in phase.items):
        items["checkpoint"] = snapshots(job, s)
    sizes: dict[str, Callable[[Architecture, RankShape], float]] = {
        "weights": lambda arch, s: s.item * memory.weights(arch, s),
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
    }
    for name, arch in job.trained.items():
        need = phase.needs.get(name, "none")
        for part in NEEDS[need if job.offloads or need == "built" else "all"]:
            items[part] += sizes[part](arch, s)
    for name, arch in job.frozen.items():
        if name in phase.frozen or not (s.gpu or job.offloads):
            items["frozen"] += sizes["weights"](arch, s)
    return items


def on_host(job: Job, s: RankShape, process: float, writes: bool, loads: bool) -> dict[str, float]:
    """Bytes by item that a GPU's rank takes of its node's memory, while it writes or loads a checkpoint."""
    frozen = sum(memory.pinned_weights(arch, s) for arch in job.frozen.values())
    parts = sum(memory.pinned_model(arch, s) for arch in job.trained.values()) if job.offloads else 0
    sizes = [
        memory.loading(arch, s) if loads else memory.saving(arch, s) + snapshots(job, s, name)
        for name, arch in job.trained.items()
    ]
    checkpoint = max(sizes) if writes or loads else 0
    return {"process": process, "pinned copies": frozen + parts, "checkpoint": checkpoint}


def ranks(job: Job) -> list[tuple[int, bool]]:
    """(pipeline stage, writes checkpoints) of each rank.

    Ranks are numbered by tp, then cp, dp, pp; those that are the first of their dp and cp write checkpoints.
    """
    s = job.layout
    return [(i // (s.tp * s.copies), i // s.tp % s.copies == 0) for i in range(job.cluster.world)]


def fullest_node(job: Job, process: float) -> dict[str, float]:
    """`on_host` of the node that takes most, all its ranks together, at a save or at the start."""
    by_kind, nodes = {}, []
    for loads in (False, True):
        for rank, (stage, writes) in enumerate(ranks(job)):
            kind = (stage, writes, loads)
            if kind not in by_kind:
                by_kind[kind] = on_host(job, replace(job.layout, stage=stage), process, writes, loads)
            if rank % job.cluster.gpus_per_node == 0:
                nodes.append(dict.fromkeys(by_kind[kind], 0.0))
            for item, size in by_kind[kind].items():
                nodes[-1][item] += size
    return max(nodes, key=lambda node: sum(node.values()))
