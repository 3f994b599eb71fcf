"""What a training step costs: seconds beside other steps in turn, processor time, memory, waits of the host, and the share of each part."""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from emoscale.kernels.bench import extra_bytes

SYNCS = ("cudaStreamSynchronize", "cudaEventSynchronize")
"""What a profile calls a host that waits for the GPU; the profiler itself waits for the device at its end."""
MATMUL = {"cpu": 1024, "cuda": 8192}
"""Side of the square product whose speed stands for the device's peak."""


@dataclass
class Taken:
    """Seconds of each timed run of one side."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    """Of all threads of this process: what else runs on the machine changes it little."""


def interleaved(sides: Mapping[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, Taken]:
    """Time every side once per round, so that a slow moment of the machine meets all of them; the first round only warms up."""
    wait = torch.cuda.synchronize if device == "cuda" else _nothing
    taken = {name: Taken() for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            wait()
            wall, processor = time.perf_counter(), time.process_time()
            side()
            wait()
            if turn:
                taken[name].wall.append(time.perf_counter() - wall)
                taken[name].processor.append(time.process_time() - processor)
    return taken


def paired(theirs: list[float], ours: list[float]) -> list[float]:
    """Give the 20th percentile, the median and the 80th of the ratios within each round."""
    ratios = [other / own for other, own in zip(theirs, ours, strict=True)]
    low, *_, high = statistics.quantiles(ratios, n=5, method="inclusive")
    return [low, statistics.median(ratios), high]


def matmul(device: str, dtype: torch.dtype) -> tuple[Callable[[], Any], float]:
    """Give a large matrix product and its floating-point operations."""
    size = MATMUL[device]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * size**3


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """Give the most memory that PyTorch holds within a step beyond what stood before it: its allocator tells, on a CPU through the profiler."""
    return extra_bytes(step, device)


def host_syncs(step: Callable[[], Any], device: str) -> int | None:
    """Count how often the host waits for the GPU within a step; None without one."""
    if device != "cuda":
        return None
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=kinds) as profiler:
        step()
    return sum(event.name in SYNCS for event in profiler.events() or [])


class Parts:
    """Adds up the time of embedders, attention, the rest of the layers, and heads in forward, then of backward and the optimizer.

    On a CPU it is processor time; on a GPU time of its stream.

    Args:
        model: a `TaskModel` on the unified transformer.
        device: where it is.
    """

    def __init__(self, model: Any, device: str) -> None:
        self.device = device
        self._spans: list[tuple[str, Any, Any]] = []
        self._open: dict[str, Any] = {}
        self._handles: list[Any] = []
        for embedder in (model.backbone.text, model.backbone.visual, model.backbone.acoustic):
            self._around("embed", embedder, embedder)
        for layer in model.backbone.layers:
            self._around("layers", layer, layer)
            self._between("attention", layer.qkv, layer.out)
        for task in model.tasks.values():
            self._around("heads", task, task)

    def _around(self, name: str, first: nn.Module, last: nn.Module) -> None:
        self._handles += [first.register_forward_pre_hook(lambda *_: self.begin(name)), last.register_forward_hook(lambda *_: self.end(name))]

    def _between(self, name: str, before: nn.Module, after: nn.Module) -> None:
        self._handles += [before.register_forward_hook(lambda *_: self.begin(name)), after.register_forward_pre_hook(lambda *_: self.end(name))]

    def begin(self, name: str) -> None:
        """Start the clock of a part."""
        self._open[name] = self._mark()

    def end(self, name: str) -> None:
        """Stop it."""
        self._spans.append((name, self._open.pop(name), self._mark()))

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Time what runs inside as a part."""
        self.begin(name)
        yield
        self.end(name)

    def shares(self) -> dict[str, float]:
        """Give each part's share of `step`, and let go of the model."""
        for handle in self._handles:
            handle.remove()
        seconds: Counter[str] = Counter()
        for name, begin, end in self._spans:
            seconds[name] += self._seconds(begin, end)  # type: ignore[assignment]  # a Counter of seconds
        whole = seconds.pop("step")
        seconds["dense layers"] = seconds.pop("layers") - seconds["attention"]
        seconds["other"] = whole - sum(seconds.values())
        return {name: value / whole for name, value in seconds.most_common()}

    def _mark(self) -> Any:
        if self.device != "cuda":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        if self.device != "cuda":
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch use so many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_average() -> float:
    """Give how many processes wanted a processor in the last minute."""
    return os.getloadavg()[0]


def _nothing() -> None:
    pass
