"""Which implementation an operation takes: one table, one choice, one reason that can be printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Op:
    """The implementations of one operation, best first; each may refuse the tensors it is given, with a reason."""

    name: str
    forms: dict[str, Callable[..., Any]] = field(default_factory=dict)
    refusals: dict[str, Callable[..., str | None]] = field(default_factory=dict)
    unasked: dict[str, Callable[..., str | None]] = field(default_factory=dict)
    """Why `auto` passes over an implementation that would run if it were asked for by name."""

    def pick(self, impl: str, *tensors: Any) -> Callable[..., Any]:
        """Give the function to call.

        Raises:
            ValueError: `impl` is unknown, absent, or cannot take these tensors (the reason says why).
        """
        if impl == "auto":
            return next(form for name, form in self.forms.items() if self._passed_over(name, *tensors) is None)
        if impl not in self.forms:
            raise ValueError(f"{self.name}: impl={impl!r} is not one of {', '.join(['auto', *self.forms])}")
        reason = self._refusal(impl, *tensors)
        if reason is not None:
            raise ValueError(f"{self.name}: impl={impl!r} cannot run here: {reason}")
        return self.forms[impl]

    def explain(self, *tensors: Any) -> dict[str, str]:
        """Give, per implementation, `taken`, `available` or why it is not."""
        rows, taken = {}, False
        for name in self.forms:
            reason = self._refusal(name, *tensors)
            chosen = not taken and self._passed_over(name, *tensors) is None
            rows[name] = reason or ("taken" if chosen else "available")
            taken = taken or chosen
        return rows

    def _refusal(self, name: str, *tensors: Any) -> str | None:
        check = self.refusals.get(name)
        return check(*tensors) if check is not None else None

    def _passed_over(self, name: str, *tensors: Any) -> str | None:
        check = self.unasked.get(name)
        return self._refusal(name, *tensors) or (check(*tensors) if check is not None else None)
