"""Corpora that grow under a run: what is compared, how utterances stay numbered, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from emoscale.config import DataError
from emoscale.data.growth import Stage, joined, sequence, stages_of
from emoscale.data.streams import Corpus, Selected
from emoscale.data.synthetic import Synthetic
from tests.corpora import add_to_corpus, write_corpus

SHAPE = {"visual_width": 6, "acoustic_width": 5, "expressions": 3}


def corpus(folder: Path, count: int, seed: int = 0) -> Corpus:
    return Corpus(write_corpus(folder, Synthetic(count, seed=seed, **SHAPE)))


def grown(folder: Path, count: int, seed: int = 0) -> Corpus:
    add_to_corpus(folder, Synthetic(count, seed=seed, **SHAPE))
    return Corpus(folder)


def test_a_corpus_that_is_as_it_was_adds_no_stage(tmp_path: Path) -> None:
    opened = [corpus(tmp_path / "a", 20)]
    first = stages_of([], opened, 0)
    assert [(stage.place, stage.counts) for stage in first] == [(0, [20])]
    assert stages_of([stage.record() for stage in first], opened, 64) == first


def test_what_is_added_stands_behind_what_was_known(tmp_path: Path) -> None:
    a, b = corpus(tmp_path / "a", 20), corpus(tmp_path / "b", 10, seed=1)
    stages = stages_of([], [a, b], 0)
    before = joined([a, b], stages)
    known = [before[number].text for number in range(30)]
    a = grown(tmp_path / "a", 26)
    stages = stages_of([stage.record() for stage in stages], [a, b], 35)
    assert [(stage.place, stage.counts) for stage in stages] == [(0, [20, 10]), (35, [26, 10])]
    whole = joined([a, b], stages)
    assert len(whole) == 36
    assert [whole[number].text for number in range(30)] == known
    assert [whole[number].text for number in range(30, 36)] == [a[number].text for number in range(20, 26)]
    order = sequence([a, b], stages, 7)
    assert sorted(order.at(place)[1] for place in range(30, 60)) == list(range(30)), "the pass in which it was noticed"
    assert sorted(order.at(place)[1] for place in range(60, 96)) == list(range(36))


def test_a_selection_grows_with_its_corpus(tmp_path: Path) -> None:
    opened = corpus(tmp_path / "a", 25)
    stages = stages_of([], [opened], 0)
    opened = grown(tmp_path / "a", 45)
    stages = stages_of([stage.record() for stage in stages], [opened], 10)
    part = Selected(opened, without=("synthetic#00000", "synthetic#00003"))
    assert [part.within(stage.counts[0]) for stage in stages] == [15, 25]
    order = sequence([part], stages, 7)
    assert sorted(order.at(place)[1] for place in range(15)) == list(range(15))
    assert sorted(order.at(place)[1] for place in range(15, 40)) == list(range(25))


def test_weighted_corpora_are_numbered_through(tmp_path: Path) -> None:
    a, b = corpus(tmp_path / "a", 20), corpus(tmp_path / "b", 10, seed=1)
    stages = stages_of([], [a, b], 0)
    a = grown(tmp_path / "a", 26)
    stages = stages_of([stage.record() for stage in stages], [a, b], 35)
    whole, order = joined([a, b], stages), sequence([a, b], stages, 7, weights=[1, 3])
    names = {whole[order.at(place)[1]].text for place in range(500)}
    assert names == {source[number].text for source in (a, b) for number in range(len(source))}


def test_another_or_a_shrunken_corpus_is_refused(tmp_path: Path) -> None:
    opened = corpus(tmp_path / "a", 20)
    known = [stage.record() for stage in stages_of([], [opened], 0)]
    for other in (corpus(tmp_path / "b", 20, seed=1), corpus(tmp_path / "c", 12)):
        with pytest.raises(DataError, match=rf"{other.name}: its first 20 utterances are not those .* 20 → {len(other)}"):
            stages_of(known, [other], 5)
    with pytest.raises(DataError, match=r"began with 1 corpora, data\.corpora names 2"):
        stages_of(known, [opened, opened], 5)
    with pytest.raises(DataError, match="2 weights for 1 corpora"):
        sequence([opened], [Stage(**known[0])], 0, weights=[1, 2])
