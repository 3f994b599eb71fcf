"""A report is one well-formed file that loads nothing, escapes everything and names where its numbers come from."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from emoscale.evaluation.metrics import DEFINITIONS, paired_difference, score_runs
from emoscale.evaluation.predictions import OTHER, Predictions
from emoscale.evaluation.protocols import choose_checkpoint
from emoscale.evaluation.report import (
    Example,
    Section,
    classes_section,
    confusion_section,
    examples_section,
    scores_section,
    speakers_section,
    write_report,
)

EVIL = '<script>alert("1")</script>'
CLASSES = ["anger", EVIL, "neutral", "sad"]
COMMAND, SOURCE = "emoscale evaluate runs/x", "runs/x/evaluation.json"


class _Checker(HTMLParser):
    """Fails on tags that do not nest; collects visible text and attributes."""

    VOID = frozenset({"meta", "br", "line", "circle", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _arms() -> dict[str, list[Predictions]]:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 4, 200)
    ids, speakers = [f"u{row}" for row in range(200)], [f"s{row % 30}" for row in range(200)]
    hard = generator.random(200)
    arms = {"ours": 0.8, "scratch & none": 0.5}
    return {
        arm: [Predictions(truth, np.where(hard < share, truth, OTHER if share < 0.7 else 0), ids, speakers, seed=seed) for seed in range(2)]
        for arm, share in arms.items()
    }


def _report(path: Path) -> str:
    arms = _arms()
    scores = {arm: score_runs(runs, CLASSES, resamples=200) for arm, runs in arms.items()}
    first, second = arms.values()
    differences = {"ours − scratch": paired_difference(first, second, CLASSES, resamples=200)}
    flag = choose_checkpoint({1: 0.1}, rule="paper", test={1: 0.2}).flag
    where = {"command": COMMAND, "source": SOURCE}
    examples = [
        Example("f#0001", EVIL, "anger", "sad", {"anger": 0.1, "sad": 0.9}, EVIL),
        Example("f#0002", "", "anger", "anger", {"anger": 0.7, "sad": 0.3}),
    ]
    sections = [
        scores_section(scores, differences=differences, warning=flag, **where),
        classes_section(scores, **where),
        confusion_section(scores, **where),
        speakers_section(arms, **where),
        examples_section(examples, worst=1, **where),
    ]
    write_report(path, title=f"A {EVIL} title", sections=sections)
    return path.read_text(encoding="utf-8")


def _parsed(html: str) -> _Checker:
    checker = _Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


def test_report_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    html = _report(tmp_path / "deep" / "report.html")
    checker = _parsed(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(checker.tags)
    assert not re.search(r"https?://|url\(|@import|@font-face", html)
    assert not [name for name, _ in checker.attributes if name.startswith("on") or name == "src"]
    assert all(value.startswith("#") for name, value in checker.attributes if name == "href")
    assert "default-src 'none'" in html
    assert "prefers-color-scheme:dark" in html
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_report_says_what_it_shows(tmp_path: Path) -> None:
    checker = _parsed(_report(tmp_path / "report.html"))
    text = " ".join(checker.text)
    for short, definition in DEFINITIONS.values():
        assert short in text
        assert definition in text
    assert text.count(COMMAND) == text.count(SOURCE) == 5
    assert EVIL in text
    assert "oracle upper bound" in text
    assert "30 speakers" in text
    assert "2 training seeds" in text
    assert "6 more" in text
    assert "f#0001" in text
    assert "f#0002" not in text
    assert "other" in text


def test_numbers_are_those_of_the_scores() -> None:
    scores = {arm: score_runs(runs, CLASSES, resamples=200) for arm, runs in _arms().items()}
    html = scores_section(scores, command=COMMAND, source=SOURCE).html
    uar = scores["ours"].intervals["uar"]
    assert f">{100 * uar.value:.1f}<small>{100 * uar.low:.1f}–{100 * uar.high:.1f}</small>" in html
    heat = confusion_section(scores, command=COMMAND, source=SOURCE).html
    counts = re.findall(r"<small>(\d+)</small>", heat)
    assert list(map(int, counts)) == [n for arm in scores.values() for row in arm.confusion for n in row]


def test_every_class_has_its_f1() -> None:
    """Two of three right of one class, and one answer too many of the other: 2·2/(3 + 2) and 2·1/(1 + 2)."""
    scores = {"ours": score_runs([Predictions([0, 0, 0, 1], [0, 0, 1, 1])], ["anger", "sad"])}
    html = classes_section(scores, command=COMMAND, source=SOURCE).html
    rows = [re.sub("<[^>]+>", " ", row).split() for row in html.split("<tr>")]
    assert ["anger", "3", "80.0"] in rows
    assert ["sad", "1", "66.7"] in rows


def test_speakers_are_ordered_from_hardest() -> None:
    truth = [0, 1, 0, 1, 0, 1]
    runs = [Predictions(truth, [0, 1, 1, 0, 0, 0], speakers=["easy", "easy", "hard", "hard", "", ""])]
    html = speakers_section({"ours": runs}, command=COMMAND, source=SOURCE).html
    assert html.index("hard") < html.index("(unknown)") < html.index("easy")
    assert ">50.0<" in html


def test_failed_write_leaves_the_old_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, title="first", sections=[])
    with pytest.raises(UnicodeEncodeError):
        write_report(path, title="second", sections=[Section("bad", "\ud800")])
    assert "first" in path.read_text(encoding="utf-8")
