"""Copy of the policy's weights into a model of another layout, in parts of bounded size."""

import itertools

from megatron.core import parallel_state as mpu
from megatron.core.resharding import build_centralized_reshard_plan, execute_reshard_plan
from megatron.core.resharding.utils import ReshardPlan
from megatron.core.utils import unwrap_model
from torch import nn

from align.distributed import megatron_patches, parallel

PART = 2**28  # bytes; Megatron receives a whole plan before it writes any of it


class Reshard:
    """Transfers between two models, whose layouts do not change. Collective."""

    def __init__(self, source: nn.Module, target: nn.Module):
        self.source, self.target = unwrap_model(source), target
        self.source.pg_collection.dp = mpu.get_data_parallel_group()
        self.service = megatron_patches.copy_service()
        self.parts = in_parts(build_centralized_reshard_plan(self.source, target), target)

    def run(self) -> None:
        """Overwrite the weights of the target with those of the source."""
        for part in self.parts:
            execute_reshard_plan(part, self.source, self.target, self.service)


def in_parts(plan: ReshardPlan, target: nn.Module) -> list[ReshardPlan]:
    """Cut the plan of this rank where it has received PART bytes, and sends where their receivers cut.

    A rank receives less than PART bytes and one piece of a weight in a part. Collective.
    """
    weights = dict(target.named_parameters())
    sizes = [weights[op.param_name][op.my_slice].nbytes for op in plan.recv_ops]
    starts = itertools.accumulate(sizes, initial=0)
    own = {op.task_id: start // PART for op, start in zip(plan.recv_ops, starts, strict=False)}
    part_of = {task: part for parts in parallel.gather(own) for task, part in parts.items()}
    return [
        ReshardPlan(
            *([op for op in ops if part_of[op.task_id] == part] for ops in (plan.send_ops, plan.recv_ops))
        )
        for part in range(1 + max(part_of.values()))
    ]
