"""Read pictures by time, in one forward pass over a file.

Times are seconds from the start of the file as a player shows them (the container's own start time is subtracted),
which is what subtitles count from. Nothing here counts frames: a file with a variable frame rate gives the frame that is
shown at the time asked for.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, Literal, Protocol

import numpy as np

from emoscale.prepare.container import (
    Media,
    Stream,
    VideoReformatter,
    av,
)

SEEK_AHEAD_S = 10.0
"""A longer gap is jumped over; a shorter one is cheaper to decode, for key frames lie some seconds apart."""
REORDERED = 16
"""Pictures that a codec may show later than it stores them, H.264 and HEVC at most."""
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
    return TorchcodecFrames(media, max_height, threads) if chosen == "torchcodec" else PyavFrames(media, max_height, threads)


class PyavFrames(Stream):
    """Pictures through PyAV: decodes forwards, jumps over long gaps, converts only what is asked for.

    Pictures that nobody asks for are not decoded where no other picture is made from them: of H.264 with
    B pictures, looked at 10 times a second, that saves about 0.4 of the decoding.
    """

    def __init__(self, media: Media, max_height: int = 0, threads: int = 0) -> None:
        super().__init__(media, media.video, threads)
        self._max_height = max_height
        self._scaler = VideoReformatter()  # kept: a new one per frame costs more than the conversion
        self._interval = float(1 / self._stream.average_rate) if self._stream.average_rate else 0.04
        self._wanted: list[float] = []
        self._frames = self._decoded()
        self._now: Any = None
        self._next: Any = self._pull()
        self._image: np.ndarray | None = None

    def at(self, times: Iterable[float]) -> Iterator[tuple[float, np.ndarray]]:
        """Give (time, uint8 [h, w, 3] RGB) for each time at which the file shows a picture."""
        times = list(times)
        self._wanted = sorted(times)
        for time in times:
            image = self._shown(time)
            if image is not None:
                yield time, image

    def _packets(self) -> Iterator[Any]:
        """Give the packets, each after the decoder was told whether its picture may be left out."""
        context = self._stream.codec_context
        ahead: deque[Any] = deque()
        behind: deque[int | None] = deque(maxlen=REORDERED)
        for packet in chain(super()._packets(), [None]):
            if packet is not None:
                ahead.append(packet)
            while ahead and (packet is None or len(ahead) > REORDERED):
                now = ahead.popleft()
                near = [*behind, *(item.pts for item in ahead if item.size)]
                context.skip_frame = "DEFAULT" if now.size == 0 or self._shows(now.pts, near) else "NONREF"
                behind.append(now.pts)
                yield now

    def _shows(self, stamp: int | None, near: list[int | None]) -> bool:
        """Tell whether the picture with this time stamp may be wanted, knowing the stamps of all that are shown near it."""
        stamps = [item for item in near if item is not None]
        if not self._wanted or stamp is None or len(stamps) < len(near) or not any(item < stamp for item in stamps):
            return True
        later = [item for item in stamps if item > stamp]
        end = min(later) * self._tick - self.media.origin if later else math.inf
        if end > self._wanted[-1]:  # what is asked for next may begin there
            return True
        first = bisect_left(self._wanted, stamp * self._tick - self.media.origin - 2e-4)
        return self._wanted[first] < end + 2e-4

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
            self._decoder = VideoDecoder(path, stream_index=stream, dimension_order="NHWC", num_ffmpeg_threads=self._threads, seek_mode="exact")
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
        return av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").to_ndarray(width=width, height=height)
