"""The whole pipeline on the built-in tiny model: real commands, two processes, minutes on a laptop.

    python demo.py

The toy task is to sort letters. 40 % of the training answers have two neighbours swapped, so supervised
fine-tuning learns the task and the mistakes, and leaves something to do for the stages that come after
it. Each stage is a command that one could type; the table at the end compares what the stages sample.
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
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def main() -> None:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    data, sft = OUTPUT / "data", OUTPUT / "sft"
    command(sys.executable, "prepare_data.py", "toy", "--output", data)
    seconds = command(
        *(*TORCHRUN, "train_sft.py", "--tp", "2", "--output", sft),
        *("--train-data", data / "train.jsonl", "--val-data", data / "val.jsonl"),
        *(
            "--max-epochs",
            "4",
            "--lr",
            "3e-3",
            "--min-lr",
            "1e-4",
            "--max-seq-len",
            "64",
            "--val-interval",
            "50",
        ),
    )

    prompts = [json.loads(line)["messages"][:1] for line in (data / "val.jsonl").read_text().splitlines()]
    answers = sample(sft / "hf", prompts)
    scores = [
        toy_score(prompt[0]["content"], answer) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    metrics = [json.loads(line) for line in (sft / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val/loss"] for line in metrics if "val/loss" in line]

    print("\nstage  seconds  validation loss     score of sampled answers (1 = every letter in its place)")
    print(f"sft    {seconds:7.0f}  {losses[0]:.3f} -> {losses[-1]:.3f}     {sum(scores) / len(scores):.3f}")
    print("\nsamples of held-out prompts:")
    for prompt, answer, score in list(zip(prompts, answers, scores, strict=True))[:5]:
        print(f"  {prompt[0]['content']:20}  ->  {answer:14}  score {score:.2f}")
    print(f"\ncurves: {sft / 'plots' / 'curves.png'}\nmodel:  {sft / 'hf'}")


def command(*words: object) -> float:
    """Print a command, run it, and return how many seconds it took; stop if it fails."""
    words = [str(word) for word in words]
    print("\n$ " + " ".join(words).replace(sys.executable, "python"), flush=True)
    start = time.monotonic()
    if status := subprocess.run(words).returncode:
        sys.exit(status)
    return time.monotonic() - start


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


if __name__ == "__main__":
    main()
