"""The end that a job has been given: the run saves and leaves in time, though no signal comes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from emoscale.config import ConfigError

VARIABLE = "SLURM_JOB_END_TIME"
"""Seconds since 1970. Newer SLURMs set it; `slurm/common.sh` does for the others."""
REASON = "deadline"
"""How the reason of a stop begins; the launcher looks for it."""
FORGET = 0.9
"""What is left of a slow step's time one step later: data that stalled once is no reason to leave early for ever."""


def job_end() -> float | None:
    """Give when the job will be ended, None where nobody has said.

    Raises:
        ConfigError: the variable holds no number.
    """
    told = os.environ.get(VARIABLE, "")
    try:
        return float(told) if told else None
    except ValueError as error:
        raise ConfigError(f"{VARIABLE}: {told!r} is no time in seconds since 1970; leave it unset, or give one") from error


class Deadline:
    """Learns how long steps and saves take, and says when it is time.

    Args:
        end: of the job, seconds since 1970; None = there is none.
        margin: saves (the longest so far) that must fit between the last step and the end.
    """

    def __init__(self, end: float | None, margin: float) -> None:
        self.end, self.margin, self.save, self.step = end, margin, 0.0, 0.0
        self._last: float | None = None

    def beat(self) -> None:
        """Note that a step has ended."""
        now = time.time()
        if self._last is not None:
            self.step = max(now - self._last, FORGET * self.step)
        self._last = now

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure a save."""
        start = time.time()
        yield
        self.saved(time.time() - start)
        self._last = None  # the step after it is measured from the next end of a step

    def saved(self, seconds: float) -> None:
        """Note how long a save took, from its call to the rename."""
        self.save = max(self.save, seconds)

    @property
    def due(self) -> str:
        """Why it is time to save and leave, or empty; a save that has never been measured is taken to last as long as a step."""
        if self.end is None or self._last is None:
            return ""
        needed, left = self.margin * (self.save or self.step) + self.step, self.end - time.time()
        return f"{REASON}: {left:.0f} s are left, {needed:.0f} are kept for the save" if left <= needed else ""
