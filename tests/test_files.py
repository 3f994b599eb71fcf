from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from emoscale.files import file_sha256, replace_text


def test_a_hash_is_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\x00\xff" * 70_000)
    assert file_sha256(path) == hashlib.sha256(b"\x00\xff" * 70_000).hexdigest()


def test_text_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    replace_text(path, "old")
    replace_text(path, "näw")
    assert path.read_text(encoding="utf-8") == "näw"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "\ud800")
    assert path.read_text(encoding="utf-8") == "näw"
