"""MSP-IMPROV: improvised scenes of two actors, one file per turn, labelled by a crowd."""

from __future__ import annotations

import re
from pathlib import Path

from emoscale.config import DataError
from emoscale.prepare.sources import Row, Source

CLASSES = {"A": "anger", "H": "happy", "N": "neutral", "S": "sad"}
LABELS = ("Evalution.txt", "Evaluation.txt")
"""The release spells it the first way."""
EVALUATED = re.compile(r"UTD-IMPROV-(\S+?)\.avi;\s*(\w)\s*;\s*A:\s*([\d.]+|NaN)\s*;\s*V:\s*([\d.]+|NaN)\s*;\s*D:\s*([\d.]+|NaN)")
"""Turn, emotion, activation, valence, dominance."""
TURN = re.compile(r"(S\d\d[A-Z])-([FM]\d\d)-([A-Z])-([FM]{2})(\d+)$")
"""Scene, speaker, kind of recording (P R S T), who answers whom, place in the scene."""


def msp_improv(tree: Path) -> list[Source]:
    """List the turns of an MSP-IMPROV folder (`session*/S**/*/MSP-IMPROV-*.avi`, or `.wav`).

    Speakers are F01 … M06; a session is one woman and one man of the same number. The label holds `emotion` (the four classes
    only), `raw`, `activation`, `valence`, `dominance`, `session` and `turn`; NaN ratings are left out.

    Source: Busso et al. 2017; the four classes as in MEmoBERT (Zhao et al. 2022) §3.1.

    Raises:
        DataError: there is no table of labels, or nothing in it can be understood.
    """
    table = next((tree / name for name in LABELS if (tree / name).is_file()), None)
    if table is None:
        raise DataError(f"{tree}: holds neither {' nor '.join(LABELS)}; name the folder that holds session1 … session6")
    found = [match for line in table.read_text(encoding="utf-8", errors="replace").splitlines() if (match := EVALUATED.match(line))]
    if not found:
        raise DataError(f"{table}: no line reads `UTD-IMPROV-S01A-F01-P-FM01.avi; A; A:…; V:…; D:…`; is the release damaged?")
    media: dict[str, list[Path]] = {}
    texts: dict[str, Path] = {}
    for path in sorted(tree.rglob("MSP-IMPROV-*")):
        name = path.stem.removeprefix("MSP-IMPROV-")
        if path.suffix.lower() in (".avi", ".mp4", ".wav"):
            media.setdefault(name, []).append(path)
        elif path.suffix.lower() == ".txt":
            texts[name] = path
    return [_turn(tree, table, match, media.get(match[1], []), texts.get(match[1])) for match in found]


def _turn(tree: Path, table: Path, found: re.Match[str], files: list[Path], text: Path | None) -> Source:
    parts = TURN.match(found[1])
    if parts is None:
        raise DataError(f"{table}: {found[1]!r} is no turn such as S01A-F01-P-FM01; is the release damaged?")
    scene, speaker, kind, _, place = parts.groups()
    label = {"raw": found[2], "session": f"S{speaker[1:]}", "turn": found[1]}
    try:
        label |= {name: float(found[number]) for number, name in ((3, "activation"), (4, "valence"), (5, "dominance")) if found[number] != "NaN"}
    except ValueError as error:
        raise DataError(f"{table}, {found[1]}: {error}; is the release damaged?") from error
    if found[2] in CLASSES:
        label["emotion"] = CLASSES[found[2]]
    said = " ".join(text.read_text(encoding="utf-8", errors="replace").split()) if text else ""
    row = Row(text=said, speaker=speaker, dialogue=f"S{speaker[1:]}-{scene}-{kind}", index=int(place), label=label)
    video = next((path for path in files if path.suffix.lower() != ".wav"), None)
    sound = next((path for path in files if path.suffix.lower() == ".wav"), None)
    main = video or sound
    name = main.relative_to(tree).with_suffix("").as_posix() if main else found[1]
    problem = "" if main else f"no MSP-IMPROV-{found[1]}.avi or .wav lies below {tree}"
    return Source(name, main or tree / f"{name}.avi", sound if video else None, rows=(row,), problem=problem)
