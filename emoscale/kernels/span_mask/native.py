"""Span masking in C++ (`csrc/span_mask`), threaded over sequences; the same bits as the reference."""

from __future__ import annotations

import torch
from torch import Tensor


def span_mask(lengths: Tensor, counts: Tensor, spans: Tensor, keys: Tensor, seed: int) -> Tensor:
    """See `reference.span_mask`."""
    return torch.ops.emoscale.span_mask(lengths, counts, spans, keys, seed)
