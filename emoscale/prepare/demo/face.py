"""Drawn faces: an identity gives a shaded base picture once; brows, eyes and mouth are polygons per frame.

Lengths are in half head heights around the centre of the face (x to the right, y down): one drawing serves film and stills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

SHIFT = 4
"""Fractional bits of polygon corners: whole pixels would make small movements jump."""

DIMENSIONS = ("lift", "slant", "eye", "squint", "corner", "stretch", "jaw", "press", "fold", "furrow", "speech")
"""What moves: brows up, inner brow ends down, lids open, lower lids up, mouth corners up, mouth wide, mouth open, lips thin,
cheek folds, frown lines; last, the opening of the mouth by speech (0 closed, 1 wide)."""

EXPRESSIONS: dict[str, tuple[float, ...]] = {
    "neutral": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "happy": (0.15, -0.1, -0.1, 0.7, 1.0, 0.6, 0.25, 0.0, 1.0, 0.0, 0.0),
    "surprise": (1.0, -0.2, 0.9, -0.3, 0.0, -0.5, 0.9, 0.0, 0.0, 0.0, 0.0),
    "sad": (0.2, -1.0, -0.45, 0.0, -0.9, -0.2, 0.0, 0.1, 0.15, 0.2, 0.0),
    "anger": (-0.6, 1.0, 0.15, 0.5, -0.45, -0.35, 0.05, 0.9, 0.25, 1.0, 0.0),
}
"""Full-strength expressions, in the order of `DIMENSIONS`."""

SKINS = ((196, 214, 244), (176, 200, 236), (150, 184, 226), (128, 164, 212), (110, 146, 196), (94, 126, 176))
HAIRS = ((24, 22, 26), (30, 40, 58), (36, 62, 98), (70, 120, 170), (110, 160, 196), (140, 142, 146), (30, 50, 130))
IRISES = ((60, 46, 34), (40, 64, 92), (110, 80, 50), (70, 86, 60))
SUPERSAMPLE = 2


@dataclass(frozen=True)
class Identity:
    """The lasting looks of one person; lengths in half head heights, colours BGR."""

    width: float
    jaw: float
    skin: tuple[int, int, int]
    hair: tuple[int, int, int]
    iris: tuple[int, int, int]
    hairline: float
    hair_length: float
    parting: float
    eye_gap: float
    eye_size: float
    eye_line: float
    brow_thickness: float
    brow_gap: float
    brow_slant: float
    nose_length: float
    nose_width: float
    mouth_line: float
    mouth_width: float
    mouth_corner: float
    lip: float
    stubble: float
    shirt: tuple[int, int, int]


def identity(rng: np.random.Generator) -> Identity:
    """Draw a person."""
    skin = np.clip(np.array(SKINS[rng.integers(len(SKINS))]) + rng.uniform(-10, 10, 3), 50, 250)
    hair = np.clip(np.array(HAIRS[rng.integers(len(HAIRS))]) + rng.uniform(-12, 12, 3), 8, 0.85 * skin)
    return Identity(
        width=rng.uniform(0.70, 0.84),
        jaw=rng.uniform(0.58, 0.88),
        skin=colour(skin),
        hair=colour(hair),
        iris=IRISES[rng.integers(len(IRISES))],
        hairline=rng.uniform(-0.74, -0.58),
        hair_length=float(rng.choice([0.0, 0.1, 0.5, 1.1])),
        parting=rng.uniform(-0.4, 0.4),
        eye_gap=rng.uniform(0.31, 0.37),
        eye_size=rng.uniform(0.138, 0.168),
        eye_line=rng.uniform(-0.115, -0.05),
        brow_thickness=rng.uniform(0.045, 0.095),
        brow_gap=rng.uniform(0.17, 0.215),
        brow_slant=rng.uniform(-0.35, 0.35),
        nose_length=rng.uniform(0.34, 0.44),
        nose_width=rng.uniform(0.13, 0.19),
        mouth_line=rng.uniform(0.55, 0.62),
        mouth_width=rng.uniform(0.24, 0.31),
        mouth_corner=rng.uniform(-0.35, 0.35),
        lip=rng.uniform(0.045, 0.08),
        stubble=float(rng.choice([0.0, 0.0, 0.0, 0.12, 0.2])),
        shirt=colour(rng.uniform(40, 200, 3)),
    )


def expression(name: str, strength: float = 1.0) -> np.ndarray:
    """Give an expression of a strength between 0 and 1 as float32 [11], in the order of `DIMENSIONS`."""
    return np.float32(strength) * np.array(EXPRESSIONS[name], np.float32)


def colour(values: Sequence[float] | np.ndarray) -> tuple[int, int, int]:
    """Round and clip a BGR colour to what OpenCV takes."""
    blue, green, red = (int(v) for v in np.clip(np.rint(values), 0, 255))
    return blue, green, red


class Face:
    """One person at one place of a picture."""

    def __init__(self, person: Identity, backdrop: np.ndarray, centre: tuple[float, float], size: float, light: float = 0.0) -> None:
        """Paint what does not move.

        Args:
            person: who.
            backdrop: uint8 [height, width, 3] BGR, not changed.
            centre: pixel (x, y) of the middle of the face.
            size: half the head's height in pixels.
            light: side the light comes from, −1 (left) to 1.
        """
        self.person, self.centre, self.size = person, centre, size
        self.base = _base(person, backdrop, centre, size, light)
        skin, hair = np.array(person.skin, np.float32), np.array(person.hair, np.float32)
        self._brow, self._line = colour(np.minimum(hair * 0.6, skin * 0.5)), colour(skin * 0.6)
        self._white, self._lips = colour(np.full(3, 150.0) + skin * 0.28), colour(skin * np.array([0.70, 0.64, 0.92]))
        self._thick = 1 if size < 50 else 2

    def shapes(self, moves: np.ndarray) -> dict[str, np.ndarray]:
        """Give the corners of brows, eyes and mouth of n frames.

        Args:
            moves: float32 [n, 11], in the order of `DIMENSIONS`.

        Returns:
            int32 [n, polygons, corners, 2] each, in 1/16 pixel; `strength` holds float32 [n, 3]: mouth opening, fold, furrow.
        """
        m = {name: moves[:, i : i + 1].astype(np.float32) for i, name in enumerate(DIMENSIONS)}
        found = _eyes(self.person, m) | _mouth(self.person, m) | _lines(self.person, m)
        scale, offset = np.float32(self.size * (1 << SHIFT)), np.array(self.centre, np.float32) * np.float32(1 << SHIFT)
        pixels = {name: np.rint(np.stack(parts, 1) * scale + offset).astype(np.int32) for name, parts in found.items()}
        return pixels | {"strength": np.concatenate([opening(m["jaw"], m["speech"]), m["fold"], m["furrow"]], 1)}

    def draw(self, image: np.ndarray, shapes: dict[str, np.ndarray], frame: int) -> None:
        """Put one frame's brows, eyes and mouth onto a copy of the base picture, in place."""
        gap, fold, furrow = shapes["strength"][frame]
        skin = np.array(self.person.skin, np.float32)
        if fold > 0.12:
            _lines_of(image, shapes["fold"][frame], colour(skin * (0.76 - 0.26 * min(fold, 1.0))), 1)
        if furrow > 0.12:
            _lines_of(image, shapes["furrow"][frame], colour(skin * (0.76 - 0.3 * min(furrow, 1.0))), 1)
        _fill(image, shapes["white"][frame], self._white)
        _fill(image, shapes["iris"][frame], self.person.iris)
        _lines_of(image, shapes["lid"][frame], (26, 24, 30), self._thick)
        _fill(image, shapes["brow"][frame], self._brow)
        _fill(image, shapes["lips"][frame], self._lips)
        if gap > 0.05:
            _fill(image, shapes["inside"][frame], (26, 16, 42))
            if gap > 0.22:
                _fill(image, shapes["teeth"][frame], (176, 184, 190))
        else:
            _lines_of(image, shapes["seam"][frame], colour(skin * 0.36), 1)


def opening(jaw: np.ndarray, speech: np.ndarray) -> np.ndarray:
    """Give how far the mouth is open (0 closed) from the expression's part and the speech's part."""
    return np.maximum(jaw, 0) * np.float32(0.6) + np.maximum(speech, 0) * np.float32(0.75)


def _fill(image: np.ndarray, polygons: np.ndarray, paint: tuple[int, int, int]) -> None:
    cv2.fillPoly(image, list(polygons), paint, cv2.LINE_AA, SHIFT)


def _lines_of(image: np.ndarray, lines: np.ndarray, paint: tuple[int, int, int], thickness: int) -> None:
    cv2.polylines(image, list(lines), False, paint, thickness, cv2.LINE_AA, SHIFT)


def _points(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.stack(np.broadcast_arrays(x, y), -1).astype(np.float32)


def _eyes(person: Identity, m: dict[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {"white": [], "iris": [], "lid": [], "brow": []}
    t = np.linspace(-1, 1, 7, dtype=np.float32)[None]
    half = person.eye_size
    up = half * 0.58 * np.clip(1 + 0.75 * m["eye"], 0.06, 1.7)
    down = half * 0.42 * np.clip(1 - 0.75 * m["squint"], 0.2, 1.3) * np.clip(1 + m["eye"], 0.1, 1)
    turn = np.linspace(0, 2 * np.pi, 10, endpoint=False, dtype=np.float32)[None]
    along = np.linspace(0, 1, 5, dtype=np.float32)[None]
    for side in (-1.0, 1.0):
        x = side * person.eye_gap
        top, low = person.eye_line - up * (1 - t * t), person.eye_line + down * (1 - t * t)
        found["white"].append(np.concatenate([_points(x + half * t, top), _points(x + half * t[:, ::-1], low[:, ::-1])], 1))
        found["lid"].append(_points(x + half * 1.08 * t, top))
        ix = 0.5 * half * np.cos(turn)
        bend = 1 - (ix / half) ** 2
        iy = np.clip(0.5 * half * np.sin(turn) - 0.1 * half, -up * bend, down * bend)
        found["iris"].append(_points(x + ix, person.eye_line + iy))
        slant = person.brow_slant * 0.4 + m["slant"]
        inner = person.eye_gap - 0.17 - 0.035 * np.maximum(m["furrow"], 0)
        bx = side * (inner + 0.35 * along)
        by = person.eye_line - person.brow_gap - 0.10 * m["lift"] + 0.10 * slant * (1 - 1.45 * along) - 0.05 * np.sin(np.pi * along)
        thick = person.brow_thickness * (1 - 0.62 * along)
        found["brow"].append(np.concatenate([_points(bx, by - thick / 2), _points(bx[:, ::-1], (by + thick / 2)[:, ::-1])], 1))
    return found


def _mouth(person: Identity, m: dict[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    t = np.linspace(-1, 1, 9, dtype=np.float32)[None]
    bow = 1 - t * t
    gap = opening(m["jaw"], m["speech"]) * np.float32(0.38)
    half = person.mouth_width * (1 + 0.32 * m["stretch"]) * (1 - 0.3 * gap)
    lift = 0.13 * (m["corner"] + person.mouth_corner)
    x = half * t
    middle = person.mouth_line + lift * (0.35 - t * t)
    lip = person.lip * np.clip(1 - 0.65 * m["press"], 0.2, 1.2)
    dip = 1 - 0.25 * np.exp(-((t / 0.18) ** 2))  # the notch of the upper lip
    upper, lower = middle - 0.3 * gap * bow, middle + 0.7 * gap * bow
    outer = np.concatenate([_points(x, upper - lip * dip * bow**0.7), _points(x[:, ::-1], (lower + 1.25 * lip * bow**0.6)[:, ::-1])], 1)
    inside = np.concatenate([_points(0.94 * x, upper), _points(0.94 * x[:, ::-1], lower[:, ::-1])], 1)
    bite = upper + np.clip(0.5 * gap - 0.03, 0, 0.05) * bow  # teeth show only in a mouth that is well open
    teeth = np.concatenate([_points(0.85 * x, upper), _points(0.85 * x[:, ::-1], bite[:, ::-1])], 1)
    return {"lips": [outer], "inside": [inside], "teeth": [teeth], "seam": [_points(x, middle)]}


def _lines(person: Identity, m: dict[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    s = np.linspace(0, 1, 4, dtype=np.float32)[None]
    fold, furrow = [], []
    end = person.mouth_width * (1 + 0.32 * m["stretch"]) + 0.07
    for side in (-1.0, 1.0):
        start = person.nose_width + 0.03
        fold.append(_points(side * (start + (end - start) * s**0.7), person.eye_line + person.nose_length * 0.85 + 0.34 * s))
        furrow.append(_points(side * (0.05 + 0.015 * s) + 0 * m["fold"], person.eye_line - 0.02 - 0.17 * s))
    return {"fold": fold, "furrow": furrow}


def _base(person: Identity, backdrop: np.ndarray, centre: tuple[float, float], size: float, light: float) -> np.ndarray:
    height, width = backdrop.shape[:2]
    wide, tall = width * SUPERSAMPLE, height * SUPERSAMPLE
    image = cv2.resize(backdrop, (wide, tall), interpolation=cv2.INTER_LINEAR).astype(np.float32)
    x = (((np.arange(wide, dtype=np.float32) + 0.5) / SUPERSAMPLE - centre[0]) / size)[None]
    y = (((np.arange(tall, dtype=np.float32) + 0.5) / SUPERSAMPLE - centre[1]) / size)[:, None]
    edge = size * SUPERSAMPLE / 2

    def paint(distance: np.ndarray, shade: np.ndarray | tuple[int, ...], where: np.ndarray | float = 1.0) -> None:
        mask = np.clip((1 - distance) * edge + 0.5, 0, 1) * where
        rows = np.flatnonzero(mask.any(1))
        span = slice(rows[0], rows[-1] + 1) if rows.size else slice(0, 0)
        shade = np.asarray(shade, np.float32)
        image[span] += mask[span, :, None] * ((shade[span] if shade.ndim == 3 else shade) - image[span])

    skin, hair, w = np.array(person.skin, np.float32), np.array(person.hair, np.float32), person.width
    if person.hair_length > 0:
        paint(
            np.hypot(x / (w + 0.2), np.where(y > -0.25, (y + 0.25) / (0.5 + person.hair_length), (y + 0.25) / 0.92)),
            hair * 0.8,
        )
    paint(np.hypot(x / 1.45, (y - 2.05) / 0.98), person.shirt)
    paint(np.maximum(np.abs(x) / 0.36, np.abs(y - 0.95) / 0.4), skin * 0.66)
    for side in (-1, 1):
        paint(np.hypot((x - side * (w + 0.02)) / 0.11, (y - 0.04) / 0.2), skin * 0.78)
    crown = np.hypot(x / (w + 0.11), (y + 0.2) / 0.93)
    paint(crown, hair, np.clip((-0.1 - y) / 0.1, 0, 1))
    chin = 1 - (1 - person.jaw) * np.clip(y, 0, 1) ** 2
    radius = (np.abs(x / (w * chin)) ** 2.3 + np.abs(y) ** 2.3) ** (1 / 2.3)
    paint(radius, skin * _shading(person, x, y, radius, light)[..., None])
    line = person.hairline + 0.35 * (x - person.parting) ** 2
    paint(crown, hair * 1.08, np.clip((line - y) / 0.05 + 0.5, 0, 1))
    return cv2.resize(np.clip(image, 0, 255).astype(np.uint8), (width, height), interpolation=cv2.INTER_AREA)


def _shading(person: Identity, x: np.ndarray, y: np.ndarray, radius: np.ndarray, light: float) -> np.ndarray:
    def spot(px: float, py: float, sx: float, sy: float) -> np.ndarray:
        return np.exp(-(((x - px) / sx) ** 2)) * np.exp(-(((y - py) / sy) ** 2))

    eye, tip = person.eye_line, person.eye_line + person.nose_length
    shade = 0.95 - 0.30 * np.clip(radius, 0, 1) ** 3 + 0.16 * light * x
    for side in (-1, 1):
        shade -= 0.46 * spot(side * person.eye_gap, eye - 0.05, 0.23, 0.15)
        shade -= 0.14 * spot(side * (person.nose_width + 0.01), tip - 0.04, 0.05, 0.09)
        shade -= 0.42 * spot(side * person.nose_width * 0.5, tip + 0.05, 0.05, 0.03)
        shade -= 0.09 * spot(side * 0.12, eye + 0.08, 0.05, 0.16)
        shade += 0.14 * spot(side * (person.eye_gap + 0.03), eye + 0.32, 0.2, 0.14)
    shade += 0.18 * spot(0, eye + 0.08, 0.07, 0.3) + 0.08 * spot(0, tip - 0.02, 0.08, 0.07)
    shade -= 0.16 * spot(0, tip + 0.1, 0.15, 0.05) + 0.18 * spot(0, person.mouth_line + 0.2, 0.16, 0.06)
    shade += 0.08 * spot(0, -0.5, 0.4, 0.2)
    return shade - person.stubble * np.clip((y - 0.35) / 0.15, 0, 1)
