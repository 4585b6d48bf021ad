"""A stand-in for flash-attn: the names and arguments of 2.8.3 in use, computed query by query.

Read in Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py, v2.6.3 to v2.8.3 and 0251105a (2.8.4):
the arguments are the same in all; nothing of its code is here.
"""

from torch import Tensor

from tests.support.packed_attention import loops

__version__ = "2.8.3"


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Causal attention aligned to the last key of each sequence."""
    assert dropout_p == softcap == 0 and alibi_slopes is block_table is None and not return_attn_probs
    assert causal and isinstance(deterministic, bool)
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return loops(q, k, v, *bounds, scale=softmax_scale, window_size=window_size)
