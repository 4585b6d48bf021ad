"""Scripts with adapters: what they log, write, continue and refuse."""

import json
from pathlib import Path

import pytest
import torch
import tyro
from safetensors.torch import load_file

import train_grpo
from align.data import toy
from align.distributed import parallel
from align.distributed.parallel import ParallelConfig
from align.errors import UserError
from align.generation.generator import RolloutConfig, check_rollout
from align.generation.sampling import SamplingConfig
from align.model import architecture
from align.model.config import ModelConfig
from align.model.lora import LoraConfig
from align.training import checkpoint
from tests.support.files import TINY, reproducible_metrics
from tests.support.launch import fork_ranks
from tests.support.models import random_tiny
from tests.support.resume import SELF_REWARD, command
from tests.support.seeded_bugs import Bug, seeded
from tools import check, plan, prepare_model

pytestmark = pytest.mark.slow


def words(folder: Path, name: str, script: str, *more: object) -> list[str]:
    """A short run of a script on the toy task, from the base in bf16."""
    kind = "" if script == "sft" else "_comparisons"
    common = (
        f"train_{script}.py --model {folder}/base --precision bf16 --output {folder}/{name} --max-steps 8 "
        f"--train-data {folder}/train{kind}.jsonl --val-data {folder}/val{kind}.jsonl --max-seq-len 64 "
        "--global-batch-size 8 --warmup-steps 0 --lr 1e-2 --min-lr 1e-2"
    )
    return [*common.split(), *map(str, more)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of runs, of the base model and of their data."""
    folder = tmp_path_factory.mktemp("lora")
    toy.write(folder, num_train=128, num_val=8)
    toy.write_comparisons(folder, num_train=128, num_val=8)
    random_tiny(folder / "base", seed=1)
    random_tiny(folder / "other", seed=2)
    rank = ("--lora-rank", 8)
    commands = [
        words(folder, "sft", "sft", *rank, "--record", 4),
        words(folder, "dpo", "dpo", *rank),
        words(folder, "more", "dpo", "--adapter", folder / "sft/adapter"),
        words(folder, "rm", "rm", *rank),
        words(folder, "more_rm", "rm", "--adapter", folder / "rm/adapter"),
    ]
    fork_ranks(1, "tests/workers/resume.py", json.dumps(commands))
    return folder


def log(runs: Path, name: str) -> str:
    return (runs / name / "log.txt").read_text()


def test_bf16_trains_and_says_what(runs):
    losses = [row["train/loss"] for row in reproducible_metrics(runs / "sft")[1:]]
    assert losses[-1] < losses[0] - 0.5, losses
    # per layer and rank: q 256, k and v 192, o 256, gate, up and down 480; 4 layers, rank 8
    assert (
        "LoRA of rank 8, scale 2, on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj: "
        in log(runs, "sft")
    )
    assert f"{4 * 8 * (256 + 2 * 192 + 256 + 3 * 480):,} trained weights" in log(runs, "sft")
    assert "the adapter is in" in log(runs, "sft")


def test_a_record_has_the_gradients_of_adapters(runs):
    gradients = load_file(runs / "sft/records/step_000005/gradients_policy.safetensors")
    assert gradients.keys() == load_file(runs / "sft/adapter/adapter_model.safetensors").keys()
    assert all(gradient.any() for gradient in gradients.values())


def test_dpo_starts_at_its_reference_unless_an_adapter_does(runs):
    first = reproducible_metrics(runs / "dpo")[1]
    assert first["train/logratio_abs_mean"] == 0.0
    assert first["train/preference_loss"] == pytest.approx(0.6931471805599453, rel=1e-12)
    assert reproducible_metrics(runs / "more")[1]["train/logratio_abs_mean"] > 0.1
    assert not list(runs.glob("*/reference.safetensors"))


def test_a_reward_model_continues_with_its_head(runs):
    assert "the head starts at random" in log(runs, "rm")
    assert "the head is that of the adapter" in log(runs, "more_rm")
    last = reproducible_metrics(runs / "rm")[-1]["val/loss"]
    assert reproducible_metrics(runs / "more_rm")[0]["val/loss"] == pytest.approx(last, rel=1e-6)


@pytest.mark.parametrize("name", ["sft", "more", "rm"])
def test_merge_and_export_are_the_runs_own_model(runs, name, tmp_path):
    expected = load_file(runs / name / "hf/model.safetensors")
    prepare_model.merge(runs / "base", runs / name / "adapter", tmp_path / "merged")
    path = checkpoint.newest(runs / name / "checkpoints")
    prepare_model.export(path, tmp_path / "exported")
    merged = load_file(tmp_path / "merged/model.safetensors")
    exported = load_file(tmp_path / "exported/model.safetensors")
    assert expected.keys() == exported.keys() == merged.keys()
    assert all(torch.equal(exported[key], tensor) for key, tensor in expected.items())
    # the base is stored in fp32, the run's copy of it in bf16
    assert all(torch.equal(merged[key].bfloat16(), x) for key, x in expected.items() if "norm" in key)
    for key, tensor in expected.items():
        torch.testing.assert_close(merged[key], tensor.float(), rtol=2**-7, atol=1e-2)
    names = {file.name for file in (runs / name / "hf").iterdir()} - {"reward_statistics.json"}
    assert {file.name for file in (tmp_path / "exported").iterdir()} == names


def test_another_base_is_refused(runs):
    run = words(runs, "sft", "sft", "--lora-rank", 8, "--record", 4)
    run[run.index("--model") + 1] = str(runs / "other")
    done = fork_ranks(1, *run, "--resume-with-changes", check=False)
    assert done.returncode == 2
    assert "other is not the model that this run began with, which is its base" in done.stderr


# ---- scripts that sample -------------------------------------------------------------------------

LAYOUTS = {  # at two processes, by name of the run
    "grpo-dp": "train_grpo.py",
    "grpo-tp": "train_grpo.py --tp 2 --sequence-parallel",  # a copy without tensor parallelism samples
    "grpo-same": "train_grpo.py --tp 2 --rollout-layout same",
    "grpo-pp": "train_grpo.py --pp 2 --rollout-tp 2",
    "ppo-tp": "train_ppo.py --tp 2 --rollout-layout same",
    "ppo-pp": "train_ppo.py --pp 2 --vp 2",
    "rs-tp": "train_rs.py --tp 2",
    "rs-pp": "train_rs.py --pp 2 --rollout-layout same",
    "self_reward-dp": "train_self_reward.py",
    "self_reward-tp": "train_self_reward.py --tp 2 --sequence-parallel",
    "self_reward-pp": "train_self_reward.py --pp 2 --rollout-layout same",
}
SELF_REWARDING = f"{SELF_REWARD} --steps-per-iteration 2 --rollout-ahead 1"
SAMPLING = "--max-steps 4 --lora-rank 4 --lr 1e-2 --min-lr 1e-2 --warmup-steps 0 --save-interval 0"
KL = "--kl-coef 0.1"


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory, toy_judge) -> Path:
    """Runs of each script by one process, of LAYOUTS; of two offloaded; of GRPO stopped and continued."""
    folder = tmp_path_factory.mktemp("rollouts")
    toy.write(folder, num_train=80, num_val=8)

    def run(name: str, words: str, *more: str) -> list[str]:
        script, *flags = words.split()
        own = {"train_rs.py": "", "train_self_reward.py": SELF_REWARDING.format(judge=toy_judge)}
        words = own.get(script, KL).split()
        return command(script, folder, folder / name, *words, *SAMPLING.split(), *flags, *more)

    alone = [run(name, f"train_{name}.py") for name in ("grpo", "ppo", "rs", "self_reward")]
    alone += [run(f"{name}-offloaded", f"train_{name}.py --offload on") for name in ("grpo", "self_reward")]
    alone += [run("grpo-stopped", "train_grpo.py", *words) for words in (["--stop-after", "2"], [])]
    fork_ranks(1, "tests/workers/resume.py", json.dumps(alone))
    fork_ranks(2, "tests/workers/resume.py", json.dumps([run(*item) for item in LAYOUTS.items()]))
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_rollouts_are_equal_in_every_layout(rollouts, name):
    """The same responses, and losses and KL to rounding; the sampler has the policy's log-probs to 1e-5."""
    rows, expected = (reproducible_metrics(rollouts / run)[1:] for run in (name, name.partition("-")[0]))
    for row, wanted in zip(rows, expected, strict=True):
        assert row["audit/logprob_error_max"] < 1e-5
        same = "train/judge_mean" if name.startswith("self_reward") else "train_rollouts/rewards"
        assert row[same] == wanted[same]
        names = ("train_optim/loss", "train_optim/grad_norm", "train_rollouts/init_policy_kl")
        names += ("train/loss", "train/grad_norm", "train/logratio_abs_mean")
        for metric in (metric for metric in names if metric in wanted):
            assert row[metric] == pytest.approx(wanted[metric], rel=1e-4, abs=1e-6), metric


def test_the_reference_of_a_rollout_is_the_base(rollouts):
    for name in ("grpo", "ppo"):
        kl = [row["train_rollouts/init_policy_kl"] for row in reproducible_metrics(rollouts / name)[1:]]
        assert kl[0] == 0.0 and all(abs(value) > 1e-6 for value in kl[1:])
        assert (rollouts / name / "adapter/adapter_model.safetensors").exists()


def test_the_reference_of_self_rewarding_is_the_start_of_its_iteration(rollouts):
    """Two iterations of two steps: at their first steps the policy is the reference, to the last bit."""
    ratios = [row["train/logratio_abs_mean"] for row in reproducible_metrics(rollouts / "self_reward")[1:]]
    assert ratios[0] == ratios[2] == 0.0 and min(ratios[1], ratios[3]) > 1e-4, ratios


@pytest.mark.parametrize("name", ["grpo-offloaded", "grpo-stopped", "self_reward-offloaded"])
def test_offloaded_and_continued_rollouts_are_the_same(rollouts, name):
    whole = name.partition("-")[0]
    assert reproducible_metrics(rollouts / name) == reproducible_metrics(rollouts / whole)
    files = [rollouts / run / "adapter/adapter_model.safetensors" for run in (name, whole)]
    first, second = map(load_file, files)
    assert first.keys() == second.keys() and all(torch.equal(x, second[key]) for key, x in first.items())


@pytest.mark.parametrize("module", ["qkv", "out", "gate_up", "down"])
def test_the_audit_finds_a_sampler_without_an_adapter(rollouts, tmp_path, module):
    bug: Bug = {
        "align.generation.inference.adapted": [
            ("layer.adapters.get(name)", f"layer.adapters.get(name.replace('{module}', ''))")
        ]
    }
    words = command("train_grpo.py", rollouts, tmp_path / "run", *SAMPLING.split(), *KL.split())[1:]
    config = tyro.cli(train_grpo.Config, args=words, config=(tyro.conf.OmitArgPrefixes,))
    with parallel.start(ParallelConfig()), seeded(bug), pytest.raises(RuntimeError, match="audit"):
        train_grpo.main(config)


def test_tensorrt_has_no_adapters(capsys):
    adapters = LoraConfig(lora_rank=4).of_model(arch := architecture.read_config(TINY))
    config = RolloutConfig(generate_with="trtllm"), SamplingConfig(), ModelConfig(), ParallelConfig()
    with pytest.raises(UserError, match="--generate-with trtllm: its engine has no adapters"):
        check_rollout(arch, *config, adapters)


# ---- refusals ------------------------------------------------------------------------------------


def test_generate_refuses_a_checkpoint_of_adapters(runs):
    path = checkpoint.newest(runs / "sft/checkpoints")
    done = fork_ranks(1, "generate.py", "--model", path, "--prompt", "Hi", check=False)
    assert done.returncode == 2
    assert "holds adapters only: `python -m tools.prepare_model export` merges them" in done.stderr


def test_a_random_base_is_not_merged(runs, tmp_path):
    with pytest.raises(UserError, match="is random: merge into a model with weights"):
        prepare_model.merge(TINY, runs / "sft/adapter", tmp_path / "merged")


def test_check_refuses_adapters(tmp_path):
    with pytest.raises(UserError, match="the reference has no adapters"):
        check.check("train_sft", ["--lora-rank", "4"], 1, tmp_path)


def test_plan_refuses_adapters(capsys):
    for flags in (["--lora-rank", "8"], ["--adapter", "a"]):
        with pytest.raises(SystemExit):
            plan.main(["train_sft.py", *flags])
        assert f"{flags[0]}" in (message := capsys.readouterr().err) and "docs/lora.md" in message
