"""Labels, speakers and pairs that no score can be taken from are refused by name."""

from __future__ import annotations

import numpy as np
import pytest

from emoscale.config import DataError
from emoscale.evaluation.metrics import paired_difference, score, score_runs
from emoscale.evaluation.predictions import Predictions

CLASSES = ["anger", "happy", "neutral", "sad"]


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [
        ([0, 1, -1], [0, 1, 1], r"true class missing or unknown in 1 row \(c\)"),
        ([0, 1, 4], [0, 1, 1], r"true class missing or unknown in 1 row \(c\): 4"),
        ([0.0, 1.0, float("nan")], [0, 1, 1], r"true class missing or unknown in 1 row \(c\): nan"),
        ([0, 1, 1], [0, 9, 1], r"predicted class missing or unknown in 1 row \(b\)"),
        ([1, 1, 1], [0, 1, 1], r"every true label is 'happy' in 3 rows \(a, b, c\)"),
        ([], [], "no labelled rows"),
        ([0, 1, 1], [0, 1], "3 true labels but 2 predicted"),
    ],
)
def test_unusable_labels_are_refused_by_name(truth: list[float], predicted: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        score(truth, predicted, CLASSES, ids=["a", "b", "c"][: len(truth)])


def test_utterance_tested_twice_is_refused() -> None:
    runs = [Predictions([0, 1], [0, 1], ["a", "b"], split="1"), Predictions([0, 1], [0, 1], ["b", "c"], split="2")]
    with pytest.raises(DataError, match=r"1 row \(b\) tested twice under seed 0"):
        score_runs(runs, CLASSES)


def test_unknown_speakers() -> None:
    truth, predicted, speakers = [0, 1, 0, 1], [0, 1, 1, 1], ["s1", "", "s2", "s2"]
    with pytest.raises(DataError, match=r"speaker unknown in 1 row \(row 1\)"):
        score(truth, predicted, CLASSES, speakers=speakers, unit="speaker")
    found = score(truth, predicted, CLASSES, speakers=speakers)
    assert found.intervals["wa"].unit == "utterance"
    assert "speakers unknown" in found.notes[0]
    few = score(truth, predicted, CLASSES, speakers=["s1", "s1", "s2", "s2"])
    assert "too narrow" in few.notes[0]


def test_unpaired_systems_are_refused() -> None:
    truth, ids = np.arange(20) % 4, [f"u{row}" for row in range(20)]
    first = [Predictions(truth, truth, ids, seed=seed) for seed in range(3)]
    with pytest.raises(DataError, match="seed 2: missing from the second"):
        paired_difference(first, first[:2], CLASSES)
    with pytest.raises(DataError, match="seed 2: missing from the first"):
        paired_difference(first[:2], first, CLASSES)
    other = truth.copy()
    other[7] = (other[7] + 1) % 4
    with pytest.raises(DataError, match=r"1 row \(u7\)"):
        paired_difference(first, [Predictions(other, truth, ids), *first[1:]], CLASSES)
