"""What the best possible recogniser reaches: exact posteriors from the tables that the corpus was generated with.

It sees the class that each cue shows, which a real system must first read from words, pixels and sound.
"""

from __future__ import annotations

import csv
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from . import tables

CUES = ("text", "face", "voice")
SETS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "face": ("face",),
    "voice": ("voice",),
    "face+voice": ("face", "voice"),
    "text+face": ("text", "face"),
    "text+voice": ("text", "voice"),
    "text+face+voice": CUES,
}
"""What each recogniser may see."""

SHOWN = (*tables.EMOTIONS, "")
"""What a cue may show; empty: nothing."""


def emission(cue: str, imperfections: bool = True) -> np.ndarray:
    """Give P(shown | emotion): float64 [4, 5], the last column for a cue that shows nothing."""
    true, wrong, lost = {
        "text": (tables.TEXT_TRUE, tables.TEXT_OTHER, tables.EMPTY),
        "face": (tables.FACE_TRUE, 1 - tables.FACE_TRUE, tables.OFF_SCREEN),
        "voice": (tables.VOICE_TRUE, 1 - tables.VOICE_TRUE, tables.MUTED),
    }[cue]
    kept = 1 - lost * imperfections
    classes = kept * ((true - wrong / 3) * np.eye(4) + wrong / 3)
    return np.concatenate([classes, 1 - classes.sum(1, keepdims=True)], 1)


def posterior(shown: dict[str, str]) -> np.ndarray:
    """Give P(emotion | cues), float64 [4], with equal classes before."""
    likelihood = np.ones(4)
    for cue, name in shown.items():
        likelihood *= emission(cue)[:, SHOWN.index(name)]
    return likelihood / likelihood.sum()


def decide(shown: dict[str, str]) -> str:
    """Give the most probable emotion; of equals, the one that the words, then the face, then the voice show."""
    chances = posterior(shown)
    best = [name for name, chance in zip(tables.EMOTIONS, chances, strict=True) if chance > chances.max() * (1 - 1e-9)]
    return next((shown[cue] for cue in CUES if shown.get(cue) in best), best[0])


def expected(imperfections: bool = True) -> dict[str, float]:
    """Give the accuracy of every set of cues, which is its UAR too: the classes are equal and alike; by summing over all cases."""
    tables_of = {cue: emission(cue, imperfections) for cue in CUES}
    found = {}
    for name, cues in SETS.items():
        right = 0.0
        for case in product(range(5), repeat=len(cues)):
            joint = np.prod([tables_of[cue][:, place] for cue, place in zip(cues, case, strict=True)], axis=0)
            right += joint.max() / 4
        found[name] = float(right)
    return found


def oracle(labels: Path, split: str = "labelled") -> dict[str, dict[str, Any]]:
    """Judge the rows of a rendered `labels.csv`.

    Args:
        labels: the file.
        split: `labelled` or `pretrain`.

    Returns:
        For every set of cues `accuracy`, `uar` and `predictions` (id → emotion); under `forecast` the same of guessing each emotion
        from the true ones before it in its dialogue, cues unseen.
    """
    with labels.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    found = {}
    for name, cues in SETS.items():
        guesses = [decide({cue: row[_COLUMN[cue]] for cue in cues}) for row in rows]
        found[name] = _score(rows, guesses)
    later, guesses = _forecasts(rows)
    return found | {"forecast": _score(later, guesses)}


def forecasts(labels: Path, split: str = "labelled", *, before: int = 10, cues: tuple[str, ...] = ("text", "voice")) -> dict[str, Any]:
    """Forecast each emotion as well as it can be done from what was shown before it: a bound on every forecasting head.

    Asked are utterances whose speaker is that of the utterance two before, as `data.forecast` asks.

    Args:
        labels, split: as of `oracle`.
        before: utterances that are looked at; 2 are source and response, without distant context.
        cues: what is seen of them.

    Returns:
        `accuracy`, `uar` and `predictions` (id → emotion).
    """
    with labels.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    asked, guesses = [], []
    for place, row in enumerate(rows):
        known = [other for other in rows[max(0, place - before) : place] if other["dialogue"] == row["dialogue"]]
        if len(known) >= 2 and known[-2]["speaker"] == row["speaker"]:
            asked.append(row)
            guesses.append(tables.EMOTIONS[int(_filtered(known, row["speaker"], cues).argmax())])
    return _score(asked, guesses)


def _filtered(known: list[dict[str, str]], speaker: str, cues: tuple[str, ...]) -> np.ndarray:
    """Give the distribution of a speaker's next emotion, by exact filtering over the last emotions of both who talk."""
    weight = sum(tables.INERTIA_RANGE) / 2
    follows = weight * np.array(tables.INERTIA)[:, None, :] + (1 - weight) * np.array(tables.INFLUENCE)[None, :, :]
    belief = np.full((4, 4), 1 / 16)  # of this speaker's last emotion and the other's
    for row in known:
        own = belief if row["speaker"] == speaker else belief.T
        seen = posterior({cue: row[_COLUMN[cue]] for cue in cues})
        new = np.einsum("oq,oqc->cq", own, follows) * seen[:, None]
        belief = new / new.sum() if row["speaker"] == speaker else new.T / new.sum()
    return np.einsum("oq,oqc->c", belief, follows)


_COLUMN = {"text": "text_class", "face": "shown_face", "voice": "shown_voice"}


def _score(rows: list[dict[str, str]], guesses: list[str]) -> dict[str, Any]:
    right = {name: [g == name for g, row in zip(guesses, rows, strict=True) if row["label"] == name] for name in tables.EMOTIONS}
    hits = [hit for group in right.values() for hit in group]
    return {
        "accuracy": float(np.mean(hits)),
        "uar": float(np.mean([np.mean(group) for group in right.values() if group])),
        "predictions": {row["id"]: guess for row, guess in zip(rows, guesses, strict=True)},
    }


def _forecasts(rows: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[str]]:
    """Guess each utterance's emotion from its dialogue so far; the speaker's own weight is taken at its mean."""
    weight = sum(tables.INERTIA_RANGE) / 2
    later, guesses = [], []
    last: dict[str, str] = {}
    dialogue = ""
    for row in rows:
        if row["dialogue"] != dialogue:
            dialogue, last = row["dialogue"], {}
        if last:
            other = next((mood for who, mood in last.items() if who != row["speaker"]), None)
            chances = _mixed(last.get(row["speaker"]), other, weight)
            later.append(row)
            guesses.append(tables.EMOTIONS[int(np.argmax(chances))])
        last[row["speaker"]] = row["label"]
    return later, guesses


def _mixed(own: str | None, other: str | None, weight: float) -> np.ndarray:
    """Give the next emotion's distribution; a mood not heard yet is any of the four."""
    index = tables.EMOTIONS.index
    inertia = np.array(tables.INERTIA)[index(own)] if own else np.full(4, 0.25)
    influence = np.array(tables.INFLUENCE)[index(other)] if other else np.full(4, 0.25)
    return weight * inertia + (1 - weight) * influence
