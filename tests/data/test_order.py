"""The training sequence: passes, blocks, growth and mixtures, each a pure function of the place."""

from __future__ import annotations

from collections import Counter

import pytest

from emoscale.config import DataError
from emoscale.data.order import CYCLE, Mixture, Order


@pytest.mark.parametrize("count", [1, 2, 5, 12, 100])
@pytest.mark.parametrize("block", [1, 3, 4, 1 << 16])
def test_every_pass_takes_every_utterance_once(count: int, block: int) -> None:
    order = Order(count, 3, block)
    passes = []
    for turn in range(3):
        places = [order.at(place) for place in range(turn * count, (turn + 1) * count)]
        assert {found for found, _ in places} == {turn}
        passes.append([number for _, number in places])
        assert sorted(passes[-1]) == list(range(count))
    if count >= 12:
        assert passes[0] != passes[1] != passes[2]
        assert passes[0] != sorted(passes[0])
        assert [Order(count, 4, block).at(i)[1] for i in range(count)] != passes[0]
    assert [Order(count, 3, block).at(i)[1] for i in range(count)] == passes[0]


def test_places_are_read_in_any_order_and_blocks_stay_together() -> None:
    order = Order(100, 0, 8)
    assert [order.at(i) for i in (250, 3, 99, 0)] == [Order(100, 0, 8).at(i) for i in (250, 3, 99, 0)]
    blocks = [order.at(place)[1] // 8 for place in range(100)]
    changes = sum(a != b for a, b in zip(blocks, blocks[1:], strict=False))
    assert changes == 12, "13 blocks, each read to its end"


def test_an_empty_corpus_is_refused() -> None:
    with pytest.raises(DataError, match="holds no utterance"):
        Order(0, 0)


@pytest.mark.parametrize("place", [0, 1, 9, 10, 11, 19, 25])
def test_a_pass_in_progress_ends_without_what_came_meanwhile(place: int) -> None:
    before, order = Order(10, 3, 4), Order(10, 3, 4, [(place, 14)])
    end = -(-place // 10) * 10
    assert [order.at(i) for i in range(end)] == [before.at(i) for i in range(end)]
    for turn in range(3):
        found = [order.at(end + turn * 14 + i) for i in range(14)]
        assert {number for _, number in found} == set(range(14))
        assert {which for which, _ in found} == {end // 10 + turn}, "passes go on counting: masks are drawn from their number"


def test_a_corpus_may_grow_twice_also_within_one_pass() -> None:
    order = Order(10, 3, 4, [(12, 14), (15, 20), (45, 25)])
    assert sorted(order.at(i)[1] for i in range(10, 20)) == list(range(10))
    assert sorted(order.at(i)[1] for i in range(20, 40)) == list(range(20))
    assert sorted(order.at(i)[1] for i in range(40, 60)) == list(range(20))
    assert sorted(order.at(i)[1] for i in range(60, 85)) == list(range(25))
    assert [order.at(i)[0] for i in (19, 20, 40, 60)] == [1, 2, 3, 4]


def mixture(*, grown: list[tuple[int, list[int]]] | None = None, weights: tuple[float, ...] = (3, 1)) -> Mixture:
    return Mixture([50, 7], list(weights), 5, lambda part, within: 1000 * part + within, 16, grown or [])


def test_a_mixture_keeps_its_proportions_and_its_passes() -> None:
    mixed = mixture()
    places = [mixed.at(place) for place in range(2 * CYCLE)]
    owners = [number // 1000 for _, number in places]
    assert Counter(owners[:CYCLE]) == {0: CYCLE * 3 // 4, 1: CYCLE // 4}
    assert owners[:CYCLE] != owners[CYCLE:]
    assert 0 < sum(owners[:40]) < 40, "drawn together, not one after the other"
    for part, count in ((0, 50), (1, 7)):
        own = [(turn, number - 1000 * part) for turn, number in places if number // 1000 == part]
        for turn in range(len(own) // count):
            assert sorted(own[turn * count : (turn + 1) * count]) == [(turn, number) for number in range(count)]
    assert [mixed.at(place) for place in (5000, 3, 4096)] == [mixture().at(place) for place in (5000, 3, 4096)]


@pytest.mark.parametrize("weights", [(1.0, 1e-9), (1, 1), (0.3, 0.7), (2, 5)])
def test_every_stream_of_a_mixture_is_drawn(weights: tuple[float, float]) -> None:
    owners = Counter(mixture(weights=weights).at(place)[1] // 1000 for place in range(CYCLE))
    for part in (0, 1):
        assert abs(owners[part] - max(1, weights[part] / sum(weights) * CYCLE)) < 1.5


def test_each_stream_of_a_mixture_ends_its_own_pass_before_it_grows() -> None:
    place = 30
    before, after = mixture(), mixture(grown=[(place, [50, 9])])
    own = lambda order: [found for i in range(200) if (found := order.at(i))[1] >= 1000]  # noqa: E731
    seen = sum(before.at(i)[1] >= 1000 for i in range(place))
    end = -(-seen // 7) * 7
    assert own(before)[:end] == own(after)[:end]
    assert {number - 1000 for _, number in own(after)[end : end + 9]} == set(range(9))
    first = lambda order: [found for i in range(200) if (found := order.at(i))[1] < 1000]  # noqa: E731
    assert first(before) == first(after)
