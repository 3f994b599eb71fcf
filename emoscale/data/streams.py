"""Reading prepared corpora: every record by its number, every shard checked, nothing dropped in silence.

MDS is the format and `streaming` writes it. Its `StreamingDataset` ends an epoch early and normally at a bad or missing shard
and lets forked workers share one connection, so the order, the resume position and the check of every shard are ours.
"""

from __future__ import annotations

import hashlib
import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from mmap import mmap
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from emoscale.batch import MODALITIES, RAW, Utterance, columns_of
from emoscale.config import DataError
from emoscale.data.mds import ShardReader
from emoscale.data.order import permutation
from emoscale.files import file_sha256
from emoscale.forms import Index, Manifest
from emoscale.kernels.philox import key_of
from emoscale.records import check, read_json

SCHEMA = 1
LAYOUTS = [columns_of(raw, text_features=more) for raw in ((), ("acoustic",), ("visual",), tuple(RAW)) for more in (False, True)]
"""Columns that a shard may have."""
PREPARED = "is this a corpus that `emoscale prepare` has finished?"
REMEDY = "copy it from its source, or delete it and run `emoscale prepare` again"


class Utterances(Protocol):
    """A finite, numbered collection of utterances."""

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the corpus they come from."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Utterance: ...


Spans = Sequence[tuple[int, int]]
"""Stretches of a collection: (first, behind the last)."""


class Corpus:
    """One prepared corpus on disk, read at random by utterance number.

    A shard is hashed once, when it is first opened by a process or by the loader workers that it forks.

    Raises:
        DataError: the folder is no corpus, its schema is another, or a shard is missing or damaged (named, with the remedy).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = str(folder)
        """What messages call it."""
        self.manifest = read_manifest(self.folder)
        index: Any = read_json(self.folder / "index.json", Index, PREPARED)
        self._readers: dict[int, ShardReader] = {}
        self._shards: list[dict[str, Any]] = index["shards"]
        self._firsts: list[int] = np.cumsum([0, *(shard["samples"] for shard in self._shards)]).tolist()
        known = self.manifest.get("counts", {}).get("utterances")
        if known != len(self):
            raise DataError(f"{self.folder}: index.json counts {len(self)} utterances, manifest.json {known}; run `emoscale prepare` again")
        self._verified: mmap | bytearray = mmap(-1, len(self._shards) + 1)
        """One byte per shard, in memory that forked workers share: 64 MB take 50 ms to hash, 550 records as long to read."""

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, number: int) -> Utterance:
        if not 0 <= number < self._firsts[-1]:
            raise IndexError(f"utterance {number} of {len(self)}")
        shard = bisect_right(self._firsts, number) - 1
        reader = self._readers.get(shard) or self._open(shard)
        try:
            return Utterance.from_record(reader[number - self._firsts[shard]])
        except OSError as error:
            raise DataError(f"{self._path(shard)}: shard can no longer be read ({error}); {REMEDY}") from error
        except (ValueError, TypeError) as error:  # the right hash of wrong bytes: somebody wrote it so
            raise DataError(f"{self._path(shard)}: record {number - self._firsts[shard]} is no utterance ({error}); {REMEDY}") from error

    def within(self, count: int) -> int:
        """Give how many utterances are numbered below `count` in the whole corpus: all of them."""
        return count

    def cuts(self) -> list[int]:
        """Give the utterances at which shards begin."""
        return [first for first, end in pairwise(self._firsts) if end > first]

    def expect(self, now: Spans, soon: Spans) -> None:
        """Hear which utterances are read now, and which after them; what lies on a disk needs no preparation."""

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
        """Leave readers behind: each worker opens its own; memory that is shared by a fork goes as a copy."""
        return self.__dict__ | {"_readers": {}, "_verified": bytearray(self._verified)}

    def _open(self, shard: int) -> ShardReader:
        entry = self._shards[shard]
        names, kinds = entry.get("column_names", []), entry.get("column_encodings", [])
        encodings = dict(zip(names, kinds, strict=False))
        # Any other encoding is refused too: pickle would run what it reads, another width would be read as noise.
        if encodings not in LAYOUTS or not len(names) == len(kinds) == len(encodings):
            raise DataError(f"{self.folder}: shard columns {encodings} are not an utterance's; prepare the corpus again")
        if not self._verified[shard]:
            self._verify(entry["raw_data"])
            self._verified[shard] = 1
        self._check_places(shard, entry["samples"])
        # What the index says of sizes and compression besides is not believed.
        self._readers[shard] = ShardReader(self._path(shard), names, kinds, entry["samples"])
        return self._readers[shard]

    def _path(self, shard: int) -> Path:
        return self.folder / self._shards[shard]["raw_data"]["basename"]

    def _check_places(self, shard: int, samples: int) -> None:
        """Look at the shard's own table, which must be that of `samples` records within the file.

        Raises:
            DataError: it is not, or the file has gone meanwhile.
        """
        path = self._path(shard)
        try:
            with path.open("rb") as file:
                size, wanted = os.fstat(file.fileno()).st_size, 4 * (samples + 2)
                table = np.frombuffer(file.read(wanted) if wanted <= size else b"\0", "<u1")
        except OSError as error:
            raise DataError(f"{path}: shard can no longer be read ({error}); {REMEDY}") from error
        count, *places = table.view("<u4").tolist() if wanted <= size else (-1,)
        if count != samples or places != sorted(places) or places[0] < wanted or places[-1] > size:
            raise DataError(f"{path}: its table is not that of {samples} records, which index.json counts; {REMEDY}")

    def _verify(self, entry: dict[str, Any]) -> None:
        path = self.folder / entry["basename"]
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
            for key, names in {
                "acoustic": ("encoder", "width"),
                "visual": ("encoder", "width"),
                "text_features": ("encoder", "width"),
                "visual_emotion": ("classes", "teacher_sha256"),
            }.items():
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

    def cuts(self) -> list[int]:
        """Give the utterances at which a shard of a part begins, or a stretch of it."""
        found: set[int] = set()
        for (part, first), begins, ends in zip(self._blocks, self._firsts[:-1], self._firsts[1:], strict=True):
            found |= {begins, *(begins + cut - first for cut in self.parts[part].cuts() if first < cut < first + ends - begins)}
        return sorted(found)

    def expect(self, now: Spans, soon: Spans) -> None:
        """Tell each part what is read of it."""
        told = [self._by_part(spans) for spans in (now, soon)]
        for i, part in enumerate(self.parts):
            part.expect(told[0][i], told[1][i])

    def _by_part(self, spans: Spans) -> list[list[tuple[int, int]]]:
        found: list[list[tuple[int, int]]] = [[] for _ in self.parts]
        for (part, own), begins, ends in zip(self._blocks, self._firsts[:-1], self._firsts[1:], strict=True):
            found[part] += [(max(first, begins) + own - begins, min(end, ends) + own - begins) for first, end in spans if first < ends and end > begins]
        return found

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

    def __init__(self, source: Corpus, only: str = "", without: tuple[str, ...] = (), fraction: float = 1.0) -> None:
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

    def cuts(self) -> list[int]:
        """Give the chosen utterances with which a shard begins to be read."""
        shards = np.searchsorted(self.source.cuts(), self._numbers, side="right")
        return np.flatnonzero(np.diff(shards, prepend=-1)).tolist()

    def expect(self, now: Spans, soon: Spans) -> None:
        """Tell the source; between two that are chosen, others may lie."""
        told = ([(self._numbers[first], self._numbers[end - 1] + 1) for first, end in spans] for spans in (now, soon))
        self.source.expect(*told)

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
    path = folder / "manifest.json"
    manifest: Any = read_json(path, dict[str, Any], PREPARED)
    if manifest.get("schema") != SCHEMA:
        raise DataError(f"{folder}: manifest schema is {manifest.get('schema')!r}, this version reads {SCHEMA}; prepare the corpus again")
    return check(manifest, Manifest, path, "prepare the corpus again")  # type: ignore[return-value]  # a dictionary
