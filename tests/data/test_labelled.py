"""Joining a corpus with its labels: what cannot be scored is named, nothing is made up."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoscale.batch import Utterance
from emoscale.config import ConfigError, DataError
from emoscale.data.collate import pack
from emoscale.data.labelled import LabelEncoder, Part, check_encoders, check_modalities, labelled_set, read_labels
from emoscale.data.synthetic import Synthetic
from emoscale.data.tokens import Features, TextEncoder
from tests.data.conftest import Listed

MODALITIES = ["text", "visual", "acoustic"]


def corpus(*labels: Any) -> Listed:
    """Utterances a#0000 … of two speakers, with labels of their own."""
    items = [Utterance(id=f"a#{i:04d}", speaker=f"s{i % 2}", text="we go", label={} if name is ... else {"label": name}) for i, name in enumerate(labels)]
    return Listed(items, Synthetic(0, visual_width=6, acoustic_width=5, expressions=0).manifest)


def table(path: Path, *lines: str) -> str:
    (path / "labels.csv").write_text("\n".join(["id,label,speaker", *lines]) + "\n")
    return str(path / "labels.csv")


def joined(listed: Listed, labels: str = "", *, classes: tuple[str, ...] = (), only: str = "") -> Any:
    return labelled_set(listed, read_labels(labels, listed, "label"), key="label", classes=list(classes), only=only)


def test_a_table_gives_labels_speakers_and_the_order_of_the_corpus(tmp_path: Path) -> None:
    data = joined(corpus(..., ..., ...), table(tmp_path, "a#0002,sad,x", "a#0000,happy,"))
    assert data.ids == ["a#0000", "a#0002"]
    assert data.classes == ["happy", "sad"]
    assert data.labels.tolist() == [0, 1]
    assert data.speakers == ["s0", "x"]  # the table's, else the corpus'
    assert [data[1].id, len(data)] == ["a#0002", 2]


def test_records_of_the_corpus_may_carry_the_labels() -> None:
    data = joined(corpus("sad", ..., "happy", "sad"), classes=("sad", "happy"))
    assert data.ids == ["a#0000", "a#0002", "a#0003"]
    assert data.labels.tolist() == [0, 1, 0]


def test_a_table_from_a_spreadsheet_is_read(tmp_path: Path) -> None:
    name = table(tmp_path, "a#0000,happy,x", "a#0001,traurig-für,x")
    text = Path(name).read_text(encoding="utf-8")
    Path(name).write_text(text, encoding="utf-8-sig")
    assert joined(corpus(..., ...), name).classes == ["happy", "traurig-für"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a#0000,happy,x", "a#0001,,x"], r"1 rows have no label: a#0001"),
        (["a#0000,happy,x", "a#0001,  ,x"], r"1 rows have no label: a#0001"),
        (["a#0000,happy,x", "a#0001"], r"1 rows have no label: a#0001"),
        (["a#0000,happy,x", "a#0001,bored,x"], r"1 rows have a label that is none of happy, sad: a#0001 \(bored\)"),
        (["a#0000,happy,x", "a#0001,happy,x"], r"all 2 rows have the label 'happy'.*a#0000"),
        (["a#0000,happy,x", "a#0000,sad,x"], r"1 ids stand there more than once: a#0000"),
        (["b#0000,happy,x", "b#0001,sad,x"], r"no utterance has a row of labels.*'a#0000'.*'b#0000'"),
    ],
)
def test_labels_that_cannot_be_used_are_named(lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        joined(corpus(..., ...), table(tmp_path, *lines), classes=("happy", "sad"))


@pytest.mark.parametrize("blank", [None, ""])
def test_a_blank_label_in_a_record_is_missing_too(blank: Any) -> None:
    with pytest.raises(DataError, match="1 rows have no label: a#0001"):
        joined(corpus("sad", blank, "happy"))


def test_an_id_that_stands_in_the_corpus_twice_is_an_error() -> None:
    listed = corpus("sad", "happy")
    listed.utterances[1].id = "a#0000"
    with pytest.raises(DataError, match="1 ids stand in the corpus more than once: a#0000"):
        joined(listed)


def test_many_wrong_rows_are_counted_and_some_named(tmp_path: Path) -> None:
    lines = [f"a#{i:04d},bored,x" for i in range(7)]
    with pytest.raises(DataError, match=r"7 rows .*a#0004 \(bored\), …; name it"):
        joined(corpus(*[...] * 7), table(tmp_path, *lines), classes=("happy", "sad"))


def test_rows_without_an_utterance_are_named_on_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = ["a#0000,happy,x", "a#0001,sad,x", "a#0009,sad,x", "b#0000,sad,x"]
    with caplog.at_level(logging.WARNING, logger="emoscale"):
        assert len(joined(corpus(..., ...), table(tmp_path, *lines), only="a#")) == 2
    assert [record.getMessage() for record in caplog.records] == ["1 labelled rows have no utterance in the corpus, and count nowhere: a#0009"]


def test_only_takes_a_prefix() -> None:
    listed = corpus("sad", "happy", "sad")
    listed.utterances[2].id = "b#0000"
    assert joined(listed, only="a#").ids == ["a#0000", "a#0001"]
    with pytest.raises(DataError, match="no utterance beginning with 'c' has"):
        joined(listed, only="c")


def test_a_table_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"labels: .*none.csv does not exist"):
        read_labels(str(tmp_path / "none.csv"), corpus(...), "label")
    (tmp_path / "labels.csv").write_text("name,label\na,b\n")
    with pytest.raises(DataError, match="lacks the columns emotion, id; it has name, label"):
        read_labels(str(tmp_path / "labels.csv"), corpus(...), "emotion")


@pytest.mark.parametrize("names", [[], ["face"], ["text", "smell"]])
def test_modalities_that_do_not_exist(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="modalities"):
        check_modalities(names)


def test_features_of_another_encoder_are_refused_by_name() -> None:
    mine, theirs = (Synthetic(0, visual_width=6, acoustic_width=5, expressions=0).manifest for _ in range(2))
    check_encoders(theirs, mine, "corpus")
    theirs["acoustic"]["encoder"] = {"name": "wav2vec2"}
    with pytest.raises(DataError, match=r"corpus: its acoustic features .*'wav2vec2' → 'synthetic'"):
        check_encoders(theirs, mine, "corpus")
    theirs["visual"]["width"] = 7
    with pytest.raises(DataError, match=r"visual features .*width: 7 → 6"):
        check_encoders(theirs, mine, "corpus")


@pytest.fixture
def encoder_of(tokenizer: Any, synthetic: Synthetic) -> Any:
    features = [Features.from_manifest(synthetic.manifest[name]) for name in ("visual", "acoustic")]

    def make(**options: Any) -> LabelEncoder:
        given = {"labels": {}, "template": "{text} i am [MASK] .", "modalities": MODALITIES} | options
        return LabelEncoder(TextEncoder(tokenizer, 10), *features, **given)

    return make


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("we go", ["we", "go", "."]),
        ("we go.", ["we", "go", "."]),
        ("now and then it rains on our red boat while you wait", ["now", "and", "then", "it", "rains", "on"]),
        ("we [MASK] go", None),
    ],
)
def test_the_prompt_is_the_last_mask_whatever_stands_before_it(text: str, words: list[str] | None, encoder_of: Any, tokenizer: Any) -> None:
    item = encoder_of()(Utterance(id="a", text=text))
    tokens = tokenizer.convert_ids_to_tokens(item.tokens.ids)
    assert tokens[item.prompt] == "[MASK]"
    assert tokens[item.prompt - 2 :] == ["i", "am", "[MASK]", ".", "[SEP]"]
    assert tokens.count("[MASK]") == 1  # what somebody said is text, not a mask
    assert len(tokens) <= 12
    if words is not None:
        assert tokens[1 : item.prompt - 2] == words


def test_without_a_template_there_is_no_prompt(encoder_of: Any) -> None:
    item = encoder_of(template="")(Utterance(id="a", text="we go"))
    assert item.prompt == -1
    assert "prompt" not in pack([item]).targets


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_modality_left_out_is_as_if_absent(modality: str, encoder_of: Any, synthetic: Synthetic) -> None:
    whole = next(u for u in (synthetic[i] for i in range(60)) if u.text and len(u.visual) and len(u.acoustic))
    item = encoder_of(template="", modalities=[modality])(whole)
    lengths = {"text": len(item.tokens.ids) - 2, "visual": len(item.visual), "acoustic": len(item.acoustic)}
    assert [name for name, count in lengths.items() if count] == [modality]


def test_the_label_is_the_tables(encoder_of: Any, synthetic: Synthetic) -> None:
    encoder = encoder_of(labels={synthetic[0].id: 2, synthetic[1].id: 1})
    assert pack([encoder(synthetic[0]), encoder(synthetic[1])]).targets["classify"].values.tolist() == [2, 1]


def test_heads_need_no_expression_teacher(encoder_of: Any, synthetic: Synthetic) -> None:
    """A checkpoint whose corpus had a teacher is fine-tuned on one that has none, and the other way round."""
    with_face = next(u for u in (synthetic[i] for i in range(60)) if len(u.visual))
    with_face.visual_emotion = np.zeros((len(with_face.visual), 0), np.float16)
    item = encoder_of()(with_face)
    assert len(item.visual) == len(with_face.visual)


def test_features_that_are_not_finite_give_nothing(encoder_of: Any, synthetic: Synthetic) -> None:
    broken = next(u for u in (synthetic[i] for i in range(60)) if len(u.visual))
    broken.visual[0, 0] = np.inf
    assert encoder_of()(broken) is None
    assert encoder_of(modalities=["text"])(broken) is not None  # it is not looked at


def test_another_utterance_of_the_same_id_is_encoded_anew(encoder_of: Any) -> None:
    """Two films of one name give utterances of one id; only a set of unique ids may be remembered."""
    one, other = Utterance(id="film#0000", text="we go"), Utterance(id="film#0000", text="it rains now")
    encoder = encoder_of()
    assert len(encoder(one).tokens.ids) != len(encoder(other).tokens.ids)
    remembering = encoder_of(remember=True)
    assert remembering(one) is remembering(one)


def test_a_part_is_some_rows_of_the_whole() -> None:
    whole = joined(corpus("sad", "happy", "sad"))
    part = Part(whole, np.array([2, 0]))
    assert [part[i].id for i in range(len(part))] == ["a#0002", "a#0000"]
    assert part.manifest is whole.manifest
