"""`emoscale bench scale`: the model of `scale` for real machines, as tables; `check=true` compares it with real ranks."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from emoscale.config import load
from emoscale.files import write_result
from emoscale.models.config import ModelConfig
from emoscale.training import scale, scale_check
from emoscale.training.environment import environment
from emoscale.training.flops import PEAKS
from emoscale.training.scale import Link, Machine, Model, Plan, Workload

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "bench" / "scale.yaml"
SIZES = {
    "base": {"size": "base"},
    "large": {"size": "large"},
    "1b": {"layers": 26, "width": 1792, "heads": 28},
    "3b": {"layers": 32, "width": 2816, "heads": 44},
}
"""What `ModelConfig` is given; heads are 64 wide throughout."""
COPIED = {"H200": 4.3e12, "H100": 3.0e12}
"""Memory bandwidth, B/s, read and write counted: measured on an H200; of an H100 the same 90 % of what its maker states."""
MEMORY = {"H200": 141e9, "H100": 80e9}
"""Bytes, as the maker states them."""
MULTIPLIED = 780e12
"""FLOP/s of dense bf16 products measured at 8192³ on either."""
UPDATE_BYTES = 46
"""Moved per parameter: AdamW 28, its bf16 copy 2, the overflow check 4, the norm 4, clipping 8."""


@dataclass
class ScaleConfig:
    """Machine, sizes and constants of `emoscale bench scale`; what is not measured is an assumption that may be set."""

    check: bool = False
    """Compare the model with real DeepSpeed ranks on this machine instead (Linux, root)."""
    gpu: Literal["H200", "H100"] = "H200"
    """Its peak, memory and bandwidth."""
    gpus: list[int] = field(default_factory=lambda: [2**power for power in range(11)])
    """Ranks."""
    stages: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    """ZeRO stages."""
    sizes: list[str] = field(default_factory=lambda: list(SIZES))
    """Among base, large, 1b, 3b."""
    utterances: int = 320
    """Largest micro-batch of a GPU."""
    global_batch: int = 0
    """Utterances per step over all GPUs; 0 = a full micro-batch on each GPU, so it grows with them."""
    schedule: int = 25_600_000
    """Utterances of the whole schedule: 40,000 steps of 640."""
    achieved: float = 0.40
    """Share of measured dense bf16 speed (780 TFLOP/s) in forward and backward: this project's goal for its base model, not a measurement."""
    overlap: float = 0.8
    """Share of the computation that communication may hide behind; an assumption."""
    per_node: int = 8
    """GPUs of a node."""
    nvlink: float = 370e9
    """B/s and direction that collectives reach within a node (NCCL's maintainers, nccl-tests#212: 450 less its protocol)."""
    network: float = 45e9
    """B/s and direction of a GPU's own adapter: 400 Gbit/s, nine tenths of it reached (an assumption)."""
    nvlink_latency: float = 3.4e-6
    """Seconds per step of a ring within a node (NCCL's tuning table)."""
    network_latency: float = 9.6e-6
    """Seconds per step of a ring between nodes (NCCL's tuning table)."""
    reserved: float = 4e9
    """Bytes of a GPU for context, communication buffers and fragments; an assumption."""
    workers: int = 4
    """`data.workers` of each rank."""
    loader: float = 1_930.0
    """Utterances per second and worker, features at the paper's caps: `emoscale bench data`, on two cores of an AMD EPYC."""
    bucket: int = 50_000_000
    """`zero.bucket`."""
    live: int = 1_000_000_000
    """`zero.live`."""
    contrasts: int = 0
    """In-batch losses over the utterances of all ranks: 1 as in bi_encoder, up to 4 as in tcmp."""
    mbit: list[float] = field(default_factory=lambda: [100.0])
    """check: speeds of the links between ranks, Mbit/s."""
    ranks: list[int] = field(default_factory=lambda: [1, 2, 4])
    """check: ranks, a process each; the first is 1, which calibrates."""
    steps: int = 6
    """check: timed steps of each cell."""
    output: str = ""
    """File for the result, JSON."""

    def validate(self) -> None:
        """Check names and ranges."""
        unknown = [name for name in self.sizes if name not in SIZES]
        if unknown:
            raise ValueError(f"sizes: {unknown[0]!r} is none of {', '.join(SIZES)}")
        if not set(self.stages) <= {0, 1, 2, 3} or min([*self.gpus, self.utterances, self.per_node, self.workers]) < 1:
            raise ValueError(
                f"stages: stages={self.stages} (0 … 3), gpus={self.gpus}, utterances={self.utterances}, per_node={self.per_node}, workers={self.workers} (≥ 1)"
            )
        if self.ranks[:1] != [1] or self.steps < 4:
            raise ValueError(f"ranks: ranks={self.ranks} (the first calibrates and is 1), steps={self.steps} (≥ 4)")


def bench_scale(overrides: list[str]) -> dict[str, Any]:
    """Predict every size, number of GPUs and stage, or check the model; write and give the result."""
    config = load(ScaleConfig, CONFIG if CONFIG.is_file() else None, overrides)
    if config.check:
        result = scale_check.check(config.mbit, config.ranks, config.steps)
    else:
        result = {"predicted": True, "gpu": config.gpu, "cells": [cell for size in config.sizes for cell in cells(config, size)]}
    result = {"machine": environment(), "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime())} | result
    if config.output:
        write_result(Path(config.output), result)
    return result


def machine(config: ScaleConfig) -> Machine:
    """Give the GPUs of a configuration; nothing here has been measured by this project on several of them."""
    link = Link(config.network_latency, config.network)
    return Machine(
        name=config.gpu,
        peak=PEAKS[config.gpu],
        achieved=config.achieved * MULTIPLIED / PEAKS[config.gpu],
        memory=MEMORY[config.gpu],
        reserved=config.reserved,
        per_node=config.per_node,
        intra=Link(config.nvlink_latency, config.nvlink),
        inter={"all_reduce": link, "all_gather": link, "reduce_scatter": link},
        update=UPDATE_BYTES / (0.8 * COPIED[config.gpu]),
        overlap=config.overlap,
        loader=config.loader * config.workers,
    )


def model_of(size: str) -> Model:
    """Give a named size as MEmoBERT trains it."""
    shape = ModelConfig(**SIZES[size])  # type: ignore[arg-type]  # sizes and numbers
    shape.validate()
    return Model(shape.layers, shape.width, shape.heads)


def plan_of(config: ScaleConfig, ranks: int, stage: int) -> Plan | None:
    """Divide the global batch over ranks and micro-batches, as the rank with most has it; None where there are more ranks than utterances."""
    share = config.global_batch / ranks if config.global_batch else config.utterances
    if share < 1:
        return None
    times = math.ceil(share / config.utterances)
    return Plan(ranks, stage, math.ceil(share / times), times, bucket=config.bucket, live=config.live, contrasts=config.contrasts)


def cells(config: ScaleConfig, size: str) -> list[dict[str, Any]]:
    """Predict one size; where activations do not fit, layers are computed again in backward."""
    model, where, rows = model_of(size), machine(config), []
    for ranks in config.gpus:
        for stage in config.stages:
            plan = plan_of(config, ranks, stage)
            if plan is None:
                continue
            step = scale.predict(model, where, plan, Workload())
            if not step.fits:
                plan = replace(plan, recompute=True)
                step = scale.predict(model, where, plan, Workload())
            batch = config.global_batch or step.utterances
            full = batch / step.utterances  # the ranks with fewer wait for the others
            rows.append(
                {
                    "size": size,
                    "parameters": model.parameters,
                    "gpus": ranks,
                    "stage": stage,
                    "recompute": plan.recompute,
                    "fits": step.fits,
                    "global_batch": batch,
                    "step_s": step.seconds,
                    "compute_s": step.compute,
                    "exposed_s": step.exposed,
                    "communication_s": step.communication,
                    "update_s": step.update,
                    "data_s": step.data,
                    "sent_bytes": step.sent,
                    "memory_bytes": step.memory,
                    "memory_total": scale.total(step.memory),
                    "tokens_per_s": step.tokens_per_s * full,
                    "mfu": step.mfu * full,
                    "hours": config.schedule / batch * step.seconds / 3600,
                }
            )
    return rows


def told(result: dict[str, Any]) -> str:
    """Give the result as lines for a terminal."""
    if "predicted" not in result:
        return scale_check.told(result)
    lines = [f"Predictions for {result['gpu']}s from stated constants: no step was measured on a GPU.", ""]
    for size in dict.fromkeys(cell["size"] for cell in result["cells"]):
        lines += [*_table([cell for cell in result["cells"] if cell["size"] == size]), ""]
    return "\n".join(lines[:-1])


def _table(rows: list[dict[str, Any]]) -> list[str]:
    head = f"{'GPUs':>5} {'ZeRO':>4} {'GB':>6} {'batch':>7} {'step':>9} {'compute':>8} {'exposed':>8} {'optim.':>7} {'data':>6} {'sent':>8} {'Mtok/s':>8} {'MFU':>6} {'hours':>8}"
    lines = [f"{rows[0]['size']}: {rows[0]['parameters'] / 1e6:,.0f} M parameters", head]
    for gpus in dict.fromkeys(row["gpus"] for row in rows):
        here = [row for row in rows if row["gpus"] == gpus]
        fastest = min((row for row in here if row["fits"]), key=lambda row: row["step_s"], default=None)
        lines += [_line(row, row is fastest) for row in here]
    return [*lines, *_remarks(rows)]


def _line(row: dict[str, Any], fastest: bool) -> str:
    start = f"{row['gpus']:>5} {row['stage']:>4} {row['memory_total'] / 1e9:>6.1f} {row['global_batch']:>7}"
    if not row["fits"]:
        return f"{start}  does not fit"
    milli = [f"{row[f'{name}_s'] * 1e3:.0f}" for name in ("compute", "exposed", "update", "data")]
    sent = sum(row["sent_bytes"].values()) / 1e9
    times = f"{row['step_s'] * 1e3:>6.0f} ms {milli[0]:>8} {milli[1]:>8} {milli[2]:>7} {milli[3]:>6} {sent:>5.2f} GB"
    marks = (" fastest" if fastest else "") + (" (recomputes)" if row["recompute"] else "")
    return f"{start} {times} {row['tokens_per_s'] / 1e6:>8.2f} {row['mfu']:>6.1%} {row['hours']:>8.3g}{marks}"


def _remarks(rows: list[dict[str, Any]]) -> list[str]:
    """Say from how many GPUs on communication shows, stage by stage."""
    remarks = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage and row["fits"]]
        if not own:
            remarks.append(f"stage {stage} fits nowhere")
            continue
        tenth = next((row["gpus"] for row in own if row["exposed_s"] > 0.1 * row["step_s"]), None)
        most = next((row["gpus"] for row in own if row["exposed_s"] > row["compute_s"]), None)
        shows = f"a tenth of the step from {tenth} GPUs on" if tenth else "below a tenth of the step everywhere"
        remarks.append(
            f"stage {stage}: communication is {shows}" + (f", more than the computation from {most} on" if most else ", never more than the computation")
        )
    return remarks
