"""What was pre-trained on and is scored later is named, in the log, the results and the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from emoscale.data.streams import Corpus
from emoscale.training.overlap import heard_before
from tests.tuned import Tuned


def test_utterances_that_were_pre_trained_on_are_named(tuned: Tuned, caplog: pytest.LogCaptureFixture) -> None:
    corpus = Corpus(tuned.corpus)
    with caplog.at_level("WARNING", logger="emoscale"):
        (row,) = heard_before([tuned.checkpoint, tuned.checkpoint], [corpus[3], corpus[5]])
    assert row | {"corpora": []} == {
        "corpora": [],
        "compared": True,
        "scored": 2,
        "found": 2,
        "pairs": [(corpus[3].id, corpus[3].id), (corpus[5].id, corpus[5].id)],
    }
    assert f"2 of 2 scored utterances stand in {tuned.corpus}" in caplog.text


def test_a_table_says_so(tuned: Tuned) -> None:
    (row,) = json.loads((tuned.main / "results.json").read_text())["overlap"]
    assert row["found"] == row["scored"] > 0
    assert "scored utterances were pre-trained on" in (tuned.main / "report.html").read_text()


def test_corpora_that_are_gone_are_not_compared(tuned: Tuned, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(tuned.checkpoint, tmp_path / "step"))
    described = json.loads((moved / "assets" / "model.json").read_text())
    described["data"]["corpora"] = [str(tmp_path / "gone")]
    (moved / "assets" / "model.json").write_text(json.dumps(described))
    (row,) = heard_before([moved], [Corpus(tuned.corpus)[0]])
    assert row["compared"] is False
    assert "gone" in row["why"]
