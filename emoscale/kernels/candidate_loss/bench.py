"""What candidate scoring is timed against, and on what: forward and backward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from emoscale.kernels.candidate_loss import OP, candidate_loss

Step = Callable[[], list[Tensor]]
"""Runs forward and backward, gives the loss and the gradients of context and table."""
SHAPES = {"paper": (640, 11, 768), "five": (640, 5, 768)}
"""Name → contexts, candidates, width."""
LARGE = {"many": (8192, 64, 768), "large": (8192, 11, 768), "huge": (65536, 11, 768)}


@dataclass(frozen=True)
class Inputs:
    """Contexts, a table with one row per context, and rows of it; column 0 is the context's own."""

    context: Tensor
    table: Tensor
    candidates: Tensor
    form: str = "softmax"

    def leaves(self) -> list[Tensor]:
        """Give tensors that take gradients, new for each run."""
        return [part.detach().requires_grad_() for part in (self.context, self.table)]


def build(
    b: int,
    k: int,
    d: int,
    *,
    form: str = "softmax",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Draw a batch; the noise is uniform over the table."""
    random = torch.Generator().manual_seed(seed)
    context, table = (torch.randn(b, d, generator=random) / d**0.25 for _ in range(2))
    candidates = torch.randint(b, (b, k), generator=random)
    candidates[:, 0] = torch.arange(b)
    return Inputs(context.to(device, dtype), table.to(device, dtype), candidates.to(device), form)


def work(inputs: Inputs) -> tuple[float, float]:
    """Give (bytes, floating-point operations) of forward and backward, when nothing stays in a cache between two uses."""
    (b, k), d = inputs.candidates.shape, inputs.context.shape[1]
    return float(inputs.context.element_size() * d * (b * (k + 1) + 2 * b * k + 2 * b)), 6.0 * b * k * d


def eager(context: Tensor, table: Tensor, candidates: Tensor, form: str) -> Tensor:
    """Compute the loss as models write it: gathered candidates, one batched product."""
    scores = torch.bmm(table[candidates], context[:, :, None])[..., 0]
    if form == "softmax":
        return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.int64, device=scores.device))
    sign = -1.0 if form == "bce" else 1.0
    noise = sign * F.logsigmoid(sign * scores[:, 1:]).sum(1)
    return (noise - F.logsigmoid(scores[:, 0])).mean()


def competitors(inputs: Inputs, *, compiled: bool = False) -> dict[str, Step]:
    """Give what can be timed here, by name: our implementations, eager, and where wanted PyTorch's compiler; no one else has it."""
    losses: dict[str, Callable[..., Tensor]] = {"eager": eager}
    if compiled:
        losses["torch.compile"] = torch.compile(eager, mode="max-autotune-no-cudagraphs", dynamic=False)
    for impl, state in OP.explain(inputs.context, inputs.candidates).items():
        if state in ("taken", "available") and (inputs.context.is_cuda or impl != "triton"):
            losses[impl] = _ours(impl)
    return {name: _step(inputs, loss) for name, loss in losses.items()}


def _ours(impl: str) -> Callable[..., Tensor]:
    return lambda context, table, candidates, form: candidate_loss(context, table, candidates, form=form, impl=impl)


def _step(inputs: Inputs, loss: Callable[..., Tensor]) -> Step:
    def step() -> list[Tensor]:
        leaves = inputs.leaves()
        value = loss(*leaves, inputs.candidates, inputs.form)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    return step


def check(inputs: Inputs, run: dict[str, Step]) -> None:
    """Compare every competitor with the reference in float64.

    Raises:
        ValueError: one is wrong; it must not be timed.
    """
    exact = Inputs(inputs.context.double(), inputs.table.double(), inputs.candidates, inputs.form)
    tolerance = 1e-5 if inputs.context.dtype == torch.float32 else 0.05
    expected = _step(exact, _ours("reference"))()
    for name, step in run.items():
        for part, got, want in zip(("loss", "context", "table"), step(), expected, strict=True):
            error = ((got.double() - want).norm() / want.norm()).item()
            if not error <= tolerance:
                raise ValueError(f"candidate_loss: {part} of {name}, {inputs.form}, is off by {error:.2g}; not timed")


def measure(inputs: Inputs, *, rounds: int = 5, threads: int | None = None, compiled: bool = False) -> dict[str, float]:
    """Give the median seconds of forward + backward per competitor, checked first; rounds interleave.

    Args:
        threads: CPU threads; as PyTorch has them where None.
    """
    run = competitors(inputs, compiled=compiled)
    check(inputs, run)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    seconds: dict[str, list[float]] = {name: [] for name in run}
    try:
        for number in range(rounds + 1):
            for name, step in run.items():
                taken = _time(step, inputs.context.device)
                seconds[name] += [taken] if number else []  # the first warms up
    finally:
        torch.set_num_threads(before)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _time(step: Step, device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    parts = step()
    wait()
    end = time.perf_counter()
    del parts  # freed outside the time
    return end - start
