"""The two passes over the logits in Triton: tiles that live in registers; a band of gradients that feeds cuBLAS.

Forward: each program computes one tile of logits and writes the log₂-sum-exp₂ of its rows and of its columns, from one
exponential per logit (see `blockwise`); a second kernel merges what the tiles of a row or column wrote. Backward: the tiles
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

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(1e-27)
REACH = tl.constexpr(96.0)
"""As in `blockwise`, the latter in powers of two."""
BAND_BYTES = 64 << 20
"""Of G in memory: at 32,768 columns 1,024 rows of bf16, so that the float32 sum of Gᵀ x is read and written 32 times."""
LIFT = {torch.float16: 1024.0}
"""G is at most 1 and mostly near 1/b, which fp16 would hold as a subnormal number."""


@triton.jit
def _place(program, b, g, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """Give a program's tile: GROUP tiles of rows share the columns that lie in the L2 cache."""
    tall, broad = tl.cdiv(b, BM), tl.cdiv(g, BN)
    first = (program // (GROUP * broad)) * GROUP
    height = tl.minimum(tall - first, GROUP)
    inside = program % (GROUP * broad)
    return first + inside % height, inside // height


@triton.jit
def _products(x, y, rows, cols, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr):  # noqa: ANN001, ANN202, N803
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
def _real(at, n, valid, MASKED: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """Say which of the rows or columns `at` exist and are valid."""
    real = at < n
    if MASKED:
        real = real & (tl.load(valid + at, mask=real, other=0) != 0)
    return real


@triton.jit
def info_nce_fwd_kernel(  # noqa: ANN201
    x, y, scale, row_valid, col_valid, by_row, by_col, partner, b, g, offset,  # noqa: ANN001
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr, UPCAST: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Base-two log-sum-exp of every row and column of each tile, and the logits of the partners."""
    pair = tl.program_id(1).to(tl.int64)
    tile_m, tile_n = _place(tl.program_id(0), b, g, BM, BN, GROUP)
    rows, cols = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    # Rows past the end read the last one: cheaper than a mask in the loop, and left out below.
    last_row, last_col = tl.minimum(rows, b - 1), tl.minimum(cols, g - 1)
    acc = _products(x + pair * b * D, y + pair * g * D, last_row, last_col, D, BM, BN, BK, UPCAST)
    acc = acc * tl.load(scale).to(tl.float32)
    if (tile_m * BM + offset < tile_n * BN + BN) & (tile_m * BM + offset + BM > tile_n * BN):
        match = cols[None, :] == rows[:, None] + offset
        mine = (rows < b) & (rows + offset >= tile_n * BN) & (rows + offset < tile_n * BN + BN)
        tl.store(partner + pair * b + rows, tl.sum(tl.where(match, acc, 0.0), axis=1), mask=mine)
    row_real = _real(rows, b, row_valid + pair * b, MASKED)
    col_real = _real(cols, g, col_valid + pair * g, MASKED)
    logits = tl.where(row_real[:, None] & col_real[None, :], acc * LOG2E, float("-inf"))
    top = tl.max(tl.max(logits, axis=1), axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)
    e = tl.exp2(logits - top)
    row_sum, col_sum = tl.sum(e, axis=1), tl.sum(e, axis=0)
    row_lse, col_lse = top + tl.log2(row_sum), top + tl.log2(col_sum)
    some = (tl.max(row_real.to(tl.int32), axis=0) > 0) & (tl.max(col_real.to(tl.int32), axis=0) > 0)
    low = tl.minimum(tl.min(tl.where(row_real, row_sum, 1.0), axis=0), tl.min(tl.where(col_real, col_sum, 1.0), axis=0))
    if some & (low < LEAST):
        row_top, col_top = tl.max(logits, axis=1), tl.max(logits, axis=0)
        row_top, col_top = tl.where(row_real, row_top, 0.0), tl.where(col_real, col_top, 0.0)
        row_lse = row_top + tl.log2(tl.sum(tl.exp2(logits - row_top[:, None]), axis=1))
        col_lse = col_top + tl.log2(tl.sum(tl.exp2(logits - col_top[None, :]), axis=0))
    tall, broad = tl.cdiv(b, BM), tl.cdiv(g, BN)
    tl.store(by_row + (pair * broad + tile_n) * b + rows, row_lse, mask=rows < b)
    tl.store(by_col + (pair * tall + tile_m) * g + cols, col_lse, mask=cols < g)


@triton.jit
def info_nce_merge_kernel(parts, out, tiles, n, BLOCK: tl.constexpr, CHUNK: tl.constexpr):  # noqa: ANN001, ANN201, N803
    """Natural log-sum-exp [p, n] of base-two partial ones [p, tiles, n]."""
    pair = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    tile = 0
    while tile < tiles:
        every = tile + tl.arange(0, CHUNK)
        mask = (every < tiles)[:, None] & inside[None, :]
        part = tl.load(parts + (pair * tiles + every)[:, None] * n + at[None, :], mask=mask, other=float("-inf"))
        higher = tl.maximum(top, tl.max(part, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(part - base[None, :]), axis=0)
        top = higher
        tile += CHUNK
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(out + pair * n + at, (base + tl.log2(total)) * LN2, mask=inside)


@triton.jit
def info_nce_band_kernel(  # noqa: ANN201
    x, y, scale, row_lse, col_lse, shift, band, row_valid, col_valid, b, g, first, count, stride, offset, keep, lift,  # noqa: ANN001
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr, UPCAST: tl.constexpr,  # noqa: N803
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
    row_all = tl.load(row_lse + pair * b + rows, mask=row_real, other=float("inf")) * LOG2E
    col_all = tl.load(col_lse + pair * g + cols, mask=col_real, other=float("inf")) * LOG2E
    top = tl.max(tl.max(logits, axis=1), axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)
    far = tl.maximum(tl.max(top - row_all, axis=0), tl.max(top - col_all, axis=0))
    if far > REACH:
        grad = 0.5 * (tl.exp2(logits - row_all[:, None]) + tl.exp2(logits - col_all[None, :]))
    else:
        a, c = 0.5 * tl.exp2(top - row_all), 0.5 * tl.exp2(top - col_all)
        grad = tl.exp2(logits - top) * (a[:, None] + c[None, :])
    grad = grad - tl.load(shift + pair)
    if (first + tile_m * BM + offset < tile_n * BN + BN) & (first + tile_m * BM + offset + BM > tile_n * BN):
        grad = tl.where(cols[None, :] == rows[:, None] + offset, grad - keep, grad)
    grad = tl.where(real, grad * lift, 0.0)
    at = (pair * count + inner.to(tl.int64))[:, None] * stride + cols[None, :]
    tl.store(band + at, grad.to(band.dtype.element_ty), mask=(inner < count)[:, None] & (cols < stride)[None, :])


def _tile(b: int, g: int, d: int, dtype: torch.dtype, sums: bool) -> tuple[dict[str, int], int, int]:
    """Give the tile, warps and stages for a shape (`sums`: of the forward); from compiled resources, not from timings."""
    if launch.interpreted():
        return {"BM": 32, "BN": 64, "BK": 32, "GROUP": 2}, 4, 2
    if dtype == torch.float32:  # without tensor cores: exact products
        return {"BM": 64, "BN": 64, "BK": 32, "GROUP": 8}, 4, 3
    wide = 64 if d >= 64 else 32
    if b * g <= 2048 * 2048:  # 132 SMs want more tiles than 128 × 128 gives at the paper's 640 utterances
        return {"BM": 64, "BN": 128, "BK": wide, "GROUP": 8}, 4, 3
    # The forward keeps the logits for a second exponential that is rarely taken: at 128 × 256 it spills.
    return {"BM": 128, "BN": 128 if sums else 256, "BK": wide, "GROUP": 8}, 8, 3


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


def _merge(parts: Tensor) -> Tensor:
    p, tiles, n = parts.shape
    out = parts.new_empty((p, n))
    block = 128 if not launch.interpreted() else 1024
    info_nce_merge_kernel[(triton.cdiv(n, block), p)](parts, out, tiles, n, BLOCK=block, CHUNK=16)
    return out


def statistics(
    x: Tensor, y: Tensor, scale: Tensor, row_valid: Tensor | None, col_valid: Tensor | None, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `blockwise.statistics`."""
    (p, b, d), g = x.shape, y.shape[1]
    partner = torch.empty((p, b), dtype=torch.float32, device=x.device)
    if b == 0:
        return partner, torch.full((p, g), float("-inf"), dtype=torch.float32, device=x.device), partner.clone()
    row_valid, col_valid = _both(x, row_valid, col_valid)
    tile, warps, stages = _tile(b, g, d, x.dtype, sums=True)
    tall, broad = triton.cdiv(b, tile["BM"]), triton.cdiv(g, tile["BN"])
    by_row, by_col = partner.new_empty((p, broad, b)), partner.new_empty((p, tall, g))
    info_nce_fwd_kernel[(tall * broad, p)](
        x, y, scale, _bytes(row_valid, x), _bytes(col_valid, y), by_row, by_col, partner, b, g, offset,
        D=d, **tile, **_flags(x.dtype, row_valid), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return _merge(by_row), _merge(by_col), partner


def band_rows(p: int, b: int, g: int, itemsize: int) -> int:
    """Give how many rows of G are in memory at once: what BAND_BYTES hold, in whole tiles, at least 256."""
    return min(b, max(256, BAND_BYTES // (p * g * itemsize) // 128 * 128))


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
    """See `blockwise.gradients`."""
    (p, b, d), g = x.shape, y.shape[1]
    dx, dy = torch.empty_like(x), torch.zeros(y.shape, dtype=torch.float32, device=y.device)
    dscale = torch.zeros((), dtype=torch.float32, device=x.device)
    if b == 0:
        return dx, dy, dscale
    row_valid, col_valid = _both(x, row_valid, col_valid)
    tile, warps, stages = _tile(b, g, d, x.dtype, sums=False)
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
            x, y, scale, row_lse, col_lse, shift, band, _bytes(row_valid, x), _bytes(col_valid, y),
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
        sums = dict.fromkeys(("by_row", "by_col", "partner"), "*fp32")
        band = dict.fromkeys(("row_lse", "col_lse", "shift"), "*fp32") | {"band": f"*{dtype}", "keep": "fp32", "lift": "fp32"}
        more = dict.fromkeys(("first", "count", "stride"), "i32")
        for stem, kernel, signature in (
            ("fwd", info_nce_fwd_kernel, inputs | sums | sizes),
            ("band", info_nce_band_kernel, inputs | band | sizes | more),
        ):
            tile, warps, stages = _tile(b, b, d, torch.bfloat16 if dtype == "bf16" else torch.float32, stem == "fwd")
            constants = {"D": d, **tile, "MASKED": True, "UPCAST": False}
            aligned = tuple(key for key in signature if key not in ("keep", "lift", "offset", "first", "count"))
            found.append(Variant(f"info_nce_{stem}_{name}", kernel, signature, constants, warps, stages, aligned))
    signature = {"parts": "*fp32", "out": "*fp32", "tiles": "i32", "n": "i32"}
    constants = {"BLOCK": 128, "CHUNK": 16}
    found.append(Variant("info_nce_merge", info_nce_merge_kernel, signature, constants, 4, 2, ("parts", "out", "n")))
    return found
