"""Max + mean pooling in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def max_mean_pool(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Pool each sequence of a packed tensor; sums in float32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64)
    empty = (lengths == 0)[:, None]
    largest = torch.segment_reduce(wide, "max", lengths=lengths, axis=0, unsafe=True)
    total = torch.segment_reduce(wide, "sum", lengths=lengths, axis=0, unsafe=True)
    pooled = largest.masked_fill(empty, 0.0) + total / lengths.clamp(min=1)[:, None]
    return pooled.to(x.dtype)
