"""A run that no longer moves ends: its stacks on disk, with an exit code that asks a launcher to start it again.

One thread per rank waits for the end of a step. Where none comes in time, the rank that hangs and those that wait for it in a
collective all write where they stand, and leave. Should the thread not get to run, because somebody holds the interpreter, the
kernel's alarm clock does it some seconds later: then the stacks are on standard error, and the exit is that of SIGALRM.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from emoscale import distributed
from emoscale.training.outcome import tell

log = logging.getLogger("emoscale")
STATUS = 75
"""Exit code of a rank that did not move (EX_TEMPFAIL: worth another try)."""
SLOW = 1800.0
"""Seconds that the first step and a save may take at least: corpora are opened, kernels compiled, file systems stall."""
GRACE = 15.0
"""Seconds after which the alarm clock does what the thread could not; no more than the limit itself."""
LINGER = 3.0
"""Seconds between the stacks and the end: the others are as late, and would lose this rank before they have written theirs."""
LAST = 30.0
"""Seconds before a job's end at which a run that should have left long ago is ended, while the launcher can still requeue it."""
STANDARD_ERROR = 2


class Watchdog:
    """Ends this process when `beat` is not called for too long.

    Args:
        folder: where `stacks_rank00000.txt` goes.
        world: this rank's place.
        limit: seconds between two beats, 0 = no watchdog.
        end: when the launcher ends the job, seconds since 1970; None = never, as far as is known.
    """

    def __init__(self, folder: Path, world: distributed.World, limit: float, end: float | None = None) -> None:
        self.path = folder / f"stacks_rank{world.rank:05d}.txt"
        self.step: int | None = None
        self._world, self._limit, self._end = world, limit, end
        self._doing, self._since, self._until = "starting", time.monotonic(), float("inf")
        self._closed = threading.Event()
        if limit > 0:
            faulthandler.register(signal.SIGALRM, STANDARD_ERROR, all_threads=True, chain=True)
            self.allow("starting", max(limit, SLOW))
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """Note that a step has ended; the next one has `limit` seconds."""
        self.step = step
        self.allow(f"in step {step + 1}", self._limit)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Give what happens inside the time of a save, and what follows the time of a step."""
        self.allow("saving", max(self._limit, SLOW))
        yield
        self.allow("after saving", self._limit)

    def allow(self, doing: str, seconds: float) -> None:
        """Let what is being done take so many seconds, and no longer than the job; after that, the process ends."""
        if self._limit <= 0:
            return
        if self._end is not None:
            seconds = min(seconds, max(1.0, self._end - LAST - time.time()))
        self._doing, self._since = doing, time.monotonic()
        self._until = self._since + seconds
        signal.setitimer(signal.ITIMER_REAL, 0 if math.isinf(seconds) else seconds + min(GRACE, self._limit))

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()
        if self._limit > 0:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.unregister(signal.SIGALRM)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._limit / 4)):
            if time.monotonic() > self._until:
                self._leave()

    def _leave(self) -> None:
        waited = time.monotonic() - self._since
        signal.setitimer(signal.ITIMER_REAL, 0)
        said = f"rank {self._world.rank} on {distributed.node_name()} has not moved for {waited:.0f} s, {self._doing}"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                print(f"{time.strftime('%FT%T%z')} {said}", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
            os.write(STANDARD_ERROR, f"emoscale: {said}; stacks are in {self.path}\n".encode())
            told = {} if self.step is None else {"step": self.step}
            tell(finished=False, reason=f"hung: {said}", output=str(self.path.parent.resolve()), **told)
            time.sleep(LINGER)
        finally:  # whatever became of the words
            os._exit(STATUS)


def patience(limit: float) -> timedelta:
    """Give the time a collective may take: longer than the watchdog's, or its error would come before the stacks."""
    return max(distributed.TIMEOUT, timedelta(seconds=max(limit, SLOW) + 2 * GRACE)) if limit > 0 else distributed.TIMEOUT
