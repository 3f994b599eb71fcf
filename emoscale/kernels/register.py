"""How a Triton operation becomes known to `torch.compile`, without costing eager calls the way through the dispatcher.

The dispatcher takes several microseconds per call, as much as the kernel; it is passed by except where somebody looks:
while compiling, and under modes that count, record or fake operations. The autograd function stands outside the
operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_LIBRARY = torch.library.Library("emoscale", "FRAGMENT")  # csrc/bindings.cpp holds the rest of it
Form = TypeVar("Form", bound=Callable[..., Any])


def register(schema: str, launch: Form, fake: Callable[..., Any]) -> Form:
    """Define `torch.ops.emoscale.<name>` and give a function that calls it, or `launch` itself where nobody looks.

    Args:
        schema: name, arguments and results in PyTorch's notation; the name begins with `triton_`, since the native form
            of an operation has the bare one.
        launch: takes and gives real tensors, on a GPU or (interpreted) on the CPU; optional arguments of its own are not
            part of the operation.
        fake: gives results of the right shape, type and device without reading a value.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for key in ("CUDA", "CPU"):
        _LIBRARY.impl(name, launch, key)
    torch.library.register_fake(f"emoscale::{name}", fake, lib=_LIBRARY)
    operation = getattr(torch.ops.emoscale, name).default

    def call(*arguments: Any) -> Any:
        looked_at = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        return operation(*arguments) if looked_at else launch(*arguments)

    return call  # type: ignore[return-value]
