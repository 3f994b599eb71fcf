"""Run and corpus folders are read as they are after a kill, a resume or a skip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emoscale.config import DataError
from emoscale.evaluation.folders import corpus_section, curves_section, environment_section, load_metrics


def _log(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_torn_last_line_is_dropped(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1.0 / step} for step in range(1, 6)]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    for cut in range(len(whole) - len(json.dumps(rows[-1])), len(whole) - 1):
        assert load_metrics(_log(tmp_path, whole[:cut])) == rows[:4]
    assert load_metrics(_log(tmp_path, whole[:-1])) == rows


def test_record_after_a_torn_one_is_kept(tmp_path: Path) -> None:
    text = '{"step": 1, "loss": 2.0}\n{"step": 2, "lo{"step": 2, "loss": 1.5}\n\n{"step": 3, "loss": NaN}\n'
    rows = load_metrics(_log(tmp_path, text))
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[1]["loss"] == 1.5


def test_torn_bytes_and_nested_records(tmp_path: Path) -> None:
    text = '{"step": 1, "note": {"a": {"step": 9}}}\n{"step": 2, "note": {"a": {"step": 9}}'
    assert load_metrics(_log(tmp_path, text)) == [{"step": 1, "note": {"a": {"step": 9}}}]
    (tmp_path / "metrics.jsonl").write_bytes('{"step": 1}\n{"step": 2, "note": "é'.encode()[:-1])
    assert load_metrics(tmp_path) == [{"step": 1}]


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_metrics(tmp_path)
    with pytest.raises(DataError, match="line 2 is no record: 'hello'"):
        load_metrics(_log(tmp_path, '{"step": 1}\nhello\n{"step": 2}\n'))


def test_curves(tmp_path: Path) -> None:
    first = _log(
        tmp_path / "a",
        "".join(json.dumps({"step": s, "loss": 3 - s, "loss/mlm": 1, "lr": 0.1, "step_time_s": 2, "data_wait_s": 1}) + "\n" for s in (1, 2, 1, 2))
        + '{"step": 2, "validation/uar": 0.5}\n',
    )
    html = curves_section({"memobert": first}, command="emoscale pretrain x.yaml").html
    order = [html.index(f"<figcaption>{key}<") for key in ("loss", "loss/mlm", "validation/uar", "lr", "data_wait_share")]
    assert order == sorted(order)
    assert "step_time_s" not in html
    assert "legend" not in html
    second = _log(tmp_path / "b", '{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n')
    both = curves_section({"a": first, "b<": second}, command="x")
    assert "b&lt;" in both.html
    assert "c1" in both.html
    assert both.source == f"{first / 'metrics.jsonl'}, {second / 'metrics.jsonl'}"


def _corpus(folder: Path) -> Path:
    manifest = {
        "schema": 1,
        "counts": {"utterances": 1234, "without_face": 7},
        "acoustic": {"encoder": {"name": "log-mel", "revision": "1"}, "width": 80, "frame_s": 0.06, "max_frames": 64},
        "visual": {"encoder": {"name": "grey-pixels"}, "width": 256, "frame_s": 0.1, "max_frames": 36},
        "visual_emotion": {"classes": ["happy", "sad"], "teacher_sha256": "t" * 64},
        "tokenizer": {"folder": "tokenizer", "sha256": "k" * 64, "vocab_size": 30522},
        "shards": [{"file": "shard.00000.mds", "sha256": "a" * 64, "utterances": 1234}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    ledger = [
        {"path": "a.mp4", "status": "done", "reason": None, "utterances": 9, "notes": {"no_face": 3}},
        {"path": "b.mp4", "status": "skipped", "reason": "moov atom not found", "utterances": 0, "notes": {}},
        {"path": "c.mp4", "status": "skipped", "reason": "moov atom not found", "utterances": 0, "notes": {}},
        {"path": "c.mp4", "status": "done", "reason": None, "utterances": 9, "notes": {"no_face": 1}},
    ]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ledger))
    return folder


def test_corpus(tmp_path: Path) -> None:
    html = corpus_section(_corpus(tmp_path), command="emoscale prepare x.yaml").html
    for text in ("1,234", "log-mel", "60 ms", "grey-pixels", "a" * 64, "t" * 64, "k" * 64, "moov atom not found"):
        assert text in html
    assert "2 of 3 inputs used, 1 skipped" in html
    (tmp_path / "ledger.jsonl").unlink()
    assert "Inputs" not in corpus_section(tmp_path, command="x").html


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest.json: no such file"):
        corpus_section(tmp_path, command="x")
    (tmp_path / "environment.json").write_text("{")
    with pytest.raises(DataError, match="not readable as JSON"):
        environment_section(tmp_path, command="x")
    (tmp_path / "environment.json").write_text("[]")
    with pytest.raises(DataError, match="valid dictionary"):
        environment_section(tmp_path, command="x")


def test_environment(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"torch": "2.9", "gpu": [{"name": "H100"}], "world": [1, 2]}))
    html = environment_section(tmp_path, command="x").html
    for text in ("torch", "gpu.0.name", "H100", "1, 2"):
        assert text in html
