"""A corpus in object storage, read through a bounded cache of verified shards."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from bisect import bisect_right
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from emoscale.batch import Utterance
from emoscale.config import DataError
from emoscale.data.streams import Corpus
from emoscale.files import file_sha256
from emoscale.storage import Storage, StorageError, is_remote, open_storage

log = logging.getLogger("emoscale")
ATTEMPTS, PATIENCE_S = 4, 0.5
"""Downloads of one shard before it counts as bad, and the pause after the first failure; each later one is twice as long."""
SIDE_FILES = ("index.json", "tokenizer/", "teacher/", "ledger.jsonl")
"""What a corpus needs besides manifest and shards; a name with a slash is a folder."""


class RemoteCorpus(Corpus):
    """A prepared corpus behind a storage URL; shards come when they are first read, and go when the cache is full.

    Every process of a node may share the cache: a shard is fetched once, by whoever asks first. It is compared with its hash
    before anybody reads it, fetched again where it differs, and after `ATTEMPTS` the reader raises: an epoch never ends early
    because a shard is bad.

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
        super().__init__(fetch_side_files(self.storage, cache))
        self.name = self.url

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
        return super().__getstate__() | {"_locks": {}}

    def _lock(self, name: str) -> FileLock:
        """Give the lock of a shard, the same object each time: it may be taken again by who holds it."""
        if name not in self._locks:
            self._locks[name] = FileLock(self.folder / f".{name}.lock")
        return self._locks[name]

    def _verify(self, entry: dict[str, Any]) -> None:
        if (self.folder / entry["basename"]).parent.resolve() != self.folder.resolve():
            raise DataError(f"{self.url}: index.json names {entry['basename']!r}, which lies outside the corpus")
        with self._lock(entry["basename"]):
            self._fetch(entry)
        self._make_room(entry["basename"])

    def _fetch(self, entry: dict[str, Any]) -> None:
        path, wanted = self.folder / entry["basename"], entry.get("hashes", {}).get("sha256")
        if path.is_file():
            if file_sha256(path) == wanted:
                os.utime(path)
                return
            path.unlink()
        seen = ""
        for attempt in range(ATTEMPTS):
            aside = path.with_name(f".{path.name}.fetching")
            try:
                self.storage.get(entry["basename"], aside)
                if file_sha256(aside) == wanted:
                    os.replace(aside, path)
                    return
                seen = f"its sha256 is {file_sha256(aside)[:12]}…, index.json says {str(wanted)[:12]}…"
            except StorageError as error:
                seen = str(error)
            aside.unlink(missing_ok=True)
            log.warning("%s/%s: fetch %d of %d failed: %s", self.url, path.name, attempt + 1, ATTEMPTS, seen)
            time.sleep(PATIENCE_S * 2**attempt)
        raise DataError(f"{self.url}/{path.name}: shard cannot be had ({ATTEMPTS} fetches; {seen}); upload the corpus again, or leave it out of data.corpora")

    def _make_room(self, kept: str) -> None:
        """Remove the shards read longest ago until the rest fits; one process at a time, or each would remove what another keeps."""
        with FileLock(self.folder / ".room.lock"):
            self._remove_oldest(kept)

    def _remove_oldest(self, kept: str) -> None:
        shards = []
        for entry in self._shards:
            path = self.folder / entry["raw_data"]["basename"]
            try:
                shards.append((path.stat().st_mtime, path, path.stat().st_size))
            except FileNotFoundError:
                continue
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
                for name in [name for prefix in SIDE_FILES for name in storage.names(prefix)]:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    storage.get(name, folder / name)
                os.replace(fresh, known)
        except StorageError as error:
            raise DataError(f"{error}; is there a corpus that `emoscale prepare` uploaded?") from error
    return folder


def local_folder(name: str, cache: str | Path) -> Path:
    """Give the folder that holds a corpus' manifest and tokenizer: itself, or its place in the cache."""
    return fetch_side_files(open_storage(name), Path(cache)) if is_remote(name) else Path(name)
