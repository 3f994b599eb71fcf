"""Max + mean pooling in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def max_mean_pool(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Pool each sequence of a packed tensor; sums in float32 or wider.

    Rows that hold the maximum share its gradient. PyTorch has two traps there: `segment_reduce` hands the whole of a negative
    gradient to each of them, and `scatter_reduce` counts what it starts from as one more of them where the two are equal,
    so it starts from NaN here, which equals nothing.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    lengths = cu_seqlens.diff().to(torch.int64)
    empty = (lengths == 0)[:, None]
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths, output_size=len(x))
    owner = owner[:, None].expand_as(wide)
    nothing = wide.new_full((len(lengths), x.shape[1]), torch.nan)
    largest = nothing.scatter_reduce(0, owner, wide, "amax", include_self=False).masked_fill(empty, 0.0)
    total = torch.zeros_like(nothing).scatter_add(0, owner, wide)
    pooled = largest + total / lengths.clamp(min=1)[:, None]
    spread = torch.where(pooled.detach().isnan(), torch.nan, 1.0)  # where the value is NaN, so is the whole gradient
    return (pooled * spread).to(x.dtype)
