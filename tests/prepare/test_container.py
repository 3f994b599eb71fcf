"""What a media file holds, and what no media file is."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path

import pytest

av = pytest.importorskip("av", reason="pip install 'emoscale[prepare]'")

from emoscale.config import DataError  # noqa: E402
from emoscale.prepare.container import Stream, opened, probe, reason, subtitle_packets  # noqa: E402

Film = Callable[..., Path]


def with_subtitles(source: Path, subtitles: Path, path: Path) -> Path:
    """Put a film and a subtitle file into one Matroska."""
    with av.open(str(source)) as film, av.open(str(subtitles)) as text, av.open(str(path), "w") as out:
        streams = {id(given): out.add_stream_from_template(given) for container in (film, text) for given in container.streams}
        for packet in [*text.demux(), *film.demux()]:
            if packet.dts is not None:
                packet.stream = streams[id(packet.stream)]
                out.mux(packet)
    return path


def test_streams_and_length(film: Film, tmp_path: Path) -> None:
    found = probe(film(tmp_path / "a.mp4", 4.0))
    assert found.video is not None
    assert found.audio is not None
    assert found.video != found.audio
    assert found.duration == pytest.approx(4.0, abs=0.1)
    assert found.subtitles == ()


@pytest.mark.parametrize(("given", "video", "audio"), [({"sound": False}, True, False), ({"picture": False}, False, True)])
def test_a_film_may_lack_sound_or_picture(given: dict[str, bool], video: bool, audio: bool, film: Film, tmp_path: Path) -> None:
    found = probe(film(tmp_path / ("a.mp4" if video else "a.m4a"), 3.0, **given))
    assert (found.video is not None, found.audio is not None) == (video, audio)


def test_a_cover_picture_is_no_video(film: Film, tmp_path: Path) -> None:
    sound = film(tmp_path / "sound.m4a", 3.0, picture=False)
    cover = tmp_path / "cover.m4a"
    with av.open(str(sound)) as source, av.open(str(cover), "w", format="mp4") as out:
        audio = out.add_stream_from_template(source.streams.audio[0])
        picture = out.add_stream("mjpeg", rate=1, width=32, height=32, pix_fmt="yuvj420p")
        picture.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame(32, 32, "yuvj420p")
        frame.pts = 0
        packets = [*picture.encode(frame), *picture.encode(None)]
        for packet in packets:
            out.mux(packet)
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = audio
                out.mux(packet)
    found = probe(cover)
    assert found.audio is not None
    assert found.video is None


def test_embedded_subtitles_are_found_and_read_with_their_times(film: Film, write_srt: Callable[..., Path], tmp_path: Path) -> None:
    written = [(0.5, 1.5, "We go."), (2.0, 3.25, "It rains – now.")]
    path = with_subtitles(film(tmp_path / "plain.mkv", 4.0), write_srt(tmp_path / "a.srt", written), tmp_path / "a.mkv")
    found = probe(path)
    assert len(found.subtitles) == 1
    cues = subtitle_packets(found, found.subtitles[0])
    assert [text.decode() for _, _, text in cues] == [text for _, _, text in written]
    assert [cue[:2] for cue in cues] == [pytest.approx(cue[:2], abs=0.03) for cue in written]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", r"is empty \(0 bytes\)"), (b"words, but no film. " * 50, r"not readable as media \(Invalid data")],
)
def test_what_is_no_media_says_so(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.mp4: {message}"):
        probe(tmp_path / "a.mp4")


def test_a_subtitle_file_holds_neither_pictures_nor_sound(write_srt: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds neither pictures nor sound"):
        probe(write_srt(tmp_path / "a.srt", [(0.0, 2.0, "We go.")]))


def test_sound_in_a_format_that_nothing_decodes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(32000))
    content = bytearray(path.read_bytes())
    content[20:22] = b"\x99\x79"  # the tag of its format
    path.write_bytes(content)
    media = probe(path)
    with pytest.raises(DataError, match=r"a\.wav: stream 0 is in no format that FFmpeg decodes here"):
        Stream(media, media.audio, 1)


def test_a_film_whose_header_promises_more_is_refused_with_both_times(film: Film, tmp_path: Path) -> None:
    path = film(tmp_path / "a.mkv", 8.0)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"a\.mkv: truncated: its (video|audio) ends at [3-5]\.\d s of (7|8)\.\d s"):
        probe(path)


def test_what_ffmpeg_refuses_while_reading_becomes_our_error_and_closes_the_file(film: Film, tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", 2.0)
    kept = []

    def read() -> None:
        with opened(path) as container:
            kept.append(container)
            raise av.error.InvalidDataError(1, "no more")

    with pytest.raises(DataError, match=r"a\.mp4: not readable \(no more\)"):
        read()
    with pytest.raises(AssertionError, match="not open"):
        next(kept[0].demux())


def test_a_reason_is_ffmpegs_words_alone() -> None:
    assert reason(av.error.InvalidDataError(1094995529, "Invalid data found when processing input", "a.mp4")) == "Invalid data found when processing input"
    assert reason(ValueError("odd")) == "odd"
