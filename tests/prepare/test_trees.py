"""Official folder trees of labelled corpora, built small: who speaks when, what is said, and what was felt."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoscale.config import ConfigError, DataError, load
from emoscale.data.labelled import default_key, labelled_set, read_labels
from emoscale.data.streams import Corpus
from emoscale.evaluation.protocols import make_folds
from emoscale.prepare.pipeline import PrepareConfig, prepare
from emoscale.prepare.trees import TREES, pre_recognition
from emoscale.prepare.trees.iemocap import iemocap
from emoscale.prepare.trees.meld import meld
from emoscale.prepare.trees.msp_improv import msp_improv

EVALUATION = """% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[0.2000 - 1.7000]\tSes0{s}{g}_impro01_F000\t{a}\t[2.5000, 2.5000, 2.5000]
C-E2:\tNeutral;\t()
A-E3:\tval 3; act 2; dom  2;\t()

[2.2000 - 3.9000]\tSes0{s}{g}_impro01_M000\t{b}\t[4.0000, 3.5000, 3.0000]
C-E2:\tExcited;\t()
"""
SAID = """Ses0{s}{g}_impro01_M000 [002.2000-003.9000]: That's  wonderful.
Ses0{s}{g}_impro01_F000 [000.2000-001.7000]: Excuse me.
F: (laughs)
"""
RATINGS = """UTD-IMPROV-{turn}.avi; {raw}; A:3.0; V:2.5; D:NaN ; N:4.6;
worker-1; Angry; Angry,Frustrated; A:2.000; V:2.000; D:3.000; N:5.000;

"""
Write = Callable[..., Any]


@pytest.fixture
def iemocap_tree(film: Any, tmp_path: Path) -> Path:
    """Five sessions of one dialogue each; the third has no video, the fourth no transcription."""
    tree, clip = tmp_path / "IEMOCAP_full_release", film(tmp_path / "clip.mp4", 4.0)
    emotions = [("ang", "exc"), ("neu", "sad"), ("hap", "xxx"), ("sad", "ang"), ("fru", "neu")]
    for s, (a, b) in enumerate(emotions, start=1):
        dialog, given = tree / f"Session{s}" / "dialog", {"s": s, "g": "F" if s % 2 else "M", "a": a, "b": b}
        name = f"Ses0{s}{given['g']}_impro01"
        for folder in ("EmoEvaluation/Categorical", "transcriptions", "avi/DivX", "wav"):
            (dialog / folder).mkdir(parents=True)
        (dialog / "EmoEvaluation" / f"{name}.txt").write_text(EVALUATION.format(**given))
        (dialog / "EmoEvaluation/Categorical" / f"{name}_e2_cat.txt").write_text("Ses01F_impro01_F000 :Neutral state; ()")
        if s != 4:
            (dialog / "transcriptions" / f"{name}.txt").write_text(SAID.format(**given))
        if s != 3:
            shutil.copy(clip, dialog / "avi/DivX" / f"{name}.avi")
    return tree


def test_an_iemocap_tree_is_read_turn_by_turn(iemocap_tree: Path) -> None:
    first, *others = iemocap(iemocap_tree)
    assert first.name == "Session1/Ses01F_impro01"
    assert first.path == iemocap_tree / "Session1/dialog/avi/DivX/Ses01F_impro01.avi"
    assert first.rows is not None
    one, two = first.rows
    assert (one.start, one.end, one.text, one.speaker, one.dialogue, one.index) == (0.2, 1.7, "Excuse me.", "Ses01F", "Ses01F_impro01", 0)
    assert (two.text, two.speaker, two.index) == ("That's wonderful.", "Ses01M", 1)
    rated = {"valence": 4.0, "activation": 3.5, "dominance": 3.0}
    assert two.label == {"raw": "exc", "emotion": "happy", "session": "Ses01", "turn": "Ses01F_impro01_M000"} | rated
    rows = [row for source in others for row in source.rows or ()]
    assert [row.label.get("emotion") for row in rows] == ["neutral", "sad", "happy", None, "sad", "anger", None, "neutral"]
    assert [row.text for row in rows if row.dialogue == "Ses04M_impro01"] == ["", ""]
    assert [bool(source.problem) for source in others] == [False, True, False, False]


def test_a_corpus_made_of_a_tree_trains_the_papers_folds(iemocap_tree: Path, film: Any, tmp_path: Path) -> None:
    """A dialogue without media is in the ledger; nothing else has to be named before fine-tuning."""
    shutil.copy(tmp_path / "clip.mp4", iemocap_tree / "Session3/dialog/wav/Ses03F_impro01.wav")
    words = [f"source={iemocap_tree}", "layout=iemocap", f"output={tmp_path / 'corpus'}", "workers=1"]
    prepare(load(PrepareConfig, None, words))
    corpus = Corpus(tmp_path / "corpus")
    assert len(corpus) == 10
    key = default_key("")
    data = labelled_set(corpus, read_labels("", corpus, key), key=key, classes=["anger", "happy", "neutral", "sad"], only="")
    assert len(data) == 8
    assert data.sessions == [name[:5] for name in data.speakers]
    data = labelled_set(corpus, read_labels("", corpus, "raw"), key="raw", classes=[], only="")
    folds = make_folds("memobert_iemocap", data.speakers, sessions=data.sessions, ids=data.ids)
    assert len(folds) == 10
    who = np.array(data.speakers)
    for fold in folds:
        assert len(set(who[fold.test])) == len(set(who[fold.validation])) == 1
        assert {name[:5] for name in who[fold.train]}.isdisjoint(name[:5] for name in who[fold.test])


def msp_tree(folder: Path, turns: dict[str, str], media: dict[str, str], table: str = "Evalution.txt") -> Path:
    folder.mkdir()
    (folder / table).write_text("".join(RATINGS.format(turn=turn, raw=raw) for turn, raw in turns.items()))
    for turn, suffix in media.items():
        path = folder / f"session{int(turn.split('-')[1][1:])}" / turn[:4] / turn.split("-")[2] / f"MSP-IMPROV-{turn}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


@pytest.mark.parametrize("table", ["Evalution.txt", "Evaluation.txt"])
def test_an_msp_improv_tree_is_read_file_by_file(table: str, tmp_path: Path) -> None:
    turns = {"S01A-F01-P-FM01": "A", "S01A-M01-P-MF02": "N", "S12H-F03-R-FF10": "X", "S12H-M03-R-MF11": "H"}
    tree = msp_tree(tmp_path / "msp", turns, {"S01A-F01-P-FM01": ".avi", "S01A-M01-P-MF02": ".wav", "S12H-F03-R-FF10": ".avi"}, table)
    (tree / "session1/S01A/P/MSP-IMPROV-S01A-F01-P-FM01.wav").write_bytes(b"")
    (tree / "Human_transcriptions").mkdir()
    (tree / "Human_transcriptions/MSP-IMPROV-S01A-F01-P-FM01.txt").write_text("How can\nI not?\n")
    one, two, three, four = msp_improv(tree)
    assert one.name == "session1/S01A/P/MSP-IMPROV-S01A-F01-P-FM01"
    assert one.path is not None
    assert one.audio is not None
    assert (one.path.suffix, one.audio.suffix) == (".avi", ".wav")
    (row,) = one.rows or ()
    assert (row.text, row.speaker, row.dialogue, row.index) == ("How can I not?", "F01", "S01-S01A-P", 1)
    assert row.label == {"raw": "A", "emotion": "anger", "session": "S01", "turn": "S01A-F01-P-FM01", "activation": 3.0, "valence": 2.5}
    assert two.path is not None
    assert (two.path.suffix, two.audio) == (".wav", None)
    assert [(source.rows or ())[0].label.get("emotion") for source in (two, three, four)] == ["neutral", None, "happy"]
    assert "no MSP-IMPROV-S12H-M03-R-MF11.avi or .wav lies below" in four.problem


@pytest.mark.parametrize(("name", "said"), [("iemocap", "holds no Session"), ("msp_improv", "holds neither Evalution.txt nor Evaluation.txt")])
def test_another_folder_is_no_such_tree(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        TREES[name](tmp_path)


def test_damaged_labels_are_named_with_their_line(iemocap_tree: Path, tmp_path: Path) -> None:
    file = iemocap_tree / "Session2/dialog/EmoEvaluation/Ses02M_impro01.txt"
    file.write_text(file.read_text().replace("\tneu\t[2.5000,", "\tneu\t["))
    with pytest.raises(DataError, match=r"Ses02M_impro01\.txt, line 3: .* is no `\[start - end\] turn emotion"):
        iemocap(iemocap_tree)
    tree = msp_tree(tmp_path / "msp", {"S01A-F01-P": "A"}, {})
    with pytest.raises(DataError, match="'S01A-F01-P' is no turn such as"):
        msp_improv(tree)
    (tree / "Evalution.txt").write_text("nothing\n")
    with pytest.raises(DataError, match="no line reads"):
        msp_improv(tree)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ConfigError, match="layout: 'savee', must be among iemocap, meld, msp_improv, or empty"):
        load(PrepareConfig, None, ["source=x", "output=y", "layout=savee"])


MELD_HEAD = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"
MELD_ROWS = [
    (0, 1, "What?", "Monica", "surprise", "negative"), (0, 0, "He’s lost it.", "Phoebe", "sadness", "negative"), (0, 2, "Yes.", "Phoebe", "neutral", "neutral"),
    (0, 3, "Oh.", "Monica", "joy", "positive"), (1, 0, "Hi!", "Joey", "joy", "positive"), (1, 1, "Hey.", "Ross", "neutral", "neutral"), (1, 2, "So?", "Ross", "neutral", "neutral"),
]  # fmt: skip


def write_meld(folder: Path, name: str = "dev_sent_emo.csv") -> Path:
    lines = [f'{n},"{text}",{who},{emotion},{sentiment},{dialogue},{place},4,7,"00:00:01,000","00:00:02,000"'
             for n, (dialogue, place, text, who, emotion, sentiment) in enumerate(MELD_ROWS)]  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join([MELD_HEAD, *lines]), encoding="utf-8-sig")
    return folder


def test_melds_tables_are_dialogues_of_text(tmp_path: Path) -> None:
    sources = meld(write_meld(tmp_path / "meld"))
    assert [source.name for source in sources] == ["dev/dia0", "dev/dia1"]
    rows = sources[0].rows or ()
    assert [(row.speaker, row.text, row.index) for row in rows] == [
        ("Phoebe", "He’s lost it.", 0),
        ("Monica", "What?", 1),
        ("Phoebe", "Yes.", 2),
        ("Monica", "Oh.", 3),
    ]
    assert rows[3].label == {"emotion": "joy", "sentiment": "positive", "split": "dev", "season": "4", "episode": "7"}
    assert {row.dialogue for row in rows} == {"dev/0"}


def test_melds_media_are_named_utterance_by_utterance(tmp_path: Path) -> None:
    tree = write_meld(tmp_path / "meld")
    (tree / "dev_splits_complete").mkdir()
    (tree / "dev_splits_complete" / "dia0_utt0.mp4").write_bytes(b"")
    sources = meld(tree)
    assert len(sources) == len(MELD_ROWS)
    assert sources[0].name == "dev_splits_complete/dia0_utt0"
    assert not sources[0].problem
    assert sources[1].problem.endswith("dia0_utt1.mp4 does not exist")


def test_what_can_be_forecast_is_counted_beside_the_paper(tmp_path: Path) -> None:
    (line, why) = pre_recognition("meld", meld(write_meld(tmp_path / "meld")))
    assert line.startswith("to forecast, dev: 2 targets (Table 1: 506), mean length 3.5; ")
    assert "neutral 1 (196)" in line
    assert "positive 1 (111)" in line
    assert "a tenth" in why
    assert pre_recognition("msp_improv", []) == []


def test_tables_that_are_not_melds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds none of train_sent_emo"):
        meld(tmp_path)
    (tmp_path / "dev_sent_emo.csv").write_text("id,text\n1,a\n")
    with pytest.raises(DataError, match="lacks the columns Dialogue_ID"):
        meld(tmp_path)
