"""Encoders that encode nothing: voices and faces kept as they were recorded, for models that train their own."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from emoscale.codecs import RATE, encode_audio, encode_faces
from emoscale.config import ConfigError, DataError
from emoscale.prepare.teacher import Teacher, probabilities

WAVEFORM, CROPS = "waveform", "crops"
MOST_PIXELS = 100_000_000
"""Of a picture: more than cameras have, less than fills a memory."""


class Recorded:
    """The sound itself as FLAC: whole frames of `frame_s`, what is more than `max_frames` of them left out."""

    name, raw, revision = WAVEFORM, True, "flac 16 bit, 1"

    def __init__(self, *, frame_s: float, max_frames: int) -> None:
        self.width = round(frame_s * RATE)
        if abs(self.width / RATE - frame_s) > 1e-9:
            raise ConfigError(f"acoustic.frame_s: {frame_s}, must be a whole number of samples (1/{RATE} s) for waveform")
        self.frame_s, self._max_frames = frame_s, max_frames

    def encode(self, wave: np.ndarray) -> bytes:
        """Give the FLAC; none for sound shorter than one frame."""
        frames = min(self._max_frames, len(wave) // self.width)
        return encode_audio(wave[: frames * self.width])


class Photographed:
    """The face crops themselves as JPEGs of `side` × `side`."""

    name, raw = CROPS, True

    def __init__(self, side: int, teacher: Teacher | None, *, max_frames: int) -> None:
        self._side, self._teacher, self._max_frames = side, teacher, max_frames
        self.width, self.revision = 3 * side * side, f"jpeg {side}x{side}, 1"
        self.classes = list(teacher.classes) if teacher else []

    def encode(self, crops: np.ndarray) -> tuple[bytes, np.ndarray]:
        """Give the JPEGs, and the teacher's probabilities."""
        import cv2

        crops = crops[: self._max_frames]
        fitted = [cv2.resize(crop, (self._side, self._side), interpolation=cv2.INTER_AREA) for crop in crops]
        return encode_faces(np.stack(fitted) if fitted else crops), probabilities(self._teacher, crops)


def read_picture(path: Path, side: int) -> np.ndarray:
    """Give the middle square of a picture as uint8 RGB [side, side, 3], upright as its camera was held.

    Raises:
        DataError: there is no such file, or it is no picture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"{opened.width}×{opened.height} pixels; make it smaller")
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, TypeError, MemoryError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as a picture ({str(error) or type(error).__name__})") from error
    return np.asarray(ImageOps.fit(picture, (side, side), Image.Resampling.BOX if min(picture.size) >= side else Image.Resampling.BICUBIC))
