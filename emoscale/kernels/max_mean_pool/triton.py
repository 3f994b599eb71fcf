"""Max + mean pooling in Triton: the forward reads x once, the backward writes its gradient once.

One program takes one sequence (its first `cap` rows) and a block of columns. Rows beyond `cap` go to programs of their
own, one per `cap` packed rows, so that one long sequence keeps the whole GPU busy and not one processor; a small third
kernel joins the parts. At most one such tail meets any `cap` packed rows, since every tail follows a head of `cap` rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emoscale.kernels.aot import Variant
from emoscale.kernels.launch import on_its_device
from emoscale.kernels.max_mean_pool.autograd import differentiable
from emoscale.kernels.max_mean_pool.fake import max_mean_pool as fake
from emoscale.kernels.max_mean_pool.fake import max_mean_pool_backward as fake_backward
from emoscale.kernels.register import register

SHARED = tl.constexpr(-(2**31))
"""Sign bit: rows that are not known hold the maximum too. Alone, in `peak`: the pooled value is NaN."""
NO_ROW = tl.constexpr(0x7FFFFFFF)
PAIR = tl.constexpr(15)
FIRST = tl.constexpr(2**15 - 1)
"""`peak` holds the first row of a maximum, and from this bit on how far behind it the second lies: half precision has pairs
in most blocks of columns. The complement of the first row stands for more rows, which the backward looks up in x. In
sequences of 2^15 rows and more there are no pairs."""


class Config(NamedTuple):
    """Rows and columns of a tile, rows per program at most, warps."""

    rows: int
    columns: int
    cap: int = 1024
    warps: int = 4


def config(rows: int, sequences: int, width: int, cap: int | None = None) -> Config:
    """Choose by what the host knows: the mean length and the width. A tile gives every thread 32 values in flight."""
    columns = min(256, max(16, triton.next_power_of_2(width)))
    mean = rows / max(sequences, 1)
    tall = 4 if mean <= 6 else 8 if mean <= 24 else 16
    chosen = Config(tall, columns, warps=max(1, tall * columns // 1024))
    return chosen if cap is None else chosen._replace(cap=cap)


@triton.jit
def _part(program, cu, sequences, cap: tl.constexpr):
    """Give the sequence of a program, its first packed row, its length, and the rows [begin, end) of it to do."""
    tail = program >= sequences
    at = (program - sequences) * cap
    low = tl.where(tail, 0, program)  # becomes the last sequence that starts at or before packed row `at`
    high = tl.where(tail, sequences, program + 1)
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(cu + middle).to(tl.int64) <= at
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    start = tl.load(cu + low).to(tl.int64)
    length = tl.load(cu + low + 1).to(tl.int64) - start
    begin = tl.where(tail, tl.maximum(at - start, cap), 0)
    end = tl.where(tail, tl.minimum(at - start + cap, length), tl.minimum(length, cap))
    return low, start, length, begin, end


@triton.jit
def _columns(width, block: tl.constexpr):
    column = tl.program_id(1) * block + tl.arange(0, block)
    return column, column < width


@triton.jit
def _take(value, row, total, top, where):
    """Add one tile of rows: sums, maxima, and the first row of each maximum (with the sign where it came again)."""
    wide = value.to(total.dtype)
    more = wide > top
    where = tl.where(more, row, tl.where(wide == top, where | SHARED, where))
    return total + wide, tl.where(more, wide, top), where


@triton.jit
def _finish(total, top, kept, length, out, peak, at, inside):
    pooled = tl.where(length > 0, top + total / tl.maximum(length, 1).to(total.dtype), 0.0)
    tl.store(out + at, pooled.to(out.dtype.element_ty), mask=inside)
    tl.store(peak + at, tl.where(pooled == pooled, kept, SHARED), mask=inside)


@triton.jit
def _forward(
    x, cu, out, peak, totals, tops, wheres, sequences, chunks, width, stride,
    CAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sequence, start, length, begin, end = _part(program, cu, sequences, CAP)
    if (program >= sequences) & (begin >= end):
        return
    column, inside = _columns(width, COLUMNS)
    lane = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], totals.dtype.element_ty)
    top = total - float("inf")
    where = tl.zeros([ROWS, COLUMNS], tl.int32)
    tile = x + (start + begin + lane)[:, None] * stride + column[None, :]
    row = (begin.to(tl.int32) + lane)[:, None]
    for _ in range(0, ((end - begin) // ROWS).to(tl.int32)):
        value = tl.load(tile, mask=inside[None, :], other=0.0)
        total, top, where = _take(value, row, total, top, where)
        tile += ROWS * stride
        row += ROWS
    if (end - begin) % ROWS != 0:
        real = (row < end) & inside[None, :]
        value = tl.load(tile, mask=real, other=float("-inf")).to(total.dtype)
        rest, top, where = _take(value, row, total, top, where)
        total = tl.where(real, rest, total)
    best = tl.max(top, axis=0)
    holds = top == best[None, :]
    first = tl.min(tl.where(holds, where & NO_ROW, NO_ROW), axis=0)
    last = tl.max(tl.where(holds, where & NO_ROW, 0), axis=0)
    holders = tl.sum(tl.where(holds, tl.where(where < 0, 3, 1), 0), axis=0)  # exact up to 2
    if (program < sequences) & (length <= CAP):
        kept = tl.where(holders > 2, ~first, first | ((last - first) << PAIR))
        _finish(tl.sum(total, axis=0), best, kept, length, out, peak, sequence * width + column, inside)
    else:
        slot = tl.where(program < sequences, (start + CAP) // CAP, chunks + program - sequences)
        tl.store(totals + slot * width + column, tl.sum(total, axis=0), mask=inside)
        tl.store(tops + slot * width + column, best, mask=inside)
        tl.store(wheres + slot * width + column, tl.where(holders > 1, first | SHARED, first), mask=inside)


@triton.jit
def _merge(cu, out, peak, totals, tops, wheres, sequences, chunks, width, CAP: tl.constexpr, COLUMNS: tl.constexpr):
    """Join the head and the tails of the sequence whose first tail begins in this chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    sequence, start, length, begin, end = _part(sequences + chunk, cu, sequences, CAP)
    if (begin > CAP) | (begin >= end):
        return
    column, inside = _columns(width, COLUMNS)
    at = chunk * width + column
    total = tl.load(totals + at, mask=inside, other=0.0)
    top = tl.load(tops + at, mask=inside, other=0.0)
    where = tl.load(wheres + at, mask=inside, other=0)
    at += chunks.to(tl.int64) * width
    for _ in range(0, ((start + length - 1) // CAP - chunk + 1).to(tl.int32)):
        value = tl.load(tops + at, mask=inside, other=0.0)
        row = tl.load(wheres + at, mask=inside, other=0)
        _, top, where = _take(value, row, total, top, where)
        total += tl.load(totals + at, mask=inside, other=0.0)
        at += width
    kept = tl.where(where < 0, ~(where & NO_ROW), where)
    _finish(total, top, kept, length, out, peak, sequence * width + column, inside)


@triton.jit
def _backward(
    grad, peak, x, cu, dx, sequences, width, stride,
    CAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sequence, start, length, begin, end = _part(program, cu, sequences, CAP)
    if begin >= end:
        return
    column, inside = _columns(width, COLUMNS)
    lane = tl.arange(0, ROWS)
    g = tl.load(grad + sequence * width + column, mask=inside, other=0.0).to(WIDE)
    kept = tl.load(peak + sequence * width + column, mask=inside, other=0)
    mean = tl.where(kept == SHARED, float("nan"), g / length.to(WIDE))
    shared = (kept < 0) & (kept != SHARED)
    first = tl.where(shared, ~kept, kept)
    last = first
    if length <= FIRST:
        last = tl.where(shared, first, (kept & FIRST) + (kept >> PAIR))
        first = tl.where(shared, first, kept & FIRST)
    ties = tl.max(shared.to(tl.int32), axis=0) > 0
    top, count = g, tl.where(first == last, 1.0, 2.0).to(WIDE)
    if ties:  # x is read in the columns whose maximum several rows hold, and nowhere else
        top = tl.load(x + (start + first) * stride + column, mask=shared, other=0.0).to(WIDE)
        hits = tl.zeros([ROWS, COLUMNS], tl.int32)
        for done in range(0, length.to(tl.int32), ROWS):
            real = ((done + lane) < length)[:, None] & shared[None, :]
            value = tl.load(x + (start + done + lane)[:, None] * stride + column[None, :], mask=real, other=float("nan"))
            hits += (value.to(WIDE) == top[None, :]).to(tl.int32)
        count = tl.where(shared, tl.sum(hits, axis=0).to(WIDE), count)
    high = (mean + g / count).to(dx.dtype.element_ty)[None, :]
    low = mean.to(dx.dtype.element_ty)[None, :]
    at = dx + (start + begin + lane)[:, None] * width + column[None, :]
    row = (begin.to(tl.int32) + lane)[:, None]
    if ties:  # a loop of its own: within one, merging the branches costs twice the instructions of the plain one
        tile = x + (start + begin + lane)[:, None] * stride + column[None, :]
        for _ in range(0, (end - begin).to(tl.int32), ROWS):
            real = (row < end) & inside[None, :]
            value = tl.load(tile, mask=real & shared[None, :], other=float("nan")).to(WIDE)
            hit = tl.where(shared[None, :], value == top[None, :], (row == first[None, :]) | (row == last[None, :]))
            tl.store(at, tl.where(hit, high, low), mask=real)
            at += ROWS * width
            tile += ROWS * stride
            row += ROWS
    else:
        for _ in range(0, (end - begin).to(tl.int32), ROWS):
            hit = (row == first[None, :]) | (row == last[None, :])
            tl.store(at, tl.where(hit, high, low), mask=(row < end) & inside[None, :])
            at += ROWS * width
            row += ROWS


def _plan(x: Tensor, cu_seqlens: Tensor, cap: int | None) -> tuple[Config, int, int, int]:
    """Give the tile, the number of sequences, of chunks that may hold a tail, and of column blocks."""
    rows, width = x.shape
    sequences = cu_seqlens.shape[0] - 1
    chosen = config(rows, sequences, width, cap)
    chunks = triton.cdiv(rows, chosen.cap) if rows > chosen.cap else 0
    return chosen, sequences, chunks, triton.cdiv(width, chosen.columns)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@on_its_device
def forward(x: Tensor, cu_seqlens: Tensor, *, cap: int | None = None) -> tuple[Tensor, Tensor]:
    """Launch the forward: (pooled [b, d], what the backward needs of each maximum, int32 [b, d])."""
    x, cu_seqlens = x if x.stride(-1) == 1 else x.contiguous(), cu_seqlens.contiguous()
    chosen, sequences, chunks, blocks = _plan(x, cu_seqlens, cap)
    width = x.shape[1]
    out, peak = fake(x, cu_seqlens)
    totals, tops = torch.empty((2, 2 * chunks, width), dtype=_wide(x.dtype), device=x.device)
    wheres = torch.empty((2 * chunks, width), dtype=torch.int32, device=x.device)
    if out.numel() == 0:
        return out, peak
    _forward[(sequences + chunks, blocks)](
        x, cu_seqlens, out, peak, totals, tops, wheres, sequences, chunks, width, x.stride(0),
        CAP=chosen.cap, ROWS=chosen.rows, COLUMNS=chosen.columns, num_warps=chosen.warps,
    )  # fmt: skip
    if chunks:
        _merge[(chunks, blocks)](
            cu_seqlens, out, peak, totals, tops, wheres, sequences, chunks, width,
            CAP=chosen.cap, COLUMNS=chosen.columns, num_warps=1,
        )  # fmt: skip
    return out, peak


@on_its_device
def backward(grad: Tensor, peak: Tensor, x: Tensor, cu_seqlens: Tensor, *, cap: int | None = None) -> Tensor:
    """Launch the backward: the gradient [t, d]."""
    x, cu_seqlens = x if x.stride(-1) == 1 else x.contiguous(), cu_seqlens.contiguous()
    chosen, sequences, chunks, blocks = _plan(x, cu_seqlens, cap)
    dx = fake_backward(grad, peak, x, cu_seqlens)
    if dx.numel() == 0:
        return dx
    _backward[(sequences + chunks, blocks)](
        grad.contiguous(), peak, x, cu_seqlens, dx, sequences, x.shape[1], x.stride(0),
        CAP=chosen.cap, ROWS=chosen.rows, COLUMNS=chosen.columns,
        WIDE=tl.float64 if x.dtype == torch.float64 else tl.float32, num_warps=chosen.warps,
    )  # fmt: skip
    return dx


max_mean_pool = differentiable(
    register("triton_max_mean_pool(Tensor x, Tensor cu_seqlens) -> (Tensor pooled, Tensor peak)", forward, fake),
    register(
        "triton_max_mean_pool_backward(Tensor grad, Tensor peak, Tensor x, Tensor cu_seqlens) -> Tensor",
        backward,
        fake_backward,
    ),
)


def variants() -> list[Variant]:
    """Give the kernels as they run at the paper's shapes, d = 768: short (words) and long (frames) sequences."""
    found = []
    for dtype in ("bf16", "fp32"):
        for mean in (4, 16, 98):
            tile = config(mean * 640, 640, 768)
            shape: dict[str, Any] = {"CAP": tile.cap, "ROWS": tile.rows, "COLUMNS": tile.columns}
            name = f"{dtype}.{tile.rows}x{tile.columns}"
            value, sizes = f"*{dtype}", {"sequences": "i32", "width": "i32", "stride": "i32"}
            parts = {"totals": "*fp32", "tops": "*fp32", "wheres": "*i32"}
            results = {"out": value, "peak": "*i32"}
            ahead = {"x": value, "cu": "*i32", **results, **parts, **sizes, "chunks": "i32"}
            back = {"grad": value, "peak": "*i32", "x": value, "cu": "*i32", "dx": value, **sizes}
            found.append(_variant(f"forward.{name}", _forward, ahead, shape, tile.warps))
            found.append(_variant(f"backward.{name}", _backward, back, {**shape, "WIDE": tl.float32}, tile.warps))
        join = {"cu": "*i32", **results, **parts, "sequences": "i32", "chunks": "i32", "width": "i32"}
        found.append(_variant(f"merge.{dtype}", _merge, join, {"CAP": tile.cap, "COLUMNS": tile.columns}, 1))
    return found


def _variant(name: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any], warps: int) -> Variant:
    aligned = tuple(argument for argument, kind in signature.items() if kind[0] == "*" or argument in ("width", "stride"))
    return Variant(f"max_mean_pool.{name}", kernel, signature, constants, num_warps=warps, aligned=aligned)
