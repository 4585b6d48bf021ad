import warnings

# Megatron warns of missing packages in a dozen lines per rank; the run's log names the kernels in use.
warnings.filterwarnings("ignore", module="megatron")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # Megatron's calls
