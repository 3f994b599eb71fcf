"""What may end a run before its last step: a signal, the end of its job, or that it no longer moves."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from emoscale import distributed
from emoscale.training.deadline import VARIABLE, Deadline, job_end
from emoscale.training.signals import Preemption
from emoscale.training.watchdog import LAST, Watchdog, patience

log = logging.getLogger("emoscale")


class Vigil:
    """Watches over a run, from before its ranks meet.

    Args:
        folder: run folder.
        world: this rank's place.
        signal: that asks for save and exit, besides SIGTERM.
        hang_s: seconds without the end of a step after which the process ends; 0 = never.
        margin: saves that are kept between the last step and the job's end; 0 = its end is not looked at.
    """

    def __init__(self, folder: Path, world: distributed.World, *, signal: str, hang_s: float, margin: float) -> None:
        end = job_end() if margin > 0 else None
        if end is not None and end <= time.time():  # a shell that has outlived the job it was opened in
            log.warning("%s: the job ended at %s, so this is not about this run: it is not looked at", VARIABLE, time.ctime(end))
            end = None
        self.preemption = Preemption(signal)
        # One rank's clock decides for all, and the reason stands in its words. What is kept for the save ends where the watchdog's patience does.
        self.deadline = Deadline((end - (LAST if hang_s > 0 else 0.0)) if end is not None and world.is_main else None, margin)
        self.watchdog = Watchdog(folder, world, hang_s, end)
        self.patience: timedelta = patience(hang_s)

    def ended(self, step: int, save_s: float = 0.0) -> None:
        """Note that a step has ended, and how long a save has taken at most, also where it was written beside the training."""
        self.watchdog.beat(step)
        self.deadline.beat()
        self.deadline.saved(save_s)

    def stop(self) -> str:
        """Why this rank wants to save and leave, or empty."""
        return self.preemption.received or self.deadline.due

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Give what happens inside the time of a save, and measure it."""
        with self.watchdog.saving(), self.deadline.saving():
            yield

    def uploading(self) -> None:
        """Note that nothing is left to do but uploads, which may take until the job's end."""
        self.watchdog.allow("uploading", math.inf)

    def close(self) -> None:
        """Watch no longer."""
        self.watchdog.close()
