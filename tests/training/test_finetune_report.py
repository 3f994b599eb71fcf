"""What a fine-tuning run leaves to be looked at: every number can be found again in the answers."""

from __future__ import annotations

import re

import numpy as np
import pytest

from emoscale.config import ConfigError, load
from emoscale.data.labelled import labelled_set, read_labels
from emoscale.data.streams import Corpus
from emoscale.evaluation.predictions import Predictions
from emoscale.training.finetune import FinetuneConfig, check
from emoscale.training.finetune_outcomes import Outcome
from emoscale.training.finetune_report import ORACLE, summarise
from tests.tuned import CLASSES, Tuned, predictions, results

ARMS = ("direct", "finetune", "prompt", "frozen", "lora", "face")


def uar(rows: list[dict[str, str]]) -> float:
    """The definition: mean over the classes of the truth of the share answered rightly."""
    recalls = [np.mean([row["predicted"] == name for row in rows if row["truth"] == name]) for name in {row["truth"] for row in rows}]
    return float(np.mean(recalls))


@pytest.mark.parametrize("arm", ARMS)
def test_scores_can_be_recomputed_from_the_answers(arm: str, tuned: Tuned) -> None:
    rows, found = predictions(tuned.main, arm), results(tuned.main)
    assert found["arms"][arm]["uar"] == pytest.approx(uar(rows))
    assert found["arms"][arm]["wa"] == pytest.approx(np.mean([row["truth"] == row["predicted"] for row in rows]))
    (run,) = [run for run in found["runs"] if run["arm"] == arm]
    assert run["test_uar"] == pytest.approx(uar(rows))
    assert run["test_wa"] == found["arms"][arm]["wa"]
    assert run["labels_used"] + 2 * len(rows) <= 84 + len(rows)


@pytest.mark.parametrize("arm", ARMS)
def test_the_answer_is_the_most_probable_class(arm: str, tuned: Tuned) -> None:
    for row in predictions(tuned.main, arm):
        chances = {name: float(row[f"p_{name}"]) for name in CLASSES}
        assert sum(chances.values()) == pytest.approx(1.0, abs=4e-4)
        assert chances[row["predicted"]] == max(chances.values())


def test_the_difference_is_the_one_of_the_arms(tuned: Tuned) -> None:
    found = results(tuned.main)
    (name,) = found["differences"]
    assert name == "finetune − direct"
    gain = found["differences"][name]["uar"]
    assert gain["value"] == pytest.approx(found["arms"]["finetune"]["uar"] - found["arms"]["direct"]["uar"])
    assert gain["low"] <= gain["value"] <= gain["high"]


def test_the_report_shows_every_arm_and_needs_no_network(tuned: Tuned) -> None:
    page = (tuned.main / "report.html").read_text()
    assert all(arm in page for arm in ARMS)
    assert "pre-training" in page  # the curves
    assert not re.search(r"""(src|href)=["']?https?:""", page)


def test_the_oracle_answers_the_rows_of_the_arms(tuned: Tuned, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The generator's own best guess, from the true cues in its table, is one more arm."""
    folder = tmp_path_factory.mktemp("oracle")
    config = load(FinetuneConfig, None, [*tuned.words(folder)[1:]])
    corpus = Corpus(config.corpus)
    data = labelled_set(corpus, read_labels(config.labels, corpus, "label"), key="label", classes=CLASSES, only="")
    table = ["id,speaker,dialogue,label,split,group,shown_face,shown_voice,text_class"]
    table += [
        f"{name},{speaker},d,{CLASSES[label]},labelled,g,{CLASSES[label]},{CLASSES[label]},{CLASSES[label]}"
        for name, speaker, label in zip(data.ids, data.speakers, data.labels, strict=True)
    ]
    (folder / "cues.csv").write_text("\n".join(table) + "\n")
    config.oracle = str(folder / "cues.csv")
    (folder / "environment.json").write_text("{}")
    rows = np.arange(0, 84, 2)
    wrong = (data.labels[rows] + 1) % 4
    asked = Predictions(data.labels[rows], wrong, [data.ids[i] for i in rows], [data.speakers[i] for i in rows], "1", 1)
    found = summarise(folder, [Outcome("bad", 1, "1", 4, 0.0, 0.0, asked, np.eye(4)[wrong], 10)], data, config)
    told = (folder / "report.html").read_text()
    assert "speaker_folds: 1 fold(s) × 1 seed(s), 10 labelled utterances each." in told
    assert "Examples: bad, seed 1, fold 1" in told
    assert found["arms"]["bad"]["uar"] == 0.0
    assert found["arms"][ORACLE]["uar"] == 1.0
    assert found["arms"][ORACLE]["utterances"] == len(rows)


def test_a_class_that_gives_itself_away_is_left_out_beside(tuned: Tuned, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("aside")
    config = load(FinetuneConfig, None, [*tuned.words(folder)[1:], f"aside={CLASSES[1]}"])
    config.compare = []
    corpus = Corpus(config.corpus)
    data = labelled_set(corpus, read_labels(config.labels, corpus, "label"), key="label", classes=CLASSES, only="")
    (folder / "environment.json").write_text("{}")
    rows = np.arange(84)
    answers = np.where(rows % 3 == 0, 1, data.labels[rows])  # every third is called by the class that is set aside
    asked = Predictions(data.labels[rows], answers, [data.ids[i] for i in rows], [data.speakers[i] for i in rows], "1", 1)
    found = summarise(folder, [Outcome("one", 1, "1", 4, 0.0, 0.0, asked, np.eye(4)[answers], 10)], data, config)
    others = [i for i in rows if data.labels[i] != 1]
    scored = found["all_but"][CLASSES[1]]["one"]
    assert scored["classes"] == [name for name in CLASSES if name != CLASSES[1]]
    assert scored["wa"] == pytest.approx(np.mean([i % 3 != 0 for i in others]))
    assert scored["utterances"] == len(others) < found["arms"]["one"]["utterances"] == 84
    assert f"Scores of all but {CLASSES[1]}" in (folder / "report.html").read_text()
    with pytest.raises(ConfigError, match="aside: 'bored' is none of three or more classes"):
        check(load(FinetuneConfig, None, [*tuned.words(folder)[1:], "aside=bored"]))
