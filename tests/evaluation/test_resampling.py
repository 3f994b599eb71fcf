"""Intervals agree with scipy and plain resampling, cover what they should and repeat exactly."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from emoscale.evaluation.metrics import score

pytestmark = pytest.mark.filterwarnings("ignore:y_pred contains classes")  # a resample may miss a class
CLASSES = ["anger", "happy", "neutral", "sad"]


def _labels(rows: int, seed: int, accuracy: float = 0.6, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    truth = generator.choice(classes, rows, p=np.arange(1, classes + 1) / sum(range(classes + 1)))
    guess = generator.integers(0, classes, rows)
    return truth, np.where(generator.random(rows) < accuracy, truth, guess)


def test_interval_over_utterances_agrees_with_scipy() -> None:
    truth, predicted = _labels(120, 3)
    found = score(truth, predicted, CLASSES, resamples=8000).intervals
    for name, metric in (("wa", sk.accuracy_score), ("uar", sk.balanced_accuracy_score)):
        expected = stats.bootstrap((truth, predicted), metric, paired=True, vectorized=False, n_resamples=800, method="percentile", rng=1).confidence_interval
        assert (found[name].low, found[name].high) == pytest.approx(expected, abs=0.02)
        assert found[name].unit == "utterance"
        assert found[name].units == 120


def test_interval_over_speakers_agrees_with_plain_resampling() -> None:
    truth, predicted = _labels(90, 4)
    speakers = [f"s{row % 12}" for row in range(90)]
    found = score(truth, predicted, CLASSES, speakers=speakers, resamples=6000).intervals["uar"]
    generator, rows = np.random.default_rng(9), [np.flatnonzero(np.arange(90) % 12 == s) for s in range(12)]
    drawn = []
    for _ in range(1000):
        chosen = np.concatenate([rows[s] for s in generator.integers(0, 12, 12)])
        drawn.append(sk.balanced_accuracy_score(truth[chosen], predicted[chosen]))
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)
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
