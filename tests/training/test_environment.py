from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import emoscale
from emoscale.training import environment as module
from emoscale.training.environment import PACKAGES, environment, open_log


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
    root = Path(emoscale.__file__).resolve().parents[1]
    if (root / ".git").exists():
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        assert found["commit"] == (done.stdout.strip() if done.returncode == 0 else None)


def test_an_installed_package_has_no_commit_of_the_repository_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run(
        ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "theirs"], check=True
    )
    monkeypatch.setattr(module, "__file__", str(tmp_path / "site-packages" / "emoscale" / "training" / "environment.py"))
    assert environment()["commit"] is None


def test_a_resumed_run_appends_to_its_log(tmp_path: Path, logger: logging.Logger):
    for line in ("first", "second"):
        open_log(tmp_path / "train.log")
        logger.info(line)
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" INFO ")[1] for line in lines] == ["first", "second"]
