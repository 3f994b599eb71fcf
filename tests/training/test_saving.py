"""Saving beside the training: what the loop waits for, and what happens where a disk is full."""

from __future__ import annotations

import logging
import re
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from emoscale.distributed import World
from emoscale.training import checkpoint
from emoscale.training.checkpoint import State, find_latest, list_steps, random_states
from emoscale.training.saving import SaveError, Saver
from emoscale.training.track import read_rows
from tests.training.runs import Runs, assert_same_run, wait_for_checkpoint

WORLD = World()


def saver_of(run: Path, **options: bool | int) -> Saver:
    (run / "assets").mkdir(parents=True, exist_ok=True)
    return Saver(run, WORLD, **{"keep": 2, **options})  # type: ignore[arg-type]


def state_of(step: int, values: int = 4) -> Callable[[], State]:
    return lambda: State(step, {"w": torch.full((values,), float(step))}, {"m": torch.ones(2)}, step, {}, random_states())


@contextmanager
def full_disk(largest: int = 1 << 16) -> Iterator[None]:
    """Let writes of larger files fail: the limit holds for all threads of this process, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_loop_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write is held up: `save` returns all the same, the next save waits for it, and so does the end."""
    saver, go, write = saver_of(tmp_path), threading.Event(), checkpoint.write

    def held_up(*given: object) -> Path:
        go.wait(60)
        return write(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "write", held_up)
    saver.save(1, state_of(1))
    assert not (tmp_path / "checkpoints").exists()
    start = time.perf_counter()
    threading.Timer(0.3, go.set).start()
    saver.save(2, state_of(2))
    assert time.perf_counter() - start > 0.2
    assert [path.name for path in list_steps(tmp_path / "checkpoints")][-1] == "step_00000001"
    saver.finish()
    assert [path.name for path in list_steps(tmp_path / "checkpoints")] == ["step_00000002", "step_00000001"]
    assert saver.longest_s > 0.2
    saver.close()


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    saver, taken = saver_of(tmp_path), []

    def snapshot() -> State:
        taken.append(1)
        return state_of(3)()

    saver.save(3, snapshot)
    saver.save(3, snapshot)
    saver.finish()
    assert len(taken) == 1


@pytest.mark.parametrize("background", [True, False])
def test_superseded_checkpoints_go(tmp_path: Path, background: bool) -> None:
    saver = saver_of(tmp_path, keep=1, keep_every=4, background=background)
    for step in (2, 4, 6, 8, 10):
        saver.save(step, state_of(step))
    saver.finish()
    assert [path.name for path in list_steps(tmp_path / "checkpoints")] == ["step_00000010", "step_00000008", "step_00000004"]


def test_a_full_disk_is_one_error_at_the_next_save_and_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saver = saver_of(tmp_path)
    saver.save(1, state_of(1))
    saver.finish()
    with full_disk():
        saver.save(2, state_of(2, 1 << 16))
        with pytest.raises(SaveError, match=r"step 3 could not be saved .*File too large.*the checkpoint before it stands"):
            saver.save(3, state_of(3, 1 << 16))
    saver.close()
    assert caplog.text.count("could not be saved, the checkpoint before it stands") == 2
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000001"]
    found = find_latest(tmp_path / "checkpoints")
    assert found is not None
    assert found.name == "step_00000001"


def test_a_full_disk_at_the_end_is_an_error_too(tmp_path: Path) -> None:
    saver = saver_of(tmp_path)
    with full_disk():
        saver.save(2, state_of(2, 1 << 16))
        with pytest.raises(SaveError, match="step 2 could not be saved"):
            saver.finish()
    saver.close()


def test_space_that_was_freed_in_time_costs_one_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saver = saver_of(tmp_path)
    with full_disk():
        saver.save(2, state_of(2, 1 << 16))
        assert saver._writing is not None
        assert saver._writing.exception() is not None
    saver.save(3, state_of(3, 1 << 16))
    assert [path.name for path in list_steps(tmp_path / "checkpoints")] == ["step_00000003"], "it was waited for"
    saver.close()
    assert caplog.text.count("could not be saved") == 1


def test_the_log_says_how_long_training_waited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "emoscale")
    saver = saver_of(tmp_path)
    saver.save(1, state_of(1))
    saver.close()
    assert re.search(r"step_00000001 written in \d+\.\d s, for \d+\.\d s of which training waited", caplog.text)


@pytest.mark.slow
@pytest.mark.faults
def test_all_ranks_of_a_run_hear_of_a_full_disk_and_the_last_checkpoint_stands(runs: Runs, tmp_path: Path) -> None:
    """Whole checkpoints take about a megabyte here; from the fifth step on, files of a quarter of that fail."""
    folder = tmp_path / "run"
    ranks = runs.start(folder, "zero.stage=1", world=2)
    wait_for_checkpoint(folder, 5, ranks)
    for pid in ranks.pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 18, resource.RLIM_INFINITY))
    assert ranks.wait() == [1, 1]
    for log in ranks.logs:
        assert "step 10 could not be saved" in log.read_text()
        assert "Traceback" not in log.read_text()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest", "step_00000005"]
    runs.start(folder, "zero.stage=1", world=2).succeed()
    assert_same_run(folder, runs.unbroken("zero.stage=1", world=2))


def test_a_run_gives_the_same_with_and_without_the_thread(runs: Runs, tmp_path: Path) -> None:
    runs.start(tmp_path / "run", "zero.stage=1", "run.save_async=false").succeed()
    assert_same_run(tmp_path / "run", runs.unbroken("zero.stage=1"))


@pytest.mark.slow
def test_a_save_holds_the_loop_for_a_copy_alone(runs: Runs, tmp_path: Path) -> None:
    """A checkpoint of about 130 MB on a disk that takes two seconds longer: seconds that the loop is held by a save, with the write beside it and without."""
    words = ["zero.stage=1", "model.width=384", "model.layers=6", "data.global_batch=4", "run.save_every=4", "run.steps=10"]
    held, steps, size = {}, {}, 0.0
    for name in ("false", "true"):
        folder = tmp_path / name
        given = ["pretrain", f"data.corpora=[{runs.corpus}]", f"run.output={folder}", *runs.recipe, *words, f"run.save_async={name}"]
        runs.forks.start("tests.training.runs:on_a_slow_disk", 2.0, *given).succeed()
        measured = read_rows(folder / "metrics.jsonl")
        held[name] = min(row["save_s"] for row in measured if row["save_s"] > 0)  # the second save waits for the first one's write
        steps[name] = statistics.median(row["step_time_s"] for row in measured[1:])
        size = sum(path.stat().st_size for path in (folder / "checkpoints/step_00000010").rglob("*") if path.is_file()) / 1e6
    told = {"false": "at once", "true": "beside the training"}
    print("\n" + "; ".join(f"{told[name]}: {held[name]:.2f} s per save of {size:.0f} MB, {held[name] / steps[name]:.2f} steps" for name in held))
    assert held["true"] < held["false"] / 2
