"""The two passes over the logits in Triton: tiles that live in registers; a band of gradients that feeds cuBLAS.

Forward: each program computes one tile of logits, in powers of two, and writes the sums of its rows and of its columns from
one exponential per logit (see `blockwise`); a second kernel merges what the tiles of a row or column wrote. Tops are whole
numbers, so that moving a sum from one to another is exact. Backward: the tiles
of a band of rows are computed again and G is written in the dtype of the inputs; G y and Gᵀ x are matrix products for
cuBLAS, which accumulates them in float32. No atomics: the same bits at every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emoscale.kernels import launch
from emoscale.kernels.aot import Variant
from emoscale.kernels.info_nce.blockwise import Sums

LOG2E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(1e-27)
REACH = tl.constexpr(96.0)
"""As in `blockwise`, the latter in powers of two."""
BAND_BYTES = 64 << 20
"""Of G in memory: at 32,768 columns 1,024 rows of bf16, so that the float32 sum of Gᵀ x is read and written 32 times."""
LIFT = {torch.float16: 1024.0}
"""G is at most 1 and mostly near 1/b, which fp16 would hold as a subnormal number."""


@triton.jit
def _place(program, b, g, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Give a program's tile: GROUP tiles of rows share the columns that lie in the L2 cache."""
    tall, broad = tl.cdiv(b, BM), tl.cdiv(g, BN)
    first = (program // (GROUP * broad)) * GROUP
    height = tl.minimum(tall - first, GROUP)
    inside = program % (GROUP * broad)
    return first + inside % height, inside // height


@triton.jit
def _products(x, y, rows, cols, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr):
    """Give ⟨x_row, y_col⟩ [BM, BN] in float32."""
    k = tl.arange(0, BK)
    x_at = x + rows.to(tl.int64)[:, None] * D + k[None, :]
    y_at = y + cols.to(tl.int64)[None, :] * D + k[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, D, BK):
        if D % BK == 0:
            left, right = tl.load(x_at), tl.load(y_at)
        else:
            real = start + k < D
            left = tl.load(x_at, mask=real[None, :], other=0.0)
            right = tl.load(y_at, mask=real[:, None], other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        x_at += BK
        y_at += BK
    return acc


@triton.jit
def _real(at, n, valid, MASKED: tl.constexpr):
    """Say which of the rows or columns `at` exist and are valid."""
    real = at < n
    if MASKED:
        real = real & (tl.load(valid + at, mask=real, other=0) != 0)
    return real


@triton.jit
def _whole(top):
    """Round up a largest logit; of nothing 0."""
    return tl.where(top == float("-inf"), 0.0, tl.ceil(top))


@triton.jit
def info_nce_fwd_kernel(
    x, y, scale, row_valid, col_valid, row_top, row_total, col_top, col_total, partner, b, g, offset,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sums of every row and column of each tile, and the logits of the partners."""
    pair = tl.program_id(1).to(tl.int64)
    tile_m, tile_n = _place(tl.program_id(0), b, g, BM, BN, GROUP)
    rows, cols = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    # Rows past the end read the last one: cheaper than a mask in the loop, and left out below.
    last_row, last_col = tl.minimum(rows, b - 1), tl.minimum(cols, g - 1)
    acc = _products(x + pair * b * D, y + pair * g * D, last_row, last_col, D, BM, BN, BK, UPCAST)
    acc = acc * (tl.load(scale).to(tl.float32) * LOG2E)
    if (tile_m * BM + offset < tile_n * BN + BN) & (tile_m * BM + offset + BM > tile_n * BN):
        match = cols[None, :] == rows[:, None] + offset
        mine = (rows < b) & (rows + offset >= tile_n * BN) & (rows + offset < tile_n * BN + BN)
        tl.store(partner + pair * b + rows, tl.sum(tl.where(match, acc, 0.0), axis=1), mask=mine)
    row_real = _real(rows, b, row_valid + pair * b, MASKED)
    col_real = _real(cols, g, col_valid + pair * g, MASKED)
    logits = tl.where(row_real[:, None] & col_real[None, :], acc, float("-inf"))
    top = _whole(tl.max(tl.max(logits, axis=1), axis=0))
    e = tl.exp2(logits - top)
    by_row, by_col = tl.sum(e, axis=1), tl.sum(e, axis=0)
    top_row, top_col = tl.zeros_like(by_row) + top, tl.zeros_like(by_col) + top
    some = (tl.max(row_real.to(tl.int32), axis=0) > 0) & (tl.max(col_real.to(tl.int32), axis=0) > 0)
    low = tl.minimum(tl.min(tl.where(row_real, by_row, 1.0), axis=0), tl.min(tl.where(col_real, by_col, 1.0), axis=0))
    if some & (low < LEAST):
        top_row, top_col = _whole(tl.max(logits, axis=1)), _whole(tl.max(logits, axis=0))
        by_row = tl.sum(tl.exp2(logits - top_row[:, None]), axis=1)
        by_col = tl.sum(tl.exp2(logits - top_col[None, :]), axis=0)
    row_at = (pair * tl.cdiv(g, BN) + tile_n) * b + rows
    col_at = (pair * tl.cdiv(b, BM) + tile_m) * g + cols
    tl.store(row_top + row_at, top_row, mask=rows < b)
    tl.store(row_total + row_at, by_row, mask=rows < b)
    tl.store(col_top + col_at, top_col, mask=cols < g)
    tl.store(col_total + col_at, by_col, mask=cols < g)


@triton.jit
def info_nce_merge_kernel(tops, totals, top_out, total_out, tiles, n, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Sums [p, n] of the sums of tiles [p, tiles, n]; of nothing (−inf, 0)."""
    pair = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    tile = 0
    while tile < tiles:
        every = tile + tl.arange(0, CHUNK)
        where = (pair * tiles + every)[:, None] * n + at[None, :]
        mask = (every < tiles)[:, None] & inside[None, :]
        part = tl.load(totals + where, mask=mask, other=0.0)
        part_top = tl.where(part == 0.0, float("-inf"), tl.load(tops + where, mask=mask, other=0.0))
        higher = tl.maximum(top, tl.max(part_top, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - base) + tl.sum(part * tl.exp2(part_top - base[None, :]), axis=0)
        top = higher
        tile += CHUNK
    tl.store(top_out + pair * n + at, top, mask=inside)
    tl.store(total_out + pair * n + at, total, mask=inside)


@triton.jit
def info_nce_band_kernel(
    x, y, scale, row_top, row_total, col_top, col_total, shift, band, row_valid, col_valid,
    b, g, first, count, stride, offset, keep, lift,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """G of rows [first, first + count), zero where not valid."""
    pair = tl.program_id(1).to(tl.int64)
    tile_m, tile_n = _place(tl.program_id(0), count, g, BM, BN, GROUP)
    inner, cols = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    rows = first + inner
    last_row, last_col = tl.minimum(rows, b - 1), tl.minimum(cols, g - 1)
    acc = _products(x + pair * b * D, y + pair * g * D, last_row, last_col, D, BM, BN, BK, UPCAST)
    row_real = _real(rows, b, row_valid + pair * b, MASKED) & (inner < count)
    col_real = _real(cols, g, col_valid + pair * g, MASKED)
    real = row_real[:, None] & col_real[None, :]
    logits = tl.where(real, acc * (tl.load(scale).to(tl.float32) * LOG2E), float("-inf"))
    row_at, col_at = pair * b + rows, pair * g + cols
    over_row = tl.load(row_top + row_at, mask=row_real, other=float("inf"))
    over_col = tl.load(col_top + col_at, mask=col_real, other=float("inf"))
    per_row = 0.5 / tl.load(row_total + row_at, mask=row_real, other=float("inf"))
    per_col = 0.5 / tl.load(col_total + col_at, mask=col_real, other=float("inf"))
    top = _whole(tl.max(tl.max(logits, axis=1), axis=0))
    # A total is at least 1/2 (its top is rounded up), so the tops alone bound the factors.
    far = tl.maximum(tl.max(top - over_row, axis=0), tl.max(top - over_col, axis=0))
    if far > REACH:
        grad = tl.exp2(logits - over_row[:, None]) * per_row[:, None] + tl.exp2(logits - over_col[None, :]) * per_col[None, :]
    else:
        a, c = tl.exp2(top - over_row) * per_row, tl.exp2(top - over_col) * per_col
        grad = tl.exp2(logits - top) * (a[:, None] + c[None, :])
    grad = grad - tl.load(shift + pair)
    if (first + tile_m * BM + offset < tile_n * BN + BN) & (first + tile_m * BM + offset + BM > tile_n * BN):
        grad = tl.where(cols[None, :] == rows[:, None] + offset, grad - keep, grad)
    grad = tl.where(real, grad * lift, 0.0)
    at = (pair * count + inner.to(tl.int64))[:, None] * stride + cols[None, :]
    tl.store(band + at, grad.to(band.dtype.element_ty), mask=(inner < count)[:, None] & (cols < stride)[None, :])


def _tile(b: int, g: int, d: int, dtype: torch.dtype) -> tuple[dict[str, int], int, int]:
    """Give the tile, warps and stages for a shape; chosen from compiled resources, not from timings."""
    if launch.interpreted():
        return {"BM": 32, "BN": 64, "BK": 32, "GROUP": 2}, 4, 2
    if dtype == torch.float32:  # without tensor cores: exact products
        return {"BM": 64, "BN": 64, "BK": 32, "GROUP": 8}, 4, 3
    wide = 64 if d >= 64 else 32
    if b * g <= 2048 * 2048:  # 132 SMs want more tiles than 128 × 128 gives at the paper's 640 utterances
        return {"BM": 64, "BN": 128, "BK": wide, "GROUP": 8}, 4, 3
    # At 128 × 256 both kernels spill: they keep the logits for a second exponential that is rarely taken.
    return {"BM": 128, "BN": 128, "BK": wide, "GROUP": 8}, 8, 3


def _flags(dtype: torch.dtype, row_valid: Tensor | None) -> dict[str, bool]:
    # The interpreter's bf16 is wrong in arithmetic, so it computes in float32 there.
    return {"MASKED": row_valid is not None, "UPCAST": launch.interpreted() and dtype != torch.float32}


def _bytes(valid: Tensor | None, like: Tensor) -> Tensor:
    """Give a mask as bytes; a kernel that has none takes, and never reads, any pointer."""
    return like if valid is None else valid.contiguous().view(torch.uint8)


def _both(like: Tensor, row_valid: Tensor | None, col_valid: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Padding of other ranks makes columns invalid where this rank's rows are all valid."""
    if row_valid is None and col_valid is not None:
        row_valid = torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
    return row_valid, col_valid


def _merge(tops: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    p, tiles, n = tops.shape
    top, total = tops.new_empty((p, n)), tops.new_empty((p, n))
    block = 128 if not launch.interpreted() else 1024
    info_nce_merge_kernel[(triton.cdiv(n, block), p)](tops, totals, top, total, tiles, n, BLOCK=block, CHUNK=16)
    return top, total


@launch.on_its_device
def statistics(x: Tensor, y: Tensor, scale: Tensor, row_valid: Tensor | None, col_valid: Tensor | None, offset: int) -> Sums:
    """See `blockwise.statistics`."""
    (p, b, d), g = x.shape, y.shape[1]
    partner = torch.empty((p, b), dtype=torch.float32, device=x.device)
    if b == 0:
        nothing = partner.new_zeros((p, g))
        return partner, partner.clone(), nothing - float("inf"), nothing, partner.clone()
    row_valid, col_valid = _both(x, row_valid, col_valid)
    tile, warps, stages = _tile(b, g, d, x.dtype)
    tall, broad = triton.cdiv(b, tile["BM"]), triton.cdiv(g, tile["BN"])
    row_top, col_top = partner.new_empty((p, broad, b)), partner.new_empty((p, tall, g))
    row_total, col_total = torch.empty_like(row_top), torch.empty_like(col_top)
    info_nce_fwd_kernel[(tall * broad, p)](
        x, y, scale, _bytes(row_valid, x), _bytes(col_valid, y), row_top, row_total, col_top, col_total, partner,
        b, g, offset,
        D=d, **tile, **_flags(x.dtype, row_valid), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return *_merge(row_top, row_total), *_merge(col_top, col_total), partner


def band_rows(p: int, b: int, g: int, itemsize: int) -> int:
    """Give how many rows of G are in memory at once: what BAND_BYTES hold, in whole tiles, at least 256."""
    return min(b, max(256, BAND_BYTES // (p * g * itemsize) // 128 * 128))


@launch.on_its_device
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
    """See `blockwise.gradients`."""
    (p, b, d), g = x.shape, y.shape[1]
    dx, dy = torch.empty_like(x), torch.zeros(y.shape, dtype=torch.float32, device=y.device)
    dscale = torch.zeros((), dtype=torch.float32, device=x.device)
    if b == 0:
        return dx, dy, dscale
    row_valid, col_valid = _both(x, row_valid, col_valid)
    tile, warps, stages = _tile(b, g, d, x.dtype)
    dtype = torch.float32 if launch.interpreted() and x.dtype == torch.bfloat16 else x.dtype
    lift = LIFT.get(dtype, 1.0)
    weight = (weight.to(torch.float32) / lift)[:, None, None]
    factor = weight * scale.to(torch.float32)
    most, stride = band_rows(p, b, g, dtype.itemsize), triton.cdiv(g, 8) * 8  # rows of G begin on 16 bytes, for cuBLAS
    buffer = torch.empty(p * most * stride, dtype=dtype, device=x.device)
    for first in range(0, b, most):
        count = min(most, b - first)
        band = buffer[: p * count * stride].view(p, count, stride)
        tiles = triton.cdiv(count, tile["BM"]) * triton.cdiv(g, tile["BN"])
        info_nce_band_kernel[(tiles, p)](
            x, y, scale, *sums, shift, band, _bytes(row_valid, x), _bytes(col_valid, y),
            b, g, first, count, stride, offset, keep, lift,
            D=d, **tile, **_flags(x.dtype, row_valid), num_warps=warps, num_stages=stages,
        )  # fmt: skip
        band, part = band[..., :g], x[:, first : first + count]
        gy = _accumulate(None, band, y)
        dscale += (weight * gy * part).sum()
        dx[:, first : first + count] = gy.mul_(factor)
        _accumulate(dy, band.transpose(1, 2), part)
    return dx, dy.mul_(factor), dscale


def _accumulate(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Add left @ right to `total` in place, in float32 whatever the dtype of the factors."""
    if left.dtype == torch.float32 or not left.is_cuda:  # a CPU has no product of half precision with a float32 result
        left, right = left.float(), right.float()
        return torch.bmm(left, right) if total is None else total.baddbmm_(left, right)
    if total is None:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.baddbmm(total, left, right, out_dtype=torch.float32, out=total)


def variants() -> list[Variant]:
    """Give the kernels to compile ahead of time: both tiles of half precision, and float32."""
    found = []
    for name, b, d, dtype in (("640", 640, 768, "bf16"), ("32768", 32768, 768, "bf16"), ("fp32", 8192, 256, "fp32")):
        inputs = {"x": f"*{dtype}", "y": f"*{dtype}", "scale": "*fp32", "row_valid": "*u8", "col_valid": "*u8"}
        sizes = dict.fromkeys(("b", "g", "offset"), "i32")
        sums = dict.fromkeys(("row_top", "row_total", "col_top", "col_total"), "*fp32")
        band = sums | {"shift": "*fp32"} | {"band": f"*{dtype}", "keep": "fp32", "lift": "fp32"}
        more = dict.fromkeys(("first", "count", "stride"), "i32")
        for stem, kernel, signature in (
            ("fwd", info_nce_fwd_kernel, inputs | sums | {"partner": "*fp32"} | sizes),
            ("band", info_nce_band_kernel, inputs | band | sizes | more),
        ):
            tile, warps, stages = _tile(b, b, d, torch.bfloat16 if dtype == "bf16" else torch.float32)
            constants = {"D": d, **tile, "MASKED": True, "UPCAST": False}
            aligned = tuple(key for key in signature if key not in ("keep", "lift", "offset", "first", "count"))
            found.append(Variant(f"info_nce_{stem}_{name}", kernel, signature, constants, warps, stages, aligned))
    signature = dict.fromkeys(("tops", "totals", "top_out", "total_out"), "*fp32") | {"tiles": "i32", "n": "i32"}
    constants = {"BLOCK": 128, "CHUNK": 16}
    found.append(
        Variant(
            "info_nce_merge",
            info_nce_merge_kernel,
            signature,
            constants,
            4,
            2,
            ("tops", "totals", "top_out", "total_out", "n"),
        )
    )
    return found
