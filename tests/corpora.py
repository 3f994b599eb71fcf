"""Corpora for tests: synthetic utterances written as the real MDS shards, with manifest and tokenizer."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from emoscale.batch import RAW, Utterance, columns_of
from emoscale.codecs import encode_audio, encode_faces
from emoscale.data.synthetic import WORDS, Synthetic

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_tokenizer(folder: Path) -> None:
    """Write a BertTokenizerFast over the synthetic words, a few pieces and the verbalisers."""
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = [*dict.fromkeys([*WORDS, "i", "am", "anger", "happy", "neutral", "sad", "un", "##like", "##ly", "."])]
    (folder / "vocab.txt").write_text("\n".join([*SPECIALS, *words]) + "\n")
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)


HOP = 40
"""Samples of a frame of the raw corpora here."""


def recorded(utterances: list[Utterance], manifest: dict[str, Any], side: int = 16) -> tuple[list[Utterance], dict[str, Any]]:
    """Give the utterances with voices and faces kept raw: noise as long as their features, and blots; and the manifest that says so."""
    items = []
    for number, item in enumerate(utterances):
        draw = np.random.default_rng(number)
        wave = draw.normal(0, 0.1, HOP * len(item.acoustic)).astype(np.float32)
        crops = np.broadcast_to(draw.integers(0, 256, (len(item.visual), 1, 1, 3), np.uint8), (len(item.visual), side, side, 3))
        items.append(
            replace(item, acoustic=item.acoustic[:0], visual=item.visual[:0], audio=encode_audio(wave), faces=encode_faces(np.ascontiguousarray(crops)))
        )
    sections = {name: {"encoder": {"name": kind}, "width": width, "max_frames": 64, "raw": column} for name, kind, width, column in (
        ("acoustic", "waveform", HOP, "audio"), ("visual", "crops", 3 * side * side, "faces"),
    )}  # fmt: skip
    return items, manifest | sections


def write_corpus(folder: Path, utterances: list[Utterance] | Synthetic, manifest: dict | None = None, shard_bytes: int = 1 << 18) -> Path:
    """Write utterances as a prepared corpus; modalities that the manifest calls raw as they were recorded."""
    from streaming import MDSWriter

    items = [utterances[i] for i in range(len(utterances))]
    source = manifest or utterances.manifest
    raw = [name for name in RAW if source[name].get("raw")]
    with MDSWriter(out=str(folder), columns=columns_of(raw), hashes=["sha256"], size_limit=shard_bytes) as writer:
        for item in items:
            writer.write(item.record(raw))
    shards = json.loads((folder / "index.json").read_text())["shards"]
    entries = [{"file": s["raw_data"]["basename"], "sha256": s["raw_data"]["hashes"]["sha256"], "utterances": s["samples"]} for s in shards]
    content = source | {"schema": 1, "kind": "feature", "counts": {"utterances": len(items)}, "shards": entries, "generation": 1}
    (folder / "manifest.json").write_text(json.dumps(content))
    write_tokenizer(folder / "tokenizer")
    return folder


def add_to_corpus(folder: Path, utterances: list[Utterance] | Synthetic, shard_bytes: int = 1 << 18) -> Path:
    """Add the utterances that are not there yet, in shards behind those that stand, as `emoscale prepare` does."""
    manifest = json.loads((folder / "manifest.json").read_text())
    index = json.loads((folder / "index.json").read_text())
    known, stood = manifest["counts"]["utterances"], len(index["shards"])
    aside = folder / "more"
    write_corpus(aside, [utterances[i] for i in range(known, len(utterances))], manifest, shard_bytes)
    for number, shard in enumerate(json.loads((aside / "index.json").read_text())["shards"]):
        name = f"shard.{stood + number:05d}.mds"
        (aside / shard["raw_data"]["basename"]).rename(folder / name)
        shard["raw_data"]["basename"] = name
        index["shards"].append(shard)
        manifest["shards"].append({"file": name, "sha256": shard["raw_data"]["hashes"]["sha256"], "utterances": shard["samples"]})
    shutil.rmtree(aside)
    manifest["counts"]["utterances"] = len(utterances)
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def read_utterances(folder: Path) -> Iterator[Utterance]:
    """Read what stands in a folder's shards in order, a manifest or not."""
    from streaming.base.format import reader_from_json

    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        reader = reader_from_json(str(folder), None, shard)
        for i in range(reader.size):
            yield Utterance.from_record(reader.get_item(i))


def sha256(path: Path) -> str:
    """Hash a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
