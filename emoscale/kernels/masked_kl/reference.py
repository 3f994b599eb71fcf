"""KL divergence at masked rows in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_kl(logits: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """Sum over rows of KL(target ‖ softmax(logits)); a class of probability 0 adds nothing."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    wanted = target.index_select(0, rows).to(wide)
    wanted = wanted / wanted.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
    predicted = torch.log_softmax(logits.to(wide), dim=-1)
    return (torch.xlogy(wanted, wanted) - wanted * predicted).sum()
