"""MELD: dialogues of Friends, one file per utterance, labelled by emotion and sentiment."""

from __future__ import annotations

import re
from pathlib import Path

from emoscale.config import DataError
from emoscale.prepare.sources import Row, Source
from emoscale.records import read_table

TABLES = {"train": "train_sent_emo.csv", "dev": "dev_sent_emo.csv", "test": "test_sent_emo.csv"}
FOLDERS = {"train": ("train_splits",), "dev": ("dev_splits_complete",), "test": ("output_repeated_splits_test",)}
"""Where the release unpacks the files of each split."""
NUMBER = re.compile(r"[0-9]{1,9}")
COLUMNS = {"Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID"}


def meld(tree: Path) -> list[Source]:
    """List the utterances of a `MELD.Raw` folder, or of its tables alone: without media files the corpus holds text.

    A dialogue is a split with its number, a label holds `emotion`, `sentiment`, `split`, `season` and `episode`. Everybody but the
    six friends is a speaker by name. All of it is from one series: whoever pre-trains on Friends has heard the evaluation part.

    Source: Poria et al. 2019.

    Raises:
        DataError: there is no table, or one lacks a column.
    """
    found = {split: tree / name for split, name in TABLES.items() if (tree / name).is_file()}
    if not found:
        raise DataError(f"{tree}: holds none of {', '.join(TABLES.values())}; name the folder that holds MELD's tables")
    return [source for split, table in found.items() for source in _split(tree, split, table)]


def _split(tree: Path, split: str, table: Path) -> list[Source]:
    columns, listed = read_table(table)
    missing = COLUMNS - set(columns)
    if missing:
        raise DataError(f"{table}: lacks the columns {', '.join(sorted(missing))}; is it MELD's?")
    odd = next(
        (
            f"line {line}: {name} is {row[name]!r}"
            for line, row in enumerate(listed, start=2)
            for name in ("Dialogue_ID", "Utterance_ID")
            if not NUMBER.fullmatch(row[name])
        ),
        None,
    )
    if odd is not None:
        raise DataError(f"{table}, {odd}, a number was expected; is the release damaged?")
    folder = next((tree / name for name in FOLDERS[split] if (tree / name).is_dir()), None)
    dialogues: dict[int, list[Row]] = {}
    for row in listed:
        label = {"emotion": row["Emotion"], "sentiment": row["Sentiment"], "split": split}
        label |= {name: row[name.title()] for name in ("season", "episode") if row.get(name.title())}
        spoken = Row(text=row["Utterance"], speaker=row["Speaker"], dialogue=f"{split}/{row['Dialogue_ID']}", index=int(row["Utterance_ID"]), label=label)
        dialogues.setdefault(int(row["Dialogue_ID"]), []).append(spoken)
    ordered = {number: sorted(rows, key=lambda row: row.index) for number, rows in sorted(dialogues.items())}
    if folder is None:
        return [Source(f"{split}/dia{number}", rows=tuple(rows)) for number, rows in ordered.items()]
    return [_utterance(tree, folder, number, row) for number, rows in ordered.items() for row in rows]


def _utterance(tree: Path, folder: Path, dialogue: int, row: Row) -> Source:
    media = folder / f"dia{dialogue}_utt{row.index}.mp4"
    problem = "" if media.is_file() else f"{media} does not exist"
    return Source(media.relative_to(tree).with_suffix("").as_posix(), media, rows=(row,), problem=problem)
