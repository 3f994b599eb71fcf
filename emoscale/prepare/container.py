"""What a media file holds: its streams, its length, its embedded subtitles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from emoscale.config import DataError, EmoscaleError

try:
    import av
    from av.error import FFmpegError
    from av.error import InvalidDataError as InvalidDataError
    from av.stream import Disposition
    from av.video.reformatter import VideoReformatter as VideoReformatter
except ModuleNotFoundError as error:
    raise EmoscaleError("reading media needs PyAV; pip install 'emoscale[prepare]'") from error

VIDEO_SUFFIXES = frozenset(
    {
        ".3gp",
        ".avi",
        ".flv",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
    }
)
AUDIO_SUFFIXES = frozenset({".aac", ".ac3", ".aif", ".aiff", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav", ".wma"})
TEXT_CODECS = frozenset({"ass", "mov_text", "srt", "ssa", "subrip", "text", "ttml", "webvtt"})
"""Embedded subtitles that are text; the others are pictures of text."""
MAX_BAD_PACKETS = 50
"""Packets of one stream that may fail to decode before the file counts as unreadable."""
TRUNCATED_S = 1.0
"""A stream that ends this much before its declared end is cut off."""
DECLARED_LENGTH = ("mov", "matroska", "avi", "wav", "flac")
"""Containers whose header states the length, so that a missing end shows; the others are measured by FFmpeg."""


@dataclass(frozen=True)
class Media:
    """What a file holds."""

    path: Path
    """The file."""
    duration: float
    """Length in seconds; 0 if unknown."""
    origin: float
    """Time stamp of the start of the file, seconds."""
    video: int | None
    """Index of the best video stream; cover pictures do not count."""
    audio: int | None
    """Index of the best audio stream."""
    subtitles: tuple[int, ...]
    """Indices of the embedded text subtitle streams."""


def probe(path: Path) -> Media:
    """Open a file and choose its streams.

    Raises:
        DataError: the file is empty, truncated, no media file, or has neither picture nor sound.
    """
    with opened(path) as container:
        streams = container.streams
        pictures = [s for s in streams.video if not s.disposition & Disposition.attached_pic]
        best = streams.best("video")
        video = best if best in pictures else next(iter(pictures), None)
        audio = streams.best("audio", related=video) if video is not None else streams.best("audio")
        if video is None and audio is None:
            raise DataError(f"{path}: holds neither pictures nor sound")
        _check_end(container, [s for s in (video, audio) if s is not None], path)
        text = [s.index for s in streams.subtitles if s.codec_context is not None and s.codec_context.name in TEXT_CODECS]
        return Media(
            path=path,
            duration=(container.duration or 0) / av.time_base,
            origin=(container.start_time or 0) / av.time_base,
            video=None if video is None else video.index,
            audio=None if audio is None else audio.index,
            subtitles=tuple(text),
        )


def subtitle_packets(media: Media, index: int) -> list[tuple[float, float, bytes]]:
    """Give (start, end, text of the cue as FFmpeg decodes it) of an embedded text subtitle stream, in order of time."""
    cues = []
    with opened(media.path) as container:
        stream = container.streams[index]
        for packet in container.demux(stream):
            if packet.pts is None or not packet.duration:
                continue
            start = float(packet.pts * packet.time_base) - media.origin
            for item in _texts(stream, packet):
                cues.append((start, start + float(packet.duration * packet.time_base), item))
    return sorted(cues, key=lambda cue: cue[:2])


def _texts(stream: Any, packet: Any) -> list[bytes]:
    shown = stream.codec_context.decode2(packet)
    return [] if shown is None else [item.dialogue for item in shown if hasattr(item, "dialogue")]


def _check_end(container: Any, streams: list[Any], path: Path) -> None:
    """Refuse a file whose header promises more than the file holds."""
    if not any(name in container.format.name.split(",") for name in DECLARED_LENGTH):
        return
    ends = []
    for stream in streams:
        length = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / av.time_base
        declared = float(length) + float((stream.start_time or 0) * stream.time_base)
        ends.append((declared, _last_stamp(container, stream, declared), stream))
    if not streams[0].duration:  # only the whole file's length is stated, and one of its streams may well be shorter
        ends = [max(ends, key=lambda end: end[1])]
    for declared, last, stream in ends:
        if declared - last > TRUNCATED_S:
            raise DataError(f"{path}: truncated: its {stream.type} ends at {max(last, 0):.1f} s of {declared:.1f} s")


def _last_stamp(container: Any, stream: Any, declared: float) -> float:
    last = 0.0
    try:
        container.seek(int(max(declared - 3.0, 0.0) / stream.time_base), stream=stream, backward=True)
        for packet in container.demux(stream):
            if packet.pts is not None:
                last = max(last, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    except FFmpegError:
        return last
    return last


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file for a `with` block; what FFmpeg refuses in it becomes a `DataError`."""
    container = open_container(path)
    try:
        yield container
    except FFmpegError as error:
        raise DataError(f"{path}: not readable ({reason(error)})") from error
    finally:
        container.close()


def open_container(path: Path) -> Any:
    """Open a file with PyAV.

    Raises:
        DataError: it is absent, empty or no media.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty (0 bytes)")
    try:
        return av.open(str(path), metadata_errors="replace")
    except FFmpegError as error:
        raise DataError(f"{path}: not readable as media ({reason(error)})") from error


def reason(error: Exception) -> str:
    """Say what FFmpeg says, without the numbers around it."""
    return getattr(error, "strerror", None) or str(error)


class Stream:
    """One stream of one file, decoded forwards; closed with the `with` block around it or with the object."""

    def __init__(self, media: Media, index: int | None, threads: int) -> None:
        if index is None:
            raise ValueError(f"{media.path}: has no such stream")
        self.media = media
        self._index, self._threads, self._bad = index, threads, 0
        self._open()

    def _open(self) -> None:
        self._container: Any = open_container(self.media.path)
        self._stream: Any = self._container.streams[self._index]
        if self._stream.codec_context is None:
            self.close()
            raise DataError(f"{self.media.path}: stream {self._index} is in no format that FFmpeg decodes here")
        self._stream.thread_type = "AUTO"
        self._tick = float(self._stream.time_base)
        self._stream.codec_context.thread_count = self._threads

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back."""
        self._container.close()

    def _seek(self, time: float) -> None:
        stamp = int((time + self.media.origin) / self._stream.time_base)
        try:
            self._container.seek(stamp, stream=self._stream, backward=True)
        except FFmpegError as error:
            raise DataError(f"{self.media.path}: cannot be read from {time:.2f} s on ({reason(error)})") from error

    def _packets(self) -> Iterator[Any]:
        return self._container.demux(self._stream)

    def _decoded(self) -> Iterator[Any]:
        """Decode from here to the end; a few broken packets are passed over, as a player does."""
        try:
            for packet in self._packets():
                try:
                    yield from packet.decode()
                except InvalidDataError as error:
                    self._bad += 1
                    if self._bad > MAX_BAD_PACKETS:
                        raise DataError(f"{self.media.path}: more than {MAX_BAD_PACKETS} packets do not decode ({error})") from error
        except EOFError:
            return
        except (FFmpegError, IndexError) as error:  # PyAV finds no stream for a packet of one that appears midway
            raise DataError(f"{self.media.path}: stops being readable ({reason(error)})") from error
