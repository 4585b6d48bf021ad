"""Run by test_seeded_bugs.py on every rank: train_grpo.py with one bug after another, and its errors."""

import functools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from megatron.core import parallel_state as mpu

import train_grpo
from align.distributed import parallel
from align.tracking.run import Run
from tests.support.seeded_bugs import Bug, seeded

# 16 answers a step, of which a few end by themselves, in one update of several micro-batches.
COMMON = (
    "--prompts-per-step 8 --samples-per-prompt 2 --truncated keep --global-batch-size 16 "
    "--micro-batch-tokens 128 --max-prompt-len 48 --max-steps 2 --temperature 0.8 --lr 1e-3 --deterministic "
    "--precision fp32 --reward-fn tests.support.rewards:reward --max-new-tokens"
)
FLAGS = {
    "usual": f"{COMMON} 12",
    "one token": f"{COMMON} 1",  # so that all answers have one length
    "few slots": f"{COMMON} 12 --rollout-slots 5",
    "reshard": f"{COMMON} 12 --rollout-layout reshard",
    "tp 2": f"{COMMON} 12 --tp 2",
    "dp 2": f"{COMMON} 12",
}
PROCESSES = {name: 2 if name in ("tp 2", "dp 2") else 1 for name in FLAGS}


@dataclass(frozen=True)
class Case:
    """A run of train_grpo.py, its bug, and what tells of it."""

    caught: str  # by a message that test_seeded_bugs.MESSAGES has under this name, or not by one
    bug: Bug = field(default_factory=dict)
    flags: str = "usual"
    after: int = 0  # steps that pass before it shows


# ---- the bugs ------------------------------------------------------------------------------------

COLLATE, ANSWER = "align.data.packing.collate", "align.generation.rollout.response_example"
POSITIONS, TAIL = "np.arange(skip, skip + end - start)", "positions[total:] ="
SAMPLE, IDS = "align.generation.continuous_batching.ContinuousBatch.sample", "self.ids[slot, :count].copy()"
LOGPROBS = "(x[slot, :count].copy()"
DECODE = "align.generation.inference.InferenceModel.decode"
DROPOUT = {"align.model.gpt.transformer_config": [("hidden_dropout=0.0", "hidden_dropout=0.1")]}
LINEAR = "megatron.core.tensor_parallel.layers"
REGION = "megatron.core.tensor_parallel.mappings._CopyToModelParallelRegion"
DDP = "megatron.core.distributed.DistributedDataParallel"
BUCKETS = "in self.bucket_groups + self.expert_parallel_bucket_groups:"
SUM = "reduce_from_tensor_model_parallel_region(output_parallel, group=self.tp_group)"

READ = {  # what training reads
    "answers that share their prompt's places count their own from 0": Case(
        "sampler", {COLLATE: [(POSITIONS, "np.arange(end - start)")]}
    ),
    "positions of answers are one too high in training": Case(
        "sampler", {COLLATE: [(POSITIONS, f"{POSITIONS} + mask[start:end].astype(int)")]}
    ),
    "trained places are one too early": Case(
        "sampler", {COLLATE: [(TAIL, f"mask = np.roll(mask, -1); {TAIL}")]}
    ),
    "trained places are one too late": Case(
        "sampler", {COLLATE: [(TAIL, f"mask = np.roll(mask, 1); {TAIL}")]}
    ),
    "the mask is that of the inputs": Case(
        "lengths", {COLLATE: [("example.trained[skip + 1 :]", "example.trained[skip:-1]")]}
    ),
    "sequences of a micro-batch see each other": Case(
        "sampler",
        {"align.training.engine.forward": [("batch.lengths, batch.prefixes,", "[tokens], [(0, 0)],")]},
    ),
    "an answer sees the one before it in place of its prompt": Case(
        "sampler",
        {"align.model.attention.overlap": [("(start, start + size)", "(begin - size, begin)")]},
    ),
    "training does not see a prompt's first token": Case(
        "sampler", {ANSWER: [("trained = np", "prompt = type(prompt)(prompt.ids[1:], {}); trained = np")]}
    ),
    "numbers of other micro-batches": Case(
        "sampler",
        {"align.training.batching.micro_batches": [("arrays[i] for i", "arrays[-1 - i] for i")]},
        "one token",
    ),
}
ENDS = {  # how an answer ends
    "the stop token is dropped, with its log-prob": Case(
        "ends",
        {
            SAMPLE: [
                (IDS, f"{IDS}; keep = len(ids) - (finish == 'stop'); ids = ids[:keep]"),
                (LOGPROBS, "(x[slot, :keep].copy()"),
            ]
        },
    ),
    "the stop token is dropped, and the first log-prob": Case(
        "ends",
        {
            SAMPLE: [
                (IDS, f"{IDS}; ended = int(finish == 'stop'); ids = ids[: len(ids) - ended]"),
                (LOGPROBS, "(x[slot, ended:count].copy()"),
            ]
        },
    ),
    "the stop token is dropped, its log-prob is not": Case(
        "ends", {SAMPLE: [(IDS, f"{IDS}; ids = ids[: len(ids) - (finish == 'stop')]")]}
    ),
    "the stop token is not trained": Case(
        "tokens", {ANSWER: [("return Example", "trained[-1] = sample.finish != 'stop'; return Example")]}
    ),
}
DISTRIBUTION = {  # softmax of what
    "training forgets the temperature": Case(
        "sampler", {"align.model.gpt.build_policy": [("temperature=temperature", "temperature=1.0")]}
    ),
    "the sampler's log-probs are without temperature": Case(
        "sampler", {SAMPLE: [("Sample(ids, logprobs,", "Sample(ids, model_logprobs,")]}
    ),
    "rows that only pad the vocabulary get probability": Case(
        "sampler", {"align.model.logprobs.scale_and_mask_": [("z[:, real:] = ABSENT", "pass")]}
    ),
}
SAMPLER = {  # what the sampler computes
    "decoded tokens are rotated one place too far": Case(
        "sampler", {DECODE: [("run_layers(hidden, positions,", "run_layers(hidden, positions + 1,")]}
    ),
    "a decoded token does not see itself": Case(
        "sampler", {DECODE: [("places <= positions", "places < positions")]}
    ),
    "a sequence that changes its slot leaves its last key behind": Case(
        "sampler",
        {
            "align.generation.continuous_batching.ContinuousBatch.close_gaps": [
                ("self.count[last] - 1)", "self.count[last] - 2)")
            ]
        },
        "few slots",
    ),
    "the sampler keeps the weights of before the update": Case(
        "sampler",
        {
            "align.generation.generator.Generator.generate": [
                ("offload.restore(self.freed)", "hasattr(self, 'stale') or offload.restore(self.freed)"),
                ("self.reshard.run()", "hasattr(self, 'stale') or self.reshard.run()"),
                ("self.freed = offload.release(self.copy.parameters())", "self.stale = True"),
            ]
        },
        "reshard",
        after=1,
    ),
}
PASSES = {  # passes over the same answers that differ
    "dropout in training": Case("ratio", DROPOUT),
    "dropout in every pass": Case(
        "sampler", DROPOUT | {"align.training.engine.outputs": [("model.eval()\n", "model.train()\n")]}
    ),
    "an update after every micro-batch": Case(
        "ratio",
        {
            "train_grpo.main": [
                (
                    "engine.forward_backward(policy, minibatch, loss_fn, count)",
                    "[(engine.forward_backward(policy, [part], loss_fn, count), "
                    "optim.step(optimizer, lr)) for part in minibatch][-1][0]",
                )
            ]
        },
    ),
    "old log-probs of other micro-batches": Case(
        "ratio",
        {
            "align.training.batching.micro_batches": [
                ("arrays[i] for", "arrays[-1 - i if name == 'old' else i] for")
            ]
        },
        "one token",
    ),
}
RANKS = {  # what ranks tell each other
    "no sum over tensor parallel ranks after attention and MLP": Case(
        "sampler", {f"{LINEAR}.RowParallelLinear.forward": [(SUM, "output_parallel")]}, "tp 2"
    ),
    "no sum over tensor parallel ranks of embeddings": Case(
        "sampler", {f"{LINEAR}.VocabParallelEmbedding.forward": [(SUM, "output_parallel")]}, "tp 2"
    ),
    "no sum over tensor parallel ranks in the softmax": Case(
        "sampler",
        {"align.model.logprobs.TargetLogProbs.forward": [("dist.all_reduce(parts, group=group)", "pass")]},
        "tp 2",
    ),
    "no sum over tensor parallel ranks in the backward pass": Case(  # their norms and biases drift apart
        "sampler",
        {f"{REGION}.backward": [("_reduce(grad_output, ctx.group)", "grad_output")]},
        "tp 2",
        after=1,
    ),
    "data parallel ranks do not tell each other their updated weights": Case(
        "sampler",
        {f"{DDP}.start_param_sync": [(BUCKETS, "in []:")]},
        "dp 2",
        after=1,
    ),
}
UNSTOPPED = {  # what shows only beside another layout
    "no sum of gradients over data parallel ranks": Case(
        "layout", {f"{DDP}.finish_grad_sync": [(BUCKETS, "in []:")]}, "dp 2"
    ),
}
CASES = READ | ENDS | DISTRIBUTION | SAMPLER | PASSES | RANKS


# ---- running -------------------------------------------------------------------------------------


def run(flags: str, bug: Bug, output: Path) -> dict[str, object]:
    """The error that stops train_grpo.py, None if there is none, and the metrics of the steps before."""
    words = [*flags.split(), "--output", str(output)]
    config = tyro.cli(train_grpo.Config, args=words, config=(tyro.conf.OmitArgPrefixes,))
    torch.use_deterministic_algorithms(config.parallel.deterministic)
    mpu.destroy_model_parallel()
    parallel.make_grid(config.parallel)
    message = None
    try:
        with seeded(bug):
            train_grpo.main(config)
    except (RuntimeError, ValueError) as error:  # the audit's, or of shapes that do not fit
        message = f"{type(error).__name__}: {error}"
    logged = output / "metrics.jsonl"
    lines = logged.read_text().splitlines() if logged.exists() else []
    return {"message": message, "steps": [json.loads(line) for line in lines]}


def main(folder: Path, written: Path) -> None:
    """All cases of this number of processes, and each of their flags without a bug."""
    data = f"--model {folder / 'model'} --train-data {folder / 'train.jsonl'}"
    runs = {f"{name} alone": (name, {}) for name in FLAGS}
    runs |= {name: (case.flags, case.bug) for name, case in (CASES | UNSTOPPED).items()}
    results = {}
    for number, (name, (flags, bug)) in enumerate(runs.items()):
        if PROCESSES[flags] == dist.get_world_size():
            results[name] = run(f"{data} {FLAGS[flags]}", bug, written / str(number))
    (written / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    Run.close = functools.partialmethod(Run.close, plots=False)  # curves take long
    with parallel.start(parallel.ParallelConfig()):
        main(*map(Path, sys.argv[1:]))
