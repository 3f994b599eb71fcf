"""The ranks of `emoscale bench scale check=true`: collectives alone, compute alone, then real training steps at every ZeRO stage.

Started as `python -m emoscale.training.scale_rank TASK.json`; what it has imported serves all ranks, which it forks. Rank 0 writes the result.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from emoscale import distributed
from emoscale.data.loader import StepData
from emoscale.training import links
from emoscale.training.backend import preload
from emoscale.training.engine import Engine, OptimConfig, ZeroConfig
from emoscale.training.loop import Hooks, train
from emoscale.training.step_model import MIX, BenchConfig, synthetic_batch, task_model

COUNTERS = Path("/proc/self/net/dev")
SENT = 8
"""Column of the bytes sent."""
COLLECTIVES = {"all_reduce": "all_reduce", "all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}
Size = Literal["tiny", "small", "base", "large"]
SMALL = 1024
"""Bytes up to which a collective is one of the loop's own, whose payload does not count."""
WARM = 2
"""Steps before the timed ones: ZeRO-3 records the order of its modules in the first and prefetches by it from then on."""
PORT = 29511
IDLE = 0.3
"""Seconds of silence before a collective alone is timed: so long a connection rests in training too, and starts slowly again."""


class Calls:
    """Counts the collectives that the ranks issue, with their payloads: bytes before (reductions) or after (gathers) each."""

    def __init__(self) -> None:
        self.bytes = dict.fromkeys(COLLECTIVES.values(), 0)
        self.count = dict.fromkeys(COLLECTIVES.values(), 0)
        for name, kind in COLLECTIVES.items():
            setattr(dist, name, self._counted(getattr(dist, name), kind))

    def _counted(self, call: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            given = [value for value in (*args, *named.values()) if isinstance(value, torch.Tensor)]
            size = max(value.numel() * value.element_size() for value in given)
            if size > SMALL:
                self.bytes[kind] += size
                self.count[kind] += 1
            return call(*args, **named)

        return counted

    def take(self) -> dict[str, dict[str, int]]:
        """Give what has been counted since the last call."""
        taken = {"bytes": dict(self.bytes), "count": dict(self.count)}
        for counts in (self.bytes, self.count):
            counts.update(dict.fromkeys(counts, 0))
        return taken


def wire() -> int:
    """Give the bytes that have left this rank's interface; none without one."""
    found = {name.strip(): row.split() for name, _, row in (line.partition(":") for line in COUNTERS.read_text().splitlines())}
    return int(found["eth0"][SENT]) if "eth0" in found else 0


def timed(call: Callable[[], Any]) -> float:
    """Give the seconds of the slowest rank, all ranks starting together."""
    distributed.barrier()
    start = time.perf_counter()
    call()
    return distributed.reduce_max([time.perf_counter() - start])[0]


def collectives(sizes: list[int], repeats: int) -> list[dict[str, Any]]:
    """Time each collective alone; sizes are bytes of the whole tensor."""
    ranks, rows = dist.get_world_size(), []
    for size in sizes if ranks > 1 else ():
        whole = torch.ones(size // 4 // ranks * ranks)
        part = torch.ones(whole.numel() // ranks)
        calls: dict[str, Callable[[], Any]] = {
            "all_reduce": lambda whole=whole: dist.all_reduce(whole),
            "all_gather": lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part),
            "reduce_scatter": lambda whole=whole, part=part: dist.reduce_scatter_tensor(part, whole),
        }
        for kind, call in calls.items():
            call()
            times = []
            for _ in range(repeats):
                time.sleep(IDLE)
                times.append(timed(call))
            rows.append({"kind": kind, "bytes": whole.numel() * 4, "seconds": times})
    return rows


def storages() -> dict[int, int]:
    """Give the bytes of every live tensor's storage by its address."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (item, item.grad if item.is_leaf else None):
                if tensor is not None and tensor.untyped_storage().nbytes():
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


class Stage:
    """Training steps at one ZeRO stage on the same micro-batch again and again, in the product's own loop.

    Args:
        task: see `scale_check.Setup`.
        stage: `0` … `3`, or `3 freed` where few parameters are kept.
        precision, size, utterances: as in `Engine` and `BenchConfig`.
    """

    def __init__(self, task: dict[str, Any], stage: str, precision: str, size: Size, utterances: int) -> None:
        config = BenchConfig(size=size, utterances=utterances)
        self.batch, self.rows, self.held = synthetic_batch(config), [], 0
        self.before = storages()
        model = task_model(config)
        zero = ZeroConfig(stage=int(stage[0]), bucket=task["bucket"], live=task["live"] if stage.endswith("freed") else ZeroConfig.live)
        self.engine = Engine(model, OptimConfig(), zero, precision)  # type: ignore[arg-type]  # of a Literal
        del model
        self.hooks = Hooks(learning_rate=lambda step: 1e-4, track=self.rows.append, save=lambda step: None, stop=lambda: "")
        self.done = 0

    def run(self, steps: int) -> list[float]:
        """Train some steps; give the seconds of the slowest rank for each."""
        self.rows.clear()
        last = self.done + steps
        train(self.engine, self._data(), list(MIX), self.hooks, first=self.done, last=last, log_every=1, save_every=10**9, max_nonfinite=1)
        self.done = last
        return [row["step_time_s"] for row in self.rows]

    def weigh(self) -> int:
        """Give the bytes of all tensors that training holds between backward and the optimizer's step."""
        step, weighed = self.engine.step, []

        def weighing(*args: Any) -> Any:
            weighed.append(sum(size for place, size in storages().items() if place not in self.before))
            return step(*args)

        self.engine.step = weighing  # type: ignore[method-assign]  # for one step
        self.run(1)
        self.engine.step = step  # type: ignore[method-assign]
        return weighed[0]

    def close(self) -> None:
        """Free everything."""
        self.engine.close()
        del self.engine
        gc.collect()

    def _data(self) -> Iterator[StepData]:
        step = self.done
        while True:
            yield StepData(step, [self.batch], [])
            step += 1


class Compute:
    """Forward and backward alone, with neither DeepSpeed nor communication, on all ranks at once."""

    def __init__(self, size: Size, utterances: int) -> None:
        config = BenchConfig(size=size, utterances=utterances)
        self.model, self.batch = task_model(config), synthetic_batch(config)
        self.scales = {name: 1.0 / max(1, self.batch.targets[name].count) for name in MIX}

    def forward(self) -> torch.Tensor:
        """Run the model."""
        return self.model(self.batch, self.scales)[0]

    def times(self) -> list[float]:
        """Give the seconds of forward, and of both, of the slowest rank."""
        self.model.zero_grad(set_to_none=True)
        halves: list[float] = []

        def both() -> None:
            start = time.perf_counter()
            loss = self.forward()
            halves.append(time.perf_counter() - start)
            loss.backward()

        whole = timed(both)
        return [distributed.reduce_max(halves)[0], whole]


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Do all that a task lists; see `scale_check` for what it holds."""
    calls = Calls()
    shape = task["size"], task["utterances"]
    result: dict[str, Any] = {"ranks": dist.get_world_size(), "collectives": collectives(task["sizes"], task["repeats"]), "stages": {}, "held": []}
    probe = Compute(*shape)
    probe.times()
    for stage in task["stages"]:
        run = Stage(task, stage, "fp32", *shape)
        run.run(WARM)
        calls.take()
        steps, compute, moved = [], [], 0
        for _ in range(task["steps"]):
            before = wire()
            steps += run.run(1)
            distributed.barrier()
            moved += wire() - before
            compute.append(probe.times())
        counted = calls.take()
        most = distributed.reduce_max([float(moved)])[0]
        result["stages"][stage] = {"steps": steps, "compute": compute, "wire": most / task["steps"], "payload": counted}
        run.close()
    del probe
    for precision in task["precisions"]:
        for stage in task["stages"]:
            if precision == "bf16" and stage == "0":
                continue  # its fp32 master weights come with ZeRO: see `RunConfig.validate`
            run = Stage(task, stage, precision, task["held_size"], 2)
            run.run(1)
            result["held"].append({"precision": precision, "stage": stage, "bytes": int(distributed.reduce_max([float(run.weigh())])[0])})
            run.close()
    return result


def rank(task: dict[str, Any], number: int) -> None:
    """Be one rank: enter its host, measure, and let rank 0 write what was found."""
    place = {"RANK": number, "WORLD_SIZE": len(task["hosts"]), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": PORT}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": task["master"], "GLOO_SOCKET_IFNAME": "eth0"})
    links.enter(task["hosts"][number])
    torch.set_num_threads(1)
    world = distributed.init()
    result = measure(task)
    if world.is_main:
        Path(task["result"]).write_text(json.dumps(result), encoding="utf-8")
    distributed.barrier()
    distributed.shutdown()


def main() -> None:
    """Fork the ranks; where one fails, the others wait for it in vain and are ended."""
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    preload()
    forked = [multiprocessing.get_context("fork").Process(target=rank, args=(task, number)) for number in range(len(task["hosts"]))]
    for process in forked:
        process.start()
    while any(process.is_alive() for process in forked) and not any(process.exitcode for process in forked):
        time.sleep(0.1)
    failed = next((number for number, process in enumerate(forked) if process.exitcode), None)
    for process in forked:
        process.kill()
    if failed is not None:
        sys.exit(f"rank {failed} ended with {forked[failed].exitcode}")


if __name__ == "__main__":
    main()
