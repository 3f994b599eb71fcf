"""Span masking: which frames of each sequence are withheld from the model."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from emoscale.kernels.dispatch import Op
from emoscale.kernels.native import refuse
from emoscale.kernels.span_mask import native, reference

OP = Op("span_mask", {"native": native.span_mask, "reference": reference.span_mask}, {"native": refuse})
Rule = Literal["nearest", "floor"]


def span_counts(lengths: Tensor, *, span: int = 3, ratio: float = 0.15, rule: Rule = "nearest") -> tuple[Tensor, Tensor]:
    """Give the number of spans and their length per sequence, from lengths alone (so the host knows every count).

    A non-empty sequence has at least one span. Where a sequence is shorter than two spans, its span shrinks to half the
    sequence, so that something is left to predict from; `ratio=1` withholds everything.

    Args:
        lengths: int64 [b] frames per sequence.
        span: frames per span, ≥ 1.
        ratio: share of frames to withhold, in (0, 1].
        rule: `nearest` rounds ratio·L/span half up; `floor` rounds down (as MEmoBERT's code does).

    Raises:
        ValueError: span or ratio is out of range, or the rule is unknown.
    """
    if span < 1 or not 0.0 < ratio <= 1.0:
        raise ValueError(f"span={span}, ratio={ratio}: span must be ≥ 1 and ratio in (0, 1]")
    if rule not in ("nearest", "floor"):
        raise ValueError(f"rule={rule!r}: must be 'nearest' or 'floor'")
    if ratio == 1.0:
        return (lengths > 0).to(torch.int64), lengths.clone()
    spans = torch.clamp(lengths // 2, min=1).clamp(max=span)
    wanted = lengths.to(torch.float64) * ratio / span + (0.5 if rule == "nearest" else 0.0)
    counts = torch.minimum(wanted.floor().to(torch.int64).clamp(min=1), lengths // spans)
    return counts, spans


def span_mask(
    lengths: Tensor,
    *,
    keys: Tensor,
    seed: int,
    span: int = 3,
    ratio: float = 0.15,
    rule: Rule = "nearest",
    impl: str = "auto",
) -> Tensor:
    """Give bool [t], True where a frame is withheld: exact-count, disjoint spans, uniform up to the last frame.

    The same bits on every device and in every batch layout: a sequence's mask depends on its length, key and seed alone.

    Args:
        lengths: int64 [b]; t is their sum.
        keys: int64 [b], one per sequence (see `philox.key_of`).
        seed: stream of the run.

    Raises:
        ValueError: an option is out of range, or `impl` cannot run here.

    Source: MEmoBERT (Zhao et al. 2022) §2.2, SpanMAFR; Mockingjay (Liu et al. 2020). Unlike the released code, spans never
    overlap and the last frames can be chosen.
    """
    counts, spans = span_counts(lengths, span=span, ratio=ratio, rule=rule)
    return OP.pick(impl, lengths)(lengths, counts, spans, keys, seed)
