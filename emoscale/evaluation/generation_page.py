"""Page of generated responses: measures run beside run, and what was said instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emoscale.evaluation.page import Section, cell, table

SHOWN = {"perplexity": ("Perplexity", 1.0), "bleu": ("BLEU", 1.0), "similarity": ("Similarity", 100.0), "emotion_consistency": ("Emotion consistency", 100.0)}
"""Measure → its name, and what it is multiplied by."""


def response_sections(result: Mapping[str, Any], *, command: str) -> list[Section]:
    """Tabulate what `score_arms` gave.

    Args:
        result: as it came.
        command: that made it.
    """
    head = [
        cell("Run", tag="th"),
        *(cell(name, "num", tag="th") for name in (*(title for title, _ in SHOWN.values()), "Dist-1", "Dist-2", "Unigram perplexity", "Uniform")),
    ]
    rows = [
        [
            cell(name, tag="th"), *(_measure(arm[measure], scale) for measure, (_, scale) in SHOWN.items()),
            *(cell(f"{arm[key]:.3f}", "num") for key in ("dist_1", "dist_2")), cell(f"{arm['unigram']:.1f}", "num"),
            cell(f"{arm['uniform']:,.0f}", "num"),
        ]
        for name, arm in result["arms"].items()
    ]  # fmt: skip
    first = next(iter(result["arms"]))
    notes = (
        f"{result['responses']} held-out responses. Emotion consistency: how often the judge ({result['judge']}) reads the emotion of the true response in the "
        f"generated one, in percent; it reads it in {100 * result['said']:.1f} of the true ones. 95 % intervals over dialogues; below them, {first} less this row.",
    )
    said = [
        [cell(name, tag="th"), cell(row["id"]), cell(row["said"]), cell(row["generated"])] for name, arm in result["arms"].items() for row in arm["samples"]
    ]
    titles = [cell(word, tag="th") for word in ("Run", "Utterance", "Said", "Generated")]
    return [Section("Generated responses", table(head, rows), command, notes=notes), Section("Samples", table(titles, said), command)]


def _measure(found: Mapping[str, Any], scale: float) -> str:
    told = _interval(found, scale, "")
    return cell(told + (f" [{_interval(found['difference'], scale, '+')}]" if "difference" in found else ""), "num")


def _interval(found: Mapping[str, float], scale: float, sign: str) -> str:
    return f"{scale * found['value']:{sign}.1f} ({scale * found['low']:{sign}.1f} … {scale * found['high']:{sign}.1f})"
