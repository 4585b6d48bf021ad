"""The real commands: what a user types, what comes out, and what is said when it cannot work."""

import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.run
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import train_dpo
import train_rm
import train_sft
from align.data import preferences
from align.data.formats import FormatConfig
from align.data.packing import Example
from align.data.preferences import Pair, PreferenceFormat
from align.data.sft import load_sft
from align.data.tokenizer import load_tokenizer
from align.losses import supervised
from align.training import checkpoint
from tests.support.files import ROOT, TINY, read_jsonl, write_rows
from tests.support.launch import environment, fork_python, fork_ranks, torchrun
from tests.support.rows import chats, comparisons, words

SCRIPTS = {"train_sft.py": train_sft, "train_dpo.py": train_dpo, "train_rm.py": train_rm}
QUICK = ("--global-batch-size", 4, "--max-steps", 3, "--warmup-steps", 1, "--lr", 1e-3)


def python(*command: object) -> subprocess.CompletedProcess:
    """Run `python command...` from the repository's root, as a user does without torchrun."""
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


def conversations(count: int) -> list[dict]:
    return [
        {
            "system": "Answer.",
            "mask": "User",
            "conversations": [{"from": "User", "value": word}, {"from": "Assistant", "value": word[::-1]}],
        }
        for word in words(count, 0)
    ]


def text_lines(count: int, seed: int, margin: float) -> list[dict]:
    """Chosen and rejected {"text"} lines in turn, every other pair with a margin."""
    rows = []
    for i, pair in enumerate(comparisons(count, seed)):
        rows.append({"text": pair["prompt"] + pair["chosen"]} | ({"margin": margin} if i % 2 else {}))
        rows.append({"text": pair["prompt"] + pair["rejected"]})
    return rows


def labelled(count: int, seed: int) -> list[dict]:
    """Texts with three attributes, of which some are missing."""
    random = np.random.default_rng(seed)
    rows = []
    for i, word in enumerate(words(count, seed)):
        label = random.integers(0, 5, 3).astype(float).tolist()
        if i % 3 == 0:
            label[i % 2] = supervised.MISSING
        rows.append({"text": word, "label": label})
    return rows


def read_metrics(output: Path) -> list[dict]:
    return read_jsonl(output / "metrics.jsonl")


def without_time(rows: list[dict]) -> list[dict]:
    """Metrics without those that depend on the clock."""
    return [{name: row[name] for name in row if not name.startswith("time/")} for row in rows]


# ---- help ----------------------------------------------------------------------------------------


def field_names(config: type) -> set[str]:
    """The fields of a configuration and of the configurations in it."""
    kinds = {f.name: type(f.default) for f in fields(config) if is_dataclass(f.default)}
    names = {f.name for f in fields(config)} - set(kinds)
    return names.union(*map(field_names, kinds.values()))


@pytest.mark.parametrize(
    "script",
    [*SCRIPTS, "train_rs.py", "train_ppo.py", "train_grpo.py", "train_self_reward.py", "generate.py"],
)
def test_help_shows_every_flag_with_its_text(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = fork_python(script, "--help")
    assert done.returncode == 0
    parts = re.split(r"\n  (?=--[a-z])", done.stdout)[1:]
    shown = {re.match("--([a-z0-9-]+)", part)[1]: part for part in parts}
    config = importlib.import_module(script.removesuffix(".py")).Config
    assert set(shown) == {name.replace("_", "-") for name in field_names(config)}
    common = {"model", "tp"} if script == "generate.py" else {"model", "tp", "lr", "monitor", "wandb-project"}
    assert common <= set(shown)
    for flag, part in shown.items():
        # neither its type nor its default is a text
        text = re.sub(r"\(default:.*|\{.*?\}|--\S+", "", part, flags=re.DOTALL)
        assert len(re.findall("[a-z]{2,}", text)) >= 2, f"--{flag} has no text: {part}"


@pytest.mark.parametrize("script", [*SCRIPTS, "train_rs.py", "train_ppo.py", "train_self_reward.py"])
def test_torchrun_takes_no_flag_for_its_own(script):
    """argparse takes a unique beginning of an option for that option, even behind the script's name."""
    flags = {
        f"--{name.replace('_', '-')}" for name in field_names(importlib.import_module(script[:-3]).Config)
    }
    for flag in flags:
        separator = ["--"] * (flag == "--monitor")  # it begins torchrun's --monitor-interval
        parsed = torch.distributed.run.get_args_parser().parse_args([*separator, script, flag, "1"])
        assert (parsed.training_script, parsed.training_script_args) == (script, [flag, "1"])


# ---- a run on two processes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """OUTPUT of three steps of the tiny model on two tensor parallel ranks."""
    folder = tmp_path_factory.mktemp("scripts")
    train, val = (
        write_rows(folder / "train.jsonl", chats(24, 0)),
        write_rows(folder / "val.jsonl", chats(7, 99)),
    )
    files = ("--train-data", train, "--val-data", val)
    done = torchrun(2, "train_sft.py", "--tp", 2, *files, *QUICK, "--output", folder / "out")
    assert "2 processes (tp 2 x cp 1 x pp 1 x dp 1) on CPU, gloo" in done.stdout
    assert re.search(r"first example, trained tokens in brackets:\n.*⟦[a-g]+<\|im_end\|>⟧", done.stdout, re.S)
    return folder / "out"


@pytest.mark.slow
def test_run_directory(run):
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "train_sft.py", "log.txt", "metrics.jsonl", "plots", "checkpoints", "hf"} <= names
    metrics = read_metrics(run)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert {"train/loss", "train/grad_norm", "train/lr", "time/tokens_per_s", "time/step"} <= set(metrics[1])
    assert "val/loss" in metrics[0] and "val/loss" in metrics[3]
    assert metrics[3]["val/loss"] < metrics[0]["val/loss"]
    assert json.loads((run / "config.json").read_text())["flags"]["tp"] == 2
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000003"]


@pytest.mark.slow
def test_transformers_opens_the_result_and_finds_the_same_loss(run):
    """val/loss is the mean over all trained tokens of what transformers, row by row, gives them."""
    policy, info = transformers.AutoModelForCausalLM.from_pretrained(run / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    rows, _ = load_sft([run.parent / "val.jsonl"], load_tokenizer(run / "hf"), FormatConfig())
    total, count = 0.0, 0
    for row in rows:
        ids, trained = torch.tensor(row.ids[None]).long(), torch.tensor(row.trained[1:])
        with torch.no_grad():
            logprobs = policy(ids[:, :-1]).logits[0].double().log_softmax(-1)
        total -= logprobs.gather(1, ids[0, 1:, None])[trained].sum().item()
        count += int(trained.sum())
    assert read_metrics(run)[-1]["val/loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.slow
def test_the_result_brings_tokenizer_chat_template_and_generation_config(run):
    text = transformers.AutoTokenizer.from_pretrained(run / "hf")
    start = transformers.AutoTokenizer.from_pretrained(TINY)
    messages = [{"role": "user", "content": "abc"}]
    for options in ({"tokenize": False}, {"tokenize": False, "add_generation_prompt": True}):
        assert text.apply_chat_template(messages, **options) == start.apply_chat_template(messages, **options)
    assert text("abc").input_ids == start("abc").input_ids
    assert transformers.GenerationConfig.from_pretrained(run / "hf").eos_token_id == 258
    assert (
        json.loads((run / "hf" / "prompt_format.json").read_text())["prompt_template"] == "{input} {output}"
    )


def poisoned(run: Path, directory: Path, poison: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the run's result with some weights spoilt."""
    directory.mkdir()
    for path in (run / "hf").iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    poison(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.slow
def test_a_nan_stops_the_run_and_names_step_and_rank(run, tmp_path):
    """Only the row with a z meets the NaN, so one of two ranks does; its number is in the message."""

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][ord("z")] = float("nan")

    rows = [{"input": "a", "output": "b"}] * 3 + [{"input": "zzzzzzzzzzzz", "output": "b"}]
    rows = write_rows(tmp_path / "z.jsonl", rows)  # the longest row is dealt first, to rank 0
    bad = poisoned(run, tmp_path / "bad", poison)
    flags = ("--model", bad, "--train-data", rows, "--output", tmp_path / "out")
    done = fork_ranks(2, "train_sft.py", *flags, *QUICK, check=False)
    assert done.returncode != 0
    assert re.search(
        r"rank [01] of 2 failed: step 1: the loss is nan, from the data of rank 0\n", done.stderr
    )
    assert not (tmp_path / "out" / "hf").exists() and not (tmp_path / "out" / "checkpoints").exists()


# ---- preference scripts without arguments, on two processes --------------------------------------


def run_toy(script: str, output: Path) -> list[dict]:
    """Three steps of a script on its toy task; its metrics, after a look at the run directory."""
    done = fork_ranks(2, script, "--max-steps", 3, "--output", output)
    assert "2 processes (tp 1 x cp 1 x pp 1 x dp 2) on CPU, gloo" in done.stdout
    assert "common state dict differs" not in done.stdout + done.stderr  # Megatron's warning at a save
    files = ("config.json", script, "log.txt", "metrics.jsonl", "plots/curves.png", "hf/config.json")
    assert [name for name in files if not (output / name).is_file()] == []
    assert json.loads((output / "config.json").read_text())["flags"]["max_steps"] == 3
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_00000003"]
    metrics = read_metrics(output)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    return metrics


def pairs_of(path: Path, model: Path, text_lines: bool = False) -> list[Pair]:
    """The pairs of a file, tokenised by a model's tokenizer."""
    return preferences.load_pairs([path], load_tokenizer(model), PreferenceFormat(), text_lines)[0]


def response_logprob(policy: transformers.PreTrainedModel, side: Example) -> float:
    """Log-prob of a response in nats, by transformers."""
    ids = torch.tensor(side.ids[None]).long()
    with torch.no_grad():
        logprobs = policy(ids[:, :-1]).logits[0].double().log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[torch.tensor(side.trained[1:])].sum().item()


REWARDS = ("rewards_chosen_mean", "rewards_rejected_mean", "rewards_margin_mean", "rewards_all_mean")


@pytest.mark.slow
def test_dpo_without_arguments(tmp_path):
    """Files of the run; log-probs and rewards are those of transformers."""
    metrics = run_toy("train_dpo.py", tmp_path)
    shown = r"\nprompt: .*(\n.*)+\nchosen: ⟦[a-j ]+<\|im_end\|>⟧\nrejected: ⟦[a-j ]+<\|im_end\|>⟧\n"
    assert re.search(shown, (tmp_path / "log.txt").read_text())
    names = ("loss", "preference_loss", "sft_loss", "acc", *REWARDS, "rewards_all_std", "logratio_abs_mean")
    names += ("logprobs_chosen_mean", "logprobs_rejected_mean")
    assert {f"val/{name}" for name in names} | {"step"} == set(metrics[0])
    assert {f"train/{name}" for name in (*names, "grad_norm", "lr")} <= set(metrics[1])
    assert metrics[0]["val/loss"] == metrics[1]["train/loss"] == pytest.approx(math.log(2), rel=1e-12)
    assert metrics[0]["val/logratio_abs_mean"] == 0.0 and metrics[0]["val/acc"] == 0.0  # a tie is a mistake

    policy, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pairs = pairs_of(tmp_path / "data/val_comparisons.jsonl", tmp_path / "hf")
    logprobs = np.array([[response_logprob(policy, side) for side in pair.examples] for pair in pairs])
    kept = load_file(tmp_path / "reference.safetensors")["val"].numpy()
    last = metrics[3]
    assert logprobs.mean(0) == pytest.approx(
        [last["val/logprobs_chosen_mean"], last["val/logprobs_rejected_mean"]], abs=1e-4
    )
    rewards = 0.1 * (logprobs - kept)
    wanted = [last["val/rewards_chosen_mean"], last["val/rewards_rejected_mean"]]
    assert rewards.mean(0) == pytest.approx(wanted, abs=1e-6)
    assert abs(wanted[0]) > 1e-4, "the policy has not moved"

    rows = read_jsonl(tmp_path / "samples.jsonl")
    assert [row["step"] for row in rows] == [0, 3]
    answers = {"chosen", "rejected", "reward_chosen", "reward_rejected"}
    assert [set(row) for row in rows] == [{"step", "prompt"} | answers] * 2
    first = read_jsonl(tmp_path / "data/val_comparisons.jsonl")[0]
    assert first["prompt"][0]["content"] in rows[1]["prompt"]
    for kind in ("chosen", "rejected"):
        assert rows[1][kind] == first[kind][0]["content"] + "<|im_end|>"
    assert [rows[1]["reward_chosen"], rows[1]["reward_rejected"]] == pytest.approx(rewards[0], abs=1e-6)


def scores_of(directory: Path, pairs: list[Pair]) -> np.ndarray:
    """Scores [P, 2] that transformers' AutoModelForSequenceClassification gives both sides of pairs."""
    scorer, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert scorer.config.num_labels == 1
    with torch.no_grad():
        return np.array(
            [
                [scorer(torch.tensor(side.ids[None]).long()).logits.item() for side in p.examples]
                for p in pairs
            ]
        )


def ranking_metrics(scores: np.ndarray, margins: np.ndarray) -> dict[str, float]:
    """Metrics of the scores [P, 2] of pairs with margins [P], by numpy."""
    gap = scores[:, 0] - scores[:, 1]
    return {
        "loss": np.log1p(np.exp(margins - gap)).mean(),
        "acc": (gap > 0).mean(),
        "rewards_chosen_mean": scores[:, 0].mean(),
        "rewards_rejected_mean": scores[:, 1].mean(),
        "rewards_margin_mean": gap.mean(),
        "rewards_all_mean": scores.mean(),
        "rewards_all_std": scores.std(),
    }


def named(metrics: dict[str, float], group: str, names: dict[str, float]) -> dict[str, float]:
    """Metrics `group/name` under their names alone."""
    return {name: metrics[f"{group}/{name}"] for name in names}


@pytest.mark.slow
def test_rm_without_arguments(tmp_path):
    """Files of the run; transformers gives the validation pairs the same scores."""
    metrics = run_toy("train_rm.py", tmp_path)
    shown = r"its score is read at the token in brackets:\n(.*\n)+[a-j ]+⟦<\|im_end\|>⟧\n"
    assert re.search(shown, (tmp_path / "log.txt").read_text())
    assert read_jsonl(tmp_path / "samples.jsonl") == []
    pairs = pairs_of(tmp_path / "data/val_comparisons.jsonl", tmp_path / "hf")
    wanted = ranking_metrics(scores_of(tmp_path / "hf", pairs), np.zeros(len(pairs)))
    assert {f"val/{name}" for name in wanted} | {"step"} == set(metrics[0])
    assert {f"train/{name}" for name in (*wanted, "grad_norm", "lr")} <= set(metrics[1])
    assert named(metrics[3], "val", wanted) == pytest.approx(wanted, abs=1e-5)
    assert metrics[3]["val/loss"] != metrics[0]["val/loss"]
    statistics = json.loads((tmp_path / "hf" / "reward_statistics.json").read_text())
    assert (statistics.pop("texts"), statistics.pop("data")) == (2 * len(pairs), "val")
    assert statistics.pop("ends") == {"258": 2 * len(pairs)}
    expected = {"mean": wanted["rewards_all_mean"], "std": wanted["rewards_all_std"]}
    assert statistics == pytest.approx(expected, abs=1e-5)


# ---- other ways to run ---------------------------------------------------------------------------


@pytest.mark.slow
def test_bf16_without_torchrun_with_template_rows_and_wandb_offline(tmp_path):
    rows = [{"question": word, "answer": word[::-1]} for word in words(24, 0)]
    rows = write_rows(tmp_path / "rows.jsonl", rows)
    formats = ("--prompt-template", "Q: {question}\\nA: {answer}", "--truncation-field", "question")
    flags = ("--train-data", rows, "--precision", "bf16", "--wandb-project", "test", *formats)
    done = python("train_sft.py", *flags, *QUICK, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 processes" in done.stdout and "bfloat16" in done.stdout
    assert re.search(r"Q: [a-g]+↵\nA:⟦ [a-g]+<\|im_end\|>⟧", done.stdout)
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "out")]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))
    exported = load_file(tmp_path / "out" / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    saved = json.loads((tmp_path / "out" / "hf" / "prompt_format.json").read_text())
    assert saved["prompt_template"] == "Q: {question}\\nA: {answer}"


@pytest.mark.slow
def test_conversations_rows(attempts):
    assert [row["step"] for row in read_metrics(finished(attempts, "conversations"))] == [1, 2, 3]


# ---- DPO in other ways ---------------------------------------------------------------------------


LN2 = math.log(2)
CENTERING = 0.5  # --center-rewards-coef of one run
GAP = 2.0  # chosen_reward - rejected_reward of every row
AT_START = {  # each loss where policy and reference are one, with beta 0.1 and GAP, by hand
    "dpo": LN2,
    "cdpo": LN2,
    "robust": LN2,
    "dpop": LN2,
    "ipo": 25.0,  # (0 - 1 / (2 beta))^2
    "scale": GAP * LN2,
    "rpo_bwd_kl": GAP / (1 + math.exp(-GAP))
    - math.log1p(math.exp(GAP))
    + LN2,  # s(g) g - log(1 + e^g) + ln 2
    "rpo_fwd_kl": math.log1p(math.exp(GAP)) - GAP / 2 - LN2,  # - ln 2 - (log s(g) + log s(-g)) / 2
    "rpo_sq": GAP**2,
    "hinge": 1.0,
    "kto_pair": 0.5,
    "apo_zero": 1.0,
    "sppo_hard": 50.0,  # twice (1 / (2 beta))^2
    "exo_pair": -LN2 - (math.log(0.999) + math.log(0.001)) / 2,
    "nca_pair": 2 * LN2,
}


def test_every_loss_is_tested():
    assert set(AT_START) | set(train_dpo.REFERENCE_FREE) == set(train_dpo.LOSSES)


@pytest.mark.slow
@pytest.mark.parametrize("loss", train_dpo.LOSSES)
def test_every_loss_trains(loss, attempts):
    """Its value before the first update is that worked by hand, and the update lowers what it trains."""
    output = finished(attempts, f"loss {loss}")
    rows = read_metrics(output)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    for row in rows[1:]:
        sft = row["train/sft_loss"] if loss == "orpo" else 0.0
        assert row["train/loss"] == pytest.approx(row["train/preference_loss"] + sft, rel=1e-12)
    if loss in AT_START:
        start = [rows[0]["val/loss"], rows[1]["train/loss"]]
        assert start == pytest.approx([AT_START[loss]] * 2, rel=1e-9)
    assert rows[2]["val/loss"] < rows[0]["val/loss"]
    assert (output / "reference.safetensors").exists() == (loss in AT_START)


@pytest.mark.slow
def test_sft_term_per_token_beside_a_loss_of_sums(attempts):
    """--sft-average-logprobs: the mean over pairs of that over the chosen one's tokens, by transformers."""
    output = finished(attempts, "sft average")
    policy = transformers.AutoModelForCausalLM.from_pretrained(output / "hf")
    pairs = pairs_of(output.parent / "val.jsonl", output / "hf")
    chosen = [(response_logprob(policy, pair.examples[0]), pair.examples[0].trained.sum()) for pair in pairs]
    last = read_metrics(output)[2]
    assert last["val/sft_loss"] == pytest.approx(
        -np.mean([total / count for total, count in chosen]), abs=1e-4
    )
    assert last["val/logprobs_chosen_mean"] == pytest.approx(np.mean([x for x, _ in chosen]), abs=1e-3)
    assert last["val/loss"] == pytest.approx(last["val/preference_loss"] + 0.5 * last["val/sft_loss"])


@pytest.mark.slow
def test_both_ways_to_the_reference_are_equal(attempts):
    """Bit for bit in the first epoch, 6 steps; later ones pack pairs otherwise than the precomputing pass."""
    precomputed, swapped = (
        without_time(read_metrics(finished(attempts, name))) for name in ("precompute", "swap")
    )
    assert [row["step"] for row in precomputed] == list(range(13))
    assert precomputed[:7] == swapped[:7]
    assert precomputed[6]["train/logratio_abs_mean"] > 0.1
    for row, wanted in zip(precomputed[7:], swapped[7:], strict=True):
        assert row == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert not (attempts["swap"]["output"] / "reference.safetensors").exists()


@pytest.mark.slow
def test_kl_of_kto_is_that_of_the_whole_step(attempts):
    """So micro-batches of one pair change nothing, neither in training nor in validation."""
    whole, single = (
        without_time(read_metrics(finished(attempts, name))) for name in ("loss kto_pair", "kto single")
    )
    for row, wanted in zip(single, whole, strict=True):
        assert row == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    assert whole[2]["train/rewards_chosen_mean"] > 1e-3, "the KL was still 0"


@pytest.mark.slow
def test_a_wrong_reference_is_refused_before_the_first_update(attempts):
    message = attempts["wrong reference"]
    assert (
        "before the first update the policy is the reference, but their log-probs differ" in message["error"]
    )
    assert re.search(r"by 0\.00(1|099)\d* nats a sequence", message["error"])
    assert [row["step"] for row in read_metrics(message["output"])] == [0]
    assert not (message["output"] / "checkpoints").exists() and not (message["output"] / "hf").exists()
    [_, first] = read_metrics(finished(attempts, "forgiven reference"))
    assert first["train/logratio_abs_mean"] == pytest.approx(1e-3, rel=0.01)


# ---- RM in other ways ----------------------------------------------------------------------------


@pytest.mark.slow
def test_several_validation_sets_and_one_test(attempts):
    """Every --val-data file in each validation, --test-data once after the last step, with its interval."""
    output = finished(attempts, "rm")
    *steps, final = read_metrics(output)
    names = set(ranking_metrics(np.zeros((1, 2)), np.zeros(1)))
    val = {f"{group}/{name}" for group in ("val", "val/other") for name in names}
    assert [row["step"] for row in steps] == [0, 1, 2, 3]
    assert set(steps[0]) == val | {"step"} and val <= set(steps[3])
    assert not any(name.startswith("test") for row in steps for name in row)
    assert set(final) == {f"test/{name}" for name in names} | {"step"} and final["step"] == 3
    for group, row in (("val", steps[3]), ("val/other", steps[3]), ("test", final)):
        pairs = pairs_of(output.parent / f"{group.split('/')[-1]}.jsonl", output / "hf")
        wanted = ranking_metrics(scores_of(output / "hf", pairs), np.zeros(len(pairs)))
        assert named(row, group, wanted) == pytest.approx(wanted, abs=1e-4)
    low, high = interval(final["test/acc"], 11)
    line = f"test: accuracy {final['test/acc']:.3f} (95 % interval {low:.3f} to {high:.3f}) on 11 pairs"
    assert (output / "log.txt").read_text().count(line) == 1


def interval(share: float, count: int) -> list[float]:
    """The two p that are 1.96 standard errors from the share: (share - p)^2 = 1.96^2 p (1 - p) / count."""
    z2 = 1.96**2 / count
    return sorted(np.roots([1 + z2, -2 * share - z2, share**2]).real)


@pytest.mark.slow
def test_a_reward_model_goes_on_with_its_head(attempts):
    """With --model a reward model, the first validation is the earlier run's last."""
    before = read_metrics(finished(attempts, "rm"))[3]
    after = read_metrics(finished(attempts, "rm again"))[0]
    val = [name for name in after if name.startswith("val/")]
    assert {name: after[name] for name in val} == {name: before[name] for name in val}
    assert "the head is that of the model" in (attempts["rm again"]["output"] / "log.txt").read_text()
    assert "the head starts at random" in (attempts["rm"]["output"] / "log.txt").read_text()


@pytest.mark.slow
def test_statistics_of_training_rows(attempts):
    """Statistics without validation rows; of 3 and 2 scores that transformers gives to labelled texts."""
    output = finished(attempts, "rm alone")
    pairs = pairs_of(output.parent / "pairs.jsonl", output / "hf")
    scores = scores_of(output / "hf", pairs)
    expected = pytest.approx({"mean": scores.mean(), "std": scores.std()}, abs=1e-5)
    statistics = json.loads((output / "hf" / "reward_statistics.json").read_text())
    assert statistics.pop("ends") == {"258": 48}
    assert (statistics.pop("texts"), statistics.pop("data")) == (48, "train") and statistics == expected
    assert scores.std() > 1e-2


@pytest.mark.slow
def test_text_lines_with_margins_and_centering(attempts):
    """Chosen and rejected lines in turn; a margin counts in the loss and not in the rewards."""
    output = finished(attempts, "rm text lines")
    pairs = pairs_of(output.parent / "lines.jsonl", output / "hf", text_lines=True)
    assert [pair.margin for pair in pairs] == [0.0, 0.75] * 12
    scores = scores_of(output / "hf", pairs)
    wanted = ranking_metrics(scores, np.array([0.0, 0.75] * 12))
    assert wanted["loss"] > ranking_metrics(scores, np.zeros(24))["loss"] + 0.01
    wanted["centering_loss"] = np.square(scores.sum(1)).mean()
    assert wanted["centering_loss"] > 1e-2
    wanted["loss"] += CENTERING * wanted["centering_loss"]
    assert named(read_metrics(output)[-1], "val", wanted) == pytest.approx(wanted, abs=1e-4)


def head_in_checkpoint(output: Path) -> Tensor:
    """The head of a reward model [A, H] as the newest checkpoint holds it."""
    reader = dcp.FileSystemReader(checkpoint.newest(output / "checkpoints"))
    entry = reader.read_metadata().state_dict_metadata["score.weight"]
    state = {"score.weight": torch.empty(entry.size, dtype=entry.properties.dtype)}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state["score.weight"]


@pytest.mark.slow
def test_regression_on_attributes_exports_their_weighted_sum(attempts):
    """val/loss is the mean square over the labels that are not missing, by transformers and numpy."""
    output = finished(attempts, "rm regression")
    tokenizer = load_tokenizer(output / "hf")
    path = output.parent / "labels.jsonl"
    texts, _ = preferences.load_labelled([path], tokenizer, PreferenceFormat(), 3)
    labels = np.array([text.label for text in texts])
    scorer = transformers.AutoModelForSequenceClassification.from_pretrained(output / "hf")
    head, attributes, scores = head_in_checkpoint(output), [], []
    assert head.shape == (3, 128)
    for text in texts:
        ids = torch.tensor(text.example.ids[None, :-1]).long()  # the last id is not read
        with torch.no_grad():
            attributes.append((scorer.model(ids).last_hidden_state[0, -1] @ head.T).numpy())
            scores.append(scorer(ids).logits.item())
    attributes = np.array(attributes)
    assert np.array(scores) == pytest.approx(attributes @ [0.5, 0.3, 0.2], abs=1e-5)
    assert np.abs(scores).max() > 1e-2
    errors = (attributes - labels)[labels != supervised.MISSING]
    assert errors.size == 3 * 24 - 8
    metrics = read_metrics(output)
    assert metrics[3]["val/loss"] == pytest.approx(np.square(errors).mean(), rel=1e-4)
    assert metrics[3]["val/loss"] < metrics[0]["val/loss"]


# ---- mistakes ------------------------------------------------------------------------------------


MISTAKES = {  # name: flags, the words of the message; files in capitals are those that the fixture writes
    "unknown": (("--learning-rate", "1e-5"), r"Unrecognized options: --learning-rate"),
    "tp": (
        ("--tp", "3"),
        r"--tp 3 x --pp 1 x --cp 1 = 3 does not divide the 1 processes: start a multiple of 3",
    ),
    "sequence": (("--sequence-parallel",), r"--sequence-parallel has no effect with --tp 1"),
    "context": (
        ("--max-seq-len", "4096"),
        r"--max-seq-len 4096 is beyond the model's context of 1024 tokens",
    ),
    "budget": (
        ("--micro-batch-tokens", "512"),
        r"--max-seq-len 1024 is above --micro-batch-tokens 512: raise",
    ),
    "time": (("--max-time", "90"), r"--max-time '90' is not of the form HH:MM:SS"),
    "model": (("--model", "no/such/model"), r"--model no/such/model: no config.json there"),
    "choice": (("--precision", "fp16"), r"invalid choice 'fp16' for argument '--precision'"),
    "no training data": (("--val-data", "GOOD"), r"--val-data without --train-data: give both"),
    "few rows": (("--train-data", "GOOD"), r"--train-data has 24 usable rows.*lower --global-batch-size 32"),
    "no file": (("--train-data", "missing.jsonl"), r"missing.jsonl: cannot be read"),
    "bad row": (("--train-data", "GOOD", "BAD"), r"bad.jsonl:2: not valid JSON"),
    "tail": (
        ("--train-data", "GOOD", "--global-batch-size", "4", "--constant-steps", "9"),
        r"--warmup-steps 10 and --constant-steps 9 leave no step of 6",
    ),
    "rates": (
        ("--train-data", "GOOD", "--global-batch-size", "4", "--lr", "1e-7"),
        r"--min-lr 1e-06 is above --lr 1e-07",
    ),
    "monitor": (
        ("--train-data", "GOOD", "--val-data", "GOOD", "--global-batch-size", "4", "--monitor", "val/nope"),
        r"--monitor val/nope is no metric of this run; it has val/loss",
    ),
    "training monitor": (
        ("--train-data", "GOOD", "--global-batch-size", "4", "--monitor", "train/nope"),
        r"--monitor train/nope is no metric of this run; it has train/grad_norm, train/loss, train/lr",
    ),
    "template": (
        ("--prompt-template", "{a}{b} end"),
        r"--prompt-template.*must end with the field of the response",
    ),
    "wandb": (("--wandb-name", "x"), r"--wandb-name x needs --wandb-project"),
}


DPO_MISTAKES = {
    "no rewards": (
        ("--loss", "rpo_sq", "--train-data", "OTHER"),
        r"--loss rpo_sq needs pairs with 'chosen_reward' and 'rejected_reward': --train-data has none",
    ),
    "reference": (("--loss", "simpo", "--reference", "swap"), r"--loss simpo has no reference"),
    "average": (
        ("--loss", "orpo", "--average-logprobs", "False"),
        r"--loss orpo has no reference and is defined on log-probs per token: leave out",
    ),
    "dpo without training data": (("--val-data", "PAIRS"), r"--val-data without --train-data"),
    "dpo budget": (
        ("--max-seq-len", "1024", "--micro-batch-tokens", "2047"),
        r"--max-seq-len 1024, of which a row has 2, is above --micro-batch-tokens 2047",
    ),
    "dpo text lines": (("--train-data", "LINES"), r"lines.jsonl:1: 'text' does not say where the response"),
    "dpo of a reward model": (
        ("--model", "RM", "--train-data", "PAIRS", "--global-batch-size", "4"),
        r"is a reward model \(\*ForSequenceClassification\) and predicts no tokens: give a language model",
    ),
}
RM_MISTAKES = {
    "no labels": (("--loss", "regression"), r"--loss regression needs --train-data"),
    "rm without training data": (("--val-data", "PAIRS"), r"--val-data without --train-data"),
    "rm budget": (
        ("--max-seq-len", "1024", "--micro-batch-tokens", "2047"),
        r"--max-seq-len 1024, of which a row has 2, is above --micro-batch-tokens 2047",
    ),
    "number of labels": (
        ("--loss", "regression", "--num-attributes", "3", "--train-data", "LABELS", "--model", "RM"),
        r"--model .* has 1 labels, --num-attributes says 3",
    ),
    "weights": (
        "--loss regression --num-attributes 3 --attribute-weights 0.5 0.5 --train-data LABELS".split(),
        r"--attribute-weights has 2 numbers for --num-attributes 3",
    ),
    "same names": (
        ("--train-data", "PAIRS", "--val-data", "VAL", "OTHER", "OTHER", "--global-batch-size", "4"),
        r"--val-data: two files of one name",
    ),
}
REFUSED = {
    **{name: ("train_sft.py", *mistake) for name, mistake in MISTAKES.items()},
    **{name: ("train_dpo.py", *mistake) for name, mistake in DPO_MISTAKES.items()},
    **{name: ("train_rm.py", *mistake) for name, mistake in RM_MISTAKES.items()},
}
SHORT = " ".join(map(str, QUICK))
ON_PAIRS = "--global-batch-size 4 --warmup-steps 1 --lr 1e-3 --train-data PAIRS --val-data VAL"
GOOD_RUNS = {  # name: command that runs to its end; RM is the result of the one so named
    "conversations": f"train_sft.py --train-data CONVERSATIONS {SHORT}",
    **{f"loss {loss}": f"train_dpo.py {ON_PAIRS} --loss {loss} --max-steps 2" for loss in train_dpo.LOSSES},
    "sft average": f"train_dpo.py {ON_PAIRS} --max-steps 2 --sft-weight 0.5 --sft-average-logprobs True",
    "kto single": f"train_dpo.py {ON_PAIRS} --loss kto_pair --max-steps 2 --micro-batch-size 1",
    **{
        way: f"train_dpo.py {ON_PAIRS} --reference {way} --max-epochs 2 --micro-batch-size 2 --val-interval 3"
        for way in ("precompute", "swap")
    },
    "wrong reference": f"wrong-reference train_dpo.py {ON_PAIRS}",
    "forgiven reference": f"wrong-reference train_dpo.py {ON_PAIRS} --max-steps 1 --audit-start 0.01",
    "rm": f"train_rm.py {ON_PAIRS} OTHER --test-data TEST --max-steps 3",
    "rm again": f"train_rm.py {ON_PAIRS} OTHER --model RM --max-steps 1",
    "rm text lines": f"train_rm.py --train-data LINES --val-data LINES {SHORT} "
    f"--center-rewards-coef {CENTERING}",
    "rm alone": f"train_rm.py --train-data PAIRS {SHORT}",
    "rm regression": (
        f"train_rm.py --train-data LABELS --val-data LABELS {SHORT} --loss regression --num-attributes 3 "
        "--attribute-weights 0.5 0.3 0.2"
    ),
}


def write_data(folder: Path) -> dict[str, Path]:
    """The files that commands name in capitals, and the reward model that one of them makes."""
    bad = folder / "bad.jsonl"
    bad.write_text('{"input": "a", "output": "b"}\n{"input": \n')
    rows = {
        "good": chats(24, 0),
        "conversations": conversations(24),
        "pairs": comparisons(24, 0, chosen_reward=3.0, rejected_reward=3.0 - GAP),
        "val": comparisons(7, 1, chosen_reward=3.0, rejected_reward=3.0 - GAP),
        "other": comparisons(9, 2),
        "test": comparisons(11, 3),
        "lines": text_lines(24, 4, margin=0.75),
        "labels": labelled(24, 5),
    }
    files = {name.upper(): write_rows(folder / f"{name}.jsonl", some) for name, some in rows.items()}
    return files | {"BAD": bad, "RM": folder / "out rm" / "hf"}


@pytest.fixture(scope="module")
def attempts(tmp_path_factory) -> dict[str, dict]:
    """Message of each command of GOOD_RUNS and REFUSED, all in one process that imports once."""
    folder = tmp_path_factory.mktemp("attempts")
    files = write_data(folder)
    commands = {name: command.split() for name, command in GOOD_RUNS.items()}
    commands |= {name: [script, *flags] for name, (script, flags, _) in REFUSED.items()}
    outputs = {name: folder / f"out {name}" for name in commands}
    commands = [
        [*(str(files.get(word, word)) for word in command), "--output", str(outputs[name])]
        for name, command in commands.items()
    ]
    (folder / "commands.json").write_text(json.dumps(commands))
    fork_python("tests/workers/scripts.py", folder)
    errors = json.loads((folder / "errors.json").read_text())
    return {
        name: {"error": error, "output": output}
        for (name, output), error in zip(outputs.items(), errors, strict=True)
    }


def finished(attempts: dict[str, dict], name: str) -> Path:
    """OUTPUT of a command that must have run to its end."""
    assert attempts[name]["error"] is None, attempts[name]["error"]
    return attempts[name]["output"]


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_refused_with_flag_and_rule(attempts, name):
    error = attempts[name]["error"]
    assert error is not None, "the command ran"
    assert re.search(REFUSED[name][2], error), error
    assert not (attempts[name]["output"] / "checkpoints").exists()
