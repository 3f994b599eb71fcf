"""The model of `scale` against real ranks: DeepSpeed over gloo, a process per rank, each in a network namespace behind a link of known speed.

What is calibrated: α and β of each collective alone on these links; from one rank, what DeepSpeed and the optimizer add to forward and
backward. Forward and backward themselves are measured on all ranks at once, between the timed steps, since ranks share the cores.
What is predicted from that: the time of a training step, the bytes that pass the interface, the payload of each collective, and the
bytes of all tensors that training holds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emoscale.config import EmoscaleError
from emoscale.data.synthetic import WORDS
from emoscale.models.config import SIZES
from emoscale.training import scale
from emoscale.training.links import Links
from emoscale.training.scale import Link, Machine, Model, Plan, Workload

MEDIAN_LIMIT, CELL_LIMIT, WIRE_LIMIT, MEMORY_LIMIT = 0.15, 0.30, 0.10, 0.02
"""Relative errors up to which the check passes: of step times, median and each; of bytes sent; of bytes held."""
TIMED, HELD = "small", "tiny"
"""Sizes whose steps are timed, and whose tensors are counted in fp32 and bf16."""
BUCKET = 1_000_000
"""Elements: small enough that the timed model is reduced in several buckets."""
LIVE = 2_000_000
"""`zero.live` where parameters are let go: half of the timed model."""
UTTERANCES = 4
"""Of the timed micro-batch."""
PATIENCE = 3600.0
"""Seconds that the ranks of one run may take."""


@dataclass(frozen=True)
class Setup:
    """One run of ranks."""

    ranks: int
    mbit: float
    steps: int
    stages: tuple[str, ...] = ("0", "1", "2", "3", "3 freed")
    """ZeRO stages; `3 freed` keeps few parameters (`LIVE`)."""
    precisions: tuple[str, ...] = ("fp32", "bf16")

    def task(self, result: Path) -> dict[str, Any]:
        """Give what `scale_rank` reads."""
        return {
            "size": TIMED,
            "held_size": HELD,
            "utterances": UTTERANCES,
            "bucket": BUCKET,
            "live": LIVE,
            "stages": list(self.stages),
            "steps": self.steps,
            "sizes": [2**16, 2**20, 2**22, 2**24],
            "repeats": 5,
            "precisions": list(self.precisions),
            "result": str(result),
        }


def check(mbit: list[float], ranks: list[int], steps: int) -> dict[str, Any]:
    """Measure every link speed and number of ranks, and compare.

    Raises:
        EmoscaleError: no namespaces here, or a rank failed.
    """
    alone = measure(Setup(1, mbit[0], steps))
    runs = [[measure(Setup(count, speed, steps, precisions=("fp32", "bf16") if speed == mbit[0] else ())) for count in ranks[1:]] for speed in mbit]
    return compare(alone, dict(zip(map(str, mbit), runs, strict=True)))


def measure(setup: Setup) -> dict[str, Any]:
    """Run one world of ranks; give what rank 0 wrote."""
    with tempfile.TemporaryDirectory(prefix="emoscale-scale-") as folder, Links(setup.ranks, setup.mbit) as links:
        result, task = Path(folder) / "result.json", Path(folder) / "task.json"
        task.write_text(json.dumps(setup.task(result) | {"hosts": links.hosts, "master": links.addresses[0]}), encoding="utf-8")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-m", "emoscale.training.scale_rank", str(task)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
        if done.returncode or not result.is_file():
            tail = " | ".join(done.stderr.strip().splitlines()[-3:])
            raise EmoscaleError(f"scale check: {setup.ranks} ranks ended with {done.returncode}: {tail}")
        return json.loads(result.read_text(encoding="utf-8"))


def compare(alone: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Calibrate, predict, and put what was measured beside it.

    Args:
        alone: what one rank measured.
        runs: Mbit/s of the links → what each number of ranks measured.
    """
    cells = [_cell(alone, alone, stage, {}, "-") for stage in alone["stages"]]
    fitted: dict[str, Any] = {}
    for mbit, worlds in runs.items():
        links = fit(worlds)
        fitted[mbit] = {kind: {"latency_s": link.latency, "bytes_per_s": link.bandwidth} for kind, link in links.items()}
        cells += [_cell(alone, world, stage, links, mbit) for world in worlds for stage in world["stages"]]
    held = [row for world in (alone, *next(iter(runs.values()), [])) for row in _held(world)]
    return {"links": fitted, "cells": cells, "held": held, "summary": summary(cells, held)}


def fit(worlds: list[dict[str, Any]]) -> dict[scale.Kind, Link]:
    """Fit α and β of each collective to its times alone, over all sizes and worlds at once, by relative least squares."""
    links: dict[scale.Kind, Link] = {}
    for kind in ("all_reduce", "all_gather", "reduce_scatter"):
        rows = []
        for world in worlds:
            for row in (row for row in world["collectives"] if row["kind"] == kind):
                steps, sent = scale.ring("all_reduce" if kind == "reduce_scatter" else kind, row["bytes"], world["ranks"])
                rows.append([steps, sent] / np.array(statistics.median(row["seconds"])))
        latency, slowness = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)[0]
        links[kind] = Link(max(0.0, float(latency)), 1.0 / float(slowness))
    return links


def _cell(alone: dict[str, Any], world: dict[str, Any], stage: str, links: dict[scale.Kind, Link], mbit: str) -> dict[str, Any]:
    model, workload, ranks = model_of(TIMED), Workload(), world["ranks"]
    found = world["stages"][stage]
    kept = slice(1, None, 2) if ranks == 1 else slice(None)  # of one rank, the others calibrate
    times, compute = found["steps"][kept], statistics.median(row[1] for row in found["compute"][kept])
    whole = _beyond(alone, "0") * compute
    plan = Plan(ranks, int(stage[0]), UTTERANCES, element=4, bucket=BUCKET, live=LIVE if stage.endswith("freed") else Plan.live)
    machine = Machine(
        name="cpu",
        peak=3 * workload.flops(model, UTTERANCES) / compute,
        achieved=1.0,
        memory=np.inf,
        reserved=0.0,
        per_node=1,
        intra=Link(0.0, np.inf),
        inter=links,
        update=whole / model.parameters,
        overlap=1.0,
        hidden=frozenset({"gather"}),
        overhead={plan.stage: max(0.0, _beyond(alone, stage) * compute - whole)},
        scatter_by_reduce=True,
    )
    step = scale.predict(model, machine, plan, workload)
    measured = statistics.median(times)
    row = {
        "mbit": mbit,
        "ranks": ranks,
        "stage": stage,
        "predicted_s": step.seconds,
        "measured_s": measured,
        "steps_s": times,
        "error": step.seconds / measured - 1.0,
        "compute_s": step.compute,
        "exposed_s": step.exposed,
        "communication_s": step.communication,
        "update_s": step.update,
    }
    if ranks > 1:
        sent, counted = sum(step.sent.values()), found["payload"]["bytes"]
        payload = {kind: sum(call.size for call in scale.traffic(model, plan) if call.kind == kind) for kind in counted}
        row |= {
            "predicted_bytes": sent,
            "measured_bytes": found["wire"],
            "bytes_error": sent / found["wire"] - 1.0,
            "payload": {kind: {"predicted": payload[kind], "counted": counted[kind] / len(found["steps"])} for kind in counted},
        }
    return row


def _beyond(alone: dict[str, Any], stage: str) -> float:
    """Give what a step of one rank takes beyond forward and backward, as a multiple of them: other processes slow down both alike.

    It is the optimizer, at stage 0; what DeepSpeed adds, beyond that. Of the even steps: the odd ones check what comes of it.
    """
    found = alone["stages"][stage]
    pairs = zip(found["steps"][::2], found["compute"][::2], strict=True)
    return max(0.0, statistics.median(step / both - 1.0 for step, (_, both) in pairs))


def model_of(size: str) -> Model:
    """Give the model of `emoscale bench step` at a size."""
    return Model(*SIZES[size], vocabulary=5 + len(WORDS))


def _held(world: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for row in world["held"]:
        plan = Plan(world["ranks"], int(row["stage"][0]), 2, element=4 if row["precision"] == "fp32" else 2, bucket=BUCKET)
        predicted = held(model_of(HELD), plan)
        yield row | {"ranks": world["ranks"], "predicted": predicted, "error": predicted / row["bytes"] - 1.0}


def held(model: Model, plan: Plan) -> float:
    """Give the bytes between backward and the optimizer's step: state, gradients and what is left of the buckets."""
    parts = scale.memory(model, plan, Workload())
    left = parts["buckets"] if plan.stage in (1, 3) else 0.0
    if plan.stage == 3:
        whole = model.persistent if plan.ranks > 1 else 0
        parts["parameters"] = (model.parameters / plan.ranks + whole) * plan.element
    return sum(parts[name] for name in ("parameters", "gradients", "master", "moments")) + left


def summary(cells: list[dict[str, Any]], held: list[dict[str, Any]]) -> dict[str, Any]:
    """Give the errors that decide, and whether each part passes."""
    errors = [abs(cell["error"]) for cell in cells]
    sent = [abs(cell["bytes_error"]) for cell in cells if "bytes_error" in cell]
    kept = [abs(row["error"]) for row in held]
    found = {
        "median_error": statistics.median(errors),
        "largest_error": max(errors),
        "largest_bytes_error": max(sent, default=0.0),
        "largest_memory_error": max(kept, default=0.0),
    }
    return found | {
        "times_pass": found["median_error"] <= MEDIAN_LIMIT and found["largest_error"] <= CELL_LIMIT,
        "bytes_pass": found["largest_bytes_error"] <= WIRE_LIMIT,
        "memory_pass": found["largest_memory_error"] <= MEMORY_LIMIT,
    }


def told(result: dict[str, Any]) -> str:
    """Give a check as lines for a terminal."""
    lines = [f"{'Mbit/s':>7} {'ranks':>5} {'ZeRO':>7} {'predicted':>10} {'measured':>9} {'error':>7} {'sent, predicted':>16} {'measured':>9} {'error':>7}"]
    for cell in result["cells"]:
        sent = f"{cell['predicted_bytes'] / 1e6:>13.1f} MB {cell['measured_bytes'] / 1e6:>6.1f} MB {cell['bytes_error']:>7.1%}" if "bytes_error" in cell else ""
        lines.append(
            f"{cell['mbit']:>7} {cell['ranks']:>5} {cell['stage']:>7} {cell['predicted_s']:>8.2f} s {cell['measured_s']:>7.2f} s {cell['error']:>7.1%} {sent}"
        )
    lines += [
        f"{row['precision']} ZeRO {row['stage']} on {row['ranks']}: {row['predicted'] / 1e6:.2f} MB predicted, {row['bytes'] / 1e6:.2f} MB held ({row['error']:+.1%})"
        for row in result["held"]
    ]
    return "\n".join([*lines, *(f"{name}: {value:.1%}" if isinstance(value, float) else f"{name}: {value}" for name, value in result["summary"].items())])
