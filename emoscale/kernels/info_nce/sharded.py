"""The loss and its gradients from two passes over one block of logits: this rank's rows against the columns of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emoscale.kernels.info_nce import shards as ranks
from emoscale.kernels.info_nce.passes import UNITS, gradients, statistics
from emoscale.kernels.info_nce.shards import Shards


def info_nce(x: Tensor, y: Tensor, logit_scale: Tensor, valid: Tensor | None, smoothing: float, shards: Shards | None, form: str) -> Tensor:
    """Give the loss of [p, b, d] pairs; `form` names who computes the two passes (`passes.UNITS`)."""
    return InfoNCE.apply(x, y, logit_scale, valid, smoothing, shards, form)


class InfoNCE(torch.autograd.Function):
    """One pass over the logits in the forward, one in the backward; between them the sums of rows and columns are kept.

    With n valid pairs and the smoothing ε, 2n · loss = Σ row_lse + Σ col_lse − 2(1 − ε) Σ l_ii − (2ε/n) Σ l_ij, and the last
    sum over all logits is scale · ⟨Σ x_i, Σ y_j⟩. These few vectors are in float64: where partners are found with certainty
    the loss is a small difference of large numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        logit_scale: Tensor,
        valid: Tensor | None,
        smoothing: float,
        shards: Shards | None,
        form: str,
    ) -> Tensor:
        """Give the loss over all ranks, the same on each."""
        rows = valid
        if valid is not None:
            x, y = (part.masked_fill(~valid[..., None], 0.0) for part in (x, y))
        x, y = x.contiguous(), y.contiguous()
        columns, offset = y, 0
        if shards is not None:
            columns, offset = ranks.gather(y, shards), shards.rank * shards.longest
            valid = shards.valid(y, valid)
        unit = UNITS[form]
        *sums, partner = statistics(x, columns, logit_scale, rows, valid, offset, form)
        count = _count(columns, valid)
        partner = partner.double() * unit  # zero where not valid
        terms = (_log(sums[0], sums[1], unit, rows) - 2 * (1 - smoothing) * partner).sum(1)
        if smoothing:
            level = torch.sum(x.sum(1, dtype=torch.float64) * columns.sum(1, dtype=torch.float64), dim=1)
            terms = terms - (2 * smoothing / count) * logit_scale.to(torch.float64) * level
        if shards is not None:
            sums[2], sums[3], terms = ranks.merge_columns(sums[2], sums[3], terms, unit, shards)
        loss = (terms + _log(sums[2], sums[3], unit, valid).sum(1)) / (2 * count)
        ctx.save_for_backward(x, columns, logit_scale, *sums, rows, valid, count)
        ctx.smoothing, ctx.shards, ctx.form, ctx.offset = smoothing, shards, form, offset
        return loss.mean().to(sums[0].dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Give the gradients whose mean over ranks is the whole batch's: this rank's share times the number of ranks."""
        x, columns, logit_scale, *sums, rows, valid, count = ctx.saved_tensors
        shards, size = ctx.shards, 1 if ctx.shards is None else ctx.shards.size
        weight, shift = (each.to(sums[0].dtype) for each in (upstream * size / (count * x.shape[0]), ctx.smoothing / count))
        with torch.autocast(x.device.type, enabled=False):
            dx, dy, dscale = gradients(x, columns, logit_scale, sums, shift, weight, rows, valid, ctx.offset, 1 - ctx.smoothing, ctx.form)
        if shards is not None:
            dy = ranks.sum_own(dy, shards)
        dy = dy.to(x.dtype)
        if rows is not None:
            dx, dy = (part.masked_fill(~rows[..., None], 0.0) for part in (dx, dy))
        return dx, dy, dscale.to(logit_scale.dtype).view_as(logit_scale), None, None, None, None


def _log(top: Tensor, total: Tensor, unit: float, valid: Tensor | None) -> Tensor:
    """Give the log-sum-exp in float64, zero where not valid."""
    lse = top.double() * unit + total.double().log()
    return lse if valid is None else lse.masked_fill(~valid, 0.0)


def _count(columns: Tensor, valid: Tensor | None) -> Tensor:
    """Give the number of valid pairs [p], at least 1, float64."""
    if valid is None:
        return torch.full((columns.shape[0],), max(columns.shape[1], 1), dtype=torch.float64, device=columns.device)
    return valid.sum(1).clamp(min=1).double()
