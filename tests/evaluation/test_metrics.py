"""Scores agree with scikit-learn, intervals with scipy, and bad labels are refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn import metrics as sk

from emoscale.evaluation.metrics import (
    METRICS,
    OTHER,
    Predictions,
    Scores,
    confusion_matrix,
    paired_difference,
    recall_at,
    score,
    score_runs,
)

CLASSES = ["anger", "happy", "neutral", "sad"]


def _labels(rows: int, seed: int, accuracy: float = 0.6, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    truth = generator.choice(classes, rows, p=np.arange(1, classes + 1) / sum(range(classes + 1)))
    guess = generator.integers(0, classes, rows)
    return truth, np.where(generator.random(rows) < accuracy, truth, guess)


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_sklearn(seed: int) -> None:
    truth, predicted = _labels(157, seed)
    found = score(truth, predicted, CLASSES, resamples=10)
    assert found.wa == pytest.approx(sk.accuracy_score(truth, predicted))
    assert found.uar == pytest.approx(sk.balanced_accuracy_score(truth, predicted))
    assert found.wf1 == pytest.approx(sk.f1_score(truth, predicted, average="weighted"))
    assert found.mf1 == pytest.approx(sk.f1_score(truth, predicted, average="macro"))
    assert found.confusion == sk.confusion_matrix(truth, predicted, labels=range(4)).tolist()
    report = sk.classification_report(truth, predicted, target_names=CLASSES, output_dict=True)
    for name in CLASSES:
        assert found.per_class[name]["f1"] == pytest.approx(report[name]["f1-score"])
        assert found.per_class[name]["support"] == report[name]["support"]
        assert found.per_class[name]["precision"] == pytest.approx(report[name]["precision"])


def test_absent_class_counts_in_aa_only() -> None:
    found = score([0, 0, 1, 1], [0, 1, 1, 1], CLASSES[:3], resamples=10)
    assert found.uar == pytest.approx(0.75)
    assert found.aa == pytest.approx(0.5)


def test_answer_outside_the_classes_is_wrong() -> None:
    truth, predicted = [0, 0, 1, 1], [0, OTHER, 1, 1]
    found = score(truth, predicted, CLASSES[:2], resamples=10)
    assert found.wa == 0.75
    assert found.confusion == [[1, 0, 1], [0, 2, 0]]
    assert found.mf1 == pytest.approx(sk.f1_score(truth, predicted, labels=[0, 1], average="macro"))
    assert confusion_matrix(truth, predicted, 2).tolist() == found.confusion


def test_scores_survive_json() -> None:
    truth, predicted = _labels(60, 6)
    found = score(truth, predicted, CLASSES, speakers=["a", "b", "c"] * 20)
    data = json.loads(json.dumps(found.to_dict()))
    assert Scores.from_dict(data) == found
    assert set(data["definitions"]) == {"WA", "UAR", "WF1", "MF1", "AA"}


def test_folds_are_pooled_and_seeds_averaged() -> None:
    truth, predicted = _labels(100, 7)
    ids = [f"u{row}" for row in range(100)]
    halves = [
        Predictions(truth[part], predicted[part], ids[part], split=str(number), seed=seed)
        for seed in (1, 2)
        for number, part in enumerate((slice(0, 50), slice(50, 100)))
    ]
    found, whole = score_runs(halves, CLASSES), score(truth, predicted, CLASSES)
    assert found.uar == pytest.approx(whole.uar)
    assert found.utterances == 100
    assert (found.runs["seeds"], found.runs["splits"]) == (2, 2)
    folds = [sk.accuracy_score(truth[part], predicted[part]) for part in (slice(0, 50), slice(50, 100))] * 2
    assert found.runs["wa"]["mean"] == pytest.approx(np.mean(folds))
    assert found.runs["wa"]["sd"] == pytest.approx(np.std(folds, ddof=1))


def _systems(gain: float) -> tuple[list[Predictions], list[Predictions]]:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 4, 300)
    ids, speakers = [f"u{row}" for row in range(300)], [f"s{row % 25}" for row in range(300)]
    hard = generator.random(300)
    first, second = [], []
    for seed in range(3):
        wrong = (truth + generator.integers(1, 4, 300)) % 4
        first.append(Predictions(truth, np.where(hard < 0.6 + gain, truth, wrong), ids, speakers, seed=seed))
        second.append(Predictions(truth, np.where(hard < 0.6, truth, wrong), ids, speakers, seed=seed))
    return first, second


def test_paired_difference_sees_what_separate_intervals_do_not() -> None:
    first, second = _systems(0.05)
    found = paired_difference(first, second, CLASSES)
    alone = [score_runs(side, CLASSES).intervals["wa"] for side in (first, second)]
    assert alone[0].low < alone[1].high
    assert found["wa"].excludes_zero
    assert found["wa"].value == pytest.approx(alone[0].value - alone[1].value)
    assert set(found) == set(METRICS)


def test_a_system_does_not_differ_from_itself() -> None:
    first, _ = _systems(0.05)
    found = paired_difference(first, first, CLASSES)["uar"]
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert not found.excludes_zero


def test_paired_difference_matches_rows_by_id() -> None:
    first, second = _systems(0.05)
    turned = [Predictions(run.truth[::-1], run.predicted[::-1], run.ids[::-1], run.speakers[::-1], seed=run.seed) for run in second]
    assert paired_difference(first, turned, CLASSES, unit="utterance") == paired_difference(first, second, CLASSES, unit="utterance")


def test_recall_at() -> None:
    scores = [[3.0, 1, 2, 0], [1, 3, 2, 0], [0, 3, 2, 1]]
    assert recall_at(scores, k=4, m=1) == pytest.approx(1 / 3)
    assert recall_at(scores, k=4, m=3) == pytest.approx(2 / 3)
    assert recall_at(np.ones((5, 4)), k=4, m=1) == 0
    assert recall_at(np.full((5, 4), np.nan), k=4, m=1) == 0
    random = np.random.default_rng(0).normal(size=(200, 11))
    assert recall_at(random, k=5, m=1) >= recall_at(random, k=11, m=1)
    with pytest.raises(ValueError, match="at least k candidates"):
        recall_at(scores, k=11, m=1)
