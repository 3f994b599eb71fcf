"""The two passes over the logits as registered operators, so that `torch.compile` sees through; eager calls go past them."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from emoscale.kernels import launch
from emoscale.kernels.info_nce import blockwise
from emoscale.kernels.info_nce.blockwise import Sums

UNITS = {"triton": math.log(2.0), "blockwise": blockwise.UNIT}
"""Who computes the passes → what a logit of theirs is a multiple of."""
LIBRARY = torch.library.Library("emoscale", "FRAGMENT")


def _module(form: str) -> ModuleType:
    if form == "blockwise":
        return blockwise
    from emoscale.kernels.info_nce import triton

    return triton


def _statistics(x: Tensor, y: Tensor, scale: Tensor, row_valid: Tensor | None, col_valid: Tensor | None, offset: int, form: str) -> Sums:
    return _module(form).statistics(x, y, scale, row_valid, col_valid, offset)


def _gradients(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    sums: list[Tensor],
    shift: Tensor,
    weight: Tensor,
    row_valid: Tensor | None,
    col_valid: Tensor | None,
    offset: int,
    keep: float,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _module(form).gradients(x, y, scale, sums, shift, weight, row_valid, col_valid, offset, keep)


LIBRARY.define(
    "info_nce_statistics(Tensor x, Tensor y, Tensor scale, Tensor? row_valid, Tensor? col_valid, SymInt offset, str form)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "info_nce_gradients(Tensor x, Tensor y, Tensor scale, Tensor[] sums, Tensor shift, Tensor weight, "
    "Tensor? row_valid, Tensor? col_valid, SymInt offset, float keep, str form) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("info_nce_statistics", _statistics, "CompositeExplicitAutograd")
LIBRARY.impl("info_nce_gradients", _gradients, "CompositeExplicitAutograd")


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("emoscale::info_nce_statistics")
def _(x: Tensor, y: Tensor, scale: Tensor, row_valid: Tensor | None, col_valid: Tensor | None, offset: int, form: str) -> Sums:
    rows, columns = (part.new_empty(part.shape[:2], dtype=_wide(x)) for part in (x, y))
    return rows, torch.empty_like(rows), columns, torch.empty_like(columns), torch.empty_like(rows)


@torch.library.register_fake("emoscale::info_nce_gradients")
def _(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    sums: list[Tensor],
    shift: Tensor,
    weight: Tensor,
    row_valid: Tensor | None,
    col_valid: Tensor | None,
    offset: int,
    keep: float,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(x)
    return x.new_empty(x.shape), y.new_empty(y.shape, dtype=wide), x.new_empty((), dtype=wide)


def statistics(x: Tensor, y: Tensor, scale: Tensor, row_valid: Tensor | None, col_valid: Tensor | None, offset: int, form: str) -> Sums:
    """See `blockwise.statistics`."""
    run = torch.ops.emoscale.info_nce_statistics if launch.looked_at() else _statistics
    return run(x, y, scale, row_valid, col_valid, offset, form)


def gradients(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    sums: list[Tensor],
    shift: Tensor,
    weight: Tensor,
    row_valid: Tensor | None,
    col_valid: Tensor | None,
    offset: int,
    keep: float,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `blockwise.gradients`."""
    run = torch.ops.emoscale.info_nce_gradients if launch.looked_at() else _gradients
    return run(x, y, scale, sums, shift, weight, row_valid, col_valid, offset, keep, form)
