"""Preemption: a signal asks every rank to save at the end of the step, and to leave."""

from __future__ import annotations

import signal
from types import FrameType

from emoscale.config import ConfigError


class Preemption:
    """Notes SIGTERM and one more signal (USR1 by default); the training loop asks whether any rank has seen one."""

    def __init__(self, name: str = "USR1") -> None:
        wanted = getattr(signal, f"SIG{name.removeprefix('SIG')}", None)
        if wanted is None:
            raise ConfigError(f"run.signal: {name!r} is no signal of this system; USR1, USR2 and HUP are common")
        self.received: str = ""
        for number in (wanted, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
