"""Candidate scoring in Triton: table rows are read where they lie, and no gathered copy is made.

The forward writes each context's loss and the slope of that loss by each score. The backward is one launch without atomics:
some programs gather a context's gradient from the table, the others a table row's gradient from its contexts, which an
index sort lists in the order of the batch, so that the same bits come out at every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emoscale.kernels import launch
from emoscale.kernels.aot import Variant

LIBRARY = torch.library.Library("emoscale", "FRAGMENT")
SOFTMAX, BCE, PRINTED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
CODES = {"softmax": 0, "bce": 1, "printed": 2}
TILE = 4096
"""Elements of the table in registers at once: 32 per thread at four warps."""


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) without overflow, and exact to the last bits where it is tiny (Kahan's log1p)."""
    e = tl.exp(-tl.abs(x))
    one = 1.0 + e
    rest = tl.where(one == 1.0, e, tl.log(one) * e / tl.where(one == 1.0, 1.0, one - 1.0))
    return tl.maximum(x, 0.0) + rest


@triton.jit
def candidate_loss_fwd_kernel(
    context, table, candidates, losses, slopes, u,
    D: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, BD: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Loss [b] and its slopes by the scores [b, k]; one program per context."""
    i = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, KB)
    real = j < K
    at = tl.load(candidates + i * K + j, mask=real, other=0)
    exists = (at >= 0) & (at < u)
    score = tl.zeros((KB,), dtype=tl.float32)
    for start in range(0, D, BD):
        column = start + tl.arange(0, BD)
        inside = column < D
        ours = tl.load(context + i * D + column, mask=inside, other=0.0).to(tl.float32)
        theirs = tl.load(table + at[:, None] * D + column[None, :], mask=(real & exists)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        score += tl.sum(ours[None, :] * theirs, axis=1)
    score = tl.where(exists, score, float("nan"))
    first = j == 0
    if FORM == SOFTMAX:
        score = tl.where(real, score, float("-inf"))
        score = score - tl.max(score, axis=0)
        share = tl.exp(score)
        whole = tl.sum(share, axis=0)
        loss = tl.log(whole) - tl.sum(tl.where(first, score, 0.0), axis=0)
        # The others' shares, not 1 − own: no cancellation where the true candidate is certain.
        others = tl.sum(tl.where(first, 0.0, share), axis=0)
        slope = tl.where(first, -others, share) / whole
    else:
        sign = tl.where(first, -1.0, 1.0) if FORM == BCE else -1.0 + tl.zeros((KB,), dtype=tl.float32)
        turned = sign * score
        small = tl.exp(-tl.abs(turned))
        logistic = tl.where(turned >= 0.0, 1.0, small) / (1.0 + small)
        weight = tl.where(first, 1.0, -1.0) if FORM == PRINTED else 1.0 + tl.zeros((KB,), dtype=tl.float32)
        loss = tl.sum(tl.where(real, weight * _softplus(turned), 0.0), axis=0)
        slope = weight * sign * logistic
    tl.store(losses + i, loss)
    tl.store(slopes + i * K + j, slope, mask=real)


@triton.jit
def candidate_loss_bwd_kernel(
    context, table, candidates, slopes, order, starts, upstream, d_context, d_table, b, u,
    D: tl.constexpr, K: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Programs below b: gradient of a context; above: of a table row. Axis 1 cuts the width."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = column < D
    factor = tl.load(upstream).to(tl.float32) / b
    total = tl.zeros((BD,), dtype=tl.float32)
    if program < b:
        for j in range(0, K):
            # A row that does not exist has a slope of NaN already; the last one is read in its place.
            at = tl.minimum(tl.maximum(tl.load(candidates + program * K + j), 0), u - 1)
            row = tl.load(table + at * D + column, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(slopes + program * K + j) * row
        tl.store(d_context + program * D + column, (total * factor).to(d_context.dtype.element_ty), mask=inside)
    else:
        row = program - b
        use, end = tl.load(starts + row), tl.load(starts + row + 1)
        while use < end:
            at = tl.load(order + use)
            ours = tl.load(context + (at // K) * D + column, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(slopes + at) * ours
            use += 1
        tl.store(d_table + row * D + column, (total * factor).to(d_table.dtype.element_ty), mask=inside)


@launch.on_its_device
def _forward(context: Tensor, table: Tensor, candidates: Tensor, form: str) -> tuple[Tensor, Tensor]:
    (b, d), k = context.shape, candidates.shape[1]
    losses = torch.empty(b, dtype=torch.float32, device=context.device)
    slopes = losses.new_empty((b, k))
    if b:
        block = triton.next_power_of_2(k)
        width = min(triton.next_power_of_2(d), max(16, TILE // block))
        candidate_loss_fwd_kernel[(b,)](
            context, table, candidates, losses, slopes, table.shape[0],
            D=d, K=k, KB=block, BD=width, FORM=CODES[form], num_warps=4,
        )  # fmt: skip
    return losses.sum() / max(b, 1), slopes


def _uses(candidates: Tensor, u: int) -> tuple[Tensor, Tensor]:
    """Give the places of `candidates` sorted by table row [b · k], and where each row's begin [u + 1]."""
    rows, order = candidates.flatten().sort(stable=True)
    return order, torch.searchsorted(rows, torch.arange(u + 1, device=rows.device))


@launch.on_its_device
def _backward(upstream: Tensor, context: Tensor, table: Tensor, candidates: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    (b, d), u = context.shape, table.shape[0]
    d_context, d_table = torch.empty_like(context), torch.empty_like(table)
    if b == 0:
        return d_context, d_table.zero_()
    order, starts = _uses(candidates, u)
    width = min(triton.next_power_of_2(d), 1024)
    candidate_loss_bwd_kernel[(b + u, triton.cdiv(d, width))](
        context, table, candidates, slopes, order, starts, upstream, d_context, d_table, b, u,
        D=d, K=candidates.shape[1], BD=width, num_warps=4,
    )  # fmt: skip
    return d_context, d_table


LIBRARY.define("candidate_loss_fwd(Tensor context, Tensor table, Tensor candidates, str form) -> (Tensor, Tensor)")
LIBRARY.define("candidate_loss_bwd(Tensor upstream, Tensor context, Tensor table, Tensor candidates, Tensor slopes) -> (Tensor, Tensor)")
LIBRARY.impl("candidate_loss_fwd", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("candidate_loss_bwd", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("emoscale::candidate_loss_fwd")
def _(context: Tensor, table: Tensor, candidates: Tensor, form: str) -> tuple[Tensor, Tensor]:
    return context.new_empty((), dtype=torch.float32), context.new_empty(candidates.shape, dtype=torch.float32)


@torch.library.register_fake("emoscale::candidate_loss_bwd")
def _(upstream: Tensor, context: Tensor, table: Tensor, candidates: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(context), torch.empty_like(table)


class CandidateLoss(torch.autograd.Function):
    """The two kernels as one differentiable function; eager calls go past the dispatcher (kernel latency)."""

    @staticmethod
    def forward(ctx: Any, context: Tensor, table: Tensor, candidates: Tensor, form: str) -> Tensor:
        """Give the loss, float32."""
        context, table, candidates = context.contiguous(), table.contiguous(), candidates.contiguous()
        run = torch.ops.emoscale.candidate_loss_fwd if launch.looked_at() else _forward
        loss, slopes = run(context, table, candidates, form)
        ctx.save_for_backward(context, table, candidates, slopes)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Give the gradients of context and table in their dtype."""
        run = torch.ops.emoscale.candidate_loss_bwd if launch.looked_at() else _backward
        return *run(upstream, *ctx.saved_tensors), None, None


def candidate_loss(context: Tensor, table: Tensor, candidates: Tensor, form: str) -> Tensor:
    """See `reference.candidate_loss`."""
    return CandidateLoss.apply(context, table, candidates, form)


def variants() -> list[Variant]:
    """Give the kernels to compile ahead of time: the paper's eleven candidates, and many."""
    found = []
    for k in (11, 64):
        block = triton.next_power_of_2(k)
        sizes = {"D": 768, "K": k}
        inputs = {"context": "*bf16", "table": "*bf16", "candidates": "*i64"}
        forward = inputs | {"losses": "*fp32", "slopes": "*fp32", "u": "i32"}
        backward = inputs | {"slopes": "*fp32", "order": "*i64", "starts": "*i64", "upstream": "*fp32"}
        backward |= {"d_context": "*bf16", "d_table": "*bf16", "b": "i32", "u": "i32"}
        pointers = tuple(key for key, kind in (forward | backward).items() if kind.startswith("*") and key != "upstream")
        for form, code in CODES.items():
            constants = sizes | {"KB": block, "BD": TILE // block, "FORM": code}
            aligned = tuple(key for key in pointers if key in forward)
            found.append(Variant(f"candidate_loss_fwd_{form}_{k}", candidate_loss_fwd_kernel, forward, constants, 4, 2, aligned))
        aligned = tuple(key for key in pointers if key in backward)
        found.append(Variant(f"candidate_loss_bwd_{k}", candidate_loss_bwd_kernel, backward, sizes | {"BD": 1024}, 4, 2, aligned))
    return found
