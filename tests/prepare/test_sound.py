from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest

from emoscale.config import DataError
from emoscale.prepare import sound as module
from emoscale.prepare.container import probe
from emoscale.prepare.sound import RATE, AudioReader


def tone(wave: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    return float(spectrum.argmax() * RATE / len(wave))


def test_sound_is_16_khz_at_the_right_time(film, tmp_path):
    sound = AudioReader(probe(film(tmp_path / "a.mp4", 4.0)))
    for second in range(4):
        wave = sound.between(second + 0.2, second + 0.8)
        assert wave.dtype == np.float32
        assert len(wave) == round(0.6 * RATE)
        assert tone(wave) == pytest.approx(400 + 100 * second, abs=4)
    assert len(sound.between(4.5, 5.0)) == 0


def test_pieces_of_sound_are_pieces_of_the_whole(film, tmp_path):
    found = probe(film(tmp_path / "a.mp4", 4.0))
    whole = AudioReader(found).between(0.0, 10.0)
    sound = AudioReader(found)
    for start, end in [(0.5, 1.25), (1.0, 2.0), (3.5, 9.0), (0.25, 0.5)]:  # overlapping, past the end, and backwards
        np.testing.assert_array_equal(sound.between(start, end), whole[round(start * RATE) : round(end * RATE)])


def test_a_centred_voice_is_as_loud_as_a_mono_one(shared):
    sound = AudioReader(probe(shared / "av/grid/s1_bbwtzp.mpg"))  # stereo with two equal channels
    assert np.abs(sound.between(0, 3)).max() < 1.1


def test_sound_that_starts_late_counts_from_the_start_of_its_file(film, tmp_path):
    found = probe(film(tmp_path / "a.ts", 3.0, options={"mpegts_copyts": "0", "output_ts_offset": "5"}))
    assert found.origin > 1
    assert tone(AudioReader(found).between(1.2, 1.8)) == pytest.approx(500, abs=4)


def test_a_few_broken_packets_of_sound_are_passed_over(film, tmp_path):
    path = film(tmp_path / "a.ts", 6.0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    path.write_bytes(data)
    assert tone(AudioReader(probe(path)).between(5.2, 5.8)) == pytest.approx(900, abs=4)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".wav", ".ts"])
def test_frames_resampled_together_are_those_resampled_one_by_one(film, tmp_path, suffix, monkeypatch):
    found = probe(film(tmp_path / f"a{suffix}", 4.0, picture=suffix != ".wav"))
    together = AudioReader(found).between(0.0, 10.0)
    monkeypatch.setattr(module, "JOINED_S", 0.0)
    np.testing.assert_array_equal(together, AudioReader(found).between(0.0, 10.0))


def test_real_sound_resampled_together_is_that_resampled_frame_by_frame(shared, monkeypatch):
    found = [probe(shared / "av" / name) for name in ("grid/s1_bbwtzp.mpg", "movie/friday.mp4", "movie/nasa_13013.mp4")]
    together = [AudioReader(item).between(0.0, 60.0) for item in found]
    monkeypatch.setattr(module, "JOINED_S", 0.0)
    for item, wave in zip(found, together, strict=True):
        np.testing.assert_array_equal(wave, AudioReader(item).between(0.0, 60.0))


def test_what_was_heard_is_decoded_once_up_to_the_limit(film, tmp_path, monkeypatch):
    found = probe(film(tmp_path / "a.mp4", 4.0))
    opened = []
    monkeypatch.setattr(AudioReader, "_open", lambda self, usual=AudioReader._open: (opened.append(1), usual(self))[1])
    sound = AudioReader(found)
    whole = sound.between(0.0, 10.0)
    assert len(sound.between(10.0, 20.0)) == 0
    np.testing.assert_array_equal(sound.between(0.5, 1.0), whole[RATE // 2 : RATE])
    assert len(opened) == 1
    monkeypatch.setattr(module, "KEPT_S", 1.0)
    np.testing.assert_array_equal(sound.between(3.0, 3.5), whole[3 * RATE : 7 * RATE // 2])
    assert sound._held < 2.5 * RATE
    np.testing.assert_array_equal(sound.between(0.5, 1.0), whole[RATE // 2 : RATE])
    assert len(opened) == 2


def test_a_hole_of_hours_in_the_sound_is_an_error_and_no_silence_of_gigabytes(tmp_path):
    path = tmp_path / "film.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for at in (0, 10_000_000 * RATE):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, at, Fraction(1, RATE)
            out.mux(stream.encode(frame))
    with AudioReader(probe(path)) as sound, pytest.raises(DataError, match=r"film\.mkv: its sound jumps ahead by \d+ s"):
        sound.between(0, 1)
