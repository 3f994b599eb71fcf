"""Scores of a classifier with definitions and 95 % intervals; differences of two systems on the same resamples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emoscale.config import DataError
from emoscale.evaluation.predictions import OTHER, Predictions, check_paired, choose_unit, pool
from emoscale.evaluation.resampling import Column, Interval, Unit, percentile_interval, resampled_tables

METRICS = ("wa", "uar", "wf1", "mf1", "aa")
DEFINITIONS = {
    "wa": ("WA", "accuracy: correct utterances / all utterances (each class weighs as much as it is frequent)"),
    "uar": ("UAR", "unweighted average recall: mean of the recalls of the classes that occur in the truth"),
    "wf1": ("WF1", "F1 of each class, averaged with the class frequencies of the truth as weights"),
    "mf1": ("MF1", "macro F1: plain mean of the F1 of the classes that occur in the truth or among the answers"),
    "aa": (
        "AA",
        "average accuracy as in TCMP: mean per-class accuracy (recall) over all declared classes, 0 for an absent one",
    ),
}


@dataclass(frozen=True)
class Scores:
    """Scores of one system, shares from 0 to 1; with several seeds, the mean over seeds of the pooled folds."""

    wa: float
    """Accuracy: correct / all; weighs classes by frequency."""
    uar: float
    """Unweighted average recall: mean recall over the classes present in the truth."""
    wf1: float
    """F1 per class, averaged with the truth's class frequencies as weights."""
    mf1: float
    """F1 per class, plain mean over classes present in the truth or among the answers (TCMP's "F1")."""
    aa: float
    """Average accuracy as in TCMP: mean recall over all declared classes, 0 for an absent one (else equal to UAR)."""
    classes: list[str]
    """Names of the declared classes."""
    per_class: dict[str, dict[str, float]]
    """Class → recall, precision, f1, support, over all rows of all runs."""
    confusion: list[list[int]]
    """Counts [truth][answer] over all runs; one more column, "other", if an answer lay outside the classes."""
    intervals: dict[str, Interval]
    """95 % interval of each score."""
    utterances: int
    """Distinct utterances tested."""
    runs: dict[str, Any]
    """Number of seeds and splits, and per score the mean and standard deviation (n − 1) over all single runs."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know about the intervals."""

    def to_dict(self) -> dict[str, Any]:
        """Give plain data for JSON, with the definitions."""
        return asdict(self) | {"definitions": {DEFINITIONS[name][0]: DEFINITIONS[name][1] for name in METRICS}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scores:
        """Read what `to_dict` gave back."""
        own: dict[str, Any] = {f.name: data[f.name] for f in fields(cls)}
        own["intervals"] = {name: Interval(**item) for name, item in data["intervals"].items()}
        return cls(**own)


def score(
    truth: ArrayLike,
    predicted: ArrayLike,
    classes: Sequence[str],
    *,
    speakers: Sequence[str] = (),
    ids: Sequence[str] = (),
    unit: Literal["auto"] | Unit = "auto",
    resamples: int = 2000,
    seed: int = 0,
) -> Scores:
    """Score one test set.

    Args:
        truth: int [rows], classes from 0.
        predicted: int [rows]; `OTHER` (−1) is an answer outside the classes.
        classes: names of all declared classes.
        speakers: who speaks in each row; decides what is resampled.
        ids: utterance ids, for error messages.
        unit: what the bootstrap draws. `auto`: speakers where all are known and there are two or more, else utterances.
        resamples: bootstrap resamples.
        seed: of the bootstrap; the same seed gives the same interval.

    Raises:
        DataError: labels missing, unknown or of one class only; names the rows.
    """
    run = Predictions(truth, predicted, ids, speakers)
    return score_runs([run], classes, unit=unit, resamples=resamples, seed=seed)


def score_runs(
    runs: Sequence[Predictions],
    classes: Sequence[str],
    *,
    unit: Literal["auto"] | Unit = "auto",
    resamples: int = 2000,
    seed: int = 0,
) -> Scores:
    """Score one system over folds and seeds.

    The folds of a seed are pooled, the seeds averaged. A resample draws speakers (or utterances), the same ones for
    every seed, and draws seeds too where there are several, so the interval covers both sources of chance.

    Raises:
        DataError: as `score`; also when an utterance is tested twice under one seed.
    """
    table = _Table.of([list(runs)], classes, unit)
    values, draws = table.scores(resamples, seed)
    intervals = {name: percentile_interval(values[name][0], draws[name][:, 0], level=0.95, unit=table.unit, units=table.units) for name in METRICS}
    counts = table.observed.sum(axis=(0, 1))
    return Scores(
        **{name: float(values[name][0]) for name in METRICS},
        classes=list(classes),
        per_class=_per_class(counts, classes),
        confusion=(counts if counts[:, -1].any() else counts[:, :-1]).astype(int).tolist(),
        intervals=intervals,
        utterances=table.utterances,
        runs=_over_runs(runs, classes),
        notes=table.notes,
    )


def paired_difference(
    first: Sequence[Predictions],
    second: Sequence[Predictions],
    classes: Sequence[str],
    *,
    unit: Literal["auto"] | Unit = "auto",
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Give first − second for each score, with an interval from the same resamples for both systems.

    Runs are matched by (split, seed), rows by id (by place without ids).

    Raises:
        DataError: a run or row that only one system has, or a row whose truth differs between them.
    """
    check_paired(list(first), list(second))
    table = _Table.of([list(first), list(second)], classes, unit)
    values, draws = table.scores(resamples, seed)
    return {
        name: percentile_interval(
            values[name][0] - values[name][1],
            draws[name][:, 0] - draws[name][:, 1],
            level=0.95,
            unit=table.unit,
            units=table.units,
        )
        for name in METRICS
    }


def confusion_matrix(truth: ArrayLike, predicted: ArrayLike, classes: int) -> NDArray[np.int64]:
    """Count [classes, classes + 1] rows of each (truth, answer); the last column is `OTHER`."""
    cell = _cells(np.asarray(truth, np.int64), np.asarray(predicted, np.int64), classes)
    return np.bincount(cell, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def recall_at(scores: ArrayLike, *, k: int, m: int) -> float:
    """R_k@m: share of queries whose true candidate is among the m best of the first k candidates.

    `scores` is [queries, candidates] with the true candidate in column 0. A tie counts against the true candidate, so
    a model that gives every candidate the same score gets 0, and R_k@m never grows with k.

    Source: TCMP (2023), eq. 24.

    Raises:
        ValueError: fewer than k candidates, or m outside 1 … k.
    """
    table = np.asarray(scores, np.float64)
    if table.ndim != 2 or table.shape[1] < k or not 1 <= m <= k:
        raise ValueError(f"scores: shape {table.shape}, k {k}, m {m}; need [queries, at least k candidates] and 1 ≤ m ≤ k")
    better = ~(table[:, 1:k] < table[:, :1])
    return float(np.mean(better.sum(axis=1) < m))


def metric_values(tables: NDArray[np.float64], present: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
    """Give every metric of count tables [..., classes, classes + 1]; an empty table gives NaN.

    `present` [..., classes] says which classes occur in the whole truth: AA is the mean recall times their share of all
    declared classes, so that a resample which happens to miss a rare class does not count it as answered wrongly.
    """
    hits = np.diagonal(tables, axis1=-2, axis2=-1)
    support, answers = tables.sum(-1), tables[..., :-1].sum(-2)
    total = support.sum(-1)
    f1 = _ratio(2 * hits, support + answers)
    uar = _mean_of_defined(_ratio(hits, support))
    return {
        "wa": _ratio(hits.sum(-1), total),
        "uar": uar,
        "wf1": _ratio(np.nansum(f1 * support, axis=-1), total),
        "mf1": _mean_of_defined(f1),
        "aa": uar * present.mean(axis=-1),
    }


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below > 0)


def _mean_of_defined(values: NDArray[np.float64]) -> NDArray[np.float64]:
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0.0).sum(-1), defined.sum(-1).astype(np.float64))


def _cells(truth: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    return truth * (classes + 1) + np.where(predicted == OTHER, classes, predicted)


@dataclass
class _Table:
    """All runs of one or two systems over common units, ready to be resampled; columns go by system, then seed."""

    columns: list[Column]
    systems: int
    observed: NDArray[np.float64]
    """[systems, seeds, classes, classes + 1] counts of the data as they are."""
    present: NDArray[np.bool_]
    """[systems, seeds, classes]: class occurs in the truth of that seed."""
    unit: Unit
    units: int
    utterances: int
    notes: list[str]

    @classmethod
    def of(cls, systems: list[list[Predictions]], classes: Sequence[str], unit: Literal["auto"] | Unit) -> _Table:
        """Check the runs, pool the folds of each seed and number the units."""
        if not systems[0]:
            raise DataError("no predictions to score: give at least one run")
        seeds = sorted({run.seed for run in systems[0]})
        pooled = [pool([run for run in runs if run.seed == seed], classes) for runs in systems for seed in seeds]
        unit, notes = choose_unit(pooled, unit)
        keys = [run.speakers if unit == "speaker" else run.ids for run in pooled]
        names, number = np.unique(np.concatenate([np.asarray(part, object) for part in keys]).astype(str), return_inverse=True)
        parts = np.split(number.astype(np.int64), np.cumsum([len(part) for part in keys])[:-1])
        count = len(classes)
        columns, observed = [], []
        for run, part in zip(pooled, parts, strict=True):
            truth, predicted = np.asarray(run.truth), np.asarray(run.predicted)
            columns.append(Column(part, _cells(truth, predicted, count)))
            observed.append(confusion_matrix(truth, predicted, count))
        tables = np.stack(observed).astype(np.float64).reshape(len(systems), len(seeds), count, count + 1)
        utterances = len({name for run in pooled for name in run.ids})
        if len(seeds) > 1:
            notes.append(f"mean over {len(seeds)} training seeds; the interval draws seeds as well")
        return cls(columns, len(systems), tables, tables.sum(-1) > 0, unit, len(names), utterances, notes)

    def scores(self, resamples: int, seed: int) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
        """Give each metric [systems] of the data and [resamples, systems] of the resamples, seeds averaged."""
        _, seeds, classes, answers = self.observed.shape
        generator = np.random.default_rng([seed, 1])
        parts: dict[str, list[NDArray[np.float64]]] = {name: [] for name in METRICS}
        for tables in resampled_tables(self.columns, classes * answers, units=self.units, unit=self.unit, resamples=resamples, seed=seed):
            drawn = metric_values(tables.reshape(len(tables), *self.observed.shape), self.present)
            weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=len(tables))[:, None, :]
            for name in METRICS:
                defined = ~np.isnan(drawn[name])
                total = np.where(defined, drawn[name] * weights, 0.0).sum(-1)
                parts[name].append(_ratio(total, (defined * weights).sum(-1).astype(np.float64)))
        values = metric_values(self.observed, self.present)
        return {name: values[name].mean(-1) for name in METRICS}, {name: np.concatenate(parts[name]) for name in METRICS}


def _per_class(counts: NDArray[np.float64], classes: Sequence[str]) -> dict[str, dict[str, float]]:
    hits, support, answers = np.diagonal(counts), counts.sum(1), counts[:, :-1].sum(0)
    columns = {
        "recall": _ratio(hits, support),
        "precision": _ratio(hits, answers),
        "f1": _ratio(2 * hits, support + answers),
    }
    shares = {name: np.nan_to_num(column) for name, column in columns.items()}
    return {
        label: {name: float(column[number]) for name, column in shares.items()} | {"support": float(support[number])} for number, label in enumerate(classes)
    }


def _over_runs(runs: Sequence[Predictions], classes: Sequence[str]) -> dict[str, Any]:
    tables = np.stack([confusion_matrix(run.truth, run.predicted, len(classes)) for run in runs]).astype(np.float64)
    values = metric_values(tables, tables.sum(-1) > 0)
    spread = {name: {"mean": float(column.mean()), "sd": float(column.std(ddof=1)) if len(column) > 1 else 0.0} for name, column in values.items()}
    return {"seeds": len({run.seed for run in runs}), "splits": len({run.split for run in runs})} | spread
