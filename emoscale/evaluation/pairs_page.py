"""Page of how well texts and pictures that were held out find each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emoscale.evaluation.page import Section, cell, table

MEASURES = ("R@1", "R@5")
NOTES = (
    "R@k: the true partner is among the k best of all held-out pairs; candidates that score alike count against it. 95 % intervals over people.",
)


def pairs_section(runs: Mapping[str, Mapping[str, Any]], command: str) -> Section:
    """Tabulate the searches of one or more runs, in percent, above chance.

    Args:
        runs: name → what `score_pairs` gave.
        command: that made them.
    """
    head = [cell(word, tag="th") for word in ("Run", "Search")] + [cell(word, "num", tag="th") for word in ("Pairs", *MEASURES)]
    rows = [
        [cell(run, tag="th"), cell(name), cell(f"{found['queries']:,}", "num"), *(_percent(found[measure]) for measure in MEASURES)]
        for run, searches in runs.items() for name, found in searches.items()
    ]  # fmt: skip
    chances = {tuple(found[measure]["chance"] for measure in MEASURES) for searches in runs.values() for found in searches.values()}
    rows += [
        [cell("chance", tag="th"), cell(""), cell("", "num"), *(cell(f"{100 * chance:.2f}", "num") for chance in each)] for each in sorted(chances)
    ]
    return Section("Texts and pictures that find each other", table(head, rows), command, notes=NOTES)


def _percent(measure: Mapping[str, float]) -> str:
    return cell(f"{100 * measure['value']:.1f} ({100 * measure['low']:.1f}–{100 * measure['high']:.1f})", "num")
