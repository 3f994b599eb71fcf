"""Span masking in Triton: one program per sequence, one launch, no host sync; the same bits as the reference.

The n-th smallest word is found bit by bit from the top (32 counts), so nothing is sorted; equal words go to the earlier slot
by counting them off. A slot's place among the frames is its number plus (span − 1) for every chosen slot before it, so each
frame is written exactly once and the output needs no clearing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emoscale.kernels.aot import Variant
from emoscale.kernels.launch import looked_at, on_its_device
from emoscale.kernels.span_mask.plan import Rule, planned, sent

LIBRARY = torch.library.Library("emoscale", "FRAGMENT")
WARPS = {64: 1, 128: 1, 256: 2, 512: 4, 1024: 4, 2048: 8}
"""Slots per program → warps: eight words per lane at most, so that all stay in registers."""


@triton.jit(do_not_specialize=["b", "seed"])
def span_mask_kernel(plan, flags, b, seed: tl.int64, BLOCK: tl.constexpr):
    """Mark the spans of sequence `program_id(0)`; BLOCK is a power of two, at least its number of slots."""
    row = tl.program_id(0)
    offset = tl.load(plan + row)
    slots = tl.load(plan + b + row)
    count = tl.load(plan + 2 * b + row).to(tl.int32)
    span = tl.load(plan + 3 * b + row)
    key = tl.load(plan + 4 * b + row)

    slot = tl.arange(0, BLOCK)
    real = slot < slots
    zero = tl.zeros([BLOCK], tl.uint32)
    word, _, _, _ = tl.philox(seed, slot.to(tl.uint32), zero + key.to(tl.uint32), zero + (key >> 32).to(tl.uint32), zero, 10)
    bound = tl.zeros([1], tl.uint32)  # the largest value with fewer than `count` words below it
    for bit in tl.static_range(32):
        higher = bound | tl.full([1], 1 << (31 - bit), tl.uint32)
        below = tl.sum((real & (word < higher)).to(tl.int32))
        bound = tl.where(below < count, higher, bound)
    less, equal = real & (word < bound), real & (word == bound)
    missing = count - tl.sum(less.to(tl.int32))
    nth = tl.cumsum(equal.to(tl.int32))
    chosen = less | (equal & (nth <= missing))

    before = tl.cumsum(chosen.to(tl.int32)) - chosen.to(tl.int32)
    place = offset + slot + before.to(tl.int64) * (span - 1)
    tl.store(flags + place, chosen.to(tl.int8), mask=real)
    frame = tl.full([], 1, tl.int64)
    while frame < span:
        tl.store(flags + place + frame, tl.full([BLOCK], 1, tl.int8), mask=chosen)
        frame += 1


@on_its_device
def _launch(plan: Tensor, seed: int, total: int, width: int) -> Tensor:
    flags = torch.empty(total, dtype=torch.bool, device=plan.device)
    block = max(64, triton.next_power_of_2(width))
    if total:
        b = plan.shape[1]
        span_mask_kernel[(b,)](plan.contiguous(), flags.view(torch.int8), b, seed, BLOCK=block, num_warps=WARPS[block])
    return flags


LIBRARY.define("span_mask_triton(Tensor plan, int seed, int total, int width) -> Tensor")
LIBRARY.impl("span_mask_triton", _launch, "CompositeExplicitAutograd")


@torch.library.register_fake("emoscale::span_mask_triton")
def _(plan: Tensor, seed: int, total: int, width: int) -> Tensor:
    return plan.new_empty(total, dtype=torch.bool)


def select(plan: Tensor, seed: int, total: int, width: int) -> Tensor:
    """Give bool [total] from a plan (see `plan.planned`) that already lies on the device."""
    if looked_at():
        return torch.ops.emoscale.span_mask_triton(plan, seed, total, width)
    return _launch(plan, seed, total, width)


def span_mask(lengths: Tensor, keys: Tensor, seed: int, span: int, ratio: float, rule: Rule, device: torch.device) -> Tensor:
    """See `reference.span_mask`."""
    plan, total, width = planned(lengths, keys, seed, span, ratio, rule)
    return select(sent(plan, device), seed, total, width)


def variants() -> list[Variant]:
    """Give the kernels to compile ahead of time."""
    signature = {"plan": "*i64", "flags": "*i8", "b": "i32", "seed": "i64"}
    return [Variant(f"span_mask_{block}", span_mask_kernel, signature, {"BLOCK": block}, WARPS[block], 2, ("plan", "flags")) for block in (64, 512, 2048)]
