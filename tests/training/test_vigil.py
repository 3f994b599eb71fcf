from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from emoscale.distributed import World
from emoscale.training.vigil import Vigil


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave this process' handlers as they were."""
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def vigil(folder: Path, **given: float) -> Vigil:
    return Vigil(folder, given.pop("world", World()), signal="USR1", **({"hang_s": 0.0, "margin": 3.0} | given))  # type: ignore[arg-type]


def test_a_signal_stops(tmp_path: Path) -> None:
    watch = vigil(tmp_path)
    watch.ended(1)
    assert watch.stop() == ""
    os.kill(os.getpid(), signal.SIGUSR1)
    assert watch.stop() == "SIGUSR1"


def test_the_jobs_end_stops_and_one_rank_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 5))
    watches = [vigil(tmp_path), vigil(tmp_path, world=World(1, 2, 1, 2)), vigil(tmp_path, margin=0)]  # type: ignore[arg-type]
    for watch in watches:
        watch.ended(1)
        with watch.saving():
            time.sleep(0.01)
        watch.deadline.saved(100)
        watch.ended(2)
    assert [watch.stop().split(":")[0] for watch in watches] == ["deadline", "", ""]


def test_the_watchdog_is_there_until_closed(tmp_path: Path) -> None:
    watch = vigil(tmp_path, hang_s=60)
    try:
        assert "watchdog" in {thread.name for thread in threading.enumerate()}
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 60
    finally:
        watch.close()
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert not list(tmp_path.iterdir())


def test_the_end_of_another_job_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A shell keeps the variable of the job in which it was opened; ended by it, no run would outlive its first second."""
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() - 60))
    watch = vigil(tmp_path, hang_s=60)
    try:
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 60
        watch.ended(1)
        assert watch.stop() == ""
        assert "SLURM_JOB_END_TIME: the job ended at" in caplog.text
    finally:
        watch.close()


def test_uploads_may_take_until_the_job_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = vigil(tmp_path, hang_s=60)
    watch.uploading()
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    watch.close()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 1000))
    watch = vigil(tmp_path, hang_s=60)
    watch.uploading()
    assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] < 1000
    watch.close()
