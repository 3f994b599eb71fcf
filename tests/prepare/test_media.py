from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from emoscale.config import DataError
from emoscale.prepare import media
from emoscale.prepare.container import probe, subtitle_packets
from emoscale.prepare.media import PyavFrames, TorchcodecFrames, open_frames


def shown(image: np.ndarray) -> float:
    """Seconds that the grey level of a test film stands for."""
    return (float(image.mean()) - 16) / 20


def test_frames_are_those_shown_at_the_time(film, tmp_path):
    found = probe(film(tmp_path / "a.mp4", 6.0))
    frames = open_frames(found, decoder="pyav")
    for time, image in frames.at([0.0, 1.0, 1.5, 4.0]):
        assert shown(image) == pytest.approx(time, abs=0.08)


def test_variable_frame_rate_goes_by_time(film, tmp_path):
    times = [0.0, 0.1, 0.2, 3.0, 3.1, 5.0]
    found = probe(film(tmp_path / "a.mkv", 5.5, times=times, sound=False))
    asked = [0.15, 0.25, 2.9, 3.05, 4.9, 5.0]
    got = [shown(image) for _, image in open_frames(found, decoder="pyav").at(asked)]
    assert got == pytest.approx([0.1, 0.2, 0.2, 3.0, 3.1, 5.0], abs=0.08)


def test_no_frame_is_made_up_after_the_end(film, tmp_path):
    found = probe(film(tmp_path / "a.mp4", 2.0))
    assert [time for time, _ in PyavFrames(found).at([1.9, 2.1, 30.0])] == [1.9]


def test_going_back_and_jumping_ahead_find_the_same_frames(film, tmp_path):
    path = film(tmp_path / "a.mp4", 12.0, fps=10, sound=False)
    asked = [11.5, 0.3, 11.9, 0.0, 5.0]
    jumped = PyavFrames(probe(path))
    for time, image in jumped.at(asked):
        fresh = next(iter(PyavFrames(probe(path)).at([time])))[1]
        np.testing.assert_array_equal(image, fresh)
        assert shown(image) == pytest.approx(time, abs=0.1)


class All(PyavFrames):
    """Decodes every picture."""

    def _shows(self, *_):
        return True


def decoded(reader: type[PyavFrames], path: Path, calls: list[list[float]]) -> tuple[list[tuple[float, np.ndarray]], int]:
    """Give the pictures of several calls, and how many were decoded for them."""
    frames, pulled = reader(probe(path), threads=1), []
    usual = frames._pull
    frames._pull = lambda: (pulled.append(1), usual())[1]
    return [shown for times in calls for shown in frames.at(times)], len(pulled)


CALLS = {
    "at 10 frames/s": [list(np.arange(0, 6, 0.1))],
    "utterance by utterance": [list(np.arange(0.33, 2, 0.1)), list(np.arange(2.01, 7, 0.1))],
    "overlapping": [list(np.arange(0, 3, 0.1)), list(np.arange(2.4, 5, 0.1)), list(np.arange(0.05, 1, 0.1))],
    "in any order": [[5.03, 0.31, 2.2], [1.7, 1.71, 5.9, 0.0]],
    "one by one": [[time] for time in np.arange(0, 2, 0.1)],
}


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_pictures_that_nobody_asks_for_are_left_out_and_the_others_are_the_same(film, tmp_path, suffix, calls):
    path = film(tmp_path / f"a{suffix}", 6.0, sound=False, b_pictures=2)
    (every, all_of_them), (ours, some) = decoded(All, path, calls), decoded(PyavFrames, path, calls)
    assert [time for time, _ in every] == [time for time, _ in ours]
    for (_, one), (_, other) in zip(every, ours, strict=True):
        np.testing.assert_array_equal(one, other)
    assert some <= all_of_them
    if suffix == ".mp4" and len(calls) == 1:
        assert some < 0.8 * all_of_them


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_real_pictures_are_the_same_when_others_are_left_out(shared, calls):
    path = next((shared / "av/ravdess").glob("*.mp4"))
    (every, all_of_them), (ours, some) = decoded(All, path, calls), decoded(PyavFrames, path, calls)
    assert len(every) == len(ours) > 4
    assert all(np.array_equal(one, other) for (_, one), (_, other) in zip(every, ours, strict=True))
    assert some <= (0.75 if len(calls) == 1 else 1.0) * all_of_them


def test_tall_pictures_are_scaled(film, tmp_path):
    found = probe(film(tmp_path / "a.mp4", 0.5, height=128))
    (_, image), *_ = PyavFrames(found, max_height=64).at([0.0])
    assert image.shape == (64, 32, 3)


def test_a_file_that_starts_late_counts_from_its_start(film, tmp_path):
    path = film(tmp_path / "a.ts", 3.0, options={"mpegts_copyts": "0", "output_ts_offset": "5"})
    found = probe(path)
    assert found.origin > 1
    (_, image), *_ = PyavFrames(found).at([2.0])
    assert shown(image) == pytest.approx(2.0, abs=0.12)


def test_cover_pictures_are_no_video(shared):
    found = probe(shared / "audio/ravdess/03-01-01-01-01-01-01.flac")
    assert found.video is None
    assert found.audio == 0


def test_the_best_of_several_streams(shared):
    found = probe(shared / "av/movie/nasa_13013.mp4")
    assert (found.video, found.audio, found.subtitles) == (3, 4, (2, 5))
    start, end, text = subtitle_packets(found, 2)[1]
    assert (start, end) == pytest.approx((4.26, 8.35))
    assert text.startswith(b"space telescope")


@pytest.mark.parametrize(("suffix", "data", "reason"), [(".mp4", b"", "empty"), (".mp4", b"no film" * 99, "not readable")])
def test_what_is_no_media_says_so(tmp_path, suffix, data, reason):
    (tmp_path / f"a{suffix}").write_bytes(data)
    with pytest.raises(DataError, match=reason):
        probe(tmp_path / f"a{suffix}")


@pytest.mark.parametrize(("suffix", "options"), [(".mp4", {}), (".mp4", {"movflags": "faststart"}), (".mkv", {})])
def test_truncated_films_are_refused(film, tmp_path, suffix, options):
    path = film(tmp_path / f"a{suffix}", 8.0, options=options)
    assert probe(path).duration == pytest.approx(8.0, abs=0.2)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"truncated|not readable"):
        probe(path)


def test_a_few_broken_packets_are_passed_over(film, tmp_path):
    path = film(tmp_path / "a.ts", 6.0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    path.write_bytes(data)
    found = probe(path)
    assert shown(next(iter(PyavFrames(found).at([5.5])))[1]) == pytest.approx(5.5, abs=0.2)


def test_backend_names_what_is_live():
    name, why = media.backend()
    assert name in ("torchcodec", "pyav")
    assert "FFmpeg" in why


@pytest.mark.skipif(media.backend()[0] != "torchcodec", reason=media.backend()[1])
def test_torchcodec_shows_the_same_frames(film, tmp_path):
    found = probe(film(tmp_path / "a.mp4", 6.0))
    asked = [0.0, 1.02, 3.5, 2.0, 5.99, 6.5]
    ours, theirs = list(PyavFrames(found).at(asked)), list(TorchcodecFrames(found).at(asked))
    assert [time for time, _ in ours] == [time for time, _ in theirs]
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 6  # two conversions from YUV


@pytest.mark.skipif(media.backend()[0] != "torchcodec", reason=media.backend()[1])
def test_what_torchcodec_does_not_read_pyav_does(shared):
    found = probe(shared / "av/grid/s1_bbwtzp.mpg")
    asked = [i / 10 for i in range(30)]
    assert [time for time, _ in TorchcodecFrames(found).at(asked)] == asked
