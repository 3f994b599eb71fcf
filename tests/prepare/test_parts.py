"""Parts of inputs: whole or absent, whatever kills their writer."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoscale.batch import Utterance
from emoscale.config import DataError
from emoscale.prepare.parts import PARTS, Part, PartStore

ROW = {"path": "a.mp4", "status": "done", "reason": None, "utterances": 2, "notes": {"no_face": 1}}


def utterances(frames: int = 4) -> list[Utterance]:
    draw = np.random.default_rng(frames)
    whole = Utterance(
        id="a#0000", dialogue="a/0", index=3, speaker="x", start=1.5, end=2.75, text="größer – “so”", label={"emotion": "happy"},
        acoustic=draw.normal(size=(frames, 3)).astype(np.float16), visual=draw.normal(size=(frames + 1, 2)).astype(np.float16),
        visual_emotion=np.zeros((frames + 1, 0), np.float16),
    )  # fmt: skip
    return [whole, Utterance(id="a#0001", text="nothing else", visual=np.zeros((0, 2), np.float16))]


def assert_same(one: Utterance, other: Utterance) -> None:
    for field in dataclasses.fields(Utterance):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, np.ndarray):
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
            assert np.array_equal(mine, theirs)
        else:
            assert mine == theirs


def test_a_part_comes_back_field_by_field(tmp_path: Path) -> None:
    PartStore(tmp_path).write("films/a", Part("key", ROW, utterances(), {"visual": {"name": "pixels"}}))
    store = PartStore(tmp_path)  # another process
    for mine, theirs in zip(utterances(), store.utterances("films/a"), strict=True):
        assert_same(mine, theirs)
    head = store.head("films/a")
    assert head is not None
    assert vars(head) == {
        "key": "key",
        "row": ROW,
        "encoders": {"visual": {"name": "pixels"}},
        "widths": {"acoustic": 3, "visual": 2, "visual_emotion": 0, "text_features": 0},
    }


def test_an_input_that_was_skipped_has_a_part_without_utterances(tmp_path: Path) -> None:
    store = PartStore(tmp_path)
    store.write("a", Part("key", ROW | {"status": "skipped", "reason": "truncated", "utterances": 0}))
    assert store.utterances("a") == []
    head = store.head("a")
    assert head is not None
    assert head.row["reason"] == "truncated"
    assert set(head.widths.values()) == {0}


def test_names_that_look_alike_or_hold_slashes_have_parts_of_their_own(tmp_path: Path) -> None:
    store = PartStore(tmp_path)
    names = ["a", "a/b", "a_b", "../a", "x" * 400, "ä"]
    for number, name in enumerate(names):
        store.write(name, Part(str(number), ROW))
    assert [head.key for name in names if (head := store.head(name)) is not None] == [str(n) for n in range(len(names))]
    assert {path.parents[1] for path in map(store.path, names)} == {tmp_path / PARTS}


@pytest.mark.parametrize("keep", [0, 1, 100, -30, -1])
def test_a_part_cut_anywhere_is_no_part(keep: int, tmp_path: Path) -> None:
    store = PartStore(tmp_path)
    store.write("a", Part("key", ROW, utterances()))
    data = store.path("a").read_bytes()
    store.path("a").write_bytes(data[:keep])
    assert store.head("a") is None
    with pytest.raises(DataError, match=r"the part of a is damaged .* was removed; run `emoscale prepare` again"):
        store.utterances("a")
    assert not store.path("a").exists()


def test_writing_again_replaces_the_part(tmp_path: Path) -> None:
    store = PartStore(tmp_path)
    for frames in (4, 7):
        store.write("a", Part(f"key {frames}", ROW, utterances(frames)))
    assert len(store.utterances("a")[0].acoustic) == 7
    assert [path.suffix for path in (tmp_path / PARTS).rglob("*") if path.is_file()] == [".npz"]


def write_and_die(folder: Path) -> None:
    """Write a part, and be killed between its last byte and its name."""
    replace: Any = Path.replace

    def killed(self: Path, target: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        replace(self, target)

    Path.replace = killed  # type: ignore[method-assign,assignment]
    PartStore(folder).write("a", Part("new", ROW, utterances(7)))


def test_a_writer_killed_before_the_end_leaves_the_part_before_and_its_litter_is_cleaned(tmp_path: Path) -> None:
    store = PartStore(tmp_path)
    store.write("a", Part("old", ROW, utterances(4)))
    process = multiprocessing.get_context("fork").Process(target=write_and_die, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    head = store.head("a")
    assert head is not None
    assert head.key == "old"
    assert len(litter(tmp_path)) == 1
    mine = store.path("a").with_suffix(f".{os.getpid()}.tmp")
    mine.write_bytes(b"still being written")
    store.clean()
    assert litter(tmp_path) == [mine]


def litter(folder: Path) -> list[Path]:
    return list((folder / PARTS).glob("*/*.tmp"))
