from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import emoscale
from emoscale.clock import Laps
from emoscale.training import environment as module
from emoscale.training.environment import PACKAGES, FirstStep, environment, open_log


@pytest.fixture(autouse=True)
def logger() -> Iterator[logging.Logger]:
    """Leave the package's logger as it was."""
    log = logging.getLogger("emoscale")
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    yield log
    for handler in [item for item in log.handlers if item not in handlers]:
        handler.close()
    log.handlers, log.level, log.propagate = handlers, level, propagate


def test_versions_machine_and_commit_are_json():
    found = json.loads(json.dumps(environment()))
    assert set(found["packages"]) == set(PACKAGES)
    assert found["packages"]["torch"].split("+")[0].count(".") == 2
    assert found["cpus"] >= 1
    assert found["cpu"].endswith(f", {torch.backends.cpu.get_cpu_capability()}")
    listed = Path("/proc/cpuinfo")
    if listed.exists() and "model name" in listed.read_text():
        assert listed.read_text().split("model name", 1)[1].split(":", 1)[1].splitlines()[0].strip() in found["cpu"]
    root = Path(emoscale.__file__).resolve().parents[1]
    if (root / ".git").exists():
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        assert found["commit"] == (done.stdout.strip() if done.returncode == 0 else None)


def test_an_installed_package_has_no_commit_of_the_repository_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "site-packages" / "emoscale" / "training" / "environment.py"))
    assert environment()["commit"] is None


def test_a_resumed_run_appends_to_its_log(tmp_path: Path, logger: logging.Logger):
    for line in ("first", "second"):
        open_log(tmp_path / "train.log")
        logger.info(line)
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" INFO ")[1] for line in lines] == ["first", "second"]


def test_the_first_step_is_told_once_with_what_came_before(tmp_path: Path, logger: logging.Logger):
    open_log(tmp_path / "train.log")
    laps = Laps()
    laps.end("imports")
    laps.end("model")
    stepped = FirstStep(laps, tmp_path)
    for done in (6, 7):
        stepped(done)
    told = json.loads((tmp_path / "startup.json").read_text())
    assert told.keys() == {"step", "first_step_s", "imports_s", "model_s", "step_s", "cpu_s"}
    assert (told["step"], told["first_step_s"]) == (6, round(laps.total, 3))
    assert 0 < told["imports_s"] <= told["first_step_s"]
    (line,) = (tmp_path / "train.log").read_text().splitlines()
    assert f"first step after {laps.total:.1f} s (imports {laps.seconds['imports']:.1f}, model " in line


def test_a_rank_without_a_folder_says_nothing(tmp_path: Path):
    laps = Laps()
    FirstStep(laps, None)(1)
    assert laps.seconds == {}
    assert not list(tmp_path.iterdir())
