"""Saving beside the training: the loop waits for a copy of the state, and a thread of rank 0 makes a checkpoint of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from emoscale import distributed
from emoscale.config import EmoscaleError
from emoscale.training import checkpoint
from emoscale.training.checkpoint import State
from emoscale.training.mirror import Mirror

log = logging.getLogger("emoscale")


class SaveError(EmoscaleError):
    """A checkpoint could not be written; the one before stands."""


class Saver:
    """Writes checkpoints one at a time; what is collective happens in the caller's thread, on all ranks.

    A write that fails (a full disk) is told at once, and tried again with the next state, for which the loop then waits. If
    that fails too, every rank raises; the last whole checkpoint stands all the while.

    Args:
        run: the run folder; its `assets` go into every checkpoint.
        keep, keep_every: see `checkpoint.superseded`.
        background: whether the loop goes on while a checkpoint is written.
        mirror: uploads what was written (rank 0 only).
    """

    def __init__(self, run: Path, world: distributed.World, *, keep: int, keep_every: int = 0, background: bool = True, mirror: Mirror | None = None) -> None:
        self.folder, self.assets, self.world, self.mirror = run / "checkpoints", run / "assets", world, mirror
        self.keep, self.keep_every, self.background = keep, keep_every, background
        self._longest_s = 0.0
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._step = -1

    def save(self, step: int, snapshot: Callable[[], State]) -> None:
        """Save a step, unless it is the one saved last (collective).

        Args:
            step: of the state.
            snapshot: gives the state, copied to the host; collective, and only rank 0 needs it whole.

        Raises:
            SaveError: this and the save before have failed.
        """
        start = time.perf_counter()
        failed = self._outcome()
        if step == self._step and not failed:
            return
        state = snapshot()
        if self.world.is_main:
            self._writing = self._thread.submit(self._write, state, start)
        del state  # the thread alone holds it, and lets go of it when it is written
        self._step = step
        if failed or not self.background:
            self.finish()

    def finish(self) -> None:
        """Wait until the last checkpoint is in place (collective).

        Raises:
            SaveError: it could not be written.
        """
        failed = self._outcome()
        if failed:
            raise SaveError(
                f"{self.folder}: step {self._step} could not be saved ({failed}); the checkpoint before it stands: free space or repair the disk, then run again"
            )

    def close(self) -> None:
        """Wait for what rank 0 is writing; not collective, so it serves where another rank has failed."""
        self._thread.shutdown()

    def uploaded(self) -> None:
        """Wait for what rank 0 is uploading."""
        if self.mirror is not None:
            self.mirror.close()

    @property
    def longest_s(self) -> float:
        """Seconds from the call of `save` to the rename, and to the end of an upload, the longest so far (rank 0)."""
        return self._longest_s + (self.mirror.longest_s if self.mirror is not None else 0.0)

    def _outcome(self) -> str:
        """Wait for the write in progress; give what went wrong with it, the same on every rank (collective)."""
        error = self._writing.exception() if self._writing is not None else None
        self._writing = None
        return "".join(distributed.gather_names([f"{type(error).__name__}: {' '.join(str(error).split())}"] if error is not None else []))

    def _write(self, state: State, start: float) -> None:
        """Write, remove what is superseded, and tell the mirror; in the thread of rank 0."""
        held = time.perf_counter() - start
        try:
            written = checkpoint.write(self.folder, state, self.assets)
        except Exception as error:
            log.error("step %d could not be saved, the checkpoint before it stands: %s", state.step, error)
            raise
        took = time.perf_counter() - start
        self._longest_s = max(self._longest_s, took)
        log.info("%s written in %.1f s, for %.1f s of which training waited", written.name, took, held if self.background else took)
        if self.mirror is None:
            checkpoint.retire(self.folder, written, keep=self.keep, keep_every=self.keep_every)
            return
        with self.mirror.lock:
            checkpoint.retire(self.folder, written, keep=self.keep, keep_every=self.keep_every, spare=self.mirror.uploading)
        self.mirror.notice(written.name)
