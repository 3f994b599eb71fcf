"""Microbenchmarks of the operations: correctness first, then time, memory, launches and the share of what the machine can do.

An operation takes part by a module `emoscale.kernels.<op>.bench` with

- `SHAPES`: name → arguments of `build`; `LARGE`: more of them, for GPUs;
- `build(*shape, dtype=, device=, seed=)`: the inputs of one measurement;
- `competitors(inputs)`: name → function that runs forward and backward; ours come first, named as in `explain()`;
- `check(inputs, run)`: raises ValueError where one of them is wrong;
- `work(inputs)`: (bytes, floating-point operations) that no implementation can do without.
"""

from __future__ import annotations

import gc
import importlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

OPS = ("span_mask", "info_nce", "candidate_loss", "max_mean_pool", "masked_regression", "masked_kl")
WARM_UP, SLOW_S = 2, 0.5
"""Runs of a function before each timed one, and the seconds above which one run, or the last timed one, has to do for them."""
FLUSH_BYTES = 1 << 28
"""Written between timed runs on a GPU, so that no input is found in its cache."""
COPY_BYTES, GEMM = {"cpu": 1 << 28, "cuda": 1 << 31}, {"cpu": 2048, "cuda": 8192}
"""What the roofs are measured on."""


class Bench(Protocol):
    """What a benchmark module offers."""

    SHAPES: dict[str, tuple[Any, ...]]

    def build(self, *shape: Any, dtype: torch.dtype, device: str, seed: int) -> Any:
        """Make the inputs of one measurement."""
        ...

    def competitors(self, inputs: Any) -> dict[str, Callable[[], Any]]:
        """Give what can be timed here, each a function that runs forward and backward."""
        ...

    def check(self, inputs: Any, run: dict[str, Callable[[], Any]]) -> None:
        """Raise ValueError where one of them is wrong."""
        ...

    def work(self, inputs: Any) -> tuple[float, float]:
        """Give (bytes, floating-point operations) that nobody can avoid."""
        ...


@dataclass(frozen=True)
class Roof:
    """What this machine was measured to do."""

    bytes_per_s: float
    """Copying, read and write counted."""
    flops_per_s: float
    """A large matrix product."""

    def seconds(self, work: tuple[float, float]) -> float:
        """Give the time below which this work cannot be done."""
        return max(work[0] / self.bytes_per_s, work[1] / self.flops_per_s)


@dataclass(frozen=True)
class Row:
    """One implementation on one shape."""

    op: str
    shape: str
    dtype: str
    form: str
    median_s: float
    p20_s: float
    p80_s: float
    gb_per_s: float
    """Necessary bytes over the median time."""
    tflop_per_s: float
    """Necessary operations over the median time."""
    roof_share: float
    """Time at the machine's measured limit over the median time."""
    extra_bytes: int
    """Peak memory beyond what was there before the call."""
    launches: int
    """Kernels started, on a GPU; 0 elsewhere."""
    syncs: int
    """Times the host waited for the GPU within the call."""
    times: float
    """Median of the slowest implementation on this shape over this one."""

    def record(self) -> dict[str, Any]:
        """Give what is written to JSON and CSV."""
        return asdict(self)


def measure(op: str, shape: str, dtype: torch.dtype, device: str, roof: Roof, *, rounds: int = 7) -> list[Row]:
    """Check every implementation of an operation on one shape, then time them in interleaved rounds.

    Args:
        op: of `OPS`.
        shape: of the module's `SHAPES` or `LARGE`.
        dtype: of the floating-point inputs.
        device: `cpu` or `cuda`.
        roof: of this machine, see `measure_roof`.
        rounds: timed runs of each.

    Raises:
        ValueError: an implementation is wrong; nothing is timed.
    """
    torch.compiler.reset()  # only so many forms of a function are compiled, then it runs eagerly
    bench = module_of(op)
    inputs = bench.build(*shapes_of(op)[shape], dtype=dtype, device=device, seed=0)
    run = bench.competitors(inputs)
    bench.check(inputs, run)
    taken = _interleaved(run, device, rounds)
    slowest = max(_quantile(values, 0.5) for values in taken.values())
    work, rows = bench.work(inputs), []
    for form, step in run.items():
        median = _quantile(taken[form], 0.5)
        launches, syncs = _launches(step) if device == "cuda" else (0, 0)
        rows.append(
            Row(
                op, shape, str(dtype).removeprefix("torch."), form, median, _quantile(taken[form], 0.2), _quantile(taken[form], 0.8), work[0] / median / 1e9,
                work[1] / median / 1e12, roof.seconds(work) / median, extra_bytes(step, device), launches, syncs, slowest / median,
            )
        )  # fmt: skip
    return rows


def module_of(op: str) -> Bench:
    """Give the benchmark module of an operation.

    Raises:
        ValueError: there is no such operation.
    """
    if op not in OPS:
        raise ValueError(f"ops: {op!r} is none of {', '.join(OPS)}")
    return cast(Bench, importlib.import_module(f"emoscale.kernels.{op}.bench"))


def shapes_of(op: str, *, large: bool = True) -> dict[str, tuple[Any, ...]]:
    """Give the shapes that an operation is measured on, the large ones included or not."""
    module = module_of(op)
    return module.SHAPES | (getattr(module, "LARGE", {}) if large else {})


def measure_roof(device: str, dtype: torch.dtype, *, rounds: int = 5) -> Roof:
    """Measure copying and multiplying, the best of some runs: this is a limit, not a typical value."""
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target, size = torch.empty_like(source), GEMM[device]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    steps: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source), "gemm": lambda: a @ b}
    taken = {name: min(values) for name, values in _interleaved(steps, device, rounds).items()}
    return Roof(2 * COPY_BYTES[device] / taken["copy"], 2 * size**3 / taken["gemm"])


def extra_bytes(step: Callable[[], Any], device: str) -> int:
    """Give the peak memory of a call beyond what was allocated before it, what it gives back included."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    with _quiet(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results: Any = profiler.profiler
    events = sorted((event for event in results.kineto_results.events() if event.name() == "[memory]"), key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _interleaved(run: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, list[float]]:
    """Time each function once per round; each timed run follows others of the same function, and finds memory as that one left it."""
    flush = torch.empty(FLUSH_BYTES // 4, device=device) if device == "cuda" else None
    taken: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(rounds):
        for name, step in run.items():
            warm, start = 0, time.perf_counter()
            while warm < WARM_UP and (not taken[name] or taken[name][-1] < SLOW_S) and (not warm or time.perf_counter() - start < SLOW_S):
                step()
                warm += 1
            taken[name].append(_timed(step, flush))
    return taken


def _timed(step: Callable[[], Any], flush: Tensor | None) -> float:
    if flush is None:
        start = time.perf_counter()
        kept = step()
        end = time.perf_counter()
        del kept  # freed outside the time
        return end - start
    flush.zero_()
    torch.cuda.synchronize()  # else what the host does for the step is hidden behind the flush
    begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    done.record()
    done.synchronize()
    return begin.elapsed_time(done) / 1e3


def _launches(step: Callable[[], Any]) -> tuple[int, int]:
    """Count (kernels started, waits of the host) of one call on the GPU."""
    step()
    torch.cuda.synchronize()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        step()
    names = [event.name for event in profiler.events() or []]
    return sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for name in names), sum(
        name in ("cudaStreamSynchronize", "cudaEventSynchronize") for name in names
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the profiler's C++ writes to standard error off it: no setting does."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _quantile(values: Iterable[float], share: float) -> float:
    return float(torch.tensor(sorted(values), dtype=torch.float64).quantile(share))
