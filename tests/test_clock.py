from __future__ import annotations

import subprocess
import sys
import time

import pytest

from emoscale.clock import Laps, Stages, process_age


def busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_the_age_of_a_process_counts_what_came_before_the_first_import() -> None:
    code = "import time; time.sleep(1.0); from emoscale.clock import process_age; print(process_age())"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1.0 <= float(done.stdout) <= time.monotonic() - began + 0.02


def test_laps_add_up_to_the_age() -> None:
    laps = Laps()
    laps.end("imports")
    time.sleep(0.05)
    laps.end("corpus")
    assert 0.04 < laps.seconds["corpus"] < laps.total <= process_age()
    assert laps.total == pytest.approx(sum(laps.seconds.values()))
    assert str(laps).startswith("imports ")


def test_a_stage_within_another_is_taken_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("emoscale.clock.time.process_time", lambda: now[0])

    def busy(seconds: float) -> None:
        now[0] += seconds

    stage = Stages()
    with stage("outer"):
        busy(0.02)
        with stage("inner"):
            busy(0.06)
        busy(0.02)
    with stage("inner"):
        busy(0.02)
    busy(0.03)
    taken = stage.take()
    assert taken.keys() == {"outer", "inner"}
    assert taken["outer"] == pytest.approx(0.04)
    assert taken["inner"] == pytest.approx(0.08)
    assert stage.take() == {}


def test_an_error_ends_its_stage() -> None:
    stage = Stages()
    with pytest.raises(ValueError, match="odd"), stage("a"):
        raise ValueError("odd")
    busy(0.02)
    assert stage.take()["a"] < 0.01


def test_sleeping_is_no_work() -> None:
    stage = Stages()
    with stage("a"):
        time.sleep(0.1)
    assert stage.take()["a"] < 0.05
