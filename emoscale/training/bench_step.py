"""`emoscale bench step`: a whole training step beside the same model padded, compiled, as published, and beside a plain BERT."""

from __future__ import annotations

import copy
import logging
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emoscale.batch import Batch
from emoscale.config import ConfigError, load
from emoscale.files import write_result
from emoscale.training.environment import environment
from emoscale.training.flops import forward_parts
from emoscale.training.step_clock import (
    Parts,
    Taken,
    host_syncs,
    interleaved,
    load_average,
    matmul,
    paired,
    peak_bytes,
    threads,
)
from emoscale.training.step_model import CONFIG, BenchConfig, shape_of, synthetic_batches, task_model
from emoscale.training.step_peers import Packed, Padded, Peer, PlainBert, Published

log = logging.getLogger("emoscale")
OURS, BERT, COMPILED = "ours", "plain BERT", "padded, compiled"
SAME_LOSS = 1e-4
"""Largest relative difference of the losses of two sides at any of the compared steps, in fp32."""
WANTED_OF_PADDED, WANTED = 0.95, {"published": 1.5}
"""Least ratio to the padded step as a share of 1 / (1 − padding share), and to others."""
GPU_WORKLOAD = {"device": "cuda", "size": "base", "precision": "bf16", "utterances": 640}
WANTED_ON_GPU = {"padded": 3.0, "published": 1.5, "mfu": 0.40, "schedule_hours": 1.5}
"""Of that workload: least ratios and share of the measured matrix product's speed, most hours for the whole schedule."""
LR, BETAS, EPS, DECAY = 5e-5, (0.9, 0.98), 1e-6, 0.01
"""AdamW as MEmoBERT has it."""
SCHEDULE = (40_000, 640)
"""Steps and utterances per step of MEmoBERT's pre-training."""
PROFILED = 3
"""Steps over which the share of each part is taken."""


class Side:
    """A way to compute the loss with its optimizer."""

    def __init__(self, peer: Peer, config: BenchConfig) -> None:
        self.peer, self.config = peer, config
        self.optimizer = torch.optim.AdamW(peer.module.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)

    def loss(self, laid: Any) -> Tensor:
        """Run forward."""
        with torch.autocast(self.config.device, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.peer.loss(laid)

    def step(self, laid: Any) -> Tensor:
        """Run forward, backward and the optimizer."""
        loss = self.loss(laid)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def bench_step(overrides: list[str]) -> dict[str, Any]:
    """Time forward, backward and optimizer step of every side on one micro-batch, interleaved; write and give the result.

    `ratios` are of seconds by the clock, medians over the rounds with the 20th and 80th percentile; `processor_ratios` of processor
    time, which what else runs on the machine changes little. The losses of the sides are compared over the first optimizer steps.

    Raises:
        ConfigError: a GPU is asked for, and there is none.
    """
    config = load(BenchConfig, CONFIG if CONFIG.is_file() else None, overrides)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is asked for, and PyTorch finds no GPU; leave it out, or look at `emoscale doctor`")
    with threads(config.threads):
        result = measured(config)
    write_result(Path(config.output) / "step.json", result)
    return result


def measured(config: BenchConfig) -> dict[str, Any]:
    """Give what `bench_step` writes."""
    batches = synthetic_batches(config, max(1, config.steps))
    batch = batches[0].to(config.device)
    sides, absent = sides_of(config, batch)
    found = {
        "device": torch.cuda.get_device_name() if config.device == "cuda" else "cpu", "precision": config.precision, "threads": config.threads,
        "size": config.size, "vocabulary": config.vocabulary, "utterances": batch.utterances, "valid_tokens": batch.tokens,
        "padding_share": 1.0 - batch.tokens / (batch.max_seqlen * batch.utterances),
        "absent": absent, "losses": losses(config, sides, batches),
    }  # fmt: skip
    found["loss_differences"] = differences(found["losses"])
    found |= _costs(config, sides, batch) | {"shares": _shares(config, batch)}
    on_gpu = all(getattr(config, name) == value for name, value in GPU_WORKLOAD.items())
    wanted = WANTED_ON_GPU if on_gpu else {"padded": WANTED_OF_PADDED / (1.0 - found["padding_share"])} | WANTED
    return found | {
        "wanted": wanted, "same_loss": max(found["loss_differences"].values()) <= SAME_LOSS if config.precision == "fp32" else None, "load_average": load_average(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"), "machine": environment(), "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }  # fmt: skip


def sides_of(config: BenchConfig, batch: Batch) -> tuple[dict[str, Side], dict[str, str]]:
    """Give every side from the same weights, and why one is absent."""
    model = task_model(config).to(config.device)
    peers: dict[str, Callable[[], Peer]] = {
        OURS: lambda: Packed(copy.deepcopy(model)),
        "padded": lambda: Padded(copy.deepcopy(model)),
        COMPILED: lambda: Padded(copy.deepcopy(model), compiled=True),
        "published": lambda: Published(model, every_position=True),
        "published, heads on masked rows": lambda: Published(model, every_position=False),
        BERT: lambda: PlainBert(shape_of(config), config.device),
    }
    absent = {} if config.compile else {COMPILED: "compile=false"}
    sides = {name: Side(peer(), config) for name, peer in peers.items() if name not in absent}
    for name in [name for name in sides if name != OURS]:
        start = time.perf_counter()
        try:
            sides[name].loss(sides[name].peer.lay(batch)).backward()  # no step: all sides begin with the same weights
            sides[name].optimizer.zero_grad(set_to_none=True)
        except Exception as error:  # of any of the compilers below, or a peer's need of memory; the others are measured all the same
            if name != COMPILED and not isinstance(error, torch.OutOfMemoryError):
                raise
            absent[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            del sides[name]
            if config.device == "cuda":
                torch.cuda.empty_cache()
        else:
            log.info("%s: the first pass took %.0f s", name, time.perf_counter() - start)
    return sides, absent


def losses(config: BenchConfig, sides: dict[str, Side], batches: list[Batch]) -> dict[str, list[float]]:
    """Give the losses of all sides that have the same one, over the first optimizer steps (without any: of one forward)."""
    found: dict[str, list[float]] = {name: [] for name in sides if name != BERT}
    for batch in batches:
        for name, values in found.items():
            side = sides[name]
            laid = side.peer.lay(batch.to(config.device))
            values.append(float(side.step(laid) if config.steps else side.loss(laid).detach()))
    return found


def differences(found: dict[str, list[float]]) -> dict[str, float]:
    """Give the largest relative difference of each side's losses from ours."""
    own = found[OURS]
    return {name: max(abs(value - ours) / abs(ours) for value, ours in zip(values, own, strict=True)) for name, values in found.items() if name != OURS}


def _costs(config: BenchConfig, sides: dict[str, Side], batch: Batch) -> dict[str, Any]:
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    product, operations = matmul(config.device, dtype)
    steps = {name: partial(side.step, side.peer.lay(batch)) for name, side in sides.items()}
    taken = interleaved(steps | {"matmul": product}, config.device, config.repeats)
    peak = operations / statistics.median(taken.pop("matmul").wall)
    parts = _flops(config, batch)
    whole = 3.0 * sum(parts.values())
    rows = {name: _row(taken[name], batch, whole if name != BERT else _bert_flops(config, batch), peak) for name in steps}
    for name, step in steps.items():
        rows[name] |= {"peak_bytes": peak_bytes(step, config.device), "host_syncs": host_syncs(step, config.device)}
    own = taken[OURS]
    return {
        "repeats": config.repeats, "flops": {f"forward, {name}": value for name, value in parts.items()} | {"forward + backward (3 × forward)": whole},
        "matmul_flops_per_s": peak, "sides": rows,
        "ratios": {name: paired(other.wall, own.wall) for name, other in taken.items() if name != OURS},
        "processor_ratios": {name: paired(other.processor, own.processor) for name, other in taken.items() if name != OURS},
    }  # fmt: skip


def _row(taken: Taken, batch: Batch, flops: float, peak: float) -> dict[str, Any]:
    seconds = statistics.median(taken.wall)
    steps, global_batch = SCHEDULE
    return {
        "seconds": seconds, "fastest_s": min(taken.wall), "slowest_s": max(taken.wall), "processor_s": statistics.median(taken.processor),
        "utterances_per_s": batch.utterances / seconds, "valid_tokens_per_s": batch.tokens / seconds, "flops_per_s": flops / seconds,
        "mfu": flops / seconds / peak, "schedule_hours": steps * global_batch / batch.utterances * seconds / 3600,
    }  # fmt: skip


def _flops(config: BenchConfig, batch: Batch) -> dict[str, float]:
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
    frames = {"visual": len(batch.visual), "acoustic": len(batch.acoustic)}
    return forward_parts(shape_of(config), lengths, frames, {name: target.count for name, target in batch.targets.items()})


def _bert_flops(config: BenchConfig, batch: Batch) -> float:
    """Count for the plain BERT, which tells a word at every position."""
    length = max(1, round(batch.tokens / batch.utterances))
    masked = {"masked_text": batch.utterances * length}
    return 3.0 * sum(forward_parts(shape_of(config), [length] * batch.utterances, {}, masked).values())


def _shares(config: BenchConfig, batch: Batch) -> dict[str, float]:
    side = Side(Packed(task_model(config).to(config.device)), config)
    laid = side.peer.lay(batch)
    side.step(laid)
    parts = Parts(side.peer.module, config.device)
    for _ in range(PROFILED):
        with parts.of("step"):
            loss = side.loss(laid)
            with parts.of("backward"):
                loss.backward()
            with parts.of("optimizer"):
                side.optimizer.step()
                side.optimizer.zero_grad(set_to_none=True)
    return parts.shares()


def told(result: dict[str, Any]) -> str:
    """Give the result as lines for a terminal."""
    facts = ("device", "precision", "threads", "size", "vocabulary", "utterances", "valid_tokens", "padding_share", "repeats", "load_average")
    lines = [f"{name:<34} {_short(result[name])}" for name in facts]
    lines += [f"FLOP, {name:<28} {value:.4g}" for name, value in result["flops"].items()]
    lines += [f"{'matmul FLOP/s':<34} {result['matmul_flops_per_s']:.4g}", ""]
    heads = ("seconds", "utterances/s", "tokens/s", "FLOP/s", "MFU", "peak MB", "syncs", "schedule, h")
    lines.append(f"{'':<34}" + "".join(f"{name:>13}" for name in heads))
    for name, row in result["sides"].items():
        values = (
            f"{row['seconds']:.4g}", f"{row['utterances_per_s']:.4g}", f"{row['valid_tokens_per_s']:.0f}", f"{row['flops_per_s']:.3g}", f"{row['mfu']:.1%}",
            f"{row['peak_bytes'] / 1e6:.0f}", "–" if row["host_syncs"] is None else str(row["host_syncs"]), f"{row['schedule_hours']:.4g}",
        )  # fmt: skip
        lines.append(f"{name:<34}" + "".join(f"{value:>13}" for value in values))
    lines += [f"{name:<34} absent: {reason}" for name, reason in result["absent"].items()]
    lines += ["", f"{'ours is faster than':<34}{'by the clock':>13}{'20–80 %':>14}{'processor':>13}{'wanted':>13}"]
    for name, (low, middle, high) in result["ratios"].items():
        wanted = result["wanted"].get(name)
        lines.append(
            f"{name:<34}{middle:>12.3f}×{f'{low:.2f}–{high:.2f}':>14}{result['processor_ratios'][name][1]:>12.3f}×{f'{wanted:.3f}×' if wanted else '–':>13}"
        )
    own = result["sides"][OURS]
    lines += [f"{f'ours, {name}':<34}{own[name]:>13.3g}{'':>27}{value:>13.3g}" for name, value in result["wanted"].items() if name in own]
    lines += ["", *(f"share of time, {name:<19} {share:.1%}" for name, share in result["shares"].items()), ""]
    count = len(result["losses"][OURS])
    lines += [f"losses of {count} steps differ, {name:<5} {value:.2g}" for name, value in result["loss_differences"].items()]
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
