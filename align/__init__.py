import logging
import sys
import warnings

from align import help_imports

if help_imports.only_help(sys.argv[1:]):
    sys.meta_path.insert(0, help_imports.Finder())

# Megatron warns of missing packages in a dozen lines per rank; the run's log names the kernels in use.
warnings.filterwarnings("ignore", module="megatron")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # Megatron's calls
# Notes of Megatron-Core 0.19 on defaults and classes of its own.
NOTES = {
    "dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    "distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "transformer.transformer_layer": "Rewrapping ModuleSpec",
}
for name in NOTES:
    logger = logging.getLogger(f"megatron.core.{name}")
    logger.addFilter(lambda record: not str(record.msg).startswith(tuple(NOTES.values())))
