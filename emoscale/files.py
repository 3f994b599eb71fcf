"""Files that are whole or absent, their hashes, and names that stay within their folder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

LONGEST_NAME, LONGEST_PATH = 255, 3000
"""Bytes of a file's name, and letters of a path below some folder."""


def file_sha256(path: Path) -> str:
    """Give the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a kill leaves either the old one or the new one, whole."""
    aside = path.with_name(f".{path.name}.writing")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_result(path: Path, result: Any) -> None:
    """Write what a benchmark has found, as JSON; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def stays_inside(name: str) -> bool:
    """Whether a name from outside, put behind a folder, leads to something below it: no `..`, no root, nothing empty."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and can_be_path(name)


def can_be_path(name: str) -> bool:
    """Whether a file may have this path: no NUL, no half character, nothing longer than a file system takes."""
    try:
        parts = name.encode().split(b"/")
    except UnicodeEncodeError:
        return False
    return "\0" not in name and len(name) <= LONGEST_PATH and max(map(len, parts)) <= LONGEST_NAME


def is_plain(name: str) -> bool:
    """Whether a name from outside is that of a file directly in a folder."""
    return stays_inside(name) and "/" not in name


def parse_json(text: str | bytes) -> Any:
    """Read JSON.

    Raises:
        ValueError: it is none, nests deeper than can be read, or holds half of a character.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if (b"\\u" if isinstance(text, bytes) else "\\u") in text:  # type: ignore[operator]  # each with its own kind
        json.dumps(value, ensure_ascii=False).encode()  # JSON can say half of a surrogate pair, no file system or tokenizer takes it
    return value
