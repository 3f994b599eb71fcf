"""Which utterance stands at which place of the endless training sequence: a pure function of the seed and the place."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from emoscale.config import DataError
from emoscale.kernels.philox import WORD, key_of, philox

SEED = (1 << 64) - 1
CYCLE = 1 << 12
"""Places over which a mixture keeps its proportions exactly."""


class Order:
    """The sequence of one collection of utterances.

    Place p belongs to pass p // n; within a pass every utterance comes exactly once. Utterances are shuffled within blocks of
    neighbours, blocks among each other, so that reading stays local: about a block is needed at a time. With `cuts`, it is
    shards that are shuffled, anew in every pass, and a block is as many of them as it takes: other neighbours meet in every
    pass, and no shard lies in two blocks. The order depends on the seed alone: any world, worker count or restart reads the
    same sequence.

    Args:
        count: utterances.
        seed: of the run.
        block: neighbours that are shuffled among each other.
        grown: (place at which it was noticed, utterances since); the pass in progress there ends as it began, and the next
            takes all. New utterances are numbered behind the old ones.
        cuts: numbers at which shards begin, in order, the first one 0; empty = blocks of neighbours.
    """

    def __init__(self, count: int, seed: int, block: int = 1 << 16, grown: Sequence[tuple[int, int]] = (), cuts: Sequence[int] = ()) -> None:
        if count < 1:
            raise DataError("the corpus holds no utterance; look at its ledger.jsonl")
        self.seed, self.block, self.cuts = seed, block, np.asarray(cuts, np.int64)
        self._passes: dict[tuple[int, int], _Shards] = {}
        self._stages = [(0, 0, count)]
        for place, more in grown:
            first, turn, had = self._stages[-1]
            passes = max(0, -((first - place) // had))  # begun, the one in progress included
            self._stages.append((first + passes * had, turn + passes, more))
        self._firsts = [first for first, _, _ in self._stages]

    def known(self, place: int) -> int:
        """Give how many utterances the pass at a place is over."""
        return self._stages[bisect_right(self._firsts, place) - 1][2]

    def at(self, place: int) -> tuple[int, int]:
        """Give (pass, utterance number) at a place."""
        count, turn, within = self._stage(place)
        if len(self.cuts):
            return turn, self._pass(turn, count).at(within)
        chosen, short, at_end = _blocks(count, self.block, self.seed, turn)
        slot, offset = divmod(within, self.block)
        if within >= (at_end + 1) * self.block - short:
            slot, offset = divmod(within + short, self.block)
        block = int(chosen[slot])
        size = min(self.block, count - block * self.block)
        return turn, block * self.block + int(permutation(size, self.seed, f"block-{turn}-{block}")[offset])

    def reading(self, place: int) -> tuple[int, list[tuple[int, int]], list[tuple[int, int]]]:
        """Give (place behind the block that is read at a place, what that block holds, what the next one holds).

        What a block holds is told in stretches of utterances, as (first, behind the last).
        """
        end, now = self._block(place)
        return end, now, self._block(end)[1]

    def _block(self, place: int) -> tuple[int, list[tuple[int, int]]]:
        count, turn, within = self._stage(place)
        if len(self.cuts):
            blocks = self._pass(turn, count)
            number = blocks.of(within)
            return place - within + blocks.firsts[number + 1], blocks.spans(number)
        chosen, short, at_end = _blocks(count, self.block, self.seed, turn)
        slot = (within if within < (at_end + 1) * self.block - short else within + short) // self.block
        block = int(chosen[slot])
        end = (slot + 1) * self.block - (short if slot >= at_end else 0)
        return place - within + end, [(block * self.block, min((block + 1) * self.block, count))]

    def _stage(self, place: int) -> tuple[int, int, int]:
        """Give (utterances of the pass at a place, number of the pass, place within it)."""
        first, before, count = self._stages[bisect_right(self._firsts, place) - 1]
        turn, within = divmod(place - first, count)
        return count, turn + before, within

    def _pass(self, turn: int, count: int) -> _Shards:
        """Give a pass over the shards of the first `count` utterances; this one and the next are kept."""
        if (turn, count) not in self._passes:
            while len(self._passes) > 1:
                self._passes.pop(next(iter(self._passes)))
            self._passes[turn, count] = _Shards(self.cuts[self.cuts < count], count, self.block, self.seed, turn)
        return self._passes[turn, count]


class _Shards:
    """A pass over shuffled shards, cut into blocks."""

    def __init__(self, cuts: np.ndarray, count: int, block: int, seed: int, turn: int) -> None:
        self._seed, self._turn = seed, turn
        self._dealt: dict[int, np.ndarray] = {}
        chosen = permutation(len(cuts), seed, f"shards-{turn}")
        self._first, self._end = first, end = cuts[chosen], np.append(cuts[1:], count)[chosen]
        begins = np.cumsum(end - first) - (end - first)
        # A shard belongs to the block in which it begins.
        self._begins = np.flatnonzero(np.diff(begins // block, prepend=-1))
        self.firsts: list[int] = [*begins[self._begins].tolist(), int((end - first).sum())]
        """Place within the pass at which each block begins, and the end."""

    def of(self, within: int) -> int:
        """Give the number of the block at a place within the pass."""
        return bisect_right(self.firsts, within) - 1

    def at(self, within: int) -> int:
        """Give the utterance at a place within the pass."""
        block = self.of(within)
        if block not in self._dealt:
            self._dealt = {kept: self._dealt[kept] for kept in list(self._dealt)[-1:]}
            numbers = np.concatenate([np.arange(first, end) for first, end in self.spans(block)])
            self._dealt[block] = numbers[permutation(len(numbers), self._seed, f"shard-block-{self._turn}-{block}")]
        return int(self._dealt[block][within - self.firsts[block]])

    def spans(self, block: int) -> list[tuple[int, int]]:
        """Give the shards of a block, as (first utterance, behind the last)."""
        end = self._begins[block + 1] if block + 1 < len(self._begins) else len(self._first)
        chosen = slice(self._begins[block], end)
        return list(zip(self._first[chosen].tolist(), self._end[chosen].tolist(), strict=True))


class Mixture:
    """The sequence of several collections that are drawn in given proportions, each in passes of its own.

    In every cycle of `CYCLE` places each collection has its share of places, to within one; which ones is drawn anew per cycle.

    Args:
        counts: utterances of each.
        weights: how often each is drawn, relative to the others.
        seed, block: as of `Order`.
        number: gives the number in the whole of (collection, utterance of it).
        grown: (place at which it was noticed, utterances of each since), as of `Order`.
        cuts: of each, as of `Order`.
    """

    def __init__(
        self,
        counts: Sequence[int],
        weights: Sequence[float],
        seed: int,
        number: Callable[[int, int], int],
        block: int = 1 << 16,
        grown: Sequence[tuple[int, Sequence[int]]] = (),
        cuts: Sequence[Sequence[int]] = (),
    ) -> None:
        self.seed, self._number = seed, number
        self._owners = np.repeat(np.arange(len(weights)), _shares(weights))
        self._orders = [
            Order(count, key_of(seed, f"stream-{i}"), block, [(self._before(i, place), more[i]) for place, more in grown], cuts[i] if cuts else ())
            for i, count in enumerate(counts)
        ]

    def at(self, place: int) -> tuple[int, int]:
        """Give (pass over its collection, number in the whole) at a place."""
        owner = int(self._cycle(place // CYCLE)[place % CYCLE])
        turn, within = self._orders[owner].at(self._before(owner, place))
        return turn, self._number(owner, within)

    def reading(self, place: int) -> tuple[int, list[tuple[int, int]], list[tuple[int, int]]]:
        """Give what `Order.reading` gives, of all collections together, until the end of the cycle."""
        found: tuple[list[tuple[int, int]], list[tuple[int, int]]] = [], []
        for owner, order in enumerate(self._orders):
            for spans, own in zip(found, order.reading(self._before(owner, place))[1:], strict=True):
                told = [(self._number(owner, first), self._number(owner, end - 1) + 1) for first, end in own]
                spans += [(first, end) for (first, end), (a, b) in zip(told, own, strict=True) if end - first == b - a]
        return (place // CYCLE + 1) * CYCLE, *found

    def _before(self, owner: int, place: int) -> int:
        """Places of a collection before a place of the whole."""
        cycle, within = divmod(place, CYCLE)
        return cycle * int((self._owners == owner).sum()) + int((self._cycle(cycle)[:within] == owner).sum())

    def _cycle(self, number: int) -> np.ndarray:
        return self._owners[permutation(CYCLE, self.seed, f"cycle-{number}")]


def _shares(weights: Sequence[float]) -> np.ndarray:
    """Divide a cycle's places by largest remainder; each collection has at least one."""
    exact = np.asarray(weights, np.float64) / sum(weights) * CYCLE
    shares = np.maximum(np.floor(exact).astype(np.int64), 1)
    for i in np.argsort(-(exact - shares), kind="stable")[: CYCLE - shares.sum()]:
        shares[i] += 1
    while shares.sum() > CYCLE:  # weights so small that one place is more than their share
        shares[shares.argmax()] -= 1
    return shares


def held_at(last: Sequence[int], stages: Sequence[int]) -> dict[int, int]:
    """Give how many of what is made of utterances (windows, pairs, responses) there were at each stage: that number → utterances.

    Where a stage brought none, the number of utterances is that of the stage before: the sequence changes only where there is more.

    Args:
        last: of each, the last utterance that is part of it; those of an earlier stage come first.
        stages: utterances of the corpus, before each time it grew and at last.
    """
    ends, found = np.asarray(last, np.int64), {}
    for count in stages:
        found.setdefault(int((ends < count).sum()), count)
    return found


@lru_cache(maxsize=32)
def _blocks(count: int, block: int, seed: int, turn: int) -> tuple[np.ndarray, int, int]:
    """Give the order of the blocks in a pass, what the last block lacks, and where that one stands.

    Only the last block is short, so places behind it in the shuffled order shift by what it lacks.
    """
    blocks = -(-count // block)
    chosen = permutation(blocks, seed, f"blocks-{turn}")
    return chosen, blocks * block - count, int(np.flatnonzero(chosen == blocks - 1)[0])


@lru_cache(maxsize=32)
def permutation(count: int, seed: int, purpose: str) -> np.ndarray:
    """Give a permutation by sorting Philox words: numpy's own shuffles may change between its releases, a resumed run may not."""
    counters, key = np.arange(count, dtype=np.int64), key_of(seed, purpose)
    high, low, *_ = philox(counters, counters * 0 + (key & WORD), counters * 0 + (key >> 32), counters * 0, seed & SEED)
    return np.argsort((high << 31) | (low >> 1), kind="stable")
