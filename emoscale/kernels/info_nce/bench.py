"""What the contrastive loss is timed against, and on what: forward and backward of one pair or of three at once."""

from __future__ import annotations

import importlib.util
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from emoscale.kernels.info_nce import OP, info_nce

Step = Callable[[], list[Tensor]]
"""Runs forward and backward, gives the loss and the gradients of x, y and the scale."""
SHAPES = {"paper": (3, 640, 768), "small": (1, 2048, 512), "cpu": (1, 16384, 256)}
"""Name → pairs of modalities, utterances, width."""
LARGE = {"medium": (1, 8192, 768), "large": (1, 32768, 768), "narrow": (1, 32768, 256), "huge": (1, 65536, 768)}
CHECKED = 2048
"""Utterances of the batch on which competitors are compared with float64; more would need its logits in memory."""


@dataclass(frozen=True)
class Inputs:
    """Unit vectors [p, b, d] of both sides, partners at a cosine of about 0.3, and the scale."""

    x: Tensor
    y: Tensor
    scale: Tensor

    def first(self, rows: int) -> Inputs:
        """Give a batch of the first utterances."""
        return Inputs(self.x[:, :rows], self.y[:, :rows], self.scale)

    def leaves(self) -> list[Tensor]:
        """Give tensors that take gradients, new for each run."""
        return [part.detach().requires_grad_() for part in (self.x, self.y, self.scale)]


def build(
    p: int,
    b: int,
    d: int,
    *,
    scale: float = 14.3,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Draw a batch."""
    random = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(p, b, d, generator=random) for _ in range(2))
    x, y = (F.normalize(part, dim=-1).to(device, dtype) for part in (x, x + 3 * noise))
    return Inputs(x, y, torch.tensor(scale, device=device))


def work(inputs: Inputs) -> tuple[float, float]:
    """Give (bytes, floating-point operations): both sides are read each way, gradients written; logits count twice, each gradient once."""
    p, b, d = inputs.x.shape
    return 6.0 * inputs.x.nbytes, 8.0 * p * b * b * d


def _step(inputs: Inputs, loss: Callable[..., Tensor]) -> Step:
    def step() -> list[Tensor]:
        leaves = inputs.leaves()
        value = loss(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    return step


def cross_entropy(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Compute the loss as CLIP's code does, from one matrix of logits."""
    target = torch.arange(x.shape[1], device=x.device)
    losses = []
    for left, right in zip(x, y, strict=True):
        logits = (scale.to(x.dtype) * left) @ right.T
        losses.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    return torch.stack(losses).mean()


def logsumexp(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Compute the loss with fewer passes over the logits than two cross-entropies make."""
    losses = []
    for left, right in zip(x, y, strict=True):
        logits = (scale.to(x.dtype) * left) @ right.T
        losses.append((logits.logsumexp(0) + logits.logsumexp(1)).mean() / 2 - logits.diagonal().mean())
    return torch.stack(losses).mean()


def inf_cl(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Call Inf-CL (arXiv:2410.17243), which computes one direction at a time."""
    from inf_cl import cal_flash_loss  # pyright: ignore[reportMissingImports]

    losses = []
    for left, right in zip(x, y, strict=True):
        both = [cal_flash_loss(a.contiguous(), b.contiguous(), scale=scale) for a, b in ((left, right), (right, left))]
        losses.append((both[0].mean() + both[1].mean()) / 2)
    return torch.stack(losses).mean()


def _each_way(classify: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Give the loss made of two classifications per pair of modalities: whoever fuses scores with cross-entropy does one at a time."""

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        own = torch.arange(x.shape[1], device=x.device)
        losses = []
        for left, right in zip(x, y, strict=True):
            scaled = scale.to(x.dtype)
            losses.append((classify(scaled * left, right.contiguous(), own) + classify(scaled * right, left.contiguous(), own)) / 2)
        return torch.stack(losses).mean()

    return loss


def torch_chunked(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Call PyTorch's own (from 2.13), in chunks."""
    return F.linear_cross_entropy(x, weight, target, options=torch.nn.LinearCrossEntropyOptions())  # type: ignore[attr-defined]  # newer than the oldest we take


def liger(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Call Liger-Kernel's fused linear cross-entropy (arXiv:2410.10989)."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

    return LigerFusedLinearCrossEntropyLoss()(weight, x, target)


def cut(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Call Apple's cut cross-entropy (arXiv:2411.09009)."""
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return linear_cross_entropy(x, weight, target)


PEERS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "inf-cl": ("inf_cl", inf_cl), "liger": ("liger_kernel", _each_way(liger)), "cut cross-entropy": ("cut_cross_entropy", _each_way(cut)),
}  # fmt: skip
"""Name → package, and how it is called; on a GPU, where it is installed."""


def competitors(inputs: Inputs, *, compiled: bool = False) -> dict[str, Step]:
    """Give what can be timed here, by name: our implementations but for the reference, then the others.

    Args:
        compiled: also PyTorch's compiler on the same lines, which takes a while to start.
    """
    rivals: dict[str, Callable[..., Tensor]] = {"eager cross_entropy": cross_entropy, "eager logsumexp": logsumexp}
    if compiled:
        rivals["torch.compile"] = torch.compile(cross_entropy, mode="max-autotune-no-cudagraphs", dynamic=False)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        rivals["torch chunked"] = _each_way(torch_chunked)
    if inputs.x.is_cuda:
        rivals |= {name: loss for name, (package, loss) in PEERS.items() if importlib.util.find_spec(package) is not None}
    run = {}
    for impl, state in OP.explain(inputs.x, inputs.y, False).items():
        if impl != "reference" and state in ("taken", "available") and (inputs.x.is_cuda or impl != "triton"):
            run[impl] = _step(inputs, lambda x, y, scale, impl=impl: info_nce(x, y, scale, impl=impl))
    return run | {name: _step(inputs, loss) for name, loss in rivals.items()}


def check(inputs: Inputs, run: dict[str, Step]) -> None:
    """Compare the competitors named in `run` with the reference in float64, on the first utterances.

    Raises:
        ValueError: one is wrong; it must not be timed.
    """
    few = inputs.first(CHECKED)
    exact = Inputs(few.x.double(), few.y.double(), few.scale.double())
    expected = _step(exact, lambda *leaves: info_nce(*leaves, impl="reference"))()
    # Eager in half precision is that far off itself.
    tolerance = 1e-4 if few.x.dtype == torch.float32 else 0.05
    again = competitors(few, compiled="torch.compile" in run)
    for name in run:
        for part, got, want in zip(("loss", "x", "y"), again[name](), expected, strict=False):
            # Where partners are found with certainty, loss and gradients are next to zero.
            error = ((got.double() - want).norm() / want.norm().clamp(min=1e-3)).item()
            if not error <= tolerance:
                raise ValueError(f"info_nce: {part} of {name} is off by {error:.2g}; not timed")


def measure(inputs: Inputs, *, rounds: int = 5, threads: int | None = None, compiled: bool = False) -> dict[str, float]:
    """Give the median seconds of forward + backward per competitor, checked first; see `samples`."""
    run = competitors(inputs, compiled=compiled)
    check(inputs, run)
    return {name: seen["seconds"] for name, seen in samples(inputs, run, rounds=rounds, threads=threads).items()}


def samples(inputs: Inputs, run: dict[str, Step], *, rounds: int = 5, threads: int | None = None) -> dict[str, dict[str, float]]:
    """Give seconds (median, p20, p80) and extra peak MiB per competitor; rounds interleave, and the first warms up.

    Peak memory counts from before the run and holds the gradients.

    Args:
        threads: CPU threads; as PyTorch has them where None.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in run}
        for number in range(rounds + 1):
            for name, step in run.items():
                seen = _observe(step, inputs.x.device)
                found[name] += [seen] if number else []
    finally:
        torch.set_num_threads(before)
    return {name: _summary(seen) for name, seen in found.items()}


def _summary(seen: list[tuple[float, float]]) -> dict[str, float]:
    seconds = sorted(time for time, _ in seen)
    low, high = (seconds[round(share * (len(seconds) - 1))] for share in (0.2, 0.8))
    return {"seconds": statistics.median(seconds), "p20": low, "p80": high, "mib": max(mib for _, mib in seen)}


def _observe(step: Step, device: torch.device) -> tuple[float, float]:
    """Give the seconds and the extra peak MiB of one run."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest resident size begins anew
        base = _resident("VmRSS")
    start = time.perf_counter()
    parts = step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM")
    del parts
    return seconds, (peak - base) / 2**20


def _resident(name: str) -> int:
    """Give a size of this process in bytes."""
    line = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line[1]) * 1024 if line else 0
