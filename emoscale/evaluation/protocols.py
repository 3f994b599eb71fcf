"""Which rows train, validate and test: folds of whole speakers, published protocols, label fractions, checkpoints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.sparse import csgraph

from emoscale.config import DataError
from emoscale.evaluation.rows import name_rows

Rows = NDArray[np.int64]
Protocol = Literal["speaker_folds", "leave_one_speaker_out", "official", "memobert_iemocap", "memobert_msp_improv"]
PROTOCOLS = get_args(Protocol)
SPLIT_NAMES = {
    "train": "train", "trn": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "tst": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Fold:
    """Row numbers of one division; they overlap in no row."""

    name: str
    train: Rows
    validation: Rows
    test: Rows
    note: str = ""
    """What a reader must know, such as speakers that parts share."""

    def check(self, speakers: Sequence[str], ids: Sequence[str] = ()) -> None:
        """Refuse a fold with an empty part, a row used twice, or a speaker in two parts.

        Raises:
            DataError: names the speakers and their rows.
        """
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        for part, rows in parts.items():
            if len(rows) == 0:
                raise DataError(f"fold {self.name}: the {part} part is empty; use fewer folds or more speakers")
        who = np.asarray(speakers, str)
        for one, other in itertools.combinations(parts, 2):
            twice = np.intersect1d(parts[one], parts[other])
            if len(twice):
                raise DataError(f"fold {self.name}: {name_rows(twice, ids)} in both {one} and {other}")
            shared = np.intersect1d(who[parts[one]], who[parts[other]])
            if len(shared):
                rows = np.union1d(parts[one], parts[other])
                rows = rows[np.isin(who[rows], shared)]
                raise DataError(
                    f"fold {self.name}: {one} and {other} share {_names(shared.tolist())} in {name_rows(rows, ids)}; each speaker must be in one part"
                )


@dataclass(frozen=True)
class Choice:
    """The checkpoint to report."""

    step: int
    score: float
    """Its score on what it was chosen by."""
    rule: Literal["validation", "paper"]
    flag: str | None
    """A warning to print with every number that comes from this choice; None if it was chosen on validation."""


def make_folds(
    protocol: Protocol,
    speakers: Sequence[str],
    *,
    sessions: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    shared_speakers: bool = False,
    folds: int = 5,
    seed: int = 0,
    ids: Sequence[str] = (),
) -> list[Fold]:
    """Divide a corpus by a named protocol.

    Args:
        protocol: one of `PROTOCOLS`.
        speakers: who speaks in each row.
        sessions: recording session (or dialogue) of each row; the MEmoBERT protocols need it, `speaker_folds` keeps
            each in one part.
        splits: the corpus' own split of each row; needed by `official`.
        shared_speakers: let the parts of `official` share speakers, as MELD's do; the fold's note says so.
        folds: number of folds of `speaker_folds`.
        seed: of `speaker_folds`.
        ids: utterance ids, for error messages.
    """
    match protocol:
        case "speaker_folds":
            return speaker_folds(list(speakers), list(sessions) if sessions else None, folds, seed, ids=ids)
        case "leave_one_speaker_out":
            return leave_one_speaker_out(speakers, ids=ids)
        case "official":
            return [official_split(_needed(splits, "split", protocol), speakers, shared_speakers=shared_speakers, ids=ids)]
        case "memobert_iemocap":
            return memobert_iemocap(speakers, _needed(sessions, "session", protocol), ids=ids)
        case "memobert_msp_improv":
            return memobert_msp_improv(speakers, _needed(sessions, "session", protocol), ids=ids)
    raise ValueError(f"protocol: '{protocol}' is none of {', '.join(PROTOCOLS)}")


def speaker_folds(speakers: list[str], groups: list[str] | None, folds: int, seed: int, *, ids: Sequence[str] = ()) -> list[Fold]:
    """Divide into folds of whole speakers: fold i tests part i, validates on part i + 1, trains on the rest.

    Parts are balanced greedily: the largest block of rows goes to the part with the fewest rows so far.

    Args:
        speakers: who speaks in each row.
        groups: what else may not be torn apart, such as the session or dialogue of each row (empty text: none);
            speakers that share a group stay in one part.
        folds: number of parts, three or more.
        seed: order of blocks of equal size.
        ids: utterance ids, for error messages.

    Raises:
        ValueError: fewer than three folds.
        DataError: a speaker is unknown, or there are fewer blocks than folds.
    """
    if folds < 3:
        raise ValueError(f"folds: {folds}; training, validation and test need three parts or more")
    _known(speakers, "speaker", ids)
    block = _blocks(speakers, groups)
    sizes = np.bincount(block)
    if len(sizes) < folds:
        tied = " (speakers that share a group count as one)" if groups else ""
        raise DataError(f"{len(sizes)} separable speakers{tied} for {folds} folds; use folds={len(sizes)} or fewer")
    order = np.random.default_rng(seed).permutation(len(sizes))
    part_of, filled = np.zeros(len(sizes), np.int64), np.zeros(folds, np.int64)
    for number in sorted(order, key=lambda number: -sizes[number]):
        lightest = int(np.argmin(filled))
        part_of[number] = lightest
        filled[lightest] += sizes[number]
    part = part_of[block]
    return [
        _fold(str(i + 1), part == i, part == (i + 1) % folds, speakers, ids)
        for i in range(folds)
    ]  # fmt: skip


def leave_one_speaker_out(speakers: Sequence[str], *, ids: Sequence[str] = ()) -> list[Fold]:
    """Test each speaker once; the next one by name validates, all others train.

    Raises:
        DataError: a speaker is unknown, or there are fewer than three.
    """
    _known(speakers, "speaker", ids)
    who, names = np.asarray(speakers, str), sorted(set(speakers))
    if len(names) < 3:
        raise DataError(f"{_names(names)}: leaving one speaker out needs three or more, to train, validate and test")
    after = names[1:] + names[:1]
    return [_fold(name, who == name, who == other, speakers, ids) for name, other in zip(names, after, strict=True)]


def official_split(splits: Sequence[str], speakers: Sequence[str] = (), *, shared_speakers: bool = False, ids: Sequence[str] = ()) -> Fold:
    """Take the division that a corpus comes with (`train`, `validation` or `dev`, `test`).

    Args:
        splits: the split column.
        speakers: who speaks in each row; without them disjointness is not checked, and the fold's note says so.
        shared_speakers: accept a division whose parts share speakers (MELD's does, by design); the fold's note says so.
        ids: utterance ids, for error messages.

    Raises:
        DataError: a split is missing or unknown, a part is empty, or parts share a speaker.
    """
    names = [SPLIT_NAMES.get(split.strip().lower(), "") for split in splits]
    bad = np.flatnonzero([not name for name in names])
    if len(bad):
        seen = sorted({repr(splits[row]) for row in bad.tolist()})[:5]
        raise DataError(f"split {', '.join(seen)} in {name_rows(bad, ids)}; known are {', '.join(SPLIT_NAMES)}")
    where = np.asarray(names)
    note = "speakers unknown: not checked whether parts share any" if not speakers else ""
    if speakers and not shared_speakers:
        _known(speakers, "speaker", ids)
    if speakers and shared_speakers:
        who = np.asarray(speakers, str)
        shared = [name for name in np.intersect1d(who[where == "test"], who[where != "test"]).tolist() if name]
        note = f"official split; the test part shares {_names(shared)} with the others" if shared else ""
    own = speakers if speakers and not shared_speakers else [f"row {row}" for row in range(len(splits))]
    return _fold("official", where == "test", where == "validation", own, ids, where == "train", note)


def memobert_iemocap(speakers: Sequence[str], sessions: Sequence[str], *, ids: Sequence[str] = ()) -> list[Fold]:
    """MEmoBERT's ten folds of IEMOCAP: fold 2s − 1 tests one speaker of session s, fold 2s the other.

    The partner validates; the other four sessions train. In fold 2s − 1 the first speaker by name validates.

    Source: MEmoBERT's code, preprocess/iemocap/anote.md (the numbering of the two speakers is ours).

    Raises:
        DataError: not five sessions of two speakers each.
    """
    return _session_pairs(speakers, sessions, 5, ids, first_validates="first")


def memobert_msp_improv(speakers: Sequence[str], sessions: Sequence[str], *, ids: Sequence[str] = ()) -> list[Fold]:
    """MEmoBERT's twelve folds of MSP-IMPROV: ten speakers train, one validates, one tests, both of one session.

    In fold 2s − 1 the man (`M0s`, last by name) validates and the woman (`F0s`) tests; in fold 2s the other way round.

    Source: MEmoBERT's code, preprocess/msp/arrange_data.py.

    Raises:
        DataError: not six sessions of two speakers each.
    """
    return _session_pairs(speakers, sessions, 6, ids, first_validates="last")


def label_fraction(indices: ArrayLike, labels: ArrayLike, fraction: float, seed: int) -> Rows:
    """Keep a share of the labelled rows of every class, at least one per class.

    The same seed gives nested subsets (10 % ⊂ 25 % ⊂ 100 %), whatever the order of `indices`.

    Args:
        indices: row numbers to draw from, such as a fold's training rows.
        labels: class number of every row of the corpus, so that `labels[indices]` are theirs.
        fraction: share to keep, above 0, at most 1.
        seed: of the draw.

    Returns:
        The kept row numbers, ascending.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: {fraction}; give a share above 0 and at most 1, such as 0.1")
    rows, known = np.unique(np.asarray(indices, np.int64)), np.asarray(labels)
    kept = []
    for label in np.unique(known[rows]):
        own = rows[known[rows] == label]
        order = np.random.default_rng([seed, int(label)]).permutation(len(own))
        kept.append(own[order[: max(1, math.floor(fraction * len(own) + 0.5))]])
    return np.sort(np.concatenate(kept)) if kept else rows


def choose_checkpoint(
    validation: Mapping[int, float],
    *,
    rule: Literal["validation", "paper"] = "validation",
    test: Mapping[int, float] | None = None,
) -> Choice:
    """Choose the step with the best score (higher is better; of equal ones the earliest).

    Args:
        validation: step → score on the validation part.
        rule: `validation`, or `paper`: choose on test, as MEmoBERT's published numbers do. That is an upper bound
            which no user can reach, so the choice carries a flag that belongs beside every number.
        test: step → score on the test part; read only by `paper`.

    Raises:
        DataError: no finite score to choose by.
    """
    scores = validation if rule == "validation" else (test or {})
    finite = {step: score for step, score in scores.items() if math.isfinite(score)}
    if not finite:
        part = "validation" if rule == "validation" else "test"
        raise DataError(f"no checkpoint has a finite {part} score ({len(scores)} seen); evaluate at least once before choosing")
    step = min(finite, key=lambda step: (-finite[step], step))
    flag = "Checkpoint chosen on test (rule “paper”): an oracle upper bound, not comparable with scores chosen on validation."
    return Choice(step, finite[step], rule, flag if rule == "paper" else None)


def _session_pairs(
    speakers: Sequence[str],
    sessions: Sequence[str],
    count: int,
    ids: Sequence[str],
    *,
    first_validates: Literal["first", "last"],
) -> list[Fold]:
    _known(speakers, "speaker", ids)
    _known(sessions, "session", ids)
    who, where = np.asarray(speakers, str), np.asarray(sessions, str)
    if len(who) != len(where):
        raise DataError(f"{len(who)} speakers but {len(where)} sessions; both need one per row")
    names = sorted(set(sessions))
    if len(names) != count:
        raise DataError(f"{len(names)} sessions ({', '.join(names[:8])}) where this protocol needs {count}; try speaker_folds")
    folds = []
    for session in names:
        pair = sorted(set(who[where == session].tolist()), reverse=first_validates == "last")
        if len(pair) != 2:
            rows = name_rows(np.flatnonzero(where == session), ids)
            raise DataError(f"session {session} has {len(pair)} speakers ({', '.join(pair)}) in {rows}; this protocol needs two")
        for validation, test in (pair, pair[::-1]):
            number = str(len(folds) + 1)
            folds.append(_fold(number, who == test, who == validation, speakers, ids, where != session))
    return folds


def _fold(
    name: str,
    test: NDArray[np.bool_],
    validation: NDArray[np.bool_],
    speakers: Sequence[str],
    ids: Sequence[str],
    train: NDArray[np.bool_] | None = None,
    note: str = "",
) -> Fold:
    train = ~(test | validation) if train is None else train
    fold = Fold(name, np.flatnonzero(train), np.flatnonzero(validation), np.flatnonzero(test), note)
    fold.check(speakers, ids)
    return fold


def _blocks(speakers: list[str], groups: list[str] | None) -> Rows:
    """Number the smallest sets of rows that share neither a speaker nor a group with one another."""
    if groups is not None and len(groups) != len(speakers):
        raise DataError(f"{len(speakers)} speakers but {len(groups)} groups; both need one per row")
    names, speaker = np.unique(np.asarray(speakers, str), return_inverse=True)
    if groups is None:
        return speaker
    group_names, group = np.unique(np.asarray(groups, str), return_inverse=True)
    tied = np.flatnonzero([bool(name) for name in groups])
    size = len(names) + len(group_names)
    links = sparse.coo_array((np.ones(len(tied)), (speaker[tied], len(names) + group[tied])), shape=(size, size))
    _, component = csgraph.connected_components(links, directed=False)
    return np.unique(component[speaker], return_inverse=True)[1]


def _known(values: Sequence[str], what: str, ids: Sequence[str]) -> None:
    unknown = np.flatnonzero([not value for value in values])
    if len(values) == 0 or len(unknown):
        where = name_rows(unknown, ids) if len(unknown) else "every row: there are none"
        raise DataError(f"{what} unknown in {where}; name the {what} of these rows or leave them out")


def _needed(column: Sequence[str] | None, what: str, protocol: str) -> Sequence[str]:
    if not column:
        raise DataError(f"protocol {protocol} needs the {what} of every row; the corpus has no {what} column")
    return column


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"speaker{'s' if len(names) != 1 else ''} {', '.join(names[:5])}{more}"
