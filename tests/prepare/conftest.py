from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av", reason="pip install 'emoscale[prepare]'")

Film = Callable[..., Path]
MILLISECOND = Fraction(1, 1000)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real sample data, where there is any."""
    folder = Path(os.environ.get("EMOSCALE_SHARED", Path(__file__).parents[3] / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no sample data in {folder}; set EMOSCALE_SHARED")
    return folder


@pytest.fixture(scope="session")
def film() -> Film:
    """Write a film: its grey level is 20 × seconds, its tone rises by 100 Hz each second."""
    return _film


def _film(
    path: Path,
    seconds: float = 4.0,
    *,
    fps: int = 25,
    times: list[float] | None = None,
    sound: bool = True,
    picture: bool = True,
    height: int = 48,
    b_pictures: int = 0,
    options: dict[str, str] | None = None,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as out:
        packets = []
        if picture:
            video = out.add_stream("mpeg4", rate=fps, width=64, height=height, pix_fmt="yuv420p", bit_rate=800_000)
            video.codec_context.gop_size, video.codec_context.time_base = 12, MILLISECOND
            video.codec_context.max_b_frames = b_pictures
        if sound:
            audio = out.add_stream("pcm_s16le" if path.suffix == ".wav" else "aac", rate=44_100, layout="mono")
        if picture:
            shown = [i / fps for i in range(round(seconds * fps))] if times is None else times
            packets += [packet for frame in [*map(functools.partial(_grey, height), shown), None] for packet in video.encode(frame)]
        if sound:
            packets += [packet for frame in [*_tones(seconds), None] for packet in audio.encode(frame)]
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            out.mux(packet)
    return path


def _grey(height: int, time: float) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(np.full((height, 64, 3), min(round(20 * time) + 16, 255), np.uint8), format="rgb24")
    frame.pts, frame.time_base = round(time * 1000), MILLISECOND
    return frame


def _tones(seconds: float) -> Iterator[av.AudioFrame]:
    clock = np.arange(round(seconds * 44_100)) / 44_100
    wave = 0.3 * np.sin(2 * np.pi * np.cumsum(400 + 100 * np.floor(clock)) / 44_100)
    for at in range(0, len(wave), 1024):
        chunk = (wave[None, at : at + 1024] * 32_767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(chunk, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 44_100, at, Fraction(1, 44_100)
        yield frame


@pytest.fixture
def write_srt() -> Callable[..., Path]:
    """Write (start, end, text) cues as SRT."""

    def write(path: Path, cues: list[tuple[float, float, str]]) -> Path:
        def stamp(t: float) -> str:
            ms = round(t * 1000)
            return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02},{ms % 1000:03}"

        blocks = (f"{i}\n{stamp(a)} --> {stamp(b)}\n{text}\n" for i, (a, b, text) in enumerate(cues, 1))
        path.write_text("\n".join(blocks), encoding="utf-8")
        return path

    return write
