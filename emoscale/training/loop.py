"""The training loop: one for every system, every world and every ZeRO stage."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from emoscale import distributed
from emoscale.config import EmoscaleError
from emoscale.data.loader import StepData
from emoscale.training.engine import Engine
from emoscale.training.flops import model_flops_utilisation
from emoscale.training.guards import Guards, SpikeConfig

log = logging.getLogger("emoscale")
MIN_COUNT = 1.0


@dataclass
class Hooks:
    """What happens around the steps."""

    learning_rate: Callable[[int], float]
    track: Callable[[dict[str, Any]], None]
    save: Callable[[int], None]
    stop: Callable[[], str]
    """Why this rank wants to stop after this step (a signal, early stopping), or empty."""
    flops: Callable[[StepData], float] = lambda data: 0.0
    """Floating-point operations of this rank's forward passes in a step."""
    stepped: Callable[[int], None] = lambda done: None
    """Told after every optimizer step how many are done."""


@dataclass
class Result:
    """How a run of the loop ended."""

    step: int
    finished: bool
    reason: str


def train(
    engine: Engine,
    steps: Iterator[StepData],
    tasks: list[str],
    hooks: Hooks,
    *,
    first: int,
    last: int,
    log_every: int,
    save_every: int,
    max_nonfinite: int,
    guards: Guards | None = None,
) -> Result:
    """Run the steps first … last − 1.

    The loss is the mean over all masked units of the global batch: counts are summed over ranks before backward, so world
    size and accumulation change nothing.

    Raises:
        EmoscaleError: the data of a step could not be read on some rank (all ranks save what was learned, then raise), or
            gradients were not finite for `max_nonfinite` steps in a row (the utterances are named).
    """
    device, in_a_row, asked, done = distributed.device(), 0, time.perf_counter(), first
    guards = guards or Guards(SpikeConfig(grad_norm=0, loss=0))  # who gives none has no `run.spike` to set
    ranks = torch.distributed.get_world_size()
    while done < last:
        data, counts, ready = _read(steps, tasks, done, hooks.save if done > first else None)
        guards.stragglers.next_step()
        micro_batches = int(distributed.reduce_max([float(len(data.batches))])[0])
        scales = {name: ranks / max(counts[name], MIN_COUNT) for name in tasks}
        sums: dict[str, torch.Tensor] = {}
        losses: list[torch.Tensor] = []
        for i in range(micro_batches):
            batch = data.batches[i] if i < len(data.batches) else data.batches[0].without_targets()
            with guards.stragglers.forward():
                loss, parts = engine.forward(batch.to(device), scales)
            engine.backward(loss)
            losses.append(loss.detach())
            for name, value in parts.items():
                sums[name] = sums[name] + value if name in sums else value
        lr = hooks.learning_rate(data.step)
        outcome = engine.step(lr, guards.spikes.skip_above)
        done = data.step + 1
        hooks.stepped(done)
        in_a_row = 0 if math.isfinite(outcome.grad_norm) else in_a_row + 1
        if in_a_row:
            _report_nonfinite(data, losses, in_a_row)
        guards.spikes.see_norm(done, outcome.grad_norm)
        guards.pace.step(ready - asked, time.perf_counter() - asked)
        if done % log_every == 0 or done == last or not outcome.applied:
            row = _row(data, sums, counts, engine, hooks, lr, outcome.grad_norm, outcome.applied, ready - asked, time.perf_counter() - asked)
            guards.spikes.see_loss(done, row["loss"] or math.nan)
            hooks.track(row | guards.columns(log_every))
        if in_a_row >= max_nonfinite:
            raise EmoscaleError(
                f"gradients were not finite for {in_a_row} steps in a row, which is the limit; the utterances are in "
                "train.log; lower optim.lr, or look at these utterances"
            )
        reason = hooks.stop()
        stopping = distributed.reduce_max([1.0 if reason else 0.0])[0] > 0
        if done % save_every == 0 or done == last or stopping:
            start = time.perf_counter()
            hooks.save(done)
            guards.pace.held(time.perf_counter() - start)
        asked = time.perf_counter()
        if stopping:
            return Result(done, done == last, next(filter(None, distributed.gather_names([reason]))))  # of the ranks, one alone may know
    return Result(last, True, "all steps done")


def _read(steps: Iterator[StepData], tasks: list[str], done: int, save: Callable[[int], None] | None) -> tuple[StepData, dict[str, float], float]:
    """Give a step's data, the targets of each task over all ranks, and when the data had come (collective).

    Where a rank cannot read, the others must hear of it before they wait for it: all save what was learned, then raise.
    """
    data, error = None, None
    try:
        data = next(steps)
    except EmoscaleError as caught:
        error = caught
    ready = time.perf_counter()
    batches, names = (data.batches, data.skipped) if data is not None else ([], [])
    local = [float(sum(batch.targets[name].count for batch in batches)) for name in tasks]
    *counts, skipped, failed = distributed.reduce_sum([*local, float(len(names)), float(data is None)])
    if data is None or failed:
        if save is not None:
            save(done)
        raise error or EmoscaleError(f"step {done + 1}: {int(failed)} other ranks could not read their data; their own messages say why")
    if skipped:
        _report_skipped(data)
    return data, dict(zip(tasks, counts, strict=True)), ready


def _row(
    data: StepData,
    sums: dict[str, torch.Tensor],
    counts: dict[str, float],
    engine: Engine,
    hooks: Hooks,
    lr: float,
    grad_norm: float,
    applied: bool,
    waited: float,
    took: float,
) -> dict[str, Any]:
    """Reduce what one logged step has summed, to one flat row (collective)."""
    # A rank without any data of a kind has nothing to say of it, and would sum a shorter row than the others.
    names = sorted(set(distributed.gather_names(sorted(sums))))
    local = [float(sums.get(name, 0.0)) for name in names]
    extra = [float(sum(batch.utterances for batch in data.batches)), float(sum(batch.tokens for batch in data.batches)), float(len(data.skipped))]
    *totals, utterances, tokens, skipped = distributed.reduce_sum([*local, *extra])
    waited, took = distributed.reduce_max([waited, took])
    means = {name: total / max(counts[name.split("/")[0]], MIN_COUNT) for name, total in zip(names, totals, strict=True)}
    losses = {name: value for name, value in means.items() if "/" not in name}
    weights: dict[str, float] = engine.module.weights  # type: ignore[assignment]  # a TaskModel always has them
    row: dict[str, Any] = {
        "step": data.step + 1,
        "loss": sum(weights[name] * value for name, value in losses.items()),
        "lr": lr,
        "grad_norm": grad_norm,
        "utterances": int(utterances),
        "tokens": int(tokens),
        "skipped": int(skipped),
        "applied": applied,
        "step_time_s": took,
        "data_wait_s": waited,
        "utterances_per_s": utterances / took,
        "tokens_per_s": tokens / took,
    }
    row |= {f"loss/{name}": value for name, value in losses.items()} | {name: value for name, value in means.items() if "/" in name}
    if torch.cuda.is_available():
        (flops,) = distributed.reduce_sum([hooks.flops(data)])
        row["mfu"] = model_flops_utilisation(flops / torch.distributed.get_world_size(), took, torch.cuda.get_device_name())
        (row["memory_gib"],) = distributed.reduce_max([torch.cuda.max_memory_allocated() / 2**30])
    # JSON has no NaN.
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}


def _report_skipped(data: StepData) -> None:
    """Name what was skipped on any rank in the log of the first one (collective)."""
    names = distributed.gather_names(data.skipped)
    log.warning("step %d: %d utterances skipped, not finite or empty: %s", data.step + 1, len(names), ", ".join(names))


def _report_nonfinite(data: StepData, losses: list[torch.Tensor], in_a_row: int) -> None:
    """Name the utterances of the micro-batches whose loss is not finite, or all where every loss is (collective)."""
    suspects = [batch for batch, loss in zip(data.batches, losses, strict=False) if not bool(loss.isfinite())]
    named = distributed.gather_names([name for batch in suspects for name in batch.ids])
    named = named or distributed.gather_names([name for batch in data.batches for name in batch.ids])
    log.error("step %d skipped: gradients are not finite (%d in a row); utterances: %s", data.step + 1, in_a_row, ", ".join(named))
