"""The operators of `csrc/`, where they were built."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_FAKES: dict[str, Callable[..., Any]] = {}
"""Operator → what gives results of its shape and type; PyTorch takes them only once the operator is there."""


def declare(name: str, fake: Callable[..., Any]) -> None:
    """Name an operator of `csrc/bindings.cpp` that `torch.compile` is to see through, before any operator is called."""
    _FAKES[name] = fake


@torch.compiler.assume_constant_result  # nothing to trace in an import
def missing() -> str | None:
    """Say why the native operators are absent, or None where they are loaded."""
    return _missing()


@cache
def _missing() -> str | None:
    try:
        import emoscale._native  # noqa: F401  # loading registers torch.ops.emoscale
    except ImportError as error:
        built = "not built (`make native` builds csrc/)"
        return built if "_native" in str(error) and "cannot import" not in str(error) and ".so" not in str(error) else f"cannot be loaded: {error}"
    for name, fake in _FAKES.items():
        if not hasattr(torch.ops.emoscale, name):
            return f"built from older sources, without {name} (`make native` builds csrc/ anew)"
        torch.library.register_fake(f"emoscale::{name}", fake)
    return None


def refuse(tensor: Tensor) -> str | None:
    """Say why a native CPU operator cannot take this tensor."""
    return missing() or (None if tensor.device.type == "cpu" else "takes CPU tensors")
