"""Run by test_reshard.py on every rank: a copy of a policy in another layout, and the tensors received."""

import json
import sys
import weakref
from pathlib import Path

import torch
from megatron.core.resharding.refit import swap_model_weights

from align.distributed import parallel
from align.distributed.parallel import ParallelConfig
from align.generation import generator, reshard
from align.model import architecture, gpt, huggingface
from align.model.config import ModelConfig
from tests.support import grids
from tests.support.files import MEGATRON_0_16


def received(transfer: reshard.Reshard) -> list[int]:
    """Run a transfer; the bytes of the tensors that it receives into, alive at each run of the service."""
    service, tensors, alive = transfer.service, [], []
    name = "submit_recv_with_id" if MEGATRON_0_16 else "submit_recv"
    submit, run = getattr(service, name), service.run

    def submitting(*args: object, **options: object) -> None:
        tensors.extend(weakref.ref(x) for x in (*args, *options.values()) if isinstance(x, torch.Tensor))
        submit(*args, **options)

    def running() -> None:
        alive.append(sum(tensor.nbytes for tensor in (ref() for ref in tensors) if tensor is not None))
        run()

    setattr(service, name, submitting)
    service.run = running
    transfer.run()
    delattr(service, name)
    del service.run
    return alive


def run(layout: ParallelConfig, tp: int, part: int) -> dict:
    """Copy the weights of a policy in `layout` to `tp`, in parts, and by Megatron's function in one."""
    grids.change(layout)
    config = ModelConfig(model="tiny", precision="fp32")
    arch = architecture.read_config(config.path)
    policy = gpt.build_policy(arch, config, layout)
    huggingface.load(policy, huggingface.open_source(config.path, arch, layout.seed))
    groups = generator.rollout_groups(tp)
    copies = [gpt.in_layout(policy, config, groups) for _ in range(2)]
    for parameter in (parameter for copy in copies for parameter in copy.parameters()):
        parameter.data.fill_(torch.nan)
    reshard.PART = part
    transfer = reshard.Reshard(policy, copies[0])
    alive = received(transfer)
    swap_model_weights([policy], [copies[1]], "gloo")
    pairs = list(zip(copies[0].parameters(), copies[1].parameters(), strict=True))
    return {
        "equal": all(torch.equal(mine, megatrons) for mine, megatrons in pairs),
        "alive": alive,
        "whole": sum(parameter.nbytes for parameter in copies[0].parameters()),
        "largest": max(parameter.nbytes for parameter in copies[0].parameters()),
        "again": received(transfer) == alive,
    }


if __name__ == "__main__":
    output, layout, tp, part = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    with parallel.start(ParallelConfig()):
        results = parallel.gather(run(ParallelConfig(**layout), tp, part))
        if parallel.is_main():
            output.write_text(json.dumps(results))
