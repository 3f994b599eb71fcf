"""The operators of `csrc/`, where they were built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _load() -> str | None:
    try:
        import emoscale._native  # noqa: F401  # loading registers torch.ops.emoscale
    except ImportError as error:
        built = "not built (`make native` builds csrc/)"
        return built if "_native" in str(error) and "cannot import" not in str(error) and ".so" not in str(error) else f"cannot be loaded: {error}"
    return None


_REASON = {"missing": _load()}  # found out once, here: torch.compile cannot trace an import


def missing() -> str | None:
    """Say why the native operators are absent, or None where they are loaded."""
    return _REASON["missing"]


def declare(name: str, fake: Callable[..., Any]) -> None:
    """Give `torch.compile` what an operator of `csrc/bindings.cpp` returns, by shape and type; nothing where none are built."""
    if missing() is not None:
        return
    if hasattr(torch.ops.emoscale, name):
        torch.library.register_fake(f"emoscale::{name}", fake)
    else:
        _REASON["missing"] = f"built from older sources, without {name} (`make native` builds csrc/ anew)"


def refuse(tensor: Tensor) -> str | None:
    """Say why a native CPU operator cannot take this tensor."""
    return missing() or (None if tensor.device.type == "cpu" else "takes CPU tensors")
