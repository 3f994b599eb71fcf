"""KL divergence at masked rows in Triton: softmax, normalisation of the teacher and divergence in one read of either.

As in `masked_regression`: teacher rows are read through the index list, partial sums are added in a fixed order, and the
backward computes again what it needs.
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
TILE = 1024
"""Elements per program where a row is shorter: 8 per thread at four warps; two operands and their softmax stay in registers."""
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _load(logits, target, rows, i, real, LOGITS_STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr):
    """Give the teacher's normalised shares and the model's log-probabilities, and where both are real."""
    row = tl.load(rows + i, mask=real, other=0)
    column = tl.arange(0, COLUMNS)
    inside = real[:, None] & (column < C)[None, :]
    wanted = tl.load(target + row[:, None] * TARGET_STRIDE + column[None, :], mask=inside, other=0.0).to(tl.float32)
    whole = tl.sum(wanted, axis=1)
    wanted = wanted / tl.where(whole < TINY, TINY, whole)[:, None]  # NaN stays NaN
    score = tl.load(logits + i[:, None] * LOGITS_STRIDE + column[None, :], mask=inside, other=0.0).to(tl.float32)
    score = tl.where((column < C)[None, :], score, float("-inf"))
    score = score - tl.max(score, axis=1)[:, None]
    predicted = score - tl.log(tl.sum(tl.exp(score), axis=1))[:, None]
    return wanted, tl.where((column < C)[None, :], predicted, 0.0), inside  # no 0 · −∞ beyond the last class


@triton.jit(do_not_specialize=["m"])
def masked_kl_fwd_kernel(
    logits, target, rows, partial, m,
    LOGITS_STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum the divergences of ROWS rows into one partial sum."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    wanted, predicted, inside = _load(logits, target, rows, i, i < m, LOGITS_STRIDE, TARGET_STRIDE, C, COLUMNS)
    entropy = tl.where(wanted == 0.0, 0.0, wanted * tl.log(tl.where(wanted == 0.0, 1.0, wanted)))
    apart = tl.where(inside, entropy - wanted * predicted, 0.0)
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(apart, axis=1)))


@triton.jit(do_not_specialize=["m"])
def masked_kl_bwd_kernel(
    upstream, logits, target, rows, grad, m,
    LOGITS_STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Give the gradient of ROWS rows, scaled by the upstream scalar where it lies."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    wanted, predicted, inside = _load(logits, target, rows, i, i < m, LOGITS_STRIDE, TARGET_STRIDE, C, COLUMNS)
    whole = tl.sum(wanted, axis=1)[:, None]  # 1, or 0 for a teacher's row of zeros
    out = tl.load(upstream).to(tl.float32) * (tl.exp(predicted) * whole - wanted)
    tl.store(grad + i[:, None] * C + tl.arange(0, COLUMNS)[None, :], out.to(grad.dtype.element_ty), mask=inside)


def _tile(c: int, logits_stride: int, target_stride: int) -> dict[str, int]:
    columns = triton.next_power_of_2(c)
    sizes = {"C": c, "ROWS": max(1, TILE // columns), "COLUMNS": columns}
    return {"LOGITS_STRIDE": logits_stride, "TARGET_STRIDE": target_stride, **sizes}


def _warps(tile: dict[str, int]) -> int:
    return 4 if tile["COLUMNS"] <= 2048 else 8


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@on_its_device
def _forward(logits: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    m, c = logits.shape
    if m == 0:
        return torch.zeros((), dtype=torch.float32, device=logits.device)
    x, y = _dense(logits), _dense(target)
    tile = _tile(c, x.stride(0), y.stride(0))
    partial = torch.empty(triton.cdiv(m, tile["ROWS"]), dtype=torch.float32, device=logits.device)
    masked_kl_fwd_kernel[(len(partial),)](x, y, rows.contiguous(), partial, m, **tile, num_warps=_warps(tile))
    return partial.sum()


@on_its_device
def _backward(upstream: Tensor, logits: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    m, c = logits.shape
    grad = torch.empty((m, c), dtype=logits.dtype, device=logits.device)
    if m == 0:
        return grad
    x, y = _dense(logits), _dense(target)
    tile = _tile(c, x.stride(0), y.stride(0))
    masked_kl_bwd_kernel[(triton.cdiv(m, tile["ROWS"]),)](upstream, x, y, rows.contiguous(), grad, m, **tile, num_warps=_warps(tile))
    return grad


LIBRARY.define("masked_kl_fwd(Tensor logits, Tensor target, Tensor rows) -> Tensor")
LIBRARY.define("masked_kl_bwd(Tensor upstream, Tensor logits, Tensor target, Tensor rows) -> Tensor")
LIBRARY.impl("masked_kl_fwd", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("masked_kl_bwd", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("emoscale::masked_kl_fwd")
def _(logits: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    return logits.new_empty((), dtype=torch.float32)


@torch.library.register_fake("emoscale::masked_kl_bwd")
def _(upstream: Tensor, logits: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


class MaskedKL(torch.autograd.Function):
    """The two kernels as one differentiable function of `logits`; eager calls go past the dispatcher (kernel latency)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, rows: Tensor) -> Tensor:
        """Give the sum, float32."""
        ctx.save_for_backward(logits, target, rows)
        run = torch.ops.emoscale.masked_kl_fwd if looked_at() else _forward
        return run(logits, target, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        """Give d(sum)/d(logits) in the dtype of `logits`."""
        run = torch.ops.emoscale.masked_kl_bwd if looked_at() else _backward
        return run(upstream, *ctx.saved_tensors), None, None


def masked_kl(logits: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """See `reference.masked_kl`."""
    return MaskedKL.apply(logits, target, rows)


def variants() -> list[Variant]:
    """Give the kernels to compile ahead of time: the expression classes of the papers, and wide rows."""
    found = []
    for c in (8, 28, 4096):
        reads = {"logits": "*bf16", "target": "*fp16", "rows": "*i64"}
        tile, aligned = _tile(c, c, c), ("logits", "target", "rows")
        forward = {**reads, "partial": "*fp32", "m": "i32"}
        backward = {"upstream": "*fp32", **reads, "grad": "*bf16", "m": "i32"}
        found.append(Variant(f"masked_kl_fwd_{c}", masked_kl_fwd_kernel, forward, tile, _warps(tile), 2, aligned))
        found.append(Variant(f"masked_kl_bwd_{c}", masked_kl_bwd_kernel, backward, tile, _warps(tile), 2, (*aligned, "grad")))
    return found
