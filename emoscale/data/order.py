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
    neighbours, blocks among each other, so that reading stays local: about a block is needed at a time. The order depends on
    the seed alone: any world, worker count or restart reads the same sequence.

    Args:
        count: utterances.
        seed: of the run.
        block: neighbours that are shuffled among each other.
        grown: (place at which it was noticed, utterances since); the pass in progress there ends as it began, and the next
            takes all. New utterances are numbered behind the old ones.
    """

    def __init__(self, count: int, seed: int, block: int = 1 << 16, grown: Sequence[tuple[int, int]] = ()) -> None:
        if count < 1:
            raise DataError("the corpus holds no utterance; look at its ledger.jsonl")
        self.seed, self.block = seed, block
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
        first, before, count = self._stages[bisect_right(self._firsts, place) - 1]
        turn, within = divmod(place - first, count)
        turn += before
        blocks = -(-count // self.block)
        chosen = permutation(blocks, self.seed, f"blocks-{turn}")
        # Only the last block is short, so places before it in the shuffled order shift by what it lacks.
        short, at_end = blocks * self.block - count, int(np.flatnonzero(chosen == blocks - 1)[0])
        slot, offset = divmod(within, self.block)
        if within >= (at_end + 1) * self.block - short:
            slot, offset = divmod(within + short, self.block)
        block = int(chosen[slot])
        size = min(self.block, count - block * self.block)
        return turn, block * self.block + int(permutation(size, self.seed, f"block-{turn}-{block}")[offset])


class Mixture:
    """The sequence of several collections that are drawn in given proportions, each in passes of its own.

    In every cycle of `CYCLE` places each collection has its share of places, to within one; which ones is drawn anew per cycle.

    Args:
        counts: utterances of each.
        weights: how often each is drawn, relative to the others.
        seed, block: as of `Order`.
        number: gives the number in the whole of (collection, utterance of it).
        grown: (place at which it was noticed, utterances of each since), as of `Order`.
    """

    def __init__(
        self, counts: Sequence[int], weights: Sequence[float], seed: int, number: Callable[[int, int], int], block: int = 1 << 16,
        grown: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> None:
        self.seed, self._number = seed, number
        self._owners = np.repeat(np.arange(len(weights)), _shares(weights))
        self._orders = [
            Order(count, key_of(seed, f"stream-{i}"), block, [(self._before(i, place), more[i]) for place, more in grown]) for i, count in enumerate(counts)
        ]

    def at(self, place: int) -> tuple[int, int]:
        """Give (pass over its collection, number in the whole) at a place."""
        owner = int(self._cycle(place // CYCLE)[place % CYCLE])
        turn, within = self._orders[owner].at(self._before(owner, place))
        return turn, self._number(owner, within)

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


@lru_cache(maxsize=32)
def permutation(count: int, seed: int, purpose: str) -> np.ndarray:
    """Give a permutation by sorting Philox words: numpy's own shuffles may change between its releases, a resumed run may not."""
    counters, key = np.arange(count, dtype=np.int64), key_of(seed, purpose)
    high, low, *_ = philox(counters, counters * 0 + (key & WORD), counters * 0 + (key >> 32), counters * 0, seed & SEED)
    return np.argsort((high << 31) | (low >> 1), kind="stable")
