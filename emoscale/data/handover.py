"""Steps on their way from a loader worker to the training process, through memory that is used again and again.

A DataLoader hands a tensor over in shared memory made for it. Its pages cost more than what is done to them: 27 ms for the 25 MB
of 100 utterances, where writing 25 MB to memory that is already there takes 2 ms. Here each worker has a few slots of memory that
it shares with its parent; a slot is taken for a step, and is free again when the parent has dropped every tensor of that step.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from emoscale.batch import changed

SLOTS, SIZE = 4, 1 << 29
"""Slots of a worker, and bytes of each, of which only those take memory that were written to. A worker is two steps ahead, and the
parent may hold two more; a step that finds no free slot, or too small a one, is handed over as any tensor is."""
ALIGNED = 64


class Slots:
    """The memory that the workers of one loader share with the process that starts them by a fork."""

    known: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()
    numbers = itertools.count()

    def __init__(self, workers: int) -> None:
        self._taken = mmap(-1, workers * SLOTS)
        self._memory = [mmap(-1, SIZE) for _ in range(workers * SLOTS)]
        self.number = next(Slots.numbers)
        Slots.known[self.number] = self

    @classmethod
    def for_workers(cls, workers: int) -> Slots | None:
        """Give slots; None where there are no workers, where they are not forked, or where the system grants no such memory."""
        if not workers or multiprocessing.get_start_method() != "fork":
            return None
        try:
            return cls(workers)
        except OSError:
            return None

    def hand_over(self, make: Callable[[], Any]) -> Any:
        """Give what `make` gives, in a worker as `Lent` where it fits."""
        info = get_worker_info()
        mine = range(info.id * SLOTS, (info.id + 1) * SLOTS) if info is not None else range(0)
        slot = next((slot for slot in mine if not self._taken[slot]), None)
        if slot is None:
            return make()
        self._taken[slot] = 1
        given = None
        try:
            given = self._filled(slot, make)
        finally:
            if not isinstance(given, Lent):
                self._taken[slot] = 0
        return given

    def _filled(self, slot: int, make: Callable[[], Any]) -> Any:
        arena = _Arena(self._memory[slot])
        _Arena.current = arena
        try:
            made = make()
        finally:
            _Arena.current = None
        try:
            step = changed(made, Tensor, arena.place)
        except _FullError:
            return changed(made, Tensor, lambda tensor: tensor.clone() if arena.holds(tensor) else tensor)
        return Lent(self.number, slot, arena.tensors, step)

    def open(self, lent: Lent) -> Any:
        """Give what was handed over; its tensors lie in the slot, which is free again when the last of them is gone."""
        count, gone, taken, slot, owner = lent.tensors, itertools.count(1), self._taken, lent.slot, os.getpid()

        def drop() -> None:
            # A process that is forked meanwhile has copies of these tensors, and its memory of this is not for it to give back.
            if os.getpid() == owner and next(gone) == count:
                taken[slot] = 0

        def tensor(place: _Place) -> Tensor:
            # torch keeps this array for as long as any view of the tensor lives.
            array = np.ndarray(place.shape, np.dtype(place.dtype), self._memory[slot], place.offset)
            weakref.finalize(array, drop).atexit = False
            return torch.from_numpy(array)

        if not count:
            taken[slot] = 0
        return changed(lent.step, _Place, tensor)


class Lent:
    """A step whose tensors lie in a slot, and have their places there instead of themselves."""

    def __init__(self, slots: int, slot: int, tensors: int, step: Any) -> None:
        self.slots, self.slot, self.tensors, self.step = slots, slot, tensors, step

    def open(self) -> Any:
        """Give the step itself."""
        return Slots.known[self.slots].open(self)

    def pin_memory(self) -> Any:
        """Give the step in page-locked memory (a DataLoader calls this); the slot is free again."""
        return self.open().pin_memory()


def empty(*shape: int) -> Tensor:
    """Give float32 memory to be filled: of the slot of the step that is made, where one is.

    Elsewhere numpy asks for huge pages, which a first touch of 50 MB takes 25 ms for, and of torch's memory 120 ms.
    """
    count = int(np.prod(shape))
    place = _Arena.current.take(4 * count) if _Arena.current is not None else None
    return torch.from_numpy((np.empty(count, np.float32) if place is None else place.view(np.float32)).reshape(shape))


class _FullError(Exception):
    """The slot is too small."""


class _Arena:
    """A slot that is being filled."""

    current: _Arena | None = None

    def __init__(self, memory: mmap) -> None:
        self.bytes, self.tensors = np.frombuffer(memory, np.uint8), 0
        self._first, self._used = self.bytes.ctypes.data, 0

    def take(self, size: int) -> np.ndarray | None:
        """Give the next bytes; None where there are too few."""
        first, end = self._used, self._used + size
        if end > len(self.bytes):
            return None
        self._used = -(-end // ALIGNED) * ALIGNED
        return self.bytes[first:end]

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor's values lie here."""
        return bool(tensor.numel()) and 0 <= tensor.data_ptr() - self._first < len(self.bytes)

    def place(self, tensor: Tensor) -> Tensor | _Place:
        """Give where in the slot a tensor lies, copied there if it does not; bfloat16, which numpy does not know, is handed over by itself."""
        if tensor.dtype is torch.bfloat16:
            return tensor
        self.tensors += 1
        offset = tensor.data_ptr() - self._first
        if not (self.holds(tensor) and tensor.is_contiguous()):
            array = tensor.contiguous().numpy()
            room = self.take(array.nbytes)
            if room is None:
                raise _FullError
            room.view(array.dtype)[:] = array.reshape(-1)
            offset = room.ctypes.data - self._first if array.nbytes else 0
        return _Place(offset, tensor.numpy().dtype.str, tuple(tensor.shape))


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in its slot."""

    offset: int
    dtype: str
    shape: tuple[int, ...]
