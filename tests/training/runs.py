"""Whole runs through the command line, in processes that tests kill and signal, and what they leave."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from emoscale.data.loader import StepData
from tests.training.forks import Forks, Ranks

TIMINGS = (
    "step_time_s", "data_wait_s", "data_wait_share", "save_s", "utterances_per_s", "tokens_per_s", "host_memory_gib", "slowest_rank",
    "rank_time_max_over_median",
)  # fmt: skip
STEPS = 10
SMALL_MODEL = ["model.size=tiny", "model.width=64", "objectives.masked_text.ratio=0.3"]
RECIPE = [
    *SMALL_MODEL,
    f"run.steps={STEPS}",
    "run.save_every=5",
    "run.log_every=1",
    "run.precision=fp32",
    "run.threads=1",
    "data.global_batch=64",
    "data.max_tokens=2048",
    "data.workers=0",
    "optim.lr=1e-3",
    "optim.warmup=4",
]
"""Ten steps with dropout; where a test steps in between, they are `paced`."""
BETWEEN = 0.3
"""Seconds between two paced steps."""


def command(*words: str) -> None:
    """Run the command line in this process, as the `emoscale` script does."""
    from emoscale.cli import main

    sys.argv = ["emoscale", *words]
    main()


def paced(seconds: float, *words: str) -> None:
    """Run the command line with at least so many seconds between two steps: room for a test to step in, on machines of any speed."""
    from emoscale.training import run

    train = run.train
    run.train = lambda engine, steps, *rest, **named: train(engine, slowly(steps, seconds), *rest, **named)  # type: ignore[assignment]
    command(*words)


def on_a_slow_disk(seconds: float, *words: str) -> None:
    """Run the command line, with every checkpoint taking so many seconds longer to write."""
    from emoscale.training import checkpoint

    write = checkpoint.write

    def late(*args: Any) -> Path:
        time.sleep(seconds)
        return write(*args)

    checkpoint.write = late
    command(*words)


def slowly(steps: Iterator[StepData], seconds: float) -> Iterator[StepData]:
    """Give the data of steps, each after a while."""
    for data in steps:
        time.sleep(seconds)
        yield data


class Runs:
    """Runs on one corpus; unbroken ones are kept for the tests that compare with them."""

    def __init__(self, forks: Forks, corpus: Path, folder: Path, recipe: list[str] = RECIPE) -> None:
        self.forks, self.corpus, self.folder, self.recipe = forks, corpus, folder, recipe
        self._unbroken: dict[tuple[Any, ...], Path] = {}

    def start(self, folder: Path, *words: str, world: int = 1, corpus: Path | None = None, pace: float = 0.0) -> Ranks:
        """Start `emoscale pretrain`, with at least `pace` seconds between two steps."""
        given = ["pretrain", f"data.corpora=[{corpus or self.corpus}]", f"run.output={folder}", *self.recipe, *words]
        if pace:
            return self.forks.start("tests.training.runs:paced", pace, *given, world=world)
        return self.forks.start("tests.training.runs:command", *given, world=world)

    def unbroken(self, *words: str, world: int = 1) -> Path:
        """Give the folder of a run that nobody stopped."""
        key = (*words, world)
        if key not in self._unbroken:
            self._unbroken[key] = self.folder / f"unbroken-{len(self._unbroken)}"
            self.start(self._unbroken[key], *words, world=world).succeed()
        return self._unbroken[key]

    def copy(self, *words: str) -> Path:
        """Give a copy of an unbroken run, to be damaged."""
        target = Path(tempfile.mkdtemp(dir=self.folder)) / "copy"
        return Path(shutil.copytree(self.unbroken(*words), target))


def wait_for_step(folder: Path, step: int, ranks: Ranks, timeout: float = 120.0) -> None:
    """Wait until a step is in the metrics."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if any(row["step"] >= step for row in rows(folder)):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached within {timeout} s:\n{ranks.output()}")


def wait_for_checkpoint(folder: Path, step: int, ranks: Ranks, timeout: float = 120.0) -> None:
    """Wait until a checkpoint, which is written beside the training, is in place."""
    latest, end = folder / "checkpoints" / "latest", time.monotonic() + timeout
    while time.monotonic() < end:
        if latest.is_file() and latest.read_text() >= f"step_{step:08d}":
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not saved within {timeout} s:\n{ranks.output()}")


def rows(folder: Path) -> list[dict[str, Any]]:
    """Read the metrics without what is never the same twice."""
    from emoscale.training.track import read_rows

    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in read_rows(folder / "metrics.jsonl")]


def assert_same_run(one: Path, other: Path) -> None:
    """Demand the same metrics, weights and moments to the last bit."""
    assert [row["step"] for row in rows(one)] == list(range(1, STEPS + 1))
    assert rows(one) == rows(other)
    for name in ("weights", "moments"):
        mine, theirs = (load_file(folder / "checkpoints" / f"step_{STEPS:08d}" / f"{name}.safetensors") for folder in (one, other))
        assert mine.keys() == theirs.keys()
        assert mine
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name


def ended(folder: Path) -> dict[str, Any]:
    """Read how the run ended."""
    return json.loads((folder / "done.json").read_text())
