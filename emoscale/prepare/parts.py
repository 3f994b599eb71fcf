"""What single inputs gave, kept until the corpus is assembled.

Every input leaves one part under `.parts/`, written aside and renamed, so that a run killed at any moment loses at most
the inputs it was working on.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from emoscale.batch import COLUMNS, RAW, Utterance
from emoscale.config import DataError
from emoscale.files import parse_json
from emoscale.records import read_arrays

PARTS = ".parts"
ARRAYS = ("acoustic", "visual", "visual_emotion", "text_features")
BYTES = tuple(column for column, _ in RAW.values())
DAMAGED = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError)
"""What a part raises that was cut off, or holds something else."""


@dataclass
class Part:
    """What one input gave."""

    key: str
    """Hash of the input and of everything that decides its features; another key means that the part is stale."""
    row: dict[str, Any]
    """Its row of the ledger."""
    utterances: list[Utterance] = field(default_factory=list)
    """Empty for an input that was skipped."""
    encoders: dict[str, Any] = field(default_factory=dict)
    """Which encoders looked at it; empty where its features came with a manifest."""

    @property
    def head(self) -> Head:
        """All but the utterances."""
        widths = {c: max((getattr(u, c).shape[1] for u in self.utterances if len(getattr(u, c))), default=0) for c in ARRAYS}
        return Head(self.key, self.row, self.encoders, widths)


@dataclass
class Head:
    """What can be told of a part without its features."""

    key: str
    """As in the part."""
    row: dict[str, Any]
    """As in the part."""
    encoders: dict[str, Any]
    """As in the part."""
    widths: dict[str, int]
    """Columns of each feature; 0 where no utterance has it."""


class PartStore:
    """The parts of a corpus, one file per input."""

    def __init__(self, folder: Path) -> None:
        """Use the parts below a corpus folder."""
        self.folder = folder
        self._folder = folder / PARTS
        self._folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where the part of an input lies; a hash, since names hold slashes and may be long."""
        digest = hashlib.sha256(name.encode()).hexdigest()[:32]
        return self._folder / digest[:2] / f"{digest}.npz"

    def write(self, name: str, part: Part) -> None:
        """Store a part: complete or not at all."""
        path = self.path(name)
        path.parent.mkdir(exist_ok=True)
        records = [{c: getattr(u, c) for c in COLUMNS if c not in ARRAYS} for u in part.utterances]
        arrays: dict[str, np.ndarray] = {}
        for column in ARRAYS:
            values = [getattr(u, column) for u in part.utterances]
            arrays[f"{column}.shapes"] = np.array([value.shape for value in values], np.int64).reshape(-1, 2)
            flat = [np.asarray(value, np.float16).reshape(-1) for value in values]
            arrays[column] = np.concatenate(flat) if flat else np.zeros(0, np.float16)
        for column in BYTES:
            kept = [np.frombuffer(getattr(u, column), np.uint8) for u in part.utterances]
            arrays[f"{column}.shapes"] = np.array([value.shape for value in kept], np.int64).reshape(-1, 1)
            arrays[column] = np.concatenate(kept) if kept else np.zeros(0, np.uint8)
        head = json.dumps(vars(part.head) | {"records": records}).encode()
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        with aside.open("wb") as file:
            np.savez(file, head=np.frombuffer(head, np.uint8), **arrays)  # pyright: ignore[reportArgumentType]
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)

    def head(self, name: str) -> Head | None:
        """Read what is known of a part; None if there is none or it is damaged, which means: extract again."""
        try:
            head = parse_json(_arrays(self.path(name), "head")["head"].tobytes())
            return Head(**{key: head[key] for key in vars(Head("", {}, {}, {}))})
        except DAMAGED:
            return None

    def utterances(self, name: str) -> list[Utterance]:
        """Load the utterances of a part.

        Raises:
            DataError: the part is damaged; it is removed, so that the next run extracts it again.
        """
        path = self.path(name)
        try:
            stored = _arrays(path)
            records = parse_json(stored["head"].tobytes())["records"]
            columns: dict[str, Any] = {c: _split(stored[c], stored[f"{c}.shapes"]) for c in (*ARRAYS, *BYTES) if c in stored}
            columns |= {c: [value.tobytes() for value in columns[c]] for c in BYTES if c in columns}
            return [Utterance(**record | {c: values[i] for c, values in columns.items()}) for i, record in enumerate(records)]
        except DAMAGED as error:
            path.unlink(missing_ok=True)
            raise DataError(f"{path}: the part of {name} is damaged ({error}) and was removed; run `emoscale prepare` again") from error

    def clean(self) -> None:
        """Remove what killed writers left."""
        for left in self._folder.glob("*/*.tmp"):
            owner = left.name.split(".")[-2]
            if not (owner.isdigit() and Path("/proc", owner).exists()):
                left.unlink(missing_ok=True)


def _arrays(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Read arrays of a part, all of them where none is named."""
    found = read_arrays(path, names)
    if not isinstance(found, dict):
        raise ValueError("holds one array")
    return found


def _split(flat: np.ndarray, shapes: np.ndarray) -> list[np.ndarray]:
    ends = np.cumsum(shapes.prod(axis=1)).tolist() if len(shapes) else []
    return [flat[end - int(np.prod(shape)) : end].reshape(shape) for end, shape in zip(ends, shapes, strict=True)]
