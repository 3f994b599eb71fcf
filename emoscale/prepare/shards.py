"""MDS shards with their manifest and ledger: written, replaced, verified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from emoscale.batch import Utterance, columns_of
from emoscale.codecs import count_faces, count_samples
from emoscale.config import DataError
from emoscale.files import file_sha256
from emoscale.forms import Index, Listing, Manifest
from emoscale.imports import import_alone
from emoscale.prepare.parts import PARTS
from emoscale.records import read_json

SCHEMA = 1
MANIFEST, LEDGER, INDEX, TOKENIZER = "manifest.json", "ledger.jsonl", "index.json", "tokenizer"


MEASURED = ("acoustic", "visual", "text_features")
"""What a manifest holds normalisation constants of."""


@dataclass
class Statistics:
    """Counts and sums over the utterances of a corpus, in their order."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    """What the manifest says under `counts`."""
    _frames: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MEASURED, 0))
    _sums: dict[str, np.ndarray] = field(default_factory=dict)
    _squares: dict[str, np.ndarray] = field(default_factory=dict)
    _dialogues: set[str] = field(default_factory=set)
    _speakers: set[str] = field(default_factory=set)

    def add(self, utterance: Utterance, widths: dict[str, int]) -> None:
        """Count one utterance; `widths` as in `write_shards`."""
        counts = self.counts
        counts["utterances"] += 1
        counts["words"] += len(utterance.text.split())
        counts["without_text"] += not utterance.has("text")
        counts["without_audio"] += not utterance.has("acoustic")
        counts["without_face"] += not utterance.has("visual")
        self._dialogues.add(utterance.dialogue)
        self._speakers.update({utterance.speaker} - {""})
        for name in MEASURED:
            values = getattr(utterance, name).astype(np.float64)
            self._frames[name] += len(values)
            if f"{name}_frames" in counts:
                counts[f"{name}_frames"] += len(values) or _raw_frames(utterance, name, widths[name])
            if len(values):
                self._sums[name] = self._sums.get(name, 0.0) + values.sum(axis=0)
                self._squares[name] = self._squares.get(name, 0.0) + np.square(values).sum(axis=0)
        counts["dialogues"], counts["speakers"] = len(self._dialogues), len(self._speakers)

    def record(self) -> dict[str, Any]:
        """Give what `from_record` needs to go on counting."""
        sums = {name: [self._sums[name].tolist(), self._squares[name].tolist()] for name in self._sums}
        return {"counts": self.counts, "frames": self._frames, "sums": sums, "dialogues": sorted(self._dialogues), "speakers": sorted(self._speakers)}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Statistics:
        """Go on counting where another assembly ended."""
        sums = {name: (np.array(first), np.array(second)) for name, (first, second) in record["sums"].items()}
        return cls(
            dict(record["counts"]),
            dict(record["frames"]),
            {name: first for name, (first, _) in sums.items()},
            {name: second for name, (_, second) in sums.items()},
            set(record["dialogues"]),
            set(record["speakers"]),
        )

    def mean_std(self, name: str, width: int) -> tuple[list[float], list[float]]:
        """Give the normalisation constants of a modality; a value that never changes keeps its scale."""
        frames = self._frames[name]
        if not frames:
            return [0.0] * width, [1.0] * width
        mean = self._sums[name] / frames
        variance = np.maximum(self._squares[name] / frames - np.square(mean), 0.0)
        std = np.sqrt(variance)
        return mean.tolist(), np.where(std > 1e-4, std, 1.0).tolist()


COUNTS = (
    "utterances",
    "dialogues",
    "speakers",
    "files",
    "words",
    "acoustic_frames",
    "visual_frames",
    "without_text",
    "without_audio",
    "without_face",
)


def write_shards(
    utterances: Iterable[Utterance], widths: dict[str, int], folder: Path, shard_bytes: int, statistics: Statistics, raw: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Write utterances to MDS shards in the order given.

    Args:
        utterances: what to write; checked to have the same widths.
        widths: columns of `acoustic`, `visual`, `visual_emotion` and, where the corpus has them, `text_features`.
        folder: new folder for `shard.*.mds` and `index.json`.
        shard_bytes: largest size of a shard.
        statistics: counts every utterance.
        raw: modalities stored as they were recorded.

    Returns:
        The `shards` of the manifest.
    """
    columns = columns_of(raw, text_features="text_features" in widths)
    writers = import_alone("streaming.base.format.mds.writer")
    with writers.MDSWriter(columns=columns, out=str(folder), hashes=["sha256"], size_limit=shard_bytes) as writer:
        for utterance in utterances:
            _fit(utterance, widths)
            statistics.add(utterance, widths)
            writer.write(utterance.record(raw))
    return listed(json.loads((folder / INDEX).read_text())["shards"])


def listed(shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the `shards` of a manifest for those of an index."""
    return [
        {
            "file": shard["raw_data"]["basename"],
            "sha256": shard["raw_data"]["hashes"]["sha256"],
            "utterances": shard["samples"],
        }
        for shard in shards
    ]


def _raw_frames(utterance: Utterance, modality: str, width: int) -> int:
    """Give how many frames are kept raw."""
    if modality == "visual":
        return count_faces(utterance.faces)
    return count_samples(utterance.audio) // width if utterance.audio else 0


def _fit(utterance: Utterance, widths: dict[str, int]) -> None:
    """Give an empty modality the width of the corpus; any other width is an error."""
    for name, width in widths.items():
        values = getattr(utterance, name)
        if not len(values):
            setattr(utterance, name, np.zeros((0, width), np.float16))
        elif values.shape[1] != width:
            raise DataError(f"{utterance.id}: {name} has {values.shape[1]} values per frame, the corpus has {width}; use one encoder for all inputs")


def publish(fresh: Path, folder: Path) -> None:
    """Put a finished corpus in the place of the one before; parts and teacher stay.

    The old manifest goes first and the new one comes last: whoever finds a manifest finds the shards it lists.
    """
    manifest = folder / MANIFEST
    if manifest.exists():
        manifest.replace(folder / PARTS / MANIFEST)
    for old in [*folder.glob("shard.*.mds*"), folder / INDEX, folder / TOKENIZER]:
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    names = {path.name for path in fresh.iterdir()} - {MANIFEST}
    for name in sorted(names):
        (fresh / name).replace(folder / name)
    (fresh / MANIFEST).replace(manifest)
    shutil.rmtree(fresh)


def publish_more(fresh: Path, folder: Path) -> None:
    """Add shards to a corpus that runs may be reading: what stands there stays, index and manifest come last."""
    for path in sorted(fresh.glob("shard.*")):
        path.replace(folder / path.name)
    for name in (INDEX, MANIFEST):
        (fresh / name).replace(folder / name)
    shutil.rmtree(fresh)


def number_behind(fresh: Path, folder: Path, known: int) -> list[dict[str, Any]]:
    """Number fresh shards behind the `known` first ones of a corpus, and write the index of all; give the new ones' entries."""
    before, index = read_json(folder / INDEX, Index, "remove it, and the corpus is made anew"), json.loads((fresh / INDEX).read_text())
    index["shards"] = [shard for shard in index["shards"] if shard["samples"]]
    for number, shard in reversed(list(enumerate(index["shards"], start=known))):  # from the last one: names may overlap
        path, name = fresh / shard["raw_data"]["basename"], f"shard.{number:05d}.mds"
        path.replace(fresh / name)
        shard["raw_data"]["basename"] = name
    (fresh / INDEX).write_text(json.dumps(index | {"shards": [*before["shards"][:known], *index["shards"]]}))
    return index["shards"]


def previous_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of the corpus before this one, also where replacing it was interrupted."""
    for path in (folder / MANIFEST, folder / PARTS / MANIFEST):
        if path.is_file():
            return read_json(path, Manifest, "remove this file, and the corpus is made anew")  # type: ignore[return-value]  # a dictionary
    return None


def verify(folder: Path) -> dict[str, Any]:
    """Hash every shard again and compare it with the manifest.

    Returns:
        The manifest.

    Raises:
        DataError: names every shard that is missing or differs, and what to do.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{path}: no such file; run `emoscale prepare` to the end, or check the folder's name")
    manifest: Any = read_json(path, Listing, "copy the corpus again, or run `emoscale prepare` to write it anew")
    if "shards" not in manifest:
        raise DataError(f"{path}: lists no shards; is this the manifest of a corpus?")
    wrong = [problem for shard in manifest["shards"] if (problem := _shard_problem(folder, shard))]
    tokenizer = manifest.get("tokenizer")
    words = folder / tokenizer["folder"] / "tokenizer.json" if tokenizer else None
    if words is not None and (not words.is_file() or file_sha256(words) != tokenizer["sha256"]):
        wrong.append(f"{tokenizer['folder']}/tokenizer.json is missing or changed")
    if wrong:
        raise DataError(f"{folder}: {'; '.join(wrong)}; copy the corpus again, or run `emoscale prepare` to write it anew")
    return manifest


def _shard_problem(folder: Path, shard: dict[str, Any]) -> str:
    path = folder / shard["file"]
    if not path.is_file():
        return f"{shard['file']} is missing"
    found = file_sha256(path)
    return "" if found == shard["sha256"] else f"{shard['file']} has the hash {found[:12]}…, the manifest says {shard['sha256'][:12]}…"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file aside, then rename it."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(path)


def write_ledger(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON line per input, aside, then rename."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    aside.replace(path)
