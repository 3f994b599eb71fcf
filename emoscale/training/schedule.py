"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(step: int, *, peak: float, warmup: int, total: int, shape: Literal["linear", "cosine", "constant"]) -> float:
    """Give the rate of step `step` (from 0): linear warm-up to `peak`, then the named decay, reaching 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if shape == "constant" or total <= warmup:
        return peak
    left = max(0.0, (total - step) / (total - warmup))
    return peak * (left if shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * left)))
