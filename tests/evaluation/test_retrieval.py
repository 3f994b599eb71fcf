"""R_k@m by hand, with ties and holes; five candidates are never harder than eleven."""

from __future__ import annotations

import numpy as np
import pytest

from emoscale.config import DataError
from emoscale.evaluation.retrieval import among_all, places, recalls


def test_by_hand() -> None:
    scores = [
        [3.0, 1, 2, 0, 0, 9, 9, 0, 0, 0, 0],  # first of 5, third of 11
        [1.0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # second of both
        [0.0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
    ]
    assert places(scores, 5).tolist() == [0, 1, 4]
    assert places(scores, 11).tolist() == [2, 1, 10]
    assert recalls(scores) == {"R_5@1": pytest.approx(1 / 3), "R_5@2": pytest.approx(2 / 3), "R_11@1": 0.0, "R_11@2": pytest.approx(1 / 3)}


def test_a_tie_is_not_a_find_and_neither_is_nan() -> None:
    assert recalls(np.zeros((4, 11))) == dict.fromkeys(("R_5@1", "R_5@2", "R_11@1", "R_11@2"), 0.0)
    assert places([[1.0, 1.0, 0.0]], 3).tolist() == [1]
    assert places([[np.nan, 0.0, 0.0]], 3).tolist() == [3]
    assert places([[1.0, np.nan, 0.0]], 3).tolist() == [1]


@pytest.mark.parametrize("seed", range(5))
def test_five_candidates_are_never_harder_than_eleven(seed: int) -> None:
    draw = np.random.default_rng(seed)
    found = recalls(draw.integers(0, 4, (200, 11)) + (draw.random((200, 11)) > 0.5))
    assert found["R_5@1"] >= found["R_11@1"]
    assert found["R_5@2"] >= found["R_11@2"]
    assert found["R_5@2"] >= found["R_5@1"]


def test_chance() -> None:
    found = recalls(np.random.default_rng(0).random((20_000, 11)))
    assert found["R_11@1"] == pytest.approx(1 / 11, abs=0.01)
    assert found["R_5@2"] == pytest.approx(2 / 5, abs=0.01)


@pytest.mark.parametrize("scores", [np.zeros((0, 11)), np.zeros((3, 4)), np.zeros(11)])
def test_too_little_is_an_error(scores: np.ndarray) -> None:
    with pytest.raises(DataError, match="candidates"):
        places(scores, 5)


def test_among_all_candidates() -> None:
    assert among_all([[3.0, 1, 0], [2.0, 1, 1], [0.0, 0, 0]]).tolist() == [0, 2, 2]
    assert among_all([[0.0, np.nan], [1.0, np.nan]]).tolist() == [1, 2]
    for wrong in (np.zeros((2, 3)), np.zeros((1, 1)), np.zeros(3)):
        with pytest.raises(DataError, match="scores of shape"):
            among_all(wrong)
