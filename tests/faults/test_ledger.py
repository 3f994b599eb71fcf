"""The rows of the fault table: kept one by one, merged from whoever wrote them, and published as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults import ledger
from tests.faults.ledger import COLUMNS, PAGES, Ledger, between, publish, soaked, table

ONE = {"lost_or_twice": 0, "repeated": 3, "resume_s": 1.5, "equal": True}


def test_a_row_is_kept_after_each_injection_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMOSCALE_FAULT_RESULTS", str(tmp_path))
    monkeypatch.setattr(ledger, "package", lambda: "this state")
    Ledger("kill -9 in forward").add(ONE)
    again = Ledger("kill -9 in forward")
    again.add(ONE | {"repeated": 1, "resume_s": 2.5, "lost_or_twice": 2, "equal": False})
    row = json.loads((tmp_path / "kill-9-in-forward.json").read_text())
    assert {key: row[key] for key in COLUMNS[:-1]} == {
        "fault": "kill -9 in forward", "where": "in process", "injections": 2, "lost_or_twice": 2, "steps_repeated": [1, 3], "resume_s": 2.0, "equal": False,
    }  # fmt: skip
    monkeypatch.setattr(ledger, "package", lambda: "another state")
    assert Ledger("kill -9 in forward").done == []


def test_rows_of_others_are_published_beside_ours(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "README.md").write_text("# Faults\n<!-- table -->\nold\n<!-- end of table -->\nrest\n")
    row = {
        "fault": "node drained",
        "where": "SLURM",
        "injections": 5,
        "lost_or_twice": 0,
        "steps_repeated": None,
        "resume_s": 31.0,
        "equal": True,
        "package": "abc",
    }
    (tmp_path / "drained.json").write_text(json.dumps(row | {"log": "more"}))
    (tmp_path / "forward.json").write_text(json.dumps(row | {"fault": "kill", "where": "in process", "steps_repeated": [2, 2], "equal": False}))
    assert [found["fault"] for found in publish(tmp_path, pages)] == ["node drained", "kill"]
    page = (pages / "README.md").read_text()
    assert "| node drained | SLURM | 5 | 0 | – | 31.0 | yes | `abc` |\n| kill | in process | 5 | 0 | 2 | 31.0 | no | `abc` |" in page
    assert "old" not in page
    assert page.endswith("rest\n")
    (tmp_path / "drained.json").unlink()
    assert [found["injections"] for found in publish(tmp_path, pages)] == [5, 5], "what was disturbed elsewhere stays"
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json: no fault, where"):
        publish(tmp_path, pages)
    with pytest.raises(ValueError, match="no <!-- soak -->"):
        between(page, "soak", "")


def test_the_page_shows_the_newest_results() -> None:
    page, dated = (PAGES / "README.md").read_text(), sorted(PAGES.glob("2*.json"))
    assert dated
    assert table(json.loads(dated[-1].read_text())) in page
    if (PAGES / "soak.json").is_file():
        assert soaked(json.loads((PAGES / "soak.json").read_text())) in page
