"""What ranks do in the tests of nodes that are not fit and of ranks that do not move."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from emoscale import distributed
from emoscale.config import EmoscaleError
from emoscale.training import health
from emoscale.training.outcome import tell_unfit
from emoscale.training.watchdog import Watchdog


def met(folder: str) -> None:
    """Check two nodes with one fault after another on the second; rank 0 writes what each raised on either rank."""
    world, seen = distributed.init(), {}
    os.environ["SLURMD_NODENAME"] = f"node{world.rank}"
    for fault in ("none", "software", "config", "clock", "device", "lost device", "sender", "receiver", "shared memory", "folder", "every node"):
        os.environ["EMOSCALE_OUTCOME"] = f"{folder}/{fault}.json"
        config = {"steps": 7 + (fault == "config" and world.rank)}
        message, status = "", 0
        with _fault(fault, world.rank == 1):
            try:
                health.check_nodes(Path(folder) / "run", config, 2, world)
            except EmoscaleError as error:
                message, status = str(error), error.status
                if isinstance(error, distributed.NodeError):
                    tell_unfit(error, Path(folder), world)
        seen[fault] = [json.loads(text) for text in distributed.gather_names([json.dumps([status, message])])]
    if world.is_main:
        (Path(folder) / "met.json").write_text(json.dumps(seen))


@contextmanager
def _fault(name: str, here: bool) -> Iterator[None]:
    """Break something on this rank for a while."""
    real = torch.Tensor.__matmul__
    usage = mock.Mock(free=1 << 20)

    def wrong(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return real(x, y) + (x.dtype == torch.bfloat16)

    def lost(*_: Any) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    def late() -> float:
        return clock() - 3600

    summed, clock = distributed.reduce_sum, time.time
    faults = {
        "software": mock.patch.object(health, "__version__", "0.0.9"),
        "clock": mock.patch.object(time, "time", late),
        "device": mock.patch.object(torch.Tensor, "__matmul__", wrong),
        "lost device": mock.patch.object(torch.Tensor, "__matmul__", lost),
        "sender": mock.patch.object(distributed, "reduce_sum", lambda values: summed([value * 1.01 for value in values])),
        "receiver": mock.patch.object(distributed, "reduce_sum", lambda values: [0.0, 9.0, *summed(values)[2:]]),
        "shared memory": mock.patch.object(health.shutil, "disk_usage", lambda path: usage if str(path) == "/dev/shm" else mock.Mock(free=1 << 40)),
        "folder": mock.patch.object(health.shutil, "disk_usage", lambda path: usage if str(path) != "/dev/shm" else mock.Mock(free=1 << 40)),
    }
    everywhere = {"every node": faults["device"]}
    chosen = everywhere.get(name) or (faults.get(name) if here else None)
    with mock.patch.object(health.shutil, "disk_usage", return_value=mock.Mock(free=1 << 40)), chosen or nullcontext():
        yield


def stand(folder: str, how: str, limit: float) -> None:
    """Do two steps together; then the last rank stands still, and the others wait for it."""
    world = distributed.World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    watchdog = Watchdog(Path(folder), world, limit)
    distributed.init()
    for step in (1, 2):
        distributed.barrier()
        watchdog.beat(step)
    if world.rank == world.size - 1:
        _stand(how, watchdog, limit)
    distributed.barrier()
    watchdog.close()
    time.sleep(limit + 1)  # nobody watches any more


def _stand(how: str, watchdog: Watchdog, limit: float) -> None:
    if how == "sleeping":
        time.sleep(600)
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "holding the interpreter":
        ctypes.PyDLL(None).sleep(600)
    if how == "slow save":
        with watchdog.saving():
            time.sleep(limit + 1)
