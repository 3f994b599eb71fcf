"""Pages of what pre-training runs know of held-out utterances: searches (TCMP's Table 3), pairs, and masked objectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emoscale.evaluation.page import Section, cell, table
from emoscale.evaluation.pairs_page import pairs_section, samples_section
from emoscale.evaluation.retrieval import MEASURES


def heldout_sections(runs: Mapping[str, Mapping[str, Any]], *, command: str) -> list[Section]:
    """Tabulate the results of one or more runs.

    Args:
        runs: name → what `evaluate_objectives` gave.
        command: that made them.
    """
    searched = {name: result["search"] for name, result in runs.items() if "search" in result}
    masked = {name: result["objectives"] for name, result in runs.items() if "objectives" in result}
    paired = {name: result["pairs"] for name, result in runs.items() if "pairs" in result}
    found = ([_searches(searched, command)] if searched else []) + ([pairs_section(paired, command), samples_section(paired, command)] if paired else [])
    return [*found, *([_objectives(masked, command)] if masked else [])]


def _searches(runs: Mapping[str, Mapping[str, Any]], command: str) -> Section:
    names = [f"R_{k}@{m}" for k, m in MEASURES]
    head = [cell(word, tag="th") for word in ("Run", "Search")]
    head += [cell(word, "num", tag="th") for word in ("Targets", *names)]
    rows = [
        [cell(run, tag="th"), cell(search), cell(f"{scores['queries']:,}", "num"), *(_percent(scores[name]) for name in names)]
        for run, searches in runs.items() for search, scores in searches.items()
    ]  # fmt: skip
    chance = [cell("chance", tag="th"), cell(""), cell("", "num"), *(cell(f"{100 * m / k:.1f}", "num") for k, m in MEASURES)]
    notes = (
        "T2T: words are found by words, A2A: voices by voices, M2M: both by both. R_k@m: the target is among the m best of k candidates, the others of which "
        "come from other films; candidates that score alike count against the target. 95 % intervals over dialogues.",
    )
    return Section("Target-utterance search on held-out dialogues", table(head, [*rows, chance]), command, notes=notes)


def _objectives(runs: Mapping[str, Mapping[str, Any]], command: str) -> Section:
    head = [cell(word, tag="th") for word in ("Run", "Objective")]
    head += [cell(word, "num", tag="th") for word in ("Units", "Model", "Constant answer", "Difference")]
    rows = [
        [
            cell(run, tag="th"), cell(name), cell(f"{scores['units']:,}", "num"), cell(f"{scores['model']:.3f}", "num"), cell(f"{scores['baseline']:.3f}", "num"),
            cell(f"{scores['difference']:+.3f} ({scores['low']:+.3f} … {scores['high']:+.3f})", "num"),
        ]
        for run, objectives in runs.items() for name, scores in objectives.items()
    ]  # fmt: skip
    return Section(
        "Masked units of held-out utterances",
        table(head, rows),
        command,
        notes=("Mean loss per masked unit; lower is better. 95 % intervals over utterances.",),
    )


def _percent(measure: Mapping[str, float]) -> str:
    return cell(f"{100 * measure['value']:.1f} ({100 * measure['low']:.1f}–{100 * measure['high']:.1f})", "num")
