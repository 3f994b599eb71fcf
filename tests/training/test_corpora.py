"""What a configuration reads: selections, weights, growth, storage; and what it refuses."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from emoscale.config import ConfigError, DataError
from emoscale.data.remote import RemoteCorpus
from emoscale.data.streams import Corpus
from emoscale.data.synthetic import Synthetic
from emoscale.training.corpora import DataConfig, folders_of, open_all, open_corpora
from tests.corpora import add_to_corpus, write_corpus

SHAPE = {"visual_width": 6, "acoustic_width": 5, "expressions": 3}


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    return [str(write_corpus(tmp_path / name, Synthetic(count, seed=count, **SHAPE))) for name, count in (("large", 30), ("small", 10))]


def config(**given: object) -> DataConfig:
    made = DataConfig(**given)  # type: ignore[arg-type]  # the tests' own values
    made.validate()
    return made


def test_without_weights_each_utterance_comes_once_a_pass(two: list[str]) -> None:
    opened = open_corpora(config(corpora=two), 1)
    assert sorted(opened.order.at(place)[1] for place in range(40)) == list(range(40))


def test_weights_draw_a_small_corpus_more_often(two: list[str]) -> None:
    opened = open_corpora(config(corpora=two, weights=[1.0, 1.0], block=8), 1)
    drawn = Counter("large" if opened.order.at(place)[1] < 30 else "small" for place in range(4096))
    assert drawn == {"large": 2048, "small": 2048}


def test_selections_are_made_in_each_corpus(two: list[str]) -> None:
    opened = open_corpora(config(corpora=two, only="synthetic#00000"), 1)
    assert len(opened.utterances) == 20
    assert [len(corpus) for corpus in open_all(config(corpora=two))] == [30, 10]


def test_a_grown_corpus_is_taken_up_where_the_run_stands(two: list[str]) -> None:
    first = open_corpora(config(corpora=two), 1)
    known = [stage.record() for stage in first.stages]
    add_to_corpus(Path(two[0]), Synthetic(34, seed=30, **SHAPE))
    again = open_corpora(config(corpora=two), 1, known, place=50)
    assert [again.order.at(place) for place in range(80)] == [first.order.at(place) for place in range(80)]
    assert sorted(again.order.at(place)[1] for place in range(80, 124)) == list(range(44))
    for choice in ({"fraction": 0.5}, {"shuffle_modalities": True}):
        with pytest.raises(DataError, match="would choose anew"):
            open_corpora(config(corpora=two, **choice), 1, known, place=50)


def test_what_is_made_of_utterances_grows_with_them(two: list[str]) -> None:
    known = [stage.record() for stage in open_corpora(config(corpora=two[:1]), 1).stages]
    add_to_corpus(Path(two[0]), Synthetic(36, seed=30, **SHAPE))
    again = open_corpora(config(corpora=two[:1]), 1, known, place=7)
    order = again.order_of({10: 30, 14: 36}, 1, 1 << 16)
    assert sorted(order.at(place)[1] for place in range(10)) == list(range(10))
    assert sorted(order.at(place)[1] for place in range(10, 24)) == list(range(14))
    assert again.order_of({10: 30}, 1, 1 << 16).at(25)[0] == 2


def test_a_url_is_read_through_the_cache_and_a_folder_is_not(two: list[str], tmp_path: Path) -> None:
    given = config(corpora=[f"file://{two[0]}", two[1]], cache=str(tmp_path / "cache"), cache_gb=1e-5)
    remote, local = open_all(given)
    assert isinstance(remote, RemoteCorpus)
    assert remote.limit == 10_000
    assert type(local) is Corpus
    assert [folder.parent for folder in folders_of(given)] == [tmp_path / "cache", tmp_path]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": [1.0, 0.0]}, "weights="), ({"block": 0}, "block=0"), ({"cache_gb": 0.0}, "cache_gb"), ({"fraction": 0.0}, "fraction"),
        ({"modality_dropout": {"smell": 0.5}}, "smell"),
    ],
)  # fmt: skip
def test_values_out_of_range(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(corpora=["a"], **given)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; `emoscale prepare` makes a corpus"):
        open_all(config(corpora=[str(tmp_path / "absent")]))
    with pytest.raises(ConfigError, match="empty; name at least one folder"):
        open_all(config(corpora=[]))
