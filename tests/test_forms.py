from __future__ import annotations

import json
from pathlib import Path
from typing import is_typeddict

import pytest

from emoscale import forms
from emoscale.data.synthetic import Synthetic
from emoscale.forms import Hashes, Index, Manifest, Row
from emoscale.records import check, read_json, read_lines
from tests.corpora import write_corpus


def test_what_is_written_has_its_form(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "corpus", Synthetic(3, visual_width=6, acoustic_width=5, expressions=3))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert read_json(folder / "manifest.json", Manifest, "again") == manifest
    assert read_json(folder / "index.json", Index, "again") == json.loads((folder / "index.json").read_text())
    (tmp_path / "ledger.jsonl").write_text(
        '{"path": "a.mp4", "status": "done", "reason": null, "utterances": 3, "notes": {"no_face": 1, "not_finite_ids": ["a#1"]}}\n'
    )
    assert [check(row, Row, "x", "y")["status"] for _, row in read_lines(tmp_path / "ledger.jsonl")] == ["done"]


@pytest.mark.parametrize(
    "form", [form for form in vars(forms).values() if is_typeddict(form) or getattr(form, "__pydantic_config__", None)], ids=lambda form: form.__name__
)
def test_every_form_is_strict(form: type) -> None:
    """A key inherited would be read without the settings of its form."""
    assert form.__dict__["__pydantic_config__"] == forms.MORE
    assert form.__doc__


def test_names_of_files_are_checked_as_they_are_read() -> None:
    assert check({"files": {"assets/tokenizer/vocab.txt": ""}}, Hashes, "x", "y")
