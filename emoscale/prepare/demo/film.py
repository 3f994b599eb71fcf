"""Films: the drawn scene of a script with its sound, encoded as H.264 and AAC, and its subtitles."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.container import OutputContainer

from . import face, script, voice

WIDTH, HEIGHT, PANEL = 256, 144, 128
CENTRE, SIZE = (64.0, 80.0), 42.0
"""Place and half height of a head in its panel of 128 × 144 pixels."""

AHEAD, RISE, FALL = 0.15, 0.35, 0.35
"""An expression starts this long before the utterance, takes so long to rise, and so long to go after it; seconds."""

EXPOSURE = 6
"""A frame shows the mouth's mean over so many hundredths of a second, as a camera does; points in time would alias syllables."""

QUALITY = "27"
"""x264's constant rate factor."""

SOUND = {"aac_coder": "fast", "aac_tns": "0", "aac_pns": "0", "aac_is": "0", "aac_ms": "0", "flags": "bitexact"}
"""The plainest coding tools: 60 s are encoded in 0.1 s."""

SOUND_BITS = 40_000


def render(cast: script.Cast, seed: int, folder: Path, fps: float) -> None:
    """Write `<folder>/<cast.name>.mp4` (`.m4a`, sound alone, at 0 fps) and `.srt`.

    The film is renamed into place last, so a film that exists is whole.
    """
    lines, seconds = script.lines(seed, cast)
    path = folder / f"{cast.name}{suffix(fps)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".srt").write_text(subtitles(lines), encoding="utf-8")
    tracks = mouths(seed, cast, lines)
    partial = path.with_name(f".{path.name}")
    track = sound(seed, cast, lines, tracks, seconds)
    if fps:
        encode(partial, Scene(seed, cast, lines, tracks, seconds, fps), track, fps)
    else:
        encode_sound(partial, track)
    partial.replace(path)


def suffix(fps: float) -> str:
    """Give the suffix of a film, or of sound alone."""
    return ".mp4" if fps else ".m4a"


def subtitles(lines: list[script.Line]) -> str:
    """Give the SRT file of a film; an empty cue stays a cue."""
    return "".join(f"{i + 1}\n{_clock(line.start)} --> {_clock(line.end)}\n{line.subtitle}\n\n" for i, line in enumerate(lines))


def mouths(seed: int, cast: script.Cast, lines: list[script.Line]) -> list[np.ndarray]:
    """Give each utterance's mouth opening every 10 ms, which both the picture and the sound follow."""
    return [voice.opening(line.words, line.end - line.start, _stream(seed, cast, 1, i)) for i, line in enumerate(lines)]


def sound(seed: int, cast: script.Cast, lines: list[script.Line], tracks: list[np.ndarray], seconds: float) -> np.ndarray:
    """Give a film's sound: float32 at 16 kHz; exact silence where an utterance is muted, room noise elsewhere."""
    people = [voice.speaker(script.stream(seed, script.IDENTITY, number, 2)) for number in cast.speakers]
    track = _stream(seed, cast, 2).standard_normal(int(np.ceil(seconds * voice.RATE)), np.float32) * np.float32(4e-4)
    for i, (line, mouth) in enumerate(zip(lines, tracks, strict=True)):
        begin = round(line.start * voice.RATE)
        if not line.voice:
            track[begin : round(line.end * voice.RATE)] = 0
            continue
        spoken = voice.speak(people[line.speaker], line.voice, line.words, mouth, _stream(seed, cast, 3, i))
        track[begin : begin + len(spoken)] += spoken[: len(track) - begin]
    return track


class Scene:
    """The pictures of a film, one by one."""

    def __init__(
        self,
        seed: int,
        cast: script.Cast,
        lines: list[script.Line],
        tracks: list[np.ndarray],
        seconds: float,
        fps: float,
    ) -> None:
        """Draw what stays, and work out what moves."""
        rng = _stream(seed, cast, 4)
        self.times = np.arange(int(np.ceil(seconds * fps)), dtype=np.float32) / np.float32(fps)
        top, bottom = rng.uniform(60, 180, (2, 3))
        down = np.linspace(0, 1, HEIGHT)[:, None, None]
        self.backdrop = np.ascontiguousarray(np.broadcast_to((1 - down) * top + down * bottom, (HEIGHT, WIDTH, 3)).astype(np.uint8))
        people = [face.identity(script.stream(seed, script.IDENTITY, number, 3)) for number in cast.speakers]
        self.faces = [face.Face(person, self.backdrop[:, :PANEL], CENTRE, SIZE, rng.uniform(-1, 1)) for person in people]
        self.moves = [self._performance(rng, side, lines, tracks) for side in (0, 1)]
        self.shapes = [drawn.shapes(moves) for drawn, moves in zip(self.faces, self.moves, strict=True)]
        self.poses = [self._sway(rng) for _ in (0, 1)]
        self.views = self._views(lines)
        self._gain = 1.0 + 0.10 * _wave(rng, self.times, 0.05) + rng.uniform(-0.1, 0.1)
        self._grain = rng.integers(0, 4, (6, HEIGHT, WIDTH)).astype(np.uint8)
        self._canvas, self._panel = self.backdrop.copy(), self.faces[0].base.copy()
        self._shown = ""

    def __len__(self) -> int:
        return len(self.times)

    def picture(self, frame: int) -> np.ndarray:
        """Give one frame as planar YUV 4:2:0, uint8 [216, 256]."""
        view = self.views[frame]
        if view != self._shown:
            self._canvas[:] = 24 if view == "card" else self.backdrop
            self._shown = view
            if view == "card":
                cv2.putText(self._canvas, "later", (88, 78), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (190, 190, 190), 1, cv2.LINE_AA)
        for side, left in _PLACES[view]:
            np.copyto(self._panel, self.faces[side].base)
            self.faces[side].draw(self._panel, self.shapes[side], frame)
            there = self._canvas[:, left : left + PANEL]
            cv2.warpAffine(self._panel, self.poses[side][frame], (PANEL, HEIGHT), there, cv2.INTER_LINEAR, cv2.BORDER_REPLICATE)
        planes = cv2.cvtColor(self._canvas, cv2.COLOR_BGR2YUV_I420)
        bright = planes[:HEIGHT]
        cv2.addWeighted(bright, float(self._gain[frame]), self._grain[frame % 6], 1.0, -1.5, bright)
        return planes

    def _performance(self, rng: np.random.Generator, side: int, lines: list[script.Line], tracks: list[np.ndarray]) -> np.ndarray:
        """Give one person's movements in every frame: float32 [frames, 11], in the order of `face.DIMENSIONS`."""
        times = self.times
        moves = np.zeros((len(times), len(face.DIMENSIONS)), np.float32)
        for column, size in ((0, 0.12), (1, 0.1), (4, 0.12)):  # nobody's resting face is quite still
            moves[:, column] = size * _wave(rng, times, 0.15)
        for line, track in zip(lines, tracks, strict=True):
            if line.speaker != side:
                continue
            rise = np.clip((times - line.start + AHEAD) / RISE, 0, 1)
            fall = np.clip(1 - (times - line.end) / FALL, 0, 1)
            strength = _smooth(np.minimum(rise, fall)) * (1 + 0.1 * np.sin(2 * np.pi * (0.7 * times + rng.random())))
            moves += strength[:, None] * face.expression(line.face or "neutral", line.intensity)
            knots = line.start + 0.01 * np.arange(len(track))
            exposed = np.convolve(track, np.full(EXPOSURE, 1 / EXPOSURE), "same")
            moves[:, -1] += np.interp(times, knots, exposed, left=0, right=0).astype(np.float32)
        eye = face.DIMENSIONS.index("eye")
        for moment in np.cumsum(rng.exponential(2.5, 4 + int(times[-1] / 2)) + 0.5):
            moves[np.abs(times - moment) < 0.07, eye] = -1.4
        return moves

    def _sway(self, rng: np.random.Generator) -> np.ndarray:
        """Give the affine map of a head in every frame: float64 [frames, 2, 3]."""
        turn = np.deg2rad(2.5) * _wave(rng, self.times, 0.25)
        scale = 1 + 0.025 * _wave(rng, self.times, 0.1)
        cos, sin = scale * np.cos(turn), scale * np.sin(turn)
        x, y = CENTRE[0], HEIGHT  # the neck stays, the head moves
        dx, dy = 2.5 * _wave(rng, self.times, 0.2), 1.2 * _wave(rng, self.times, 0.3)
        rows = [[cos, sin, x - cos * x - sin * y + dx], [-sin, cos, y + sin * x - cos * y + dy]]
        return np.moveaxis(np.array(rows, np.float64), 2, 0)

    def _views(self, lines: list[script.Line]) -> list[str]:
        """Say what each frame shows: `both`, `one0`, `one1`, `empty` or `card`."""
        views = np.full(len(self.times), "both", dtype="<U5")
        last = 0.0
        for i, line in enumerate(lines):
            begin = last if i == 0 or lines[i - 1].scene == line.scene else line.start - AHEAD
            seen = line.speaker if line.shot == "speaker" else 1 - line.speaker
            views[self.times >= begin] = f"one{seen}" if line.shot in ("speaker", "listener") else line.shot
            if i + 1 < len(lines) and lines[i + 1].scene != line.scene:
                views[self.times >= line.end + FALL] = "card"
            last = line.end
        return [str(view) for view in views]


_PLACES = {
    "both": ((0, 0), (1, PANEL)),
    "one0": ((0, PANEL // 2),),
    "one1": ((1, PANEL // 2),),
    "empty": (),
    "card": (),
}


def encode(path: Path, scene: Scene, track: np.ndarray, fps: float) -> None:
    """Write picture and sound to an MP4 file; one thread, so that the same film is the same bytes."""
    rate = Fraction(fps).limit_denominator(1000)
    with av.open(str(path), "w", format="mp4", options={"fflags": "bitexact"}) as container:
        video = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "crf": QUALITY, "threads": "1", "g": "50"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        packets = _sound_packets(container, track)
        heard = [(float((packet.pts or 0) * (packet.time_base or 1)), packet) for packet in reversed(packets)]
        for number in range(len(scene) + 1):
            frame = None
            if number < len(scene):
                frame = av.VideoFrame.from_ndarray(scene.picture(number), format="yuv420p")
                frame.pts, frame.time_base = number, 1 / rate
            for packet in video.encode(frame):
                container.mux(packet)
            while heard and (frame is None or heard[-1][0] <= number / fps):
                container.mux(heard.pop()[1])


def encode_sound(path: Path, track: np.ndarray) -> None:
    """Write sound alone, coded as in a film."""
    with av.open(str(path), "w", format="mp4", options={"fflags": "bitexact"}) as container:
        for packet in _sound_packets(container, track):
            container.mux(packet)


def _sound_packets(container: OutputContainer, track: np.ndarray) -> list[av.Packet]:
    audio = container.add_stream("aac", rate=voice.RATE, layout="mono", options=SOUND)
    audio.bit_rate = SOUND_BITS
    whole = av.AudioFrame.from_ndarray(np.ascontiguousarray(track[None]), format="fltp", layout="mono")
    whole.sample_rate, whole.pts = voice.RATE, 0
    return [*audio.encode(whole), *audio.encode(None)]


def _stream(seed: int, cast: script.Cast, *numbers: int) -> np.random.Generator:
    return script.stream(seed, script.FILM, int(cast.split == "labelled"), cast.number, *numbers)


def _wave(rng: np.random.Generator, times: np.ndarray, rate: float) -> np.ndarray:
    """Give a smooth random movement between −1 and 1 of about `rate` turns per second."""
    parts = [np.sin(2 * np.pi * (rate * rng.uniform(0.6, 1.4) * k * times + rng.random())) / k for k in (1, 2, 3)]
    return (np.sum(parts, 0) / 1.83).astype(np.float32)


def _smooth(x: np.ndarray) -> np.ndarray:
    return x * x * (3 - 2 * x)


def _clock(seconds: float) -> str:
    whole = round(seconds * 1000)
    return f"{whole // 3_600_000:02d}:{whole // 60_000 % 60:02d}:{whole // 1000 % 60:02d},{whole % 1000:03d}"
