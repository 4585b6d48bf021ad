"""A stand-in for Transformer Engine 2.11: names and arguments of what Megatron uses of it, computed by torch.

No argument is taken that the real class does not have, and none is ignored in silence that would change what
is computed. Only tests put this package on the path.
"""

from transformer_engine import common, pytorch

__version__ = "2.11.0"
__all__ = ["common", "pytorch"]
