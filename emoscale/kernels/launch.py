"""Where a Triton kernel can be launched: on a GPU, or on a CPU through Triton's interpreter (for tests)."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

R = TypeVar("R")
INSTALLED = importlib.util.find_spec("triton") is not None
NARROW = (torch.float32, torch.float16, torch.bfloat16)


def interpreted() -> bool:
    """Say whether Triton kernels run in the interpreter: `TRITON_INTERPRET=1`, set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


def refuse(device: torch.device) -> str | None:
    """Say why a Triton kernel cannot run on a device, or None where it can."""
    if not INSTALLED:
        return "triton is not installed"
    if device.type == "cuda":
        return "TRITON_INTERPRET=1 runs kernels on the CPU" if interpreted() else None
    return None if device.type == "cpu" and interpreted() else "needs a CUDA device (or TRITON_INTERPRET=1, for tests)"


def on_its_device(launch: Callable[..., R]) -> Callable[..., R]:
    """Let a launcher run with the device of its first tensor current: Triton launches on the current device's stream."""

    @functools.wraps(launch)
    def run(first: torch.Tensor, *rest: Any, **more: Any) -> R:
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return launch(first, *rest, **more)
        with torch.cuda.device(first.device):
            return launch(first, *rest, **more)

    return run


def unasked(device: torch.device) -> str | None:
    """Say why `auto` never takes a Triton kernel on a device, or None: the interpreter is thousands of times slower."""
    return None if device.type == "cuda" else "the interpreter runs only when asked for"


def looked_at() -> bool:
    """Say whether somebody looks at operations: then they go through the dispatcher, which costs as much as a kernel."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def refuse_dtype(dtype: torch.dtype) -> str | None:
    """Say why a kernel that accumulates in float32 cannot take a dtype, or None where it can."""
    return None if dtype in NARROW else f"takes fp32, fp16 and bf16, not {str(dtype).removeprefix('torch.')}"


def refuse_loss(scores: torch.Tensor, target: torch.Tensor | None = None) -> str | None:
    """Say why a Triton loss over given rows of a target cannot take these tensors, or None where it can."""
    reason = refuse(scores.device) or refuse_dtype(scores.dtype)
    if reason is not None or target is None:
        return reason
    if target.device != scores.device:
        return f"the target lies on {target.device}, not on {scores.device}"
    return "gives no gradient to the target" if target.requires_grad else refuse_dtype(target.dtype)
