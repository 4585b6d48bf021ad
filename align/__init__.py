import sys
import warnings

from align import help_imports

if help_imports.only_help(sys.argv[1:]):
    sys.meta_path.insert(0, help_imports.Finder())

# Megatron tells in a dozen lines a rank what it does not find; the run's log says which kernels it uses.
warnings.filterwarnings("ignore", module="megatron")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # Megatron's calls
