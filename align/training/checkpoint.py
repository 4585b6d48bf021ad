"""Checkpoints that continue a run bit for bit, in any parallel layout.

    OUTPUT/checkpoints/step_00000100/     weights, main weights, Adam, random states, in Megatron's format
        critic/                           the same of another model in training, if there is one
        state.json                        step, layout, what decided the run, metrics by which to keep it

A checkpoint appears by one rename, so what has its name is complete. The model for others is OUTPUT/hf.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule

from align.distributed import megatron_patches, parallel, watchdog
from align.errors import UserError
from align.files import read_object
from align.flags import COUNT_OR_0, check_ranges
from align.tracking.output import complete_checkpoints, delete_checkpoint
from align.training import checkpoint_files, optim
from align.training.checkpoint_files import read_state
from align.training.checkpoint_writer import Writer

Trained = dict[str, tuple[DistributedDataParallel, MegatronOptimizer]]  # models in training, by name


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints and resume."""

    save_interval: int = 500
    """steps between checkpoints; and one at the end, or when the run is stopped; 0: only that one"""
    save_top_k: int = 1
    """checkpoints to keep, the best by --monitor; the newest is always kept as well"""
    monitor: str = "val/loss"
    """metric that ranks checkpoints: lowest first where its name says loss, else highest first; for
    torchrun write -- before the script's name, else it takes this flag for its --monitor-interval"""
    async_save: bool = False
    """write checkpoints in the background: training waits only while the state is copied. The copy takes host
    memory of the first data parallel rank meanwhile, 12 bytes a weight and the weights"""
    resume: bool = True
    """continue from the newest checkpoint in --output; --no-resume starts over and deletes what is there"""
    resume_from: Path | None = None
    """checkpoint of --output to continue from in place of the newest one; later ones are deleted"""
    resume_with_changes: bool = False
    """continue with other flags or training rows than the checkpoint's: the changes are logged, and after a
    change of the rows, their order or their number a step a new pass over them begins"""

    def __post_init__(self):
        check_ranges(self, save_interval=COUNT_OR_0, save_top_k=COUNT_OR_0)
        flags = {"--resume-from": self.resume_from, "--resume-with-changes": self.resume_with_changes}
        for flag in (flag for flag, value in flags.items() if value and not self.resume):
            raise UserError(f"{flag} continues a run, and --no-resume starts over: give one of them")

    @property
    def metric(self) -> str:
        """--monitor as metrics.jsonl spells it; val_loss and validation_loss are accepted."""
        if "/" in self.monitor:
            return self.monitor
        return self.monitor.replace("validation", "val", 1).replace("val_", "val/", 1)


def check_monitor(config: CheckpointConfig, known: dict[str, float]) -> None:
    """Refuse a --monitor that is no metric of the run, once it has metrics of that kind."""
    kind = next((kind for kind in ("train", "val") if config.metric.startswith(kind)), "")
    others = sorted(name for name in known if name.startswith(kind))
    if not kind or (others and config.metric not in known):
        raise UserError(f"--monitor {config.monitor} is no metric of this run; it has {', '.join(others)}")


def is_due(config: CheckpointConfig, step: int) -> bool:
    """True if a checkpoint follows this step."""
    return config.save_interval > 0 and step % config.save_interval == 0


def resume(
    path: Path | None, trained: Trained, phase: Callable[..., AbstractContextManager]
) -> tuple[int, dict[str, float]]:
    """Load a checkpoint, or start at step 0 without one: finished steps, and the metrics then. Collective.

    `phase`: makes a context for the loading of each model, as `Session.phase` does. Raises UserError if the
    checkpoint lacks a model.
    """
    if path is None:
        return 0, {}
    state = read_state(path)
    same_layout = state["layout"] == parallel.layout_sizes()
    folders = {name: folder_of(name, trained, path) for name in trained}
    for name in (name for name, folder in folders.items() if not folder.is_dir()):
        raise UserError(f"{path} holds no {name}: continue with the flags of that run, or --no-resume")
    for name, folder in folders.items():
        with phase("load", **{name: "all"}):
            load(folder, *trained[name], same_layout)
    return state["step"], state["metrics"]


def folder_of(name: str, trained: Trained, directory: Path) -> Path:
    """Folder of a model in a checkpoint: the first model's is the checkpoint itself."""
    return directory if name == next(iter(trained)) else directory / name


def to_resume(config: CheckpointConfig, output: Path) -> Path | None:
    """Checkpoint that a run continues from. Raises UserError for --resume-from another run's. Collective."""
    paths = parallel.on_main(lambda: complete_checkpoints(output / "checkpoints"))
    if config.resume_from is None:
        return paths[-1] if paths and config.resume else None
    for path in paths:
        if config.resume_from.resolve() == path.resolve():
            return path
    names = ", ".join(map(str, paths)) or "none"
    raise UserError(
        f"--resume-from {config.resume_from} is no checkpoint of --output {output}; it has {names}"
    )


def newest(directory: Path) -> Path | None:
    """Checkpoint of the highest step, or None."""
    paths = complete_checkpoints(directory)
    return paths[-1] if paths else None


class Saving:
    """A checkpoint on its way to OUTPUT/checkpoints/step_XXXXXXXX. Collective.

    `write`s go to `directory`, or to folders of it, through `writer`.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        output: Path,
        step: int,
        metrics: dict[str, float],
        run_state: dict,
        record: int | None = None,
    ):
        """
        Args:
            metrics: the newest values, by which checkpoints are ranked.
            run_state: identity of the run.
            record: interval of recorded steps, whose checkpoints are kept.
        """
        self.config, self.step, self.record = config, step, record
        self.path = output / "checkpoints" / f"step_{step:08d}"
        self.directory = self.path.with_suffix(".tmp")
        self.state = {"step": step, "layout": parallel.layout_sizes(), **run_state, "metrics": {**metrics}}
        self.writer = Writer(config.async_save)
        if parallel.is_main():
            for leftover in self.path.parent.glob("step_*.tmp"):
                shutil.rmtree(leftover)

    def complete(self) -> None:
        """Wait for the files, rename the directory, and delete checkpoints beyond --save-top-k."""
        own = self.writer.finish()
        parallel.free_memory()
        dist.barrier()
        files = checkpoint_files.checksums(self.directory, own)
        if parallel.is_main():
            checkpoint_files.write_state(self.directory, self.state | {"files": files})
            shutil.rmtree(self.path, ignore_errors=True)
            os.replace(self.directory, self.path)
            prune(self.path.parent, self.config, self.record)
        dist.barrier()


def write(
    path: Path,
    step: int,
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    writer: Writer | None = None,
) -> None:
    """Write a model in training, with its optimizer and the random states, to a directory. Collective."""
    state = {**sharded_state(model, optimizer, is_loading=False), "rng": rng_state(), "step": step}
    write_state(path, state, writer)


def write_weights(path: Path, model: MegatronModule, writer: Writer | None = None) -> None:
    """Write a model's weights only, for `load_weights`. Collective."""
    write_state(path, {"model": model.sharded_state_dict(metadata=sharding_metadata())}, writer)


def write_state(path: Path, state: dict, writer: Writer | None = None) -> None:
    """Write a sharded state, which is emptied, to a new directory; without a `writer` at once. Collective."""
    watchdog.tick("save")
    if parallel.is_main():
        path.mkdir(parents=True)
    parallel.free_memory()  # saving copies everything
    dist.barrier()
    if writer:
        writer.write(path, state)
    else:
        alone = Writer()
        alone.write(path, state)
        alone.finish()
    parallel.free_memory()


def load(path: Path, model: DistributedDataParallel, optimizer: MegatronOptimizer, same_layout: bool) -> None:
    """Load model and optimizer from `write`'s directory, of any layout. Collective.

    `same_layout`: the layout is the present one, so that the random states apply. An item that the checkpoint
    lacks is an error of Megatron's with its name.
    """
    for adam in optim.adams(optimizer):
        # torch's AdamW has no state to load into before its first step
        if not adam.optimizer.state:
            adam._init_optimizer_states_with_dummy_values()
    megatron_patches.keep_step_through_loading()
    template = sharded_state(model, optimizer, is_loading=True)
    if same_layout:
        template["rng"] = rng_state()
    state = load_state(path, template)
    fill(model.module, state["model"])
    names = ("betas", "weight_decay", "fused", "foreach")  # the last two only of torch's AdamW
    settings = [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]
    weights = [bit_sum(weight) for weight, _ in own_weights(optimizer)]  # fp32 main weights overwrite them
    optimizer.load_state_dict(state["optimizer"])
    is_right = weights == [bit_sum(main) for _, main in own_weights(optimizer)]
    if not all(parallel.gather(is_right)):
        raise UserError(
            f"damaged checkpoint: {path}: its main weights are not those of its model. Versions before 0.2 "
            "wrote such checkpoints of models of more than 40 million weights with data parallel ranks. Its "
            "model is right: `python -m tools.prepare_model export` writes it as the --model of a new run"
        )
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)  # flags override the settings in the checkpoint
    for adam in optim.adams(optimizer):
        for tensors in adam.optimizer.state.values():
            # one tensor for all would count each parameter as a step
            if isinstance(tensors.get("step"), torch.Tensor):
                tensors["step"] = tensors["step"].clone()
    if same_layout:
        set_rng_state(state["rng"])


def load_state(path: Path, template: dict) -> dict:
    """Load a sharded state that Megatron-Core 0.16 or 0.19 wrote, whichever is installed. Collective."""
    megatron_patches.read_common_state_of_later_versions()
    return dist_checkpointing.load(template, str(path))


def own_weights(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's part of each weight, and the main weights of the part."""
    for adam in optim.adams(optimizer):
        for weight in adam.model_param_group_index_map:
            part = adam._get_model_param_range_map(weight)["param"]
            main = adam._get_main_param_and_optimizer_states(weight)["param"]
            yield weight.detach().view(-1)[part.start : part.end], main.detach()


def bit_sum(values: torch.Tensor) -> int:
    """Sum of the bit patterns of values in bf16: equal for main weights and the weights of any precision."""
    return int(values.bfloat16().view(torch.int16).sum(dtype=torch.int64))


def load_weights(path: Path, model: MegatronModule) -> None:
    """Load the weights of a model that is not trained, from any layout and precision. Collective."""
    template = {"model": model.sharded_state_dict(metadata=sharding_metadata())}
    fill(model, load_state(path, template)["model"])


def fill(model: MegatronModule, state: dict) -> None:
    """Copy loaded tensors to a model; every trained weight must be among them."""
    missing = set(model.load_state_dict(state, strict=False).missing_keys)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not missing & trained, missing & trained


def is_checkpoint(path: Path) -> bool:
    """True for a checkpoint of this project."""
    return (path / "state.json").is_file()


def is_reward_model(path: Path) -> bool:
    """True if a checkpoint holds the head of a reward model."""
    return "score.weight" in dist_checkpointing.load_tensors_metadata(str(path))


def run_flags(path: Path) -> dict:
    """Flags of a checkpoint's run. Raises UserError without its config.json."""
    config = path.resolve().parent.parent / "config.json"  # OUTPUT/config.json
    if not config.is_file():
        raise UserError(f"--model {path}: {config}, which names the model of the checkpoint, is missing")
    return read_object(config).get("flags", {})


def sharded_state(model: DistributedDataParallel, optimizer: MegatronOptimizer, is_loading: bool) -> dict:
    """Model and optimizer as sharded tensors of Megatron's checkpoints."""
    megatron_patches.save_without_padding_of_buckets()
    metadata = sharding_metadata()
    model_state = model.module.sharded_state_dict(metadata=metadata)
    optimizer_state = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    # The first data parallel rank saves main weights and moments. Megatron treats the None of the others as a
    # value of all ranks, and warns at each save that rank 0 has none.
    chained = [part for part in optimizer_state.values() if isinstance(part, dict)]
    for part in (optimizer_state, *chained):
        if part.get("param_state", part) is None:
            del part["param_state"]
    return {"model": model_state, "optimizer": optimizer_state}


def sharding_metadata() -> dict:
    """Metadata of the split of a checkpoint into shards."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",  # the default cannot be saved any more
        # main weights and moments are gathered on one data parallel rank, not on each
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }


def rng_state() -> ShardedObject:
    """Random states of this rank, of every kind."""
    numpy_state = np.random.get_state()  # kind, keys, ...
    state = {
        "python": random.getstate(),
        "numpy": tuple(part.tolist() if isinstance(part, np.ndarray) else part for part in numpy_state),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("rng", state, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)


def set_rng_state(state: dict) -> None:
    """Restore random states: the inverse of rng_state."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["megatron"])


def prune(directory: Path, config: CheckpointConfig, record: int | None = None) -> None:
    """Delete all checkpoints but the newest and the best --save-top-k; of equal ones the oldest is best.

    Checkpoints before recorded steps, multiples of `record`, are kept as well: tools.replay begins there.
    """
    states = {path: read_state(path) for path in complete_checkpoints(directory) if is_checkpoint(path)}
    metrics = {path: state["metrics"] for path, state in states.items()}
    last = max(metrics)
    check_monitor(config, metrics[last])
    ranked = [path for path in metrics if config.metric in metrics[path]]
    ranked.sort(key=lambda path: metrics[path][config.metric], reverse="loss" not in config.metric)
    recorded = {path for path, state in states.items() if record and state["step"] % record == 0}
    for path in set(metrics) - set(ranked[: config.save_top_k]) - recorded - {last}:
        delete_checkpoint(path)
