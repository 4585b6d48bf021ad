"""Memory of each phase of a run on a rank, and whether it fits, before any machine is asked for.

    python plan.py --nodes 4 --gpus-per-node 8 --gpu-memory 80 \
        train_ppo.py --model DIR --tp 8 --reward-model RM --train-data prompts.jsonl

plan's own flags come before the script's name; what follows are the script's, read and checked by its own
Config. Of a model only config.json is read; nothing is allocated and no GPU is needed. GB are 1e9 bytes, as
in a run's memory/... metrics. Exit status 0: it fits; 1: it does not, or flags do not fit each other.

The arithmetic is align/planning/memory.py's. A phase is what align/training/offload.py calls one; in scripts
without off-loading it is a part of a step in which memory has a peak of its own. Micro-batches are taken as
full, and answers as of the greatest length. `bench/plan.py` compares with what runs on CPUs have taken. Of
GPUs nothing was compared yet. With Transformer Engine, --fp8 or not, activations are counted as with torch's
kernels in bf16.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Literal

import tyro

from align import console
from align.data import packing, prompts
from align.distributed import parallel
from align.distributed.parallel import ParallelConfig
from align.errors import UserError, one_line
from align.generation.generator import RolloutConfig, check_rollout_tp
from align.model import architecture
from align.model.architecture import Architecture
from align.model.config import check_model
from align.planning import memory, rollout_memory
from align.planning.memory import MicroBatchLoad, RankShape
from align.planning.rollout_memory import RolloutLoad
from align.training.config import CommonConfig

ITEMS = (
    *"process weights gradients optimizer frozen building".split(),
    *"copies kv_cache activations logits update checkpoint".split(),
)
# Bytes that a CPU's process gets with its first step, such as compiled kernels and threads: 0.04 to 0.06 GB
# in the cases of bench/plan.py.
FIRST_STEP = 0.05e9
NEEDS = {  # of a model in training: what is on the device; "built": before it has an optimizer
    "none": (),
    "weights": ("weights",),
    "built": ("weights", "gradients"),
    "all": ("weights", "gradients", "optimizer"),
}
HELP = {  # item of a refusal: what makes it smaller
    "process": (),
    "weights": ("--tp", "--pp", "--offload on"),
    "gradients": ("--tp", "--pp", "--offload on"),
    "optimizer": ("--tp", "--pp", "--offload on", "more nodes"),
    "frozen": ("--tp", "--pp", "--offload on"),
    "building": ("--tp", "--pp"),
    "copies": ("--rollout-tp", "--rollout-layout same"),
    "kv_cache": ("--rollout-slots", "--max-new-tokens", "--tp", "--rollout-tp"),
    "activations": ("--recompute full", "--micro-batch-tokens", "--tp", "--cp", "--pp"),
    "logits": ("--tp", "--micro-batch-tokens"),
    "update": ("--tp", "--pp"),
    "checkpoint": ("--pp over more nodes",),
    "pinned copies": ("--tp", "--pp", "more nodes", "--offload off"),
}


@dataclass(frozen=True)
class Cluster:
    """The machines."""

    nodes: int = 1
    """machines"""
    gpus_per_node: int = 8
    """GPUs of each, one process on each GPU; with --device cpu its processes"""
    device: Literal["gpu", "cpu"] = "gpu"
    """what computes; auto flags of the script mean what they mean there"""
    gpu_memory: float = 80.0
    """of one GPU, in GB of 1e9 bytes"""
    host_memory: float | None = None
    """CPU memory of one node, in GB of 1e9 bytes (default: what waits there is told, not checked); --device
    cpu needs it"""
    allowance: float | None = None
    """share of the memory that is left free (default: 0.1; cpu: 0.45). On a GPU for CUDA's context, NCCL's
    buffers and fragmentation, none of which plan computes; on a CPU for what glibc keeps between tensors, a
    fifth of what a training step takes and up to 0.43 while a checkpoint is written (bench/plan.py)"""

    def __post_init__(self):
        for name in ("nodes", "gpus_per_node", "gpu_memory", "host_memory"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} {value} must be above 0")
        if self.allowance is not None and not 0 <= self.allowance < 1:
            raise UserError(f"--allowance {self.allowance} must be from 0 to below 1")
        if self.device == "cpu" and self.host_memory is None:
            raise UserError("--device cpu needs --host-memory, the memory of one node in GB")

    @property
    def gpu(self) -> bool:
        return self.device == "gpu"

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def usable(self) -> float:
        """The share of the memory that may be planned with."""
        return 1 - ((0.1 if self.gpu else 0.45) if self.allowance is None else self.allowance)


@dataclass(frozen=True)
class Phase:
    """Memory of one phase on a rank's device."""

    name: str
    needs: Mapping[str, str] = field(default_factory=dict)  # of models in training: as Phases has it
    lent: tuple[str, ...] = ()  # frozen models that compute in it
    items: Mapping[str, float] = field(default_factory=dict)  # bytes that live only in it


@dataclass(frozen=True)
class Job:
    """A run: its models and what is done with them."""

    config: CommonConfig
    cluster: Cluster
    trained: Mapping[str, Architecture]
    frozen: Mapping[str, Architecture]
    offloads: bool  # do parts of models in training wait elsewhere

    @property
    def layout(self) -> RankShape:
        """Setting of all models on the first stage."""
        p = self.config.parallel
        dp = self.cluster.world // (p.tp * p.pp * p.cp)
        precision = self.config.model.precision
        item = 2 if precision == "bf16" or (precision == "auto" and self.cluster.gpu) else 4
        return RankShape(
            item, self.cluster.gpu, p.tp, p.pp, p.cp, dp, 0, p.sequence_parallel, self.config.model.recompute
        )

    def work(
        self, rows: int, sequences: int, length: int, prompt: int, entropy: bool = False
    ) -> MicroBatchLoad:
        """The largest micro-batch of an update.

        Args:
            rows: of the update, over all ranks.
            sequences: in each, of `length` tokens, of which the first `prompt` are places that they share.
        """
        batch, s = self.config.batch, self.layout
        places = prompt + sequences * (length - prompt)
        mine = -(-rows // s.dp)
        most = mine if batch.micro_batch_size is None else min(mine, batch.micro_batch_size)
        tokens = min(batch.micro_batch_tokens, most * places)
        shared = sequences * length / places if sequences > 1 else 1.0
        return MicroBatchLoad(tokens, -(-mine * places // tokens), length, shared, entropy)


# ---- from flags to a job ---------------------------------------------------------------------------------


def split(arguments: Sequence[str]) -> tuple[list[str], Path, list[str]]:
    """plan's own flags, the script, the script's flags. Raises UserError if no script is named."""
    for i, word in enumerate(arguments):
        if word.endswith(".py") and not word.startswith("--"):
            return list(arguments[:i]), Path(word), list(arguments[i + 1 :])
    raise UserError("which script? Name it after plan's own flags: python plan.py --nodes 1 train_sft.py ...")


def load_script(path: Path) -> ModuleType:
    """A training script as a module; nothing of it runs. Raises UserError for what is none."""
    if not path.is_file():
        raise UserError(f"{path}: no such script")
    script = sys.modules.get(path.stem)
    if getattr(script, "__file__", None) != str(path.resolve()):
        spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
        script = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
    if not issubclass(getattr(script, "Config", type(None)), CommonConfig):
        raise UserError(f"{path} is no training script: it has no Config of align.training.config's kind")
    return script


def read(config: CommonConfig, cluster: Cluster) -> Job:
    """The models of a run, from their config.json files, and the checks that a script makes of its flags."""
    check_world(config, cluster.world)
    policy = architecture.read_config(config.model.path)
    check_lengths(config, policy.max_positions)
    trained, frozen = {"policy": policy}, {}
    if hasattr(config, "num_attributes"):
        trained = {"policy": replace(policy, labels=config.num_attributes)}
    reward_model = config.reward.reward_model if hasattr(config, "reward") else None
    if reward_model:
        frozen["reward model"] = replace(architecture.read_config(reward_model), labels=1)
    if getattr(config, "advantages", None) == "gae":
        start = config.critic or reward_model or config.model.path
        trained["critic"] = replace(architecture.read_config(start), labels=1)
    if has_reference(config):
        frozen["reference"] = policy
    for arch in (*trained.values(), *frozen.values()):
        # Transformer Engine's own limits are for the machine that has it.
        check_model(arch, replace(config.model, attention="torch", fp8=False), config.parallel)
    if hasattr(config, "rollout"):
        check_rollout(config.rollout, config.parallel, policy, cluster.world)
    offload = config.offload.offload if hasattr(config, "offload") else "off"
    return Job(config, cluster, trained, frozen, offload == "on" or (offload == "auto" and cluster.gpu))


def check_world(config: CommonConfig, world: int) -> None:
    """Check parallel sizes as the script does. Raises UserError."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(world)  # as torchrun would say
    try:
        parallel.check_grid(config.parallel)
    finally:
        os.environ.pop("WORLD_SIZE")
        os.environ.update({} if before is None else {"WORLD_SIZE": before})


def check_rollout(rollout: RolloutConfig, layout: ParallelConfig, policy: Architecture, world: int) -> None:
    """Check the sampler as the script does, and the limits of plan.py. Raises UserError."""
    if rollout.generate_with == "trtllm":
        raise UserError("--generate-with trtllm: plan.py does not know what TensorRT-LLM's engine takes")
    if rollout.reshards(layout):
        check_rollout_tp(rollout.rollout_tp, policy, world)


def has_reference(config: CommonConfig) -> bool:
    """True if the run has a reference model whose weights are swapped in."""
    if hasattr(config, "kl_coef"):
        return config.kl_coef > 0
    return hasattr(config, "iterations") or getattr(config, "reference", None) == "swap"


def check_lengths(config: CommonConfig, context: int) -> None:
    """Check lengths as the script does. Raises UserError."""
    if hasattr(config, "check_lengths"):
        config.check_lengths(context)
    elif hasattr(config, "sampling"):
        prompts.check_lengths(config.format, config.sampling.max_new_tokens, config.batch, context)
    else:
        packing.check_budget(config.format.max_seq_len, config.batch, context, sequences_of_row(config))


def sequences_of_row(config: CommonConfig) -> int:
    """2 where a row is a pair."""
    pairs = hasattr(config, "reference") or getattr(config, "loss", None) == "ranking"
    return 2 if pairs else 1


# ---- phases ----------------------------------------------------------------------------------------------


def phases(job: Job, s: RankShape) -> list[Phase]:
    """The phases of a run on one pipeline stage, each with the peak of what lives only in it."""
    config = job.config
    if hasattr(config, "advantages"):
        return ppo(job, s)
    if hasattr(config, "iterations"):
        return self_rewarding(job, s)
    if hasattr(config, "keep_top"):
        return rejection_sampling(job, s)
    if hasattr(config, "rollout"):
        raise UserError("plan.py knows no such algorithm: it samples, and its Config is of none of ours")
    length, pairs = config.format.max_seq_len, sequences_of_row(config)
    # of a pair half is taken to be the prompt
    work = job.work(config.batch.global_batch_size, pairs, length, length // 2 if pairs == 2 else 0)
    found = []
    if job.frozen:
        found.append(lent(job, s, "reference", "reference", work))
    return [build(job, s), *found, train(job, s, "policy", work), save(job, s, "policy")]


def ppo(job: Job, s: RankShape) -> list[Phase]:
    """Those of train_ppo.py."""
    config, prompt, answer = job.config, job.config.format.max_prompt_len, job.config.sampling.max_new_tokens
    together = answers_together(config, prompt, answer)
    size = -(-config.batch.global_batch_size // together)
    work = training = job.work(size, together, prompt + answer, prompt, entropy=True)
    if config.ppo_epochs > 1:  # later epochs may draw an update whose answers are all to different prompts
        training = job.work(config.batch.global_batch_size, 1, prompt + answer, 0, entropy=True)
    found = [generate(job, s, "generate", config.prompts_per_step, config.samples_per_prompt, prompt)]
    if "reward model" in job.frozen:
        found.append(lent(job, s, "score", "reward model", work))
    found.append(forward(job, s, "logprobs", "policy", work))
    if "reference" in job.frozen:
        found.append(lent(job, s, "reference", "reference", work))
    if "critic" in job.trained:
        found += [forward(job, s, "values", "critic", work), train(job, s, "critic", training)]
    found.append(train(job, s, "policy", training))
    return [build(job, s), *found, *(save(job, s, name) for name in job.trained)]


def rejection_sampling(job: Job, s: RankShape) -> list[Phase]:
    """Those of train_rs.py, which has no off-loading of models in training."""
    config, prompt, answer = job.config, job.config.format.max_prompt_len, job.config.sampling.max_new_tokens
    together, rows = answers_together(config, prompt, answer), config.prompts_per_step
    of_training = job.work(config.batch.global_batch_size, 1, prompt + answer, 0)
    found = [generate(job, s, "generate", rows, config.samples_per_prompt, prompt)]
    if "reward model" in job.frozen:
        groups = -(-rows * config.samples_per_prompt // together)
        found.append(
            lent(job, s, "score", "reward model", job.work(groups, together, prompt + answer, prompt))
        )
    found.append(forward(job, s, "audit", "policy", of_training))
    return [build(job, s), *found, train(job, s, "policy", of_training), save(job, s, "policy")]


def self_rewarding(job: Job, s: RankShape) -> list[Phase]:
    """Those of train_self_reward.py. The reference samples and judges, in a validation the policy."""
    config, answer = job.config, job.config.sampling.max_new_tokens
    prompt = min(config.format.max_seq_len, job.trained["policy"].max_positions - answer)
    size = config.batch.global_batch_size
    tasks, context = size * config.rollout_ahead, job.trained["policy"].max_positions - answer
    # A judge reads prompt, answer and its template, of which a token has a byte at least.
    asked = min(prompt + answer + config.judge.judge_template.stat().st_size, context)
    work = job.work(size, 2, prompt + answer, prompt)
    found = [
        generate(job, s, "generate", tasks, config.samples_per_prompt, prompt, "reference"),
        generate(
            job, s, "judge", tasks * config.samples_per_prompt, config.judge.judgements, asked, "reference"
        ),
    ]
    if config.meta.meta_judge:
        room = min(context, config.batch.micro_batch_tokens // 2 - answer)
        template = config.meta.meta_judge_template.stat().st_size
        compared = min(prompt + 3 * answer + template, room)
        pairs = tasks * config.judge.judgements * (config.judge.judgements - 1)
        found.append(generate(job, s, "meta_judge", pairs, 1, compared, "reference"))
    found += [lent(job, s, "reference", "reference", work), train(job, s, "policy", work)]
    return [build(job, s), *found, save(job, s, "policy")]


def answers_together(config: CommonConfig, prompt: int, answer: int) -> int:
    """Answers to one prompt in a row of training, which share the prompt's places: engine.answer_rows."""
    room = (config.batch.micro_batch_tokens - prompt) // answer
    return max(1, min(config.samples_per_prompt, room, config.batch.global_batch_size))


def build(job: Job, s: RankShape) -> Phase:
    """The last model in training gets Megatron's buffers: its weights are there twice then."""
    name = list(job.trained)[-1]
    return Phase(
        f"build {name}", {name: "built"}, (), {"building": s.item * memory.weights(job.trained[name], s)}
    )


def train(job: Job, s: RankShape, name: str, work: MicroBatchLoad) -> Phase:
    """Forward, backward and the optimizer's step of a model."""
    arch = job.trained[name]
    items, step = memory.training(arch, s, work), memory.update(arch, s)
    if step > sum(items.values()):
        items = {"update": step}
    return Phase(label(job, "train", name), {name: "all"}, (), items)


def forward(job: Job, s: RankShape, kind: str, name: str, work: MicroBatchLoad) -> Phase:
    """A pass of a model in training without a gradient."""
    return Phase(
        label(job, kind, name), {name: "weights"}, (), memory.forward_only(job.trained[name], s, work)
    )


def lent(job: Job, s: RankShape, kind: str, name: str, work: MicroBatchLoad) -> Phase:
    """A pass of a frozen model."""
    return Phase(kind, {}, (name,), memory.forward_only(job.frozen[name], s, work))


def label(job: Job, kind: str, name: str) -> str:
    """The name of a phase that needs a model in training, as the run's memory/... metrics spell it."""
    return f"{kind} {name}" if hasattr(job.config, "offload") else kind


def generate(
    job: Job, s: RankShape, kind: str, prompts: int, per_prompt: int, prompt: int, by: str = "policy"
) -> Phase:
    """Sampling, in steps and in validations, whichever takes more. `by`: whose weights."""
    config, arch = job.config, job.trained["policy"]
    rollout: RolloutConfig = config.rollout
    copy = None
    if rollout.reshards(config.parallel):
        copy = RankShape(s.item, s.gpu, tp=rollout.rollout_tp)
    kinds = [(prompts, per_prompt)]
    if config.val_data and by == "policy":  # a validation answers each prompt once
        batches = config.loop.val_batches
        kinds.append((rollout.rollout_slots if batches is None else batches * config.rows_per_step, 1))
    answer, found = config.sampling.max_new_tokens, []
    replicas = job.cluster.world // rollout.rollout_tp if copy else s.copies
    for number, each in kinds:
        slots = min(rollout.rollout_slots, number * each)
        share = RolloutLoad(slots, -(-number // replicas), each, prompt, answer)
        found.append(rollout_memory.sampling(arch, s, share, copy))
    items = max(found, key=lambda one: sum(one.values()))
    if by != "policy":
        return Phase(kind, {}, (by,), items)
    return Phase(label(job, kind, by), {by: "weights"}, (), items)


def save(job: Job, s: RankShape, name: str) -> Phase:
    """A checkpoint, of which a GPU's copies are made in its host's memory."""
    items = {} if s.gpu else {"checkpoint": memory.saving(job.trained[name], s)}
    return Phase(label(job, "save", name), {name: "all"}, (), items)


# ---- sums ------------------------------------------------------------------------------------------------


def on_device(job: Job, s: RankShape, phase: Phase, process: float) -> dict[str, float]:
    """Bytes by item on a rank's device in a phase.

    Without off-loading all of each model in training stays. What is frozen waits beside a GPU in any case, on
    a CPU in files if there is off-loading, else where it is.
    """
    found = dict.fromkeys(ITEMS, 0.0) | dict(phase.items)
    found["process"] = 0.0 if s.gpu else process
    of_part = {"weights": lambda a, s: s.item * memory.weights(a, s)}
    of_part |= {"gradients": memory.gradients, "optimizer": memory.optimizer}
    for name, arch in job.trained.items():
        need = phase.needs.get(name, "none")
        for part in NEEDS[need if job.offloads or need == "built" else "all"]:
            found[part] += of_part[part](arch, s)
    for name, arch in job.frozen.items():
        if name in phase.lent or not (s.gpu or job.offloads):
            found["frozen"] += s.item * memory.weights(arch, s)
    return found


def on_host(job: Job, s: RankShape, process: float, writes: bool) -> dict[str, float]:
    """Bytes by item that a GPU's rank takes of its node's memory at most. `writes`: checkpoints."""
    frozen = sum(memory.pinned_weights(arch, s) for arch in job.frozen.values())
    parts = sum(memory.pinned_model(arch, s) for arch in job.trained.values()) if job.offloads else 0
    saving = max(memory.saving(arch, s) for arch in job.trained.values()) if writes else 0
    return {"process": process, "pinned copies": frozen + parts, "checkpoint": saving}


def fullest_node(job: Job, process: float) -> dict[str, float]:
    """The same of the node that takes most, all its ranks together.

    Ranks are numbered by tp, then cp, dp, pp; those that are the first of their dp and cp write checkpoints.
    """
    s, each, nodes = job.layout, {}, []
    for rank in range(job.cluster.world):
        stage, writes = rank // (s.tp * s.cp * s.dp), rank // s.tp % (s.cp * s.dp) == 0
        if (stage, writes) not in each:
            each[stage, writes] = on_host(job, replace(s, stage=stage), process, writes)
        if rank % job.cluster.gpus_per_node == 0:
            nodes.append(dict.fromkeys(each[stage, writes], 0.0))
        for item, size in each[stage, writes].items():
            nodes[-1][item] += size
    return max(nodes, key=lambda node: sum(node.values()))


def process_bytes() -> float:
    """Memory of a run's process beside its tensors.

    That is what this one takes now, having imported the same, and what comes with the first step.
    """
    if sys.platform != "linux":
        return 0.5e9 + FIRST_STEP  # as on Linux
    known = re.search(rb"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_bytes())
    return int(known[1]) * 1024.0 + FIRST_STEP


# ---- what is told ----------------------------------------------------------------------------------------


def table(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Phases and their items in GB, without items that are 0 in all; the peak is marked."""
    shown = [item for item in ITEMS if any(items[item] > 0 for _, items in rows)]
    peak = max(sum(items.values()) for _, items in rows)
    lines = [f"{'GB':<18}" + "".join(f"{item:>12}" for item in (*shown, "sum"))]
    for name, items in rows:
        total = sum(items.values())
        sizes = "".join(f"{size / 1e9:>12.2f}" for size in (*(items[item] for item in shown), total))
        lines.append(f"{name:<18}{sizes}{'  <- peak' if total == peak else ''}")
    return "\n".join(lines)


def refusal(job: Job, phase: str, items: Mapping[str, float], limit: float, where: str) -> str:
    """Explain a run that does not fit: its largest item, and flags that make it or another one smaller."""
    total, by_size = sum(items.values()), sorted(items, key=items.get, reverse=True)
    useless = {"--offload on"} if job.offloads or not hasattr(job.config, "offload") else {"--offload off"}
    if job.config.model.recompute == "full":
        useless.add("--recompute full")
    large = [item for item in by_size if items[item] > total / 10]
    help_of = {item: [flag for flag in HELP[item] if flag not in useless] for item in large}
    told = "; ".join(f"{item}: {', '.join(flags)}" for item, flags in help_of.items() if flags)
    first = by_size[0]
    return (
        f"{phase} {total / 1e9:.1f} GB of the {limit:.1f} GB that {where} for it. The largest item is "
        f"{first}, {items[first] / 1e9:.1f} GB. What would help, by item: {told}"
    )


def report(job: Job, name: str) -> str | None:
    """Print what each phase takes; returns why the run does not fit, None if it does."""
    cluster, layout, process = job.cluster, job.layout, process_bytes()
    stages = [replace(layout, stage=stage) for stage in range(layout.pp)]
    every = [[(p.name, on_device(job, s, p, process)) for p in phases(job, s)] for s in stages]
    peaks = [max(sum(items.values()) for _, items in rows) for rows in every]
    worst = peaks.index(max(peaks))
    grid = " x ".join(f"{key} {getattr(layout, key)}" for key in ("tp", "cp", "pp", "dp"))
    kind = "GPU" if cluster.gpu else "CPU process"
    print(
        f"{name}: {cluster.nodes} nodes x {cluster.gpus_per_node} {kind}s ({grid}), "
        f"{'bf16' if layout.item == 2 else 'fp32'}"
    )
    for kind_of, models in (("trained", job.trained), ("frozen", job.frozen)):
        for label, arch in models.items():
            whole = memory.weights(arch, RankShape(layout.item, layout.gpu))
            print(f"{kind_of}: {label}, {arch.family} with {whole / 1e9:.3f} G weights")
    if layout.pp > 1:
        told = ", ".join(f"{i}: {peak / 1e9:.2f}" for i, peak in enumerate(peaks))
        print(f"peak of each pipeline stage in GB: {told}; below stage {worst}")
    print("\n" + table(every[worst]))
    peak_name, peak_items = max(every[worst], key=lambda row: sum(row[1].values()))
    if not cluster.gpu:
        rest = [max(sum(i.values()) - i["checkpoint"] for _, i in rows) for rows in every]
        return cpu_verdict(job, peaks, rest, peak_name, peak_items)
    limit = cluster.gpu_memory * cluster.usable
    print(f"\na GPU has {cluster.gpu_memory:.1f} GB, {limit:.1f} of them without the allowance")
    node = fullest_node(job, process)
    told = ", ".join(f"{item} {size / 1e9:.1f}" for item, size in node.items())
    print(f"host memory of the fullest node in GB, all its ranks: {told}; sum {sum(node.values()) / 1e9:.1f}")
    if sum(peak_items.values()) / 1e9 > limit:
        return refusal(job, f'the phase "{peak_name}" takes', peak_items, limit, "a GPU has")
    if cluster.host_memory and sum(node.values()) / 1e9 > cluster.host_memory * cluster.usable:
        return refusal(job, "a node's ranks take", node, cluster.host_memory * cluster.usable, "its host has")
    return None


def cpu_verdict(
    job: Job,
    peaks: Sequence[float],
    without_save: Sequence[float],
    phase: str,
    items: Mapping[str, float],
) -> str | None:
    """On CPUs: do all ranks of a node together fit into its memory?

    Args:
        peaks: of each stage, of a rank that gathers a checkpoint; `without_save`: of one that does not.
    """
    cluster, s = job.cluster, job.layout
    ranks = []
    for rank in range(cluster.world):
        stage, writes = rank // (s.tp * s.cp * s.dp), rank // s.tp % (s.cp * s.dp) == 0
        ranks.append(peaks[stage] if writes else without_save[stage])
    size = cluster.gpus_per_node
    fullest = max(sum(ranks[i : i + size]) for i in range(0, cluster.world, size))
    limit = cluster.host_memory * cluster.usable
    print(
        f"\na node has {cluster.host_memory:.1f} GB, {limit:.1f} of them without the allowance; its processes"
    )
    print(f"take {fullest / 1e9:.1f} GB together at most")
    if fullest / 1e9 <= limit:
        return None
    return refusal(job, f'the phase "{phase}" takes', items, limit / size, "each process of a node has")


def main(arguments: Sequence[str]) -> None:
    """Raises SystemExit with what is wrong."""
    console.adapt()
    with one_line():
        if not arguments or arguments[0] in ("-h", "--help"):
            tyro.cli(Cluster, args=["--help"], description=__doc__)
        own, path, theirs = split(arguments)
        cluster = tyro.cli(Cluster, args=own, description=__doc__)
        script = load_script(path)
        config = tyro.cli(script.Config, prog=str(path), args=theirs, config=(tyro.conf.OmitArgPrefixes,))
        why = report(read(config, cluster), path.name)
    if why:
        raise SystemExit(f"does not fit: {why}")
    print("it fits")


if __name__ == "__main__":
    main(sys.argv[1:])
