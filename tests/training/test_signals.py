from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from emoscale.config import ConfigError
from emoscale.training.signals import Preemption

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Leave this process' handlers as they were."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("name", "number"), [
    ("USR1", signal.SIGUSR1), ("SIGUSR2", signal.SIGUSR2), ("HUP", signal.SIGHUP), ("USR1", signal.SIGTERM),
])  # fmt: skip
def test_a_signal_is_noted_and_nothing_else_happens(name: str, number: signal.Signals):
    preemption = Preemption(name)
    assert preemption.received == ""
    os.kill(os.getpid(), number)
    assert preemption.received == number.name


def test_an_unknown_signal_is_refused():
    with pytest.raises(ConfigError, match=r"run\.signal: 'USR9' is no signal"):
        Preemption("USR9")
