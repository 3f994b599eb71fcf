"""What max + mean pooling is timed against, and on what: forward and backward, as in a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from emoscale.kernels import timing
from emoscale.kernels.max_mean_pool import OP, max_mean_pool

Step = Callable[[], Tensor]
"""Runs forward and backward, gives the gradient of its own input."""
SHAPES = {"paper": (640, 130, 768, 0.25)}
"""Name → sequences, longest length, width, share of padding."""
LARGE = {"long": (2048, 512, 768, 0.3), "many": (8192, 256, 768, 0.3)}
"""Those of a GPU."""


@dataclass(frozen=True)
class Inputs:
    """One batch, packed and padded, and the gradient that comes from above."""

    x: Tensor
    cu_seqlens: Tensor
    padded: Tensor
    mask: Tensor
    upstream: Tensor

    @property
    def lengths(self) -> Tensor:
        """Give int64 [b]."""
        return self.cu_seqlens.diff().to(torch.int64)


def build(
    sequences: int,
    longest: int,
    width: int,
    padding: float,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Make random tokens; lengths are uniform from `longest · (1 − 2 · padding)` to `longest`, so `padding` of all is padding."""
    random = torch.Generator().manual_seed(seed)
    shortest = round(longest * (1 - 2 * padding))
    lengths = torch.randint(max(shortest, 0), longest + 1, (sequences,), generator=random)
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    mask = torch.arange(longest) < lengths[:, None]
    x = torch.randn(int(bounds[-1]), width, generator=random).to(dtype)
    padded = x.new_zeros(sequences, longest, width)
    padded[mask] = x
    upstream = torch.randn(sequences, width, generator=random).to(dtype)
    return Inputs(*(tensor.to(device) for tensor in (x, bounds, padded, mask, upstream)))


def padded_eager(inputs: Inputs) -> Step:
    """Pool a padded batch under its mask, as most code does; padding is not part of the time."""
    lengths, hidden = inputs.mask.sum(1, keepdim=True).clamp(min=1), ~inputs.mask[:, :, None]

    def step() -> Tensor:
        x = inputs.padded.detach().requires_grad_()
        pooled = x.masked_fill(hidden, float("-inf")).amax(1) + x.masked_fill(hidden, 0.0).sum(1) / lengths
        (grad,) = torch.autograd.grad(pooled, x, inputs.upstream.to(pooled.dtype))
        return grad

    return step


def segment_reduce(inputs: Inputs) -> Step:
    """Call PyTorch's reduction of packed rows twice."""

    def step() -> Tensor:
        x, lengths = inputs.x.detach().requires_grad_(), inputs.lengths
        largest, mean = (torch.segment_reduce(x, how, lengths=lengths, unsafe=True) for how in ("max", "mean"))
        (grad,) = torch.autograd.grad(largest + mean, x, inputs.upstream)
        return grad

    return step


def ours(inputs: Inputs, impl: str) -> Step:
    """Call one implementation of this package."""

    def step() -> Tensor:
        x = inputs.x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(max_mean_pool(x, inputs.cu_seqlens, impl=impl), x, inputs.upstream)
        return grad

    return step


def competitors(inputs: Inputs) -> dict[str, Step]:
    """Give what can be timed here, by name: every implementation that `auto` might take, then the others."""
    state = OP.explain(inputs.x)
    run = {impl: ours(inputs, impl) for impl, why in state.items() if why in ("taken", "available")}
    if inputs.x.device.type == "cpu":
        run.pop("triton", None)  # interpreted
    others = {"padded eager": padded_eager(inputs)}
    if inputs.x.dtype in (torch.float32, torch.float64):
        others["segment_reduce x 2"] = segment_reduce(inputs)
    return run | others


def check(inputs: Inputs, run: dict[str, Step]) -> None:
    """Compare every gradient with the reference's in float64.

    Raises:
        ValueError: one is wrong; it must not be timed.
    """
    x = inputs.x.double().requires_grad_()
    (expected,) = torch.autograd.grad(max_mean_pool(x, inputs.cu_seqlens, impl="reference"), x, inputs.upstream.double())
    tolerance = 4 * torch.finfo(inputs.x.dtype).eps
    for name, step in run.items():
        grad = step()
        packed = grad if grad.dim() == 2 else grad[inputs.mask]
        if not torch.allclose(packed.double(), expected, rtol=tolerance, atol=tolerance):
            worst = (packed.double() - expected).abs().max().item()
            raise ValueError(f"max_mean_pool: the gradient of {name} is off by {worst:.2g}; not timed")


def work(inputs: Inputs) -> tuple[float, float]:
    """Give the bytes that nobody can avoid: tokens read, vectors written, their gradient read, the tokens' written."""
    tokens, vectors = inputs.x.numel() * inputs.x.element_size(), inputs.upstream.numel() * inputs.x.element_size()
    return 2.0 * (tokens + vectors), 0.0


def measure(inputs: Inputs, *, rounds: int = 5, threads: int | None = None) -> dict[str, float]:
    """Give the median seconds of forward + backward per competitor, checked first; see `timing.samples`."""
    run = competitors(inputs)
    check(inputs, run)
    return timing.medians(run, device=inputs.x.device, rounds=rounds, threads=threads)
