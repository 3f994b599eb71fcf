"""What runs inside a rank: a record of what each step was computed from, and a death at a chosen operator."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from emoscale.models.task import TaskModel
from tests.training.runs import command

PHASES = ("forward", "backward", "optimizer step")


class Watch:
    """Follows a rank through its steps, whatever trains it: PyTorch's own hooks say where it is.

    ZeRO-1 and 2 call the optimizer once per group of parameters, so a step begins with a forward pass of the whole model that
    follows the optimizer.
    """

    def __init__(self, path: Path) -> None:
        self.phase, self.step, self._ids, self._written = "", 0, [], True
        self._file = path.open("a")
        register_module_forward_pre_hook(self._forward)
        register_module_forward_hook(self._forwarded)
        register_optimizer_step_pre_hook(self._optimizer)
        register_optimizer_step_post_hook(self._optimized)

    def _forward(self, module: Any, given: Any) -> None:
        if isinstance(module, TaskModel):
            if self._written:
                self.step, self._ids, self._written = self.step + 1, [], False
            # What keeps a rank in step with the others repeats a batch without its targets.
            if any(targets.count for targets in given[0].targets.values()):
                self._ids += given[0].ids
            self.phase = "forward"

    def _forwarded(self, module: Any, given: Any, result: Any) -> None:
        if isinstance(module, TaskModel):
            self.phase = ""

    def _optimizer(self, optimizer: Any, *_: Any) -> None:
        self.phase = "optimizer step"

    def _optimized(self, optimizer: Any, *_: Any) -> None:
        self.phase = ""
        if not self._written:
            self._written = True
            print(json.dumps({"step": self.step, "time": time.time(), "rss_mib": resident_mib(), "ids": self._ids}), file=self._file, flush=True)


class Death(TorchDispatchMode):
    """SIGKILL at an operator of one phase of one step: the share `at` of the operators that the phase had in the step before."""

    def __init__(self, watch: Watch, note: Path, phase: str, step: int, at: float) -> None:
        super().__init__()
        self.watch, self.note, self.wanted, self.step, self.at = watch, note, phase, step, at
        self.counted: dict[int, int] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        now = "backward" if torch._C._current_graph_task_id() != -1 else self.watch.phase
        if now == self.wanted:
            step = self.watch.step
            passed = self.counted[step] = self.counted.get(step, 0) + 1
            before = self.counted.get(step - 1, 0)
            if step >= self.step and before and passed > int(self.at * before):
                self.note.write_text(f"{now}, step {step}, operator {passed} of about {before}: {operator}")
                os.kill(os.getpid(), signal.SIGKILL)
        return operator(*given, **(named or {}))


def resident_mib() -> float:
    """Give the memory this process holds, without what it shares with the process it was forked from."""
    kib = {line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]}
    return (kib["Private_Dirty"] + kib["Private_Clean"]) / 1024


def watched(records: str, blow: dict[str, Any] | None, *words: str) -> None:
    """Run `emoscale pretrain` with a record of this rank's steps in `records`; where `blow` names this rank, until it dies.

    Args:
        records: folder; `rank_<n>.jsonl` gets a row per step, `blow.txt` where this rank died.
        blow: rank, phase, step (of this start, from 2) and share `at` of its operators; None = nothing happens.
        words: of the command.
    """
    rank = int(os.environ.get("RANK", "0"))
    watch = Watch(Path(records) / f"rank_{rank}.jsonl")
    if blow is None or blow["rank"] != rank:
        return command("pretrain", *words)
    with Death(watch, Path(records) / "blow.txt", blow["phase"], blow["step"], blow["at"]):
        return command("pretrain", *words)
