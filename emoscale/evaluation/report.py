"""Reports: one self-contained HTML file with scores, confusion matrices, training curves, corpus and environment.

write_report(Path("report.html"), title="…", sections=[scores_section(…), curves_section(…), corpus_section(…)])
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import numpy as np

from emoscale.evaluation.charts import interval_mark
from emoscale.evaluation.folders import corpus_section, curves_section, environment_section, load_metrics
from emoscale.evaluation.metrics import DEFINITIONS, METRICS, Scores
from emoscale.evaluation.page import Section, cell, page, table
from emoscale.evaluation.predictions import Predictions
from emoscale.evaluation.resampling import Interval

__all__ = [
    "Example",
    "Section",
    "confusion_section",
    "corpus_section",
    "curves_section",
    "environment_section",
    "examples_section",
    "load_metrics",
    "scores_section",
    "speakers_section",
    "write_report",
]

SHOWN_SLICES = 24
"""Speakers shown at once; the others unfold."""


@dataclass(frozen=True)
class Example:
    """One utterance with what was answered."""

    id: str
    text: str
    truth: str
    predicted: str
    probabilities: Mapping[str, float]
    """Class → probability."""
    speaker: str = ""


def write_report(path: Path, *, title: str, sections: list[Section]) -> None:
    """Write a report that opens anywhere, offline; the file appears whole or not at all."""
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    text = page(title, f"emoscale · {written}", sections)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def scores_section(
    arms: Mapping[str, Scores],
    *,
    command: str,
    source: str,
    title: str = "Scores",
    differences: Mapping[str, Mapping[str, Interval]] | None = None,
    warning: str | None = None,
) -> Section:
    """Tabulate arm × metric with 95 % intervals, in percent, and paired differences in points.

    Args:
        arms: name of the arm → its scores.
        command: that made them.
        source: file they were read from.
        title: heading.
        differences: such as `{"pre-trained − scratch": paired_difference(…)}`.
        warning: such as `Choice.flag`.
    """
    start = min(scores.intervals["uar"].low for scores in arms.values())
    end = max(scores.intervals["uar"].high for scores in arms.values())
    best = {name: max(getattr(scores, name) for scores in arms.values()) for name in METRICS}
    rows = []
    for arm, scores in arms.items():
        row = [cell(arm, tag="th"), cell(f"{scores.utterances:,}".replace(",", "\u202f"), "num")]
        for name in METRICS:
            row.append(_with_interval(scores.intervals[name], best=len(arms) > 1 and getattr(scores, name) == best[name]))
        mean = scores.intervals["uar"]
        mark = interval_mark(mean.value, mean.low, mean.high, start=start, end=end)
        rows.append([*row, f'<td class="mark">{mark}</td>'])
    head = [cell("Arm", tag="th"), cell("Utterances", "num", tag="th")]
    head += [cell(DEFINITIONS[name][0], "num", tag="th") for name in METRICS]
    html = table([*head, cell("UAR", tag="th")], rows)
    if differences:
        html += "<h3>Paired differences, in points</h3>" + _differences(differences)
    html += "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in DEFINITIONS.values()) + "</dl>"
    return Section(title, html, command, source, tuple(_interval_notes(arms)), warning)


def confusion_section(arms: Mapping[str, Scores], *, command: str, source: str, title: str = "Confusion matrices") -> Section:
    """Show each arm's confusion matrix: share of the true class in percent as colour, counts beneath."""
    maps = "".join(f"<div><h3>{escape(arm)}</h3>{_heat(scores)}</div>" for arm, scores in arms.items())
    note = "Rows are the truth, columns the answers; percent of the row, so the diagonal is the recall of each class."
    return Section(title, f'<div class="maps">{maps}</div>', command, source, (note,))


def classes_section(arms: Mapping[str, Scores], *, command: str, source: str, title: str = "By class") -> Section:
    """Show the F1 of every class over all rows of all runs, one column per arm, as VL-KE-T5's Table II does."""
    first = next(iter(arms.values()))
    body = []
    for name, counts in first.per_class.items():
        row = [cell(name, tag="th"), cell(int(counts["support"]), "num")]
        body.append([*row, *(cell(f"{100 * scores.per_class[name]['f1']:.1f}", "num") for scores in arms.values())])
    head = [cell("Class", tag="th"), cell("Utterances", "num", tag="th"), *(cell(arm, "num", tag="th") for arm in arms)]
    return Section(title, table(head, body), command, source, ('F1 in percent; of the whole, see WF1 (the paper\'s "All") and MF1 above.',))


def speakers_section(
    arms: Mapping[str, Sequence[Predictions]],
    *,
    command: str,
    source: str,
    title: str = "By speaker",
    slices: str = "Speaker",
) -> Section:
    """Show accuracy per speaker (hardest first), one column per arm; `Predictions.speakers` may hold any other slice."""
    hits: dict[str, Counter[str]] = {arm: Counter() for arm in arms}
    rows: dict[str, Counter[str]] = {arm: Counter() for arm in arms}
    for arm, runs in arms.items():
        for run in runs:
            right = (np.asarray(run.truth) == np.asarray(run.predicted)).tolist()
            for speaker, hit in zip(run.speakers or [""] * len(right), right, strict=True):
                rows[arm][speaker or "(unknown)"] += 1
                hits[arm][speaker or "(unknown)"] += hit
    names = sorted({name for counts in rows.values() for name in counts})
    first = next(iter(arms))
    names.sort(key=lambda name: hits[first][name] / max(rows[first][name], 1))
    body = []
    for name in names:
        row = [cell(name, tag="th"), cell(rows[first][name], "num")]
        for arm in arms:
            share = hits[arm][name] / rows[arm][name] if rows[arm][name] else math.nan
            row += [cell(_percent(share), "num"), f"<td>{_bar(share)}</td>"]
        body.append(row)
    head = [cell(slices, tag="th"), cell("Answers", "num", tag="th")]
    head += [cell(arm, tag="th", span=2) for arm in arms]
    note = "Accuracy in percent over all seeds; a row with few answers says little."
    html = table(head, body[:SHOWN_SLICES])
    if len(body) > SHOWN_SLICES:
        rest = table(head, body[SHOWN_SLICES:])
        html += f"<details><summary>{len(body) - SHOWN_SLICES} more</summary>{rest}</details>"
    return Section(title, html, command, source, (note,))


def examples_section(examples: Sequence[Example], *, command: str, source: str, title: str = "Examples", worst: int | None = None) -> Section:
    """Show utterances with their class probabilities; `worst` keeps those whose true class got the least."""
    chosen = list(examples)
    if worst is not None:
        chosen = sorted(chosen, key=lambda example: example.probabilities.get(example.truth, 0.0))[:worst]
    rows = []
    for example in chosen:
        hit = "right" if example.truth == example.predicted else "wrong"
        text = example.text or "(no text)"
        rows.append(
            [
                f'<td class="wide">{escape(text)}<br><code>{escape(example.id)}</code></td>',
                cell(example.speaker),
                cell(example.truth),
                cell(example.predicted, hit),
                f"<td>{_probabilities(example.probabilities)}</td>",
            ]
        )
    head = [cell(name, tag="th") for name in ("Utterance", "Speaker", "Truth", "Answer", "Probability")]
    return Section(title, table(head, rows), command, source)


def _with_interval(interval: Interval, *, best: bool = False) -> str:
    return _stacked(_percent(interval.value), f"{_percent(interval.low)}–{_percent(interval.high)}", strong=best)


def _stacked(value: str, ends: str, *, strong: bool) -> str:
    css = "num best" if strong else "num"
    return f'<td class="{css}">{escape(value)}<small>{escape(ends)}</small></td>'


def _differences(differences: Mapping[str, Mapping[str, Interval]]) -> str:
    ends = [end for row in differences.values() for end in (row["uar"].low, row["uar"].high)]
    start, end = min(0.0, *ends), max(0.0, *ends)
    rows = []
    for name, row in differences.items():
        cells = [cell(name, tag="th")]
        for metric in METRICS:
            interval = row[metric]
            limits = f"{_points(interval.low)} … {_points(interval.high)}"
            cells.append(_stacked(_points(interval.value), limits, strong=interval.excludes_zero))
        uar = row["uar"]
        mark = interval_mark(uar.value, uar.low, uar.high, start=start, end=end, reference=0.0)
        rows.append([*cells, f'<td class="mark">{mark}</td>'])
    head = [cell("Difference", tag="th")]
    head += [cell(DEFINITIONS[name][0], "num", tag="th") for name in METRICS]
    note = '<p class="note">Both systems on the same resamples; bold where the interval excludes zero.</p>'
    return table([*head, cell("UAR", tag="th")], rows) + note


def _interval_notes(arms: Mapping[str, Scores]) -> list[str]:
    told: dict[str, list[str]] = {}
    for arm, scores in arms.items():
        some = scores.intervals["uar"]
        drawn = f"95 % bootstrap, {some.units} {some.unit}s, {some.resamples} resamples"
        told.setdefault("; ".join([drawn, *scores.notes]), []).append(arm)
    if len(told) == 1:
        return [f"{text}." for text in told]
    return [f"{', '.join(names)}: {text}." for text, names in told.items()]


def _heat(scores: Scores) -> str:
    counts = np.asarray(scores.confusion, float)
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    answers = scores.classes + ["other"] * (counts.shape[1] - len(scores.classes))
    rows = []
    for label, share, count in zip(scores.classes, shares, counts, strict=True):
        cells = [cell(label, tag="th")]
        for one, rows_seen in zip(share, count, strict=True):
            css = "hot" if one > 0.8 else ""
            shade = f"background:rgb(var(--heat)/{0.04 + 0.9 * one:.2f})"
            cells.append(f'<td class="{css}" style="{shade}">{100 * one:.0f}<small>{rows_seen:.0f}</small></td>')
        rows.append(cells)
    return table([cell("", tag="th"), *(cell(name, tag="th") for name in answers)], rows, css="map")


def _probabilities(probabilities: Mapping[str, float]) -> str:
    rows = [
        [cell(name), cell(_percent(share), "num"), f"<td>{_bar(share)}</td>"] for name, share in sorted(probabilities.items(), key=lambda item: -item[1])[:4]
    ]
    return table([], rows, css="bars")


def _bar(share: float) -> str:
    return f'<span class="bar" style="width:{5.5 * share:.2f}rem"></span>' if share > 0 else ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f}" if math.isfinite(share) else "–"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}".replace("-", "−")
