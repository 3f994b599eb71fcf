"""What all tests share: the seed, skips with their reason, and the list of what was NOT RUN."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton, which reads it: kernels then run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from emoscale import distributed
from tests.services import is_required, missing
from tests.training.forks import Forks
from tests.tuned import Tuned, make

NOT_RUN = "NOT RUN: "
ROOT = Path(__file__).resolve().parent.parent
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _left_as_found() -> Iterator[None]:
    """Take back what a run in this process leaves: a later test, and every process that it starts, would take itself for a rank."""
    launched = {name: os.environ.get(name) for name in LAUNCHED}
    logger, threads = logging.getLogger("emoscale"), torch.get_num_threads()
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    distributed.shutdown()
    for opened in [handler for handler in logger.handlers if handler not in handlers]:
        logger.removeHandler(opened)
        opened.close()
    logger.setLevel(level)
    logger.propagate = propagate
    torch.set_num_threads(threads)
    for name, value in launched.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="session")
def shared() -> Path:
    """Give the folder of real sample media, which is not part of the repository."""
    folder = Path(os.environ.get("EMOSCALE_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real media: {folder}/data is absent (name its parent with EMOSCALE_SHARED)")
    return folder


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Start processes without their start-up time."""
    server = Forks(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def tuned(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Give a pre-training run and fine-tuning runs that start from it."""
    return make(tmp_path_factory.mktemp("tuned"), forks)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for mark in item.iter_markers("service"):
        reason = missing(mark.args[0])
        if reason and is_required(mark.args[0]):
            pytest.fail(f"{reason}, and EMOSCALE_REQUIRE names {mark.args[0]}", pytrace=False)
        if reason:
            pytest.skip(f"{NOT_RUN}{reason}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if NOT_RUN in reason:
            terminalreporter.write_line(f"{NOT_RUN}{report.nodeid} ({reason.split(NOT_RUN, 1)[1]})")
