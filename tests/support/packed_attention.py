"""Attention over a pack as kernels for GPUs declare it, for the stand-ins."""

import torch
from torch import Tensor


def loops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    **grouped: bool,
) -> Tensor:
    """Reference for varlen_attn on a GPU, a query at a time: query i of m sees keys up to i + n - m of n."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and grouped.keys() <= {"enable_gqa"}
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key))  # else gradients stay uninitialised
    sizes_q, sizes_k = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert (max(sizes_q), max(sizes_k)) == (max_q, max_k) and window_size[1] == 0
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out = []
    for q, k, v in zip(query.split(sizes_q), key.split(sizes_k), value.split(sizes_k), strict=True):
        for i, one in enumerate(q, len(k) - len(q)):
            begin = 0 if window_size[0] < 0 else max(i - window_size[0], 0)
            scores = torch.einsum("hd,khd->hk", one, k[begin : i + 1]) * scale
            out.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v[begin : i + 1]))
    return torch.stack(out)
