"""A labelled set of texts with pictures, made of a table of texts and a table of pictures that nobody recorded together.

A text and a picture are put together where age group, gender and emotion agree; given these they are independent, so a model that
sees both can only know more because each is read with errors of its own.

Source: Yun et al. 2023, §IV.B (texts of the Emotional Conversation Corpus, pictures of the Composite Image Data).
"""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emoscale.config import ConfigError, DataError
from emoscale.files import can_be_path, replace_text, stays_inside
from emoscale.kernels.philox import key_of
from emoscale.records import read_table

SPLITS = {"train": 0.8, "valid": 0.1, "test": 0.1}
"""The paper's, by person."""
PROPERTIES = ("age", "gender")
COLUMNS = ("picture", "text", "speaker", "dialogue", "label", "split")
AGES = {
    "10s": "teenager", "20s": "young adult", "30s": "young adult", "40s": "middle-aged", "50s": "middle-aged", "60s": "elderly",
}  # fmt: skip
"""The paper's age groups."""

Table = list[dict[str, str]]


@dataclass
class MatchConfig:
    """Two labelled tables that become one set of texts with pictures; `source` is the manifest that is written of them."""

    texts: str = ""
    """CSV with columns `text,emotion[,age,gender]`; empty = nothing is matched."""
    pictures: str = ""
    """CSV with columns `picture,person,emotion[,age,gender,perceived]`; pictures are named relative to it, and one that is perceived as another
    emotion is left out."""
    ages: dict[str, str] = field(default_factory=lambda: dict(AGES))
    """Age as a table has it → age group; an age that is not named here is its own group."""
    aside: str = ""
    """Emotion that one side gives away, such as `neutral` where its texts come from another source: counted apart."""
    seed: int = 0
    """Of what is left out and of who goes with whom."""

    def validate(self) -> None:
        """Check that there are two tables or none."""
        if bool(self.texts) != bool(self.pictures):
            raise ValueError(f"texts: texts={self.texts!r}, pictures={self.pictures!r}; give both tables")


def match(config: MatchConfig, manifest: Path) -> list[str]:
    """Write the manifest of the matched set, and give lines that count it as the paper's Table I does.

    Of each kind (age group, gender, emotion; what both tables have) as many pairs are made as there are of the scarcer side. A
    text is used once, whatever its case and punctuation, and a person is in one split alone.

    Raises:
        ConfigError: a table does not exist, or the manifest would not be a CSV.
        DataError: a table lacks a column, nothing agrees, or there are fewer than three people.
    """
    if manifest.suffix != ".csv":
        raise ConfigError(f"source: {manifest} will be written as a manifest; name a .csv file")
    texts, pictures = _read(config.texts, ("text", "emotion")), _read(config.pictures, ("picture", "person", "emotion"))
    kind_of = _kinds(config, texts, pictures)
    unlike = sum(row.get("perceived", "") not in ("", row["emotion"]) for row in pictures)
    pictures = _once([row for row in pictures if row.get("perceived", "") in ("", row["emotion"])], lambda row: row["picture"])
    twice = len(texts)
    texts = _once(texts, lambda row: _bare(row["text"]))
    twice -= len(texts)
    pairs = _paired(_by_kind(texts, kind_of), _by_kind(pictures, kind_of), config.seed)
    if not pairs:
        raise DataError(f"{config.texts}, {config.pictures}: no text agrees with any picture in {', '.join(_shared(texts, pictures))} and emotion")
    split_of = _splits(Counter(picture["person"] for _, picture in pairs), config.seed)
    folder = Path(config.pictures).parent.resolve()
    outside = [name for _, row in pairs if not stays_inside(name := row["picture"]) and not (name.startswith("/") and can_be_path(name))]
    if outside:
        raise DataError(f"{config.pictures}: {outside[0]!r} leaves the folder {folder}; write it as an absolute path if that is meant")
    rows = [
        (str(folder / picture["picture"]), text["text"], picture["person"], picture["person"], picture["emotion"], split_of[picture["person"]])
        for text, picture in pairs
    ]
    manifest.parent.mkdir(parents=True, exist_ok=True)
    replace_text(manifest, _csv([COLUMNS, *sorted(rows, key=lambda row: (row[2], row[0]))]))
    left = f"matched: {len(pairs):,} pairs of {len(texts):,} texts ({twice:,} more were there twice) and {len(pictures):,} pictures ({unlike:,} more are perceived otherwise)"
    return [left, *table_one([(row[4], row[5]) for row in rows], aside=config.aside)]


def table_one(rows: Sequence[tuple[str, str]], *, aside: str = "") -> list[str]:
    """Lay (emotion, split) out as the paper's Table I: emotions below one another, splits side by side; and all without one of them."""
    counts = Counter(rows)
    names = [*dict.fromkeys(name for name, _ in sorted(rows) if name != aside), *([aside] if aside and any(name == aside for name, _ in rows) else [])]
    lines = {name: [counts[name, split] for split in SPLITS] for name in names}
    totals = {"all": names, **({f"all but {aside}": names[:-1]} if aside in names else {})}
    lines |= {title: [sum(counts[name, split] for name in kept) for split in SPLITS] for title, kept in totals.items()}
    width = max(map(len, ["emotion", *lines]))
    head = f"{'emotion':<{width}} {'train':>9} {'valid':>9} {'test':>9} {'total':>9}"
    return [head, *(f"{name:<{width}} {' '.join(f'{count:>9,}' for count in (*parts, sum(parts)))}" for name, parts in lines.items())]


def _read(name: str, needed: Sequence[str]) -> Table:
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"match: {path} does not exist; it is a CSV with the columns {', '.join(needed)}")
    rows = [{key: value.strip() for key, value in row.items() if key} for row in read_table(path)[1]]
    lacking = [column for column in needed if not rows or column not in rows[0]]
    if lacking:
        raise DataError(f"{path}: lacks {', '.join(lacking)}; the columns {', '.join(needed)} are needed, in rows of which there must be one")
    empty = [number for number, row in enumerate(rows, start=2) if not all(row[column] for column in needed)]
    if empty:
        raise DataError(
            f"{path}, line {empty[0]}: {', '.join(column for column in needed if not rows[empty[0] - 2][column])} is empty ({len(empty)} such lines)"
        )
    return rows


def _shared(texts: Table, pictures: Table) -> list[str]:
    return [name for name in PROPERTIES if all(rows and name in rows[0] for rows in (texts, pictures))]


def _kinds(config: MatchConfig, texts: Table, pictures: Table) -> Callable[[Mapping[str, str]], tuple[str, ...]]:
    """Give what makes a text and a picture agree."""
    shared = _shared(texts, pictures)

    def kind(row: Mapping[str, str]) -> tuple[str, ...]:
        return (row["emotion"], *(config.ages.get(row[name], row[name]) if name == "age" else row[name] for name in shared))

    return kind


def _once(rows: Table, key: Callable[[dict[str, str]], str]) -> Table:
    return list({key(row): row for row in reversed(rows)}.values())[::-1]


def _bare(text: str) -> str:
    return " ".join("".join(letter if letter.isalnum() else " " for letter in text.casefold()).split())


def _by_kind(rows: Table, kind_of: Callable[[Mapping[str, str]], tuple[str, ...]]) -> dict[tuple[str, ...], Table]:
    found: dict[tuple[str, ...], Table] = defaultdict(list)
    for row in rows:
        found[kind_of(row)].append(row)
    return found


def _paired(texts: Mapping[tuple[str, ...], Table], pictures: Mapping[tuple[str, ...], Table], seed: int) -> list[tuple[dict[str, str], dict[str, str]]]:
    pairs = []
    for kind in sorted(texts.keys() & pictures.keys()):
        # A drawing by keys of the rows' own content: adding a row elsewhere changes nothing here.
        said = sorted(texts[kind], key=lambda row: key_of(seed, "text", row["text"]))
        seen = sorted(pictures[kind], key=lambda row: key_of(seed, "picture", row["picture"]))
        pairs += list(zip(said, seen, strict=False))
    return pairs


def _splits(pictures: Mapping[str, int], seed: int) -> dict[str, str]:
    """Give each person a split: who has most pictures first, always to where the largest share is still missing."""
    if len(pictures) < len(SPLITS):
        raise DataError(f"{len(pictures)} people cannot be in {len(SPLITS)} splits; at least {len(SPLITS)} are needed")
    total, held, found = sum(pictures.values()), dict.fromkeys(SPLITS, 0), {}
    for person in sorted(pictures, key=lambda name: (-pictures[name], key_of(seed, "person", name))):
        split = max(SPLITS, key=lambda name: (SPLITS[name] * total - held[name]) / (SPLITS[name] * total))
        found[person] = split
        held[split] += pictures[person]
    return found


def _csv(rows: Sequence[Sequence[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()
