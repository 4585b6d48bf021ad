"""AdamW (Megatron's distributed optimizer) and the learning-rate schedule.

Main weights and both moments are fp32 and split over the data parallel ranks. Pure bf16 weights hardly learn
at learning rates of 1e-5 and below: updates that small are lost in rounding.
"""

import math
from dataclasses import dataclass
from weakref import WeakSet

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from align.distributed import megatron_patches, parallel
from align.errors import UserError
from align.flags import COEFFICIENT, COUNT_OR_0, LEARNING_RATE, above, below, check_ranges, number

CHECKED: WeakSet[MegatronOptimizer] = (
    WeakSet()
)  # after their first update; then each checkpoint's weights are
REPLICA_BOUND = 1e-3  # relative, on norms of weights whose gradients may differ in rounding


@dataclass(frozen=True)
class OptimConfig:
    """Learning rate schedule and AdamW."""

    lr: float = 1e-5
    """peak learning rate, after the warm-up"""
    min_lr: float = 1e-6
    """minimum learning rate, at the end of the cosine decay and in the constant tail"""
    warmup_steps: int = 10
    """linear warm-up steps; the first step is not 0. A step is one optimizer step, in PPO and rejection
    sampling a rollout with all of its updates, which share a learning rate"""
    constant_steps: int = 0
    """constant tail: last steps of the run, all at --min-lr"""
    weight_decay: float = 0.01
    """decoupled weight decay (AdamW), on matrices only"""
    adam_beta1: float = 0.9
    """Adam beta1: decay of the first moment of the gradient"""
    adam_beta2: float = 0.98
    """Adam beta2: decay of the second moment of the gradient"""
    adam_eps: float = 1e-8
    """Adam epsilon: added to the root of the second moment, which a step is divided by"""
    clip_grad: float = 1.0
    """gradient clipping: largest norm over all weights, to which a longer gradient is scaled; 0: no limit"""

    def __post_init__(self):
        check_ranges(
            self,
            lr=LEARNING_RATE,
            min_lr=LEARNING_RATE,
            warmup_steps=COUNT_OR_0,
            constant_steps=COUNT_OR_0,
            weight_decay=number(0, 1e3),
            adam_beta1=below(0, 1),
            adam_beta2=below(0, 1),
            adam_eps=above(0, 1),
            clip_grad=COEFFICIENT,
        )


def check_optim(config: OptimConfig, total_steps: int) -> None:
    """Refuse a learning-rate schedule that does not fit the run."""
    if config.min_lr > config.lr:
        raise UserError(f"--min-lr {config.min_lr} is above --lr {config.lr}")
    if config.constant_steps and config.warmup_steps + config.constant_steps >= total_steps:
        raise UserError(
            f"--warmup-steps {config.warmup_steps} and --constant-steps {config.constant_steps} leave no "
            f"step of {total_steps} for the cosine between them: lower one of them"
        )


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, half a cosine from lr to min_lr, tail at min_lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    cosine_steps = max(total_steps - config.warmup_steps - config.constant_steps, 1)
    progress = min((step - config.warmup_steps) / cosine_steps, 1.0)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def build(model: DistributedDataParallel, config: OptimConfig) -> MegatronOptimizer:
    """Build AdamW over the model's present weights: load weights before, not after."""
    megatron_patches.measure_gradients_at_once()
    dtype = model.module.config.params_dtype
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad or math.inf,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        [model],
        use_gloo_process_groups=True,
    )
    for group in optimizer.param_groups:  # Megatron leaves this to its own scheduler; norms and biases have 0
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    for adam in adams(optimizer):
        is_torch = isinstance(adam.optimizer, torch.optim.AdamW)
        for group in adam.optimizer.param_groups:
            if is_torch:
                group["fused"], group["foreach"] = True, False
            for weight in group["params"]:  # as in its first step, since a save may precede it
                state = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
                if is_torch:  # Transformer Engine's Adam counts in the group, from its first step on
                    state["step"] = torch.zeros((), device=weight.device)
                adam.optimizer.state[weight] = state
    return optimizer


def update(
    optimizer: MegatronOptimizer, config: OptimConfig, finished_steps: int, total_steps: int
) -> dict[str, float]:
    """Take the optimizer step after `finished_steps`; returns "grad_norm" before clipping, and "lr"."""
    lr = learning_rate(config, finished_steps, total_steps)
    return {"grad_norm": step(optimizer, lr), "lr": lr}


def step(optimizer: MegatronOptimizer, lr: float) -> float:
    """Clip the gradient, update the weights, and return the gradient's norm before clipping.

    Raises FloatingPointError if that is not finite: the weights are lost, the last checkpoint remains.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    _, grad_norm, _ = optimizer.step()
    optimizer.zero_grad()
    if not math.isfinite(grad_norm):
        raise FloatingPointError(f"the norm of the gradient is {grad_norm}")
    if optimizer not in CHECKED:
        CHECKED.add(optimizer)
        for adam in adams(optimizer)[:1]:
            for model in adam.model_chunks:
                check_replicas(model)
    return float(grad_norm)


@torch.no_grad()
def check_replicas(model: DistributedDataParallel) -> None:
    """Check that ranks with copies of a weight hold the same numbers, by its norm in float64. Collective.

    Data parallel ranks have copies of all weights, bit for bit, since they are gathered; with
    overlap_param_gather they are gathered later, and not compared. Tensor parallel ranks have copies of norms
    and biases; their gradients may differ in rounding on GPUs without --deterministic (REPLICA_BOUND). Of
    bf16 weights the fp32 main weights are compared, as far as this rank has them: bf16 hides small updates.

    Raises:
        RuntimeError: names the weight that differs most.
    """
    weights = [(name, weight) for name, weight in model.module.named_parameters() if weight.numel()]
    replicated = [
        (name, weight if (main := getattr(weight, "main_param", None)) is None else main)
        for name, weight in weights
        if not getattr(weight, "tensor_model_parallel", False)
    ]
    is_exact = torch.are_deterministic_algorithms_enabled() or parallel.device().type == "cpu"
    checks = [
        ("tensor", mpu.get_tensor_model_parallel_group(), replicated, 0.0 if is_exact else REPLICA_BOUND)
    ]
    if not model.ddp_config.overlap_param_gather:
        checks.append(("data", mpu.get_data_parallel_group(with_context_parallel=True), weights, 0.0))
    for kind, group, copies, bound in checks:
        if group.size() == 1 or not copies:
            continue
        norms = torch.stack([torch.linalg.vector_norm(weight, dtype=torch.float64) for _, weight in copies])
        extremes = torch.stack([norms, -norms])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
        spread = extremes.sum(0) / extremes[0].clamp(min=1e-30)
        largest, worst = (x.item() for x in spread.max(0))
        if not largest <= bound:
            raise RuntimeError(
                f"audit: {copies[int(worst)][0]} differs between {kind} parallel ranks, "
                f"which hold copies of it: its norm by {largest:.2g} of it. A collective is missing"
            )


@torch.no_grad()
def reset(optimizer: MegatronOptimizer) -> None:
    """Reset both moments and the step count to 0; the weights stay."""
    for adam in adams(optimizer):
        for state in adam.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq", "step"):
                if name in state:
                    state[name].zero_()
        for group in adam.optimizer.param_groups:
            if "step" in group:  # the count of Transformer Engine's Adam
                group["step"] = 0 * group["step"]


def adams(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The distributed optimizers inside Megatron's chain that hold weights."""
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chain if not part.is_stub_optimizer]
