"""Frames that are normalised where they end up: the bits of numpy, whatever converts them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emoscale.data.frames import Frames, finite, laid

MEAN, STD = np.linspace(-2, 3, 7, dtype=np.float32), np.linspace(0.3, 9, 7, dtype=np.float32)


def stored(frames: int, seed: int = 0) -> np.ndarray:
    """Give frames of every size a half can hold: subnormal, large, negative, zero."""
    bits = np.random.default_rng(seed).integers(0, 1 << 16, (frames, 7), np.uint16)
    return np.where((bits & 0x7C00) == 0x7C00, bits & 0x83FF, bits).astype(np.uint16).view(np.float16)


def plain(frames: np.ndarray) -> np.ndarray:
    return (frames.astype(np.float32) - MEAN) / STD


@pytest.mark.parametrize("writeable", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("count", [0, 1, 3, 257])
def test_the_bits_are_numpys(count: int, dtype: type, writeable: bool) -> None:
    values = stored(count).astype(dtype)
    values.flags.writeable = writeable
    frames = Frames(values, MEAN, STD)
    assert (len(frames), frames.shape) == (count, (count, 7))
    found = np.asarray(frames)
    assert found.dtype == np.float32
    assert found.tobytes() == plain(values).tobytes()
    chosen = np.arange(count) % 3 == 1
    assert np.asarray(frames[chosen]).tobytes() == plain(values)[chosen].tobytes()
    assert np.asarray(frames[1:2]).tobytes() == plain(values)[1:2].tobytes()
    assert np.asarray(frames, dtype=np.float64).dtype == np.float64


def test_frames_and_arrays_are_laid_behind_one_another() -> None:
    parts = [stored(3, 1), stored(0, 2), stored(5, 3)]
    mixed = [Frames(parts[0], MEAN, STD), plain(parts[1]), Frames(parts[2], MEAN, STD)]
    found = laid(mixed)
    assert found.dtype == torch.float32
    assert found.numpy().tobytes() == np.concatenate([plain(part) for part in parts]).tobytes()
    assert laid([plain(stored(0))]).shape == (0, 7)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen(bad: float, dtype: type) -> None:
    values = stored(9).astype(dtype)
    assert finite(values)
    assert finite(values[:0])
    values[4, 3] = bad
    assert not finite(values)
    assert finite(values[:4])
