"""The processes of `prepare`: each extracts one input at a time, on one thread."""

from __future__ import annotations

import functools
import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoscale.clock import stage
from emoscale.config import DataError, from_mapping
from emoscale.prepare.extract import Extractor, PreprocessConfig
from emoscale.prepare.parts import Part, PartStore
from emoscale.prepare.sources import Source


@dataclass(frozen=True)
class Job:
    """One input for one process."""

    source: Source
    key: str
    """Of its part."""
    output: Path
    """Folder of the corpus."""
    preprocess: str
    """`PreprocessConfig` as JSON."""
    teacher: Path | None
    """Folder of the expression teacher."""


@dataclass(frozen=True)
class Done:
    """What a job left besides its part."""

    row: dict[str, Any]
    """Of the ledger."""
    seconds: dict[str, float]
    """CPU seconds of its process by stage, since the job before."""
    ready: float
    """When its process had loaded what it needs (`time.monotonic`, which all processes of a machine share)."""


def run(jobs: list[Job], processes: int) -> Iterator[Done]:
    """Work through the jobs, the largest first; an input that kills its process (a crash inside a decoder) is skipped, not the run.

    With one process the work is done in this one.
    """
    jobs = sorted(jobs, key=_size, reverse=True)  # a long film begun last would leave all other processes waiting
    if processes <= 1:
        with _one_thread(jobs):
            ready = _load(jobs[0]) if jobs else 0.0
            yield from (_work(job, ready) for job in jobs)
        return
    left = {job.source.name: job for job in jobs}
    while left:
        yield from _pooled([*left.values()], processes, left)
        # Where a process died, one of those that were begun is to blame: as many as there are processes, and what the pool holds ready.
        for job in [*left.values()][: 2 * processes + 1]:
            yield from _pooled([job], 1, left)
            if job.source.name in left:
                del left[job.source.name]
                row = _skipped(job.source, "its decoding kills the process; convert the file anew")
                PartStore(job.output).write(job.source.name, Part(job.key, row))
                yield Done(row, {}, time.monotonic())


def _size(job: Job) -> int:
    path = job.source.path
    return path.stat().st_size if path is not None and path.is_file() else 0


def _pooled(jobs: list[Job], processes: int, left: dict[str, Job]) -> Iterator[Done]:
    """Run jobs in processes and take each from `left` as it ends; stops early, leaving the rest, if a process dies."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(jobs[0],))
    try:
        names = {pool.submit(_work_here, job): job.source.name for job in jobs}
        for future in as_completed(names):
            done = future.result()
            del left[names[future]]
            yield done
    except BrokenProcessPool:
        return
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # the corpus is assembled while interpreters that hold PyTorch end


_ready = 0.0
"""When this worker process was ready."""


def _start(job: Job) -> None:
    global _ready
    with suppress(ImportError):  # what cannot be imported fails again in the job, where it reaches the user
        _pin_threads(1, 1)
    _ready = _load(job)


def _load(job: Job) -> float:
    """Load what jobs like this one need before the first begins, and say when that was done."""
    with suppress(Exception), stage("start-up"):  # what fails here fails again in the job, where it reaches the user
        if job.source.encoded:
            _extractor(job.preprocess, job.teacher).load(speech=job.source.cut_by_speech)
    return time.monotonic()


def _work_here(job: Job) -> Done:
    return _work(job, _ready)


def _pin_threads(of_torch: int, of_opencv: int) -> tuple[int, int]:
    """Set the threads of PyTorch and OpenCV, and give what they were: processes that each take all cores hinder one another."""
    import cv2
    import torch

    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(of_torch)
    cv2.setNumThreads(of_opencv)
    return before


@contextmanager
def _one_thread(jobs: list[Job]) -> Iterator[None]:
    """Compute as a worker process does, so that the features have the same bits."""
    if not any(job.source.encoded for job in jobs):  # text and features of others need neither library
        yield
        return
    before = _pin_threads(1, 1)
    try:
        yield
    finally:
        _pin_threads(*before)


@functools.lru_cache(maxsize=1)
def _extractor(preprocess: str, teacher: Path | None) -> Extractor:
    return Extractor(from_mapping(PreprocessConfig, json.loads(preprocess), "preprocess"), teacher, threads=1)


def _work(job: Job, ready: float) -> Done:
    extractor = _extractor(job.preprocess, job.teacher)
    try:
        utterances, row = extractor.extract(job.source)
        part = Part(job.key, row, utterances, extractor.describe() if job.source.encoded else {})
    except (DataError, OSError) as error:  # of FFmpeg's errors, those that are no DataError are OSErrors
        part = Part(job.key, _skipped(job.source, str(error)))
    with stage("write part"):
        PartStore(job.output).write(job.source.name, part)
    return Done(part.row, stage.take(), ready)


def _skipped(source: Source, reason: str) -> dict[str, Any]:
    return {"path": source.shown, "status": "skipped", "reason": reason, "utterances": 0, "notes": {}}
