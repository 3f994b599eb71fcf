"""Labelled utterances: a corpus, a table of labels, and the classes they are scored in."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emoscale.batch import MODALITIES, Utterance
from emoscale.config import ConfigError, DataError
from emoscale.data.collate import Encoded, Encoder
from emoscale.data.streams import Utterances
from emoscale.data.tokens import Features, TextEncoder

SHOWN = 5


@dataclass
class LabelledSet:
    """Labelled utterances in memory, in the order of the corpus; an `Utterances` of its own."""

    manifest: dict[str, Any]
    utterances: list[Utterance]
    labels: np.ndarray
    """int64 [n]: class of each utterance."""
    classes: list[str]
    speakers: list[str]
    groups: list[str]
    """Speakers who share a group stay in one fold; empty where the table names none."""
    sessions: list[str]
    splits: list[str]

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, number: int) -> Utterance:
        return self.utterances[number]

    @property
    def ids(self) -> list[str]:
        """Names of the utterances."""
        return [item.id for item in self.utterances]


@dataclass
class Part:
    """Some rows of a labelled set, as an `Utterances`."""

    whole: LabelledSet
    rows: np.ndarray

    @property
    def manifest(self) -> dict[str, Any]:
        """The corpus' manifest."""
        return self.whole.manifest

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Utterance:
        return self.whole[int(self.rows[number])]


class LabelEncoder(Encoder):
    """Encodes labelled utterances: with their class, with a prompt where a template is given, and once only.

    Args:
        text, visual, acoustic, classes: see `Encoder`.
        labels: utterance id → class number.
        template: prompt behind the text with one [MASK]; empty = none.
        modalities: those kept; the others are as if absent.
    """

    def __init__(
        self, text: TextEncoder, visual: Features, acoustic: Features, classes: int, *, labels: dict[str, int], template: str,
        modalities: list[str],
    ) -> None:
        super().__init__(text, visual, acoustic, classes)
        self.labels, self.template, self.modalities = labels, template, frozenset(modalities)
        self._known: dict[str, Encoded | None] = {}

    def __call__(self, utterance: Utterance, turn: int = 0) -> Encoded | None:
        """Encode one utterance; None where a feature is not finite."""
        if utterance.id not in self._known:
            self._known[utterance.id] = self._encode(utterance)
        return self._known[utterance.id]

    def _encode(self, utterance: Utterance) -> Encoded | None:
        kept = Utterance(id=utterance.id, text=utterance.text if "text" in self.modalities else "")
        if "visual" in self.modalities:
            kept.visual, kept.visual_emotion = utterance.visual, utterance.visual_emotion
        if "acoustic" in self.modalities:
            kept.acoustic = utterance.acoustic
        item = super().__call__(kept)
        if item is None:
            return None
        item.label = self.labels.get(utterance.id, 0)
        if self.template:
            item.tokens = self.text(kept.text, self.template)
            item.prompt = int(np.flatnonzero(item.tokens.ids == self.text.mask)[-1])
        return item


def read_labels(table: str, corpus: Utterances, key: str) -> dict[str, dict[str, str]]:
    """Give rows by utterance id, from a CSV with columns `id,<key>[,speaker,group,session,split]` or from the corpus' records.

    Raises:
        DataError: the table lacks a column, names an id twice, or names none of the corpus.
    """
    if not table:
        rows = {}
        for number in range(len(corpus)):
            item = corpus[number]
            if key in item.label:
                rows[item.id] = {name: str(value) for name, value in item.label.items()} | {"speaker": item.speaker}
        return rows
    path = Path(table)
    if not path.is_file():
        raise ConfigError(f"labels: {path} does not exist; give a CSV with columns id,{key},speaker, or leave it empty")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = {"id", key} - set(reader.fieldnames or ())
        if missing:
            raise DataError(f"{path}: lacks the columns {', '.join(sorted(missing))}; it has {', '.join(reader.fieldnames or ())}")
        listed = list(reader)
    twice = [name for name, count in Counter(row["id"] for row in listed).items() if count > 1]
    if twice:
        raise DataError(f"{path}: {len(twice)} ids stand there more than once: {', '.join(twice[:SHOWN])}")
    return {row["id"]: row for row in listed}


def labelled_set(corpus: Utterances, rows: dict[str, dict[str, str]], *, key: str, classes: list[str], only: str) -> LabelledSet:
    """Join a corpus with its labels.

    Args:
        rows: see `read_labels`.
        key: column that holds the label.
        classes: those scored, in this order; rows of other classes are an error. Empty = all that occur, sorted.
        only: prefix of the ids that are used.

    Raises:
        DataError: labels are missing, unknown or of a single class (rows are named).
    """
    found = [corpus[number] for number in range(len(corpus))]
    items = [item for item in found if item.id in rows and item.id.startswith(only) and rows[item.id].get(key, "")]
    if not items:
        raise DataError(f"no utterance of the corpus has a label {key!r}; ids look like {found[0].id!r}, the table's like {next(iter(rows), 'none')!r}")
    named = [rows[item.id][key] for item in items]
    classes = classes or sorted(set(named))
    unknown = [f"{item.id} ({name})" for item, name in zip(items, named, strict=True) if name not in classes]
    if unknown:
        raise DataError(f"{len(unknown)} rows have a label that is none of {', '.join(classes)}: {', '.join(unknown[:SHOWN])}; name it in classes")
    if len(set(named)) < 2:
        raise DataError(f"all {len(items)} rows have the label {named[0]!r}; at least two classes are needed ({items[0].id}, …)")
    column = lambda name: [rows[item.id].get(name, "") or "" for item in items]  # noqa: E731  # four uses, one line each
    return LabelledSet(
        corpus.manifest, items, np.array([classes.index(name) for name in named]), classes,
        [rows[item.id].get("speaker") or item.speaker for item in items], column("group"), column("session"), column("split"),
    )


def check_modalities(names: list[str]) -> None:
    """Raise where a name is no modality."""
    wrong = [name for name in names if name not in MODALITIES]
    if wrong or not names:
        raise ConfigError(f"modalities: {wrong or 'empty'}; choose among {', '.join(MODALITIES)}")
