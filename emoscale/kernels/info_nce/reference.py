"""The symmetric in-batch contrastive loss in plain PyTorch: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from emoscale.kernels.info_nce.shards import Shards, gather


def info_nce(x: Tensor, y: Tensor, logit_scale: Tensor, valid: Tensor | None, smoothing: float, shards: Shards | None) -> Tensor:
    """Give the loss of [p, b, d] pairs with every logit in memory, in float32 or wider.

    Over ranks each computes the whole loss, with its own rows alone attached to the graph; their gradient is multiplied by
    the number of ranks, because the caller averages gradients over ranks.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, y = x.to(wide), y.to(wide)
    if shards is not None:
        x, y = (_attached(part, valid, shards) for part in (x, y))
        valid = shards.valid(x, valid)
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
    terms = [_pair(x[i], y[i], real[i], logit_scale.to(wide), smoothing) for i in range(len(x))]
    return torch.stack(terms).mean()


def _attached(part: Tensor, valid: Tensor | None, shards: Shards) -> Tensor:
    """Give the rows of all ranks, this rank's with their gradient."""
    own = part.clone() if valid is None else part.masked_fill(~valid[..., None], 0.0)
    if own.requires_grad:
        own.register_hook(lambda grad: grad * shards.size)
    whole = gather(own.detach(), shards)
    start = shards.rank * shards.longest
    return torch.cat([whole[:, :start], own, whole[:, start + part.shape[1] :]], dim=1)


def _pair(x: Tensor, y: Tensor, valid: Tensor, scale: Tensor, smoothing: float) -> Tensor:
    """Give the mean of both directions' smoothed cross-entropy over the valid rows; none gives zero."""
    logits = scale * (x[valid] @ y[valid].T)
    if len(logits) == 0:
        return logits.sum()
    target = torch.arange(len(logits), device=logits.device)
    both = [F.cross_entropy(each, target, label_smoothing=smoothing) for each in (logits, logits.T)]
    return (both[0] + both[1]) / 2
