"""The operators of `csrc/`, where they were built."""

from __future__ import annotations

from functools import cache

from torch import Tensor


@cache
def missing() -> str | None:
    """Say why the native operators are absent, or None where they are loaded."""
    try:
        import emoscale._native  # noqa: F401  # loading registers torch.ops.emoscale
    except ImportError as error:
        built = "not built (`make native` builds csrc/)"
        return built if "_native" in str(error) and "cannot import" not in str(error) and ".so" not in str(error) else f"cannot be loaded: {error}"
    return None


def refuse(tensor: Tensor) -> str | None:
    """Say why a native CPU operator cannot take this tensor."""
    return missing() or (None if tensor.device.type == "cpu" else "takes CPU tensors")
