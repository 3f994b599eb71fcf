"""Bootstrap over utterances or speakers, on counts: a resample is a reweighted table of (truth, answer) counts.

Drawing n rows with replacement and counting their cells is the same as drawing the counts from a multinomial, so a
resample costs one small matrix product however large the test set is, and two systems see the same resamples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Unit = Literal["speaker", "utterance"]
CHUNK = 64


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval and what was resampled for it."""

    value: float
    """The score, or difference of scores, on the data as they are."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""
    level: float = 0.95
    """Share of resamples between `low` and `high`."""
    unit: Unit = "utterance"
    """What was drawn with replacement: whole speakers, or utterances."""
    units: int = 0
    """How many speakers or utterances there were to draw from."""
    resamples: int = 0
    """How many resamples were drawn."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero (meant for differences)."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Column:
    """One system under one seed, row by row."""

    unit: NDArray[np.int64]
    """Number of the speaker or utterance."""
    cell: NDArray[np.int64]
    """Number of the (truth, answer) cell."""


def resampled_tables(columns: list[Column], cells: int, *, units: int, unit: Unit, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Give count tables [chunk, columns, cells] of bootstrap resamples; every column sees the same draws.

    Args:
        columns: the systems and seeds, all over the same `units`.
        cells: number of (truth, answer) cells.
        units: number of speakers or utterances.
        unit: for utterances, rows that agree in every column are merged, which changes nothing but the speed.
        resamples: how many resamples in all.
        seed: the same seed gives the same resamples.
    """
    if unit == "utterance":
        counts, design = _merged(columns, cells, units)
    else:
        counts, design = np.ones(units, np.int64), _design(columns, cells, units)
    draws = int(counts.sum())
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, CHUNK):
        weights = generator.multinomial(draws, counts / draws, size=min(CHUNK, resamples - start))
        yield (design.T @ weights.T).T.reshape(len(weights), len(columns), cells).astype(np.float64)


def percentile_interval(value: float, resampled: NDArray[np.float64], *, level: float, unit: Unit, units: int) -> Interval:
    """Give the central `level` share of the resampled values; undefined resamples (no rows left) are left out."""
    tail = (1 - level) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high), level, unit, units, len(resampled))


def _design(columns: list[Column], cells: int, units: int) -> sparse.csr_array:
    row = np.concatenate([column.unit for column in columns])
    position = np.concatenate([number * cells + column.cell for number, column in enumerate(columns)])
    ones = np.ones(len(row), np.int64)
    return sparse.coo_array((ones, (row, position)), shape=(units, len(columns) * cells)).tocsr()


def _merged(columns: list[Column], cells: int, units: int) -> tuple[NDArray[np.int64], sparse.csr_array]:
    signature = np.full((units, len(columns)), -1, np.int64)
    for number, column in enumerate(columns):
        signature[column.unit, number] = column.cell
    distinct, counts = np.unique(signature, axis=0, return_counts=True)
    merged = [Column(np.flatnonzero(cell >= 0), cell[cell >= 0]) for cell in distinct.T]
    return counts, _design(merged, cells, len(distinct))
