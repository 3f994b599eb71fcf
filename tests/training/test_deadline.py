from __future__ import annotations

import pytest

from emoscale.config import ConfigError
from emoscale.training import deadline
from emoscale.training.deadline import Deadline, job_end


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    own = Clock()
    monkeypatch.setattr(deadline.time, "time", own)
    return own


def run(deadline: Deadline, clock: Clock, *, step: float, save: float, every: int) -> float:
    """Give when a run whose steps and saves take so long has saved for the last time."""
    for number in range(1, 100_000):
        clock.now += step
        deadline.beat()
        stop = deadline.due
        if stop or number % every == 0:
            with deadline.saving():
                clock.now += save
        if stop:
            assert stop.startswith("deadline: ")
            return clock.now
    raise AssertionError("the run never stopped")


@pytest.mark.parametrize(("step", "save"), [(1.0, 20.0), (0.1, 0.5), (30.0, 60.0), (5.0, 1.0)])
def test_the_run_has_saved_before_the_end_and_not_long_before(clock: Clock, step: float, save: float) -> None:
    left = run(Deadline(3000.0, 3.0), clock, step=step, save=save, every=10)
    assert 3000 - 2 * save - 2 * step <= left <= 3000 - save


def test_a_save_that_was_never_measured_is_taken_to_last_as_long_as_a_step(clock: Clock) -> None:
    left = run(Deadline(1100.0, 3.0), clock, step=2.0, save=2.0, every=100_000)
    assert 1090 <= left < 1100


def test_a_slow_step_is_forgotten(clock: Clock) -> None:
    watch = Deadline(10_000.0, 3.0)
    watch.beat()
    clock.now += 500
    watch.beat()
    for _ in range(100):
        clock.now += 1
        watch.beat()
    assert watch.step == pytest.approx(1.0)
    assert not watch.due


def test_a_run_begins_although_little_is_left(clock: Clock) -> None:
    watch = Deadline(1001.0, 3.0)
    assert not watch.due, "nothing has been learned that could be saved"


def test_without_an_end_there_is_no_deadline(clock: Clock) -> None:
    watch = Deadline(None, 3.0)
    watch.beat()
    assert not watch.due


def test_the_end_stands_in_slurms_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert job_end() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "")
    assert job_end() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1790000000")
    assert job_end() == 1790000000
    monkeypatch.setenv("SLURM_JOB_END_TIME", "Unknown")
    with pytest.raises(ConfigError, match="SLURM_JOB_END_TIME: 'Unknown' is no time"):
        job_end()
