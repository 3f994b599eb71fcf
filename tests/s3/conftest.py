from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from emoscale.data.synthetic import Synthetic
from emoscale.storage import upload
from tests.corpora import write_corpus
from tests.s3.proxy import Proxy
from tests.s3.server import Server, start
from tests.services import missing

COUNT, SHARD = 400, 1 << 15


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server for all tests here; its variables are set, as a user's are."""
    assert not missing("s3")
    running = start(tmp_path_factory.mktemp("ceph"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running
    running.stop()


@pytest.fixture(scope="session")
def bucket(server: Server) -> Any:
    """Give an empty bucket."""
    return boto3.resource("s3").create_bucket(Bucket="corpora")


@pytest.fixture(scope="session")
def corpus(bucket: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a corpus, and store it under `whole`."""
    folder = write_corpus(tmp_path_factory.mktemp("local") / "corpus", Synthetic(COUNT, visual_width=6, acoustic_width=5, expressions=3), shard_bytes=SHARD)
    stored(folder, "whole")
    return folder


@pytest.fixture
def proxy(server: Server, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Put a proxy before the server that spoils nothing yet, and send everybody through it."""
    between = Proxy(server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{between.port}")
    yield between
    between.stop()


def stored(folder: Path, prefix: str) -> str:
    """Store a corpus; give its URL."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    url = f"s3://corpora/{prefix}"
    upload(folder, [*(name for name in names if name != "manifest.json"), "manifest.json"], url)
    return url
