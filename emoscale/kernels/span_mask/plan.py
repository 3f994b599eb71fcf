"""How many spans each sequence gets: from lengths alone, so that the host knows every count before any device does."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from emoscale.kernels.philox import WORD, philox

Rule = Literal["nearest", "floor", "prob"]
RULES = ("nearest", "floor", "prob")
ROUNDING = 1
"""Fourth Philox counter of the draw that rounds a count; 0 is the choice of slots."""


def check(span: int, ratio: float, rule: str) -> None:
    """Refuse options out of range.

    Raises:
        ValueError: span or ratio is out of range, or the rule is unknown.
    """
    if span < 1 or not 0.0 < ratio <= 1.0:
        raise ValueError(f"span={span}, ratio={ratio}: span must be ≥ 1 and ratio in (0, 1]")
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: must be one of {', '.join(RULES)}")


def span_counts(
    lengths: Tensor,
    *,
    span: int = 3,
    ratio: float = 0.15,
    rule: Rule = "nearest",
    keys: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Give the number of spans and their length per sequence, from lengths alone (so the host knows every count).

    A non-empty sequence has at least one span. Where a sequence is shorter than two spans, its span shrinks to half the
    sequence, so that something is left to predict from; `ratio=1` withholds everything.

    Args:
        lengths: int64 [b] frames per sequence.
        span: frames per span, ≥ 1.
        ratio: share of frames to withhold, in (0, 1].
        rule: `nearest` rounds ratio·L/span half up; `floor` rounds down (as MEmoBERT's code does); `prob` rounds up with
            the probability of the fraction, so that the mean count is exact (as fairseq does), drawn from seed and key.
        keys: int64 [b], one per sequence; `prob` needs them, and `seed`.

    Raises:
        ValueError: span or ratio is out of range, the rule is unknown, or `prob` is given no keys.
    """
    check(span, ratio, rule)
    if ratio == 1.0:
        return (lengths > 0).to(torch.int64), lengths.clone()
    spans = torch.clamp(lengths // 2, min=1).clamp(max=span)
    wanted = lengths.to(torch.float64) * ratio / span + _up(rule, keys, seed)
    counts = torch.minimum(wanted.floor().to(torch.int64).clamp(min=1), lengths // spans)
    return counts, spans


def _up(rule: Rule, keys: Tensor | None, seed: int) -> Tensor | float:
    """Give what is added to a wanted count before rounding down."""
    if rule != "prob":
        return 0.5 if rule == "nearest" else 0.0
    if keys is None:
        raise ValueError("rule='prob' draws from each sequence's key: give keys and seed")
    zero = torch.zeros_like(keys)
    word, *_ = philox(zero, keys & WORD, (keys >> 32) & WORD, zero + ROUNDING, seed)
    return word.to(torch.float64) / (WORD + 1)


def planned(lengths: Tensor, keys: Tensor, seed: int, span: int, ratio: float, rule: Rule) -> tuple[Tensor, int, int]:
    """Give what a device kernel reads, made on the host in one tensor so that one copy takes it there.

    Returns:
        int64 [5, b] with the rows offset, slots, count, span, key; the sum of the lengths; the most slots of one sequence.
    """
    counts, spans = span_counts(lengths, span=span, ratio=ratio, rule=rule, keys=keys, seed=seed)
    ends = torch.cumsum(lengths, 0)
    slots = lengths - counts * (spans - 1)
    total, width = (int(ends[-1]), int(slots.max())) if len(lengths) else (0, 0)
    return torch.stack([ends - lengths, slots, counts, spans, keys]), total, width


def sent(plan: Tensor, device: torch.device) -> Tensor:
    """Copy a plan to a device without waiting for it."""
    return plan.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else plan.to(device)
