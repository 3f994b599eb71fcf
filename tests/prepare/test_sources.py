from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from emoscale.config import DataError
from emoscale.prepare.sources import find, read_features


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_a_folder_with_everything_beside_everything(tmp_path):
    touch(
        *(tmp_path / name for name in ("b/two.mkv", "b/two.srt", "a.mp4", "a.wav", "a.en.srt", "a.de.vtt", "c.flac")),
        *(tmp_path / name for name in (".hidden/x.mp4", "notes.txt", "b/other.srt", "b/two.extra.mp4")),
    )
    found = {source.name: source for source in find(tmp_path)}
    assert list(found) == ["a", "b/two", "b/two.extra", "c"]
    assert found["a"].audio == tmp_path / "a.wav"
    assert found["a"].subtitles == tmp_path / "a.de.vtt"
    assert find(tmp_path, "en")[0].subtitles == tmp_path / "a.en.srt"
    assert found["b/two"].subtitles == tmp_path / "b/two.srt"
    assert found["b/two.extra"].subtitles is None
    assert (found["c"].path, found["c"].audio) == (tmp_path / "c.flac", None)


def test_two_films_of_one_name_are_a_problem(tmp_path):
    touch(tmp_path / "a.mp4", tmp_path / "a.mkv")
    (source,) = find(tmp_path)
    assert "same name" in source.problem


def test_one_file(tmp_path):
    touch(tmp_path / "a.mp4", tmp_path / "a.srt", tmp_path / "b.mp4")
    (source,) = find(tmp_path / "a.mp4")
    assert (source.name, source.subtitles) == ("a", tmp_path / "a.srt")


@pytest.mark.parametrize("make", [lambda p: p / "absent", lambda p: p])
def test_nothing_to_prepare(tmp_path, make):
    with pytest.raises(DataError, match=r"no such folder|no media file"):
        find(make(tmp_path))


def test_csv_manifest(tmp_path):
    (tmp_path / "m.csv").write_text(
        "path,start,end,text,speaker,dialogue,label,split,ignored\n"
        "films/a.mp4,1.5,3,Hello  there,Anna,d1,happy,train,x\n"
        'films/b.mp4,0,,,,d1,"{""emotion"": ""sad"", ""valence"": 2}",,x\n'
        "films/a.mp4,0,1,first,Bob,d1,,,x\n"
        ",,,only text,,d2,,,x\n"
    )
    text, a, b = find(tmp_path / "m.csv")
    assert (a.name, a.path, b.name, text.name, text.path) == (
        "films/a",
        tmp_path / "films/a.mp4",
        "films/b",
        "d2",
        None,
    )
    assert [(row.text, row.start, row.end, row.speaker, row.index) for row in a.rows] == [
        ("Hello there", 1.5, 3.0, "Anna", 0),
        ("first", 0.0, 1.0, "Bob", 2),
    ]
    assert a.rows[0].label == {"emotion": "happy", "split": "train"}
    assert b.rows[0].label == {"emotion": "sad", "valence": 2}
    assert (b.rows[0].index, b.rows[0].end) == (1, math.inf)


def test_jsonl_manifest_with_features(tmp_path):
    rows = [
        {"text": "a", "dialogue": "d", "acoustic": "f.npz:voice", "visual": "g.csv:0-2", "label": 3},
        {"text": "b", "dialogue": "d", "acoustic": str(tmp_path / "h.npy"), "label": {"emotion": "fear"}},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (source,) = find(tmp_path / "m.jsonl")
    assert source.rows[0].features == {"acoustic": f"{tmp_path}/f.npz:voice", "visual": f"{tmp_path}/g.csv:0-2"}
    assert source.rows[0].label == {"emotion": 3}
    assert source.rows[1].features == {"acoustic": f"{tmp_path}/h.npy"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"path": "../out.mp4"}, "leaves the folder"),
        ({"path": "."}, "names a folder"),
        ({"path": "a/.."}, "names a folder"),
        ({"path": "/"}, "names a folder"),
        ({"path": "a/../../out.mp4"}, "leaves the folder"),
        ({"path": "link/out.mp4"}, "through a link"),
        ({"text": "a", "acoustic": "../f.npy"}, "leaves the folder"),
        ({"text": "a", "picture": "../f.png"}, "leaves the folder"),
        ({"path": "a.mp4", "start": "soon"}, "seconds were expected"),
        ({"path": "a.mp4", "start": 3, "end": 2}, "stretch of time"),
        ({"path": "a.mp4", "start": "nan"}, "not a number"),
        ({"speaker": "x"}, "neither path"),
        ({"path": "a.mp4", "label": "{broken"}, "looks like JSON"),
    ],
)
def test_rows_that_make_no_sense_are_named(tmp_path, row, reason):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path)
    manifest = tmp_path / "in/m.jsonl"
    manifest.write_text('{"text": "fine"}\n' + json.dumps(row))
    with pytest.raises(DataError, match=rf"line 2.*{reason}"):
        find(manifest)


def test_a_csv_without_columns_is_no_manifest(tmp_path):
    (tmp_path / "m.csv").write_text("1,2,3\n4,5,6\n")
    with pytest.raises(DataError, match="names none of the columns"):
        find(tmp_path / "m.csv")


def test_a_manifest_names_pictures(tmp_path):
    (tmp_path / "m.csv").write_text("picture,text,dialogue\na.png,x,d\nb.png,,d\n,y,e\n")
    pictured, spoken = find(tmp_path / "m.csv")
    assert [row.picture for row in pictured.rows] == [tmp_path / "a.png", tmp_path / "b.png"]
    assert (pictured.encoded, spoken.encoded) == (True, False)
    before = pictured.fingerprint()
    (tmp_path / "b.png").write_text("there")
    assert find(tmp_path / "m.csv")[0].fingerprint() != before


def test_manifest_inputs_must_differ_in_name(tmp_path):
    (tmp_path / "m.csv").write_text("path,text\na.mp4,x\na.wav,y\n")
    with pytest.raises(DataError, match="suffix"):
        find(tmp_path / "m.csv")


def test_fingerprint_follows_files_and_rows(tmp_path):
    touch(tmp_path / "a.mp4", tmp_path / "a.srt")
    before = find(tmp_path)[0].fingerprint()
    assert find(tmp_path)[0].fingerprint() == before
    (tmp_path / "a.srt").write_text("longer")
    assert find(tmp_path)[0].fingerprint() != before


def test_feature_references(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "b.npz", x=values, y=values[0])
    (tmp_path / "c.csv").write_text("name,p,q\n" + "".join(f'row{i},"{i}.5",{i}\n' for i in range(4)))
    np.testing.assert_array_equal(read_features(f"{tmp_path}/a.npy"), values)
    np.testing.assert_array_equal(read_features(f"{tmp_path}/b.npz:x"), values)
    np.testing.assert_array_equal(read_features(f"{tmp_path}/b.npz:y"), values[:1])
    np.testing.assert_array_equal(read_features(f"{tmp_path}/c.csv:2"), [[2.5, 2]])
    np.testing.assert_array_equal(read_features(f"{tmp_path}/c.csv:1-3"), [[1.5, 1], [2.5, 2], [3.5, 3]])
    np.testing.assert_array_equal(read_features(f"{tmp_path}/c.csv:1-3@q"), [[1], [2], [3]])
    np.testing.assert_array_equal(read_features(f"{tmp_path}/c.csv:2@p..q"), [[2.5, 2]])
    np.testing.assert_array_equal(read_features(f"{tmp_path}/c.csv:2@1..2"), [[2.5, 2]])


@pytest.mark.parametrize(
    ("reference", "reason"),
    [("absent.npy", "no such file"), ("b.npz:z", "no array 'z'"), ("c.csv:9", "rows 0 to 0"), ("c.csv:x", "write file.csv:3"), ("c.csv:0@2", "'2' is no column"), ("c.csv:0@p..q", "'p' is no column"), ("p.npy", "not readable")],
)  # fmt: skip
def test_bad_feature_references_say_why(tmp_path, reference, reason):
    np.savez(tmp_path / "b.npz", x=np.zeros(3), y=np.zeros(3))
    (tmp_path / "c.csv").write_text("1,2\n")
    np.save(tmp_path / "p.npy", np.array([{"pickled": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=reason):
        read_features(f"{tmp_path}/{reference}")


def test_real_features(shared):
    row = read_features(f"{shared}/features/mosi/text_train0.csv:0")
    assert row.shape == (1, 101)
    summary = read_features(f"{shared}/features/ravdess_face_voice_summary.csv:0")
    assert summary[0, 0] == pytest.approx(111.42, abs=0.01)
