"""Folds share no speaker, protocols divide as published, fractions nest, checkpoints are chosen on validation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from emoscale.config import DataError
from emoscale.evaluation.protocols import (
    PROTOCOLS,
    Fold,
    choose_checkpoint,
    label_fraction,
    leave_one_speaker_out,
    make_folds,
    memobert_iemocap,
    memobert_msp_improv,
    official_split,
    speaker_folds,
)


def _speakers(count: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return generator.permutation(np.repeat([f"s{n:02d}" for n in range(count)], generator.integers(3, 40, count))).tolist()


def _assert_partition(folds: list[Fold], speakers: list[str]) -> None:
    who = np.asarray(speakers)
    assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(len(speakers)))
    for fold in folds:
        parts = [fold.train, fold.validation, fold.test]
        assert sum(map(len, parts)) == len(speakers)
        names = [set(who[part]) for part in parts]
        assert not names[0] & names[1]
        assert not names[0] & names[2]
        assert not names[1] & names[2]


@pytest.mark.parametrize(("count", "folds"), [(3, 3), (10, 5), (37, 5), (24, 8)])
def test_speaker_folds(count: int, folds: int) -> None:
    speakers = _speakers(count)
    found = speaker_folds(speakers, None, folds, 0)
    _assert_partition(found, speakers)
    for place, fold in enumerate(found):
        assert fold.validation.tolist() == found[(place + 1) % folds].test.tolist()
    sizes = [len(fold.test) for fold in found]
    largest = max(speakers.count(name) for name in set(speakers))
    assert max(sizes) - min(sizes) <= largest


def test_speaker_folds_depend_on_the_seed_alone() -> None:
    speakers = [f"s{row % 20}" for row in range(200)]
    tests = [[fold.test.tolist() for fold in speaker_folds(speakers, None, 5, seed)] for seed in (1, 1, 2)]
    assert tests[0] == tests[1]
    assert tests[0] != tests[2]


def test_groups_stay_together() -> None:
    speakers = [f"s{row % 12}" for row in range(120)]
    sessions = [f"d{(row % 12) // 2}" if row % 5 else "" for row in range(120)]
    found = speaker_folds(speakers, sessions, 3, 0)
    _assert_partition(found, speakers)
    for fold in found:
        inside, outside = ({sessions[row] for row in rows} - {""} for rows in (fold.test, [*fold.train, *fold.validation]))
        assert not inside & outside
    with pytest.raises(DataError, match=r"6 separable speakers .* for 7 folds"):
        speaker_folds(speakers, sessions, 7, 0)


def test_bad_speaker_columns_are_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"speaker unknown in 2 rows \(u1, u3\)"):
        speaker_folds(["a", "", "b", ""], None, 3, 0, ids=["u0", "u1", "u2", "u3"])
    with pytest.raises(DataError, match="2 separable speakers for 3 folds"):
        speaker_folds(["a", "b", "a"], None, 3, 0)
    with pytest.raises(ValueError, match="folds: 2"):
        speaker_folds(["a", "b", "c"], None, 2, 0)
    with pytest.raises(DataError, match="there are none"):
        speaker_folds([], None, 3, 0)


def test_overlapping_fold_names_speakers_and_rows() -> None:
    fold = Fold("2", np.array([0, 1]), np.array([2]), np.array([3]))
    with pytest.raises(DataError, match=r"fold 2: train and test share speaker b in 2 rows \(u1, u3\)"):
        fold.check(["a", "b", "c", "b"], ["u0", "u1", "u2", "u3"])
    with pytest.raises(DataError, match=r"1 row \(row 1\) in both train and test"):
        Fold("2", np.array([0, 1]), np.array([2]), np.array([1])).check(["a", "b", "c"])
    with pytest.raises(DataError, match="the validation part is empty"):
        Fold("2", np.array([0, 1]), np.array([], int), np.array([2])).check(["a", "b", "c"])


def test_leave_one_speaker_out() -> None:
    speakers = _speakers(6)
    found = leave_one_speaker_out(speakers)
    _assert_partition(found, speakers)
    assert [fold.name for fold in found] == sorted(set(speakers))
    assert all({speakers[row] for row in fold.test} == {fold.name} for fold in found)
    with pytest.raises(DataError, match="three or more"):
        leave_one_speaker_out(["a", "b"])


def test_official_split() -> None:
    splits, speakers = ["train", "dev", "test", "TRN"], ["a", "b", "c", "d"]
    fold = official_split(splits, speakers)
    assert (fold.train.tolist(), fold.validation.tolist(), fold.test.tolist()) == ([0, 3], [1], [2])
    with pytest.raises(DataError, match=r"split 'tset' in 1 row \(row 2\)"):
        official_split(["train", "dev", "tset"])
    with pytest.raises(DataError, match="the test part is empty"):
        official_split(["train", "dev"], ["a", "b"])


def test_official_split_that_shares_speakers() -> None:
    splits, speakers = ["train", "dev", "test"], ["Joey", "Ross", "Joey"]
    with pytest.raises(DataError, match="train and test share speaker Joey"):
        official_split(splits, speakers)
    assert "shares speaker Joey" in official_split(splits, speakers, shared_speakers=True).note
    assert "not checked" in official_split(splits).note


@pytest.mark.parametrize(("rule", "count"), [(memobert_iemocap, 5), (memobert_msp_improv, 6)])
def test_memobert_folds(rule: object, count: int) -> None:
    speakers = [f"{gender}{session:02d}" for session in range(1, count + 1) for gender in "FM" for _ in range(4)]
    sessions = [name[1:] for name in speakers]
    found = rule(speakers, sessions)
    assert len(found) == 2 * count
    _assert_partition(found, speakers)
    for number, fold in enumerate(found, 1):
        test, validation = ({speakers[row] for row in part} for part in (fold.test, fold.validation))
        session = f"{(number + 1) // 2:02d}"
        assert test | validation == {f"F{session}", f"M{session}"}
        assert session not in {sessions[row] for row in fold.train}
        assert len({speakers[row] for row in fold.train}) == 2 * count - 2


def test_memobert_msp_improv_numbers_folds_as_its_code_does() -> None:
    speakers = [f"{gender}{session:02d}" for session in range(1, 7) for gender in "MF"]
    found = memobert_msp_improv(speakers, [name[1:] for name in speakers])
    assert (speakers[found[0].validation[0]], speakers[found[0].test[0]]) == ("M01", "F01")
    assert (speakers[found[11].validation[0]], speakers[found[11].test[0]]) == ("F06", "M06")


def test_memobert_folds_refuse_other_corpora() -> None:
    with pytest.raises(DataError, match=r"2 sessions .* needs 5"):
        memobert_iemocap(["a", "b"], ["1", "2"])
    speakers, sessions = [f"s{row}" for row in range(10)], [str(row // 2) for row in range(10)]
    sessions[1] = "1"
    with pytest.raises(DataError, match=r"session 0 has 1 speakers \(s0\) in 1 row"):
        memobert_iemocap(speakers, sessions)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_make_folds(protocol: str) -> None:
    count = 6 if protocol == "memobert_msp_improv" else 5
    speakers = [f"{gender}{session}" for session in range(count) for gender in "FM" for _ in range(3)]
    sessions = [name[1:] for name in speakers]
    splits = ["train"] * 18 + ["dev"] * 6 + ["test"] * (len(speakers) - 24)
    for fold in make_folds(protocol, speakers, sessions=sessions, splits=splits, folds=4):
        fold.check(speakers)
    if protocol.startswith(("memobert", "official")):
        with pytest.raises(DataError, match="needs the"):
            make_folds(protocol, speakers)


def test_label_fraction_nests_and_keeps_every_class() -> None:
    generator = np.random.default_rng(3)
    labels = generator.choice(4, 500, p=[0.6, 0.3, 0.09, 0.01])
    indices = np.flatnonzero(generator.random(500) < 0.8)
    present = set(labels[indices])
    kept = [set(label_fraction(indices, labels, fraction, 7).tolist()) for fraction in (0.001, 0.1, 0.25, 0.5, 1.0)]
    for small, large in itertools.pairwise(kept):
        assert small < large
    assert all({labels[row] for row in rows} == present for rows in kept)
    assert kept[-1] == set(indices.tolist())
    assert len(kept[1]) == pytest.approx(0.1 * len(indices), abs=2)
    assert label_fraction(indices[::-1], labels, 0.1, 7).tolist() == sorted(kept[1])
    assert label_fraction(indices, labels, 0.1, 8).tolist() != sorted(kept[1])


@pytest.mark.parametrize("fraction", [0.0, 1.5, float("nan")])
def test_label_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        label_fraction([0, 1], [0, 1], fraction, 0)


def test_checkpoint_is_chosen_on_validation() -> None:
    validation, test = {100: 0.5, 200: 0.7, 300: 0.7, 400: float("nan")}, {100: 0.9, 200: 0.6, 300: 0.8, 400: 0.1}
    chosen = choose_checkpoint(validation, test=test)
    assert (chosen.step, chosen.score, chosen.flag) == (200, 0.7, None)
    paper = choose_checkpoint(validation, rule="paper", test=test)
    assert (paper.step, paper.score) == (100, 0.9)
    assert "upper bound" in paper.flag
    with pytest.raises(DataError, match="finite test score"):
        choose_checkpoint(validation, rule="paper")
