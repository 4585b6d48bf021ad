"""Run by test_offload.py on every rank: offloads of a policy and a critic between phases, to files."""

import contextlib
import gc
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from align.distributed import parallel
from align.model import architecture, gpt, huggingface
from align.model.config import ModelConfig
from align.tracking.metrics import Clock
from align.training import checkpoint, engine, offload, optim
from align.training.checkpoint import CheckpointConfig
from align.training.phases import Phases
from tests.support import grids
from tools.conformance.cases import Case
from tools.conformance.losses import LOSSES, SEED
from tools.conformance.rows import ROWS, STEPS, data_set
from tools.conformance.worker import make_batches

ALGORITHMS = {"policy": "sft", "critic": "ranking"}
Trained = tuple[DistributedDataParallel, MegatronOptimizer]


@dataclass(frozen=True)
class Setting:
    """A model's family and precision, and how it is split."""

    family: str
    precision: str
    tp: int = 1
    pp: int = 1


# ---- training --------------------------------------------------------------------------------------------


def build(name: str, directory: Path, setting: Setting) -> Trained:
    """The policy, or a critic with the same weights and a head of its own."""
    arch, layout = architecture.read_config(directory), parallel.ParallelConfig(setting.tp, setting.pp)
    source, config = (
        huggingface.open_source(directory, arch, SEED),
        ModelConfig(str(directory), setting.precision),
    )
    if name == "policy":
        model = gpt.build_policy(arch, config, layout)
    else:
        arch = replace(arch, labels=1)
        model, source = gpt.build_scorer(arch, config, layout), huggingface.FreshHead(source, arch, SEED)
    huggingface.load(model, source)
    model = gpt.distributed(model)
    return model, optim.build(model, optim.OptimConfig(weight_decay=0.1))


def tensors(trained: Trained) -> dict[str, list[torch.Tensor]]:
    """Tensors of the three parts of a model in training, listed independently of align.training.offload."""
    weights = list(trained[0].parameters())
    states = [state for adam in optim.adams(trained[1]) for state in adam.optimizer.state.items()]
    return {
        "weights": weights,
        "gradients": [weight.main_grad for weight in weights],
        "main": [weight for weight, _ in states],
        "moments": [state[name] for _, state in states for name in ("exp_avg", "exp_avg_sq")],
    }


def sha256(tensor: torch.Tensor) -> str:
    """Hash of a tensor's bits."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def check_places(trained: dict[str, Trained], setting: Setting, needs: dict[str, str]) -> None:
    """Only what a phase needs has memory; main weights in fp32 are Megatron's buffer of weights, itself."""
    for name, pair in trained.items():
        tensors_ = tensors(pair)
        own = {weight.untyped_storage() for weight in tensors_["weights"]}
        aliases = [weight.untyped_storage() in own for weight in tensors_["main"]]
        assert aliases and set(aliases) == {setting.precision == "fp32"}, (name, aliases)
        kept = {"weights": ("weights",), "all": tuple(tensors_)}.get(needs.get(name), ())
        if "weights" in kept and setting.precision == "fp32":
            kept += ("main",)
        for kind, values in tensors_.items():
            sizes = [value.untyped_storage().nbytes() for value in values if value.numel() > 1]
            assert all(sizes) if kind in kept else not any(sizes), (name, kind, needs)


def train(
    trained: dict[str, Trained], phase: Callable[..., contextlib.AbstractContextManager], ref: offload.Weights
) -> list[dict]:
    """Metrics of each step, and a sum over what the passes without a gradient gave."""
    batches = {name: Case(ALGORITHMS[name]) for name in trained}
    history = []
    for step in range(STEPS):
        micro_batches = {
            name: make_batches(trained[name][0], batches[name], data_set(ALGORITHMS[name], step))
            for name in trained
        }

        def outputs(name: str, micro_batches: dict = micro_batches) -> str:
            results = engine.outputs(trained[name][0], micro_batches[name], lambda batch, output: output)
            return sha256(torch.cat([x.flatten() for x in results]))

        results = {}
        with phase("generate", policy="weights"):
            results["generate"] = outputs("policy")
        with phase("score"):
            pass
        with phase("reference"), ref.swapped_into(trained["policy"][0].module):
            results["reference"] = outputs("policy")
        with phase("both", policy="weights", critic="weights"):
            results["both"] = outputs("critic"), outputs("policy")
        for name in ("critic", "policy"):
            ddp, optimizer = trained[name]
            count = sum(data_set(ALGORITHMS[name], step, ROWS).counts)
            with phase("train", **{name: "all"}):
                for gradient in tensors(trained[name])["gradients"]:
                    gradient.fill_(float("nan"))  # what comes back is not defined
                results[name] = engine.forward_backward(
                    ddp, micro_batches[name], LOSSES[ALGORITHMS[name]], count
                )
                results[f"{name}_grad_norm"] = optim.step(optimizer, 1e-3)
        history.append(results)
    return history


def run(directory: Path, output: Path, setting: Setting, moves: bool) -> dict:
    """A training with or without moves: its history, the bits at its end, a checkpoint of each model."""
    mpu.destroy_model_parallel()
    parallel.make_grid(parallel.ParallelConfig(setting.tp, setting.pp))
    trained = {name: build(name, directory, setting) for name in ALGORITHMS}
    files, lines = output / f"files{os.environ['RANK']}", []
    store = offload.HostStore(files) if moves else offload.HostStore()
    ref = offload.Weights(trained["policy"][0].module, store)
    phases = Phases(Clock(), lines.append, store, enabled=True)
    for name, pair in trained.items() if moves else ():
        phases.add(name, *pair)

    @contextlib.contextmanager
    def checked(name: str, **needs: str):
        with phases(name, **needs):
            check_places(trained, setting, needs)
            assert os.listdir(files) == []
            yield

    phase = checked if moves else lambda *_, **__: contextlib.nullcontext()
    history = train(trained, phase, ref)
    with phase("save", policy="all", critic="all"):
        for name, pair in trained.items():
            place = output / name / ("moved" if moves else "plain")
            config = CheckpointConfig(monitor="train/loss")
            saving = checkpoint.Saving(config, place, STEPS, {"train/loss": 1.0}, {})
            checkpoint.write(saving.directory, STEPS, *pair, saving.writer)
            saving.complete()
        bits = {
            f"{name} {kind}": [sha256(value.detach()) for value in values]
            for name, pair in trained.items()
            for kind, values in tensors(pair).items()
            if kind != "gradients"
        }
    return {"history": history, "bits": bits, "lines": lines, "memory": phases.memory()}


# ---- resident memory -------------------------------------------------------------------------------------


def resident_bytes() -> int:
    gc.collect()
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measure(directory: Path, output: Path, in_files: bool) -> dict:
    """Resident memory in phases, by label, and what a model of about 200 MB consists of."""
    arch, config = architecture.read_config(directory), ModelConfig(str(directory), "fp32")
    policy = gpt.build_policy(arch, config, parallel.ParallelConfig())
    for weight in policy.parameters():
        torch.nn.init.normal_(weight)
    ddp = gpt.distributed(policy)
    optimizer = optim.build(ddp, optim.OptimConfig())
    ddp.zero_grad_buffer()
    sums = {kind: sum(value.nbytes for value in values) for kind, values in tensors((ddp, optimizer)).items()}
    store = offload.HostStore(output / "files" if in_files else None)
    phase = Phases(Clock(), lambda line: None, store, enabled=True)
    before = [float(weight.detach().sum()) for weight in ddp.parameters()]
    phase.add("policy", ddp, optimizer)
    results = {}
    for name, needs in [
        ("start", {"policy": "all"}),
        ("score", {}),
        ("generate", {"policy": "weights"}),
        ("train", {"policy": "all"}),
        ("later", {}),
    ]:
        with phase(name, **needs):
            if needs.get("policy") == "all":
                ddp.zero_grad_buffer()
            if needs:
                assert [float(weight.detach().sum()) for weight in ddp.parameters()] == before
            results[name] = resident_bytes()
    return {"sizes": sums, "resident": results, "peaks": phase.memory(), "second": phase.memory()}


def main(task: str, directory: Path, output: Path, cases: list) -> None:
    with parallel.start(parallel.ParallelConfig()):
        if task == "memory":
            results = measure(directory, output, *cases)
        else:
            results = []
            for number, flags in enumerate(cases):
                setting = Setting(**flags)
                place = output / str(number)
                results.append(
                    [run(directory / setting.family, place, setting, moves) for moves in (False, True)]
                )
    (output / f"{task}{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    grids.use_small_buckets()
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
