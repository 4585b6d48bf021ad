"""The whole pipeline on the built-in tiny model: real commands, two processes, minutes on a laptop.

    python demo.py

The toy task is to sort letters. 40 % of the training responses have two neighbours swapped, so supervised
fine-tuning learns the task and the mistakes. The stages after it are a reward model, DPO, rejection sampling,
PPO with a critic, GRPO, and self-rewarding, for which the training data also has right judgements of
responses, and of judgements. Each stage is a command that one could type. The table at the end compares what
the stages sample, the lines below it how well the model judges before and after self-rewarding.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from align import console
from align.data.templates import fill
from align.data.toy import JUDGE_TEMPLATE, MAX_SCORE, toy_score
from align.judging.judge import Judged, parse_score

OUTPUT = Path("runs/demo")
DATA, SFT, SELF = OUTPUT / "data", OUTPUT / "sft", OUTPUT / "self_reward"
TORCHRUN = (sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split())
ROWS = f"--train-data {DATA}/train.jsonl --val-data {DATA}/val.jsonl"
PAIRS = (
    f"--model {SFT}/hf --max-seq-len 64 --train-data {DATA}/train_comparisons.jsonl "
    f"--val-data {DATA}/val_comparisons.jsonl"
)
PROMPTS = (
    f"--model {SFT}/hf {ROWS} --max-prompt-len 64 --max-new-tokens 16 --reward-fn align.data.toy:reward "
    "--max-steps 30 --val-interval 10 --val-batches 7"
)
STAGES = {  # train_NAME.py with these flags writes OUTPUT/NAME
    "sft": f"--max-seq-len 192 --train-data {DATA}/train.jsonl {DATA}/train_judge.jsonl --val-data "
    f"{DATA}/val.jsonl --global-batch-size 16 --max-epochs 2 --lr 3e-3 --min-lr 1e-4 --val-interval 150",
    "rm": f"{PAIRS} --max-epochs 2 --lr 5e-4 --min-lr 5e-5 --val-interval 20",
    "dpo": f"{PAIRS} --tp 2 --sft-weight 0.5 --lr 2e-4 --min-lr 1e-5 --val-interval 20",
    "rs": f"{PROMPTS} --lr 5e-4 --min-lr 5e-4",
    "ppo": f"{PROMPTS} --samples-per-prompt 4 --global-batch-size 64 --lr 5e-4 --min-lr 1e-4 "
    "--critic-lr 1e-3 --critic-min-lr 1e-3 --kl-coef 0.05",
    "grpo": f"{PROMPTS} --prompts-per-step 32 --samples-per-prompt 8 --global-batch-size 64 --lr 5e-4 "
    "--min-lr 1e-4 --kl-coef 0.05",
    "self_reward": f"--model {SFT}/hf {ROWS} --judge-template {DATA}/judge.txt --meta-judge "
    f"--meta-judge-template {DATA}/meta_judge.txt --true-reward-fn align.data.toy:reward --max-seq-len 64 "
    "--max-new-tokens 64 --steps-per-iteration 10 --sft-weight 0.5 --lr 5e-5 --min-lr 5e-5 --beta 0.3 "
    "--warmup-steps 2 --val-batches 3",
}
JUDGES = ("sft", "self_reward")
METRICS = {"sft": "val/loss", "rm": "val/acc", "dpo": "val/acc", "self_reward": "val/true_rewards"}


def main() -> None:
    console.adapt()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    command(sys.executable, "prepare_data.py", "toy", "--output", DATA)
    seconds = {
        name: command(*TORCHRUN, f"train_{name}.py", "--output", OUTPUT / name, *flags.split())
        for name, flags in STAGES.items()
    }

    val = DATA / "val.jsonl"
    prompts = [json.loads(line)["messages"][0]["content"] for line in val.read_bytes().splitlines()]
    stages = [name for name in STAGES if name != "rm"]
    responses = {name: generate(OUTPUT / name, val, OUTPUT / name / "answers.jsonl", 1) for name in stages}
    scores = {stage: score(prompts, responses[stage]) for stage in responses}
    to_judge = generate(SFT, val, SFT / "four_answers.jsonl", 4)
    judged_prompts = [prompt for prompt in prompts for _ in range(4)]
    judged = [response for group in to_judge for response in group]
    agreement = {stage: judge(OUTPUT / stage, judged_prompts, judged) for stage in JUDGES}

    print("\nstage        seconds  validation                    score of responses (1: all right)")
    for stage in seconds:
        sampled = f"{sum(scores[stage]) / len(prompts):.3f}" if stage in scores else "-"
        print(f"{stage:11}  {seconds[stage]:7.0f}  {first_and_last(OUTPUT / stage):28}  {sampled}")
    print("\nself-rewarding, true score of the responses to validation prompts after each iteration:")
    print("  " + " -> ".join(f"{value:.3f}" for value in curve(SELF, "val/true_rewards")))
    print("the judge's scores of the SFT model's responses, correlation with the true ones:")
    print("  " + " -> ".join(f"{agreement[stage]:.3f}" for stage in JUDGES))
    print("\nsamples of held-out prompts, with their scores:")
    for i, prompt in enumerate(prompts[:5]):
        shown = [f"{stage}: {responses[stage][i]:12} {scores[stage][i]:.2f}" for stage in responses]
        print(f"  {prompt:20}  ->  {'   '.join(shown)}")
    print(f"\ncurves: {OUTPUT}/*/plots/curves.png\nmodels: {OUTPUT}/*/hf")


def command(*words: object) -> float:
    """Print a command, run it, and return how many seconds it took; stop if it fails."""
    arguments = [str(word) for word in words]
    print("\n$ " + " ".join(arguments).replace(sys.executable, "python"), flush=True)
    start = time.monotonic()
    if status := subprocess.run(arguments).returncode:
        sys.exit(status)
    return time.monotonic() - start


def first_and_last(directory: Path) -> str:
    """Main metric of a stage's first and last validation."""
    metric = METRICS.get(directory.name, "val_rollouts/rewards")
    values = curve(directory, metric)
    return f"{metric.split('/')[1]} {values[0]:.3f} -> {values[-1]:.3f}"


def curve(directory: Path, metric: str) -> list[float]:
    """All values of a metric of a run."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_bytes().splitlines()]
    return [row[metric] for row in rows if metric in row]


def judge(directory: Path, prompts: list[str], responses: list[str]) -> float:
    """Pearson correlation of a stage's judgements, three of each response, with the true scores."""
    path = directory / "to_judge.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for prompt, response in zip(prompts, responses, strict=True):
            text = fill(JUDGE_TEMPLATE, {"prompt": prompt, "response": response})
            file.write(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n")
    judgements = generate(directory, path, directory / "judgements.jsonl", 3)
    judged = [Judged(tuple(parse_score(text, 0, MAX_SCORE) for text in texts)) for texts in judgements]
    pairs = zip(judged, score(prompts, responses), strict=True)
    known = [(judgement.mean, true) for judgement, true in pairs if judgement.mean is not None]
    return np.corrcoef(known, rowvar=False)[0, 1]


def generate(directory: Path, prompts: Path, output: Path, number: int) -> list:
    """Responses of a stage's model to each row of a file, at temperature 1; lists for a number above 1."""
    command(
        *(sys.executable, "generate.py", "--model", directory / "hf", "--max-new-tokens", "64"),
        *("--samples-per-prompt", number, "--input", prompts, "--output", output),
    )
    return [json.loads(line)["response"] for line in output.read_bytes().splitlines()]


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """The score of each response."""
    return [toy_score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


if __name__ == "__main__":
    main()
