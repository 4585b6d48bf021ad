import sys
import warnings

from align import help_imports

if help_imports.only_help(sys.argv[1:]):
    sys.meta_path.insert(0, help_imports.Finder())

# Megatron warns of missing packages in a dozen lines per rank; the run's log names the kernels in use.
warnings.filterwarnings("ignore", module="megatron")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # Megatron's calls
