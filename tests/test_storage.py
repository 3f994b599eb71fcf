from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from emoscale.config import ConfigError
from emoscale.storage import StorageError, is_remote, open_storage, upload


def test_files_come_back_as_they_were_stored(tmp_path: Path) -> None:
    (tmp_path / "here/sub").mkdir(parents=True)
    (tmp_path / "here/a").write_bytes(b"\x00a")
    (tmp_path / "here/sub/b").write_bytes(b"b")
    url = f"file://{tmp_path / 'there'}"
    assert upload(tmp_path / "here", ["sub/b", "a"], url) == 2
    storage = pickle.loads(pickle.dumps(open_storage(url)))
    assert storage.names("") == ["a", "sub/b"]
    assert storage.names("sub/") == ["sub/b"]
    storage.get("a", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"\x00a"
    with pytest.raises(StorageError, match="none: No such file"):
        storage.get("none", tmp_path / "back")
    with pytest.raises(StorageError, match="No such file"):
        storage.put(tmp_path / "none", "x")
    storage.delete(["sub/b", "sub/none"])
    assert storage.names("") == ["a"]
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["a"], "an emptied folder goes too"


@pytest.mark.parametrize("url", ["ftp://x/y", "s3://", "file://relative"])
def test_other_storage_is_refused(url: str) -> None:
    assert is_remote(url)
    with pytest.raises(ConfigError, match=r"write s3://bucket/prefix or file:///folder"):
        open_storage(url)


def test_a_server_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "x",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    storage = open_storage("s3://bucket/prefix")
    with pytest.raises(StorageError, match=r"s3://bucket/prefix/a: Could not connect"):
        storage.get("a", tmp_path / "a")


def test_a_folder_is_not_remote() -> None:
    assert not is_remote("/data/corpus")
