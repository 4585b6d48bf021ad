import warnings

# Megatron tells in a dozen lines a rank what it does not find; the run's log says which kernels it uses.
warnings.filterwarnings("ignore", module="megatron")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # Megatron's calls
