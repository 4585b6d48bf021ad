"""PPO: what is refused, the advantages, the price of KL, and what a run logs, does and leaves."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file

import train_grpo
import train_ppo
from align.data import toy
from align.data.packing import BatchConfig
from align.distributed.parallel import ParallelConfig
from align.errors import UserError
from align.generation.rollout import TruncationConfig
from align.generation.sampling import SamplingConfig
from align.losses import rl
from align.losses.statistics import moments, per_response
from align.rewards.sources import RewardConfig
from align.training import checkpoint
from align.training.kl_penalty import KlConfig
from align.training.minibatches import Minibatches, draw
from align.training.optim import OptimConfig
from tests.support.files import read_jsonl, without_times
from tests.support.launch import fork_ranks
from tests.support.models import save_reward_model
from tests.support.tensors import f64

DATA = {"train_data": (Path("rows.jsonl"),)}
GROUPS = {"advantages": "grpo", "samples_per_prompt": 4}
WHOLE_DISTRIBUTION = (
    ": PPO's log-probs are those of the whole distribution at --temperature; tokens drawn from another one "
    "would be weighed wrongly"
)


def Config(**flags: object) -> train_ppo.Config | train_grpo.Config:
    """Flags of train_grpo.py if --advantages is among them, else of train_ppo.py."""
    return (train_grpo if "advantages" in flags else train_ppo).Config(**flags)


# ---- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"prompts_per_step": 6, "samples_per_prompt": 3, "batch": BatchConfig(global_batch_size=4)},
            "a step has 18 responses (--prompts-per-step x --samples-per-prompt), which is no multiple of "
            "--global-batch-size 4, the responses of an update",
        ),
        (DATA, "no reward: give --reward-model DIR or --reward-fn module:function"),
        (
            {"val_data": (Path("rows.jsonl"),)},
            "--val-data without --train-data: give both, or none for the toy task",
        ),
        (
            {"advantages": "grpo", "samples_per_prompt": 1, "prompts_per_step": 32},
            "--advantages grpo compares the responses to a prompt: give --samples-per-prompt 2 or more",
        ),
        (
            {"advantages": "rloo", "samples_per_prompt": 1, "prompts_per_step": 32},
            "--advantages rloo compares the responses to a prompt: give --samples-per-prompt 2 or more",
        ),
        (
            {"kl": KlConfig(kl_in="loss", kl="k1")},
            "--kl k1 in the loss: its gradient averages to 0; give --kl k2 or k3",
        ),
        (
            GROUPS | {"kl": KlConfig(kl="k1")},
            "--kl k1 in the loss: its gradient averages to 0; give --kl k2 or k3",
        ),
        (
            {"kl": KlConfig(kl_target=0.1, kl_horizon=12.8)},
            "--kl-horizon 12.8 must be above a fifth of the 64 responses of a step: --kl-coef could fall "
            "below 0",
        ),
        ({"sampling": SamplingConfig(top_k=5)}, f"--top-k{WHOLE_DISTRIBUTION}"),
        ({"sampling": SamplingConfig(top_p=0.9)}, f"--top-p{WHOLE_DISTRIBUTION}"),
        ({"sampling": SamplingConfig(min_p=0.1)}, f"--min-p{WHOLE_DISTRIBUTION}"),
        ({"sampling": SamplingConfig(repetition_penalty=1.1)}, f"--repetition-penalty{WHOLE_DISTRIBUTION}"),
        ({"sampling": SamplingConfig(greedy=True)}, f"--greedy{WHOLE_DISTRIBUTION}"),
        ({"critic_min_lr": 1e-4}, "--critic-min-lr 0.0001 is above --critic-lr 1e-05"),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(UserError) as error:
        Config(**flags)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "flags",
    [
        {},
        DATA | {"reward": RewardConfig(reward_model=Path("rm"))},
        DATA | {"reward": RewardConfig(reward_fn="a:b"), "critic": Path("lm"), "critic_warmup_steps": 3},
        {"sampling": SamplingConfig(temperature=0.7, stop=("\n",))},
        {"advantages": "reinforce", "gamma": 0.9, "whiten_advantages": False, "kl": KlConfig(kl_coef=0.0)},
        GROUPS | {"kl": KlConfig(kl_in="loss", kl="k3"), "truncation": TruncationConfig("penalise", 0.5, 64)},
        GROUPS
        | {"advantages": "rloo", "kl": KlConfig(kl_target=0.1, kl_horizon=1000.0), "entropy_coef": 0.01},
        {
            "value_clip": 0.0,
            "clip": 0.0,
            "gamma": 0.0,
            "gae_lambda": 1.0,
            "truncation": TruncationConfig("keep"),
        },
        {"critic_lr": 0.0, "critic_min_lr": 0.0, "optim": OptimConfig(lr=0.0, min_lr=0.0)},
        # an update takes answers to several prompts, or half of those to one
        {"prompts_per_step": 4, "samples_per_prompt": 8, "batch": BatchConfig(global_batch_size=16)},
        {"prompts_per_step": 1, "samples_per_prompt": 8, "batch": BatchConfig(global_batch_size=4)},
    ],
)
def test_flags_that_go_together(flags):
    config = Config(**flags)
    assert config.rows_per_step == config.prompts_per_step
    assert config.responses_per_step == config.prompts_per_step * config.samples_per_prompt


# ---- advantages ----------------------------------------------------------------------------------


LENGTHS = [2, 1, 2, 1]  # two answers to each of two prompts
REWARDS = f64(0, 1, 3, 1, 1, 0)
VALUES = f64(0.5, 0.5, 1, 0, 2, 1)
ALL = torch.ones(4, dtype=torch.bool)
BUT_ONE = torch.tensor([True, False, True, True])
ROOT2 = 2**0.5 + 1e-4  # the deviation of rewards 1 and 3, or 2 and 0, and GRPO's addend


def test_gae_by_hand():
    """Errors R + 0.5 V' - V are -0.25, 0.5 | 2 | 2, -1 | -1, and a quarter of the next advantage is added."""
    advantages, returns = f64(-0.125, 0.5, 2, 1.75, -1, -1), f64(0.375, 1, 3, 1.75, 1, 0)
    result = rl.gae(REWARDS, VALUES, LENGTHS, 0.5, 0.5)
    torch.testing.assert_close(result, (advantages, returns), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize(
    ("flags", "counted", "advantages"),
    [
        # rewards to go, without critic or comparison
        ({"advantages": "reinforce", "gamma": 0.5}, ALL, f64(0.5, 1, 3, 1.5, 1, 0)),
        # of whole responses: 1 and 3, 2 and 0
        ({"advantages": "rloo"}, ALL, f64(-2, -2, 2, 2, 2, -2)),
        ({"advantages": "grpo"}, ALL, f64(-1, -1, 1, 1, 1, -1) / ROOT2),
        # nothing is left to compare the first response with
        ({"advantages": "rloo"}, BUT_ONE, f64(0, 0, 0, 2, 2, -2)),
        ({"advantages": "grpo"}, BUT_ONE, f64(0, 0, 0, 1, 1, -1) / ROOT2),
    ],
)
def test_advantages_by_hand(flags, counted, advantages):
    config = Config(samples_per_prompt=2, **flags)
    estimated = config.estimate_advantages(REWARDS, LENGTHS, counted)
    torch.testing.assert_close(estimated, advantages, rtol=1e-15, atol=1e-15)


def test_numbers_of_answers_and_tokens():
    torch.testing.assert_close(rl.per_token(f64(5, 6, 7, 8), LENGTHS), f64(5, 5, 6, 7, 7, 8))
    torch.testing.assert_close(per_response(REWARDS, LENGTHS), f64(0.5, 3, 1, 0))
    statistics = moments("x", f64(1, 5))  # the deviation of all there is, not of a sample
    assert {name: float(value) for name, value in statistics.items()} == {"x_mean": 3.0, "x_std": 2.0}


def test_minibatches():
    """The order of the rollout first, then permutations of the responses, by seed, step and epoch."""
    first = [[[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9, 10, 11], [12, 13, 14, 15]]]
    first.append([[*range(16, 20)], [*range(20, 24)]])
    assert draw(24, 4, 8, (1, 3, 0)) == draw(24, 4, 8, (1, 4, 0)) == first
    epochs = [draw(24, 4, 8, place) for place in ((1, 3, 1), (1, 3, 2), (1, 4, 1), (5, 3, 1))]
    assert draw(24, 4, 8, (1, 3, 1)) == epochs[0]
    for i, epoch in enumerate(epochs):
        updates = [sum(groups, []) for groups in epoch]
        assert [len(update) for update in updates] == [8, 8, 8] and sorted(sum(updates, [])) == [*range(24)]
        for groups in epoch:  # one for each prompt, whose places its responses share
            prompts = [{number // 4 for number in group} for group in groups]
            assert all(len(some) == 1 for some in prompts) and len(set().union(*prompts)) == len(groups)
        assert not any(epoch == earlier for earlier in epochs[:i])
    assert draw(24, 4, 2, (1, 0, 0))[:3] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    batch = BatchConfig(global_batch_size=8)
    config = Config(prompts_per_step=6, samples_per_prompt=4, ppo_epochs=3, batch=batch)
    config = replace(config, parallel=ParallelConfig(seed=1))
    assert config.draws(3) == first + epochs[0] + epochs[1]


def test_tokens_with_gradient():
    """Updates of 2, 3, 1 and 2 tokens: one of advantages 0, one with an advantage where nothing counts."""
    minibatches = object.__new__(Minibatches)
    minibatches.lengths, minibatches.order = [2, 3, 2, 1], [0, 1, 3, 2]
    minibatches.num_tokens = [2, 3, 1, 2]
    counted, advantages = f64(1, 1, 1, 0, 0, 0, 0, 1), f64(0, 0, 0, 2, 2, 3, 3, -1e-300)
    assert minibatches.tokens_with_gradient(counted, advantages) == [0.0, 0.0, 1.0, 0.0]
    assert minibatches.tokens_with_gradient(counted, counted) == [2.0, 1.0, 1.0, 0.0]  # KL or entropy
    values, count = minibatches.of_first_update(torch.arange(8), [0.0, 0.0, 1.0, 0.0])
    assert values.tolist() == [7] and count == 1.0  # of response 3, the third in the minibatches
    assert minibatches.of_first_update(torch.arange(8), [0.0, 3.0, 1.0, 0.0])[0].tolist() == [2, 3, 4]


def test_place_of_the_kl_penalty():
    """In the loss by default for grpo only."""
    for flags, place in (
        ({}, "reward"),
        ({"advantages": "reinforce"}, "reward"),
        ({"kl": KlConfig(kl_in="loss")}, "loss"),
        (GROUPS, "loss"),
        (GROUPS | {"kl": KlConfig(kl_in="reward")}, "reward"),
    ):
        assert Config(**flags).kl_place == place, flags


# ---- runs on two processes -----------------------------------------------------------------------

STEPS, NEW_TOKENS = 2, 8
BY_RULE = "--reward-fn tests.support.rewards:reward"
KEEP = "--save-top-k 9 --monitor train_rollouts/rewards"
UPDATES = "--lr 1e-3 --critic-lr 1e-3"
STILL = "--lr 0 --min-lr 0 --critic-lr 0 --critic-min-lr 0"
GRPO = (  # with this seed no answer ends by itself
    f"--kl-coef 0 --truncated keep --max-steps {STEPS} --lr 1e-3 --seed 2 --ppo-epochs 2 {BY_RULE}"
)
FLAT = (  # all answers have one reward
    "--model {start} --truncated keep --ppo-epochs 2 --max-steps 1 --lr 1e-3 "
    "--reward-fn tests.support.rewards:tenth --kl-coef"
)
WITHOUT_CRITIC = ("grpo", "cispo", "sapo", "timed", "penalised", "flat", "flat_kl")  # runs of train_grpo.py
RUNS = [  # OUTPUT and flags, in this order: later ones start from the result of the first
    (
        "gae",
        f"--reward-model {{judge}} {BY_RULE} --ppo-epochs 2 --truncated keep "
        f"--kl-target 0.1 --kl-horizon 20 --offload on --val-data {{data}}/val.jsonl --val-interval {STEPS} "
        f"--max-steps {STEPS} --save-interval 1 --warmup-steps 3 {UPDATES}",
    ),
    ("grpo", GRPO),
    ("cispo", f"{GRPO} --objective cispo --clip 1 --clip-high 3 --aggregate constant"),
    ("sapo", f"{GRPO} --objective sapo --ratio sequence --aggregate response --advantage-scale none"),
    ("timed", f"{GRPO} --max-time 00:00:00"),
    ("timed", GRPO),
    (
        "warmup",
        f"--model {{start}} --critic {{judge}} {BY_RULE} --critic-warmup-steps 2 "
        f"--truncated keep --kl k2 --max-steps 3 --save-interval 1 {KEEP} {UPDATES}",
    ),
    (
        "still",
        "--model {start} --reward-model {judge} --truncated keep --max-steps 2 --save-interval 1 "
        f"{KEEP} --entropy-coef 0.1 --audit-quantile 0.5 {STILL}",
    ),
    (
        "masked",
        "--model {start} --critic {start} --reward-model {judge} --reward-standardise auto "
        f"--max-new-tokens 2 --max-steps 1 {UPDATES}",
    ),
    (
        "penalised",
        f"--model {{start}} {BY_RULE} --advantages reinforce "
        "--truncated penalise --truncated-penalty 3 --max-new-tokens 2 --max-steps 1 --lr 1e-3",
    ),
    ("flat", f"{FLAT} 0"),
    ("flat_kl", f"{FLAT} 0.1"),
]


def command(folder: Path, output: str, flags: str) -> list[str]:
    """Four prompts in a step, two answers to each, two updates."""
    named = flags.format(judge=folder / "judge", data=folder / "data", start=folder / "gae" / "hf")
    script = "train_grpo.py" if output in WITHOUT_CRITIC else "train_ppo.py"
    common = (
        f"{script} --train-data {folder}/data/train.jsonl --prompts-per-step 4 --samples-per-prompt 2 "
        f"--global-batch-size 4 --max-prompt-len 48 --max-new-tokens {NEW_TOKENS} --output {folder}/{output}"
    )
    return [*common.split(), *named.split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """OUTPUT of each of RUNS under its name, all from one start of two processes."""
    folder = tmp_path_factory.mktemp("train_ppo")
    toy.write(folder / "data", num_train=12, num_val=3)
    save_reward_model(folder / "judge")
    commands = [command(folder, output, flags) for output, flags in RUNS]
    fork_ranks(2, "tests/workers/resume.py", json.dumps(commands))
    return folder


def metrics(folder: Path, name: str) -> list[dict[str, float]]:
    """Lines of a run's metrics.jsonl without those before its first step."""
    rows = [row for row in read_jsonl(folder / name / "metrics.jsonl") if row["step"]]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return rows


def group(row: dict[str, float], name: str) -> set[str]:
    """Names of the metrics of a group, without its own."""
    return {metric.removeprefix(f"{name}/") for metric in row if metric.startswith(f"{name}/")}


VAL = {"rewards", "response_lengths", "prompt_lengths", "ended"}
TRAIN = VAL | {"rollout_size", "rewards_with_kl", "advantages_mean", "advantages_std"}
TRAIN |= {"prompts_without_spread"}
REFERENCE_TRAIN = {"init_policy_kl", "kl_coef"}
CRITIC_TRAIN = {f"{name}_{part}" for name in ("returns", "values") for part in ("mean", "std")}
CRITIC_TRAIN |= {"explained_variance"}
OPTIM = {"loss", "ppo_ratio", "ppo_ratio_clamped", "clip_fraction", "approx_kl", "ratio_error", "entropy"}
OPTIM |= {"grad_norm", "lr", "skipped_updates"}
CRITIC_OPTIM = {f"critic_{name}" for name in ("loss", "value_clip_fraction", "grad_norm", "lr")}
AUDIT = {"logprob_error", "logprob_error_quantile", "logprob_error_max", "logprob_bias", "surprise"}
POLICY_AUDIT = {"ratio_error", "loss_error"}  # of an update of the policy
AUDIT |= POLICY_AUDIT
PHASES = {"generate", "score", "logprobs", "train", "other"}


@pytest.mark.slow
def test_names_of_the_metrics(folder):
    before = read_jsonl(folder / "gae" / "metrics.jsonl")[0]
    assert set(before) == {"step"} | {f"val_rollouts/{name}" for name in VAL}
    for row in metrics(folder, "gae"):
        last = row["step"] == STEPS
        assert group(row, "train_rollouts") == TRAIN | REFERENCE_TRAIN | CRITIC_TRAIN
        assert group(row, "train_optim") == OPTIM | CRITIC_OPTIM
        assert group(row, "audit") == AUDIT
        assert group(row, "val_rollouts") == (VAL if last else set())
        assert group(row, "timers") == {"rollout_time", "train_time"} | (
            {"validation_time"} if last else set()
        )
        saved = {"save"} if row["step"] > 1 else set()  # in the line of the step after
        assert group(row, "time") == PHASES | {"step", "offload", "reference", "values"} | saved


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gae", "grpo", "warmup"])
def test_shares_of_time_sum_to_one(folder, name):
    for row in metrics(folder, name):
        shares = [value for metric, value in row.items() if metric.startswith("time/")]
        assert sum(shares) - row["time/step"] == pytest.approx(1.0)
        trained = row["time/train"] * row["time/step"]
        assert row["timers/train_time"] == pytest.approx(trained)
        assert 0 < row["timers/rollout_time"] + row["timers/train_time"] < row["time/step"]


@pytest.mark.slow
def test_memory_of_each_phase(folder):
    """Peaks in GB, where the system tells them."""
    first, second = metrics(folder, "gae")
    needed = {"generate_policy", "score", "logprobs_policy", "reference", "values_critic", "train_policy"}
    needed |= {"train_critic"}
    assert group(first, "memory") in (needed, set())
    assert group(second, "memory") in (needed | {"save_policy", "save_critic"}, set())
    assert all(0.05 < row[f"memory/{name}"] < 8 for row in (first, second) for name in group(row, "memory"))


@pytest.mark.slow
def test_first_update_has_ratio_one(folder):
    """To the last bit, as it has the micro-batches of the pass before it; the later ones have not."""
    rows = metrics(folder, "gae") + metrics(folder, "grpo") + metrics(folder, "warmup")[2:]
    assert len(rows) == 5
    for row in rows:
        assert row["audit/ratio_error"] == 0.0 < row["train_optim/ratio_error"]
        assert row["audit/logprob_error"] <= row["audit/logprob_error_max"] < 1e-4


@pytest.mark.slow
def test_statistics(folder):
    for row in metrics(folder, "gae"):
        assert row["train_rollouts/rollout_size"] == 8
        assert row["train_rollouts/response_lengths"] <= NEW_TOKENS
        mean = row["train_rollouts/returns_mean"] - row["train_rollouts/values_mean"]
        assert row["train_rollouts/advantages_mean"] == pytest.approx(mean, abs=1e-9)
        # the warm-up counts rollouts: all four updates of one have its learning rate
        warmed_up = pytest.approx(1e-3 * row["step"] / 4, rel=1e-12)
        assert row["train_optim/critic_lr"] == row["train_optim/lr"] == warmed_up
    first, second = metrics(folder, "gae")
    assert first["train_rollouts/init_policy_kl"] == 0.0 != second["train_rollouts/init_policy_kl"]
    assert first["train_rollouts/kl_coef"] == second["train_rollouts/kl_coef"] == 0.01  # no KL was seen yet


@pytest.mark.slow
def test_samples(folder):
    """The first answer of each step, and of validation all."""
    rows, logged = read_jsonl(folder / "gae" / "samples.jsonl"), read_jsonl(folder / "gae" / "metrics.jsonl")
    places = [(row["step"], row["table"]) for row in rows]
    val, train = "val_rollouts", "train_rollouts"
    assert places == [(0, val)] * 3 + [(1, train), (2, train)] + [(2, val)] * 3
    assert all("sort: " in row["prompt"] for row in rows)
    for step in (0, STEPS):
        rewards = [row["reward"] for row in rows if (row["step"], row["table"]) == (step, val)]
        assert logged[step]["val_rollouts/rewards"] == pytest.approx(sum(rewards) / 3)


@pytest.mark.slow
def test_result_opens_with_transformers(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "gae" / "hf")
    text = transformers.AutoTokenizer.from_pretrained(folder / "gae" / "hf")
    ids = text("sort: b a", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    assert "the critic starts as" in (folder / "gae" / "log.txt").read_text()


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint's folder, by name."""
    reader = dcp.FileSystemReader(path)
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.endswith("weight") and not name.startswith("optimizer")
    }
    dcp.load(weights, storage_reader=reader, no_dist=True)
    assert len(weights) > 4
    return weights


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def at(folder: Path, name: str, step: int, *parts: str) -> dict[str, torch.Tensor]:
    """Weights of a run's checkpoint."""
    return tensors(Path(folder, name, "checkpoints", f"step_{step:08d}", *parts))


def exported(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "hf" / "model.safetensors")


@pytest.mark.slow
def test_checkpoint_holds_the_critic(folder):
    path = checkpoint.newest(folder / "gae" / "checkpoints")
    assert path.name == f"step_{STEPS:08d}" and (path / "critic").is_dir()
    assert "score.weight" in tensors(path / "critic") and "score.weight" not in tensors(path)


@pytest.mark.slow
def test_without_critic_and_reference(folder):
    """No metrics of them, no phase, and nothing in the checkpoint or beside it."""
    for row in metrics(folder, "grpo"):
        assert group(row, "train_rollouts") == TRAIN and group(row, "train_optim") == OPTIM
        assert group(row, "time") - {"save"} == PHASES | {"step", "offload"}
        assert not {name for name in row if "critic" in name or "values" in name or "reference" in name}
        assert row["train_rollouts/response_lengths"] == NEW_TOKENS  # which share an answer's reward
        mean = row["train_rollouts/rewards"] / NEW_TOKENS
        assert row["train_rollouts/rewards_with_kl"] == pytest.approx(mean)
    assert not (checkpoint.newest(folder / "grpo" / "checkpoints") / "critic").exists()
    assert not (folder / "grpo" / "reference.txt").exists() and (folder / "gae" / "reference.txt").exists()


@pytest.mark.slow
def test_stopped_by_the_time_and_continued(folder):
    log = (folder / "timed" / "log.txt").read_text()
    assert f"--max-time is over: stopped after step 1 of {STEPS}; the same command continues" in log
    assert "continuing after step 1" in log
    rows, expected = ([without_machine(row) for row in metrics(folder, name)] for name in ("timed", "grpo"))
    assert rows == expected
    assert same(exported(folder, "timed"), exported(folder, "grpo"))


def without_machine(row: dict[str, float]) -> dict[str, float]:
    """A line without what depends on the clock and the machine."""
    return {name: row[name] for name in without_times(row) if not name.startswith("memory/")}


@pytest.mark.slow
def test_critic_warms_up_alone(folder):
    """For two of three steps the policy stays the reference, and is what training started from."""
    for row in metrics(folder, "warmup"):
        learns = row["step"] == 3
        assert group(row, "train_optim") == CRITIC_OPTIM | (OPTIM if learns else set())
        assert group(row, "audit") == AUDIT - (set() if learns else POLICY_AUDIT)
        assert row["train_rollouts/init_policy_kl"] == 0.0
    assert same(at(folder, "warmup", 1), at(folder, "warmup", 2))
    assert not same(at(folder, "warmup", 2), at(folder, "warmup", 3))
    assert not same(at(folder, "warmup", 1, "critic"), at(folder, "warmup", 2, "critic"))
    assert metrics(folder, "warmup")[2]["train_optim/lr"] == 1e-3  # its schedule begins here


@pytest.mark.slow
def test_learning_rate_zero_changes_nothing(folder):
    rows = metrics(folder, "still")
    assert all(row["train_optim/grad_norm"] > 0 and row["train_optim/critic_grad_norm"] > 0 for row in rows)
    assert all(row["train_optim/ratio_error"] == row["train_optim/approx_kl"] == 0.0 for row in rows)
    assert all(row["audit/logprob_error_quantile"] < row["audit/logprob_error_max"] for row in rows)  # median
    assert same(exported(folder, "still"), exported(folder, "gae"))
    assert same(at(folder, "still", 1), at(folder, "still", 2))
    assert same(at(folder, "still", 1, "critic"), at(folder, "still", 2, "critic"))
    judge = load_file(folder / "judge" / "model.safetensors")
    assert torch.equal(at(folder, "still", 2, "critic")["score.weight"], judge["score.weight"])


@pytest.mark.slow
def test_without_an_ended_answer_only_the_critic_learns(folder):
    """--truncated mask, and no answer of two tokens ends."""
    [row] = metrics(folder, "masked")
    assert "of the first rollout ended within --max-new-tokens 2" in (folder / "masked/log.txt").read_text()
    assert row["train_rollouts/ended"] == 0.0
    assert group(row, "train_optim") == CRITIC_OPTIM | {"skipped_updates"}
    assert row["train_optim/skipped_updates"] == 2
    assert group(row, "audit") == AUDIT - POLICY_AUDIT
    assert same(exported(folder, "masked"), exported(folder, "gae"))
    assert at(folder, "masked", 1, "critic")["score.weight"].any()


@pytest.mark.slow
def test_a_new_critic_has_values_of_0(folder):
    """Standardised are the rewards, and the values of a critic that starts as the reward model: no others."""
    [row] = metrics(folder, "masked")
    assert row["train_rollouts/values_mean"] == row["train_rollouts/values_std"] == 0.0
    message = f"reward: (the score of {folder / 'judge'} - 0.25) / 0.5"
    assert message in (folder / "masked" / "log.txt").read_text()


@pytest.mark.slow
def test_without_advantages_no_update_is_made(folder):
    """Weight decay would move the weights; a KL in the loss has a gradient, so its updates are made."""
    [row], [with_kl] = metrics(folder, "flat"), metrics(folder, "flat_kl")
    assert row["train_rollouts/advantages_std"] == with_kl["train_rollouts/advantages_std"] == 0.0
    assert row["train_rollouts/prompts_without_spread"] == 1.0
    assert group(row, "train_optim") == {"skipped_updates"} and row["train_optim/skipped_updates"] == 4
    assert same(exported(folder, "flat"), exported(folder, "gae"))
    message = "step 1: all advantages are 0, so the policy learnt nothing"
    assert message in (folder / "flat" / "log.txt").read_text()
    assert group(with_kl, "train_optim") == OPTIM and with_kl["train_optim/skipped_updates"] == 0
    assert not same(exported(folder, "flat_kl"), exported(folder, "gae"))


@pytest.mark.slow
def test_penalty_of_answers_that_were_cut_off(folder):
    """Both tokens of an answer share its reward less 3; rewards themselves are logged as they were given."""
    [row] = metrics(folder, "penalised")
    assert row["train_rollouts/ended"] == 0.0
    expected = (row["train_rollouts/rewards"] - 3) / 2
    assert row["train_rollouts/rewards_with_kl"] == pytest.approx(expected)
    assert row["train_rollouts/rewards"] > 0
    assert not same(exported(folder, "penalised"), exported(folder, "gae"))


# ---- what is refused with the files in hand ------------------------------------------------------


@pytest.mark.slow
def test_a_critic_cannot_join_later(folder):
    """A checkpoint of train_grpo.py, which has no critic, cannot be continued by train_ppo.py."""
    flags = f"{BY_RULE} --truncated keep --kl-coef 0 --max-steps 3 --resume-with-changes".split()
    output = ["--output", str(folder / "grpo"), "--train-data", str(folder / "data" / "train.jsonl")]
    output += ["--prompts-per-step", "4", "--global-batch-size", "4"]
    done = fork_ranks(1, "train_ppo.py", *flags, *output, check=False)
    path = folder / "grpo" / "checkpoints" / f"step_{STEPS:08d}"
    assert done.returncode != 0 and f"error: {path} is of train_grpo.py, not of train_ppo.py" in done.stderr
    assert len(metrics(folder, "grpo")) == STEPS
