"""Scores agree with scikit-learn, intervals with scipy, and bad labels are refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from emoscale.config import DataError
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


def test_interval_over_utterances_agrees_with_scipy() -> None:
    truth, predicted = _labels(120, 3)
    found = score(truth, predicted, CLASSES, resamples=8000).intervals
    for name, metric in (("wa", sk.accuracy_score), ("uar", sk.balanced_accuracy_score)):
        expected = stats.bootstrap(
            (truth, predicted), metric, paired=True, vectorized=False, n_resamples=1500, method="percentile", rng=1
        ).confidence_interval
        assert (found[name].low, found[name].high) == pytest.approx(expected, abs=0.012)
        assert found[name].unit == "utterance"
        assert found[name].units == 120


def test_interval_over_speakers_agrees_with_plain_resampling() -> None:
    truth, predicted = _labels(90, 4)
    speakers = [f"s{row % 12}" for row in range(90)]
    found = score(truth, predicted, CLASSES, speakers=speakers, resamples=6000).intervals["uar"]
    generator, rows = np.random.default_rng(9), [np.flatnonzero(np.arange(90) % 12 == s) for s in range(12)]
    drawn = []
    for _ in range(2000):
        chosen = np.concatenate([rows[s] for s in generator.integers(0, 12, 12)])
        drawn.append(sk.balanced_accuracy_score(truth[chosen], predicted[chosen]))
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.015)
    assert (found.unit, found.units) == ("speaker", 12)


def test_dependent_rows_widen_the_interval() -> None:
    """Every speaker is wholly right or wholly wrong: 20 independent facts, not 400."""
    truth = np.tile([0, 1], 200)
    speakers = [f"s{row // 20}" for row in range(400)]
    predicted = np.where((np.arange(400) // 20) % 2 == 0, truth, 1 - truth)
    by_speaker = score(truth, predicted, CLASSES[:2], speakers=speakers).intervals["wa"]
    by_utterance = score(truth, predicted, CLASSES[:2], speakers=speakers, unit="utterance").intervals["wa"]
    assert by_speaker.high - by_speaker.low > 3 * (by_utterance.high - by_utterance.low)


def test_interval_covers_the_true_accuracy() -> None:
    covered = 0
    for seed in range(120):
        generator = np.random.default_rng(seed)
        truth = generator.integers(0, 2, 150)
        predicted = np.where(generator.random(150) < 0.7, truth, 1 - truth)
        interval = score(truth, predicted, CLASSES[:2], resamples=400, seed=seed).intervals["wa"]
        covered += interval.low <= 0.7 <= interval.high
    assert 0.88 <= covered / 120 <= 1.0


def test_same_seed_same_interval() -> None:
    truth, predicted = _labels(80, 5)
    first, again, other = (score(truth, predicted, CLASSES, seed=seed).intervals for seed in (1, 1, 2))
    assert first == again
    assert first != other


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
    turned = [
        Predictions(run.truth[::-1], run.predicted[::-1], run.ids[::-1], run.speakers[::-1], seed=run.seed)
        for run in second
    ]
    assert paired_difference(first, turned, CLASSES, unit="utterance") == paired_difference(
        first, second, CLASSES, unit="utterance"
    )


def test_unpaired_systems_are_refused() -> None:
    first, second = _systems(0.05)
    with pytest.raises(DataError, match="seed 2: missing from the second"):
        paired_difference(first, second[:2], CLASSES)
    other = np.array(second[0].truth)
    other[7] = (other[7] + 1) % 4
    second[0] = Predictions(other, second[0].predicted, second[0].ids, second[0].speakers)
    with pytest.raises(DataError, match=r"1 row \(u7\)"):
        paired_difference(first, second, CLASSES)


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
