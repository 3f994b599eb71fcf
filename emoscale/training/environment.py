"""What a run was made with, and where its log goes."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

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
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def open_log(path: Path) -> None:
    """Send the package's log to a file (appending: a resumed run goes on in it) and to standard error."""
    logger = logging.getLogger("emoscale")
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    for handler in (logging.FileHandler(path), logging.StreamHandler()):
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


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
