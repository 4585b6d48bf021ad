"""The whole pipeline on the built-in tiny model: real commands, two processes, minutes on a laptop.

    python demo.py

The toy task is to sort letters. 40 % of the training answers have two neighbours swapped, so supervised
fine-tuning learns the task and the mistakes, and leaves something to do for the stages that come after
it: a reward model that tells right answers from wrong ones, and DPO, which learns to prefer them. Each stage
is a command that one could type; the table at the end compares what the stages sample.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

from align.toy import toy_score

OUTPUT = Path("runs/demo")
DATA, SFT, RM, DPO = (OUTPUT / name for name in ("data", "sft", "rm", "dpo"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
PAIRS = f"--train-data {DATA}/train_comparisons.jsonl --val-data {DATA}/val_comparisons.jsonl"


def main() -> None:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    command(sys.executable, "prepare_data.py", "toy", "--output", DATA)
    seconds = {
        "sft": command(
            *(*TORCHRUN, "train_sft.py", "--tp", "2", "--output", SFT, "--max-seq-len", "64"),
            *("--train-data", DATA / "train.jsonl", "--val-data", DATA / "val.jsonl"),
            *"--max-epochs 4 --lr 3e-3 --min-lr 1e-4 --val-interval 50".split(),
        ),
        "rm": command(
            *(*TORCHRUN, "train_rm.py", "--model", SFT / "hf", "--output", RM, "--max-seq-len", "64"),
            *PAIRS.split(),
            *"--max-epochs 2 --lr 5e-4 --min-lr 5e-5 --val-interval 20".split(),
        ),
        "dpo": command(
            *(*TORCHRUN, "train_dpo.py", "--model", SFT / "hf", "--output", DPO, "--max-seq-len", "64"),
            *PAIRS.split(),
            *"--sft-weight 0.5 --lr 2e-4 --min-lr 1e-5 --val-interval 20".split(),
        ),
    }

    prompts = [json.loads(line)["messages"][:1] for line in (DATA / "val.jsonl").read_text().splitlines()]
    answers = {"sft": sample(SFT / "hf", prompts), "dpo": sample(DPO / "hf", prompts)}
    scores = {stage: score(prompts, answers[stage]) for stage in answers}

    print("\nstage  seconds  validation                    score of sampled answers (1: all letters right)")
    for stage, directory in (("sft", SFT), ("rm", RM), ("dpo", DPO)):
        sampled = f"{sum(scores[stage]) / len(prompts):.3f}" if stage in scores else "-"
        print(f"{stage:5}  {seconds[stage]:7.0f}  {first_and_last(directory, stage):28}  {sampled}")
    print("\nsamples of held-out prompts, with their scores:")
    for i, prompt in enumerate(prompts[:5]):
        shown = [f"{stage}: {answers[stage][i]:12} {scores[stage][i]:.2f}" for stage in answers]
        print(f"  {prompt[0]['content']:20}  ->  {'   '.join(shown)}")
    print(f"\ncurves: {OUTPUT}/*/plots/curves.png\nmodels: {OUTPUT}/*/hf")


def command(*words: object) -> float:
    """Print a command, run it, and return how many seconds it took; stop if it fails."""
    words = [str(word) for word in words]
    print("\n$ " + " ".join(words).replace(sys.executable, "python"), flush=True)
    start = time.monotonic()
    if status := subprocess.run(words).returncode:
        sys.exit(status)
    return time.monotonic() - start


def first_and_last(directory: Path, stage: str) -> str:
    """What a stage's first and last validation found: of SFT the loss, of the others the accuracy."""
    name = "loss" if stage == "sft" else "acc"
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found = [row[f"val/{name}"] for row in rows if f"val/{name}" in row]
    return f"{name} {found[0]:.3f} -> {found[-1]:.3f}"


def sample(model_directory: Path, prompts: list[list[dict]], max_new_tokens: int = 16) -> list[str]:
    """One answer to each prompt, sampled by transformers at temperature 1 from a stage's exported model."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_directory, padding_side="left")
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(model_directory)
    batch = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**batch, do_sample=True, max_new_tokens=max_new_tokens)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def score(prompts: list[list[dict]], answers: list[str]) -> list[float]:
    """The score of each answer."""
    return [toy_score(prompt[0]["content"], text) for prompt, text in zip(prompts, answers, strict=True)]


if __name__ == "__main__":
    main()
