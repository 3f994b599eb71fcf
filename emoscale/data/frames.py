"""Frames on their way from a shard into a batch: converted and normalised once, at the place where they end up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emoscale.data.handover import empty


class Frames:
    """Stored frames [T, D] that count as normalised; they are converted where they are wanted.

    Reads like a float32 array as far as frames are counted, chosen, or taken as a whole (`numpy.asarray`).
    """

    def __init__(self, stored: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
        self.stored, self.mean, self.std = stored, mean, std

    @property
    def shape(self) -> tuple[int, ...]:
        """Give [T, D]."""
        return self.stored.shape

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, chosen: slice | np.ndarray) -> Frames:
        return Frames(self.stored[chosen], self.mean, self.std)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = np.empty(self.shape, np.float32)
        self.write(torch.from_numpy(found))
        return found if dtype is None else found.astype(dtype, copy=False)

    def write(self, place: Tensor) -> None:
        """Write the normalised frames to float32 [T, D]: (x − mean) / std.

        By torch: numpy 2.1 takes 243 µs to convert 64 × 768 from fp16, torch 14 µs, and the bits are the same.
        """
        if self.stored.flags.writeable:
            place.copy_(torch.from_numpy(self.stored))
        else:
            place.numpy()[:] = self.stored
        place.sub_(torch.from_numpy(self.mean)).div_(torch.from_numpy(self.std))


def laid(parts: Sequence[np.ndarray | Frames]) -> Tensor:
    """Lay the frames of at least one utterance behind one another: float32 [t, D]."""
    whole = empty(sum(map(len, parts)), *parts[0].shape[1:])
    at = 0
    for part in parts:
        place = whole[at : at + len(part)]
        if isinstance(part, Frames):
            part.write(place)
        else:
            place.numpy()[:] = part
        at += len(part)
    return whole


def finite(values: np.ndarray) -> bool:
    """Whether every value is finite; fp16 by its exponent bits, 12 times as fast as numpy's own (49,152 values: 10 µs)."""
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    return int(np.bitwise_and(values.view(np.uint16), EXPONENT).max(initial=0)) < EXPONENT


EXPONENT = 0x7C00
"""All ones in NaN and in the infinities alone."""
