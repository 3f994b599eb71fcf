"""What a system answered: checked, joined over folds, and matched between two systems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emoscale.config import DataError
from emoscale.evaluation.resampling import Unit
from emoscale.evaluation.rows import name_rows

OTHER = -1
"""An answer outside the classes (a prompt head may give one); always wrong."""
FEW_SPEAKERS = 10


@dataclass(frozen=True)
class Predictions:
    """What one system answered on one test set."""

    truth: ArrayLike
    """int [rows]: true class of each utterance, 0 … classes − 1."""
    predicted: ArrayLike
    """int [rows]: answered class, or `OTHER`."""
    ids: Sequence[str] = ()
    """Utterance ids; without them rows are known by their place."""
    speakers: Sequence[str] = ()
    """Who speaks, empty text where unknown; without them intervals are over utterances."""
    split: str = ""
    """Fold this test set belongs to; the folds of one seed are pooled before a score is taken."""
    seed: int = 0
    """Training seed; scores are averaged over seeds."""

    def without(self, aside: int) -> Predictions:
        """Leave out the rows of one class, as if there were none: later classes count from one less, and whoever answers it is wrong."""
        truth, predicted = np.asarray(self.truth), np.asarray(self.predicted)
        rows: list[int] = np.flatnonzero(truth != aside).tolist()
        answers = np.where(predicted == aside, OTHER, predicted - (predicted > aside))
        ids, speakers = ([names[row] for row in rows] if names else [] for names in (self.ids, self.speakers))
        return Predictions((truth - (truth > aside))[rows], answers[rows], ids, speakers, self.split, self.seed)


def check_labels(truth: NDArray[Any], predicted: NDArray[Any], classes: Sequence[str], ids: Sequence[str] = ()) -> None:
    """Refuse labels no score can be taken from.

    Raises:
        DataError: nothing to score; lengths differ; a true class is missing (negative, NaN) or unknown; an answer is
            neither a class nor `OTHER`; all rows are of one class.
    """
    if len(truth) == 0:
        raise DataError("no labelled rows to score: the test part is empty; check the split and the label names")
    if len(truth) != len(predicted):
        raise DataError(f"{len(truth)} true labels but {len(predicted)} predicted ones; both need one per row")
    for what, labels, lowest in (("true", truth, 0), ("predicted", predicted, OTHER)):
        bad = np.flatnonzero(~((labels >= lowest) & (labels < len(classes)) & (labels == np.floor(labels))))
        if len(bad):
            seen = sorted({str(value) for value in labels[bad]})[:5]
            raise DataError(
                f"{what} class missing or unknown in {name_rows(bad, ids)}: {', '.join(seen)} is no number of "
                f"{', '.join(classes)}; label these rows or leave them out"
            )
    only = np.unique(truth)
    if len(only) == 1:
        rows = name_rows(np.arange(len(truth)), ids)
        raise DataError(f"every true label is '{classes[int(only[0])]}' in {rows}; scores need at least two classes")


def pool(runs: list[Predictions], classes: Sequence[str]) -> Predictions:
    """Join the folds of one seed after checking them.

    Raises:
        DataError: as `check_labels`; also when an utterance is tested twice.
    """
    ids = [name for run in runs for name in (run.ids or [f"{run.split or 'row'} {row}" for row in range(np.size(run.truth))])]
    speakers = [name for run in runs for name in (run.speakers or [""] * np.size(run.truth))]
    truth = np.concatenate([np.asarray(run.truth).ravel() for run in runs])
    predicted = np.concatenate([np.asarray(run.predicted).ravel() for run in runs])
    check_labels(truth, predicted, classes, ids)
    if len(speakers) != len(truth) or len(ids) != len(truth):
        raise DataError(f"{len(truth)} labels but {len(speakers)} speakers and {len(ids)} ids; give one of each per row")
    _, first = np.unique(np.asarray(ids, str), return_index=True)
    if len(first) != len(ids):
        again = np.setdiff1d(np.arange(len(ids)), first)
        raise DataError(f"{name_rows(again, ids)} tested twice under seed {runs[0].seed}; give repeated folds their own seed")
    return Predictions(truth.astype(np.int64), predicted.astype(np.int64), ids, speakers, "", runs[0].seed)


def choose_unit(runs: list[Predictions], unit: Literal["auto"] | Unit) -> tuple[Unit, list[str]]:
    """Decide what the bootstrap draws, and say in words what that leaves out.

    Raises:
        DataError: `speaker` was asked for, and speakers are unknown or there is only one.
    """
    names = {name for run in runs for name in run.speakers}
    nameless = [(run, np.flatnonzero([not name for name in run.speakers])) for run in runs]
    unknown = next(((run, rows) for run, rows in nameless if len(rows)), None)
    if unit == "speaker" and unknown is not None:
        raise DataError(f"speaker unknown in {name_rows(unknown[1], unknown[0].ids)}; name the speakers or use unit=utterance")
    if unit == "speaker" and len(names) == 1:
        raise DataError(f"all rows are by speaker {names.pop()}; an interval over speakers needs two or more, use unit=utterance")
    if unit == "utterance" or unknown is not None or len(names) == 1:
        reason = "by choice" if unit == "utterance" else "one speaker only" if unknown is None else "speakers unknown"
        return "utterance", [f"interval over utterances ({reason}): it says nothing about other speakers"]
    few = f"; with only {len(names)} speakers it is likely too narrow" if len(names) < FEW_SPEAKERS else ""
    return "speaker", [f"interval over speakers{few}"]


def check_paired(first: list[Predictions], second: list[Predictions]) -> None:
    """Refuse two systems that were not tested on the same rows with the same truth.

    Raises:
        DataError: names the runs or rows.
    """
    runs = [{(run.split, run.seed): run for run in runs} for runs in (first, second)]
    for one, other, which in ((runs[0], runs[1], "second"), (runs[1], runs[0], "first")):
        for split, seed in one:
            if (split, seed) not in other:
                raise DataError(f"split '{split}', seed {seed}: missing from the {which} system; both need the same runs")
    for key, run in runs[0].items():
        truth = [dict(zip(side.ids or range(np.size(side.truth)), np.asarray(side.truth).ravel().tolist(), strict=True)) for side in (run, runs[1][key])]
        apart = [str(row) for row in {**truth[0], **truth[1]} if truth[0].get(row) != truth[1].get(row)]
        if apart:
            rows = name_rows(np.arange(len(apart)), apart)
            raise DataError(f"split '{key[0]}', seed {key[1]}: {rows} tested or labelled differently by the two systems")
