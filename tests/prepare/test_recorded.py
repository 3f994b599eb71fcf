from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emoscale.codecs import RATE, decode_audio, decode_faces
from emoscale.config import ConfigError, DataError, load
from emoscale.data.streams import Corpus
from emoscale.prepare.features import AcousticConfig, VisualConfig, make_acoustic, make_visual
from emoscale.prepare.pipeline import PrepareConfig, prepare
from emoscale.prepare.recorded import read_picture


def test_a_voice_is_kept_in_whole_frames_up_to_the_limit() -> None:
    encoder = make_acoustic(AcousticConfig(encoder="waveform", frame_s=0.02, max_frames=50))
    assert (encoder.raw, encoder.width) == (True, 320)
    wave = np.round(np.random.default_rng(0).uniform(-1, 1, RATE) * 2**15) / 2**15
    kept = decode_audio(encoder.encode(wave[:1000].astype(np.float32)))
    np.testing.assert_array_equal(kept, wave[:960].astype(np.float32))
    assert len(decode_audio(encoder.encode(np.zeros(2 * RATE, np.float32)))) == 50 * 320
    assert encoder.encode(wave[:319].astype(np.float32)) == b""


def test_a_frame_is_a_whole_number_of_samples() -> None:
    with pytest.raises(ConfigError, match=r"acoustic\.frame_s: 0\.01234"):
        make_acoustic(AcousticConfig(encoder="waveform", frame_s=0.01234))


def test_faces_are_kept_at_the_side_asked_for() -> None:
    encoder = make_visual(VisualConfig(encoder="crops", side=48, max_frames=3))
    assert (encoder.raw, encoder.width, encoder.classes) == (True, 3 * 48 * 48, [])
    crops = np.full((5, 96, 96, 3), (200, 40, 90), np.uint8)
    data, emotion = encoder.encode(crops)
    back = decode_faces(data)
    assert back.shape == (3, 48, 48, 3)
    assert np.abs(back.astype(int) - (200, 40, 90)).max() <= 3
    assert emotion.shape == (3, 0)
    assert encoder.encode(crops[:0])[0] == b""


def test_a_picture_is_its_middle_square_upright(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (250, 10, 90)
    wide[:4, 20:40] = (0, 0, 255)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    found = read_picture(tmp_path / "wide.png", 10)
    assert found.shape == (10, 10, 3)
    assert (found[2:] == (250, 10, 90)).all()
    assert (found[:2] == (0, 0, 255)).all()
    turned = Image.fromarray(np.rot90(wide, 1).copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held turned: to be shown turned by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_picture(tmp_path / "turned.png", 10), found)
    assert read_picture(tmp_path / "wide.png", 48).shape == (48, 48, 3), "a small one is made larger"
    (tmp_path / "none.png").write_bytes(b"nothing")
    for name in ("none.png", "absent.png"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read as a picture"):
            read_picture(tmp_path / name, 10)


def test_a_picture_that_memory_does_not_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")

    def convert(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(DataError, match=r"a\.png: cannot be read as a picture \(MemoryError\)"):
        read_picture(tmp_path / "a.png", 10)


def test_texts_with_pictures_become_a_raw_corpus(tmp_path: Path) -> None:
    lines = ["picture,text,speaker,dialogue,label"]
    for person in range(3):
        for take in range(2):
            colour = (80 * person, 100 * take, 40)
            Image.fromarray(np.full((30, 40, 3), colour, np.uint8)).save(tmp_path / f"{person}{take}.png")
            lines.append(f"{person}{take}.png,the door {person} is open {take},p{person},p{person},happy")
    lines.append(",no picture,p0,p0,happy")
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    words = ["workers=1", "text.vocab_size=200", "preprocess.visual.encoder=crops", "preprocess.visual.side=16"]
    summary = prepare(load(PrepareConfig, None, [f"source={tmp_path / 'm.csv'}", f"output={tmp_path / 'corpus'}", *words]))
    assert (summary.counts["utterances"], summary.counts["visual_frames"]) == (7, 6)
    corpus = Corpus(tmp_path / "corpus")
    assert corpus.manifest["visual"]["raw"] == "faces"
    items = {item.id: item for item in map(corpus.__getitem__, range(7))}
    assert items["p2#0001"].text == "the door 2 is open 1"
    assert items["p2#0001"].label == {"emotion": "happy"}
    assert np.abs(decode_faces(items["p2#0001"].faces)[0].astype(int) - (160, 100, 40)).max() <= 4
    assert not items["p0#0002"].faces
