"""What masked regression is timed against, and on what; see `rows_bench`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional

from emoscale.kernels import rows_bench
from emoscale.kernels.masked_regression import OP
from emoscale.kernels.rows_bench import Inputs, Step, work

__all__ = ["LARGE", "SHAPES", "build", "check", "competitors", "eager", "measure", "work"]
SHAPES = {"paper": (6_144, 768), "face": (3_456, 342)}
"""Name → masked frames, width."""
LARGE = {"large": (100_000, 768), "huge": (1_000_000, 768)}
build = partial(rows_bench.build, probabilities=False)


def eager(pred: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """Give the loss as models write it, from gathered targets."""
    return functional.mse_loss(pred, target.to(pred.dtype), reduction="none").mean(-1).sum()


def competitors(inputs: Inputs, *, compiled: bool = True) -> dict[str, Step]:
    """Give what can be timed here, by name."""
    return rows_bench.competitors(OP, eager, inputs, compiled=compiled)


check: Callable[[Inputs, dict[str, Step]], None] = partial(rows_bench.check, OP)


def measure(inputs: Inputs, *, rounds: int = 5, threads: int | None = None, compiled: bool = True) -> dict[str, float]:
    """Give the median seconds of forward + backward per competitor, checked first."""
    return rows_bench.measure(OP, eager, inputs, rounds=rounds, threads=threads, compiled=compiled)
