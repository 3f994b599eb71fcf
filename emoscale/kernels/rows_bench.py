"""What the losses over masked rows are timed against, and on what: forward and backward, as in a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from emoscale.kernels import timing
from emoscale.kernels.dispatch import Op

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Gives the sum over rows, from scores [m, d], targets [n, d] and rows [m]."""
Step = Callable[[], tuple[Tensor, Tensor]]
"""Runs forward and backward, gives the sum and the gradient of the scores."""
MASKED = 0.15
"""Share of frames that are masked."""


@dataclass(frozen=True)
class Inputs:
    """The scores of the masked frames, the targets of all frames, and which frames are masked, as rows and as flags."""

    scores: Tensor
    target: Tensor
    rows: Tensor
    flags: Tensor


def build(masked: int, width: int, *, probabilities: bool, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
    """Draw scores, and targets in fp16 as they are stored: features, or the probabilities of a teacher."""
    random = torch.Generator().manual_seed(seed)
    frames = round(masked / MASKED)
    flags = torch.zeros(frames, dtype=torch.bool)
    flags[torch.randperm(frames, generator=random)[:masked]] = True
    target = torch.randn(frames, width, generator=random)
    target = (torch.softmax(target, -1) if probabilities else target).half()
    scores = torch.randn(masked, width, generator=random).to(dtype)
    return Inputs(*(tensor.to(device) for tensor in (scores, target, flags.nonzero().flatten(), flags)))


def step_of(loss: Loss, inputs: Inputs) -> Step:
    """Give forward and backward of a loss."""

    def step() -> tuple[Tensor, Tensor]:
        scores = inputs.scores.detach().requires_grad_()
        total = loss(scores, inputs.target, inputs.rows)
        (grad,) = torch.autograd.grad(total, scores)
        return total.detach(), grad

    return step


def competitors(op: Op, eager: Loss, inputs: Inputs, *, compiled: bool = True) -> dict[str, Step]:
    """Give what can be timed here: every implementation that `auto` might take, eager by flags, and torch.compile.

    The published losses index by flags, which asks the device how many there are.
    """
    state = op.explain(inputs.scores, inputs.target)
    run = {impl: step_of(op.forms[impl], inputs) for impl, why in state.items() if why in ("taken", "available")}
    if inputs.scores.device.type == "cpu":
        run.pop("triton", None)  # interpreted
    run["eager by flags"] = step_of(lambda scores, target, rows: eager(scores, target[inputs.flags], rows), inputs)
    run["eager by rows"] = step_of(lambda scores, target, rows: eager(scores, target.index_select(0, rows), rows), inputs)
    if compiled:
        run["torch.compile"] = step_of(torch.compile(op.forms["reference"], dynamic=False), inputs)
    return run


def check(op: Op, inputs: Inputs, run: dict[str, Step]) -> None:
    """Compare every sum and gradient with the reference's in float64.

    Raises:
        ValueError: one is wrong; it must not be timed.
    """
    picked = torch.arange(len(inputs.rows), device=inputs.rows.device)  # the whole target in float64 is more than some GPUs hold
    wide = Inputs(inputs.scores.double(), inputs.target.index_select(0, inputs.rows).double(), picked, inputs.flags)
    value, slope = step_of(op.forms["reference"], wide)()
    tolerance = 8 * torch.finfo(inputs.scores.dtype).eps
    for name, step in run.items():
        total, grad = step()
        apart = (grad.double() - slope).abs().max() / slope.abs().max()
        if not (apart <= tolerance and (total.double() - value).abs() <= 1e-2 * value.abs()):
            raise ValueError(f"{op.name}: the gradient of {name} is off by {apart.item():.2g}; not timed")


def work(inputs: Inputs) -> tuple[float, float]:
    """Give (bytes, floating-point operations): scores and their targets are read each way, the gradient is written."""
    read = inputs.scores.nbytes + inputs.scores.numel() * inputs.target.element_size()
    return float(2 * read + inputs.scores.nbytes), 6.0 * inputs.scores.numel()


def measure(op: Op, eager: Loss, inputs: Inputs, *, rounds: int = 5, threads: int | None = None, compiled: bool = True) -> dict[str, float]:
    """Give the median seconds of forward + backward per competitor, checked first."""
    run = competitors(op, eager, inputs, compiled=compiled)
    check(op, inputs, run)
    return timing.medians(run, device=inputs.scores.device, rounds=rounds, threads=threads)
