"""Attention within packed sequences in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Softmax attention, one sequence after the other, in float32 or wider; `max_seqlen` is not needed here."""
    bounds = cu_seqlens.tolist()
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    x, y, z = q.to(wide), k.to(wide), v.to(wide)
    out = [x[:0] + y[:0] + z[:0]]
    for start, stop in zip(bounds, bounds[1:], strict=False):
        scores = torch.einsum("ihd,jhd->hij", x[start:stop], y[start:stop]) / q.shape[-1] ** 0.5
        out.append(torch.einsum("hij,jhd->ihd", torch.softmax(scores, dim=-1), z[start:stop]))
    return torch.cat(out).to(q.dtype)
