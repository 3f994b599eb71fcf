"""Labelled utterances: a corpus, a table of labels, and the classes they are scored in."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from emoscale.batch import MODALITIES, Batch, Utterance
from emoscale.config import ConfigError, DataError, differences
from emoscale.data.collate import Encoded, Encoder, pack, split, utterance_or_none
from emoscale.data.dialogues import DialogueBatch
from emoscale.data.loader import Steps
from emoscale.data.streams import Utterances
from emoscale.data.tokens import Features, TextEncoder
from emoscale.records import read_table

log = logging.getLogger("emoscale")
SHOWN = 5
"""Rows an error names."""


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
    before: dict[str, list[Utterance]] = field(default_factory=dict)
    """Where utterances are forecast: id → those before it in its dialogue, the oldest first."""

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
    """Encodes labelled utterances: with their class, and with a prompt where a template is given.

    No head reads the expression teacher's answers, so a corpus without a teacher does as well.

    Args:
        text, visual, acoustic: see `Encoder`.
        labels: utterance id → class number; an utterance that is not named counts as class 0, which only a loss reads.
        template: prompt around the text, with one `{text}` and one `[MASK]`; empty = none.
        modalities: those kept; the others are as if absent.
        remember: encode each id once only; for a set whose ids are unique, and that is read again and again.
    """

    def __init__(
        self,
        text: TextEncoder,
        visual: Features,
        acoustic: Features,
        *,
        labels: dict[str, int],
        template: str,
        modalities: list[str],
        remember: bool = False,
        text_features: Features | None = None,
    ) -> None:
        super().__init__(text, visual, acoustic, 0, text_features)
        self.labels, self.template, self.modalities = labels, template, frozenset(modalities)
        self._known: dict[str, Encoded | None] | None = {} if remember else None

    def __call__(self, utterance: Utterance, turn: int = 0) -> Encoded | None:
        """Encode one utterance; None where a feature is not finite."""
        if self._known is None:
            return self._encode(utterance)
        if utterance.id not in self._known:
            self._known[utterance.id] = self._encode(utterance)
        return self._known[utterance.id]

    def batches(self, part: Part, max_tokens: int) -> Iterator[Batch | DialogueBatch]:
        """Pack every utterance of a part once, in any order.

        Raises:
            DataError: some have features that are not finite (named).
        """
        items = [self(part[row]) for row in range(len(part))]
        unusable = [part[row].id for row, item in enumerate(items) if item is None]
        refuse_unusable(unusable)
        return map(pack, split([item for item in items if item is not None], max_tokens))

    def packed(self, part: Part, max_tokens: int) -> Iterator[Batch | DialogueBatch]:
        """Pack every utterance of a part whose features are finite once, those of like length together."""
        items = [item for row in range(len(part)) if (item := self(part[row])) is not None]
        return map(pack, split(items, max_tokens))

    def unusable(self, utterance: Utterance) -> list[str]:
        """Name what is looked at of an utterance and has features that are not finite."""
        return [] if self(utterance) is not None else [utterance.id]

    def learns_from(self, utterance: Utterance) -> bool:
        """Whether a training step takes an utterance; it does not where nothing is there to be looked at."""
        return utterance_or_none(utterance, self, 0) is not None

    def steps(self, part: Part, **given: Any) -> Steps:
        """Give the training sequence over a part; the rest is said as to `Steps`."""
        return Steps(part, encoder=self, plan=None, **given)

    def _encode(self, utterance: Utterance) -> Encoded | None:
        kept = Utterance(id=utterance.id, text=utterance.text if "text" in self.modalities else "")
        if "text" in self.modalities:
            kept.text_features = utterance.text_features
        if "visual" in self.modalities:
            kept.visual, kept.faces = utterance.visual, utterance.faces
        if "acoustic" in self.modalities:
            kept.acoustic, kept.audio = utterance.acoustic, utterance.audio
        item = super().__call__(kept)
        if item is None:
            return None
        item.label = self.labels.get(utterance.id, 0)
        if self.template:
            item = item.prompted(self.text, self.template)
        return item


def refuse_unusable(names: list[str]) -> None:
    """Raise where utterances that are to be scored have features that are not finite."""
    if names:
        raise DataError(f"{len(names)} utterances have features that are not finite, and cannot be scored: {', '.join(names[:SHOWN])}")


def default_key(table: str) -> str:
    """Give where the class stands if nobody says: in the column `label` of a CSV, under `emotion` in a corpus' own records."""
    return "label" if table else "emotion"


def read_labels(table: str, corpus: Utterances, key: str) -> dict[str, dict[str, str]]:
    """Give rows by utterance id, from a CSV with columns `id,<key>[,speaker,group,session,split]` or from the corpus' records.

    Raises:
        ConfigError: there is no such table.
        DataError: the table lacks a column, or names an id twice.
    """
    if not table:
        rows = {}
        for number in range(len(corpus)):
            item = corpus[number]
            if key in item.label:
                rows[item.id] = {name: "" if value is None else str(value) for name, value in item.label.items()} | {"speaker": item.speaker}
        return rows
    path = Path(table)
    if not path.is_file():
        raise ConfigError(f"labels: {path} does not exist; give a CSV with columns id,{key},speaker, or leave it empty")
    columns, listed = read_table(path)
    missing = {"id", key} - set(columns)
    if missing:
        raise DataError(f"{path}: lacks the columns {', '.join(sorted(missing))}; it has {', '.join(columns)}")
    twice = [name for name, count in Counter(row["id"] for row in listed).items() if count > 1]
    if twice:
        raise DataError(f"{path}: {len(twice)} ids stand there more than once: {_shown(twice)}")
    return {row["id"]: row for row in listed}


def labelled_set(corpus: Utterances, rows: dict[str, dict[str, str]], *, key: str, classes: list[str], only: str) -> LabelledSet:
    """Join a corpus with its labels; an utterance without a row is no part of the set, a row without an utterance is named on the log.

    Args:
        rows: see `read_labels`.
        key: column that holds the label.
        classes: those scored, in this order; rows of other classes are an error. Empty = all that occur, sorted.
        only: prefix of the ids that are used.

    Raises:
        DataError: labels are missing, unknown or of a single class, or an id occurs twice (rows are named).
    """
    # The other utterances may be a pre-training corpus: they are not kept in memory.
    items = [item for item in map(corpus.__getitem__, range(len(corpus))) if item.id in rows and item.id.startswith(only)]
    if not items:
        within = f" beginning with {only!r}" if only else ""
        raise DataError(f"no utterance{within} has a row of labels; the corpus' ids look like {corpus[0].id!r}, the table's like {next(iter(rows), 'none')!r}")
    twice = [name for name, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise DataError(f"{len(twice)} ids stand in the corpus more than once: {_shown(twice)}; prepare it again")
    blank = [item.id for item in items if not (rows[item.id].get(key) or "").strip()]
    if blank:
        raise DataError(f"{len(blank)} rows have no {key}: {_shown(blank)}; label them, or remove them from the table")
    gone = sorted(name for name in rows.keys() - {item.id for item in items} if name.startswith(only))
    if gone:
        log.warning("%d labelled rows have no utterance in the corpus, and count nowhere: %s", len(gone), _shown(gone))
    named = [rows[item.id][key] for item in items]
    classes = classes or sorted(set(named))
    unknown = [f"{item.id} ({name})" for item, name in zip(items, named, strict=True) if name not in classes]
    if unknown:
        raise DataError(f"{len(unknown)} rows have a label that is none of {', '.join(classes)}: {_shown(unknown)}; name it in classes")
    if len(set(named)) < 2:
        raise DataError(f"all {len(items)} rows have the label {named[0]!r}; at least two classes are needed ({items[0].id}, …)")
    column = lambda name: [rows[item.id].get(name, "") or "" for item in items]  # noqa: E731  # four uses, one line each
    return LabelledSet(
        corpus.manifest,
        items,
        np.array([classes.index(name) for name in named]),
        classes,
        [rows[item.id].get("speaker") or item.speaker for item in items],
        column("group"),
        column("session"),
        column("split"),
    )


def check_encoders(theirs: dict[str, Any], mine: dict[str, Any], corpus: str) -> None:
    """Raise where a corpus' features are not those a model was trained on.

    Args:
        theirs, mine: manifest of the model and of the corpus.
        corpus: name of the corpus, for the message.
    """
    for key in ("visual", "acoustic", "text_features"):
        old, new = ({name: (manifest.get(key) or {}).get(name) for name in ("encoder", "width")} for manifest in (theirs, mine))
        odd = differences(old, new)
        if odd:
            raise DataError(f"{corpus}: its {key} features come from another encoder than the model's ({'; '.join(odd)}); prepare it alike")


def _shown(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def check_modalities(names: list[str]) -> None:
    """Raise where a name is no modality."""
    wrong = [name for name in names if name not in MODALITIES]
    if wrong or not names:
        raise ConfigError(f"modalities: {wrong or 'empty'}; choose among {', '.join(MODALITIES)}")
