"""The two passes over the logits in plain PyTorch, a cached tile at a time, on any device.

A row's or column's sum is kept as (top, total) with Σ exp(l) = total · exp(top): its logarithm in one float32 would lose
what a share near 1 differs from 1 by.

Both passes take one exponential per logit: with a tile's reference value m, e = exp(l − m) serves the sums of its rows and
of its columns, and in the backward G = e · (a_i + b_j) with a_i = ½ exp(m − top_i) / total_i, b_j likewise. Where every logit is
known to lie within ±SAFE, m is 0 and costs nothing; else it is the tile's maximum, and a tile whose rows or columns lie too
far below it for float32 takes an exponential for each direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS, COLUMNS = 512, 16384
"""Logits of a tile: 32 MiB in float32. Smaller ones stay in caches, but 16,384 × 256 on two busy cores took 12.5 s with
512 × 16,384, 16.2 s with 256 × 16,384 and 19.5 s with 512 × 4,096: threads wait for each other after every operation."""
SAFE = 60.0
"""exp(±60) and sums of 10**9 of them are normal float32 numbers."""
LEAST = 1e-27
"""A smaller sum of exp(l − m) may have lost terms to underflow: they are below 1e-38 each."""
REACH = 66.0
"""exp(m − top) / total beyond it would lift lost terms to where they count: exp(66) · 1e-38 < 1e-9."""


UNIT = 1.0
Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""(row_top, row_total, col_top, col_total, partner) of `statistics`."""


@dataclass(frozen=True)
class Tile:
    """Rows `i` and columns `j` of one pair's logits, computed into a buffer that the next tile uses again."""

    i: slice
    j: slice
    logits: Tensor

    def diagonal(self, offset: int) -> tuple[slice, Tensor]:
        """Give which rows of the pair meet their partner (column i + offset) in this tile, and a view of those logits."""
        shift = self.i.start + offset - self.j.start
        n, m = self.logits.shape
        first, last = max(0, -shift), min(n, m - shift)
        if first >= last:
            return slice(0, 0), self.logits.new_empty(0)
        return slice(self.i.start + first, self.i.start + last), self.logits.diagonal(shift)


def _tiles(x: Tensor, y: Tensor, buffer: Tensor) -> Iterator[Tile]:
    for r in range(0, x.shape[0], ROWS):
        for c in range(0, y.shape[0], COLUMNS):
            i, j = slice(r, min(r + ROWS, x.shape[0])), slice(c, min(c + COLUMNS, y.shape[0]))
            n, m = i.stop - i.start, j.stop - j.start
            yield Tile(i, j, torch.mm(x[i], y[j].T, out=buffer[: n * m].view(n, m)))


def _buffer(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(min(ROWS, x.shape[0]) * min(COLUMNS, y.shape[0]))


def _is_tame(x: Tensor, y: Tensor) -> bool:
    """Say whether Cauchy–Schwarz keeps every logit within ±SAFE."""
    if x.shape[0] == 0 or y.shape[0] == 0:
        return True
    return bool(x.norm(dim=1).max() * y.norm(dim=1).max() <= SAFE)


def _ones(valid: Tensor | None, pair: int, like: Tensor) -> Tensor:
    return torch.ones_like(like[:, 0]) if valid is None else valid[pair].to(like.dtype)


def statistics(x: Tensor, y: Tensor, scale: Tensor, row_valid: Tensor | None, col_valid: Tensor | None, offset: int) -> Sums:
    """Give (top, total) of every row [p, b] and of every column [p, g] of the block, and the logits of the partners [p, b].

    Tops and logits are in units of `UNIT`: Σ exp(l) = total · exp(UNIT · top). A sum of nothing is (−inf, 0).

    Args:
        x: [p, b, d] rows; `y`: [p, g, d] columns; zero where not valid.
        scale: one number.
        row_valid: bool [p, b]; `col_valid`: bool [p, g]. What is not valid takes part in no sum.
        offset: the partner of row i is column i + offset.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    p, b, g = *x.shape[:2], y.shape[1]
    tops, totals = ([x.new_full((p, n), fill, dtype=wide) for n in (b, g)] for fill in (float("-inf"), 0.0))
    partner = x.new_zeros((p, b), dtype=wide)
    for pair in range(p):
        left, right = x[pair].to(wide) * scale.to(wide), y[pair].to(wide)
        tame = _is_tame(left, right)
        rows, cols = _ones(row_valid, pair, left), _ones(col_valid, pair, right)
        for tile in _tiles(left, right, _buffer(left, right)):
            where, own = tile.diagonal(offset)
            partner[pair, where] = own
            parts = _sums(tile, left, right, rows[tile.i], cols[tile.j], tame)
            for top, total, at, part in zip(tops, totals, (tile.i, tile.j), parts, strict=True):
                _merge(top[pair, at], total[pair, at], *part)
    return tops[0], totals[0], tops[1], totals[1], partner


def _merge(top: Tensor, total: Tensor, other_top: Tensor, other: Tensor) -> None:
    """Add `other` · exp(other_top) to total · exp(top) in place; a sum of nothing changes nothing."""
    other_top = torch.where(other > 0, other_top, float("-inf"))
    higher = torch.maximum(top, other_top)
    base = higher.masked_fill(higher == float("-inf"), 0.0)
    total.mul_((top - base).exp_()).add_(other * (other_top - base).exp_())
    top.copy_(torch.where(other.isnan(), 0.0, higher))


def _sums(tile: Tile, x: Tensor, y: Tensor, rows: Tensor, cols: Tensor, tame: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Give (top, total) of a tile's rows and of its columns; overwrites the tile."""
    logits = tile.logits
    top = logits.new_zeros(()) if tame else logits.amax()
    logits = logits.exp_() if tame else logits.sub_(top).exp_()
    by_row, by_col = torch.mv(logits, cols), torch.mv(logits.T, rows)
    low_row, low_col = (by_row < LEAST) & (rows > 0), (by_col < LEAST) & (cols > 0)
    if tame or not (low_row.any() & (cols > 0).any()) | (low_col.any() & (rows > 0).any()):
        return (top, by_row), (top, by_col)
    torch.mm(x[tile.i], y[tile.j].T, out=logits)
    logits.masked_fill_((rows == 0)[:, None] | (cols == 0), float("-inf"))
    row_top, col_top = (each.masked_fill(each == float("-inf"), 0.0) for each in (logits.amax(1), logits.amax(0)))
    return (row_top, (logits - row_top[:, None]).exp_().sum(1)), (col_top, (logits - col_top).exp_().sum(0))


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the block's part of the gradients to x (its dtype), to y [p, g, d] and to the scale, both float32 or wider.

    With G = ½ exp(l) / Σ_row exp(l) + ½ exp(l) / Σ_col exp(l) − keep · [partner] − shift, they are scale · weight · G y,
    scale · weight · Gᵀ x and weight · ⟨x, G y⟩; `shift` and `weight` are [p], `sums`
    what `statistics` gave for rows and columns (the latter of all ranks). The rest as there.
    """
    wide = sums[0].dtype
    dx, dy = torch.empty_like(x), torch.zeros(y.shape, dtype=wide, device=y.device)
    dscale = torch.zeros((), dtype=wide, device=x.device)
    scale = scale.to(wide)
    for pair in range(x.shape[0]):
        left, right = x[pair].to(wide), y[pair].to(wide)
        gy, gx = torch.zeros_like(left), dy[pair]
        scaled = left * scale
        tame, buffer = _is_tame(scaled, right), _buffer(left, right)
        factors = torch.empty_like(buffer)
        rows, cols = _ones(row_valid, pair, left), _ones(col_valid, pair, right)
        for tile in _tiles(scaled, right, buffer):
            of = [each[pair, at] for each, at in zip(sums, (tile.i, tile.i, tile.j, tile.j), strict=True)]
            _shares(tile, of, (rows[tile.i], cols[tile.j]), tame, factors)
            if keep != 1.0:
                tile.logits.sub_(shift[pair])
            tile.diagonal(offset)[1].sub_(keep)
            gy[tile.i].addmm_(tile.logits, right[tile.j])
            gx[tile.j].addmm_(tile.logits.T, left[tile.i])
        dscale += weight[pair] * torch.sum(left * gy)
        dx[pair] = gy.mul_(scale * weight[pair])
        gx.mul_(scale * weight[pair])
    return dx, dy, dscale


def _shares(tile: Tile, sums: list[Tensor], valid: tuple[Tensor, Tensor], tame: bool, factors: Tensor) -> None:
    """Overwrite a tile's logits with the mean of both softmaxes; finite, but meaningless, where not valid."""
    logits, (rows, cols) = tile.logits, valid
    row_top, row_total, col_top, col_total = sums
    row_total, col_total = (torch.where(real > 0, 2 * total, float("inf")) for real, total in zip(valid, sums[1::2], strict=True))
    row_top, col_top = (torch.where(real > 0, top, float("inf")) for real, top in zip(valid, sums[::2], strict=True))
    base = logits.new_zeros(()) if tame else logits.amax()
    lift = torch.stack([(base - top - total.log()).max() for top, total in ((row_top, row_total), (col_top, col_total))])
    if tame or not (lift > REACH).any():
        logits = logits.exp_() if tame else logits.sub_(base).exp_()
        a, b = ((base - top).exp_() / total for top, total in ((row_top, row_total), (col_top, col_total)))
        logits.mul_(torch.add(a[:, None], b, out=factors[: logits.numel()].view_as(logits)))
        return
    gone = (rows == 0)[:, None] | (cols == 0)
    by_row = (logits - row_top[:, None]).exp_().div_(row_total[:, None])
    logits.sub_(col_top).exp_().div_(col_total).add_(by_row).masked_fill_(gone, 0.0)
