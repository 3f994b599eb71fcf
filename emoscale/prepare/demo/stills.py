"""Stills of people who are in no film, for the expression teacher."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from . import face, script, tables

SIDE = 96
CANVAS = 120
"""Pictures are drawn larger and cut, so that turned heads show no edge."""

LIGHTS = 3


def render(number: int, seed: int, folder: Path, per_class: int) -> None:
    """Write `<folder>/<class>/<identity>_<n>.png` of one person."""
    rng = script.stream(seed, script.STILL, number)
    person = face.identity(rng)
    drawn = [_person(rng, person) for _ in range(min(LIGHTS, per_class))]
    for name in tables.STILL_CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for take in range(per_class):
            picture = still(rng, drawn[take % len(drawn)], name)
            cv2.imwrite(str(folder / name / f"{number:03d}_{take}.png"), picture, [cv2.IMWRITE_PNG_COMPRESSION, 1])


def still(rng: np.random.Generator, drawn: face.Face, name: str) -> np.ndarray:
    """Give one picture, uint8 [96, 96, 3] BGR: another strength, head pose, lighting and, in every other one, a talking mouth."""
    moves = face.expression(name, rng.uniform(*tables.INTENSITY))
    moves[[0, 1, 4]] += rng.normal(0, 0.08, 3)
    moves[-1] += rng.uniform(0.05, 1.0) if rng.random() < 0.5 else 0.0
    image = drawn.base.copy()
    drawn.draw(image, drawn.shapes(moves[None]), 0)
    turn = cv2.getRotationMatrix2D(drawn.centre, rng.uniform(-7, 7), rng.uniform(0.92, 1.08))
    turn[:, 2] += rng.uniform(-4, 4, 2) - (CANVAS - SIDE) / 2
    image = cv2.warpAffine(image, turn, (SIDE, SIDE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.9))
    light = image * np.float32(rng.uniform(0.75, 1.2))
    light += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0.5, 3))
    return np.clip(light, 0, 255).astype(np.uint8)


def _person(rng: np.random.Generator, person: face.Identity) -> face.Face:
    top, bottom = rng.uniform(60, 180, (2, 3))
    down = np.linspace(0, 1, CANVAS)[:, None, None]
    backdrop = np.broadcast_to((1 - down) * top + down * bottom, (CANVAS, CANVAS, 3)).astype(np.uint8)
    return face.Face(person, backdrop, (CANVAS / 2, CANVAS / 2 + 2), rng.uniform(33, 38), rng.uniform(-1, 1))
