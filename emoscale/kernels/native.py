"""The operators of `csrc/`, where they were built."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

ON_LOAD: list[Callable[[], None]] = []
"""Called once the operators are loaded: an operation tells torch.compile the shapes of its own."""
_FOUND: dict[str, str | None] = {}
"""What `missing` found, once; a plain dict, because torch.compile looks through a cache decorator, with a warning."""


def missing() -> str | None:
    """Say why the native operators are absent, or None where they are loaded."""
    if not _FOUND:
        _FOUND["native"] = _load()
    return _FOUND["native"]


def _load() -> str | None:
    try:
        import emoscale._native  # noqa: F401  # loading registers torch.ops.emoscale
    except ImportError as error:
        built = "not built (`make native` builds csrc/)"
        return built if "_native" in str(error) and "cannot import" not in str(error) and ".so" not in str(error) else f"cannot be loaded: {error}"
    for tell in ON_LOAD:
        tell()
    return None


def refuse(tensor: Tensor) -> str | None:
    """Say why a native CPU operator cannot take this tensor."""
    return missing() or (None if tensor.device.type == "cpu" else "takes CPU tensors")
