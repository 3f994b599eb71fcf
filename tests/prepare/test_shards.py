from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from emoscale.batch import Utterance
from emoscale.codecs import encode_audio, encode_faces
from emoscale.config import DataError
from emoscale.prepare.parts import Part, PartStore
from emoscale.prepare.shards import Statistics, publish, verify, write_shards
from tests.corpora import read_utterances

WIDTHS = {"acoustic": 4, "visual": 3, "visual_emotion": 2}


def utterance(number: int, voice: int, face: int) -> Utterance:
    random = np.random.default_rng(number)
    return Utterance(
        id=f"a#{number:04d}",
        dialogue="a/0000",
        index=number,
        start=number * 1.5,
        end=number * 1.5 + 1.25,
        text=f"word {number}" if number else "",
        acoustic=random.normal(3, 2, (voice, 4)).astype(np.float16),
        visual=random.normal(size=(face, 3)).astype(np.float16),
        visual_emotion=random.random((face, 2)).astype(np.float16),
        label={"emotion": "happy", "n": number},
    )


def assert_same(a: Utterance, b: Utterance) -> None:
    for name, value in vars(a).items():
        if isinstance(value, np.ndarray):
            assert value.dtype == getattr(b, name).dtype
            np.testing.assert_array_equal(value, getattr(b, name))
        else:
            assert value == getattr(b, name)


def test_shards_give_back_what_was_written(tmp_path):
    utterances = [
        utterance(0, 5, 2),
        utterance(1, 0, 3),
        utterance(2, 4, 0),
        utterance(3, 0, 0),
    ]  # MDS refuses empty arrays
    shards = write_shards(iter(utterances), WIDTHS, tmp_path / "out", 1 << 26, Statistics())
    back = list(read_utterances(tmp_path / "out"))
    assert [shard["utterances"] for shard in shards] == [4]
    for a, b in zip(utterances, back, strict=True):
        assert_same(a, b)
    assert back[3].acoustic.shape == (0, 4)


def test_an_empty_modality_takes_the_width_of_the_corpus(tmp_path):
    write_shards(iter([Utterance(id="t", text="only text")]), WIDTHS, tmp_path / "out", 1 << 26, Statistics())
    (back,) = read_utterances(tmp_path / "out")
    assert (back.acoustic.shape, back.visual.shape, back.visual_emotion.shape) == ((0, 4), (0, 3), (0, 2))


def test_no_teacher_means_no_columns_but_as_many_rows(tmp_path):
    (given,) = [replace(utterance(0, 5, 2), visual_emotion=np.zeros((2, 0), np.float16))]
    write_shards(iter([given]), WIDTHS | {"visual_emotion": 0}, tmp_path / "out", 1 << 26, Statistics())
    (back,) = read_utterances(tmp_path / "out")
    assert_same(given, back)


@pytest.mark.parametrize("raw", [("acoustic",), ("visual",), ("acoustic", "visual")])
def test_raw_modalities_have_columns_of_their_own(raw, tmp_path):
    faces = np.full((3, 8, 8, 3), 77, np.uint8)
    given = [utterance(1, 5, 3), utterance(2, 0, 0)]
    for item in given:
        if "acoustic" in raw:
            item.audio, item.acoustic = (encode_audio(np.ones(12, np.float32) / 2) if len(item.acoustic) else b""), item.acoustic[:0]
        if "visual" in raw:
            item.faces, item.visual = (encode_faces(faces) if len(item.visual) else b""), item.visual[:0]
    statistics = Statistics()
    write_shards(iter(given), WIDTHS, tmp_path / "out", 1 << 26, statistics, raw)
    back = list(read_utterances(tmp_path / "out"))
    assert [(item.audio, item.faces, len(item.acoustic), len(item.visual)) for item in back] == [
        (item.audio, item.faces, len(item.acoustic), len(item.visual)) for item in given
    ]
    assert (statistics.counts["without_audio"], statistics.counts["without_face"]) == (1, 1)
    assert statistics.counts["acoustic_frames"] == (3 if "acoustic" in raw else 5)
    assert statistics.counts["visual_frames"] == 3


def test_a_different_width_is_an_error(tmp_path):
    odd = Utterance(id="odd", acoustic=np.zeros((2, 5), np.float16))
    with pytest.raises(DataError, match="odd: acoustic has 5 values per frame, the corpus has 4"):
        write_shards(iter([odd]), WIDTHS, tmp_path / "out", 1 << 26, Statistics())


def test_statistics_are_those_of_all_frames():
    utterances = [utterance(i, 3 + i, i) for i in range(20)]
    statistics = Statistics()
    for item in utterances:
        statistics.add(item, WIDTHS)
    frames = np.concatenate([item.acoustic for item in utterances]).astype(np.float64)
    mean, std = statistics.mean_std("acoustic", 4)
    np.testing.assert_allclose(mean, frames.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, frames.std(axis=0), rtol=1e-9)
    assert statistics.counts["acoustic_frames"] == len(frames)
    assert (statistics.counts["without_face"], statistics.counts["without_text"], statistics.counts["words"]) == (
        1,
        1,
        38,
    )


def test_a_value_that_never_changes_keeps_its_scale():
    statistics = Statistics()
    statistics.add(Utterance(id="a", acoustic=np.full((5, 2), 3, np.float16)), {"acoustic": 2, "visual": 2})
    assert statistics.mean_std("acoustic", 2) == ([3.0, 3.0], [1.0, 1.0])
    assert statistics.mean_std("visual", 2) == ([0.0, 0.0], [1.0, 1.0])


def test_parts_come_back_whole(tmp_path):
    store = PartStore(tmp_path)
    utterances = [utterance(0, 5, 2), utterance(1, 0, 3), utterance(2, 0, 0)]
    utterances[1].audio, utterances[2].faces = b"a\0b", b"c"
    row = {"path": "a.mp4", "status": "done", "reason": None, "utterances": 3, "notes": {}}
    store.write("films/a", Part("key", row, utterances, {"classes": []}))
    for a, b in zip(utterances, store.utterances("films/a"), strict=True):
        assert_same(a, b)
    head = store.head("films/a")
    assert head is not None
    assert (head.key, head.row, head.encoders, head.widths) == ("key", row, {"classes": []}, WIDTHS | {"text_features": 0})
    assert store.head("films/b") is None


def test_a_damaged_part_counts_as_missing(tmp_path):
    store = PartStore(tmp_path)
    store.write("a", Part("key", {}, [utterance(0, 5, 2)]))
    data = store.path("a").read_bytes()
    store.path("a").write_bytes(data[: len(data) // 2])
    assert store.head("a") is None
    with pytest.raises(DataError, match="damaged"):
        store.utterances("a")
    assert not store.path("a").exists()


def corpus(folder, numbers: range) -> None:
    (folder / ".parts").mkdir(parents=True, exist_ok=True)
    shards = write_shards((utterance(n, 50, 5) for n in numbers), WIDTHS, folder / "fresh", 1 << 16, Statistics())
    (folder / "fresh/manifest.json").write_text(json.dumps({"shards": shards}))
    publish(folder / "fresh", folder)


def test_publish_leaves_nothing_of_the_corpus_before(tmp_path):
    corpus(tmp_path, range(400))
    assert len(list(tmp_path.glob("shard.*.mds"))) > 1
    corpus(tmp_path, range(3))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        ".parts",
        "index.json",
        "manifest.json",
        "shard.00000.mds",
    ]
    assert verify(tmp_path)["shards"][0]["utterances"] == 3


def test_verify_names_shard_and_remedy(tmp_path):
    corpus(tmp_path, range(400))
    first, second = tmp_path / "shard.00000.mds", tmp_path / "shard.00001.mds"
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    second.unlink()
    with pytest.raises(DataError, match=r"shard\.00000\.mds has the hash .*shard\.00001\.mds is missing.*run `emoscale prepare`"):
        verify(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json: no such file"):
        verify(tmp_path)
