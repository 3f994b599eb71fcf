"""Where numbers go: `metrics.jsonl` always, Weights & Biases or TensorBoard where asked."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any, Literal, Protocol

from emoscale.config import ConfigError
from emoscale.files import parse_json, replace_text

Backend = Literal["wandb", "tensorboard"]


class Tracker(Protocol):
    """Receives one flat row of numbers per logged step."""

    def log(self, row: dict[str, Any]) -> None:
        """Write one row."""

    def close(self) -> None:
        """Flush and leave."""


class JsonLines:
    """One JSON object per line; a resumed run first drops what lies behind its checkpoint, a torn last line too."""

    def __init__(self, path: Path, first_step: int) -> None:
        rows = [row for row in read_rows(path) if row["step"] <= first_step]
        replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a")

    def log(self, row: dict[str, Any]) -> None:
        """Write one row and flush it."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class WandB:
    """Weights & Biases."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        # Without an id of its own, a resumed run would be a second one.
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(project="emoscale", id=name, name=folder.name, dir=str(folder), config=config, resume="allow")

    def log(self, row: dict[str, Any]) -> None:
        """Write one row."""
        self._run.log(row, step=row["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class TensorBoard:
    """TensorBoard event files beside the metrics."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, row: dict[str, Any]) -> None:
        """Write every number of the row."""
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


BACKENDS = {"wandb": WandB, "tensorboard": TensorBoard}


def require(backends: list[Backend]) -> None:
    """Check that every backend is installed, before anything is set up: only rank 0 opens them, and the others would wait for it.

    Raises:
        ConfigError: one is not; says how to install it.
    """
    for name in backends:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"run.track: {name} is not installed; pip install 'emoscale[track]'")


def trackers(folder: Path, first_step: int, backends: list[Backend], config: dict[str, Any]) -> list[Tracker]:
    """Open every tracker of a run (rank 0 only)."""
    return [JsonLines(folder / "metrics.jsonl", first_step), *(BACKENDS[name](folder, config) for name in backends)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file; a line torn by a kill ends it."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = parse_json(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows
