"""Texts and pictures put together by their labels: who agrees, how many, in which split, and the table of it."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emoscale.config import ConfigError, DataError, load
from emoscale.data.streams import Corpus
from emoscale.prepare.matching import SPLITS, MatchConfig, match, table_one
from emoscale.prepare.pipeline import PrepareConfig, prepare

EMOTIONS = ("happy", "sad", "neutral")


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def tables(folder: Path, people: int = 40) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Draw texts and pictures whose numbers differ from kind to kind."""
    draw = np.random.default_rng(0)
    texts = [
        {
            "text": f"Sentence {n}, of words!",
            "emotion": str(draw.choice(EMOTIONS)),
            "age": str(draw.choice(["teenager", "young adult"])),
            "gender": str(draw.choice(["f", "m"])),
        }
        for n in range(400)
    ]
    texts += [row | {"text": row["text"].upper().replace("!", "?")} for row in texts[:30]]
    pictures = []
    for person in range(people):
        age, gender = str(draw.choice(["10s", "20s", "30s"])), str(draw.choice(["f", "m"]))
        for take in range(int(draw.integers(2, 14))):
            emotion = str(draw.choice(EMOTIONS))
            seen = emotion if draw.random() < 0.9 else "afraid"
            pictures.append({"picture": f"p/{person}_{take}.png", "person": f"p{person}", "emotion": emotion, "age": age, "gender": gender, "perceived": seen})
    write(folder / "texts.csv", texts)
    write(folder / "faces" / "pictures.csv", pictures)
    return texts, pictures


def matched(folder: Path, **given: object) -> tuple[list[dict[str, str]], list[str]]:
    lines = match(MatchConfig(str(folder / "texts.csv"), str(folder / "faces/pictures.csv"), **given), folder / "out/manifest.csv")
    with (folder / "out/manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file)), lines


def test_pairs_agree_in_age_group_gender_and_emotion_and_are_as_many_as_the_scarcer(tmp_path: Path) -> None:
    texts, pictures = tables(tmp_path)
    rows, lines = matched(tmp_path)
    said = {row["text"]: row for row in texts}
    seen = {str(tmp_path / "faces" / row["picture"]): row for row in pictures}
    group = {"10s": "teenager", "20s": "young adult", "30s": "young adult"}
    for row in rows:
        text, picture = said[row["text"]], seen[row["picture"]]
        assert (text["emotion"], text["age"], text["gender"]) == (picture["emotion"], group[picture["age"]], picture["gender"])
        assert (row["label"], row["speaker"], picture["perceived"]) == (picture["emotion"], picture["person"], picture["emotion"])
    of_texts = Counter((t["emotion"], t["age"], t["gender"]) for t in texts[:400])
    of_pictures = Counter((p["emotion"], group[p["age"]], p["gender"]) for p in pictures if p["perceived"] == p["emotion"])
    assert len(rows) == sum(min(of_texts[kind], of_pictures[kind]) for kind in of_texts)
    assert len({row["picture"] for row in rows}) == len(rows)
    assert len({row["text"].casefold().strip("!?") for row in rows}) == len(rows), "what is said twice is used once"
    assert "(30 more were there twice)" in lines[0]


def test_nobody_is_in_two_splits_of_eight_to_one_to_one(tmp_path: Path) -> None:
    tables(tmp_path, people=120)
    rows, _ = matched(tmp_path)
    assert all(len({row["split"] for row in rows if row["speaker"] == person}) == 1 for person in {row["speaker"] for row in rows})
    shares = Counter(row["split"] for row in rows)
    for name, share in SPLITS.items():
        assert shares[name] / len(rows) == pytest.approx(share, abs=0.03)
    texts = {name: {row["text"] for row in rows if row["split"] == name} for name in SPLITS}
    assert not texts["train"] & (texts["valid"] | texts["test"])


def test_the_same_seed_gives_the_same_set(tmp_path: Path) -> None:
    tables(tmp_path)
    assert matched(tmp_path) == matched(tmp_path)
    assert matched(tmp_path)[0] != matched(tmp_path, seed=1)[0]


def test_table_one_is_laid_out_as_the_paper_s() -> None:
    """Its numbers, and their sum, which the paper gives as 46,582."""
    counted = {
        "happy": (6349, 762, 778), "sad": (7835, 1048, 992), "anger": (7737, 1099, 877), "embarrassment": (6992, 1002, 862), "fear": (5320, 795, 587),
        "hurt": (4292, 561, 417), "neutral": (8056, 980, 989),
    }  # fmt: skip
    rows = [(name, split) for name, parts in counted.items() for split, count in zip(SPLITS, parts, strict=True) for _ in range(count)]
    lines = table_one(rows, aside="neutral")
    assert lines[0].split() == ["emotion", "train", "valid", "test", "total"]
    found = {line[:15].strip(): [int(word.replace(",", "")) for word in line[15:].split()] for line in lines[1:]}
    assert found["embarrassment"] == [6992, 1002, 862, 8856]
    assert found["all"] == [46_581, 6247, 5502, 58_330]
    assert found["all but neutral"] == [46_581 - 8056, 6247 - 980, 5502 - 989, 58_330 - 10_025]
    assert list(found)[-3:] == ["neutral", "all", "all but neutral"]
    assert len(table_one(rows)) == len(lines) - 1


def test_prepare_makes_a_corpus_of_it(tmp_path: Path) -> None:
    _, pictures = tables(tmp_path, people=12)
    for number, row in enumerate(pictures):
        path = tmp_path / "faces" / row["picture"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20, 3), number % 250, np.uint8)).save(path)
    words = [
        f"match.texts={tmp_path / 'texts.csv'}",
        f"match.pictures={tmp_path / 'faces/pictures.csv'}",
        f"source={tmp_path / 'm/manifest.csv'}",
        "match.aside=neutral",
    ]
    words += [f"output={tmp_path / 'corpus'}", "workers=1", "text.vocab_size=300", "preprocess.visual.encoder=crops", "preprocess.visual.side=16"]
    summary = prepare(load(PrepareConfig, None, words))
    assert any(line.startswith("all but neutral") for line in summary.lines)
    corpus = Corpus(tmp_path / "corpus")
    assert all(item.faces and item.text and item.label["split"] in SPLITS for item in map(corpus.__getitem__, range(len(corpus))))


def test_tables_that_cannot_be_matched(tmp_path: Path) -> None:
    texts, pictures = tables(tmp_path)
    given = (str(tmp_path / "texts.csv"), str(tmp_path / "faces/pictures.csv"))
    with pytest.raises(ConfigError, match=r"name a \.csv file"):
        match(MatchConfig(*given), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"gone\.csv does not exist"):
        match(MatchConfig(given[0], str(tmp_path / "gone.csv")), tmp_path / "m.csv")
    with pytest.raises(ConfigError, match="give both tables"):
        load(PrepareConfig, None, ["source=a.csv", "output=b", "match.texts=c.csv"])
    write(tmp_path / "texts.csv", [{"text": "a", "feeling": "sad"}])
    with pytest.raises(DataError, match="lacks emotion"):
        matched(tmp_path)
    write(tmp_path / "texts.csv", [*texts, {"text": "", "emotion": "sad", "age": "", "gender": ""}])
    with pytest.raises(DataError, match="line 432: text is empty"):
        matched(tmp_path)
    write(tmp_path / "texts.csv", [row | {"emotion": "bored"} for row in texts])
    with pytest.raises(DataError, match="no text agrees with any picture in age, gender and emotion"):
        matched(tmp_path)
    write(tmp_path / "texts.csv", texts)
    write(tmp_path / "faces/pictures.csv", [row for row in pictures if row["person"] in ("p0", "p1")])
    with pytest.raises(DataError, match="2 people cannot be in 3 splits"):
        matched(tmp_path)


def test_without_age_and_gender_emotions_alone_agree(tmp_path: Path) -> None:
    texts, pictures = tables(tmp_path)
    write(tmp_path / "texts.csv", [{"text": row["text"], "emotion": row["emotion"]} for row in texts])
    rows, _ = matched(tmp_path)
    assert len(rows) > 0.8 * sum(row["perceived"] == row["emotion"] for row in pictures)
