"""What each run of a fine-tuning leaves at once: an answered test split, found again by the next start."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emoscale.evaluation.predictions import Predictions
from emoscale.files import replace_text
from emoscale.forms import Answers
from emoscale.records import read_json

log = logging.getLogger("emoscale")


@dataclass
class Outcome:
    """One arm on one fold with one seed."""

    arm: str
    seed: int
    fold: str
    step: int
    """Step that was chosen."""
    validation: float
    """Its UAR on the validation split."""
    test: float
    predictions: Predictions
    probabilities: np.ndarray
    """float32 [n, c] of the test split."""
    labelled: int
    """Training labels used."""


class Outcomes:
    """Outcomes of one output folder, a file each, kept with what they were made from.

    Runs that share the folder (of an array of jobs) write different files; each file is whole or absent.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, arm: str, seed: int, fold: str, made_from: dict[str, Any]) -> Outcome | None:
        """Give an outcome that was made from exactly this, else None."""
        path = self._path(arm, seed, fold)
        if not path.is_file():
            return None
        found = read_json(path, Answers, "remove it, and this arm runs again")
        if found["made_from"] != fingerprint(made_from):
            log.info("%s: made from another configuration, corpus or checkpoint; runs again", path)
            return None
        rows = found["rows"]
        predictions = Predictions(np.array(rows["truth"]), np.array(rows["predicted"]), rows["ids"], rows["speakers"], fold, seed)
        probabilities = np.array(rows["probabilities"], np.float32)
        return Outcome(arm, seed, fold, found["step"], found["validation"], found["test"], predictions, probabilities, found["labelled"])

    def keep(self, outcome: Outcome, made_from: dict[str, Any]) -> None:
        """Write an outcome."""
        told = outcome.predictions
        record = {
            "made_from": fingerprint(made_from), "step": outcome.step, "validation": outcome.validation, "test": outcome.test,
            "labelled": outcome.labelled,
            "rows": {
                "ids": list(told.ids), "speakers": list(told.speakers), "truth": np.asarray(told.truth).tolist(),
                "predicted": np.asarray(told.predicted).tolist(), "probabilities": outcome.probabilities.tolist(),
            },
        }  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self._path(outcome.arm, outcome.seed, outcome.fold), json.dumps(record))

    def _path(self, arm: str, seed: int, fold: str) -> Path:
        return self.folder / f"{folder_name(arm)}-seed{seed}-fold{folder_name(fold)}.json"


def fingerprint(made_from: dict[str, Any]) -> str:
    """Give the SHA-256 of what an outcome depends on."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()


def folder_name(name: str) -> str:
    """Give the file name of an arm or fold."""
    return re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "_"
