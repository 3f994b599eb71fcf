"""Where the time of a process goes: since it began, and by stage."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_IMPORTED = time.monotonic()


def process_age() -> float:
    """Give the seconds since this process began, interpreter and imports included; where no `/proc` tells, since this import."""
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.monotonic() - _IMPORTED
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


class Laps:
    """Consecutive sections of the time since a process began, seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """Section → length."""
        self._last = 0.0

    @property
    def total(self) -> float:
        """From the beginning of the process to the end of the last section."""
        return self._last

    def end(self, name: str) -> None:
        """End a section now; it began where the one before ended, the first one with the process."""
        now = process_age()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())


class Stages:
    """CPU seconds of this process by stage, over all its threads; a stage within another is taken out of it."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what happens in a `with` block; not to be held open across the `yield` of a generator."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Give the seconds counted since the last call."""
        self._settle()
        taken, self._seconds = self._seconds, {}
        return taken

    def _settle(self) -> None:
        now = time.process_time()
        if self._open:
            self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


stage = Stages()
"""The stages of `emoscale prepare` in this process."""
