"""Page of how well texts and pictures that were held out find each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emoscale.evaluation.page import Section, cell, table

MEASURES = ("R@1", "R@5")
NOTES = (
    "R@k: the true partner is among the k best of all held-out pairs; candidates that score alike count against it. Loss: the contrastive loss over "
    "all of them, nats; who knows nothing has that of chance. 95 % intervals over people.",
)


def pairs_section(runs: Mapping[str, Mapping[str, Any]], command: str) -> Section:
    """Tabulate the searches of one or more runs, in percent, above chance.

    Args:
        runs: name → what `score_pairs` gave.
        command: that made them.
    """
    head = [cell(word, tag="th") for word in ("Run", "Search")] + [cell(word, "num", tag="th") for word in ("Pairs", *MEASURES, "Loss")]
    rows = [
        [cell(run, tag="th"), cell(name), cell(f"{found['queries']:,}", "num"), *(_percent(found[measure]) for measure in MEASURES), _nats(found["loss"])]
        for run, searches in runs.items() for name, found in searches.items()
    ]  # fmt: skip
    chances = {(*(found[measure]["chance"] for measure in MEASURES), found["loss"]["uniform"]) for searches in runs.values() for found in searches.values()}
    rows += [
        [cell("chance", tag="th"), cell(""), cell("", "num"), *(cell(f"{100 * chance:.2f}", "num") for chance in each), cell(f"{uniform:.3f}", "num")]
        for *each, uniform in sorted(chances)
    ]  # fmt: skip
    return Section("Texts and pictures that find each other", table(head, rows), command, notes=NOTES)


def samples_section(runs: Mapping[str, Mapping[str, Any]], command: str) -> Section:
    """Show some texts and whose pictures they find first, of each run.

    Args:
        runs: name → what `score_pairs` gave.
        command: that made them.
    """
    head = [cell(word, tag="th") for word in ("Run", "Utterance", "Text", "Pictures found first, the best at the front")]
    rows = [
        [cell(run, tag="th"), cell(_named(row)), cell(row["text"]), cell(", ".join(map(_named, row["found"])))]
        for run, searches in runs.items() for row in searches["text→image"].get("samples", ())
    ]  # fmt: skip
    return Section("Samples of searches", table(head, rows), command, notes=("In brackets, the emotion that the corpus gives, which no run was told.",))


def _named(row: Mapping[str, str]) -> str:
    return f"{row['id']} ({row['emotion']})" if row["emotion"] else row["id"]


def _percent(measure: Mapping[str, float]) -> str:
    return cell(f"{100 * measure['value']:.1f} ({100 * measure['low']:.1f}–{100 * measure['high']:.1f})", "num")


def _nats(measure: Mapping[str, float]) -> str:
    return cell(f"{measure['value']:.3f} ({measure['low']:.3f}–{measure['high']:.3f})", "num")
