"""Candidate scoring in plain PyTorch: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def candidate_loss(context: Tensor, table: Tensor, candidates: Tensor, form: str) -> Tensor:
    """Give the mean loss over contexts, in float32 or wider; no context gives zero."""
    wide = torch.float64 if context.dtype == torch.float64 else torch.float32
    scores = (context.to(wide)[:, None] * table.to(wide)[candidates]).sum(-1)
    true, noise = scores[:, 0], scores[:, 1:]
    if form == "softmax":
        losses = scores.logsumexp(1) - true
    elif form == "bce":
        losses = F.softplus(-true) + F.softplus(noise).sum(1)
    else:
        losses = F.softplus(-true) - F.softplus(-noise).sum(1)
    return losses.sum() / max(len(losses), 1)
