"""IEMOCAP: dialogues of two actors, cut and labelled turn by turn."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from emoscale.config import DataError
from emoscale.prepare.sources import Row, Source

CLASSES = {"ang": "anger", "hap": "happy", "exc": "happy", "neu": "neutral", "sad": "sad"}
"""Four classes, excitement with happiness: 5,531 turns of the full release."""
EVALUATED = re.compile(r"\[\s*([\d.]+)\s*-\s*([\d.]+)\s*\]\s+(\S+)\s+(\w+)\s+\[\s*([\d.]+),\s*([\d.]+),\s*([\d.]+)\s*\]")
"""Start, end, turn, emotion, valence, activation, dominance."""
SPOKEN = re.compile(r"(Ses\S+)\s+\[[\d.\s-]+\]:\s*(.*)")
TURN = re.compile(r"(Ses\d\d)[FM]_\w+?_([FM])\w*\d+$")


def iemocap(tree: Path) -> list[Source]:
    """List the dialogues of an `IEMOCAP_full_release` folder.

    A turn's speaker is its session with F or M, its label holds `emotion` (the four classes only), `raw` (the release's own name),
    `valence`, `activation`, `dominance`, `session` and `turn`.

    Source: Busso et al. 2008; the four classes as in MEmoBERT (Zhao et al. 2022) §3.1.

    Raises:
        DataError: the folder holds no session, or a line of labels cannot be understood.
    """
    files = sorted(tree.glob("Session*/dialog/EmoEvaluation/Ses*.txt"))
    if not files:
        raise DataError(f"{tree}: holds no Session*/dialog/EmoEvaluation/Ses*.txt; name the IEMOCAP_full_release folder")
    return [_dialogue(tree, file) for file in files]


def _dialogue(tree: Path, labels: Path) -> Source:
    dialog, name = labels.parent.parent, labels.stem
    spoken = _spoken(dialog / "transcriptions" / f"{name}.txt")
    rows = sorted(_turns(labels, name, spoken), key=lambda row: (row.start, row.label["turn"]))
    rows = [replace(row, index=number) for number, row in enumerate(rows)]
    video = next(iter(sorted((dialog / "avi").rglob(f"{name}.avi"))), None)
    sound = dialog / "wav" / f"{name}.wav"
    media = video or (sound if sound.is_file() else None)
    problem = "" if media else f"neither avi/**/{name}.avi nor wav/{name}.wav lies in {dialog}"
    return Source(
        f"{dialog.parent.relative_to(tree).as_posix()}/{name}", media or dialog / "avi" / f"{name}.avi",
        sound if video and sound.is_file() else None, rows=tuple(rows), problem=problem,
    )  # fmt: skip


def _spoken(file: Path) -> dict[str, str]:
    """Read what was said, turn → text; a release without transcriptions gives none."""
    if not file.is_file():
        return {}
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return {found[1]: " ".join(found[2].split()) for line in lines if (found := SPOKEN.match(line))}


def _turns(file: Path, dialogue: str, spoken: dict[str, str]) -> Iterator[Row]:
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not re.match(r"\[\s*[\d.]+", line):
            continue  # heads, single annotators and blank lines
        found, turn = EVALUATED.match(line), None
        if found is not None:
            turn = TURN.match(found[3])
        if found is None or turn is None:
            raise DataError(f"{file}, line {number}: {line[:80]!r} is no `[start - end] turn emotion [v, a, d]`; is the release damaged?")
        try:
            start, end, valence, activation, dominance = (float(found[place]) for place in (1, 2, 5, 6, 7))
        except ValueError as error:
            raise DataError(f"{file}, line {number}: {error}; is the release damaged?") from error
        label = {"raw": found[4], "session": turn[1], "turn": found[3], "valence": valence, "activation": activation, "dominance": dominance}
        if found[4] in CLASSES:
            label["emotion"] = CLASSES[found[4]]
        yield Row(start=start, end=end, text=spoken.get(found[3], ""), speaker=f"{turn[1]}{turn[2]}", dialogue=dialogue, label=label)
