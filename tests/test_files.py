from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from emoscale.files import can_be_path, file_sha256, is_plain, parse_json, replace_text, stays_inside


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


@pytest.mark.parametrize("name", ["a", "a/b.json", "tokenizer/vocab.txt", "a..b", "…", "./a"])
def test_names_below_a_folder(name: str) -> None:
    assert stays_inside(name)
    assert is_plain(name) == ("/" not in name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/..", "a/../../b", "/", "/a", "//a", "a\0b", "x" * 256, "é" * 128, "a/" + "x" * 300, "a/" * 2000 + "b", "\ud800"]
)
def test_names_that_leave_it_or_are_no_names(name: str) -> None:
    assert not stays_inside(name)
    assert not is_plain(name)


def test_an_absolute_path_is_a_path_all_the_same() -> None:
    assert can_be_path("/a/b")
    assert not can_be_path("/a/" + "x" * 256)


def test_json_is_read_or_a_value_error() -> None:
    assert parse_json(b'{"a": [1, "\\u00e9"]}') == {"a": [1, "é"]}
    assert parse_json('"\\ud83d\\ude00"') == "😀"
    for text in ("", "{", "[" * 100_000, '{"a":' * 50_000, "9" * 5000, '"\\ud800"', b"\xff", b"\xff\xfe[\x00", '{"\\udfff": 1}'):
        with pytest.raises(ValueError):  # noqa: PT011  # each says its own
            parse_json(text)
