"""From parts to a corpus: the same bytes in any order of work, and nothing dropped without a note."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoscale.batch import Utterance
from emoscale.config import DataError
from emoscale.prepare.assembly import assemble, notes_of
from emoscale.prepare.extract import PRECOMPUTED, PreprocessConfig
from emoscale.prepare.parts import Part, PartStore
from emoscale.prepare.shards import verify
from emoscale.prepare.sources import Source
from emoscale.prepare.vocabulary import TextConfig
from tests.corpora import read_utterances

ENCODERS = {
    "acoustic": {"encoder": {"name": "logmel", "revision": "1"}, "width": 3, "frame_s": 0.06},
    "visual": {"encoder": {"name": "pixels", "revision": "1"}, "width": 2, "frame_s": 0.1},
    "classes": [],
}
NAMES = ("a", "b", "c")


def utterance(name: str, number: int) -> Utterance:
    """Number 1 has no face, number 2 no text."""
    draw = np.random.default_rng([ord(name), number])
    faces = 0 if number == 1 else 4
    return Utterance(
        id=f"{name}#{number:04d}", dialogue=f"{name}/0", text="" if number == 2 else f"we go now to {name} unhappily",
        acoustic=(draw.normal(size=(5, 3)) * 2 + 7).astype(np.float16), visual=draw.normal(size=(faces, 2)).astype(np.float16),
        visual_emotion=np.zeros((faces, 0), np.float16),
    )  # fmt: skip


def part(name: str, *, encoders: dict[str, Any] | None = None, key: str = "1") -> Part:
    row = {"path": f"{name}.mp4", "status": "done", "reason": None, "utterances": 3, "notes": {"no_face": 1}}
    return Part(key, row, [utterance(name, number) for number in range(3)], ENCODERS if encoders is None else encoders)


class Work:
    """A corpus folder with its parts."""

    def __init__(self, folder: Path, names: tuple[str, ...] = NAMES) -> None:
        self.store, self.sources = PartStore(folder), [Source(name, Path(f"{name}.mp4")) for name in sorted(names)]
        for name in names:
            self.store.write(name, part(name))

    def assemble(self, *, require: tuple[str, ...] = (), text: TextConfig | None = None) -> dict[str, Any]:
        heads = {item.name: head for item in self.sources if (head := self.store.head(item.name)) is not None}
        text = text or TextConfig(vocab_size=200)
        return assemble(self.sources, heads, self.store, PreprocessConfig(), text, None, list(require), 1 << 16)

    @property
    def ledger(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.store.folder / "ledger.jsonl").read_text().splitlines()]


def shards(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in [*folder.glob("shard.*"), folder / "tokenizer" / "tokenizer.json"]}


def test_the_order_of_work_changes_no_byte(tmp_path: Path) -> None:
    for folder, names in (("one", NAMES), ("other", NAMES[::-1])):
        Work(tmp_path / folder, names).assemble()
    assert shards(tmp_path / "one") == shards(tmp_path / "other")
    assert [item.id for item in read_utterances(tmp_path / "one")] == [f"{name}#{number:04d}" for name in NAMES for number in range(3)]


def test_the_manifest_counts_and_normalises_what_is_there(tmp_path: Path) -> None:
    manifest = Work(tmp_path).assemble()
    assert manifest == verify(tmp_path)
    counts = manifest["counts"]
    assert (counts["utterances"], counts["files"], counts["without_face"], counts["without_text"], counts["without_audio"]) == (9, 3, 3, 3, 0)
    frames = np.concatenate([item.acoustic for item in read_utterances(tmp_path)]).astype(np.float64)
    np.testing.assert_allclose(manifest["acoustic"]["mean"], frames.mean(0), rtol=1e-3)
    np.testing.assert_allclose(manifest["acoustic"]["std"], frames.std(0), rtol=1e-2)
    assert manifest["visual_emotion"] is None
    assert manifest["acoustic"]["encoder"] == {"name": "logmel", "revision": "1"}


def test_an_input_that_is_not_extracted_yet_is_named(tmp_path: Path) -> None:
    work = Work(tmp_path)
    work.sources.append(Source("d", Path("d.mp4")))
    with pytest.raises(DataError, match=r"1 of 4 inputs are not extracted yet, first d\.mp4; run without stage=assemble"):
        work.assemble()
    assert not (tmp_path / "manifest.json").exists()


def test_nothing_new_writes_nothing_and_something_new_a_generation(tmp_path: Path) -> None:
    work = Work(tmp_path)
    first = work.assemble()
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard.*")}
    assert work.assemble() == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard.*")} == stamps
    work.store.write("b", part("b", key="2"))
    assert work.assemble()["generation"] == first["generation"] + 1


def test_the_tokenizer_outlives_new_inputs_but_not_another_configuration(tmp_path: Path) -> None:
    """Models were trained on its numbers."""
    work = Work(tmp_path)
    first = work.assemble()["tokenizer"]
    work.store.write("d", part("d"))
    work.sources.append(Source("d", Path("d.mp4")))
    assert work.assemble()["tokenizer"] == first
    second = work.assemble(text=TextConfig(vocab_size=200, always=["gloomy"]))["tokenizer"]
    assert second["sha256"] != first["sha256"]
    assert "gloomy" in (tmp_path / "tokenizer" / "vocab.txt").read_text().split()
    assert work.assemble(text=TextConfig(tokenizer=""))["tokenizer"] is None


def test_what_is_required_and_absent_is_dropped_with_a_note(tmp_path: Path) -> None:
    work = Work(tmp_path)
    assert work.assemble(require=("visual", "text"))["counts"]["utterances"] == 3
    assert [item.id for item in read_utterances(tmp_path)] == ["a#0000", "b#0000", "c#0000"]
    noted = {"no_face": 1, "dropped_without_visual": 1, "dropped_without_text": 1}
    assert [(row["utterances"], row["notes"]) for row in work.ledger] == [(1, noted)] * 3
    work.assemble(require=("visual", "text"))  # nothing new: the notes stay
    assert [row["notes"] for row in work.ledger] == [noted] * 3
    assert notes_of(tmp_path / "ledger.jsonl") == {name: 3 for name in sorted(noted)}
    assert work.assemble()["counts"]["utterances"] == 9
    assert [row["notes"] for row in work.ledger] == [{"no_face": 1}] * 3


def test_a_skipped_input_stands_in_the_ledger_alone(tmp_path: Path) -> None:
    work = Work(tmp_path)
    row = {"path": "b.mp4", "status": "skipped", "reason": "truncated", "utterances": 0, "notes": {}}
    work.store.write("b", Part("1", row))
    assert work.assemble()["counts"]["files"] == 2
    assert [(item["path"], item["reason"]) for item in work.ledger] == [("a.mp4", None), ("b.mp4", "truncated"), ("c.mp4", None)]


def test_no_utterance_left_is_an_error_that_names_the_ledger(tmp_path: Path) -> None:
    work = Work(tmp_path, ("a",))
    row = {"path": "a.mp4", "status": "skipped", "reason": "truncated", "utterances": 0, "notes": {}}
    work.store.write("a", Part("1", row))
    with pytest.raises(DataError, match=r"no utterance is left of 1 inputs; .*ledger\.jsonl says why"):
        work.assemble()
    assert work.ledger == [row]
    assert not (tmp_path / ".assembly").exists()


def test_parts_of_other_encoders_do_not_mix(tmp_path: Path) -> None:
    work = Work(tmp_path)
    odd = ENCODERS | {"acoustic": ENCODERS["acoustic"] | {"encoder": {"name": "wav2vec2", "revision": "x"}}}
    work.store.write("c", part("c", encoders=odd))
    with pytest.raises(DataError, match="c: was made with other encoders than the rest"):
        work.assemble()


def test_features_that_came_along_are_called_precomputed(tmp_path: Path) -> None:
    work = Work(tmp_path)
    for name in NAMES:
        given = part(name)
        given.encoders = {}
        work.store.write(name, given)
    manifest = work.assemble()
    assert {manifest[key]["encoder"]["name"] for key in ("acoustic", "visual")} == {PRECOMPUTED}
    assert (manifest["acoustic"]["width"], manifest["visual"]["width"]) == (3, 2)
