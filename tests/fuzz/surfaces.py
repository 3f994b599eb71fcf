"""Every place where bytes from outside are read: how an input of each kind is made, and what reads it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace as changed
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from emoscale import doctor
from emoscale.config import from_mapping, load, to_dict, to_yaml
from emoscale.data.collate import pack, utterance_or_none
from emoscale.data.labelled import labelled_set, read_labels
from emoscale.data.remote import RemoteCorpus
from emoscale.data.streams import Corpus, Joined
from emoscale.data.tokens import load_tokenizer
from emoscale.distributed import World
from emoscale.evaluation import report
from emoscale.files import file_sha256
from emoscale.prepare import assembly, matching, shards, sources, subtitles, trees
from emoscale.prepare.extract import Extractor, PreprocessConfig
from emoscale.prepare.faces import FacesConfig
from emoscale.prepare.parts import PartStore
from emoscale.prepare.recorded import read_picture
from emoscale.prepare.teacher import load_teacher
from emoscale.serving import hub
from emoscale.storage import open_storage
from emoscale.training import checkpoint, mirror
from emoscale.training.corpora import DataConfig, make_encoder, read_held_out
from emoscale.training.export import export
from emoscale.training.run import RunConfig
from emoscale.training.track import read_rows
from tests.fuzz import seeds as given
from tests.fuzz.mutations import TEXTS, change_bytes, change_json, change_lines, change_text, change_value
from tests.fuzz.runner import Surface
from tests.fuzz.seeds import Seeds

RIGHT = 0.85
"""Share of damaged files whose hash is made right again, so that what lies behind the hash is reached."""


def _copy(folder: Path, scratch: Path) -> Path:
    return Path(shutil.copytree(folder, scratch / folder.name, ignore=shutil.ignore_patterns("tokenizer") if (folder / "index.json").is_file() else None))


def _read_all(folder: Path, seeds: Seeds, *, whole: bool = True) -> None:
    """Read a corpus as training does, up to packed batches."""
    corpus = Corpus(folder)
    encoder = make_encoder(DataConfig(corpora=[str(folder)]), corpus, seeds.tokenizer)
    numbers = range(len(corpus)) if whole else range(min(len(corpus), 2))
    items = [utterance_or_none(corpus[number], encoder, 0) for number in numbers]
    kept = [item for item in items if item is not None]
    if kept:
        pack(kept)


def _shard(seeds: Seeds, scratch: Path, random: Random) -> None:
    folder = _copy(random.choice((seeds.corpus, seeds.corpus, seeds.raw)), scratch)
    path = random.choice(sorted(folder.glob("shard.*.mds")))
    path.write_bytes(change_bytes(path.read_bytes(), random, (seeds.raw / "shard.00000.mds").read_bytes()))
    if random.random() < RIGHT:
        index = json.loads((folder / "index.json").read_text())
        for shard in index["shards"]:
            shard["raw_data"]["hashes"]["sha256"] = file_sha256(folder / shard["raw_data"]["basename"])
        (folder / "index.json").write_text(json.dumps(index))
    _read_all(folder, seeds)


def _recording(seeds: Seeds, scratch: Path, random: Random) -> None:
    """Damage a voice or faces within a record whose shard is whole."""
    item = random.choice(seeds.recordings)
    item = changed(item, audio=change_bytes(item.audio, random)) if random.random() < 0.5 else changed(item, faces=change_bytes(item.faces, random))
    encoder = seeds.encoder(seeds.raw)
    found = utterance_or_none(item, encoder, 0)
    if found is not None:
        pack([found])


def _index(seeds: Seeds, scratch: Path, random: Random) -> None:
    folder = _copy(random.choice((seeds.corpus, seeds.raw)), scratch)
    (folder / "index.json").write_bytes(change_json(json.loads((folder / "index.json").read_text()), random))
    if random.random() < 0.2:
        shards.verify(folder)
    elif random.random() < 0.2:
        _read_remote(folder, scratch)
    else:
        _read_all(folder, seeds, whole=False)


def _read_remote(folder: Path, scratch: Path) -> None:
    corpus = RemoteCorpus(f"file://{folder}", scratch / "cache", 1 << 10)
    for number in range(min(len(corpus), 3)):
        _ = corpus[number]


def _manifest(seeds: Seeds, scratch: Path, random: Random) -> None:
    folder = _copy(random.choice((seeds.corpus, seeds.raw)), scratch)
    (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given.LEDGER))
    manifest = json.loads((folder / "manifest.json").read_text()) | {"preprocess": to_dict(PreprocessConfig())}
    (folder / "manifest.json").write_bytes(change_json(manifest, random))
    match random.randrange(6):
        case 0:
            doctor.verify(folder)
        case 1:
            report.corpus_section(folder, command="emoscale prepare")
        case 2:
            shards.previous_manifest(folder)
            Extractor.from_manifest(shards.verify(folder), folder)
        case 3:
            corpora = [Corpus(folder), Corpus(seeds.corpus)]
            Joined(corpora)
        case _:
            _read_all(folder, seeds, whole=False)


def _ledger(seeds: Seeds, scratch: Path, random: Random) -> None:
    (scratch / "ledger.jsonl").write_bytes(change_lines(given.LEDGER, random))
    (scratch / "manifest.json").write_text(json.dumps(seeds.source.manifest))
    if random.random() < 0.5:
        assembly.notes_of(scratch / "ledger.jsonl")
    else:
        report.corpus_section(scratch, command="emoscale prepare")


def _subtitles(seeds: Seeds, scratch: Path, random: Random) -> None:
    suffix, text = random.choice(((".srt", given.SRT), (".vtt", given.VTT), (".ass", given.ASS), (".ssa", given.ASS), (".srt", given.SUB)))
    path = scratch / f"film{suffix}"
    path.write_bytes(change_text(text, random))
    config = subtitles.SubtitleConfig(keep_after_break=random.random() < 0.2)
    subtitles.cut(subtitles.read(path, config), config)


def _sources(seeds: Seeds, scratch: Path, random: Random) -> None:
    """Read a manifest of utterances, and the arrays it names."""
    for name, content in seeds.features.items():
        (scratch / name).write_bytes(content)
    if random.random() < 0.5:
        path = scratch / "list.csv"
        path.write_bytes(change_text(given.MANIFEST_CSV, random))
    else:
        path = scratch / "list.jsonl"
        path.write_bytes(change_lines(given.ROWS, random))
    for source in sources.find(path):
        source.fingerprint()
        for row in source.rows or ():
            for reference in row.features.values():
                sources.read_features(reference)


def _features(seeds: Seeds, scratch: Path, random: Random) -> None:
    name, part = random.choice(
        (
            ("voice.npy", ""),
            ("both.npz", ":face"),
            ("both.npz", ""),
            ("small.npz", ":face"),
            ("table.csv", ":1-3@f0..f2"),
            ("table.csv", ":2"),
            ("table.csv", ":1-3@0..2"),
        )
    )
    path = scratch / name
    path.write_bytes(change_bytes(seeds.features[name], random, seeds.features["both.npz"]))
    sources.read_features(f"{path}{part}")


def _labels(seeds: Seeds, scratch: Path, random: Random) -> None:
    path = scratch / "labels.csv"
    path.write_bytes(change_text(given.LABELS, random))
    labelled_set(seeds.source, read_labels(str(path), seeds.source, "label"), key="label", classes=[], only="")


def _held_out(seeds: Seeds, scratch: Path, random: Random) -> None:
    path = scratch / "held.txt"
    path.write_bytes(change_text("# held out\na/film\nb/film#3\n", random))
    read_held_out(str(path))


def _yaml(seeds: Seeds, scratch: Path, random: Random) -> None:
    (scratch / "run.yaml").write_bytes(change_text(given.YAML, random) if random.random() < 0.7 else _plain(change_value(_known_yaml(), random)))
    (scratch / "top.yaml").write_text("extends: run.yaml\noptim: {warmup: 5}\n")
    _use(load(_schema(random, "pretrain"), scratch / random.choice(("run.yaml", "top.yaml"))))


def _known_yaml() -> Any:
    import yaml

    return yaml.safe_load(given.YAML)


def _plain(value: Any) -> bytes:
    """Write YAML that is JSON, which it may be."""
    return json.dumps(value).encode()


def _schema(random: Random, usual: str) -> type:
    from emoscale.cli import schema

    return schema(usual if random.random() < 0.8 else random.choice(("finetune", "prepare", "evaluate")))


def _use(config: Any) -> None:
    """Do with a configuration what a run does before it needs a corpus."""
    from emoscale.objectives import OBJECTIVES
    from emoscale.training.build import read_from

    to_yaml(config)
    json.dumps(to_dict(config))
    if isinstance(config, RunConfig) and config.system == "memobert":
        read_from(OBJECTIVES, config.objectives)


def _words(seeds: Seeds, scratch: Path, random: Random) -> None:
    words = random.sample(given.WORDS, 4)
    word = random.choice(words)
    key, _, _ = word.partition("=")
    odd = random.choice(
        (change_text(word, random).decode("utf-8", "replace"), f"{key}={random.choice(TEXTS)}", f"{random.choice(TEXTS)}={random.choice(TEXTS)}")
    )
    _use(load(_schema(random, "pretrain"), None, ["run.output=x", "data.corpora=[a]", *words, odd]))


def _section(seeds: Seeds, scratch: Path, random: Random) -> None:
    """Read a section of options as a checkpoint or a manifest stores it."""
    schema, known = random.choice(((DataConfig, DataConfig(corpora=["a"])), (PreprocessConfig, PreprocessConfig()), (FacesConfig, FacesConfig())))
    from_mapping(schema, change_value(to_dict(known), random), "data")


def _dialogues(seeds: Seeds, scratch: Path, random: Random) -> None:
    np.save(scratch / "face.npy", np.zeros((2, 6), np.float32))
    path = scratch / "chats.jsonl"
    path.write_bytes(change_lines([row | ({"visual": str(scratch / "face.npy")} if row.get("visual") == "face.npy" else {}) for row in given.CHATS], random))
    responder = seeds.responder
    for turns in responder.dialogues(path).values():
        responder.sample(turns)


def _checkpoint(seeds: Seeds, scratch: Path, random: Random) -> None:
    folder = Path(shutil.copytree(seeds.run, scratch / "run")) / "checkpoints" / seeds.checkpoint.name
    if random.random() < 0.3:
        (folder / "manifest.json").write_bytes(change_json(json.loads((folder / "manifest.json").read_text()), random))
    else:
        path = random.choice(
            [
                folder / name
                for name in (
                    "state.json",
                    "state.json",
                    "weights.safetensors",
                    "moments.safetensors",
                    "rng_00000.safetensors",
                    "assets/model.json",
                    "assets/corpus.json",
                )
            ]
        )
        content = path.read_bytes()
        path.write_bytes(change_json(json.loads(content), random) if path.suffix == ".json" else change_bytes(content, random))
        if random.random() < RIGHT:
            hashes = json.loads((folder / "manifest.json").read_text())
            hashes["files"][str(path.relative_to(folder))] = file_sha256(path)
            (folder / "manifest.json").write_text(json.dumps(hashes))
    mirror.PATIENCE_S = 0.0
    match random.randrange(6):
        case 0:
            doctor.verify(random.choice((folder, folder.parents[1])))
        case 1:
            checkpoint.find_latest(folder.parent)
        case 3:
            mirror.fetch(open_storage(f"file://{folder.parent}"), folder.name, scratch / "fetched")
        case 2:
            export(folder, scratch / "out")
        case _:
            state = checkpoint.load(folder)
            checkpoint.restore_random_state(folder, World(), state.meta["world"])


def _model(seeds: Seeds, scratch: Path, random: Random) -> None:
    folder = _copy(seeds.model, scratch)
    path = folder / random.choice(("config.json", "config.json", "preprocessor_config.json", "model.safetensors"))
    content = path.read_bytes()
    path.write_bytes(change_json(json.loads(content), random) if path.suffix == ".json" else change_bytes(content, random))
    hub.load(folder).classify([seeds.source[0]])


def _tokenizer(seeds: Seeds, scratch: Path, random: Random) -> None:
    folder = Path(shutil.copytree(seeds.corpus / "tokenizer", scratch / "tokenizer"))
    path = random.choice(sorted(folder.glob("*.json")))
    path.write_bytes(change_json(json.loads(path.read_text()), random))
    tokenizer = load_tokenizer(str(folder), None)
    encoder = seeds.encoder(seeds.corpus)
    type(encoder.text)(tokenizer, 30)("we go home")


def _part(seeds: Seeds, scratch: Path, random: Random) -> None:
    store = PartStore(scratch)
    path = store.path("a")
    path.parent.mkdir()
    path.write_bytes(change_bytes(seeds.part, random))
    store.head("a")
    store.utterances("a")


def _teacher(seeds: Seeds, scratch: Path, random: Random) -> None:
    for name, content in seeds.teacher.items():
        (scratch / name).write_bytes(content)
    path = scratch / random.choice(sorted(seeds.teacher))
    path.write_bytes(change_json(json.loads(path.read_bytes()), random) if path.suffix == ".json" else change_bytes(path.read_bytes(), random))
    load_teacher(scratch)(np.zeros((1, 16, 16, 3), np.uint8))


def _run_folder(seeds: Seeds, scratch: Path, random: Random) -> None:
    (scratch / "metrics.jsonl").write_bytes(change_lines(given.METRICS, random))
    (scratch / "environment.json").write_bytes(change_json(given.ENVIRONMENT, random))
    match random.randrange(3):
        case 0:
            report.environment_section(scratch, command="emoscale pretrain")
        case 1:
            read_rows(scratch / "metrics.jsonl")
        case _:
            report.curves_section({"run": scratch}, command="emoscale pretrain")


def _matching(seeds: Seeds, scratch: Path, random: Random) -> None:
    which = random.random() < 0.5
    (scratch / "texts.csv").write_bytes(change_text(given.TEXTS_CSV, random) if which else given.TEXTS_CSV.encode())
    (scratch / "pictures.csv").write_bytes(given.PICTURES_CSV.encode() if which else change_text(given.PICTURES_CSV, random))
    config = matching.MatchConfig(str(scratch / "texts.csv"), str(scratch / "pictures.csv"))
    matching.match(config, scratch / "matched.csv")
    sources.find(scratch / "matched.csv")


def _trees(seeds: Seeds, scratch: Path, random: Random) -> None:
    layout, name, text = random.choice((
        ("iemocap", "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt", given.IEMOCAP), ("meld", "train_sent_emo.csv", given.MELD), ("msp_improv", "Evalution.txt", given.MSP),
    ))  # fmt: skip
    (scratch / name).parent.mkdir(parents=True, exist_ok=True)
    (scratch / name).write_bytes(change_text(text, random))
    trees.pre_recognition(layout, trees.TREES[layout](scratch))


def _picture(seeds: Seeds, scratch: Path, random: Random) -> None:
    path = scratch / "face.jpg"
    path.write_bytes(change_bytes(random.choice(seeds.picture), random))
    read_picture(path, 16)


def _film(seeds: Seeds, scratch: Path, random: Random) -> None:
    name, content = random.choice(sorted(seeds.films.items()))
    (scratch / name).write_bytes(change_bytes(content, random, random.choice(sorted(seeds.films.values()))))
    path = (scratch / name).with_suffix(".srt")
    path.write_text("1\n00:00:00,100 --> 00:00:01,300\nwe go\n")
    config = PreprocessConfig(decoder="pyav")
    for source in sources.find(scratch):
        Extractor(config, threads=1).extract(source)


SURFACES: dict[str, Surface] = {
    "shard": Surface(12_000, _shard, ("corpus", "raw", "tokenizer")),
    "recording": Surface(10_000, _recording, ("recordings", "tokenizer")),
    "index": Surface(8_000, _index, ("corpus", "raw", "tokenizer")),
    "manifest": Surface(4_000, _manifest, ("corpus", "raw", "tokenizer")),
    "ledger": Surface(7_000, _ledger, ("source",)),
    "subtitles": Surface(17_000, _subtitles),
    "sources": Surface(12_000, _sources, ("features",)),
    "features": Surface(10_000, _features, ("features",)),
    "labels": Surface(7_000, _labels, ("source",)),
    "held_out": Surface(500, _held_out),
    "yaml": Surface(700, _yaml),
    "words": Surface(700, _words),
    "section": Surface(300, _section),
    "dialogues": Surface(5_000, _dialogues, ("responder",)),
    "checkpoint": Surface(3_000, _checkpoint, ("checkpoint",)),
    "model": Surface(500, _model, ("model", "source")),
    "tokenizer": Surface(700, _tokenizer, ("corpus", "tokenizer")),
    "part": Surface(2_000, _part, ("part",)),
    "teacher": Surface(700, _teacher, ("teacher",)),
    "run_folder": Surface(3_000, _run_folder),
    "matching": Surface(1_500, _matching),
    "trees": Surface(2_500, _trees),
    "picture": Surface(2_500, _picture, ("picture",)),
    "film": Surface(700, _film, ("films",)),
}
"""Name → kind of input: all that is read of what came from elsewhere, or lay on a disk meanwhile."""
