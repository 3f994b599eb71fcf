"""What span masking is timed against, and on what: from lengths on the host to flags on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from emoscale.kernels import timing
from emoscale.kernels.span_mask import OP, span_counts, span_mask

Step = Callable[[], Tensor]
"""Gives bool: packed [t], or padded [b, longest]."""
SHAPES = {"paper": (640, 64), "face": (640, 36)}
"""Name → sequences, longest length; lengths are uniform from half of it."""
LARGE = {"long": (640, 512), "large": (4096, 256), "film": (1024, 1500)}


@dataclass(frozen=True)
class Inputs:
    """The lengths and keys of one batch, and how to mask it."""

    lengths: Tensor
    keys: Tensor
    longest: int
    span: int
    ratio: float
    device: torch.device
    seed: int = 1


def build(
    sequences: int,
    longest: int,
    *,
    span: int = 3,
    ratio: float = 0.15,
    dtype: torch.dtype = torch.bool,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Draw lengths and keys; both stay on the host, where a loader has them. A mask has one dtype, whatever is asked."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(longest // 2, longest + 1, (sequences,), generator=random)
    keys = torch.randint(0, 1 << 62, (sequences,), generator=random)
    return Inputs(lengths, keys, longest, span, ratio, torch.device(device))


def ours(inputs: Inputs, impl: str) -> Step:
    """Call one implementation of this package."""
    return lambda: span_mask(
        inputs.lengths, keys=inputs.keys, seed=inputs.seed, span=inputs.span, ratio=inputs.ratio, device=inputs.device, impl=impl
    )  # fmt: skip


def numpy_loop(inputs: Inputs, *, per_row: bool) -> Step:
    """Mask row after row on the host, as fairseq and transformers do: a rounded count, distinct starts, spans may overlap.

    Args:
        per_row: a generator of its own for each row, as fairseq makes it, so that a row's mask depends on its seed alone;
            else one generator for the batch, whose masks depend on the order of the rows.
    """
    lengths, seeds = inputs.lengths.tolist(), (inputs.keys % 1_000_000).tolist()

    def step() -> Tensor:
        random = np.random.default_rng(inputs.seed)
        mask = np.zeros((len(lengths), inputs.longest), dtype=bool)
        for i, length in enumerate(lengths):
            if per_row:
                random = np.random.default_rng(seeds[i])
            count = max(1, int(inputs.ratio * length / inputs.span + random.random()))
            row = mask[i]
            for start in random.permutation(length - inputs.span + 1)[:count].tolist():
                row[start : start + inputs.span] = True
        return torch.from_numpy(mask).to(inputs.device)

    return step


def vectorised(inputs: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
    """Give masking without a loop in plain PyTorch: random scores, argsort, scatter; spans may overlap."""
    longest, span = inputs.longest, inputs.span
    most = int(span_counts(inputs.lengths, span=span, ratio=inputs.ratio)[0].max())

    def select(lengths: Tensor, counts: Tensor) -> Tensor:
        column = torch.arange(longest, device=lengths.device)
        scores = torch.rand(lengths.shape[0], longest, device=lengths.device)
        scores = scores.masked_fill(column > lengths[:, None] - span, 2.0)
        starts = scores.argsort(1)[:, :most]
        real = column[:most] < counts[:, None]
        frames = (starts[:, :, None] + column[:span]).flatten(1)
        mask = torch.zeros(lengths.shape[0], longest + span, device=lengths.device, dtype=torch.int8)
        mask.scatter_reduce_(1, frames, real[:, :, None].expand(-1, -1, span).flatten(1).to(torch.int8), "amax")
        return mask[:, :longest].bool()

    return select


def competitors(inputs: Inputs, *, compiled: bool = True) -> dict[str, Step]:
    """Give what can be timed here, by name: every implementation that `auto` might take, then the others."""
    state = OP.explain(inputs.lengths, inputs.device)
    run = {impl: ours(inputs, impl) for impl, why in state.items() if why in ("taken", "available")}
    if inputs.device.type == "cpu":
        run.pop("triton", None)  # interpreted
    run["numpy loop"] = numpy_loop(inputs, per_row=True)
    run["numpy loop, one generator"] = numpy_loop(inputs, per_row=False)
    counts, _ = span_counts(inputs.lengths, span=inputs.span, ratio=inputs.ratio)
    select = vectorised(inputs)
    run["torch argsort"] = lambda: select(inputs.lengths.to(inputs.device), counts.to(inputs.device))
    if compiled:
        fast = torch.compile(select, dynamic=False)
        run["torch.compile argsort"] = lambda: fast(inputs.lengths.to(inputs.device), counts.to(inputs.device))
    return run


def check(inputs: Inputs, run: dict[str, Step]) -> None:
    """Compare every implementation of ours with the reference, and see that the others mask as much as they promise.

    Raises:
        ValueError: one is wrong; it must not be timed.
    """
    expected = ours(inputs, "reference")()
    inside = torch.arange(inputs.longest) < inputs.lengths[:, None]
    for name, step in run.items():
        mask = step()
        if mask.dim() == 1:
            right = torch.equal(mask, expected)
        else:
            share = mask.sum().item() / int(inputs.lengths.sum())
            right = not bool((mask.cpu() & ~inside).any()) and 0.7 * inputs.ratio < share < 1.2 * inputs.ratio
        if not right:
            raise ValueError(f"span_mask: the flags of {name} are wrong; not timed")


def work(inputs: Inputs) -> tuple[float, float]:
    """Give (bytes, floating-point operations): lengths and keys are read, flags are written."""
    return float(2 * inputs.lengths.nbytes + int(inputs.lengths.sum())), 0.0


def measure(inputs: Inputs, *, rounds: int = 5, threads: int | None = None, compiled: bool = True) -> dict[str, float]:
    """Give the median seconds per competitor, checked first."""
    run = competitors(inputs, compiled=compiled)
    check(inputs, run)
    return timing.medians(run, device=inputs.device, rounds=rounds, threads=threads)
