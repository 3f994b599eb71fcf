"""Object storage: whole files by name below a URL, `s3://bucket/prefix` or `file:///folder`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Protocol

from emoscale.config import ConfigError, EmoscaleError
from emoscale.redaction import REMEDY, holds_credentials

CONNECT_S, READ_S, TRIES = 10.0, 30.0, 3
"""Seconds until an unreachable, and until a silent server counts as failed, and how often a request is made before that is told."""


class StorageError(EmoscaleError):
    """A file could not be fetched or stored; trying again may help."""


class Storage(Protocol):
    """Where a corpus lies when it is not a local folder."""

    url: str

    def get(self, name: str, path: Path) -> None:
        """Write a stored file to `path`. Raises StorageError."""
        ...

    def put(self, path: Path, name: str) -> None:
        """Store a file. Raises StorageError."""
        ...

    def names(self, prefix: str) -> list[str]:
        """List the stored files whose names begin so. Raises StorageError."""
        ...

    def delete(self, names: list[str]) -> None:
        """Remove stored files; one that is not there is no error. Raises StorageError."""
        ...


def is_remote(url: str) -> bool:
    """Whether a name is a storage URL, not a folder."""
    return "://" in str(url)


def open_storage(url: str) -> Storage:
    """Give the storage of a URL.

    Credentials and region come from where boto3 finds them; `AWS_ENDPOINT_URL_S3`, or `S3_ENDPOINT_URL` as streaming calls it,
    names a server that is not Amazon's.

    Raises:
        ConfigError: no such kind of storage, or the URL holds credentials.
    """
    if holds_credentials(url):
        raise ConfigError(f"{url}: this URL holds credentials; {REMEDY}")
    kind, _, place = url.partition("://")
    if kind == "s3" and place.strip("/"):
        return _S3(url)
    if kind == "file" and place.startswith("/"):
        return _Files(url)
    raise ConfigError(f"{url}: no storage of this kind; write s3://bucket/prefix or file:///folder")


def upload(folder: Path, names: list[str], url: str) -> int:
    """Store files of a folder, the last one last (a manifest: who sees it finds the rest); give how many.

    Raises:
        ConfigError: no such kind of storage.
        StorageError: a file could not be stored.
    """
    storage = open_storage(url)
    for name in names:
        storage.put(folder / name, name)
    return len(names)


class _Files:
    """A folder, such as one on a network file system whose files are worth a local cache."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._folder = Path(url.removeprefix("file://"))

    def get(self, name: str, path: Path) -> None:
        try:
            shutil.copyfile(self._folder / name, path)
        except OSError as error:
            raise StorageError(f"{self.url}/{name}: {error.strerror or error}") from error

    def put(self, path: Path, name: str) -> None:
        try:
            target = self._folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(f".{target.name}.writing")  # as in a bucket, a file is there whole or not at all
            shutil.copyfile(path, aside)
            os.replace(aside, target)
        except OSError as error:
            raise StorageError(f"{self.url}/{name}: {error.strerror or error}") from error

    def names(self, prefix: str) -> list[str]:
        found = (path.relative_to(self._folder).as_posix() for path in self._folder.rglob("*") if path.is_file())
        return sorted(name for name in found if name.startswith(prefix))

    def delete(self, names: list[str]) -> None:
        for name in names:
            path = self._folder / name
            try:
                path.unlink(missing_ok=True)
                while path.parent != self._folder and not any(path.parent.iterdir()):
                    path = path.parent
                    path.rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StorageError(f"{self.url}/{name}: {error.strerror or error}") from error


class _S3:
    """A bucket. Each process has its own connections: two that share one socket read one another's answers."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._client: Any = None
        self._owner = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None, "_owner": 0}

    def get(self, name: str, path: Path) -> None:
        self._call(name, lambda client: client.download_file(self._bucket, self._prefix + name, str(path), Config=_one_thread()))

    def put(self, path: Path, name: str) -> None:
        self._call(name, lambda client: client.upload_file(str(path), self._bucket, self._prefix + name, Config=_one_thread()))

    def names(self, prefix: str) -> list[str]:
        def listed(client: Any) -> list[str]:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix + prefix)
            return [item["Key"].removeprefix(self._prefix) for page in pages for item in page.get("Contents", [])]

        return self._call(prefix, listed)

    def delete(self, names: list[str]) -> None:
        def delete(client: Any) -> None:
            for name in names:  # one by one: not every server speaks the checksums that a request for many asks for
                client.delete_object(Bucket=self._bucket, Key=self._prefix + name)

        self._call(names[0] if names else "", delete)

    def _call(self, name: str, action: Any) -> Any:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return action(self._connected())
        except (Boto3Error, BotoCoreError, ClientError, OSError) as error:
            raise StorageError(f"{self.url}/{name}: {' '.join(str(error).split())}") from error

    def _connected(self) -> Any:
        if self._owner != os.getpid():  # a fork inherits the parent's sockets
            from boto3.session import Session
            from botocore.config import Config

            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("S3_ENDPOINT_URL") or None
            options = Config(connect_timeout=CONNECT_S, read_timeout=READ_S, retries={"total_max_attempts": TRIES, "mode": "standard"})
            self._client = Session().client("s3", endpoint_url=endpoint, config=options)
            self._owner = os.getpid()
        return self._client


def _one_thread() -> Any:
    """Whole files by one thread: loader workers are the parallelism, and a pool would outlive a fork.

    And one try: requests are repeated below this, fetches above it, and three nested loops would wait half an hour for a dead server.
    """
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(use_threads=False, num_download_attempts=1)
