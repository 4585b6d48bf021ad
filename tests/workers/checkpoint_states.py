"""Run by test_checkpoint_states.py on every rank: save models with several buckets of gradients, and load."""

import json
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from align.distributed import megatron_patches, parallel
from align.errors import UserError
from align.model import architecture, gpt, huggingface
from align.model.config import ModelConfig
from align.training import checkpoint, optim
from align.training.checkpoint_writer import Writer
from tests.support import grids


def build(directory: Path, precision: str, layout: parallel.ParallelConfig) -> checkpoint.Trained:
    """A model after an update by random gradients."""
    grids.change(layout)
    arch, config = architecture.read_config(directory), ModelConfig(str(directory), precision)
    model = gpt.build_policy(arch, config, layout)
    huggingface.load(model, huggingface.open_source(directory, arch, 0))
    ddp = gpt.distributed(model)
    optimizer = optim.build(ddp, optim.OptimConfig())
    for parameter in ddp.parameters():
        parameter.main_grad.normal_()
    optim.step(optimizer, 1e-2)
    return {"policy": (ddp, optimizer)}


def states(trained: checkpoint.Trained) -> list[tuple[str, Tensor]]:
    """Weights, and this rank's main weights and moments by the name of their weight."""
    [(model, optimizer)] = trained.values()
    names = {parameter: name for name, parameter in model.named_parameters()}
    result = [(name, parameter.detach()) for parameter, name in names.items()]
    for adam in optim.adams(optimizer):
        for parameter in adam.model_param_group_index_map:
            for kind, values in adam._get_main_param_and_optimizer_states(parameter).items():
                if values.numel() > 1:
                    result.append((f"{names[parameter]} {kind}", values.detach()))
    return result


def main(directory: Path, output: Path, cases: list[dict]) -> None:
    results = []
    repair = megatron_patches.save_without_padding_of_buckets
    for number, case in enumerate(cases):
        megatron_patches.save_without_padding_of_buckets = repair if case["repaired"] else lambda: None
        layout = parallel.ParallelConfig(**case["layout"])
        torch.manual_seed(dist.get_rank())
        trained = build(directory / case["model"], case["precision"], layout)
        saved = [(name, values.clone()) for name, values in states(trained)]
        writer, updated = Writer(in_background=True), threading.Event()
        writer.thread.submit(updated.wait)  # so that nothing is written before the state has changed
        checkpoint.write(output / str(number), 1, *trained["policy"], writer)
        for _, values in states(trained):
            values.zero_()
        assert not writer.is_done()
        updated.set()
        writer.finish()
        try:
            checkpoint.load(output / str(number), *trained["policy"], same_layout=True)
        except UserError as error:
            results.append({"error": str(error)})
            continue
        differ = [name for (name, a), (_, b) in zip(saved, states(trained), strict=True) if not a.equal(b)]
        [buffer] = trained["policy"][0].buffers
        padding = sum(bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets[:-1])
        results.append({"differ": differ, "buckets": len(buffer.buckets), "padding": padding})
    gathered = parallel.gather(results)
    if parallel.is_main():
        (output / "results.json").write_text(json.dumps(gathered))


if __name__ == "__main__":
    grids.use_small_buckets()
    with parallel.start(parallel.ParallelConfig()):
        main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
