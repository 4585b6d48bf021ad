"""A stand-in for FlashAttention 3: the names that torch looks for when it activates it, and no kernels.

Read in torch 2.13, torch/nn/attention/_fa3.py; nothing of its code is here.
"""

import torch

LIBRARY = torch.library.Library("flash_attn_3", "DEF")
LIBRARY.define("fwd(Tensor q) -> Tensor")
LIBRARY.define("bwd(Tensor q) -> Tensor")
