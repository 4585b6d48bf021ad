"""A stand-in for Transformer Engine 2.11: names and arguments of what Megatron uses of it, computed by torch.

The arguments were read in NVIDIA/TransformerEngine, transformer_engine/pytorch: tags v2.11, v2.13, v2.15,
v2.18 and d0067d0d (2.20.0.dev0). All have those taken here.

No argument is taken that the real class does not have, and none is ignored in silence that would change what
is computed. Only tests put this package on the path.
"""

from transformer_engine import common, pytorch

__version__ = "2.11.0"
__all__ = ["common", "pytorch"]
