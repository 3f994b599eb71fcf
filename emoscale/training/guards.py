"""What is watched while a run trains: spikes of gradient and loss, slow ranks, waiting for data, memory.

Every judgement is made from numbers that all ranks have, so all ranks judge alike.
"""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, median_low
from typing import Any, Literal

import torch

from emoscale import distributed

log = logging.getLogger("emoscale")
LEAST = 20
"""Values a running statistic must have seen before anything is judged by it."""
SIGMA = 1.4826
"""Standard deviations of a normal distribution per median absolute deviation."""
SLOW, SLOW_LOGS, SLOW_LEAST_S = 1.5, 5, 0.05
"""Times the median of the ranks' own times, and logs in a row, from which on a rank is reported as slow; and the least seconds beyond the
median, as milliseconds are the noise of any host."""
STARVED, STARVED_LOGS = 0.1, 5
"""Share of the time spent on waiting for data, over so many logs, that is worth a line."""


@dataclass
class SpikeConfig:
    """What counts as a spike, and what happens then."""

    action: Literal["warn", "skip"] = "warn"
    """`warn` tells of it · `skip` also leaves out the optimizer step, on all ranks, where the gradient norm is a spike."""
    grad_norm: float = 10.0
    """Times the running median from which on a gradient norm is a spike; 0 = none is."""
    loss: float = 10.0
    """Robust standard deviations (1.4826 × median absolute deviation) above the running median from which on a logged loss is a spike; 0 = none is."""
    window: int = 100
    """Values that the running statistics look back on: steps, and logged steps for the loss."""

    def validate(self) -> None:
        """Check the ranges."""
        if self.window < LEAST:
            raise ValueError(f"window: {self.window} is below {LEAST}, too few to judge by")
        if self.loss < 0 or (self.grad_norm and self.grad_norm <= 1):
            raise ValueError(f"grad_norm: {self.grad_norm}, loss: {self.loss}; grad_norm must be above 1, loss above 0 (0 turns either off)")


class Spikes:
    """Running medians of gradient norm and loss; what was a spike counts too, so a lasting change is accepted in time."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self._norms: deque[float] = deque(maxlen=config.window)
        self._losses: deque[float] = deque(maxlen=config.window)

    @property
    def skip_above(self) -> float:
        """Gradient norm above which a step must not be applied; infinite where none is skipped."""
        return self._norm_limit() if self.config.action == "skip" else math.inf

    def see_norm(self, step: int, norm: float) -> None:
        """Judge the gradient norm of a step, then count it in."""
        limit = self._norm_limit()
        if norm > limit:
            fate = "the step was skipped" if self.config.action == "skip" else "run.spike.action=skip would leave such steps out"
            _warn("step %d: gradient norm %.3g is %.1f times the running median; %s", step, norm, norm / limit * self.config.grad_norm, fate)
        if math.isfinite(norm):
            self._norms.append(norm)

    def see_loss(self, step: int, loss: float) -> None:
        """Judge a logged loss, then count it in."""
        if len(self._losses) >= LEAST and self.config.loss:
            middle = median(self._losses)
            spread = SIGMA * median(abs(value - middle) for value in self._losses)
            if loss > middle + self.config.loss * spread > middle:
                _warn("step %d: loss %.4g is %.1f robust standard deviations above the running median %.4g", step, loss, (loss - middle) / spread, middle)
        if math.isfinite(loss):
            self._losses.append(loss)

    def record(self) -> dict[str, list[float]]:
        """Give what a run that goes on must know to judge as if it had never stopped."""
        return {"grad_norms": list(self._norms), "losses": list(self._losses)}

    def restore(self, record: dict[str, list[float]]) -> None:
        """Take up what `record` gave; a checkpoint without it starts anew."""
        self._norms.extend(record.get("grad_norms", ()))
        self._losses.extend(record.get("losses", ()))

    def _norm_limit(self) -> float:
        return self.config.grad_norm * median(self._norms) if len(self._norms) >= LEAST and self.config.grad_norm else math.inf


class Stragglers:
    """Finds the rank that the others wait for, by the time each spends in its own forward passes.

    Backward and optimizer step wait for the other ranks inside, and last equally long on all. So do forward passes that gather
    (ZeRO-3, losses over the global batch): a slow rank shows less there.
    """

    def __init__(self) -> None:
        self._slowest, self._in_a_row = -1, 0
        self._spans: list[tuple[Any, Any]] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Time a forward pass of this step."""
        begin = _mark()
        yield
        self._spans.append((begin, _mark()))

    def next_step(self) -> None:
        """Forget the times of the step before."""
        self._spans.clear()

    def columns(self) -> dict[str, float]:
        """Compare this step's times over all ranks; nothing where there is one rank (collective)."""
        if torch.distributed.get_world_size() == 1:
            return {}
        own = torch.tensor([sum(_seconds(*span) for span in self._spans)], dtype=torch.float64)
        times = [float(value) for value in distributed.gather(own)]
        slowest = max(range(len(times)), key=times.__getitem__)
        middle = median_low(times)
        ratio = times[slowest] / max(middle, 1e-9)
        self._judge(slowest, ratio if times[slowest] - middle >= SLOW_LEAST_S else 1.0)
        return {"slowest_rank": slowest, "rank_time_max_over_median": ratio}

    def _judge(self, slowest: int, ratio: float) -> None:
        if ratio <= SLOW:
            self._slowest, self._in_a_row = -1, 0
            return
        self._in_a_row = self._in_a_row + 1 if slowest == self._slowest else 1
        self._slowest = slowest
        if self._in_a_row == SLOW_LOGS:
            hosts = distributed.gather_names([distributed.node_name()])
            _warn(
                "rank %d on %s is slow: its forward passes took %.1f times the median of all ranks in %d logs in a row; look at that node "
                "(other processes, a throttled GPU), or leave it out (sbatch --exclude)", slowest, hosts[slowest], ratio, SLOW_LOGS,
            )  # fmt: skip


class Pace:
    """Where the time of the steps goes, from one logged row to the next."""

    def __init__(self) -> None:
        self._waited = self._took = self._held = 0.0
        self._shares: deque[float] = deque(maxlen=STARVED_LOGS)
        self._logs, self._told = 0, False

    def step(self, waited: float, took: float) -> None:
        """Count a step: seconds spent on waiting for data, and in all."""
        self._waited += waited
        self._took += took

    def held(self, seconds: float) -> None:
        """Count the seconds a save has held the loop."""
        self._held += seconds

    def columns(self, steps: int) -> dict[str, float]:
        """Give the share of waiting and the seconds of saves since the last row, the largest of all ranks (collective).

        Args:
            steps: between two rows, for the message.
        """
        share, held = distributed.reduce_max([self._waited / max(self._took, 1e-9), self._held])
        self._waited = self._took = self._held = 0.0
        self._logs += 1
        if self._logs > 1:  # the first steps wait for the loader to start
            self._shares.append(share)
        mean = sum(self._shares) / max(len(self._shares), 1)
        if not self._told and len(self._shares) == STARVED_LOGS and mean > STARVED:
            self._told = True
            _warn(
                "%.0f %% of the last %d steps was waiting for data; raise data.workers, or keep the corpus (data.cache) on a local disk",
                100 * mean, STARVED_LOGS * steps,
            )  # fmt: skip
        return {"data_wait_share": share, "save_s": held}


class Guards:
    """All of them, for the training loop."""

    def __init__(self, spike: SpikeConfig | None = None) -> None:
        self.spikes, self.stragglers, self.pace = Spikes(spike or SpikeConfig()), Stragglers(), Pace()

    def columns(self, steps: int) -> dict[str, float]:
        """Give what a logged row tells beside its losses (collective)."""
        (host,) = distributed.reduce_max([host_memory_gib()])
        return {"host_memory_gib": host} | self.pace.columns(steps) | self.stragglers.columns()


def host_memory_gib() -> float:
    """Give the most memory this process has ever had resident, in GiB."""
    unit = 1 if sys.platform == "darwin" else 2**10  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _mark() -> Any:
    """Give a point in time: of the GPU's stream where there is one, since its work is only queued here."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _warn(message: str, *values: Any) -> None:
    """Say it once for all ranks."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        log.warning(message, *values)
