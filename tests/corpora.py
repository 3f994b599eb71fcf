"""Corpora for tests: synthetic utterances written as the real MDS shards, with manifest and tokenizer."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from emoscale.batch import COLUMNS, Utterance
from emoscale.data.synthetic import WORDS, Synthetic

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_tokenizer(folder: Path) -> None:
    """Write a BertTokenizerFast over the synthetic words, a few pieces and the verbalisers."""
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = [*dict.fromkeys([*WORDS, "i", "am", "anger", "happy", "neutral", "sad", "un", "##like", "##ly", "."])]
    (folder / "vocab.txt").write_text("\n".join([*SPECIALS, *words]) + "\n")
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)


def write_corpus(folder: Path, utterances: list[Utterance] | Synthetic, manifest: dict | None = None, shard_bytes: int = 1 << 18) -> Path:
    """Write utterances as a prepared corpus."""
    from streaming import MDSWriter

    items = [utterances[i] for i in range(len(utterances))]
    source = manifest or utterances.manifest
    with MDSWriter(out=str(folder), columns=COLUMNS, hashes=["sha256"], size_limit=shard_bytes) as writer:
        for item in items:
            writer.write(item.record())
    shards = json.loads((folder / "index.json").read_text())["shards"]
    entries = [{"file": s["raw_data"]["basename"], "sha256": s["raw_data"]["hashes"]["sha256"], "utterances": s["samples"]} for s in shards]
    content = source | {"schema": 1, "kind": "feature", "counts": {"utterances": len(items)}, "shards": entries, "generation": 1}
    (folder / "manifest.json").write_text(json.dumps(content))
    write_tokenizer(folder / "tokenizer")
    return folder


def add_to_corpus(folder: Path, utterances: Synthetic, shard_bytes: int = 1 << 18) -> Path:
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


def sha256(path: Path) -> str:
    """Hash a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
