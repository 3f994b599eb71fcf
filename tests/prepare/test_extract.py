from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from emoscale.config import DataError, to_dict
from emoscale.prepare.extract import Extractor, PreprocessConfig
from emoscale.prepare.faces import FacesConfig
from emoscale.prepare.sources import Row, Source, find
from emoscale.prepare.subtitles import SubtitleConfig


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return Extractor(PreprocessConfig(decoder="pyav"), threads=1)


def one(folder: Path) -> Source:
    (source,) = find(folder)
    return source


def test_a_film_with_subtitles(extractor, film, write_srt, tmp_path):
    film(tmp_path / "in/film.mp4", 22.0)
    cues = [(0.5, 2.5, "One."), (3.0, 3.4, "short"), (4.0, 6.0, "- Two."), (15.0, 17.0, ""), (21.0, 30.0, "end")]
    write_srt(tmp_path / "in/film.srt", cues)
    utterances, row = extractor.extract(one(tmp_path / "in"))
    assert [(u.id, u.dialogue, u.index, u.text) for u in utterances] == [
        ("film#0000", "film/0000", 0, "One."),
        ("film#0002", "film/0000", 1, "Two."),
        ("film#0003", "film/0001", 0, ""),
        ("film#0004", "film/0001", 1, "end"),
    ]
    width = extractor.acoustic.width
    assert [u.acoustic.shape for u in utterances[:3]] == [(33, width)] * 3
    assert 10 <= len(utterances[3].acoustic) <= 17  # the film ends one second into it
    assert all(u.acoustic.dtype == np.float16 for u in utterances)
    assert all(u.visual.shape == (0, extractor.visual.width) for u in utterances)
    assert row["path"] == "film.mp4"
    assert (row["status"], row["utterances"]) == ("done", 4)
    assert row["notes"]["too_short"] == row["notes"]["no_text"] == 1
    assert row["notes"]["no_face"] == 4
    assert "no_audio" not in row["notes"]


def test_a_silent_film_keeps_its_text(extractor, film, write_srt, tmp_path):
    film(tmp_path / "in/film.mp4", 4.0, sound=False)
    write_srt(tmp_path / "in/film.srt", [(1, 3, "Text.")])
    (utterance,), row = extractor.extract(one(tmp_path / "in"))
    assert (utterance.text, len(utterance.acoustic)) == ("Text.", 0)
    assert row["notes"]["no_audio"] == 1


def test_sound_beside_a_silent_film(extractor, film, write_srt, tmp_path):
    film(tmp_path / "in/film.mp4", 4.0, sound=False)
    film(tmp_path / "in/film.wav", 4.0, picture=False)
    write_srt(tmp_path / "in/film.srt", [(1, 3, "Text.")])
    (utterance,), _ = extractor.extract(one(tmp_path / "in"))
    film(tmp_path / "other/film.wav", 4.0, picture=False)
    write_srt(tmp_path / "other/film.srt", [(1, 3, "Text.")])
    (alone,), row = extractor.extract(one(tmp_path / "other"))
    assert len(utterance.acoustic) == 33
    np.testing.assert_array_equal(utterance.acoustic, alone.acoustic)
    assert row["notes"] == {"cut_by_subtitle_file": 1, "no_face": 1}


def test_manifest_rows_in_any_order(extractor, film, tmp_path):
    film(tmp_path / "a.mp4", 6.0)
    rows = (Row(4.0, 6.0, "late"), Row(0.0, 2.0, "early", "Anna", "talk", 5, {"emotion": "sad"}), Row(4.0, text="rest"))
    utterances, _ = extractor.extract(Source("a", tmp_path / "a.mp4", rows=rows))
    assert [(u.id, u.text, u.speaker, u.dialogue, u.index) for u in utterances] == [
        ("a#0000", "late", "", "a", 0),
        ("a#0001", "early", "Anna", "talk", 5),
        ("a#0002", "rest", "", "a", 0),
    ]
    assert utterances[1].label == {"emotion": "sad"}
    assert utterances[2].end == pytest.approx(6.0, abs=0.1)
    np.testing.assert_array_equal(utterances[0].acoustic[:30], utterances[2].acoustic[:30])


def test_features_of_others_need_no_media(extractor, tmp_path):
    random = np.random.default_rng(0)
    np.savez(tmp_path / "f.npz", voice=random.normal(size=(100, 7)), face=random.normal(size=(5, 9)))
    references = {"acoustic": f"{tmp_path}/f.npz:voice", "visual": f"{tmp_path}/f.npz:face"}
    rows = (Row(text="both", features=references), Row(text="only text"))
    (both, text), row = extractor.extract(Source("talk", rows=rows))
    assert (both.acoustic.shape, both.visual.shape, both.visual_emotion.shape) == ((64, 7), (5, 9), (5, 0))
    assert (both.acoustic.dtype, len(text.acoustic)) == (np.float16, 0)
    assert row["notes"] == {"no_audio": 1, "no_face": 1}


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_what_is_not_finite_is_named_skipped_and_counted(extractor, tmp_path, bad):
    values = np.ones((4, 3), np.float32)
    np.save(tmp_path / "good.npy", values)
    values[2, 1] = bad
    np.save(tmp_path / "bad.npy", values)
    rows = tuple(Row(text="x", features={"acoustic": f"{tmp_path}/{name}.npy"}) for name in ("bad", "good"))
    utterances, row = extractor.extract(Source("talk", rows=rows))
    assert [u.id for u in utterances] == ["talk#0001"]
    assert (row["notes"]["not_finite"], row["notes"]["not_finite_ids"]) == (1, ["talk#0000"])


def test_faces_and_probabilities_must_have_as_many_frames(extractor, tmp_path):
    np.savez(tmp_path / "f.npz", face=np.zeros((5, 9)), emotion=np.zeros((4, 3)))
    row = Row(features={"visual": f"{tmp_path}/f.npz:face", "visual_emotion": f"{tmp_path}/f.npz:emotion"})
    with pytest.raises(DataError, match="5 face frames but 4 rows"):
        extractor.extract(Source("talk", rows=(row,)))


def test_a_broken_subtitle_file_is_an_error_with_its_reason(extractor, film, tmp_path):
    film(tmp_path / "in/film.mp4", 2.0)
    (tmp_path / "in/film.srt").write_text("no subtitles at all")
    with pytest.raises(DataError, match=r"film\.srt: not readable as subtitles"):
        extractor.extract(one(tmp_path / "in"))


def test_the_manifest_rebuilds_the_extractor(extractor, film, write_srt, tmp_path):
    film(tmp_path / "in/film.mp4", 4.0)
    write_srt(tmp_path / "in/film.srt", [(1, 3, "Text.")])
    config = PreprocessConfig(decoder="pyav", subtitles=SubtitleConfig(dialogue_gap=3.0))
    manifest = extractor.describe() | {"preprocess": to_dict(config), "visual_emotion": None}
    rebuilt = Extractor.from_manifest(manifest, tmp_path)
    assert rebuilt.config == config
    (a,), _ = rebuilt.extract(one(tmp_path / "in"))
    (b,), _ = extractor.extract(one(tmp_path / "in"))
    np.testing.assert_array_equal(a.acoustic, b.acoustic)
    manifest["acoustic"] |= {"width": 1}
    with pytest.raises(DataError, match="the corpus has 1"):
        Extractor.from_manifest(manifest, tmp_path)
    with pytest.raises(DataError, match="teacher"):
        Extractor.from_manifest(manifest | {"visual_emotion": {"classes": ["a"]}}, tmp_path)


def test_grid_clips_have_a_face_and_a_voice(extractor, shared):
    rows = (Row(text="bin blue with t z please"),)
    (utterance,), row = extractor.extract(Source("s1", shared / "av/grid/s1_bbwtzp.mpg", rows=rows))
    assert len(utterance.acoustic) >= 48
    assert len(utterance.visual) >= 27
    assert row["notes"] == {"speaker: only face": 1}
    assert np.ptp(utterance.visual.astype(np.float32)) > 0


def test_a_film_scene_with_several_faces(shared):
    yunet = FacesConfig(detector="yunet", model=str(shared / "models/yunet_n_640_640.onnx"), min_size=0.05, max_side=640)
    (source,) = find(shared / "av/movie/friday.mp4")
    utterances, row = Extractor(PreprocessConfig(decoder="pyav", faces=yunet), threads=1).extract(source)
    assert [u.id for u in utterances] == ["friday#0002", "friday#0003", "friday#0004"]
    assert row["notes"]["too_short"] == 2
    assert any(len(u.visual) for u in utterances)


def test_a_film_without_speech_gives_nothing(shared):
    (source,) = find(shared / "av/movie/tears-of-steel-battle-clip-medium.webm")
    utterances, row = Extractor(PreprocessConfig(decoder="pyav"), threads=1).extract(source)
    assert utterances == []
    assert row["notes"] == {"cut_by_speech": 1}


def test_embedded_subtitles(extractor, shared):
    (source,) = find(shared / "av/movie/nasa_13013.mp4")
    utterances, row = extractor.extract(source)
    assert len(utterances) == row["notes"]["no_face"] == 4
    assert utterances[1].text.startswith("space telescope in one of")
    assert row["notes"]["cut_by_embedded_subtitles"] == 1


def test_speech_beside_a_silent_film_is_cut(extractor, shared):
    (source,) = find(shared / "av/elospheres/01_ieee01s01.mp4")
    assert source.audio is not None
    utterances, row = extractor.extract(source)
    assert row["notes"]["cut_by_speech"] == 1
    assert len(utterances) >= 1
    assert all(len(u.acoustic) and not u.text for u in utterances)
    silent, row = extractor.extract(replace(source, audio=None))
    assert (silent, row["notes"]) == ([], {"cut_by_nothing": 1})
