from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from emoscale.evaluation.predictions import Predictions
from emoscale.training.finetune_outcomes import Outcome, Outcomes, folder_name

MADE_FROM = {"steps": 3, "files": ["ab"]}


def outcome(arm: str = "a b", seed: int = 2, fold: str = "1") -> Outcome:
    told = Predictions(np.array([0, 2]), np.array([1, 2]), ["x#0", "x#1"], ["anna", ""], fold, seed)
    return Outcome(arm, seed, fold, 40, 0.5, 0.25, told, np.array([[0.1, 0.7, 0.2], [1 / 3, 1 / 3, 1 / 3]], np.float32), 32)


def test_an_outcome_comes_back_as_it_was(tmp_path: Path) -> None:
    kept, mine = Outcomes(tmp_path / "outcomes"), outcome()
    kept.keep(mine, MADE_FROM)
    found = kept.find("a b", 2, "1", MADE_FROM)
    assert found is not None
    for name in ("arm", "seed", "fold", "step", "validation", "test", "labelled"):
        assert getattr(found, name) == getattr(mine, name)
    np.testing.assert_array_equal(found.probabilities, mine.probabilities)
    assert found.probabilities.dtype == np.float32
    for name in ("ids", "speakers", "split", "seed"):
        assert getattr(found.predictions, name) == getattr(mine.predictions, name)
    np.testing.assert_array_equal(found.predictions.truth, mine.predictions.truth)
    np.testing.assert_array_equal(found.predictions.predicted, mine.predictions.predicted)


@pytest.mark.parametrize("other", [{"steps": 4, "files": ["ab"]}, {"steps": 3, "files": ["ac"]}, {}])
def test_what_was_made_from_something_else_is_not_found(other: dict[str, object], tmp_path: Path) -> None:
    kept = Outcomes(tmp_path)
    kept.keep(outcome(), MADE_FROM)
    assert kept.find("a b", 2, "1", other) is None
    assert kept.find("a b", 2, "1", dict(reversed(MADE_FROM.items()))) is not None, "the order of keys says nothing"


def test_runs_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    kept = Outcomes(tmp_path)
    for arm, seed, fold in [("a b", 2, "1"), ("a b", 1, "1"), ("a b", 2, "12"), ("c", 2, "1")]:
        assert kept.find(arm, seed, fold, MADE_FROM) is None
        kept.keep(outcome(arm, seed, fold), MADE_FROM)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_kill_leaves_no_half_outcome(tmp_path: Path) -> None:
    kept = Outcomes(tmp_path)
    kept.keep(outcome(), MADE_FROM)
    (tmp_path / ".a_b-seed2-fold1.json.writing").write_text("{")
    assert kept.find("a b", 2, "1", MADE_FROM) is not None
    assert all(json.loads(path.read_text()) for path in tmp_path.glob("*.json"))


@pytest.mark.parametrize(("name", "folder"), [("finetune, face", "finetune_face"), ("../x", "_x"), ("..", "_"), ("lora-8", "lora-8")])
def test_names_become_safe_files(name: str, folder: str) -> None:
    assert folder_name(name) == folder
