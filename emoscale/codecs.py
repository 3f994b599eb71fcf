"""Sound and pictures as raw shards store them: FLAC, and JPEGs behind one another."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

RATE = 16_000
"""Samples per second of every stored sound."""
FULL = 1 << 15
"""What a sample of 1.0 is in 16 bits; the largest there is one less."""
BLOCK = 1 << 20
"""Samples decoded at once."""
LARGEST_SIDE = 1024
"""Pixels; a few bytes can say that they are a picture of gigabytes."""
QUALITY = 95
"""Of the JPEGs; their colours are not thinned out."""


def encode_audio(wave: np.ndarray) -> bytes:
    """Give the FLAC (16 bits, mono, 16 kHz) of float [n] in −1 … 1; nothing for no samples.

    Louder samples are limited; those of a 16-bit recording come back as they were.
    """
    if not len(wave):
        return b""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.clip(np.rint(wave * FULL), -FULL, FULL - 1).astype(np.int16), RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def decode_audio(data: bytes, limit: int | None = None) -> np.ndarray:
    """Give float32 [n] of what `encode_audio` made, the first `limit` samples of it.

    Raises:
        ValueError: this is no FLAC of that kind.
    """
    if not data:
        return np.zeros(0, np.float32)
    import soundfile

    try:
        with _sound(data) as file:
            if file.samplerate != RATE or file.channels != 1:
                raise ValueError(f"sound has {file.channels} channels at {file.samplerate} Hz, one at {RATE} Hz was expected")
            # Its header may promise billions of samples: room is made for those that come.
            blocks, left = [np.zeros(0, np.int16)], file.frames if limit is None else min(limit, file.frames)
            while left > 0 and len(block := file.read(min(left, BLOCK), dtype="int16")):
                blocks.append(block)
                left -= len(block)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise ValueError(f"sound of {len(data)} bytes cannot be decoded ({error})") from error
    return np.concatenate(blocks).astype(np.float32) / FULL


def count_samples(data: bytes) -> int:
    """Give how many samples `decode_audio` will give, read from the header.

    Raises:
        ValueError: this is no FLAC.
    """
    if not data:
        return 0
    import soundfile

    try:
        with _sound(data) as file:
            return int(file.frames)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise ValueError(f"sound of {len(data)} bytes cannot be decoded ({error})") from error


def _sound(data: bytes) -> Any:
    """Open sound as FLAC, whatever else its first bytes may look like."""
    import soundfile

    if not data.startswith(b"fLaC"):
        raise ValueError(f"sound of {len(data)} bytes is no FLAC")
    return soundfile.SoundFile(io.BytesIO(data))


def encode_faces(crops: np.ndarray) -> bytes:
    """Give uint8 RGB pictures [n, S, S, 3] as JPEGs, each behind its size (4 bytes, little-endian)."""
    from PIL import Image

    parts: list[bytes] = []
    for crop in crops:
        file = io.BytesIO()
        Image.fromarray(crop, "RGB").save(file, "JPEG", quality=QUALITY, subsampling=0)
        parts += [struct.pack("<I", file.tell()), file.getvalue()]
    return b"".join(parts)


def decode_faces(data: bytes, limit: int | None = None) -> np.ndarray:
    """Give uint8 [n, S, S, 3] of what `encode_faces` made, the first `limit` of them; [0, 0, 0, 3] for none.

    Raises:
        ValueError: the bytes are no such pictures.
    """
    pictures = [_picture(part, number) for number, part in enumerate(islice(_parts(data), limit))]
    if len({picture.shape for picture in pictures}) > 1:
        raise ValueError(f"pictures are of different sizes: {sorted({picture.shape[:2] for picture in pictures})}")
    return np.stack(pictures) if pictures else np.zeros((0, 0, 0, 3), np.uint8)


def decode_face(data: bytes, number: int) -> np.ndarray:
    """Give uint8 [S, S, 3], one picture of what `encode_faces` made.

    Raises:
        ValueError: the bytes are no such pictures, or there are not so many.
    """
    part = next(islice(_parts(data), number, None), None)
    if part is None:
        raise ValueError(f"there is no picture {number}")
    return _picture(part, number)


def one_face(data: bytes, share: float, limit: int | None = None) -> tuple[bytes, int]:
    """Give one picture as `encode_faces` would, and its number; none of none.

    Args:
        data: what `encode_faces` made.
        share: where among the first `limit` pictures it stands, in [0, 1).
        limit: pictures that are looked at.

    Raises:
        ValueError: a size points behind the end.
    """
    parts = list(islice(_parts(data), limit))
    number = int(share * len(parts))
    return (struct.pack("<I", len(parts[number])) + parts[number], number) if parts else (b"", 0)


def count_faces(data: bytes) -> int:
    """Give how many pictures `decode_faces` will find.

    Raises:
        ValueError: a size points behind the end.
    """
    return sum(1 for _ in _parts(data))


def _picture(part: bytes, number: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(part), formats=["JPEG"]) as picture:
            if max(picture.size) > LARGEST_SIDE:
                raise ValueError(f"{picture.size[0]}×{picture.size[1]} pixels, at most {LARGEST_SIDE}×{LARGEST_SIDE} were expected")
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"picture {number} cannot be decoded ({error})") from error


def _parts(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        size = struct.unpack_from("<I", data, at)[0] if at + 4 <= len(data) else -1
        if size < 0 or at + 4 + size > len(data):
            raise ValueError(f"pictures end within one, {len(data)} bytes of them")
        yield data[at + 4 : at + 4 + size]
        at += 4 + size
