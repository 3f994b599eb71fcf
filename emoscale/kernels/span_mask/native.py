"""Span masking in C++ and CUDA (`csrc/span_mask`), threaded over sequences; the same bits as the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from emoscale.kernels.native import declare, missing
from emoscale.kernels.span_mask.plan import Rule, planned, sent

WIDEST = 2048
"""Slots of one sequence that the CUDA form holds in shared memory (`kWidest` of span_mask.cu)."""


def refuse(lengths: Tensor, device: torch.device | None = None) -> str | None:
    """Say why the native form cannot make this mask, or None where it can."""
    kind = (device or lengths.device).type
    if kind not in ("cpu", "cuda"):
        return f"makes masks on cpu and cuda, not on {kind}"
    if missing() is not None or kind == "cpu":
        return missing()
    if not torch._C._dispatch_has_kernel_for_dispatch_key("emoscale::span_mask_planned", "CUDA"):
        return "built without CUDA (no nvcc was found)"
    return too_long(lengths)


def too_long(lengths: Tensor) -> str | None:
    """Say why a kernel that holds a sequence's words on chip cannot take these lengths, or None where it can."""
    longest = int(lengths.max()) if lengths.numel() and lengths.device.type == "cpu" else 0
    return f"takes sequences up to {WIDEST} frames, not {longest}" if longest > WIDEST else None


def span_mask(lengths: Tensor, keys: Tensor, seed: int, span: int, ratio: float, rule: Rule, device: torch.device) -> Tensor:
    """See `reference.span_mask`."""
    if device.type == "cpu":
        return torch.ops.emoscale.span_mask(lengths, keys, seed, span, ratio, rule)
    plan, total, width = planned(lengths, keys, seed, span, ratio, rule)
    return torch.ops.emoscale.span_mask_planned(sent(plan, device), seed, total, width)


def _mask(lengths: Tensor, keys: Tensor, seed: int, span: int, ratio: float, rule: str) -> Tensor:
    return lengths.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.bool)


def _planned_mask(plan: Tensor, seed: int, total: int, width: int) -> Tensor:
    return plan.new_empty(total, dtype=torch.bool)


declare("span_mask", _mask)
declare("span_mask_planned", _planned_mask)
