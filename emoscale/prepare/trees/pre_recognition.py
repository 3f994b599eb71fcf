"""P-MELD and P-IEM: how many utterances of a labelled corpus can be forecast, beside what TCMP's Table 1 counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from emoscale.prepare.sources import Row, Source

PAPER = {
    "meld": {
        "train": {"targets": 4687, "positive": 1009, "negative": 1536, "neutral": 2142},
        "dev": {"targets": 506, "positive": 111, "negative": 199, "neutral": 196},
        "test": {"targets": 1178, "positive": 237, "negative": 405, "neutral": 536},
    },
    "iemocap": {"all": {"targets": 8110}},
}
"""Ju et al. 2023 (TCMP), Table 1. Of P-IEM only the total can be compared: its class columns are interchanged (2,476 sad targets, where
the release has 1,084 sad utterances), and it counts turns on whose label the annotators disagreed."""
LABEL = {"meld": "sentiment", "iemocap": "raw"}
LONGEST = 5
"""Table 1's mean dialogue length of 4.7 is that of dialogues cut to five utterances, the target included."""
WHY = {
    "meld": "ours takes every utterance whose speaker spoke two before; the paper's builder is not published, and leaves out a tenth of these in each split",
    "iemocap": "ours takes every labelled turn whose speaker spoke two before; the paper's split and labels cannot be told from its Table 1",
}


def pre_recognition(layout: str, sources: Sequence[Source]) -> list[str]:
    """Count the targets of a labelled corpus, by split and class; give lines to print, none for a corpus that the paper has not used."""
    if layout not in PAPER:
        return []
    dialogues: dict[str, list[Row]] = {}
    for row in (row for source in sources for row in source.rows or ()):
        dialogues.setdefault(row.dialogue, []).append(row)
    counted: dict[str, Counter[str]] = {}
    seen: dict[str, list[int]] = {}
    for rows in dialogues.values():
        for place, row in enumerate(rows):
            name = row.label.get(LABEL[layout], "")
            if place >= 2 and row.speaker == rows[place - 2].speaker and name:
                split = row.label.get("split", "all")
                counted.setdefault(split, Counter())[name] += 1
                seen.setdefault(split, []).append(min(place + 1, LONGEST))
    lines = []
    for split, classes in counted.items():
        known = PAPER[layout].get(split, {})
        shown = ", ".join(f"{name} {count:,}" + (f" ({known[name]:,})" if name in known else "") for name, count in classes.most_common())
        beside = f" (Table 1: {known['targets']:,})" if known else ""
        lines.append(f"to forecast, {split}: {classes.total():,} targets{beside}, mean length {sum(seen[split]) / len(seen[split]):.1f}; {shown}")
    return [*lines, f"to forecast: {WHY[layout]}"]
