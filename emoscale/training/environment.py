"""What a run was made with, and where its log goes."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from emoscale.clock import Laps
from emoscale.redaction import redact

PACKAGES = ("emoscale", "torch", "deepspeed", "transformers", "mosaicml-streaming", "triton", "numpy", "omegaconf")


def environment() -> dict[str, Any]:
    """Give versions, machine and commit; a missing package is null."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": sys.version.split()[0],
        "packages": versions,
        "platform": platform.platform(),
        "cpu": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


class FirstStep:
    """Says once, after the first optimizer step, how long it took from the command: in the log and in `startup.json`.

    Args:
        laps: of this process so far.
        folder: of the run; None for a rank that writes nothing.
    """

    def __init__(self, laps: Laps, folder: Path | None) -> None:
        self._laps, self._folder, self._told = laps, folder, False

    def __call__(self, done: int) -> None:
        """Take note of a step, the `done`-th of the run."""
        if self._told or self._folder is None:
            return
        import torch

        self._told = True
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._laps.end("step")
        logging.getLogger("emoscale").info("first step after %.1f s (%s)", self._laps.total, self._laps)
        sections = {f"{name}_s": round(seconds, 3) for name, seconds in self._laps.seconds.items()}
        told = {"step": done, "first_step_s": round(self._laps.total, 3), **sections, "cpu_s": round(time.process_time(), 3)}
        (self._folder / "startup.json").write_text(json.dumps(told, indent=1))


def open_log(path: Path) -> None:
    """Send the package's log to a file (appending: a resumed run goes on in it) and to standard error."""
    logger = logging.getLogger("emoscale")
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    for handler in (logging.FileHandler(path), logging.StreamHandler()):
        handler.setFormatter(_Redacting("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _Redacting(logging.Formatter):
    """Takes credentials out of every line, whoever wrote it."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _processor() -> str:
    """Give the name, family and model of the CPU: of two families even ratios between programs differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # another system than Linux
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    named = [
        facts[key] if key == "model name" else f"{key} {facts[key]}"
        for key in ("model name", "cpu family", "model", "CPU implementer", "CPU part")
        if key in facts
    ]
    return " ".join(named) or platform.machine()


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        # An installed package may lie inside somebody else's repository.
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
