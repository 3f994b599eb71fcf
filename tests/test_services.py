"""The reporting of tests that need a service, seen from a pytest run of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services import requires_service

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = """
from tests.services import requires_service

@requires_service("slurm")
def test_needs_slurm():
    pass
"""


def run(tmp_path: Path, required: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_runtest_setup, pytest_terminal_summary  # noqa: F401")
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    (tmp_path / "bin").mkdir(exist_ok=True)
    environment = os.environ | {"PATH": str(tmp_path / "bin"), "EMOSCALE_REQUIRE": required, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    return subprocess.run(
        [*command, "--rootdir", str(tmp_path), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )


def test_absent_service_is_listed_as_not_run_and_passes(tmp_path: Path) -> None:
    done = run(tmp_path, required="s3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOT RUN: test_sample.py::test_needs_slurm (slurm: slurmctld, slurmd, munged not found)" in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].startswith("1 skipped")


def test_absent_service_fails_where_it_is_required(tmp_path: Path) -> None:
    done = run(tmp_path, required="s3, slurm")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "EMOSCALE_REQUIRE names slurm" in done.stdout


def test_unknown_service_is_refused() -> None:
    with pytest.raises(ValueError, match="nfs: no such service"):
        requires_service("nfs")
