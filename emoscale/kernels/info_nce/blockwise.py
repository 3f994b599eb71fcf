"""The two passes over the logits in plain PyTorch, a cached tile at a time, on any device.

Both take one exponential per logit: with a tile's reference value m, e = exp(l − m) serves the sums of its rows and of its
columns, and in the backward G = e · (a_i + b_j) with a_i = ½ exp(m − lse_i), b_j = ½ exp(m − lse_j). Where every logit is
known to lie within ±SAFE, m is 0 and costs nothing; else it is the tile's maximum, and a tile whose rows or columns lie too
far below it for float32 takes an exponential for each direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS, COLUMNS = 512, 4096
"""Logits of a tile: 8 MiB in float32, small enough to stay in a last-level cache, large enough to feed a GEMM."""
SAFE = 60.0
"""exp(±60) and sums of 10**9 of them are normal float32 numbers."""
LEAST = 1e-27
"""A smaller sum of exp(l − m) may have lost terms to underflow: they are below 1e-38 each."""
REACH = 66.0
"""exp(m − lse) beyond it would lift lost terms to where they count: exp(66) · 1e-38 < 1e-9."""


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


def statistics(
    x: Tensor, y: Tensor, scale: Tensor, row_valid: Tensor | None, col_valid: Tensor | None, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the log-sum-exp of every row [p, b] and column [p, g] of the block, and the logits of the partners [p, b].

    Args:
        x: [p, b, d] rows; `y`: [p, g, d] columns; zero where not valid.
        scale: 0-dim.
        row_valid: bool [p, b]; `col_valid`: bool [p, g]. What is not valid takes part in no sum; sums of nothing are −inf.
        offset: the partner of row i is column i + offset.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    p, b, g = *x.shape[:2], y.shape[1]
    row_lse, col_lse = (torch.full((p, n), float("-inf"), dtype=wide, device=x.device) for n in (b, g))
    partner = torch.zeros((p, b), dtype=wide, device=x.device)
    for pair in range(p):
        left, right = x[pair].to(wide) * scale.to(wide), y[pair].to(wide)
        tame = _is_tame(left, right)
        rows, cols = _ones(row_valid, pair, left), _ones(col_valid, pair, right)
        for tile in _tiles(left, right, _buffer(left, right)):
            where, own = tile.diagonal(offset)
            partner[pair, where] = own
            by_row, by_col = _log_sums(tile, left, right, rows[tile.i], cols[tile.j], tame)
            for total, part in ((row_lse[pair, tile.i], by_row), (col_lse[pair, tile.j], by_col)):
                torch.logaddexp(total, part, out=total)
    return row_lse, col_lse, partner


def _log_sums(tile: Tile, x: Tensor, y: Tensor, rows: Tensor, cols: Tensor, tame: bool) -> tuple[Tensor, Tensor]:
    """Give the log-sum-exp of a tile's rows and columns; overwrites the tile."""
    logits = tile.logits
    if tame:
        logits.exp_()
        return torch.mv(logits, cols).log_(), torch.mv(logits.T, rows).log_()
    top = logits.amax()
    logits.sub_(top).exp_()
    by_row, by_col = torch.mv(logits, cols), torch.mv(logits.T, rows)
    lost = (((by_row < LEAST) & (rows > 0)).any() & (cols > 0).any()) | (((by_col < LEAST) & (cols > 0)).any() & (rows > 0).any())
    if not lost:
        return by_row.log_() + top, by_col.log_() + top
    torch.mm(x[tile.i], y[tile.j].T, out=logits)
    logits.masked_fill_((rows == 0)[:, None] | (cols == 0), float("-inf"))
    return logits.logsumexp(1), logits.logsumexp(0)


def gradients(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    shift: Tensor,
    weight: Tensor,
    row_valid: Tensor | None,
    col_valid: Tensor | None,
    offset: int,
    keep: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the block's part of the gradients to x (its dtype), to y [p, g, d] and to the scale, both float32 or wider.

    With G = ½ exp(l − row_lse) + ½ exp(l − col_lse) − keep · [partner] − shift, they are scale · weight · G y,
    scale · weight · Gᵀ x and weight · ⟨x, G y⟩; `shift` and `weight` are [p]. The rest as in `statistics`.
    """
    wide = row_lse.dtype
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
            lse = row_lse[pair, tile.i], col_lse[pair, tile.j]
            _shares(tile, scaled, right, lse, (rows[tile.i], cols[tile.j]), tame, factors)
            if keep != 1.0:
                tile.logits.sub_(shift[pair])
            tile.diagonal(offset)[1].sub_(keep)
            gy[tile.i].addmm_(tile.logits, right[tile.j])
            gx[tile.j].addmm_(tile.logits.T, left[tile.i])
        dscale += weight[pair] * torch.sum(left * gy)
        dx[pair] = gy.mul_(scale * weight[pair])
        gx.mul_(scale * weight[pair])
    return dx, dy, dscale


def _shares(
    tile: Tile, x: Tensor, y: Tensor, lse: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor], tame: bool, factors: Tensor
) -> None:
    """Overwrite a tile's logits with the mean of both softmaxes; finite, but meaningless, where not valid."""
    logits = tile.logits
    (row_lse, col_lse), (rows, cols) = lse, valid
    top = torch.zeros((), dtype=logits.dtype, device=logits.device) if tame else logits.amax()
    near = torch.stack([(top - row_lse).mul(rows).max(), (top - col_lse).mul(cols).max()]).max() if not tame else top
    if tame or near <= REACH:
        logits.sub_(top).exp_() if not tame else logits.exp_()
        a = torch.where(rows > 0, (top - row_lse).exp_(), 0.0).mul_(0.5)
        b = torch.where(cols > 0, (top - col_lse).exp_(), 0.0).mul_(0.5)
        logits.mul_(torch.add(a[:, None], b, out=factors[: logits.numel()].view_as(logits)))
        return
    gone = (rows == 0)[:, None] | (cols == 0)
    by_row = (logits - row_lse[:, None]).exp_()
    logits.sub_(col_lse).exp_().add_(by_row).mul_(0.5).masked_fill_(gone, 0.0)
