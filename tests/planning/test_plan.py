"""tools.plan: command lines, phases and their needs, sums and refusals, and measured peaks."""

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from align import command_line
from align.errors import UserError
from align.planning import estimate, memory, rollout_memory
from align.planning import phases as planned
from align.planning.memory import MicroBatchLoad
from align.planning.phases import Cluster, Job
from align.planning.rollout_memory import RolloutLoad
from bench import plan_cases
from tests.support.files import ROOT
from tests.support.launch import fork_python, fork_ranks
from tools import plan

SCRIPTS = ("train_sft", "train_rm", "train_dpo", "train_rs", "train_ppo", "train_grpo", "train_self_reward")
MEASURES = sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)
GB = 1e9


def job_of(script: str, flags: str = "", **cluster: object) -> Job:
    """The job of a command line."""
    config = command_line.parse(plan.load_script(ROOT / f"{script}.py").Config, flags.split())
    return config.plan(Cluster(**{"gpus_per_node": 1, **cluster}))


def phases_of(job: Job, stage: int = 0) -> dict[str, dict[str, float]]:
    """Bytes by item of each phase, without the process and items that are 0."""
    s = replace(job.layout, stage=stage)
    sizes = {phase.name: planned.on_device(job, s, phase, 0.0) for phase in job.phases(s)}
    return {name: {item: size for item, size in items.items() if size} for name, items in sizes.items()}


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plan_cases.write_model(tmp_path_factory.mktemp("rm") / "rm", labels=1)


# ---- command lines ---------------------------------------------------------------------------------------


def test_whose_flags_are_whose():
    words = "--nodes 2 train_sft.py --tp 2 --output a.py".split()
    assert plan.split(words) == (["--nodes", "2"], Path("train_sft.py"), ["--tp", "2", "--output", "a.py"])
    with pytest.raises(UserError, match="which script"):
        plan.split(["--nodes", "2"])


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_the_command_without_flags_fits(script, device, capsys):
    plan.main(["--gpus-per-node", "2", "--device", device, "--host-memory", "64", str(ROOT / f"{script}.py")])
    report = capsys.readouterr().out
    assert report.startswith(f"{script}.py: 1 nodes x 2 ")
    assert report.endswith("it fits\n") and report.count("<- peak") == 1
    assert ("fp32" if device == "cpu" else "bf16") in report.splitlines()[0]


def test_a_script_of_ones_own(tmp_path, capsys):
    """A copy of a script with another default is planned by what it says."""
    text = (ROOT / "train_sft.py").read_text()
    changed = text.replace(
        "format: FormatConfig = FormatConfig()", "format: FormatConfig = FormatConfig(max_seq_len=64)"
    )
    assert changed != text
    (tmp_path / "mine.py").write_text(changed)
    script = plan.load_script(tmp_path / "mine.py")
    assert script.Config().format.max_seq_len == 64
    plan.main([str(tmp_path / "mine.py")])
    assert capsys.readouterr().out.startswith("mine.py: ")


def test_help_is_plans_own(capsys):
    for words in ([], ["--help"]):
        with pytest.raises(SystemExit) as error:
            plan.main(words)
        assert error.value.code == 0 and "--gpus-per-node" in capsys.readouterr().out


def test_a_script_that_names_no_phases_is_refused(tmp_path, capsys):
    text = (ROOT / "train_rs.py").read_text()
    without = re.sub(r"    plan = estimate\..*\n", "", text)
    assert without != text
    (tmp_path / "other.py").write_text(without)
    with pytest.raises(SystemExit):
        plan.main([str(tmp_path / "other.py")])
    assert "its Config has no `plan = estimate. ...`" in capsys.readouterr().err


def test_only_the_first_of_the_ranks_with_the_same_weights_gathers_a_checkpoint(monkeypatch):
    monkeypatch.setattr(plan, "process_bytes", lambda: 0.0)
    job = job_of("train_sft", gpus_per_node=4, device="cpu", host_memory=64)
    [(_, gathers), *_] = [
        (p, sum(planned.on_device(job, job.layout, p, 0.0).values()))
        for p in job.phases(job.layout)
        if p.name == "save"
    ]
    peaks, rest = [gathers], [gathers / 4]
    assert plan.cpu_verdict(job, peaks, rest, "save", {"checkpoint": gathers}) is None
    fits = replace(job.cluster, host_memory=gathers * 1.76 / GB, allowance=0.0)
    assert plan.cpu_verdict(replace(job, cluster=fits), peaks, rest, "save", {"checkpoint": gathers}) is None
    short = replace(job.cluster, host_memory=gathers * 1.74 / GB, allowance=0.0)
    assert plan.cpu_verdict(replace(job, cluster=short), peaks, rest, "save", {"checkpoint": gathers})


@pytest.mark.slow
def test_exit_statuses():
    assert fork_python("tools/plan.py", "train_sft.py", check=False).returncode == 0
    done = fork_python("tools/plan.py", "--gpu-memory", 0.01, "train_sft.py", check=False)
    assert done.returncode == 1
    assert 'does not fit: the phase "train" takes 0.1 GB of the 0.0 GB that a GPU has for it.' in done.stderr
    assert fork_python("tools/plan.py", "train_sft.py", "--tp", 3, check=False).returncode == 2
    assert fork_python("tools/plan.py", "train_sft.py", "--no-such-flag", check=False).returncode == 2


@pytest.mark.parametrize(
    "words, message",
    [
        ("--gpus-per-node 8 train_sft.py --tp 3", "does not divide the 8 processes"),
        ("--gpus-per-node 8 train_sft.py --tp 8", "--tp 8 does not divide the model's 4 attention heads"),
        ("--gpus-per-node 8 train_sft.py --pp 8", "--pp 8 does not divide the model's 4 layers"),
        ("--gpus-per-node 3 train_ppo.py --rollout-tp 2", "--rollout-tp 2 does not divide the 3 processes"),
        (
            "--gpus-per-node 3 train_rs.py --rollout-tp 3",
            "--rollout-tp 3 does not divide the model's 4 attention",
        ),
        ("train_rs.py --generate-with trtllm", "tools.plan has no figures of TensorRT-LLM's engines"),
        ("train_sft.py --max-seq-len 2000", "--max-seq-len 2000 is beyond the model's context of 1024"),
        (
            "train_dpo.py --micro-batch-tokens 1024",
            "of which a row has 2, is above --micro-batch-tokens 1024",
        ),
        ("train_ppo.py --max-new-tokens 1024", "1024"),
        ("train_self_reward.py --max-seq-len 1025", "beyond the model's context of 1024 tokens"),
        ("train_grpo.py --critic-lr 1", "--critic-lr"),
        ("train_sft.py --model /no/such", "--model /no/such: no config.json there"),
        ("train_grpo.py --reward-model /no/such", "--reward-model /no/such: no config.json there"),
        ("train_ppo.py --reward-model /no/such", "--reward-model /no/such: no config.json there"),
        ("train_ppo.py --critic /no/such", "--critic /no/such: no config.json there"),
        ("no_such.py", "no_such.py: no such script"),
        ("demo.py", "is no training script"),
        ("--nodes 0 train_sft.py", "--nodes 0 must be a whole number from 1"),
        ("--gpu-memory -1 train_sft.py", "--gpu-memory -1.0 must be a number above 0"),
        ("--allowance 1 train_sft.py", "--allowance 1.0 must be a number from 0, below 1"),
        ("--device cpu train_sft.py", "--device cpu needs --host-memory"),
    ],
)
def test_what_is_refused(words, message, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as error:
        plan.main(words.split())
    assert error.value.code != 0
    assert message in f"{error.value.code} {' '.join(capfd.readouterr().err.replace('│', ' ').split())}"


def test_kernels_that_this_machine_lacks():
    """A plan for GPUs with Transformer Engine needs neither here."""
    assert phases_of(job_of("train_sft", "--attention te --fp8")) == phases_of(job_of("train_sft"))


def test_the_environment_stays_as_it_was(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "7")
    estimate.check_world(job_of("train_sft").config, 4)
    assert os.environ["WORLD_SIZE"] == "7"
    monkeypatch.delenv("WORLD_SIZE")
    estimate.check_world(job_of("train_sft").config, 4)
    assert "WORLD_SIZE" not in os.environ


# ---- phases ----------------------------------------------------------------------------------------------


def test_phases_of_sft():
    """The tiny model: bf16 weights, gradients in fp32, and 12 bytes a weight of Adam over two ranks."""
    job = job_of("train_sft", gpus_per_node=2)
    count, sizes = memory.weights(job.trained["policy"], job.layout), phases_of(job)
    state = {"weights": 2 * count, "gradients": 4 * count, "optimizer": 12 * count / 2}
    assert list(sizes) == ["build policy", "train", "save"]
    assert sizes["build policy"] == {"weights": 2 * count, "gradients": 4 * count, "building": 2 * count}
    assert sizes["save"] == state
    assert state.items() <= sizes["train"].items() and sizes["train"]["activations"] > 0


@pytest.mark.parametrize("reference, phases", [("precompute", []), ("swap", ["reference"])])
def test_phases_of_dpo(reference, phases):
    job = job_of("train_dpo", f"--reference {reference}")
    sizes = phases_of(job)
    assert list(sizes) == ["build policy", *phases, "train", "save"]
    assert ("frozen" in sizes["train"]) is False  # it waits in the host's memory
    if phases:
        assert sizes["reference"]["frozen"] == sizes["train"]["weights"]
        on_cpu = phases_of(job_of("train_dpo", "--reference swap", device="cpu", host_memory=1))
        assert on_cpu["train"]["frozen"] == on_cpu["train"]["weights"]  # which is where it is there


def test_phases_of_ppo(reward_model):
    flags = f"--reward-model {reward_model}"
    sizes = phases_of(job_of("train_ppo", f"{flags} --offload on"))
    needs = {
        name: set(items) & {"weights", "gradients", "optimizer", "frozen"} for name, items in sizes.items()
    }
    everything = {"weights", "gradients", "optimizer"}
    assert needs == {
        "build critic": {"weights", "gradients"},
        "generate policy": {"weights"},
        "score": {"frozen"},
        "logprobs policy": {"weights"},
        "reference": {"frozen"},
        "values critic": {"weights"},
        "train critic": everything,
        "train policy": everything,
        "save policy": everything,
        "save critic": everything,
    }
    off = phases_of(job_of("train_ppo", f"{flags} --offload off"))
    expected = sizes["save policy"]["optimizer"] + sizes["save critic"]["optimizer"]
    assert {items["optimizer"] for name, items in off.items() if name != "build critic"} == {expected}
    assert "critic" not in " ".join(phases_of(job_of("train_grpo", "--advantages reinforce")))
    assert "reference" not in phases_of(job_of("train_ppo", "--kl-coef 0"))


def test_frozen_models_on_a_cpu(reward_model):
    """With --offload they wait in files, else where they compute."""
    cpu = dict(device="cpu", host_memory=1)
    count = {"on": 0, "off": 1}
    for offload in count:
        job = job_of("train_ppo", f"--reward-model {reward_model} --offload {offload}", **cpu)
        frozen = {name: 4 * memory.weights(arch, job.layout) for name, arch in job.frozen.items()}
        sizes = phases_of(job)
        assert sizes["train policy"].get("frozen", 0) == count[offload] * sum(frozen.values())
        waiting = count[offload] * frozen["reference"]
        assert sizes["score"]["frozen"] == frozen["reward model"] + waiting


def test_phases_of_rejection_sampling_and_self_rewarding(reward_model):
    sizes = phases_of(job_of("train_rs", f"--reward-model {reward_model}"))
    assert list(sizes) == ["build policy", "generate", "score", "audit", "train", "save"]
    assert "optimizer" in sizes["generate"]  # nothing waits elsewhere
    sizes = phases_of(job_of("train_self_reward", "--offload on"))
    assert list(sizes) == ["build policy", "generate", "judge", "reference", "train policy", "save policy"]
    assert "weights" not in sizes["judge"] and sizes["judge"]["kv_cache"] > sizes["generate"]["kv_cache"]
    assert "meta_judge" in phases_of(job_of("train_self_reward", "--meta-judge"))


@pytest.mark.parametrize("script", ["train_ppo", "train_grpo", "train_self_reward"])
def test_auto_offloads_only_what_does_not_fit(script, monkeypatch):
    """By --gpu-memory in a plan, by the memory of the GPU in a run."""
    whole = sum(
        max(phases_of(job_of(script, "--offload off")).values(), key=lambda x: sum(x.values())).values()
    )
    gigabytes = whole / 0.9e9  # a tenth stays free
    for size, offloads in ((gigabytes * 1.01, False), (gigabytes * 0.99, True)):
        job = job_of(script, "--offload auto", gpu_memory=size)
        assert job.offloads == offloads and not job_of(script, "--offload off", gpu_memory=size).offloads
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        properties = SimpleNamespace(total_memory=size * 1e9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, p=properties: p)
        monkeypatch.setattr(estimate.parallel, "device", lambda: None)
        monkeypatch.setattr(estimate.dist, "get_world_size", lambda: 1)
        assert estimate.resolve_offload(job.config).offload == ("on" if offloads else "off")
        monkeypatch.undo()
    assert estimate.resolve_offload(job.config).offload == "auto"  # without a GPU: nothing to decide
    assert not job.config.offload.enabled


def test_largest_micro_batch_that_fits():
    """One step of 1,024 tokens more does not fit; with a GPU for less than the weights, none does."""
    rows = "--global-batch-size 4096 --precision fp32"
    for script, flags in (
        ("train_sft", f"{rows} --max-seq-len 64"),
        ("train_ppo", f"{rows} --prompts-per-step 4096 --rollout-slots 8 --max-new-tokens 32"),
    ):
        job = job_of(script, flags, gpu_memory=0.5)
        tokens = plan.largest_micro_batch(job)
        assert 1024 < tokens < 256 * 1024
        fits = [
            job_of(script, f"{flags} --micro-batch-tokens {size}", gpu_memory=0.5).fits()
            for size in (tokens, tokens + 1024)
        ]
        assert fits == [True, False]
        assert plan.largest_micro_batch(job_of(script, flags, gpu_memory=0.001)) == 0


def test_sampling_from_a_copy():
    sizes = phases_of(job_of("train_rs", "--tp 2 --rollout-slots 64", gpus_per_node=2))
    same = phases_of(job_of("train_rs", "--tp 2 --rollout-slots 64 --rollout-layout same", gpus_per_node=2))
    assert sizes["generate"]["copies"] > 0 and "copies" not in same["generate"]
    assert sizes["generate"]["kv_cache"] == 2 * same["generate"]["kv_cache"]  # all heads on one rank


def test_a_kept_kv_cache():
    """PPO without offload keeps what sampling took through all later phases of a step.

    A token's keys and values take 2 x 4 layers x 2 heads x 32 numbers x 2 B = 1,024 B. 4 slots of 256 tokens
    are 1,048,576 B; 4 prefilled prompts of 100 are 409,600 B; a prefill pass of 400 tokens takes for each
    1,024 B and a layer's 2 B x (3 x 128 + 3 x 352) = 2,880 B, 1,561,600 B.
    """
    flags = "--prompts-per-step 4 --global-batch-size 4 --max-prompt-len 100 --max-new-tokens 155"
    sizes = {
        offload: phases_of(job_of("train_ppo", f"{flags} --offload {offload}")) for offload in ("on", "off")
    }
    later = {name for name in sizes["off"] if not name.startswith(("build", "generate"))}
    assert {"logprobs policy", "train critic", "train policy", "save policy"} <= later
    sampling = sizes["off"]["generate policy"]
    assert (sampling["kv_cache"], sampling["activations"]) == (1_048_576 + 409_600, 1_561_600)
    assert {sizes["off"][name]["kv_cache"] for name in later} == {1_048_576 + 409_600 + 1_561_600}
    assert not any("kv_cache" in sizes["on"][name] for name in later)


def test_slots():
    """As many as are sampled at one time; a validation samples one answer to each of its prompts."""
    few = "--prompts-per-step 2 --samples-per-prompt 3"
    job = job_of("train_rs", few)
    rollout = RolloutLoad(slots=6, prompts=2, per_prompt=3, prompt=512, response=128)
    validated = f"{few} --train-data a --reward-fn a:b --val-data a"  # by default on 2 prompts, a step's
    other_job = job_of("train_rs", f"{validated} --val-batches None")
    arch, s = job.trained["policy"], job.layout
    answer = job.config.sampling.max_new_tokens
    for few_slots in (job, job_of("train_rs", validated)):
        needed = phases_of(few_slots)["generate"]["kv_cache"]
        assert needed == rollout_memory.kv_cache(arch, s, replace(rollout, response=answer))
    many = RolloutLoad(slots=64, prompts=64, per_prompt=1, prompt=512, response=answer)
    assert phases_of(other_job)["generate"]["kv_cache"] == rollout_memory.kv_cache(arch, s, many)


def test_each_copy_reads_its_share(monkeypatch):
    """4 ranks with tp 2: copies of the weights on each, or 2 in the training layout."""
    asked, sampling = [], rollout_memory.sampling
    monkeypatch.setattr(rollout_memory, "sampling", lambda *args: asked.append(args[2]) or sampling(*args))
    for flags in ("", "--rollout-tp 2", "--rollout-layout same"):
        phases_of(job_of("train_rs", f"--prompts-per-step 32 --tp 2 {flags}", gpus_per_node=4))
    assert [rollout.prompts for rollout in asked] == [8, 16, 16]
    assert {rollout.slots for rollout in asked} == {64}


def test_later_epochs_of_ppo_share_fewer_places():
    """8 answers to one prompt take 512 + 8 x 64 places; to 8 prompts 8 x 576, of which 4,096 make a batch."""
    flags = "--samples-per-prompt 8 --global-batch-size 8 --max-new-tokens 64 --ppo-epochs"
    once, twice = (phases_of(job_of("train_grpo", f"{flags} {epochs}")) for epochs in (1, 2))
    ratio = twice["train policy"]["activations"] / once["train policy"]["activations"]
    assert ratio == pytest.approx(4, rel=0.2)
    assert twice["logprobs policy"] == once["logprobs policy"]  # of the first epoch's rows


def test_micro_batches():
    job = job_of("train_sft", "--max-seq-len 300 --micro-batch-tokens 1000", gpus_per_node=2)
    assert job.work(10, 1, 300, 0) == MicroBatchLoad(
        tokens=1000, count=2, longest=300
    )  # 5 rows, 1,500 tokens
    assert job.work(4, 1, 300, 0) == MicroBatchLoad(tokens=600, count=1, longest=300)
    assert job.work(2, 2, 300, 100) == MicroBatchLoad(tokens=500, count=1, longest=300, shared=600 / 500)
    one = job_of("train_sft", "--micro-batch-size 1", gpus_per_node=2)
    assert one.work(10, 1, 300, 0) == MicroBatchLoad(tokens=300, count=5, longest=300)


def test_answers_in_a_row():
    """To a prompt of 512 tokens as many answers of 128 as 1,500 tokens take, and as there are."""
    flags = "--max-new-tokens 128 --global-batch-size 32 --prompts-per-step 4"
    for length, together in ((16, 7), (4, 4)):
        job = job_of("train_grpo", f"{flags} --samples-per-prompt {length} --prompts-per-step {64 // length}")
        tight = replace(job.config, batch=replace(job.config.batch, micro_batch_tokens=1500))
        assert estimate.responses_together(tight, 512, 128) == together


# ---- sums and refusals -----------------------------------------------------------------------------------


def test_the_fullest_node(reward_model):
    """2 nodes of 2 with tp 2: the first node's ranks, the first of their data parallel group, save."""
    flags = f"--tp 2 --reward-model {reward_model} --offload on"
    job = job_of("train_ppo", flags, nodes=2, gpus_per_node=2)
    s, saved = job.layout, [memory.saving(arch, job.layout) for arch in job.trained.values()]
    frozen = sum(memory.pinned_weights(arch, s) for arch in job.frozen.values())
    parts = sum(memory.pinned_model(arch, s) for arch in job.trained.values())
    node = {"process": 2.0, "pinned copies": 2 * (frozen + parts), "checkpoint": 2 * max(saved)}
    assert planned.fullest_node(job, 1.0) == node
    off = planned.fullest_node(replace(job, offload="off"), 1.0)
    assert off["pinned copies"] == 2 * frozen
    data = job_of("train_sft", "", nodes=1, gpus_per_node=8)  # all of which load at the start, and one saves
    assert planned.fullest_node(data, 1.0)["checkpoint"] == 8 * 20 * memory.weights(
        data.trained["policy"], data.layout
    )
    apart = job_of("train_sft", "--tp 2", nodes=4, gpus_per_node=1)  # one of its ranks on each node
    assert planned.fullest_node(apart, 1.0)["checkpoint"] == memory.saving(
        apart.trained["policy"], apart.layout
    )


def test_async_saves_keep_a_copy():
    """12 + 4 bytes a weight of fp32 models: beside training, and beside the save of the other model."""
    flags, cpu = "--precision fp32", dict(device="cpu", host_memory=64)
    plain, job = (job_of("train_ppo", flags + more, **cpu) for more in ("", " --async-save"))
    policy, critic = (16 * memory.weights(arch, job.layout) for arch in job.trained.values())
    before, after = phases_of(plain), phases_of(job)
    assert after["build critic"] == before["build critic"]
    assert after["train policy"] == before["train policy"] | {"checkpoint": policy + critic}
    for name, other in (("policy", critic), ("critic", policy)):
        size = before[f"save {name}"]["checkpoint"] + other
        assert after[f"save {name}"] == before[f"save {name}"] | {"checkpoint": size}
    host = {more: planned.fullest_node(job_of("train_ppo", more), 1.0) for more in ("", "--async-save")}
    assert host["--async-save"]["checkpoint"] > host[""]["checkpoint"]


def test_stages_differ(capsys):
    """The first stage holds most micro-batches, so its table is shown."""
    job = job_of("train_sft", "--pp 4 --global-batch-size 64", gpus_per_node=4)
    peaks = [max(sum(items.values()) for items in phases_of(job, stage).values()) for stage in range(4)]
    assert peaks[0] == max(peaks)
    plan.report(job, "train_sft.py")
    told = ", ".join(f"{i}: {peak / GB:.2f}" for i, peak in enumerate(peaks))
    assert f"peak of each pipeline stage in GB: {told}; below stage 0" in capsys.readouterr().out


def test_kept_logits_are_planned():
    recomputed, kept = (job_of("train_sft", f"--precision bf16 {flag}") for flag in ("", "--keep-logits"))
    assert kept.layout == replace(recomputed.layout, keep_logits=True)
    with pytest.raises(UserError, match="--keep-logits and --precision fp32"):
        job_of("train_sft", "--precision fp32 --keep-logits")


@pytest.mark.parametrize(
    "flags, phase, item, help",
    [
        ("train_sft", "train", "activations", "--recompute full, --micro-batch-tokens, --tp, --cp, --pp"),
        ("train_sft --recompute full", "train", "activations", "activations: --micro-batch-tokens"),
        ("train_rs --rollout-slots 512 --prompts-per-step 512", "generate", "kv_cache", "--rollout-slots"),
        ("train_ppo --offload off --micro-batch-tokens 8192", "train", "activations", "--recompute full"),
    ],
)
def test_why_it_does_not_fit(flags, phase, item, help, capsys):
    script, *rest = flags.split()
    job = job_of(script, " ".join(rest), gpu_memory=0.02)
    why = plan.report(job, script)
    assert why.startswith(f'the phase "{phase}') and f"The largest item is {item}, " in why
    assert help in why and "the 0.0 GB that a GPU has for it" in why


def test_off_loading_helps_where_it_is_off():
    small = dict.fromkeys(planned.ITEMS, 0.0) | {"optimizer": 2 * GB, "weights": 1 * GB}
    off, on = (job_of("train_ppo", f"--offload {value}") for value in ("off", "on"))
    told = plan.refusal(off, "it takes", small, 1.0, "a GPU has")
    assert told.startswith(
        "it takes 3.0 GB of the 1.0 GB that a GPU has for it. The largest item is optimizer, 2.0"
    )
    assert "--offload on" in told
    assert "--offload" not in plan.refusal(on, "it takes", small, 1.0, "a GPU has")
    assert "--offload" not in plan.refusal(job_of("train_sft"), "it takes", small, 1.0, "a GPU has")


def test_the_allowance_counts():
    """Just what is left when it is taken off must be enough."""
    job = job_of("train_sft")
    peak = max(sum(items.values()) for items in phases_of(job).values()) / GB
    for share, fits in ((0.19, True), (0.21, False)):
        cluster = replace(job.cluster, gpu_memory=peak / 0.8, allowance=share)
        assert (plan.report(replace(job, cluster=cluster), "train_sft.py") is None) is fits


def test_a_hosts_memory_is_checked(reward_model):
    job = job_of("train_ppo", f"--reward-model {reward_model}", host_memory=0.001)
    assert plan.report(job, "train_ppo.py").startswith("a node's ranks take ")
    assert plan.report(replace(job, cluster=replace(job.cluster, host_memory=None)), "train_ppo.py") is None


def test_all_processes_of_a_cpu_count(monkeypatch):
    """2 processes of 1 GB and a little fit into 2.5 GB, with a tenth of them left free; 3 do not."""
    monkeypatch.setattr(plan, "process_bytes", lambda: 1e9)
    for processes, fits in ((2, True), (3, False)):
        job = job_of("train_sft", gpus_per_node=processes, device="cpu", host_memory=3.0, allowance=0.1)
        assert (plan.report(job, "train_sft.py") is None) is fits


# ---- is it true? -----------------------------------------------------------------------------------------

SIZES = dict(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
)
SAMPLED = (
    "--train-data {data}/prompts.jsonl --model {policy} --reward-model {rm} --max-prompt-len 128 "
    "--max-new-tokens 32 --micro-batch-tokens 1280 --max-steps 1 --truncated keep --prompts-per-step 16 "
    "--global-batch-size 16"
)
CASES = {
    "sft_pp2": (
        2,
        "train_sft.py --model {policy} --train-data {data}/rows.jsonl --loss-on all --global-batch-size 16 "
        "--micro-batch-tokens 2048 --max-seq-len 256 --max-steps 1 --pp 2",
    ),
    "dpo_bf16": (
        1,
        "train_dpo.py --model {policy} --train-data {data}/pairs.jsonl --global-batch-size 8 "
        "--reference swap --micro-batch-tokens 2048 --max-seq-len 256 --max-steps 1 --precision bf16",
    ),
    "ppo_on": (1, f"train_ppo.py {SAMPLED} --offload on"),
    "rs_tp2": (2, f"train_rs.py {SAMPLED} --samples-per-prompt 1 --tp 2"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of 26 million weights, and data."""
    directory = tmp_path_factory.mktemp("plan")
    return {
        "policy": plan_cases.write_model(directory / "policy", **SIZES),
        "rm": plan_cases.write_model(directory / "rm", labels=1, **SIZES),
        "data": plan_cases.write_data(directory / "data", 32, 256, 128),
    }


@pytest.mark.slow
@pytest.mark.skipif(not MEASURES, reason="the system does not count peaks anew")
@pytest.mark.parametrize("case", CASES)
def test_peaks_are_what_plan_says(case, places, tmp_path):
    """Each phase's peak of resident memory on each rank, within a tenth. bench/plan.py has more cases."""
    processes, line = CASES[case]
    script, *flags = line.format(**places).split()
    worker = ("bench/plan_cases.py", tmp_path / "found", "exact", script)
    fork_ranks(processes, *worker, *flags, "--output", tmp_path / "run")
    job = job_of(Path(script).stem, " ".join(flags), device="cpu", host_memory=64, gpus_per_node=processes)
    for rank in range(processes):
        peaks = json.loads((tmp_path / "found" / f"{rank}.json").read_text())
        process = peaks["process"] * GB + plan.FIRST_STEP
        s = replace(job.layout, stage=rank // (job.layout.tp * job.layout.dp))
        for phase in job.phases(s):
            if phase.name.startswith("build"):  # of which the worker counts no peak
                continue
            estimated = sum(planned.on_device(job, s, phase, process).values()) / GB
            assert estimated == pytest.approx(peaks[phase.name], rel=0.1), (rank, phase.name)


def test_the_process_itself():
    """Resident memory, as another of the kernel's files tells it, and what the first step brings."""
    if sys.platform != "linux":
        pytest.skip("no /proc")
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    now = pages * os.sysconf("SC_PAGE_SIZE")
    assert plan.process_bytes() - plan.FIRST_STEP == pytest.approx(now, rel=0.02)
