"""Span masking in plain PyTorch: the definition that every other implementation equals bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from emoscale.kernels.philox import WORD, philox
from emoscale.kernels.span_mask.plan import Rule, span_counts

SLOT_BITS = 24


def span_mask(lengths: Tensor, keys: Tensor, seed: int, span: int, ratio: float, rule: Rule, device: torch.device) -> Tensor:
    """Mark disjoint spans in each sequence, as many and as long as `span_counts` says."""
    # On the host: a GPU divides by a number as it multiplies by its inverse, and counts would differ.
    counts, spans = span_counts(lengths.cpu(), span=span, ratio=ratio, rule=rule, keys=keys.cpu(), seed=seed)
    return select(lengths.to(device), counts.to(device), spans.to(device), keys.to(device), seed)


def select(lengths: Tensor, counts: Tensor, spans: Tensor, keys: Tensor, seed: int) -> Tensor:
    """Mark `counts[i]` disjoint spans of `spans[i]` frames in each sequence, uniformly over all such layouts.

    Choosing n disjoint spans of s in L frames is choosing n of L − n(s−1) slots: the sorted slots c_0 < c_1 < … start
    at c_j + j(s−1). The n slots are those with the smallest Philox words (ties go to the earlier slot).
    """
    total = int(lengths.sum())
    if total == 0:
        return torch.zeros(0, dtype=torch.bool, device=lengths.device)
    slots = lengths - counts * (spans - 1)
    width = int(slots.max())
    column = torch.arange(width, device=lengths.device)
    words, *_ = philox(column[None, :].expand(len(lengths), -1), keys[:, None] & WORD, (keys[:, None] >> 32) & WORD, torch.zeros_like(column), seed)
    order = (words << SLOT_BITS) | column
    order = torch.where(column < slots[:, None], order, torch.iinfo(torch.int64).max)
    chosen = torch.argsort(order, dim=1)
    picked = torch.where(column < counts[:, None], chosen, width).sort(dim=1).values
    starts = picked + column * (spans[:, None] - 1)
    return _paint(lengths, starts, column < counts[:, None], spans)


def _paint(lengths: Tensor, starts: Tensor, real: Tensor, spans: Tensor) -> Tensor:
    offsets = torch.cumsum(lengths, 0) - lengths
    first = (offsets[:, None] + starts)[real]
    last = first + spans[:, None].expand_as(real)[real]
    edges = torch.zeros(int(lengths.sum()) + 1, dtype=torch.int32, device=lengths.device)
    edges.index_add_(0, first, torch.ones_like(first, dtype=torch.int32))
    edges.index_add_(0, last, torch.full_like(last, -1, dtype=torch.int32))
    return torch.cumsum(edges, 0)[:-1] > 0
