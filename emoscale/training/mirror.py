"""A run's checkpoints in object storage: uploaded beside the training, fetched where a node has none.

<run.upload>/
config.json metrics.jsonl     of the run folder, as of the newest upload
step_00000100/…               every file of the checkpoint; manifest.json last, so who sees it finds the rest
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from emoscale import distributed
from emoscale.config import DataError
from emoscale.files import replace_text
from emoscale.storage import Storage, StorageError, open_storage
from emoscale.training import checkpoint
from emoscale.training.checkpoint import MANIFEST, PREFIX

log = logging.getLogger("emoscale")
T = TypeVar("T")
ATTEMPTS, PATIENCE_S = 4, 1.0
"""Tries of one request, and the pause after the first failure; each later pause is twice as long."""
COMPANIONS = ("config.json", "metrics.jsonl")
"""Files of the run folder that go with its checkpoints: what tells the run apart, and what it has measured."""


class Mirror:
    """Keeps what a run keeps in object storage too, from a thread of its own (rank 0 only).

    A failed upload is a warning, and is tried again with the next checkpoint: storage that is away never stops training.

    Args:
        run: the run folder.
        url: see `open_storage`; it belongs to this run alone.
        keep, keep_every: see `checkpoint.superseded`.
    """

    def __init__(self, run: Path, url: str, *, keep: int, keep_every: int) -> None:
        self.run, self.storage, self.keep, self.keep_every = run, open_storage(url), keep, keep_every
        self.lock = threading.Lock()
        """Held while a checkpoint is chosen for upload, and by who removes superseded ones."""
        self.uploading: set[str] = set()
        self.longest_s = 0.0
        """Seconds that the upload of a checkpoint has taken, the longest so far."""
        self._thread = ThreadPoolExecutor(1, "upload")
        self._waiting: Future[None] | None = None

    def notice(self, newest: str, *, written: bool = True) -> None:
        """Upload the newest checkpoint, as soon as the upload in progress is done.

        Args:
            newest: its name.
            written: whether it was written just now; else it may be stored already, and an upload that a kill cut off is made up for.
        """
        if self._waiting is not None:
            self._waiting.cancel()  # one that has not begun: this one does its work too
        self._waiting = self._thread.submit(self._synchronise, newest, written)

    def close(self) -> None:
        """Wait for what is being uploaded; bounded, as every request is."""
        self._thread.shutdown()

    def _synchronise(self, newest: str, written: bool) -> None:
        """Upload what is missing there, newest first, and remove what is superseded.

        What lies there behind the newest step was damaged and passed over; it is written again when the run gets there.
        """
        try:
            for name in COMPANIONS:
                if (self.run / name).is_file():
                    _patiently(lambda name=name: self.storage.put(self.run / name, name))
            there = {name for name in stored_steps(self.storage) if name < newest or (name == newest and not written)}
            for folder in checkpoint.list_steps(self.run / "checkpoints"):
                wanted = folder.name <= newest and folder.name not in checkpoint.superseded(there | {folder.name}, self.keep, self.keep_every)
                if wanted and folder.name not in there:
                    there |= self._upload(folder)
            self._retire(there, newest)
        except StorageError as error:
            log.warning("upload failed, and is tried again with the next checkpoint: %s", error)
        except Exception:  # in a thread nobody looks at
            log.exception("upload failed, and is tried again with the next checkpoint")

    def _upload(self, folder: Path) -> set[str]:
        """Store one checkpoint; give its name, nothing where it is damaged or gone."""
        with self.lock:
            self.uploading = {folder.name}
        try:
            start = time.perf_counter()
            names = sorted(checkpoint.verify(folder))
            for name in [*names, MANIFEST]:
                _patiently(lambda name=name: self.storage.put(folder / name, f"{folder.name}/{name}"))
            took = time.perf_counter() - start
            self.longest_s = max(self.longest_s, took)
            log.info("%s uploaded to %s in %.1f s", folder.name, self.storage.url, took)
        except DataError as error:
            log.debug("not uploaded: %s", error)
            return set()
        finally:
            with self.lock:
                self.uploading = set()
        return {folder.name}

    def _retire(self, whole: set[str], newest: str) -> None:
        """Remove superseded checkpoints, and the remains of uploads that never ended; a manifest goes first, as it came last."""
        gone = set(checkpoint.superseded(whole, self.keep, self.keep_every))
        stored = {name: name.split("/")[0] for name in _patiently(lambda: self.storage.names(PREFIX))}
        doomed = [name for name, step in stored.items() if step in gone or (step < newest and step not in whole)]
        if newest in whole and doomed:
            doomed.sort(key=lambda name: not name.endswith(f"/{MANIFEST}"))
            _patiently(lambda: self.storage.delete(doomed))


def stored_steps(storage: Storage) -> list[str]:
    """Give the names of the checkpoints that were uploaded whole, the newest first."""
    names = _patiently(lambda: storage.names(PREFIX))
    whole = [name.removesuffix(f"/{MANIFEST}") for name in names if name.endswith(f"/{MANIFEST}")]
    return sorted((name for name in whole if name.removeprefix(PREFIX).isdecimal()), reverse=True)


def fetch(storage: Storage, name: str, run: Path) -> Path:
    """Fetch one checkpoint into a run folder, verify it, and fetch what goes with it; give its folder.

    Raises:
        DataError: it is damaged there.
        StorageError: it cannot be fetched.
    """
    final = run / "checkpoints" / name
    aside = final.with_name(f".{name}.{os.getpid()}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _patiently(lambda: storage.get(f"{name}/{MANIFEST}", aside / MANIFEST))
        for file in checkpoint.read_manifest(aside):
            (aside / file).parent.mkdir(parents=True, exist_ok=True)
            _patiently(lambda file=file: storage.get(f"{name}/{file}", aside / file))
        checkpoint.verify(aside)
        stored = _patiently(lambda: storage.names(""))
        for file in COMPANIONS:
            # Metrics here end before what was fetched; a configuration here is the one to compare with.
            if file in stored and (file == "metrics.jsonl" or not (run / file).is_file()):
                _patiently(lambda file=file: storage.get(file, run / file))
        shutil.rmtree(final, ignore_errors=True)  # a damaged one
        os.replace(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    replace_text(final.parent / checkpoint.LATEST, name)
    log.warning("%s fetched from %s", name, storage.url)
    return final


def find_start(run: Path, url: str, world: distributed.World) -> Path | None:
    """Give the checkpoint to go on from, the same on every rank; None for a new run (collective).

    It is the newest whole one of the run folder, or of the storage where that has a newer one, which every node without it
    then fetches.

    Raises:
        DataError: there are checkpoints, and none is whole; there is none here, and the storage cannot be asked (a new run
            would begin where an old one stands); or the nodes do not see the same run folder.
    """
    storage = open_storage(url) if url else None
    found, problem = _find_local(run)
    if storage is not None:
        if world.is_main:
            found, problem = _newer(storage, run, found, problem)
        (name,) = distributed.gather_names([_name(found)] if world.is_main else [])
        if name and world.local_rank == 0 and not (run / "checkpoints" / name / MANIFEST).is_file():
            found, problem = _attempt(storage, name, run)
        distributed.barrier()
        if name and _name(found) != name:  # fetched by another rank of this node, or older than what this node has
            found, problem = _find_local(run, name)
    problems = distributed.gather_names([f"rank {world.rank}: {problem}"] if problem else [])
    if problems:
        raise DataError(problems[0].removeprefix("rank 0: "))
    seen = distributed.gather_names([_name(found)])
    for rank, name in enumerate(seen):
        if name != seen[0]:
            raise DataError(
                f"{run}: rank 0 sees {seen[0] or 'no checkpoint'} there, rank {rank} {name or 'none'}; name a run.output that all nodes share, or set run.upload"
            )
    return found


def _find_local(run: Path, name: str = "") -> tuple[Path | None, str]:
    """Give a checkpoint of a run folder, the newest whole one unless one is named, and what is wrong where it is damaged, or each is."""
    try:
        if not name:
            return checkpoint.find_latest(run / "checkpoints"), ""
        checkpoint.verify(run / "checkpoints" / name)
    except DataError as error:
        return None, str(error)
    return run / "checkpoints" / name, ""


def _newer(storage: Storage, run: Path, found: Path | None, problem: str) -> tuple[Path | None, str]:
    """Fetch the newest whole stored checkpoint, if it is newer than the one at hand."""
    try:
        for name in stored_steps(storage):
            if found is not None and name <= found.name:
                break
            fetched, damage = _attempt(storage, name, run)
            if fetched is not None:
                return fetched, ""
            log.warning("stored checkpoint passed over: %s", damage)
            problem = problem or f"{storage.url}: no stored checkpoint can be used ({damage}); start anew with another run.upload, or repair one"
    except StorageError as error:
        if found is None:
            return None, f"{error}; without it nobody knows whether the run stands there: try again, or leave run.upload out"
        log.warning("nobody knows whether a newer checkpoint is stored: %s", error)
    return found, "" if found is not None else problem


def _attempt(storage: Storage, name: str, run: Path) -> tuple[Path | None, str]:
    try:
        return fetch(storage, name, run), ""
    except (DataError, StorageError, OSError) as error:
        return None, str(error)


def _name(folder: Path | None) -> str:
    return "" if folder is None else folder.name


def _patiently(request: Callable[[], T]) -> T:
    """Try a request several times.

    Raises:
        StorageError: it failed each time.
    """
    for attempt in range(ATTEMPTS - 1):
        try:
            return request()
        except StorageError as error:
            log.debug("try %d of %d failed: %s", attempt + 1, ATTEMPTS, error)
            time.sleep(PATIENCE_S * 2**attempt)
    return request()
