"""Read sound by time, in one forward pass over a file.

Times are seconds from the start of the file, as those of pictures are (`prepare.media`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from emoscale.clock import stage
from emoscale.codecs import RATE
from emoscale.config import DataError
from emoscale.prepare.container import FFmpegError, Media, Stream, av, reason

JOINED_S = 0.5
"""Sound is resampled in pieces of about this length: one call per frame of the codec would cost more than the resampling."""
JOINABLE = {f"{kind}{planar}" for kind in ("u8", "s16", "s32", "flt", "dbl") for planar in ("", "p")}
LONGEST_HOLE_S = 3600.0
"""Silence that is put into a hole of the sound at most."""
KEPT_S = 600.0
"""Sound held at most, so that what speech detection has heard need not be decoded again for the utterances it found."""


class AudioReader(Stream):
    """Sound as 16 kHz mono, read forwards once for any number of utterances in the order of their starts.

    Sound always goes through PyAV: it is a small part of the cost, and torchcodec cannot go on where it stopped.
    """

    def __init__(self, media: Media) -> None:
        super().__init__(media, media.audio, threads=1)
        self._rewind()

    def between(self, start: float, end: float) -> np.ndarray:
        """Give float32 [samples] of [start, end) seconds; shorter, or empty, where the sound ends before."""
        with stage("decode sound"):
            return self._between(round(max(start, 0.0) * RATE), round(max(end, 0.0) * RATE))

    def _between(self, first: int, last: int) -> np.ndarray:
        if first < self._first:  # opened anew: after a seek to the start, decoders give slightly other samples
            self.close()
            self._open()
            self._rewind()
        self._drop(first)
        while not self._ended and self._first + self._held < last:
            self._pull()
            self._drop(first)
        return self._cut(max(first - self._first, 0), max(last - self._first, 0))

    def _cut(self, begin: int, end: int) -> np.ndarray:
        """Give [begin, end) of the samples held."""
        parts, at = [np.zeros(0, np.float32)], 0
        for chunk in self._chunks:
            parts.append(chunk[max(begin - at, 0) : max(end - at, 0)])
            at += len(chunk)
        return np.concatenate(parts)

    def _rewind(self) -> None:
        self._frames = self._decoded()
        self._resampler: Any = None
        self._shape: Any = None
        self._expected = 0.0
        self._waiting: list[Any] = []  # frames of one shape without a gap, to be resampled together
        self._waiting_s = 0.0
        self._chunks: list[np.ndarray] = []
        self._first = 0  # sample number of the first sample held
        self._held = 0
        self._ended = False

    def _drop(self, first: int) -> None:
        while self._held > KEPT_S * RATE and self._chunks and self._first + len(self._chunks[0]) <= first:
            gone = len(self._chunks.pop(0))
            self._first, self._held = self._first + gone, self._held - gone

    def _pull(self) -> None:
        frame = next(self._frames, None)
        if frame is None:
            self._flush()
            self._ended = True
            return
        time = self._expected if frame.pts is None else frame.pts * self._tick - self.media.origin
        shape = (frame.format.name, frame.layout.name, frame.rate)
        if self._resampler is None or shape != self._shape or abs(time - self._expected) > 0.05:
            self._flush()
            layout = frame.layout.name if frame.layout.nb_channels <= 2 else "stereo"
            self._resampler, self._shape = av.AudioResampler(format="fltp", layout=layout, rate=RATE), shape
            self._align(round(time * RATE))
        self._expected = time + frame.samples / frame.rate
        self._waiting.append(frame)
        self._waiting_s += frame.samples / frame.rate
        if self._waiting_s >= JOINED_S:
            self._resample()

    def _resample(self) -> None:
        try:
            for frame in _joined(self._waiting):
                self._append(self._resampler.resample(frame))
        except FFmpegError as error:
            raise DataError(f"{self.media.path}: its sound cannot be brought to {RATE} Hz ({reason(error)})") from error
        self._waiting, self._waiting_s = [], 0.0

    def _flush(self) -> None:
        """Take what the resampler still holds."""
        if self._resampler is not None:
            self._resample()
            self._append(self._resampler.resample(None))

    def _align(self, sample: int) -> None:
        """Continue at this sample: silence where the stream has a hole, an overlap is cut off."""
        ahead = sample - (self._first + self._held)
        if ahead > LONGEST_HOLE_S * RATE:
            raise DataError(f"{self.media.path}: its sound jumps ahead by {ahead / RATE:.0f} s; its time stamps are damaged, convert the file anew")
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


def _joined(frames: list[Any]) -> list[Any]:
    """Give consecutive frames of sound as one, where PyAV can make one of their kind."""
    if len(frames) < 2 or frames[0].layout.name not in ("mono", "stereo") or frames[0].format.name not in JOINABLE:
        return frames
    samples = np.concatenate([frame.to_ndarray() for frame in frames], axis=1)
    whole = av.AudioFrame.from_ndarray(samples, format=frames[0].format.name, layout=frames[0].layout.name)
    whole.rate, whole.pts, whole.time_base = frames[0].rate, frames[0].pts, frames[0].time_base
    return [whole]
