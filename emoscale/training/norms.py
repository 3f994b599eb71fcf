"""The gradient norm: measured, limited by clipping, and a reason to leave a step out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from emoscale import distributed

NO_CLIPPING = 1e30
"""Stands for "off": the norm is still measured, nothing is scaled."""


class NormLimit:
    """Leaves out an optimizer step whose gradient norm is above `limit`, on all ranks or on none."""

    def __init__(self) -> None:
        self.limit = math.inf
        self.refused = math.nan
        """Norm of the step that was left out, not a number where none was."""

    def reset(self, limit: float) -> None:
        """Set the limit of the next step; infinite = none."""
        self.limit, self.refused = limit, math.nan

    def clip(self, optimizer: torch.optim.Optimizer, largest: float) -> None:
        """Measure, limit, and leave where DeepSpeed looks for it, the norm of the reduced gradients of a plain optimizer.

        In fp32 without ZeRO, DeepSpeed reports no norm.
        """

        def before(optimizer: Any, *_: Any) -> None:
            values = [value for group in optimizer.param_groups for value in group["params"]]
            optimizer._global_grad_norm = nn.utils.clip_grad_norm_(values, largest or NO_CLIPPING)
            optimizer.overflow = self._refuses(optimizer._global_grad_norm)
            if optimizer.overflow:  # a parameter without a gradient is left alone, its moments too
                for value in values:
                    value.grad = None

        optimizer.register_step_pre_hook(before)

    def guard(self, optimizer: Any, stage: int) -> None:
        """Let a ZeRO optimizer take a norm above the limit for one that is not finite: such a step it leaves out cleanly.

        In stages 1 and 2 the host waits for the device once, for the norm, and what reads it after that reads it on the host.
        """
        name = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
        measure = getattr(optimizer, name)

        def groups() -> list[Tensor]:
            found = [torch.as_tensor(norm) for norm in measure()]
            return [found[0].new_tensor(math.inf)] if self._refuses(torch.linalg.vector_norm(torch.stack(found))) else found

        def whole() -> Tensor:
            found = torch.as_tensor(measure()).cpu()
            return torch.full_like(found, math.inf) if self._refuses(found) else found

        setattr(optimizer, name, groups if stage == 3 else whole)
        if stage in (1, 2):  # a look of its own at every gradient; one that is not finite makes the norm so, which is judged next
            optimizer.check_overflow = lambda *_, **__: None

    def _refuses(self, norm: Tensor) -> bool:
        """Whether a norm is above the limit on any rank (collective where there is a limit)."""
        if math.isinf(self.limit):
            return False
        found = float(norm)
        if distributed.reduce_max([float(found > self.limit)])[0] == 0.0:
            return False
        self.refused = found if math.isfinite(found) else math.nan
        return True
