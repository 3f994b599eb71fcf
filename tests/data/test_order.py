"""The training sequence: passes, blocks, growth and mixtures, each a pure function of the place."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from itertools import pairwise

import pytest

from emoscale.config import DataError
from emoscale.data.order import CYCLE, Mixture, Order, held_at


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


CUTS = [0, 7, 8, 20, 33, 34, 50, 71, 90]


@pytest.mark.parametrize("block", [1, 9, 30, 1000])
@pytest.mark.parametrize("count", [1, 8, 60, 100])
def test_every_pass_over_shuffled_shards_takes_every_utterance_once(count: int, block: int) -> None:
    order = Order(count, 3, block, cuts=CUTS)
    shards = len([cut for cut in CUTS if cut < count])
    passes = []
    for turn in range(3):
        places = [order.at(place) for place in range(turn * count, (turn + 1) * count)]
        assert {found for found, _ in places} == {turn}
        passes.append([number for _, number in places])
        assert sorted(passes[-1]) == list(range(count))
        # A shard is read in one stretch of places that is about a block long.
        for begins, ends in pairwise([*CUTS[:shards], count]):
            own = [place for place, number in enumerate(passes[-1]) if begins <= number < ends]
            assert own[-1] - own[0] < block + max(b - a for a, b in pairwise([*CUTS, 100]))
    if shards > 3 and block < 100:
        company = [{frozenset(bisect_right(CUTS, number) for number in found[at : at + 5]) for at in range(0, count, 5)} for found in passes]
        assert company[0] != company[1], "other shards meet in every pass"
    assert [Order(count, 3, block, cuts=CUTS).at(place)[1] for place in (count - 1, 0)] == [passes[0][-1], passes[0][0]], (
        "a place depends on nothing that was read before"
    )
    assert count < 60 or [Order(count, 4, block, cuts=CUTS).at(place)[1] for place in range(count)] != passes[0]


@pytest.mark.parametrize("cuts", [[], CUTS])
@pytest.mark.parametrize("block", [1, 9, 30, 1000])
def test_what_is_read_now_and_next_is_told(cuts: list[int], block: int) -> None:
    order, place = Order(100, 3, block, cuts=cuts), 0
    for _ in range(8):
        end, now, soon = order.reading(place)
        for at in {place, (place + end) // 2, end - 1}:
            assert order.reading(at) == (end, now, soon)
        assert sorted(order.at(at)[1] for at in range(place, end)) == sorted(number for first, last in now for number in range(first, last))
        assert order.reading(end)[1] == soon
        place = end


@pytest.mark.parametrize("place", [0, 9, 10, 25])
def test_a_pass_over_shuffled_shards_ends_as_it_began_though_shards_are_added(place: int) -> None:
    before, order = Order(10, 3, 4, cuts=[0, 3, 5]), Order(10, 3, 4, [(place, 14)], cuts=[0, 3, 5, 10, 12])
    end = -(-place // 10) * 10
    assert [order.at(i) for i in range(end)] == [before.at(i) for i in range(end)]
    for turn in range(3):
        assert {order.at(end + turn * 14 + i)[1] for i in range(14)} == set(range(14))


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


def test_what_is_made_of_utterances_is_counted_by_stage() -> None:
    assert held_at([2, 5, 8, 11], [6, 10, 12]) == {2: 6, 3: 10, 4: 12}
    assert held_at([2, 5], [6, 10, 12]) == {2: 6}, "where nothing came, nothing changes"


def test_a_mixture_of_shuffled_shards_keeps_its_passes_and_tells_what_it_reads() -> None:
    cuts = [[0, 10, 30], [0, 3]]
    mixed = Mixture([50, 7], [3, 1], 5, lambda part, within: 1000 * part + within, 16, cuts=cuts)
    places = [mixed.at(place) for place in range(2000)]
    for part, count in ((0, 50), (1, 7)):
        own = [number - 1000 * part for _, number in places if number // 1000 == part]
        assert all(sorted(own[first : first + count]) == list(range(count)) for first in range(0, len(own) - count, count))
    end, now, soon = mixed.reading(5)
    assert end == CYCLE
    for spans in (now, soon):
        assert {first // 1000 for first, _ in spans} == {0, 1}
        assert all(first < last for first, last in spans)
