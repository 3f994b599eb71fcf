"""Attention within packed sequences in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Softmax attention, one sequence after the other; `max_seqlen` is not needed here."""
    bounds = cu_seqlens.tolist()
    out = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        scores = torch.einsum("ihd,jhd->hij", q[start:stop], k[start:stop]) / q.shape[-1] ** 0.5
        out.append(torch.einsum("hij,jhd->ihd", torch.softmax(scores, dim=-1), v[start:stop]))
    return torch.cat(out) if out else torch.zeros_like(q)
