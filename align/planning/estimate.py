"""Models and phases of each script's run, for `python -m tools.plan`.

A script's Config names its function: with `plan = estimate.ppo`, `config.plan(cluster)` is a Job.
Micro-batches are taken as full, responses as of the greatest length, flags are checked as by the script.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from align.data import packing, prompts
from align.distributed import parallel
from align.errors import UserError
from align.generation.generator import check_rollout_tp
from align.model import architecture
from align.model.architecture import Architecture
from align.model.config import check_model
from align.planning import rollout_memory
from align.planning.memory import RankShape
from align.planning.phases import Cluster, Job, Phase, build, forward, generate, save, train
from align.training.phases import OffloadConfig

Models = Mapping[str, Architecture]


def sft(config: Any, cluster: Cluster) -> Job:
    """train_sft.py."""
    return from_rows(config, cluster, 1, read_policy(config))


def reward_model(config: Any, cluster: Cluster) -> Job:
    """train_rm.py."""
    scorer = replace(read_policy(config), labels=config.num_attributes)
    return from_rows(config, cluster, 2 if config.loss == "ranking" else 1, scorer)


def dpo(config: Any, cluster: Cluster) -> Job:
    """train_dpo.py; a precomputed reference needs no phase of its own."""
    policy = read_policy(config)
    return from_rows(config, cluster, 2, policy, {"reference": policy} if config.reference == "swap" else {})


def ppo(config: Any, cluster: Cluster) -> Job:
    """train_ppo.py: policy and critic."""
    starts = {
        "--critic": config.critic,
        "--reward-model": config.reward.reward_model,
        "--model": config.model.path,
    }
    flag, start = next((flag, path) for flag, path in starts.items() if path)
    critic = replace(architecture.read_config(start, flag), labels=1)
    return policy_gradient(config, cluster, {"policy": read_policy(config), "critic": critic})


def grpo(config: Any, cluster: Cluster) -> Job:
    """train_grpo.py: no critic."""
    return policy_gradient(config, cluster, {"policy": read_policy(config)})


def rejection_sampling(config: Any, cluster: Cluster) -> Job:
    """train_rs.py, which offloads no model in training."""
    models = {"policy": read_policy(config)}, read_reward_model(config)
    return from_prompts(Job(config, cluster, *models, rejection_sampling_phases))


def self_rewarding(config: Any, cluster: Cluster) -> Job:
    """train_self_reward.py. The reference samples and judges, in a validation the policy."""
    policy = read_policy(config)
    check_sampling(config, cluster, policy)
    config.check_lengths(policy.max_positions)
    models = {"policy": policy}, {"reference": policy}
    return checked(Job(config, cluster, *models, self_rewarding_phases, config.offload.offload))


def resolve_offload(config: Any) -> OffloadConfig:
    """Decide --offload auto for the GPUs of this run: on, if its models do not fit at once.

    It is on with TensorRT-LLM and with adapters, too, of which there are no figures.
    """
    if config.offload.offload != "auto" or not torch.cuda.is_available():
        return config.offload
    lora = getattr(config, "lora", None)
    if config.rollout.generate_with == "trtllm" or (lora and lora.enabled):
        return OffloadConfig("on")
    size = torch.cuda.get_device_properties(parallel.device()).total_memory / 1e9
    job = config.plan(Cluster(gpus_per_node=dist.get_world_size(), gpu_memory=size))
    return OffloadConfig("on" if job.offloads else "off")


def read_policy(config: Any) -> Architecture:
    """Architecture of --model, from its config.json alone."""
    return architecture.read_config(config.model.path)


def read_reward_model(config: Any) -> dict[str, Architecture]:
    """Architecture of --reward-model, if there is one."""
    path = config.reward.reward_model
    return (
        {"reward model": replace(architecture.read_config(path, "--reward-model"), labels=1)} if path else {}
    )


def from_rows(
    config: Any, cluster: Cluster, per_row: int, policy: Architecture, frozen: Models | None = None
) -> Job:
    """A script that samples nothing. `per_row`: sequences of a row."""
    packing.check_budget(config.format.max_seq_len, config.batch, policy.max_positions, per_row)

    def phases(job: Job, s: RankShape) -> list[Phase]:
        length = config.format.max_seq_len
        prompt = length // 2 if per_row == 2 else 0  # half of a pair is taken to be the prompt
        work = job.work(config.batch.global_batch_size, per_row, length, prompt)
        reference = [forward(job, s, name, name, work) for name in job.frozen]
        return [build(job, s), *reference, train(job, s, "policy", work), save(job, s, "policy")]

    return checked(Job(config, cluster, {"policy": policy}, frozen or {}, phases))


def policy_gradient(config: Any, cluster: Cluster, trained: Models) -> Job:
    """PPO and GRPO."""
    frozen = read_reward_model(config)
    if config.kl.kl_coef > 0:
        frozen["reference"] = trained["policy"]
    return from_prompts(Job(config, cluster, trained, frozen, policy_gradient_phases, config.offload.offload))


def from_prompts(job: Job) -> Job:
    """A script that samples, checked."""
    config, policy = job.config, job.trained["policy"]
    check_sampling(config, job.cluster, policy)
    prompts.check_lengths(config.format, config.sampling.max_new_tokens, config.batch, policy.max_positions)
    return checked(job)


def checked(job: Job) -> Job:
    """The job, if parallel sizes fit the machines and the models. Raises UserError."""
    if getattr(job.config, "lora", None) and job.config.lora.enabled:
        flag = f"--adapter {job.config.lora.adapter}" if job.config.lora.adapter else "--lora-rank"
        raise UserError(f"{flag}: tools.plan knows no runs with adapters, docs/lora.md says what they need")
    check_world(job.config, job.cluster.world)
    for arch in (*job.trained.values(), *job.frozen.values()):
        # Transformer Engine's own limits are for the machine that has it.
        check_model(arch, replace(job.config.model, attention="torch", fp8=False), job.config.parallel)
    return job


def check_world(config: Any, world: int) -> None:
    """Check parallel sizes as the script does. Raises UserError."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(world)  # torchrun's variable
    try:
        parallel.check_grid(config.parallel)
    finally:
        os.environ.pop("WORLD_SIZE")
        os.environ.update({} if before is None else {"WORLD_SIZE": before})


def check_sampling(config: Any, cluster: Cluster, policy: Architecture) -> None:
    """Check the sampler as the script does, and the limits of tools.plan. Raises UserError."""
    if config.rollout.generate_with == "trtllm":
        raise UserError("--generate-with trtllm: tools.plan has no figures of TensorRT-LLM's engines")
    if config.rollout.reshards(config.parallel):
        check_rollout_tp(config.rollout.rollout_tp, policy, cluster.world)


def policy_gradient_phases(job: Job, s: RankShape) -> list[Phase]:
    config = job.config
    prompt, response = config.format.max_prompt_len, config.sampling.max_new_tokens
    together = responses_together(config, prompt, response)
    size = -(-config.batch.global_batch_size // together)
    work = training = job.work(size, together, prompt + response, prompt, entropy=True)
    if config.ppo_epochs > 1:  # a later epoch may draw an update whose responses are all to different prompts
        training = job.work(config.batch.global_batch_size, 1, prompt + response, 0, entropy=True)
    counts = config.prompts_per_step, config.samples_per_prompt, prompt
    parts = config.prompts_per_step * config.samples_per_prompt / config.batch.global_batch_size
    updates = config.ppo_epochs * parts
    phases = [build(job, s), generate(job, s, "generate", *counts)]
    if "reward model" in job.frozen:
        phases.append(forward(job, s, "score", "reward model", work, parts))
    phases.append(forward(job, s, "logprobs", "policy", work, parts))
    if "reference" in job.frozen:
        phases.append(forward(job, s, "reference", "reference", work, parts))
    if "critic" in job.trained:
        phases.append(forward(job, s, "values", "critic", work, parts))
        phases.append(train(job, s, "critic", training, updates))
    phases.append(train(job, s, "policy", training, updates))
    phases += [save(job, s, name) for name in job.trained]
    if s.gpu and not job.offloads and rollout_memory.is_kept(config.rollout, config.parallel, s):
        kept = {"kv_cache": phases[1].items["kv_cache"] + phases[1].items["activations"]}  # of graphs, too
        phases[2:] = [replace(phase, items={**phase.items, **kept}) for phase in phases[2:]]
    return phases


def rejection_sampling_phases(job: Job, s: RankShape) -> list[Phase]:
    config = job.config
    prompt, response = config.format.max_prompt_len, config.sampling.max_new_tokens
    together, rows = responses_together(config, prompt, response), config.prompts_per_step
    training = job.work(config.batch.global_batch_size, 1, prompt + response, 0)
    phases = [build(job, s), generate(job, s, "generate", rows, config.samples_per_prompt, prompt)]
    if "reward model" in job.frozen:
        groups = -(-rows * config.samples_per_prompt // together)
        scoring = job.work(groups, together, prompt + response, prompt)
        phases.append(forward(job, s, "score", "reward model", scoring))
    updates = rows * config.keep_top / config.batch.global_batch_size
    phases.append(forward(job, s, "audit", "policy", training, updates))
    return [*phases, train(job, s, "policy", training, updates), save(job, s, "policy")]


def self_rewarding_phases(job: Job, s: RankShape) -> list[Phase]:
    config, response = job.config, job.config.sampling.max_new_tokens
    context = job.trained["policy"].max_positions - response
    prompt = min(config.format.max_seq_len, context)
    samples, judgements = config.samples_per_prompt, config.judge.judgements
    sampling = {"by": "reference", "rollouts": 1 / config.rollout_ahead}
    rows = config.batch.global_batch_size * config.rollout_ahead
    # A judge prompt holds prompt, response and template. A token has a byte at least.
    judge_prompt = min(prompt + response + config.judge.judge_template.stat().st_size, context)
    phases = [
        build(job, s),
        generate(job, s, "generate", rows, samples, prompt, **sampling),
        generate(job, s, "judge", rows * samples, judgements, judge_prompt, **sampling),
    ]
    if config.meta.meta_judge:
        room = min(context, config.batch.micro_batch_tokens // 2 - response)
        template = config.meta.meta_judge_template.stat().st_size
        meta_prompt, pairs = min(prompt + 3 * response + template, room), judgements * (judgements - 1)
        phases.append(generate(job, s, "meta_judge", rows * pairs, 1, meta_prompt, **sampling))
    work = job.work(config.batch.global_batch_size, 2, prompt + response, prompt)
    phases.append(forward(job, s, "reference", "reference", work))
    return [*phases, train(job, s, "policy", work), save(job, s, "policy")]


def responses_together(config: Any, prompt: int, response: int) -> int:
    """Responses to one prompt in a row of training, which share its places: see batching.pack_responses."""
    room = (config.batch.micro_batch_tokens - prompt) // response
    return max(1, min(config.samples_per_prompt, room, config.batch.global_batch_size))
