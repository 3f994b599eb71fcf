"""What ranks do in the tests of faults: NaN, a skipped module, restored states; each function writes what it saw as JSON."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emoscale import distributed
from emoscale.config import EmoscaleError
from emoscale.data.loader import StepData, Steps
from emoscale.data.order import Order
from emoscale.models.task import Task
from emoscale.training import guards
from emoscale.training.build import Built
from emoscale.training.engine import Engine, OptimConfig, ZeroConfig
from emoscale.training.loop import Hooks, train
from emoscale.training.mirror import find_start
from tests.training.equality import GLOBAL_BATCH, LARGE, SEED, SMALL, built_for, close, corpora, relative, run

STAGES = (0, 1, 2, 3)
ADAM = OptimConfig(lr=1e-3)
State = tuple[dict[str, Tensor], dict[str, Tensor], int]


def nonfinite(path: str) -> None:
    """On every stage: NaN on the last rank at step 2 alone, then from step 4 on."""
    world, seen = distributed.init(), {}
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("emoscale").addHandler(handler)
    for stage in STAGES:
        lines.clear()
        rows: list[dict[str, Any]] = []
        states: dict[int, State] = {}
        poisoned: list[str] = []
        built = built_for(corpora()["all"])
        engine = Engine(built.model, ADAM, ZeroConfig(stage), "fp32")
        data = _poison(_steps(built, SMALL).iterate(0, 10), {2, 4, 5, 6}, poisoned if world.rank == world.size - 1 else None)
        hooks = Hooks(lambda step: ADAM.lr, rows.append, lambda step, engine=engine, states=states: states.update({step: engine.state()}), lambda: "")
        message = ""
        try:
            train(engine, data, list(built.model.tasks), hooks, first=0, last=10, log_every=1, save_every=1, max_nonfinite=3)
        except EmoscaleError as error:
            message = str(error)
        close(engine)
        seen[stage] = {
            "rows": rows,
            "message": message,
            "log": list(lines),
            "poisoned": distributed.gather_names(poisoned),
            "unchanged": _equal(states[2], states[3]),
            "changed_after": not _equal(states[3], states[4]),
        }
    _write(world, path, seen)


def spiked(path: str, cases: list[str]) -> None:
    """For each "stage precision": one step in which the last rank meets features that are a thousand times too large."""
    world, spike = distributed.init(), 6
    seen: dict[str, Any] = {"spike": spike}
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("emoscale").addHandler(handler)
    guards.LEAST = 5  # type: ignore[misc]
    for case in cases:
        lines.clear()
        rows: list[dict[str, Any]] = []
        states: dict[int, State] = {}
        stage, precision = case.split()
        built, engine = _engine(int(stage), precision)
        data = _enlarge(_steps(built, SMALL).iterate(0, spike + 2), spike, world.rank == world.size - 1)
        hooks = Hooks(lambda step: ADAM.lr, rows.append, lambda step, engine=engine, states=states: states.update({step: engine.state()}), lambda: "")
        train(
            engine, data, list(built.model.tasks), hooks, first=0, last=spike + 2, log_every=1, save_every=1, max_nonfinite=1,
            guards=guards.Guards(guards.SpikeConfig(action="skip")),
        )  # fmt: skip
        close(engine)
        seen[case] = {
            "rows": rows,
            "log": [line for line in lines if "gradient norm" in line],
            "unchanged": _equal(states[spike], states[spike + 1]),
            "changed_after": not _equal(states[spike + 1], states[spike + 2]),
        }
    _write(world, path, seen)


def slow_rank(path: str) -> None:
    """The last rank sleeps in each forward pass of its own, from step 2 on."""
    world, lines = distributed.init(), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("emoscale").addHandler(handler)
    rows: list[dict[str, Any]] = []
    built, engine = _engine(1, "fp32")
    step = 0

    def drag(*_: Any) -> None:
        if world.rank == world.size - 1 and step >= 2:
            time.sleep(0.4)

    def track(row: dict[str, Any]) -> None:
        nonlocal step
        rows.append(row)
        step = row["step"]

    built.model.register_forward_pre_hook(drag)
    hooks = Hooks(lambda step: ADAM.lr, track, lambda step: None, lambda: "")
    train(engine, _steps(built, LARGE).iterate(0, 14), list(built.model.tasks), hooks, first=0, last=14, log_every=1, save_every=100, max_nonfinite=1)
    close(engine)
    _write(world, path, {"rows": rows, "log": distributed.gather_names([line for line in lines if "slow" in line])})


def two_nodes(folder: str, url: str) -> None:
    """Each rank is a node with a run folder of its own: write which checkpoint it finds, or the error."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    world = distributed.init()
    try:
        found = find_start(Path(folder) / f"node{world.rank}", url, world)
        told = "none" if found is None else found.name
    except EmoscaleError as error:
        told = str(error)
    (Path(folder) / f"found{world.rank}").write_text(told)


def restored(path: str) -> None:
    """Go on from a state at its own stage and at the next one, and compare with going on without a stop."""
    world, seen = distributed.init(), {}
    for stage in STAGES:
        for precision in ("fp32", "bf16") if stage else ("fp32",):
            built, engine = _engine(stage, precision)
            steps = _steps(built, SMALL)
            _train(engine, built, steps, 0, 3)
            saved = engine.state()
            saved = ({k: v.clone() for k, v in saved[0].items()}, {k: v.clone() for k, v in saved[1].items()}, saved[2])
            _train(engine, built, steps, 3, 5)
            wanted = engine.state()
            close(engine)
            case: dict[str, Any] = {"steps": saved[2], "moments": len(saved[1])}
            for to in (stage, (stage + 1) % len(STAGES)):
                if precision == "bf16" and to == 0:
                    continue
                built, engine = _engine(to, precision)
                engine.load_state(*saved)
                same = _equal(saved, engine.state())
                _train(engine, built, steps, 3, 5)
                mine = engine.state()
                case[f"to {to}"] = {"loaded": same, "equal": _equal(wanted, mine), "relative": relative(_flat(mine[0]), _flat(wanted[0]))}
                close(engine)
            seen[f"{stage} {precision}"] = case
    _write(world, path, seen)


class Skipping(nn.Module):
    """A task that leaves its head out on the last rank, or on all."""

    over_all_ranks = False

    def __init__(self, task: Task, everywhere: bool) -> None:
        super().__init__()
        self.task, self.everywhere = task, everywhere

    def forward(self, hidden: Tensor, *rest: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the task where it is not left out."""
        if self.everywhere or torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            return hidden.sum() * 0.0, {}
        return self.task(hidden, *rest)


def guard(path: str) -> None:
    """On every stage: what happens when the last rank skips a head.

    In ZeRO-3 such a rank dies in DeepSpeed's own gather of the head, before there is a loss to look at; there, all skip it.
    """
    world, seen = distributed.init(), {}
    for stage in STAGES:
        built = built_for(corpora()["all"])
        head = built.model.tasks["masked_visual"]
        built.model.tasks["masked_visual"] = Skipping(head, everywhere=stage == 3)  # type: ignore[arg-type]
        engine = Engine(built.model, ADAM, ZeroConfig(stage), "fp32")
        message = ""
        try:
            _train(engine, built, _steps(built, LARGE), 0, 3)
        except EmoscaleError as error:
            message = str(error)
        close(engine)
        seen[stage] = distributed.gather_names([message])
    _write(world, path, seen)


class Branches(nn.Module):
    """Three encoders of the same size and a trunk; `always` runs an absent one on zeros."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always
        self.encoders = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(3))
        self.trunk = nn.Linear(32, 1)

    def forward(self, inputs: list[Tensor | None]) -> Tensor:
        """Give the loss; None = this rank has nothing of that modality."""
        total = torch.zeros(4, 32)
        for encoder, x in zip(self.encoders, inputs, strict=True):
            if x is not None:
                total = total + encoder(x)
            elif self.always:
                total = total + 0.0 * encoder(torch.zeros(4, 16))
        return self.trunk(total).square().mean()


def plain_deepspeed(path: str) -> None:
    """Without our engine: the gradient norm DeepSpeed gives when ranks skip different encoders, and the true one."""
    world = distributed.init()
    import deepspeed

    deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False, verbose=False)
    seen: dict[str, Any] = {}
    for stage in (1, 2):
        for always in (False, True):
            torch.manual_seed(SEED)
            model = Branches(always)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            zero = {"stage": stage, "overlap_comm": False}
            config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True, "gradient_clipping": 1e30}
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
            engine.backward(engine(_inputs(world.rank)))
            engine.step()
            seen[f"{stage} {'all' if always else 'skipped'}"] = float(engine.get_global_grad_norm())
            engine.destroy()
    torch.manual_seed(SEED)
    model = Branches(False)
    (sum(model(_inputs(rank)) for rank in range(world.size)) / world.size).backward()
    seen["true"] = float(nn.utils.clip_grad_norm_(model.parameters(), 1e30))
    _write(world, path, seen)


def alone(path: str) -> None:
    """On one rank: twenty steps to compare with stored losses, bf16, and recomputed activations."""
    world = distributed.init()
    corpus = corpora()["all"]
    golden, *_ = run(corpus, ADAM, 20, stage=0, max_tokens=LARGE, published=True)
    half, *_ = run(corpus, OptimConfig(lr=3e-3), 30, stage=1, max_tokens=LARGE, precision="bf16", published=True)
    seen: dict[str, Any] = {"golden": [row["loss"] for row in golden], "bf16": [row["loss"] for row in half]}
    for name, checkpointing in (("kept", False), ("recomputed", True)):
        torch.manual_seed(SEED)
        rows, _, after = run(corpus, ADAM, 3, stage=1, max_tokens=LARGE, dropout=0.1, activation_checkpointing=checkpointing)
        seen[name] = {"losses": [row["loss"] for row in rows], "weights": float(_flat(after).double().square().sum())}
    _write(world, path, seen)


def _inputs(rank: int) -> list[Tensor | None]:
    draw = torch.Generator().manual_seed(rank)
    inputs: list[Tensor | None] = [torch.randn(4, 16, generator=draw) for _ in range(3)]
    inputs[1 + rank % 2] = None
    return inputs


def _engine(stage: int, precision: Any) -> tuple[Built, Engine]:
    built = built_for(corpora()["all"])
    return built, Engine(built.model, ADAM, ZeroConfig(stage), precision)


def _steps(built: Built, max_tokens: int) -> Steps:
    corpus, rank, world = corpora()["all"], torch.distributed.get_rank(), torch.distributed.get_world_size()
    return Steps(corpus, Order(len(corpus), SEED), built.encoder, built.plan, global_batch=GLOBAL_BATCH, max_tokens=max_tokens, rank=rank, world=world)


def _train(engine: Engine, built: Built, steps: Steps, first: int, last: int) -> None:
    hooks = Hooks(lambda step: ADAM.lr, lambda row: None, lambda step: None, lambda: "")
    train(engine, steps.iterate(first, last), list(built.model.tasks), hooks, first=first, last=last, log_every=100, save_every=100, max_nonfinite=1)


def _poison(data: Iterator[StepData], at: set[int], names: list[str] | None) -> Iterator[StepData]:
    """Put a NaN into the last micro-batch of some steps, on the rank that keeps their names."""
    for step in data:
        if names is not None and step.step in at:
            step.batches[-1].acoustic[:] = float("nan")
            step.batches[-1].visual[:] = float("nan")
            names.extend(step.batches[-1].ids)
        yield step


def _enlarge(data: Iterator[StepData], at: int, here: bool) -> Iterator[StepData]:
    for step in data:
        if here and step.step == at:
            for batch in step.batches:
                batch.acoustic[:] *= 1e3
                batch.visual[:] *= 1e3
        yield step


def _equal(one: State, other: State) -> bool:
    pairs = [(one[part][name], other[part][name]) for part in (0, 1) for name in one[part]]  # type: ignore[index]
    return one[2] == other[2] and all(torch.equal(a, b) for a, b in pairs)


def _flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([values[name].flatten() for name in sorted(values)])


def _write(world: distributed.World, path: str, seen: dict[Any, Any]) -> None:
    if world.is_main:
        Path(path).write_text(json.dumps(seen, indent=1))
