"""From parts to a corpus: shards, tokenizer, manifest and ledger.

Parts are taken in the order of the inputs' names, so that the shards hold the same bytes however many processes
extracted and however often they were interrupted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emoscale.batch import RAW, Utterance
from emoscale.config import DataError, to_dict
from emoscale.forms import Assembled, Row
from emoscale.prepare import vocabulary
from emoscale.prepare.extract import MAX_TEXT_FEATURES, PRECOMPUTED, Extractor, PreprocessConfig
from emoscale.prepare.parts import ARRAYS, PARTS, Head, PartStore
from emoscale.prepare.shards import (
    INDEX,
    LEDGER,
    MANIFEST,
    SCHEMA,
    TOKENIZER,
    Statistics,
    listed,
    number_behind,
    previous_manifest,
    publish,
    publish_more,
    write_json,
    write_ledger,
    write_shards,
)
from emoscale.prepare.sources import Source
from emoscale.prepare.teacher import teacher_sha256
from emoscale.prepare.vocabulary import TextConfig
from emoscale.records import check, read_json, read_lines

DROPPED = "dropped.json"
ASSEMBLED = "assembled-{}.json"
"""What a generation was made of, by its number: enough to add to it."""
FRESH = ".assembly"
ANEW = "remove it, and the corpus is made anew"


def assemble(
    sources: list[Source],
    heads: dict[str, Head],
    store: PartStore,
    preprocess: PreprocessConfig,
    text: TextConfig,
    teacher: Path | None,
    require: list[str],
    shard_bytes: int,
) -> dict[str, Any]:
    """Write the corpus, unless it holds just these parts already; new inputs come behind what stands there.

    A corpus that only gains inputs keeps its shards, numbering, normalisation constants and tokenizer, so that a run can go
    on with it; `generations` in the manifest tells its sizes. Any other change makes it anew.

    Args:
        sources: all inputs, in order.
        heads: what is known of the part of each, by name.
        store: the parts, and the folder of the corpus.
        preprocess: how features were made.
        text: which tokenizer to make.
        teacher: folder of the expression teacher.
        require: modalities without which an utterance is dropped.
        shard_bytes: largest shard.

    Returns:
        The manifest.

    Raises:
        DataError: an input is not extracted yet, inputs do not fit together, or no utterance is left.
    """
    waiting = [item for item in sources if item.name not in heads]
    if waiting:
        raise DataError(f"{len(waiting)} of {len(sources)} inputs are not extracted yet, first {waiting[0].shown}; run without stage=assemble")
    done = [item.name for item in sources if heads[item.name].row["status"] == "done"]
    keys = {name: heads[name].key for name in done}
    settings = _hashed([SCHEMA, to_dict(text), sorted(require), shard_bytes])
    inputs = _hashed([settings, list(keys.items())])
    before = previous_manifest(store.folder)
    if before is not None and before.get("inputs_sha256") == inputs and (store.folder / MANIFEST).exists():
        _write_ledger(sources, heads, store, _read_dropped(store))
        return before
    _write_ledger(sources, heads, store, {})
    frame = _frame({name: heads[name] for name in done}, preprocess, teacher)
    earlier = _stands(store, before, settings, keys, frame) if before is not None else None
    fresh = store.folder / FRESH
    shutil.rmtree(fresh, ignore_errors=True)
    statistics = Statistics.from_record(earlier["statistics"]) if earlier is not None else Statistics()
    dropped = _read_dropped(store) if earlier is not None else {}
    names = [name for name in done if earlier is None or name not in earlier["keys"]]
    raw = [name for name in RAW if frame[name].get("raw")]
    shards = write_shards(_kept(names, store, require, dropped), frame["widths"], fresh, shard_bytes, statistics, raw)
    if not statistics.counts["utterances"]:
        shutil.rmtree(fresh, ignore_errors=True)
        raise DataError(f"{store.folder}: no utterance is left of {len(sources)} inputs; {store.folder / LEDGER} says why")
    statistics.counts["files"] = len(done)
    generation = 1 if before is None else before.get("generation", 0) + 1
    if earlier is None or before is None:
        manifest = _manifest(frame, statistics, shards, preprocess)
        manifest["tokenizer"] = _tokenizer(text, before, store, done, fresh)
        generations: list[dict[str, int]] = []
    else:
        # Normalisation constants and tokenizer stay: models that learn from this corpus know them.
        more = listed(number_behind(fresh, store.folder, len(before["shards"])))
        manifest = before | {"counts": statistics.counts, "shards": [*before["shards"], *more]}
        generations = before.get("generations", [])
    generations = [*generations, {"generation": generation, "utterances": statistics.counts["utterances"], "shards": len(manifest["shards"])}]
    manifest |= {"generation": generation, "generations": generations, "inputs_sha256": inputs}
    write_json(store.folder / PARTS / DROPPED, dropped)
    write_json(_record(store, generation), {"settings": settings, "keys": keys, "widths": frame["widths"], "statistics": statistics.record()})
    write_json(fresh / MANIFEST, manifest)
    (publish if earlier is None else publish_more)(fresh, store.folder)
    for old in store.folder.glob(f"{PARTS}/{ASSEMBLED.format('*')}"):
        if old != _record(store, generation):
            old.unlink()
    _write_ledger(sources, heads, store, dropped)
    return manifest


def _stands(store: PartStore, before: dict[str, Any], settings: str, keys: dict[str, str], frame: dict[str, Any]) -> dict[str, Any] | None:
    """Give what is known of the corpus that stands here, if its shards can stay and new ones come behind them; else None.

    That needs every input it was made of, unchanged, the same settings and encoders, and its files.
    """
    path = _record(store, before.get("generation", 0))
    if not path.is_file() or not before.get("shards") or not (store.folder / MANIFEST).is_file() or not (store.folder / INDEX).is_file():
        return None
    earlier: Any = read_json(path, Assembled, ANEW)
    alike = all(frame.get(name, {}).items() <= before.get(name, {}).items() for name in ("acoustic", "visual", "text_features"))
    same = earlier["settings"] == settings and earlier["widths"] == frame["widths"] and before.get("visual_emotion") == frame["visual_emotion"]
    kept = earlier["keys"].items() <= keys.items()
    present = all((store.folder / shard["file"]).is_file() for shard in before["shards"])
    return earlier if alike and same and kept and present else None


def _record(store: PartStore, generation: int) -> Path:
    return store.folder / PARTS / ASSEMBLED.format(generation)


def _hashed(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def notes_of(ledger: Path) -> dict[str, int]:
    """Sum the notes of a ledger."""
    total: Counter[str] = Counter()
    for number, line in read_lines(ledger):
        row: Any = check(line, Row, f"{ledger}, line {number}", "run `emoscale prepare` again")
        total.update({name: count for name, count in (row.get("notes") or {}).items() if isinstance(count, int)})
    return dict(sorted(total.items()))


def _kept(names: list[str], store: PartStore, require: list[str], dropped: dict[str, Counter[str]]) -> Iterator[Utterance]:
    """Give the utterances of all parts; those without a required modality are counted in `dropped`."""
    for name in names:
        for utterance in store.utterances(name):
            absent = next((modality for modality in require if not utterance.has(modality)), None)
            if absent is None:
                yield utterance
            else:
                dropped.setdefault(name, Counter())[f"dropped_without_{absent}"] += 1


def _frame(heads: dict[str, Head], preprocess: PreprocessConfig, teacher: Path | None) -> dict[str, Any]:
    """Find what all parts have in common: encoders, widths, and the classes of the teacher."""
    described = [head.encoders for head in heads.values() if head.encoders]
    widths = {column: max((head.widths.get(column, 0) for head in heads.values()), default=0) for column in ARRAYS}
    if not described and any(widths.values()):
        voice, face = (
            {"encoder": {"name": PRECOMPUTED, "revision": ""}, "width": widths[name], "frame_s": step}
            for name, step in (("acoustic", 0.06), ("visual", 1 / preprocess.faces.fps))
        )
        common: dict[str, Any] = {
            "acoustic": voice,
            "visual": face,
            "classes": [f"class_{i}" for i in range(widths["visual_emotion"])],
        }
    else:
        common = described[0] if described else Extractor(preprocess, teacher).describe()
    odd = next((name for name, head in heads.items() if head.encoders not in ({}, common)), None)
    if odd is not None:
        raise DataError(f"{odd}: was made with other encoders than the rest; remove {PARTS} in the corpus and run again")
    emotion = {"classes": common["classes"], "teacher_sha256": teacher_sha256(teacher) if teacher else None}
    return {
        "widths": {
            "acoustic": common["acoustic"]["width"],
            "visual": common["visual"]["width"],
            "visual_emotion": len(common["classes"]),
        }
        | ({"text_features": widths["text_features"]} if widths["text_features"] else {}),
        "acoustic": common["acoustic"],
        "visual": common["visual"],
        "visual_emotion": emotion if common["classes"] else None,
    } | ({"text_features": {"encoder": {"name": PRECOMPUTED, "revision": ""}, "width": widths["text_features"]}} if widths["text_features"] else {})


def _manifest(frame: dict[str, Any], statistics: Statistics, shards: list[dict[str, Any]], preprocess: PreprocessConfig) -> dict[str, Any]:
    limits = {"acoustic": preprocess.acoustic.max_frames, "visual": preprocess.visual.max_frames}
    if "text_features" in frame:
        limits["text_features"] = MAX_TEXT_FEATURES
    kind = "raw" if any(frame[name].get("raw") for name in RAW) else "feature"
    manifest: dict[str, Any] = {"schema": SCHEMA, "kind": kind, "counts": statistics.counts}
    for name, limit in limits.items():
        manifest[name] = frame[name] | {"max_frames": limit}
        if not frame[name].get("raw"):
            manifest[name] |= dict(zip(("mean", "std"), statistics.mean_std(name, frame[name]["width"]), strict=True))
    return manifest | {"visual_emotion": frame["visual_emotion"], "preprocess": to_dict(preprocess), "shards": shards}


def _tokenizer(text: TextConfig, before: dict[str, Any] | None, store: PartStore, names: list[str], fresh: Path) -> dict[str, Any] | None:
    """Build the tokenizer, or keep the one of the corpus before: models were trained on its token ids."""
    if not text.tokenizer:
        return None
    folder = store.folder / TOKENIZER
    entry = before["tokenizer"] if before is not None else None
    if entry is not None and entry["config"] == vocabulary.settings(text) and folder.is_dir():
        shutil.copytree(folder, fresh / TOKENIZER)
        return entry
    texts = (utterance.text for name in names for utterance in store.utterances(name) if utterance.text)
    return vocabulary.build(texts, text, fresh / TOKENIZER)


def _write_ledger(sources: list[Source], heads: dict[str, Head], store: PartStore, dropped: dict[str, Counter[str]]) -> None:
    rows = []
    for item in sources:
        row = heads[item.name].row
        gone = dropped.get(item.name, {})
        rows.append(row | {"utterances": row["utterances"] - sum(gone.values()), "notes": row["notes"] | gone})
    write_ledger(store.folder / LEDGER, rows)


def _read_dropped(store: PartStore) -> dict[str, Counter[str]]:
    path = store.folder / PARTS / DROPPED
    return {name: Counter(counts) for name, counts in read_json(path, dict[str, dict[str, int]], ANEW).items()} if path.is_file() else {}
