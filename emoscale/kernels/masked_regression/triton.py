"""Squared error at masked rows in Triton: target rows are read through the index list, nothing is gathered or stored.

The forward writes one partial sum per program and adds them up in a fixed order, so it is deterministic; the backward reads
both operands again, which moves as many bytes as storing the gradient in the forward and scaling it in the backward would,
and holds no memory in between.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emoscale.kernels.aot import Variant
from emoscale.kernels.launch import looked_at, on_its_device

LIBRARY = torch.library.Library("emoscale", "FRAGMENT")
TILE = 2048
"""Elements per program and step: 16 per thread at four warps, so that eight programs fit on a processor (62 registers)."""


@triton.jit(do_not_specialize=["m"])
def masked_regression_fwd_kernel(
    pred, target, rows, partial, m,
    PRED_STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum the squared errors of ROWS rows, over the width, into one partial sum."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = i < m
    row = tl.load(rows + i, mask=real, other=0)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = real[:, None] & (column < D)[None, :]
        x = tl.load(pred + i[:, None] * PRED_STRIDE + column[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(target + row[:, None] * TARGET_STRIDE + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum((x - y) * (x - y), axis=1)
    tl.store(partial + tl.program_id(0), tl.sum(total) / D)


@triton.jit(do_not_specialize=["m"])
def masked_regression_bwd_kernel(
    upstream, pred, target, rows, grad, m,
    PRED_STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Give the gradient of ROWS rows, scaled by the upstream scalar where it lies."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = i < m
    row = tl.load(rows + i, mask=real, other=0)
    scale = tl.load(upstream).to(tl.float32) * (2.0 / D)
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = real[:, None] & (column < D)[None, :]
        x = tl.load(pred + i[:, None] * PRED_STRIDE + column[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(target + row[:, None] * TARGET_STRIDE + column[None, :], mask=inside, other=0.0).to(tl.float32)
        out = (scale * (x - y)).to(grad.dtype.element_ty)
        tl.store(grad + i[:, None] * D + column[None, :], out, mask=inside)


def _tile(d: int, pred_stride: int, target_stride: int) -> dict[str, int]:
    """Give the constants for a width: 128 columns where a wider step would leave more lanes idle.

    The strides are constants, so that Triton sees that 342 is even and reads four bytes at a time, not two.
    """
    columns = min((128, 256), key=lambda size: -(-d // size) * size)
    sizes = {"D": d, "ROWS": TILE // columns, "COLUMNS": columns}
    return {"PRED_STRIDE": pred_stride, "TARGET_STRIDE": target_stride, **sizes}


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@on_its_device
def _forward(pred: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    m, d = pred.shape
    if m == 0:
        return torch.zeros((), dtype=torch.float32, device=pred.device)
    x, y = _dense(pred), _dense(target)
    tile = _tile(d, x.stride(0), y.stride(0))
    partial = torch.empty(triton.cdiv(m, tile["ROWS"]), dtype=torch.float32, device=pred.device)
    masked_regression_fwd_kernel[(len(partial),)](x, y, rows.contiguous(), partial, m, **tile, num_warps=4)
    return partial.sum()


@on_its_device
def _backward(upstream: Tensor, pred: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    m, d = pred.shape
    grad = torch.empty((m, d), dtype=pred.dtype, device=pred.device)
    if m == 0:
        return grad
    x, y = _dense(pred), _dense(target)
    tile = _tile(d, x.stride(0), y.stride(0))
    masked_regression_bwd_kernel[(triton.cdiv(m, tile["ROWS"]),)](upstream, x, y, rows.contiguous(), grad, m, **tile, num_warps=4)
    return grad


LIBRARY.define("masked_regression_fwd(Tensor pred, Tensor target, Tensor rows) -> Tensor")
LIBRARY.define("masked_regression_bwd(Tensor upstream, Tensor pred, Tensor target, Tensor rows) -> Tensor")
LIBRARY.impl("masked_regression_fwd", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("masked_regression_bwd", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("emoscale::masked_regression_fwd")
def _(pred: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    return pred.new_empty((), dtype=torch.float32)


@torch.library.register_fake("emoscale::masked_regression_bwd")
def _(upstream: Tensor, pred: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    return pred.new_empty(pred.shape)


class MaskedRegression(torch.autograd.Function):
    """The two kernels as one differentiable function of `pred`; eager calls go past the dispatcher (kernel latency)."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, rows: Tensor) -> Tensor:
        """Give the sum, float32."""
        ctx.save_for_backward(pred, target, rows)
        run = torch.ops.emoscale.masked_regression_fwd if looked_at() else _forward
        return run(pred, target, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        """Give d(sum)/d(pred) in the dtype of `pred`."""
        run = torch.ops.emoscale.masked_regression_bwd if looked_at() else _backward
        return run(upstream, *ctx.saved_tensors), None, None


def masked_regression(pred: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """See `reference.masked_regression`."""
    return MaskedRegression.apply(pred, target, rows)


def variants() -> list[Variant]:
    """Give the kernels to compile ahead of time: paper widths, and a wide row."""
    found = []
    for dtype, d in (("bf16", 342), ("bf16", 768), ("fp32", 768)):
        reads = {"pred": f"*{dtype}", "target": "*fp16" if dtype == "bf16" else "*fp32", "rows": "*i64"}
        forward = {**reads, "partial": "*fp32", "m": "i32"}
        backward = {"upstream": "*fp32", **reads, "grad": f"*{dtype}", "m": "i32"}
        tile, aligned = _tile(d, d, d), ("pred", "target", "rows")
        found.append(Variant(f"masked_regression_fwd_{dtype}_{d}", masked_regression_fwd_kernel, forward, tile, 4, 2, aligned))
        found.append(Variant(f"masked_regression_bwd_{dtype}_{d}", masked_regression_bwd_kernel, backward, tile, 4, 2, (*aligned, "grad")))
    return found
