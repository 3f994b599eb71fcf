"""Read sound and pictures by time, in one forward pass over a file.

Times are seconds from the start of the file as a player shows them (the container's own start time is subtracted),
which is what subtitles count from. Nothing here counts frames: a file with a variable frame rate gives the frame that is
shown at the time asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np

from emoscale.config import DataError
from emoscale.prepare.container import (
    FFmpegError,
    InvalidDataError,
    Media,
    VideoReformatter,
    av,
    open_container,
    reason,
)

RATE = 16_000
"""Samples per second of all sound."""
SEEK_AHEAD_S = 10.0
"""A longer gap is jumped over; a shorter one is cheaper to decode, for key frames lie some seconds apart."""
MAX_BAD_PACKETS = 50
"""Packets of one stream that may fail to decode before the file counts as unreadable."""
Decoder = Literal["auto", "torchcodec", "pyav"]


class FrameReader(Protocol):
    """Gives pictures by time."""

    def at(self, times: Iterable[float]) -> Iterator[tuple[float, np.ndarray]]:
        """Give (time, uint8 [h, w, 3] RGB) for each time at which there is a picture; cheapest when times increase."""
        ...

    def close(self) -> None:
        """Give the file back."""
        ...


@functools.cache
def backend() -> tuple[str, str]:
    """Name the decoder of pictures that works on this machine, and why it is that one."""
    try:
        import torchcodec
    except ModuleNotFoundError:
        return "pyav", "torchcodec is not installed; PyAV brings its own FFmpeg"
    except (ImportError, RuntimeError, OSError) as error:  # releases before 0.17 look for FFmpeg when imported
        return "pyav", f"torchcodec does not load ({str(error).strip().splitlines()[0]}); PyAV brings its own FFmpeg"
    found = getattr(torchcodec, "ffmpeg_major_version", "of some version")
    if found is None:
        return "pyav", "torchcodec does not find the system's FFmpeg 4 to 9; PyAV brings its own"
    return "torchcodec", f"torchcodec found the system's FFmpeg {found}"


def open_frames(media: Media, *, decoder: Decoder = "auto", max_height: int = 0, threads: int = 0) -> FrameReader:
    """Open the pictures of a file.

    Args:
        media: a file with a video stream.
        decoder: which library decodes; `auto` takes torchcodec where `backend()` says that it works.
        max_height: taller pictures are scaled down to this height; 0 leaves them as they are.
        threads: of the decoder; 0 lets FFmpeg choose.
    """
    chosen = backend()[0] if decoder == "auto" else decoder
    return (
        TorchcodecFrames(media, max_height, threads)
        if chosen == "torchcodec"
        else PyavFrames(media, max_height, threads)
    )


class _Stream:
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
        self._stream.thread_type = "AUTO"
        self._tick = float(self._stream.time_base)
        self._stream.codec_context.thread_count = self._threads

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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

    def _decoded(self) -> Iterator[Any]:
        """Decode from here to the end; a few broken packets are passed over, as a player does."""
        try:
            for packet in self._container.demux(self._stream):
                try:
                    yield from packet.decode()
                except InvalidDataError as error:
                    self._bad += 1
                    if self._bad > MAX_BAD_PACKETS:
                        raise DataError(
                            f"{self.media.path}: more than {MAX_BAD_PACKETS} packets do not decode ({error})"
                        ) from error
        except EOFError:
            return
        except FFmpegError as error:
            raise DataError(f"{self.media.path}: stops being readable ({reason(error)})") from error


class PyavFrames(_Stream):
    """Pictures through PyAV: decodes forwards, jumps over long gaps, converts only what is asked for."""

    def __init__(self, media: Media, max_height: int = 0, threads: int = 0) -> None:
        super().__init__(media, media.video, threads)
        self._max_height = max_height
        self._scaler = VideoReformatter()  # kept: a new one per frame costs more than the conversion
        self._interval = float(1 / self._stream.average_rate) if self._stream.average_rate else 0.04
        self._frames = self._decoded()
        self._now: Any = None
        self._next: Any = self._pull()
        self._image: np.ndarray | None = None

    def at(self, times: Iterable[float]) -> Iterator[tuple[float, np.ndarray]]:
        """Give (time, uint8 [h, w, 3] RGB) for each time at which the file shows a picture."""
        for time in times:
            image = self._shown(time)
            if image is not None:
                yield time, image

    def _shown(self, time: float) -> np.ndarray | None:
        if self._behind(time) or (self._next is not None and time > self._time(self._next) + SEEK_AHEAD_S):
            self._jump(time)
        while self._next is not None and self._time(self._next) <= time + 1e-4:
            self._now, self._next, self._image = self._next, self._pull(), None
        frame = self._now
        if frame is None:
            frame = self._next
            if frame is None or self._time(frame) - time > 0.1:
                return None
            return self._picture(frame)
        if self._next is None and time >= self._time(frame) + self._shown_for(frame) + 1e-4:
            return None
        if self._image is None:
            self._image = self._picture(frame)
        return self._image

    def _behind(self, time: float) -> bool:
        first = self._now or self._next
        return first is None or (self._now is not None and time < self._time(first) - 1e-4)

    def _jump(self, time: float) -> None:
        for target in (time, 0.0):  # an index may point past the time asked for: then from the start
            self._seek(target)
            self._frames = self._decoded()
            self._now, self._next, self._image = None, self._pull(), None
            if self._next is not None and self._time(self._next) <= time + 1e-4:
                return

    def _pull(self) -> Any:
        return next((frame for frame in self._frames if frame.pts is not None), None)

    def _time(self, frame: Any) -> float:
        return frame.pts * self._tick - self.media.origin

    def _shown_for(self, frame: Any) -> float:
        return max((frame.duration or 0) * self._tick, self._interval)

    def _picture(self, frame: Any) -> np.ndarray:
        scale = min(1.0, self._max_height / frame.height) if self._max_height else 1.0
        width, height = max(2, round(frame.width * scale)), max(2, round(frame.height * scale))
        image = self._scaler.reformat(frame, width=width, height=height, format="rgb24").to_ndarray()
        turns = round((frame.rotation or 0) / 90) % 4
        return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


class TorchcodecFrames:
    """Pictures through torchcodec, which needs the system's FFmpeg.

    Some files that players show in full it does not read to the end (MPEG program streams): PyAV goes on there.
    """

    def __init__(self, media: Media, max_height: int = 0, threads: int = 0) -> None:
        self.media = media
        self._max_height, self._threads = max_height, threads
        self._rest: PyavFrames | None = None
        self._open()

    def at(self, times: Iterable[float]) -> Iterator[tuple[float, np.ndarray]]:
        """Give (time, uint8 [h, w, 3] RGB) for each time at which the file shows a picture."""
        for time in times:
            if self._rest is None:
                try:
                    image = self._shown(time)
                except (RuntimeError, IndexError):
                    self._rest = PyavFrames(self.media, self._max_height, self._threads)
                else:
                    if image is not None:
                        yield time, image
                    continue
            yield from self._rest.at([time])

    def close(self) -> None:
        """Give the file back."""
        self._decoder = None
        if self._rest is not None:
            self._rest.close()

    def _open(self) -> None:
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportPrivateImportUsage]

        path, stream = str(self.media.path), self.media.video
        self._decoder: Any = None
        self._begin = self._end = 0.0
        try:
            self._decoder = VideoDecoder(
                path, stream_index=stream, dimension_order="NHWC", num_ffmpeg_threads=self._threads, seek_mode="exact"
            )
        except (RuntimeError, ValueError):
            self._rest = PyavFrames(self.media, self._max_height, self._threads)
            return
        about = self._decoder.metadata
        self._begin, self._end = float(about.begin_stream_seconds or 0), float(about.end_stream_seconds or 0)

    def _shown(self, time: float) -> np.ndarray | None:
        stamp = time + self.media.origin
        if stamp < self._begin - 0.1 or stamp >= self._end:
            return None
        image = self._decoder.get_frame_played_at(max(stamp, self._begin)).data.numpy()
        if not self._max_height or image.shape[0] <= self._max_height:
            return image
        height, width = self._max_height, round(image.shape[1] * self._max_height / image.shape[0])
        return av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").to_ndarray(
            width=width, height=height
        )


class AudioReader(_Stream):
    """Sound as 16 kHz mono, read forwards once for any number of utterances in the order of their starts.

    Sound always goes through PyAV: it is a small part of the cost, and torchcodec cannot go on where it stopped.
    """

    def __init__(self, media: Media) -> None:
        super().__init__(media, media.audio, threads=1)
        self._rewind()

    def between(self, start: float, end: float) -> np.ndarray:
        """Give float32 [samples] of [start, end) seconds; shorter, or empty, where the sound ends before."""
        first, last = round(max(start, 0.0) * RATE), round(max(end, 0.0) * RATE)
        if first < self._first:  # opened anew: after a seek to the start, decoders give slightly other samples
            self.close()
            self._open()
            self._rewind()
        self._drop(first)
        while not self._ended and self._first + self._held < last:
            self._pull()
            self._drop(first)
        wave = np.concatenate(self._chunks) if self._chunks else np.zeros(0, np.float32)
        self._chunks, self._held = ([wave] if len(wave) else []), len(wave)
        return wave[max(first - self._first, 0) : max(last - self._first, 0)].copy()

    def _rewind(self) -> None:
        self._frames = self._decoded()
        self._resampler: Any = None
        self._shape: Any = None
        self._expected = 0.0
        self._chunks: list[np.ndarray] = []
        self._first = 0  # sample number of the first sample held
        self._held = 0
        self._ended = False

    def _drop(self, first: int) -> None:
        while self._chunks and self._first + len(self._chunks[0]) <= first:
            gone = len(self._chunks.pop(0))
            self._first, self._held = self._first + gone, self._held - gone

    def _pull(self) -> None:
        frame = next(self._frames, None)
        if frame is None:
            self._append(self._resampler.resample(None) if self._resampler else [])
            self._ended = True
            return
        time = self._expected if frame.pts is None else frame.pts * self._tick - self.media.origin
        shape = (frame.format.name, frame.layout.name, frame.rate)
        if self._resampler is None or shape != self._shape or abs(time - self._expected) > 0.05:
            self._append(self._resampler.resample(None) if self._resampler else [])
            layout = frame.layout.name if frame.layout.nb_channels <= 2 else "stereo"
            self._resampler, self._shape = av.AudioResampler(format="fltp", layout=layout, rate=RATE), shape
            self._align(round(time * RATE))
        self._expected = time + frame.samples / frame.rate
        self._append(self._resampler.resample(frame))

    def _align(self, sample: int) -> None:
        """Continue at this sample: silence where the stream has a hole, an overlap is cut off."""
        ahead = sample - (self._first + self._held)
        if ahead > 0:
            self._put(np.zeros(ahead, np.float32))
        self._skip = max(-ahead, 0)

    def _append(self, frames: list[Any]) -> None:
        for frame in frames:
            channels = frame.to_ndarray()
            # FFmpeg's own mono would make a centred voice 3 dB louder than a mono file
            wave = channels[0] if len(channels) == 1 else channels.mean(axis=0)
            cut = min(self._skip, len(wave))
            self._skip -= cut
            self._put(wave[cut:])

    def _put(self, wave: np.ndarray) -> None:
        if len(wave):
            self._chunks.append(wave)
            self._held += len(wave)
