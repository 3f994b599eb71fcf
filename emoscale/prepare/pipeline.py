"""`emoscale prepare`: from a folder of films, or a manifest, to a corpus."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from omegaconf import MISSING

from emoscale.batch import MODALITIES
from emoscale.clock import process_age, stage
from emoscale.config import ConfigError, DataError, to_dict
from emoscale.forms import Manifest
from emoscale.prepare import workers
from emoscale.prepare.assembly import assemble, notes_of
from emoscale.prepare.extract import TEACHER_FOLDER, PreprocessConfig
from emoscale.prepare.matching import MatchConfig, match
from emoscale.prepare.parts import PartStore
from emoscale.prepare.shards import INDEX, LEDGER, MANIFEST, SCHEMA, TOKENIZER
from emoscale.prepare.sources import Source, find
from emoscale.prepare.teacher import TeacherConfig, teacher_sha256, train_teacher
from emoscale.prepare.trees import TREES, pre_recognition
from emoscale.prepare.vocabulary import TextConfig
from emoscale.records import read_json
from emoscale.storage import open_storage, upload

Progress = Callable[[int, int, dict[str, Any]], None]
"""Called with (inputs finished, inputs in all, ledger row) after each input."""


@dataclass
class PrepareConfig:
    """What `emoscale prepare` makes of what."""

    source: str = MISSING
    """Folder of media with subtitles, one media file, or a `.csv` / `.jsonl` manifest of utterances."""
    layout: str = ""
    """Official folder tree that `source` is: `iemocap`, `msp_improv` or `meld`; empty = a folder of media, or a manifest."""
    output: str = MISSING
    """Folder of the corpus; what is there already is kept and added to."""
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    """What the features of a file are."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Expression teacher; without `stills` and without a `teacher/` in the output there is no visual emotion."""
    text: TextConfig = field(default_factory=TextConfig)
    """Tokenizer of the corpus."""
    match: MatchConfig = field(default_factory=MatchConfig)
    """Texts and pictures that are put together by their labels first."""
    upload: str = ""
    """Where the finished corpus is stored as well, `s3://bucket/prefix`; empty = nowhere. Pre-training reads it from there."""
    require: list[str] = field(default_factory=list)
    """Modalities (text, visual, acoustic) without which an utterance is dropped; others may be empty."""
    max_failures: int = 0
    """Inputs that may be skipped for a defect before the run counts as failed."""
    workers: int = 0
    """Processes, of one thread each; 0 = one per CPU core."""
    stage: Literal["all", "teacher", "extract", "assemble"] = "all"
    """Do everything, or one stage: train the teacher, extract the inputs, or assemble what was extracted."""
    task: int = 0
    """Number of this job in an array of `tasks` jobs, from 0; each extracts its share."""
    tasks: int = 1
    """Jobs in the array; with more than one, assemble afterwards with `stage=assemble`."""
    shard_bytes: int = 1 << 26
    """Largest shard, bytes."""
    render: Literal["", "demo", "dialogues", "forecasts", "portraits", "labelled-portraits"] = ""
    """`demo` draws the generated demo corpus where it is not yet, `dialogues` the larger one of sound and subtitles alone, `forecasts` more
    labelled dialogues; `source` is its `films` folder, or the one above. `portraits` draws pictures with captions, `labelled-portraits` more of
    them, of other people; `source` is their `manifest.csv`."""

    def validate(self) -> None:
        """Refuse values out of range."""
        if self.layout and self.layout not in TREES:
            raise ValueError(f"layout: {self.layout!r}, must be among {', '.join(TREES)}, or empty")
        unknown = [name for name in self.require if name not in MODALITIES]
        if unknown:
            raise ValueError(f"require: {unknown[0]!r}, must be among {', '.join(MODALITIES)}")
        for name, least in (("max_failures", 0), ("workers", 0), ("tasks", 1), ("shard_bytes", 1 << 16)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)}, must be at least {least}")
        if not 0 <= self.task < self.tasks:
            raise ValueError(f"task: {self.task}, must be at least 0 and below tasks={self.tasks}")
        if self.tasks > 1 and self.stage != "extract":
            raise ValueError(f"tasks: {self.tasks}, a job of an array can only extract; add stage=extract")


@dataclass
class Summary:
    """What a run did."""

    folder: Path
    """The corpus."""
    ledger: Path
    """One row per input."""
    counts: dict[str, int] = field(default_factory=dict)
    """As in the manifest; empty where nothing was assembled."""
    extracted: int = 0
    """Inputs that this run extracted."""
    reused: int = 0
    """Inputs that an earlier run had extracted."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of every input that was skipped."""
    notes: dict[str, int] = field(default_factory=dict)
    """Notes of the ledger, summed."""
    generation: int = 0
    """How many different corpora this folder has held, this one included."""
    cpu_s: dict[str, float] = field(default_factory=dict)
    """CPU seconds of all processes by stage, of what this run extracted and assembled."""
    wall_s: dict[str, float] = field(default_factory=dict)
    """Wall seconds: `start-up` of this process, and of the first worker until it had loaded its models; `sources` (rendered, listed, teacher
    trained); `extract`; `assemble`."""
    lines: list[str] = field(default_factory=list)
    """What else the user should know."""

    def count(self, seconds: dict[str, float]) -> None:
        """Add CPU seconds by stage."""
        for name, more in seconds.items():
            self.cpu_s[name] = self.cpu_s.get(name, 0.0) + more

    def table(self) -> str:
        """Give the final table as plain text."""
        rows = [
            ("extracted now", str(self.extracted)),
            ("extracted before", str(self.reused)),
            ("skipped", str(len(self.failures))),
        ]
        rows += [(name.replace("_", " "), f"{count:,}") for name, count in self.counts.items()]
        rows += [(f"note: {name.replace('_', ' ')}", f"{count:,}") for name, count in self.notes.items()]
        rows += [(f"seconds: {name}", f"{seconds:,.1f}") for name, seconds in self.wall_s.items()]
        rows += [(f"CPU seconds: {name}", f"{seconds:,.1f}") for name, seconds in sorted(self.cpu_s.items(), key=lambda item: -item[1])]
        width = max(len(name) for name, _ in rows)
        text = [f"{name:<{width}}  {value:>12}" for name, value in rows]
        text += [f"skipped {path}: {reason}" for path, reason in self.failures]
        return "\n".join([*text, *self.lines])


class SkippedInputsError(DataError):
    """More inputs were skipped than `max_failures` allows; everything else is written."""

    def __init__(self, message: str, summary: Summary) -> None:
        super().__init__(message)
        self.summary = summary
        """What the run did all the same."""


def prepare(config: PrepareConfig, progress: Progress | None = None) -> Summary:
    """Make or continue a corpus; what an earlier run finished is not done again.

    Raises:
        ConfigError: the configuration cannot be run.
        SkippedInputsError: more inputs than `max_failures` were skipped; all else is written.
        DataError: there is nothing to prepare, or inputs do not fit together.
    """
    source, output = Path(config.source), Path(config.output)
    started, begun = process_age(), time.monotonic()
    if config.render:
        _render(source.parent if source.name in ("films", "manifest.csv") else source, config.render)
    matched = match(config.match, source) if config.match.texts else []
    sources = TREES[config.layout](source) if config.layout else find(source, config.preprocess.subtitles.language)
    output.mkdir(parents=True, exist_ok=True)
    store = PartStore(output)
    store.clean()
    summary = Summary(output, output / LEDGER, wall_s={"start-up": started})
    summary.lines += [*matched, *pre_recognition(config.layout, sources)]
    teacher = _teacher(config, output, summary)
    if config.stage == "teacher":
        return summary
    keys = _keys(sources, config, teacher)
    summary.wall_s["sources"] = time.monotonic() - begun
    if config.stage != "assemble":
        _extract(sources[config.task :: config.tasks], keys, config, store, teacher, progress, summary)
    heads = {item.name: head for item in sources if (head := store.head(item.name)) and head.key == keys[item.name]}
    summary.failures = [(head.row["path"], head.row["reason"]) for head in heads.values() if head.row["status"] == "skipped"]
    if config.stage != "extract":
        begun = time.monotonic()
        with stage("assemble"):
            manifest = assemble(sources, heads, store, config.preprocess, config.text, teacher, config.require, config.shard_bytes)
        summary.count(stage.take())
        summary.wall_s["assemble"] = time.monotonic() - begun
        summary.counts, summary.generation = manifest["counts"], manifest["generation"]
        summary.notes = notes_of(summary.ledger)
        if config.upload:
            summary.lines.append(f"uploaded: {_upload(output, manifest, config.upload)} files to {config.upload}")
    if len(summary.failures) > config.max_failures:
        path, reason = summary.failures[0]
        raise SkippedInputsError(
            f"{len(summary.failures)} of {len(sources)} inputs were skipped, max_failures is {config.max_failures}; "
            f"first {path}: {reason} "
            f"(all in {summary.ledger}; mend them and run again, only they are retried)",
            summary,
        )
    return summary


def _upload(output: Path, manifest: dict[str, Any], url: str) -> int:
    """Store a corpus, without the shards that stand there already; give how many files."""
    stored = {shard["file"]: shard["sha256"] for shard in _stored_manifest(url).get("shards", [])}
    names = [shard["file"] for shard in manifest["shards"] if stored.get(shard["file"]) != shard["sha256"]] + [INDEX, LEDGER]
    folders = [output / name for name in (TOKENIZER, TEACHER_FOLDER)]
    names += [path.relative_to(output).as_posix() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return upload(output, [*names, MANIFEST], url)


def _stored_manifest(url: str) -> dict[str, Any]:
    """Read the manifest of the corpus that lies at a URL; empty where there is none."""
    storage = open_storage(url)
    if MANIFEST not in storage.names(MANIFEST):
        return {}
    with TemporaryDirectory() as folder:
        storage.get(MANIFEST, Path(folder) / MANIFEST)
        return read_json(Path(folder) / MANIFEST, Manifest, f"{url} holds something else than a corpus; choose another place")  # type: ignore[return-value]  # a dictionary


def _render(folder: Path, what: str) -> None:
    from emoscale.prepare import demo
    from emoscale.prepare.demo import portraits

    pictures = {"portraits": portraits.PortraitConfig, "labelled-portraits": portraits.labelled}
    if what in pictures:
        portraits.render(folder, pictures[what]())
        return
    made = {"demo": demo.DemoConfig, "dialogues": demo.dialogues, "forecasts": demo.forecasts}
    demo.render(folder, made[what]())


def _teacher(config: PrepareConfig, output: Path, summary: Summary) -> Path | None:
    """Train the expression teacher once; give its folder, or None without one."""
    folder = output / TEACHER_FOLDER
    if folder.is_dir():
        return folder
    if not config.teacher.stills:
        summary.lines.append("no expression teacher: the visual-emotion objective will be off (set teacher.stills to a folder of labelled faces)")
        return None
    stills = Path(config.teacher.stills)
    if not stills.is_dir():
        raise ConfigError(f"teacher.stills: {stills}, no such folder")
    if config.tasks > 1:
        raise ConfigError("tasks: the jobs of an array would train different teachers; run once with stage=teacher before")
    aside = output / f".{TEACHER_FOLDER}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    metrics = train_teacher(stills, aside, config.teacher, config.preprocess.faces)
    aside.replace(folder)
    summary.lines.append("expression teacher: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if isinstance(value, float)))
    return folder


def _keys(sources: list[Source], config: PrepareConfig, teacher: Path | None) -> dict[str, str]:
    """Hash, for each input, everything that decides what its part holds."""
    common = json.dumps([SCHEMA, to_dict(config.preprocess), teacher_sha256(teacher) if teacher else None], sort_keys=True)
    return {item.name: hashlib.sha256(f"{common}\n{item.fingerprint()}".encode()).hexdigest() for item in sources}


def _extract(
    sources: list[Source],
    keys: dict[str, str],
    config: PrepareConfig,
    store: PartStore,
    teacher: Path | None,
    progress: Progress | None,
    summary: Summary,
) -> None:
    listed = time.monotonic()
    preprocess = json.dumps(to_dict(config.preprocess), sort_keys=True)
    jobs = []
    for item in sources:
        head = store.head(item.name)
        if head is not None and head.key == keys[item.name] and head.row["status"] == "done":
            summary.reused += 1
            continue
        jobs.append(workers.Job(item, keys[item.name], store.folder, preprocess, teacher))
    finished, begun = summary.reused, time.monotonic()
    ready = begun
    for done in workers.run(jobs, min(config.workers or os.cpu_count() or 1, len(jobs))):
        ready = done.ready if finished == summary.reused else min(ready, done.ready)
        finished += 1
        summary.extracted += done.row["status"] == "done"
        summary.count(done.seconds)
        if progress is not None:
            progress(finished, len(sources), done.row)
    summary.wall_s["sources"] += begun - listed
    summary.wall_s["start-up"] += ready - begun
    summary.wall_s["extract"] = time.monotonic() - ready
