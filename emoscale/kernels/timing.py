"""Interleaved timing of things that do the same: what a ratio between two of them can be trusted from."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Step = Callable[[], Any]


def medians(run: Mapping[str, Step], *, device: torch.device | str = "cpu", rounds: int = 5, threads: int | None = None) -> dict[str, float]:
    """Give the median seconds of each step; see `samples`."""
    return {name: statistics.median(values) for name, values in samples(run, device=device, rounds=rounds, threads=threads).items()}


def samples(run: Mapping[str, Step], *, device: torch.device | str = "cpu", rounds: int = 5, threads: int | None = None) -> dict[str, list[float]]:
    """Time every step once per round, one after the other, so that a slow moment of the machine meets all of them.

    Each timed run follows two of the same step: it finds caches and allocator as it left them itself.

    Args:
        run: name → what to time; what it gives is freed after the clock stops.
        device: waited for before and after.
        rounds: runs that count.
        threads: CPU threads; as PyTorch has them where None.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else _nothing
    try:
        seconds: dict[str, list[float]] = {name: [] for name in run}
        for _ in range(rounds):
            for name, step in run.items():
                seconds[name].append([_time(step, wait) for _ in range(3)][-1])
    finally:
        torch.set_num_threads(before)
    return seconds


def _time(step: Step, wait: Callable[[], None]) -> float:
    wait()
    start = time.perf_counter()
    made = step()
    wait()
    end = time.perf_counter()
    del made
    return end - start


def _nothing() -> None:
    pass
