"""`emoscale prepare`: from a folder of films, or a manifest, to a corpus."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from omegaconf import MISSING

from emoscale.batch import MODALITIES
from emoscale.config import ConfigError, DataError, from_mapping, to_dict
from emoscale.prepare.assembly import assemble, notes_of
from emoscale.prepare.extract import TEACHER_FOLDER, Extractor, PreprocessConfig
from emoscale.prepare.matching import MatchConfig, match
from emoscale.prepare.parts import Part, PartStore
from emoscale.prepare.shards import INDEX, LEDGER, MANIFEST, SCHEMA, TOKENIZER
from emoscale.prepare.sources import Source, find
from emoscale.prepare.teacher import TeacherConfig, teacher_sha256, train_teacher
from emoscale.prepare.trees import TREES, pre_recognition
from emoscale.prepare.vocabulary import TextConfig
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
    """Processes; 0 = one per CPU core."""
    stage: Literal["all", "teacher", "extract", "assemble"] = "all"
    """Do everything, or one stage: train the teacher, extract the inputs, or assemble what was extracted."""
    task: int = 0
    """Number of this job in an array of `tasks` jobs, from 0; each extracts its share."""
    tasks: int = 1
    """Jobs in the array; with more than one, assemble afterwards with `stage=assemble`."""
    shard_bytes: int = 1 << 26
    """Largest shard, bytes."""
    render: Literal["", "demo", "dialogues", "forecasts", "portraits"] = ""
    """`demo` draws the generated demo corpus where it is not yet, `dialogues` the larger one of sound and subtitles alone, `forecasts` more
    labelled dialogues; `source` is its `films` folder, or the one above. `portraits` draws pictures with captions; `source` is their
    `manifest.csv`."""

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
    lines: list[str] = field(default_factory=list)
    """What else the user should know."""

    def table(self) -> str:
        """Give the final table as plain text."""
        rows = [
            ("extracted now", str(self.extracted)),
            ("extracted before", str(self.reused)),
            ("skipped", str(len(self.failures))),
        ]
        rows += [(name.replace("_", " "), f"{count:,}") for name, count in self.counts.items()]
        rows += [(f"note: {name.replace('_', ' ')}", f"{count:,}") for name, count in self.notes.items()]
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
    if config.render:
        _render(source.parent if source.name in ("films", "manifest.csv") else source, config.render)
    matched = match(config.match, source) if config.match.texts else []
    sources = TREES[config.layout](source) if config.layout else find(source, config.preprocess.subtitles.language)
    output.mkdir(parents=True, exist_ok=True)
    store = PartStore(output)
    store.clean()
    summary = Summary(output, output / LEDGER)
    summary.lines += [*matched, *pre_recognition(config.layout, sources)]
    teacher = _teacher(config, output, summary)
    if config.stage == "teacher":
        return summary
    keys = _keys(sources, config, teacher)
    if config.stage != "assemble":
        _extract(sources[config.task :: config.tasks], keys, config, store, teacher, progress, summary)
    heads = {item.name: head for item in sources if (head := store.head(item.name)) and head.key == keys[item.name]}
    summary.failures = [
        (head.row["path"], head.row["reason"]) for head in heads.values() if head.row["status"] == "skipped"
    ]
    if config.stage != "extract":
        manifest = assemble(
            sources, heads, store, config.preprocess, config.text, teacher, config.require, config.shard_bytes
        )
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
        return json.loads((Path(folder) / MANIFEST).read_text())


def _render(folder: Path, what: str) -> None:
    from emoscale.prepare import demo
    from emoscale.prepare.demo import portraits

    if what == "portraits":
        portraits.render(folder, portraits.PortraitConfig())
        return
    made = {"demo": demo.DemoConfig, "dialogues": demo.dialogues, "forecasts": demo.forecasts}
    demo.render(folder, made[what]())


def _teacher(config: PrepareConfig, output: Path, summary: Summary) -> Path | None:
    """Train the expression teacher once; give its folder, or None without one."""
    folder = output / TEACHER_FOLDER
    if folder.is_dir():
        return folder
    if not config.teacher.stills:
        summary.lines.append(
            "no expression teacher: the visual-emotion objective will be off "
            "(set teacher.stills to a folder of labelled faces)"
        )
        return None
    stills = Path(config.teacher.stills)
    if not stills.is_dir():
        raise ConfigError(f"teacher.stills: {stills}, no such folder")
    if config.tasks > 1:
        raise ConfigError(
            "tasks: the jobs of an array would train different teachers; run once with stage=teacher before"
        )
    aside = output / f".{TEACHER_FOLDER}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    metrics = train_teacher(stills, aside, config.teacher, config.preprocess.faces)
    aside.replace(folder)
    summary.lines.append(
        "expression teacher: "
        + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if isinstance(value, float))
    )
    return folder


def _keys(sources: list[Source], config: PrepareConfig, teacher: Path | None) -> dict[str, str]:
    """Hash, for each input, everything that decides what its part holds."""
    common = json.dumps(
        [SCHEMA, to_dict(config.preprocess), teacher_sha256(teacher) if teacher else None], sort_keys=True
    )
    return {item.name: hashlib.sha256(f"{common}\n{item.fingerprint()}".encode()).hexdigest() for item in sources}


@dataclass(frozen=True)
class _Job:
    """One input for one worker process."""

    source: Source
    key: str
    output: Path
    preprocess: str
    teacher: Path | None
    threads: int


def _extract(
    sources: list[Source],
    keys: dict[str, str],
    config: PrepareConfig,
    store: PartStore,
    teacher: Path | None,
    progress: Progress | None,
    summary: Summary,
) -> None:
    workers = config.workers or os.cpu_count() or 1
    preprocess = json.dumps(to_dict(config.preprocess), sort_keys=True)
    jobs = []
    for item in sources:
        head = store.head(item.name)
        if head is not None and head.key == keys[item.name] and head.row["status"] == "done":
            summary.reused += 1
            continue
        jobs.append(_Job(item, keys[item.name], store.folder, preprocess, teacher, threads=0 if workers == 1 else 1))
    finished = summary.reused
    for row in _run(jobs, min(workers, len(jobs))):
        finished += 1
        summary.extracted += row["status"] == "done"
        if progress is not None:
            progress(finished, len(sources), row)


def _run(jobs: list[_Job], workers: int) -> Iterator[dict[str, Any]]:
    """Work through the jobs; an input that kills its process (a crash inside a decoder) is skipped, not the run."""
    if workers <= 1:
        with _one_thread():
            yield from map(_work, jobs)
        return
    left = {job.source.name: job for job in jobs}
    for row in _pooled(jobs, workers, left):
        yield row
    while left:
        job = left[next(iter(left))]
        yield from _pooled([job], 1, left)
        if job.source.name in left:
            del left[job.source.name]
            row = _skipped(job.source, "its decoding kills the process; convert the file anew")
            PartStore(job.output).write(job.source.name, Part(job.key, row))
            yield row


def _pooled(jobs: list[_Job], workers: int, left: dict[str, _Job]) -> Iterator[dict[str, Any]]:
    """Run jobs in processes and take each from `left` as it ends; stops early, leaving the rest, if a process dies."""
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start)
    try:
        names = {pool.submit(_work, job): job.source.name for job in jobs}
        for future in as_completed(names):
            row = future.result()
            del left[names[future]]
            yield row
    except BrokenProcessPool:
        return
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start() -> None:
    import torch

    torch.set_num_threads(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute as a worker process does, so that the features have the same bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.lru_cache(maxsize=1)
def _extractor(preprocess: str, teacher: Path | None, threads: int) -> Extractor:
    return Extractor(from_mapping(PreprocessConfig, json.loads(preprocess), "preprocess"), teacher, threads=threads)


def _work(job: _Job) -> dict[str, Any]:
    extractor = _extractor(job.preprocess, job.teacher, job.threads)
    try:
        utterances, row = extractor.extract(job.source)
        part = Part(job.key, row, utterances, extractor.describe() if job.source.encoded else {})
    except (DataError, OSError) as error:  # of FFmpeg's errors, those that are no DataError are OSErrors
        part = Part(job.key, _skipped(job.source, str(error)))
    PartStore(job.output).write(job.source.name, part)
    return part.row


def _skipped(source: Source, reason: str) -> dict[str, Any]:
    return {"path": source.shown, "status": "skipped", "reason": reason, "utterances": 0, "notes": {}}
