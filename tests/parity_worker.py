"""Run by test_parity.py under torchrun: our logits, training steps and export of each family, to a file."""

import sys
from pathlib import Path

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from align import architecture, engine, huggingface, losses, model, optim, packing, parallel
from tests.parity_data import LR, STEPS, examples


class Logits(model.Policy):
    """The policy, but its last stage returns all logits, [T, padded V]."""

    def _postprocess(self, hidden_states, **rest):
        out = GPTModel._postprocess(self, hidden_states, **{**rest, "labels": None})
        return gather_from_tensor_model_parallel_region(out)[0] if self.post_process else out


def logits(
    arch: architecture.Architecture, layout: parallel.ParallelConfig, source: huggingface.Source
) -> torch.Tensor | None:
    """Logits of the first global batch in one pack, on the last stage."""
    policy = Logits(
        model.transformer_config(arch, model.ModelConfig(precision="fp32"), layout, False), arch, False
    )
    huggingface.load(policy, source)
    batch = packing.collate([[row] for row in examples(0)], engine.alignment(policy))
    found = []

    def step(batches, policy):
        return engine.forward(policy, next(batches)), lambda out, non_loss_data: found.append(out)

    with torch.no_grad():
        engine.get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([batch]),
            model=[policy],
            num_microbatches=1,
            seq_length=1,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return found[0][: sum(batch.lengths), : arch.vocab_size].clone() if found else None


def train(
    arch: architecture.Architecture, layout: parallel.ParallelConfig, directory: Path, output: Path
) -> list[float]:
    """[loss, gradient norm] of each step; the weights before the first step are exported to output."""
    config = model.ModelConfig(model=str(directory), precision="fp32")
    policy = model.build_policy(arch, config, layout)
    huggingface.load(policy, huggingface.open_source(directory, arch, 0))
    huggingface.save(policy, directory, output)
    policy = model.distributed(policy)
    optimizer = optim.build(policy, optim.OptimConfig(lr=LR, weight_decay=0.1))
    history = []
    for step in range(STEPS):
        rows = examples(step)
        batches = engine.micro_batches(
            policy, [[row] for row in rows], packing.BatchConfig(micro_batch_tokens=64)
        )
        trained = sum(int(row.trained.sum()) for row in rows)
        metrics = engine.forward_backward(
            policy, batches, lambda batch, logprobs: (losses.sft_loss(logprobs, batch.mask), {}), trained
        )
        history.append([metrics["loss"], optim.step(optimizer, LR)])
    return history


def main(models: Path, output: Path, tp: int, pp: int, sequence_parallel: bool) -> None:
    layout = parallel.ParallelConfig(tp=tp, pp=pp, sequence_parallel=sequence_parallel)
    with parallel.start(layout):
        results = {}
        for directory in sorted(models.iterdir()):
            arch = architecture.read_config(directory)
            results[directory.name] = {
                "logits": logits(arch, layout, huggingface.open_source(directory, arch, 0)),
                "history": train(arch, layout, directory, output / directory.name),
            }
        if (
            mpu.is_pipeline_last_stage()
            and mpu.get_tensor_model_parallel_rank() == 0
            and parallel.dp_rank() == 0
        ):
            torch.save(results, output / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "sp")
