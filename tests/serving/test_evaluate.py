"""Scores of a saved model: the same as its run's, on the rows that count."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from emoscale.config import ConfigError, DataError, load
from emoscale.serving.evaluate import EvaluateConfig, evaluate
from tests.tuned import CLASSES, Tuned, predictions, results


def config(tuned: Tuned, arm: str = "prompt", *words: str, **given: Any) -> EvaluateConfig:
    values = {"model": tuned.main / "models" / arm, "corpus": tuned.corpus, "labels": tuned.labels} | given
    return load(EvaluateConfig, None, [*(f"{key}={value}" for key, value in values.items()), *words])


def of_the_fold(tuned: Tuned) -> str:
    """Name the speakers of the test fold, as a list for the command line."""
    return f"[{', '.join(sorted({row['speaker'] for row in predictions(tuned.main, 'prompt')}))}]"


@pytest.mark.parametrize("arm", ["direct", "finetune", "prompt", "lora"])
def test_scores_are_those_of_the_run_on_the_same_rows(arm: str, tuned: Tuned) -> None:
    found, wanted = evaluate(config(tuned, arm, speakers=of_the_fold(tuned))), results(tuned.main)["arms"][arm]
    assert found["unanswered"] == []
    for key in ("wa", "uar", "wf1", "mf1", "aa", "confusion", "utterances", "per_class", "classes"):
        assert found[key] == pytest.approx(wanted[key]) if isinstance(wanted[key], float) else found[key] == wanted[key], key
    assert found["intervals"]["uar"] == pytest.approx(wanted["intervals"]["uar"])


def test_all_labelled_rows_count_without_a_choice(tuned: Tuned) -> None:
    assert evaluate(config(tuned))["utterances"] == 84


def test_what_the_model_cannot_see_is_listed(tuned: Tuned) -> None:
    found = evaluate(config(tuned, "face"))
    assert found["unanswered"]
    assert found["utterances"] == 84 - len(found["unanswered"])


def test_a_report_is_written(tuned: Tuned, tmp_path: Path) -> None:
    evaluate(config(tuned, report=tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    assert "Evaluation" in page
    assert all(name in page for name in CLASSES)


def test_a_backbone_is_no_classifier(tuned: Tuned, tmp_path: Path) -> None:
    from emoscale.training.export import export

    with pytest.raises(ConfigError, match="pre-trained backbone without a head; `emoscale finetune` trains one"):
        evaluate(config(tuned, model=export(tuned.checkpoint, tmp_path / "model")))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"corpus": "none"}, ConfigError, "corpus: none does not exist"),
        ({"corpus": '""'}, ConfigError, "corpus: no value given"),
        ({"labels": "none.csv"}, ConfigError, "labels: none.csv does not exist"),
        ({"speakers": "[nobody]"}, DataError, "speakers: nobody speak in no labelled utterance; there are speaker 0, "),
        ({"only": "x"}, DataError, "no utterance beginning with 'x' has a row of labels"),
        ({"label_key": "mood"}, DataError, "lacks the columns mood"),
    ],
)
def test_what_cannot_be_scored_is_named(given: dict[str, str], error: type[Exception], message: str, tuned: Tuned) -> None:
    with pytest.raises(error, match=message):
        evaluate(config(tuned, **given))


def test_speakers_of_one_class_give_no_number(tuned: Tuned, tmp_path: Path) -> None:
    lines = tuned.labels.read_text().splitlines()
    changed = [",".join([*line.split(",")[:1], "sad", "speaker 0"]) if line.endswith("speaker 0") else line for line in lines]
    (tmp_path / "labels.csv").write_text("\n".join(changed) + "\n")
    with pytest.raises(DataError, match="sad"):
        evaluate(config(tuned, labels=tmp_path / "labels.csv", speakers="[speaker 0]"))


def test_a_corpus_of_other_encoders_is_refused_with_the_difference(tuned: Tuned, tmp_path: Path) -> None:
    corpus = Path(shutil.copytree(tuned.corpus, tmp_path / "corpus"))
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["acoustic"]["encoder"]["name"] = "wav2vec2"
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"acoustic features come from another encoder .*'synthetic' → 'wav2vec2'"):
        evaluate(config(tuned, corpus=corpus))
