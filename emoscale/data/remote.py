"""A corpus in object storage, read through a bounded cache of verified shards."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from bisect import bisect_left, bisect_right
from contextlib import suppress
from pathlib import Path
from random import SystemRandom
from threading import Thread
from typing import Any

from filelock import FileLock, Timeout

from emoscale.batch import Utterance
from emoscale.config import DataError
from emoscale.data.streams import Corpus, Spans
from emoscale.files import file_sha256, stays_inside
from emoscale.storage import Storage, StorageError, is_remote, open_storage

log = logging.getLogger("emoscale")
ATTEMPTS, PATIENCE_S = 4, 0.5
"""Downloads of one shard before it counts as bad, and the least pause after the first failure; each later one is twice as long."""
SIDE_FILES = ("index.json", "tokenizer/", "teacher/", "ledger.jsonl")
"""What a corpus needs besides manifest and shards; a name with a slash is a folder."""


class RemoteCorpus(Corpus):
    """A prepared corpus behind a storage URL; shards come when they are first read, and go when the cache is full.

    Every process of a node may share the cache: a shard is fetched once, by whoever asks first. It is compared with its hash
    before anybody reads it, fetched again where it differs, and after `ATTEMPTS` the reader raises: an epoch never ends early
    because a shard is bad. What is read next (`expect`) is fetched meanwhile.

    Args:
        url: see `open_storage`.
        cache: folder of all remote corpora of this node.
        limit: bytes of shards kept per corpus; the one that is read is kept whatever it takes.

    Raises:
        DataError: nothing usable lies there, or a shard stays damaged or missing (named, with the remedy).
    """

    def __init__(self, url: str, cache: Path, limit: int) -> None:
        self.url, self.limit = url.rstrip("/"), limit
        self.storage = open_storage(self.url)
        self._locks: dict[str, FileLock] = {}
        self._soon: list[int] = []
        self._ahead: Thread | None = None
        super().__init__(fetch_side_files(self.storage, cache))
        self.name = self.url
        self._names = {entry["raw_data"]["basename"] for entry in self._shards}

    def __getitem__(self, number: int) -> Utterance:
        try:
            return super().__getitem__(number)
        except DataError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
        # Another process made room since this one opened the shard: nobody removes it while its lock is held.
        entry = self._shards[bisect_right(self._firsts, number) - 1]["raw_data"]
        with self._lock(entry["basename"]):
            self._fetch(entry)
            item = super().__getitem__(number)
        self._make_room(entry["basename"])
        return item

    def __getstate__(self) -> dict[str, Any]:
        """Leave readers and locks behind: each worker has its own."""
        return super().__getstate__() | {"_locks": {}, "_soon": [], "_ahead": None}

    def expect(self, now: Spans, soon: Spans) -> None:
        """Fetch what is read now in a thread too, and then the shards that are read next, as many as the cache holds beside those.

        Each process begins at another one; who finds a shard's lock taken goes on with the next.
        """
        reading, room, later = self._shards_of(now), self.limit, list[int]()
        for shard in reading:
            room -= self._bytes(shard)
            # Those that were fetched ahead are older than the last of the block before, and would make room for one another.
            with suppress(FileNotFoundError):
                _touch(self._path(shard))
        fits = room >= 0
        for shard in self._shards_of(soon):
            room -= 0 if shard in reading else self._bytes(shard)
            if room < 0:
                break
            later.append(shard)
        self._soon = [*_turned(list(reading) if fits else []), *_turned(later)]
        if self._soon and (self._ahead is None or not self._ahead.is_alive()):
            self._ahead = Thread(target=self._fetch_ahead, daemon=True)
            self._ahead.start()

    def _fetch_ahead(self) -> None:
        while soon := self._soon:  # another list from one turn to the next, where the reading goes on
            shard = soon.pop(0)
            entry = self._shards[shard]["raw_data"]
            try:
                if not self._path(shard).is_file():
                    with self._lock(entry["basename"]).acquire(blocking=False):
                        self._fetch(entry)
                    self._make_room(entry["basename"])
            except Timeout:
                continue  # another process fetches it
            except (DataError, OSError) as error:
                log.warning("%s: nothing more is fetched ahead of time for now: %s", self.url, error)  # who needs it will try again, and tell
                return

    def _shards_of(self, spans: Spans) -> dict[int, None]:
        """Give the shards that hold these utterances, in their order."""
        return {shard: None for first, end in spans if first < end for shard in range(bisect_right(self._firsts, first) - 1, bisect_left(self._firsts, end))}

    def bytes_of(self, count: int) -> int:
        """Give about how many bytes so many neighbouring utterances take, at most the whole corpus."""
        whole = sum(self._bytes(shard) for shard in range(len(self._shards)))
        return whole * min(count, len(self)) // max(1, len(self))

    def _bytes(self, shard: int) -> int:
        return self._shards[shard]["raw_data"]["bytes"]

    def _lock(self, name: str) -> FileLock:
        """Give the lock of a shard, the same object each time: it may be taken again by who holds it."""
        if name not in self._locks:
            self._locks[name] = FileLock(self.folder / f".{name}.lock")
        return self._locks[name]

    def _verify(self, entry: dict[str, Any]) -> None:
        with self._lock(entry["basename"]):
            self._fetch(entry)
        self._make_room(entry["basename"])

    def _fetch(self, entry: dict[str, Any]) -> None:
        path, wanted = self.folder / entry["basename"], entry.get("hashes", {}).get("sha256")
        if path.is_file():
            if file_sha256(path) == wanted:
                _touch(path)
                return
            path.unlink()
        seen, remedy = "", ""
        for attempt in range(ATTEMPTS):
            aside = path.with_name(f".{path.name}.fetching")
            try:
                self.storage.get(entry["basename"], aside)
                if file_sha256(aside) == wanted:
                    _touch(aside)
                    os.replace(aside, path)
                    return
                seen = f"its sha256 is {file_sha256(aside)[:12]}…, index.json says {str(wanted)[:12]}…"
                remedy = "upload the corpus again, or leave it out of data.corpora"
            except StorageError as error:
                seen, remedy = (
                    str(error),
                    "is the storage up, and the shard there? then run the same command again; else upload the corpus again, or leave it out of data.corpora",
                )
            aside.unlink(missing_ok=True)
            log.warning("%s/%s: fetch %d of %d failed: %s", self.url, path.name, attempt + 1, ATTEMPTS, seen)
            if attempt + 1 < ATTEMPTS:
                # Whoever failed together must not come back together; of the system's randomness, for the run's own is part of its state.
                time.sleep(PATIENCE_S * 2**attempt * (1 + SystemRandom().random()))
        raise DataError(f"{self.url}/{path.name}: shard cannot be had ({ATTEMPTS} fetches; {seen}); {remedy}")

    def _make_room(self, kept: str) -> None:
        """Remove the shards read longest ago until the rest fits; one process at a time, or each would remove what another keeps."""
        with FileLock(self.folder / ".room.lock"):
            self._remove_oldest(kept)

    def _remove_oldest(self, kept: str) -> None:
        shards = []
        for file in os.scandir(self.folder):  # few of a large corpus' shards are here
            with suppress(FileNotFoundError):
                if file.name in self._names:
                    shards.append((file.stat().st_mtime_ns, Path(file.path), file.stat().st_size))
        total = sum(size for _, _, size in shards)
        for _, path, size in sorted(shards):
            if total <= self.limit:
                break
            if path.name == kept:
                continue
            lock = self._lock(path.name)
            try:
                with lock.acquire(blocking=False):
                    path.unlink(missing_ok=True)
                    total -= size
            except Timeout:
                continue  # somebody reads it


def _touch(path: Path) -> None:
    """Note that a shard is read now; the file system's own clock moves by some milliseconds at a time, in which several small shards come."""
    now = time.time_ns()
    try:
        os.utime(path, ns=(now, now))
    except PermissionError:  # another user's: no date but the file system's own may be set
        os.utime(path)


def _turned(shards: list[int]) -> list[int]:
    """Give the shards from another one on in every process."""
    first = os.getpid() % max(1, len(shards))
    return shards[first:] + shards[:first]


def fetch_side_files(storage: Storage, cache: Path) -> Path:
    """Fetch everything but the shards into this corpus' folder of the cache; give the folder.

    The manifest is fetched each time: a corpus that has grown is another one, and gets its side files anew.

    Raises:
        DataError: there is no manifest at that URL, or a file cannot be fetched.
    """
    folder = cache / hashlib.sha256(storage.url.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        fresh = folder / ".manifest.json.fetching"
        try:
            storage.get("manifest.json", fresh)
            known = folder / "manifest.json"
            if not known.is_file() or known.read_bytes() != fresh.read_bytes():
                for name in _side_files(storage):
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    storage.get(name, folder / name)
                os.replace(fresh, known)
        except StorageError as error:
            raise DataError(f"{error}; is there a corpus that `emoscale prepare` uploaded?") from error
    return folder


def _side_files(storage: Storage) -> list[str]:
    """List what a corpus needs besides its shards, by what the storage says lies there.

    Raises:
        DataError: a name would be written outside the cache.
    """
    names = [name for prefix in SIDE_FILES for name in storage.names(prefix) if not name.endswith("/")]  # a console's "folder" is an empty file
    outside = [name for name in names if not stays_inside(name)]
    if outside:
        raise DataError(f"{storage.url}: holds a file named {outside[0]!r}, which would lie outside the corpus; remove it there")
    return names


def local_folder(name: str, cache: str | Path) -> Path:
    """Give the folder that holds a corpus' manifest and tokenizer: itself, or its place in the cache."""
    return fetch_side_files(open_storage(name), Path(cache)) if is_remote(name) else Path(name)
