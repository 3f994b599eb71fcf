from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from emoscale.training.outcome import VARIABLE, tell


def test_what_is_told_stands_whole_in_the_file_that_the_launcher_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "outcome.json"))
    tell(step=1)
    tell(step=2, finished=False, unfit=["a", "b"])
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.json"]
    assert json.loads((tmp_path / "outcome.json").read_text()) == {"step": 2, "finished": False, "unfit": ["a", "b"]}
    tell(output=os.fsdecode(b"/runs/\xfc\xc3\xbc"))
    assert (tmp_path / "outcome.json").read_bytes() == b'{"output": "/runs/\xfc\xc3\xbc"}', "as a shell names it"


def test_nobody_is_told_where_nobody_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    tell(step=1)
    assert not list(tmp_path.iterdir())
