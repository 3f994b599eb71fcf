from __future__ import annotations

import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest

from emoscale.distributed import TIMEOUT, LostRankError
from emoscale.training.watchdog import STATUS, patience
from tests.training.forks import Forks
from tests.training.runs import Runs, assert_same_run, ended, wait_for_step

LIMIT = 3.0
ALARM = -signal.SIGALRM


@pytest.mark.faults
@pytest.mark.parametrize("how", ["sleeping", "stopped"])
def test_ranks_that_do_not_move_say_where_they_stand_and_leave(forks: Forks, tmp_path: Path, how: str) -> None:
    ranks = forks.start("tests.training.standstill:stand", str(tmp_path), how, LIMIT, world=2)
    end = time.monotonic() + 60
    while not (tmp_path / "stacks_rank00000.txt").is_file():
        assert time.monotonic() < end, ranks.output()
        time.sleep(0.05)
    if how == "stopped":
        ranks.lost(0)
        ranks.kill(signal.SIGKILL, rank=1)  # it cannot speak for itself; a launcher ends it
    assert ranks.wait() == [STATUS, STATUS if how == "sleeping" else -9]
    waiting = (tmp_path / "stacks_rank00000.txt").read_text()
    assert "rank 0 on " in waiting
    assert "in step 3" in waiting
    assert "barrier" in waiting
    assert "stacks are in " in ranks.output()
    if how == "sleeping":
        assert "_stand" in (tmp_path / "stacks_rank00001.txt").read_text()


@pytest.mark.faults
def test_the_alarm_clock_ends_a_rank_whose_interpreter_is_held(forks: Forks, tmp_path: Path) -> None:
    ranks = forks.start("tests.training.standstill:stand", str(tmp_path), "holding the interpreter", LIMIT)
    assert ranks.wait(90) == [ALARM]
    assert "in _stand" in ranks.output()


def test_a_save_has_its_own_time_and_a_closed_watchdog_is_quiet(forks: Forks, tmp_path: Path) -> None:
    forks.start("tests.training.standstill:stand", str(tmp_path), "slow save", LIMIT).succeed()
    assert not list(tmp_path.iterdir())


def test_a_collective_waits_longer_than_the_watchdog() -> None:
    assert patience(0) == TIMEOUT
    assert patience(600) > timedelta(seconds=1800)
    assert patience(7200) > timedelta(seconds=7200)


@pytest.mark.slow
@pytest.mark.faults
def test_a_run_that_hung_goes_on_bit_equal(runs: Runs, tmp_path: Path) -> None:
    folder, words = tmp_path / "run", ["zero.stage=1"]
    ranks = runs.start(folder, *words, "run.hang_s=8", world=2)
    wait_for_step(folder, 6, ranks)
    ranks.kill(signal.SIGSTOP, rank=1)
    end = time.monotonic() + 60
    while not (folder / "stacks_rank00000.txt").is_file():
        assert time.monotonic() < end, ranks.output()
        time.sleep(0.1)
    ranks.lost(0)
    ranks.kill(signal.SIGKILL, rank=1)
    assert ranks.wait() == [STATUS, -9]
    runs.start(folder, *words, world=2).succeed()
    assert ended(folder)["finished"]
    assert_same_run(folder, runs.unbroken(*words, world=2))


@pytest.mark.slow
@pytest.mark.faults
def test_a_rank_that_lost_another_says_so_in_one_line(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = runs.start(folder, "zero.stage=1", world=2)
    wait_for_step(folder, 3, ranks)
    ranks.kill(signal.SIGKILL, rank=1)
    assert ranks.wait() == [LostRankError.status, -9]
    assert "emoscale: another rank has gone (" in ranks.output()
    assert "Traceback" not in ranks.output()
