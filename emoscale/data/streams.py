"""Reading prepared corpora: every record by its number, every shard checked, nothing dropped in silence.

MDS is the format and `streaming` reads it. Its `StreamingDataset` ends an epoch early and normally at a bad or missing shard
and lets forked workers share one connection, so the order, the resume position and the check of every shard are ours.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from emoscale.batch import MODALITIES, RAW, Utterance, columns_of
from emoscale.config import DataError
from emoscale.data.order import permutation
from emoscale.files import file_sha256
from emoscale.kernels.philox import key_of

SCHEMA = 1
LAYOUTS = [columns_of(raw, text_features=more) for raw in ((), ("acoustic",), ("visual",), tuple(RAW)) for more in (False, True)]
"""Columns that a shard may have."""
REMEDY = "copy it from its source, or delete it and run `emoscale prepare` again"


class Utterances(Protocol):
    """A finite, numbered collection of utterances."""

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the corpus they come from."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Utterance: ...


class Corpus:
    """One prepared corpus on disk, read at random by utterance number.

    A shard is hashed once, when it is first opened in a process.

    Raises:
        DataError: the folder is no corpus, its schema is another, or a shard is missing or damaged (named, with the remedy).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = str(folder)
        """What messages call it."""
        self.manifest = read_manifest(self.folder)
        index = _read_json(self.folder / "index.json")
        self._readers: dict[int, Any] = {}
        try:
            self._shards: list[dict[str, Any]] = index["shards"]
            self._firsts = np.cumsum([0, *(shard["samples"] for shard in self._shards)])
            known = self.manifest["counts"]["utterances"]
        except (KeyError, TypeError) as error:
            raise DataError(f"{self.folder}: index.json and manifest.json are not those of a corpus ({error!r}); prepare the corpus again") from error
        if known != len(self):
            raise DataError(f"{self.folder}: index.json counts {len(self)} utterances, manifest.json {known}; run `emoscale prepare` again")

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, number: int) -> Utterance:
        if not 0 <= number < len(self):
            raise IndexError(f"utterance {number} of {len(self)}")
        shard = bisect_right(self._firsts, number) - 1
        reader = self._readers.get(shard) or self._open(shard)
        try:
            return Utterance.from_record(reader.get_item(int(number - self._firsts[shard])))
        except OSError as error:
            name = self._shards[shard]["raw_data"]["basename"]
            raise DataError(f"{self.folder / name}: shard can no longer be read ({error}); {REMEDY}") from error

    def within(self, count: int) -> int:
        """Give how many utterances are numbered below `count` in the whole corpus: all of them."""
        return count

    def sha256(self, count: int) -> str:
        """Hash what the first `count` utterances are; empty where no shard ends there.

        Raises:
            DataError: index.json holds no sha256 for a shard.
        """
        last = bisect_right(self._firsts, count) - 1
        if not 0 <= count <= len(self) or self._firsts[last] != count:
            return ""
        try:
            hashes = [shard["raw_data"]["hashes"]["sha256"] for shard in self._shards[:last]]
        except (KeyError, TypeError) as error:
            raise DataError(f"{self.folder}: index.json holds no sha256 for a shard; prepare the corpus again") from error
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """Leave open readers behind: each worker opens its own."""
        return self.__dict__ | {"_readers": {}}

    def _open(self, shard: int) -> Any:
        from streaming.base.format.mds.reader import MDSReader

        entry = self._shards[shard]
        encodings = dict(zip(entry.get("column_names", []), entry.get("column_encodings", []), strict=False))
        # Any other encoding is refused too: pickle would run what it reads, another width would be read as noise.
        if encodings not in LAYOUTS or "raw_data" not in entry:
            raise DataError(f"{self.folder}: shard columns {encodings} are not an utterance's; prepare the corpus again")
        self._verify(entry["raw_data"])
        self._readers[shard] = MDSReader.from_json(str(self.folder), None, entry)
        return self._readers[shard]

    def _verify(self, entry: dict[str, Any]) -> None:
        path = self.folder / entry["basename"]
        if path.parent.resolve() != self.folder.resolve():
            raise DataError(f"{self.folder}: index.json names {entry['basename']!r}, which lies outside the corpus")
        if not path.is_file():
            raise DataError(f"{path}: shard is missing; {REMEDY}")
        wanted = entry.get("hashes", {}).get("sha256")
        if wanted is None:
            raise DataError(f"{path}: index.json holds no sha256 for this shard; prepare the corpus again")
        if file_sha256(path) != wanted:
            raise DataError(f"{path}: shard is damaged (its sha256 is not the one in index.json); {REMEDY}")


class Joined:
    """Several corpora behind one numbering; they must come from the same encoders.

    Args:
        parts: the corpora.
        stages: how many utterances of each were known at earlier times, oldest first: those keep their numbers, and what came
            later is numbered behind them.
    """

    def __init__(self, parts: Sequence[Corpus | Selected], stages: Sequence[Sequence[int]] = ()) -> None:
        self.parts = parts
        self.manifest = parts[0].manifest
        self._blocks: list[tuple[int, int]] = []
        self._firsts, known = [0], [0] * len(parts)
        for counts in [*stages, [len(part) for part in parts]]:
            for i, count in enumerate(counts):
                if count > known[i]:
                    self._blocks.append((i, known[i]))
                    self._firsts.append(self._firsts[-1] + count - known[i])
                    known[i] = count
        for part in parts[1:]:
            for key, names in {"acoustic": ("encoder", "width"), "visual": ("encoder", "width"), "text_features": ("encoder", "width"), "visual_emotion": ("classes", "teacher_sha256")}.items():
                mine, other = ({k: (m.get(key) or {}).get(k) for k in names} for m in (self.manifest, part.manifest))
                if mine != other:
                    raise DataError(f"{part.name}: {key} features are {other}, those of {parts[0].name} are {mine}; prepare both alike")

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, number: int) -> Utterance:
        if not 0 <= number < len(self):
            raise IndexError(f"utterance {number} of {len(self)}")
        block = bisect_right(self._firsts, number) - 1
        part, first = self._blocks[block]
        return self.parts[part][first + number - self._firsts[block]]

    def number(self, part: int, within: int) -> int:
        """Give the number of an utterance of a part."""
        block = max(i for i, (owner, first) in enumerate(self._blocks) if owner == part and first <= within)
        return self._firsts[block] + within - self._blocks[block][1]


class Selected:
    """Some utterances of a corpus, chosen by their ids (reads every record once).

    Args:
        source: the corpus.
        only: prefix their ids begin with, such as one folder of films; empty = any.
        without: prefixes of ids that are left out, such as those held out for evaluation.
        fraction: share of the films that is kept, whole; smaller shares lie within larger ones.
    """

    def __init__(self, source: Utterances, only: str = "", without: tuple[str, ...] = (), fraction: float = 1.0) -> None:
        self.source = source
        self.name = getattr(source, "name", "")
        self.manifest = source.manifest
        ids = [source[number].id for number in range(len(source))]
        wanted = [(n, name) for n, name in enumerate(ids) if name.startswith(only) and not name.startswith(without)]
        films = sorted({_film(name) for _, name in wanted}, key=lambda film: key_of("corpus share", film))
        kept = set(films[: math.ceil(fraction * len(films))])
        self._numbers = [n for n, name in wanted if _film(name) in kept]
        if not self._numbers:
            raise DataError(f"data.only, data.held_out: no utterance is left; ids look like {ids[0]!r}")

    def __len__(self) -> int:
        return len(self._numbers)

    def within(self, count: int) -> int:
        """Give how many of these are numbered below `count` in the whole corpus."""
        return bisect_left(self._numbers, count)

    def __getitem__(self, number: int) -> Utterance:
        return self.source[self._numbers[number]]


def _film(name: str) -> str:
    """Give the film that an utterance was cut from."""
    return name.rpartition("#")[0]


class Shuffled:
    """A control corpus: text, face and voice of each utterance come from three different utterances, always the same three."""

    def __init__(self, source: Utterances, seed: int) -> None:
        if len(source) < len(MODALITIES):
            raise DataError(f"data.shuffle_modalities: {len(source)} utterances are too few to mix; at least {len(MODALITIES)} are needed")
        self.source = source
        self.manifest = source.manifest
        # Neighbours on one random circle: unlike those of two random permutations, they are never the same utterance.
        circle = permutation(len(source), seed, "shuffle-modalities")
        self._visual, self._acoustic = np.empty_like(circle), np.empty_like(circle)
        self._visual[circle], self._acoustic[circle] = np.roll(circle, -1), np.roll(circle, -2)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> Utterance:
        face, voice = self.source[int(self._visual[number])], self.source[int(self._acoustic[number])]
        return replace(
            self.source[number], visual=face.visual, faces=face.faces, visual_emotion=face.visual_emotion, acoustic=voice.acoustic, audio=voice.audio
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check a corpus' manifest.

    Raises:
        DataError: it is missing, unreadable or of another schema.
    """
    manifest = _read_json(folder / "manifest.json")
    if manifest.get("schema") != SCHEMA:
        raise DataError(f"{folder}: manifest schema is {manifest.get('schema')!r}, this version reads {SCHEMA}; prepare the corpus again")
    return manifest


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: not found; is {path.parent} a corpus that `emoscale prepare` has finished?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); prepare the corpus again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, an object was expected; prepare the corpus again")
    return content
