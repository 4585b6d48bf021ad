"""Several layouts in one process, one after another: the process groups of a layout are created once.

A grid has some 30 groups. Created anew for each layout, they and their threads exist until the end of the
process.
"""

from megatron.core import parallel_state as mpu

from align.distributed import parallel

NAMES = [name for name in vars(mpu) if name.isupper() or name == "_global_process_group_list"]
FRESH = {name: vars(mpu)[name] for name in NAMES}  # before any group exists
CREATED: dict[tuple[int, ...], dict[str, object]] = {}  # by tp, pp, vp, cp: Megatron's state of a grid


def change(config: parallel.ParallelConfig) -> None:
    """Change to this layout's groups and seeds, as `parallel.make_grid` does in a new process. Collective."""
    sizes = config.tp, config.pp, config.vp, config.cp
    vars(mpu).update(CREATED.get(sizes, FRESH))
    if sizes in CREATED:
        parallel.set_seeds(config.seed)
    else:
        parallel.make_grid(config)
        CREATED[sizes] = {name: vars(mpu)[name] for name in NAMES}
