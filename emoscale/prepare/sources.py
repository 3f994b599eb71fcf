"""Find what there is to prepare: a folder of media, or a CSV / JSONL manifest that names utterances."""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from emoscale.config import DataError
from emoscale.files import can_be_path, parse_json
from emoscale.prepare.container import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from emoscale.prepare.subtitles import SUFFIXES as SUBTITLE_SUFFIXES
from emoscale.records import read_arrays, read_cells, read_lines, read_table
from emoscale.storage import is_remote

MANIFEST_SUFFIXES = (".csv", ".jsonl")
COLUMNS = (
    "path", "start", "end", "text", "speaker", "dialogue", "label", "split", "acoustic", "visual", "visual_emotion", "text_features", "picture",
)  # fmt: skip
FEATURES = ("acoustic", "visual", "visual_emotion", "text_features")


@dataclass(frozen=True)
class Row:
    """One utterance that a manifest names."""

    start: float = 0.0
    """Seconds."""
    end: float = math.inf
    """Seconds; infinite where the manifest leaves it empty: to the end of the file."""
    text: str = ""
    """What is said."""
    speaker: str = ""
    """Who speaks."""
    dialogue: str = ""
    """Name of the conversation; empty leaves one dialogue per source."""
    index: int = 0
    """Place in the conversation, which may run over several files: the order of the manifest."""
    label: dict[str, Any] = field(default_factory=dict)
    """Annotations, with `split` among them where the manifest names one."""
    features: dict[str, str] = field(default_factory=dict)
    """Arrays that take the place of extraction: `file.npy`, `file.npz:key`, `file.csv:3` or `file.csv:3-10`; a table's columns
    by number or name behind an @, `file.csv:3@0..99` or `file.csv:3@f0_mean..jitter`."""
    picture: Path | None = None
    """A picture that stands for the face, taken whole: its middle square."""


@dataclass(frozen=True)
class Source:
    """One input: a media file with what belongs to it, or rows that need no media."""

    name: str
    """Path below the source folder without suffix; the first part of its utterances' ids."""
    path: Path | None = None
    """Media file; None for rows of text or features alone."""
    audio: Path | None = None
    """Sound in a file of its own, used if the media file is silent."""
    subtitles: Path | None = None
    """Subtitle file beside it."""
    rows: tuple[Row, ...] | None = None
    """Utterances named by a manifest; None where subtitles or speech detection cut the file."""
    problem: str = ""
    """Why this input cannot be used, known before it is opened."""

    @property
    def shown(self) -> str:
        """What the ledger calls it."""
        return self.name if self.path is None else self.name + self.path.suffix

    @property
    def encoded(self) -> bool:
        """Whether an encoder looks at anything of it: media, or pictures."""
        return self.path is not None or any(row.picture is not None for row in self.rows or ())

    @property
    def cut_by_speech(self) -> bool:
        """Whether nothing beside it says where its utterances begin and end; subtitles inside it may."""
        return self.path is not None and self.rows is None and self.subtitles is None

    def fingerprint(self) -> str:
        """Give a hash that changes when one of its files or rows does, without reading the media."""
        files = [
            self.path,
            self.audio,
            self.subtitles,
            *sorted({_file_of(ref) for row in self.rows or () for ref in row.features.values()}),
            *(row.picture for row in self.rows or () if row.picture is not None),
        ]
        seen = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) if f and f.is_file() else (str(f), -1, -1) for f in files]
        return hashlib.sha256(repr((self.name, seen, self.rows)).encode()).hexdigest()


def find(source: Path, language: str = "") -> list[Source]:
    """List the inputs of a folder or manifest, ordered by name.

    Args:
        source: a folder (searched with everything below it), a media file, or a `.csv` or `.jsonl` manifest.
        language: subtitle file preferred when several lie beside a film.

    Raises:
        DataError: there is nothing to prepare, or the manifest cannot be understood.
    """
    if source.is_dir():
        found = list(_scan(source, language))
    elif source.is_file() and source.suffix.lower() in MANIFEST_SUFFIXES:
        found = _from_manifest(source)
    elif source.is_file():
        found = [_one(source.with_suffix("").name, [source, *_beside(source)], language)]
    else:
        raise DataError(f"{source}: no such folder or file")
    if not found:
        raise DataError(f"{source}: holds no media file; looked for {' '.join(sorted(VIDEO_SUFFIXES | AUDIO_SUFFIXES))}")
    return sorted(found, key=lambda item: item.name)


def _scan(folder: Path, language: str) -> Iterator[Source]:
    stems: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES | AUDIO_SUFFIXES:
            relative = path.relative_to(folder)
            if not any(part.startswith(".") for part in relative.parts):
                stems.setdefault(relative.with_suffix("").as_posix(), []).append(path)
    for name, files in stems.items():
        yield _one(name, files, language)


def _beside(path: Path) -> list[Path]:
    return [other for other in sorted(path.parent.glob("*")) if other != path and other.stem == path.stem and other.suffix.lower() in AUDIO_SUFFIXES]


def _one(name: str, files: list[Path], language: str) -> Source:
    videos = [f for f in files if f.suffix.lower() in VIDEO_SUFFIXES]
    sounds = [f for f in files if f.suffix.lower() in AUDIO_SUFFIXES]
    main = (videos or sounds or files)[0]
    problem = ""
    if len(videos) > 1 or (not videos and len(sounds) > 1):
        others = ", ".join(f.name for f in files if f != main)
        problem = f"{main.name} and {others} would give utterances of the same name; rename or remove one"
    return Source(name, main, sounds[0] if videos and sounds else None, _subtitles(main, language), problem=problem)


def _subtitles(media: Path, language: str) -> Path | None:
    """Choose `film.srt`, else `film.<language>.srt`; a wanted language goes first."""
    near = [f for f in sorted(media.parent.glob("*")) if f.suffix.lower() in SUBTITLE_SUFFIXES and f.name.startswith(media.stem + ".")]
    tagged = {f: f.name[len(media.stem) + 1 : -len(f.suffix)].strip(".") for f in near}
    tagged = {f: tag for f, tag in tagged.items() if len(tag) <= 8 and "." not in tag}
    order = sorted(
        tagged,
        key=lambda f: (
            tagged[f] != language,
            tagged[f] != "",
            tagged[f],
            SUBTITLE_SUFFIXES.index(f.suffix.lower()),
            f.name,
        ),
    )
    return order[0] if order else None


def _from_manifest(path: Path) -> list[Source]:
    base = path.parent
    groups: dict[tuple[str, Path | None], list[Row]] = {}
    spoken: Counter[str] = Counter()
    for where, row in _rows(path):
        media = _inside(base, row["path"], where) if row.get("path") else None
        item = _row(row, base, where)
        name = _name_of(media, base) if media is not None else item.dialogue or path.stem
        talk = item.dialogue or name
        groups.setdefault((name, media), []).append(replace(item, index=spoken[talk]))
        spoken[talk] += 1
    found = [_listed(name, media, tuple(rows)) for (name, media), rows in groups.items()]
    twice = next((name for name, count in Counter(item.name for item in found).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{path}: {twice!r} names two inputs that differ only in their suffix, or a file and a dialogue; rename one")
    return found


def _listed(name: str, media: Path | None, rows: tuple[Row, ...]) -> Source:
    sound = next((f for f in _beside(media) if media.suffix.lower() in VIDEO_SUFFIXES), None) if media is not None else None
    return Source(name, media, sound, None, rows)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a manifest as (where, row); empty cells are left out."""
    if path.suffix.lower() == ".csv":
        columns, rows = read_table(path)
        if not set(columns) & set(COLUMNS):
            raise DataError(f"{path}: its first line names none of the columns {', '.join(COLUMNS)}")
        for number, row in enumerate(rows, start=2):
            yield f"{path}, line {number}", {key: value for key, value in row.items() if key and value}
        return
    for number, row in read_lines(path):
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: holds {type(row).__name__}, an object was expected")
        yield f"{path}, line {number}", {key: value for key, value in row.items() if value not in (None, "")}


def _row(row: dict[str, Any], base: Path, where: str) -> Row:
    start, end = _number(row, "start", 0.0, where), _number(row, "end", math.inf, where)
    if end <= start or start < 0:
        raise DataError(f"{where}: start {start:g} and end {end:g} do not make a stretch of time")
    references = {}
    for name in FEATURES:
        if name in row:
            file, part = _split(str(row[name]))
            inside = _inside(base, file, where)
            references[name] = f"{inside}:{part}" if part else str(inside)
    if not references and not {"path", "text", "picture"} & row.keys():
        raise DataError(f"{where}: names neither path, text, picture nor features")
    return Row(
        start=start,
        end=end,
        text=" ".join(str(row.get("text", "")).split()),
        speaker=str(row.get("speaker", "")),
        dialogue=str(row.get("dialogue", "")),
        label=_label(row, where),
        features=references,
        picture=_inside(base, row["picture"], where) if "picture" in row else None,
    )


def _number(row: dict[str, Any], key: str, default: float, where: str) -> float:
    try:
        value = float(row.get(key, default))
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: {key} is {row[key]!r}, seconds were expected") from error
    if math.isnan(value):
        raise DataError(f"{where}: {key} is not a number")
    return value


def _label(row: dict[str, Any], where: str) -> dict[str, Any]:
    label = row.get("label", {})
    if isinstance(label, str):
        if label.lstrip().startswith("{"):
            try:
                label = parse_json(label)
            except ValueError as error:
                raise DataError(f"{where}: label looks like JSON and is none ({getattr(error, 'msg', error)})") from error
        else:
            label = {"emotion": label.strip()}
    if not isinstance(label, dict):
        label = {"emotion": label}
    return label | ({"split": str(row["split"])} if "split" in row else {})


def _inside(base: Path, text: str, where: str) -> Path:
    """Resolve a path of a manifest; one that is relative may not leave the manifest's folder."""
    if is_remote(str(text)):
        raise DataError(f"{where}: {text} is a URL; fetch it, and name the file")
    if not isinstance(text, str) or not can_be_path(text):
        raise DataError(f"{where}: {text!r} cannot be the name of a file")
    path = Path(text)
    if not path.name or path.name == "..":
        raise DataError(f"{where}: {text!r} names a folder; name a file")
    if path.is_absolute():
        return path
    depth = 0
    for part in PurePosixPath(path.as_posix()).parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            raise DataError(f"{where}: {text} leaves the folder {base}; write it as an absolute path if that is meant")
    if not (base / path).resolve().is_relative_to(base.resolve()):
        raise DataError(f"{where}: {text} leaves the folder {base} through a link; write it as an absolute path if that is meant")
    return base / path


def _name_of(media: Path, base: Path) -> str:
    relative = media.relative_to(base) if media.is_relative_to(base) else media.relative_to(media.anchor)
    return relative.with_suffix("").as_posix()


def _split(reference: str) -> tuple[str, str]:
    """Part `file.npz:key` and `file.csv:3-10`; a bare file has no part."""
    for suffix in (".npz:", ".csv:"):
        file, found, part = reference.rpartition(suffix)
        if found:
            return file + suffix[:-1], part
    return reference, ""


def _file_of(reference: str) -> Path:
    return Path(_split(reference)[0])


def read_features(reference: str) -> np.ndarray:
    """Load float32 [frames, width] that a manifest names; one vector counts as one frame.

    Raises:
        DataError: no such file, key or rows, or no numbers.
    """
    file, part = _split(reference)
    try:
        array = _from_table(file, part) if file.endswith(".csv") else _from_numpy(file, part)
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such file") from error
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{reference}: not readable as an array of numbers ({error})") from error
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2:
        raise DataError(f"{reference}: has the shape {list(array.shape)}, [frames, width] was expected")
    return array


def _from_numpy(file: str, key: str) -> np.ndarray:
    loaded = _load(file)
    if isinstance(loaded, dict):
        if not key and len(loaded) == 1:
            key = next(iter(loaded))
        if key not in loaded:
            raise DataError(f"{file}: has no array {key!r}; write file.npz:key with one of {', '.join(sorted(loaded)[:8])}")
        loaded = loaded[key]
    return loaded.astype(np.float32)


@functools.lru_cache(maxsize=4)
def _load(file: str) -> Any:
    return read_arrays(file)


def _from_table(file: str, part: str) -> np.ndarray:
    rows, _, columns = part.partition("@")
    first, _, last = rows.partition("-")
    if not first.isdigit() or (last and not last.isdigit()):
        raise DataError(f"{file}:{part}: write file.csv:3 for one row or file.csv:3-10 for several, counted from 0 below the header")
    table = _table(file, columns)
    begin, end = int(first), int(last or first)
    if not begin <= end < len(table):
        raise DataError(f"{file}:{part}: the file has rows 0 to {len(table) - 1}")
    return table[begin : end + 1]


@functools.lru_cache(maxsize=8)
def _table(file: str, columns: str) -> np.ndarray:
    """Read columns of a CSV, all that hold numbers in its first row unless they are named; a first line of words is a header."""
    rows = read_cells(Path(file))
    header: list[str] = []
    if rows and not any(_is_number(cell) for cell in rows[0]):
        header, rows = rows[0], rows[1:]
    if not rows:
        return np.zeros((0, 0), np.float32)
    wanted = _columns(file, columns, header, len(rows[0])) if columns else [i for i, cell in enumerate(rows[0]) if _is_number(cell)]
    return np.array(
        [[float(row[i]) if i < len(row) and _is_number(row[i]) else math.nan for i in wanted] for row in rows],
        np.float32,
    )


def _columns(file: str, columns: str, header: list[str], count: int) -> list[int]:
    """Give the numbers of `first..last`, each a number from 0 or a name of the header."""
    first, _, last = columns.partition("..")
    places = []
    for name in (first, last or first):
        place = header.index(name) if name in header else int(name) if name.isdigit() else -1
        if not 0 <= place < count:
            raise DataError(
                f"{file}@{columns}: {name!r} is no column; write @first..last with {'names of the header or ' if header else ''}numbers from 0 to {count - 1}"
            )
        places.append(place)
    return list(range(places[0], places[1] + 1))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
