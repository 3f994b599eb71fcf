"""Steps from workers: the same bytes, in memory that is used again when nobody holds it, and never before."""

from __future__ import annotations

import gc
import os
import shutil
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from emoscale.data import handover
from emoscale.data.handover import SLOTS, Lent, Slots, empty

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)


@dataclass
class Step:
    """Something with tensors in several places."""

    number: int
    frames: Tensor
    others: dict[str, Any] = field(default_factory=dict)


def made(number: int, rows: int = 50) -> Step:
    frames = empty(rows, 7)
    frames.numpy()[:] = np.random.default_rng(number).normal(size=(rows, 7))
    others: dict[str, Any] = {str(dtype): (torch.arange(11) * number).to(dtype) for dtype in DTYPES}
    others |= {"turned": torch.arange(12).reshape(3, 4).T, "none": torch.zeros(0, 5), "empty": empty(0, 3), "single": torch.tensor(number), "part": frames[3:9]}
    return Step(number, frames, others | {"name": f"step {number}", "list": [torch.ones(2), None]})


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return same(vars(one), vars(other)) if isinstance(one, Step) else one == other


class Steps(Dataset[Any]):
    """Makes steps; every fifth is large."""

    def __init__(self, slots: Slots, rows: int = 50) -> None:
        self.slots, self.rows = slots, rows

    def __getitem__(self, number: int) -> Any:
        return self.slots.hand_over(lambda: made(number, self.rows * (1 + 9 * (number % 5 == 4))))


def wanted(number: int, rows: int = 50) -> Step:
    return made(number, rows * (1 + 9 * (number % 5 == 4)))


def loader(slots: Slots, workers: int, count: int = 40) -> Any:
    return DataLoader(Steps(slots), batch_size=None, sampler=range(count), num_workers=workers)


def slots_for(workers: int) -> Slots:
    slots = Slots.for_workers(workers)
    assert slots is not None
    return slots


@pytest.mark.parametrize("workers", [1, 2])
def test_what_comes_out_is_what_was_made_and_the_memory_is_used_again(workers: int) -> None:
    slots, places = slots_for(workers), set()
    for number, item in enumerate(loader(slots, workers)):
        assert isinstance(item, Lent)
        step = item.open()
        assert same(step, wanted(number))
        assert step.others["part"].data_ptr() == step.frames[3:].data_ptr(), "a view comes without a copy"
        places.add(step.frames.data_ptr())
        del item, step
    assert len(places) <= SLOTS * workers
    assert not any(slots._taken[:])


def test_what_is_held_is_never_written_over() -> None:
    slots = slots_for(2)
    held = [item.open() if isinstance(item, Lent) else item for item in loader(slots, 2)]
    assert all(same(step, wanted(number)) for number, step in enumerate(held)), "where all slots are taken, steps come as tensors do"
    assert all(slots._taken[:])
    view = held[0].frames[2:4]
    frames = wanted(0).frames[2:4].clone()
    del held
    gc.collect()
    assert sum(slots._taken[:]) == 1, "a view holds its slot"
    del view
    assert not any(slots._taken[:])
    assert frames.shape == (2, 7)


def test_a_step_that_is_too_large_comes_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "SIZE", 1 << 13)
    slots, lent = slots_for(1), []
    for number, item in enumerate(loader(slots, 1, 10)):
        lent.append(isinstance(item, Lent))
        assert same(item.open() if isinstance(item, Lent) else item, wanted(number))
    assert lent == [number % 5 != 4 for number in range(10)]
    assert not any(slots._taken[:])


def test_a_step_that_is_too_large_is_made_once_and_holds_nothing_of_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "SIZE", 1 << 13)
    monkeypatch.setattr(handover, "get_worker_info", lambda: SimpleNamespace(id=0))
    slots, asked = slots_for(1), []

    def large() -> Any:
        asked.append(1)
        return [handover.empty(16, 4).fill_(7.0), torch.full((1 << 12,), 3.0)]

    step = slots.hand_over(large)
    assert not isinstance(step, Lent)
    assert len(asked) == 1
    assert not any(slots._taken[:])
    slots._memory[0][:] = bytes(1 << 13)
    assert torch.equal(step[0], torch.full((16, 4), 7.0))


def test_an_error_gives_the_slot_back() -> None:
    slots = slots_for(1)

    class Failing(Steps):
        def __getitem__(self, number: int) -> Any:
            try:
                return self.slots.hand_over(lambda: [][number])
            except IndexError:
                return "failed"

    assert list(DataLoader(Failing(slots), batch_size=None, sampler=range(20), num_workers=1)) == ["failed"] * 20
    assert not any(slots._taken[:])


def test_a_forked_process_gives_nothing_back() -> None:
    slots = slots_for(1)
    step = next(iter(loader(slots, 1, 1))).open()
    child = os.fork()
    if child == 0:
        del step
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert sum(slots._taken[:]) == 1
    del step
    assert not any(slots._taken[:])


def test_without_workers_nothing_is_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Slots.for_workers(0) is None
    assert same(slots_for(1).hand_over(lambda: made(3)), made(3))
    monkeypatch.setattr(handover.multiprocessing, "get_start_method", lambda: "spawn")
    assert Slots.for_workers(2) is None


def test_shared_memory_is_not_filled() -> None:
    """The slots are no files of /dev/shm, of which a container has 64 MB."""
    slots, size = slots_for(2), 64 << 20
    before = shutil.disk_usage("/dev/shm").free
    slots._memory[0][:size] = bytes(size)
    assert before - shutil.disk_usage("/dev/shm").free < size / 2
