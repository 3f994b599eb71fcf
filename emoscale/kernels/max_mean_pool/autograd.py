"""The gradient of the fused forms: outside the registered operations, so that each of them stays one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Pool = Callable[[Tensor, Tensor], Tensor]


def differentiable(
    forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    backward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Pool:
    """Join a forward (x, cu_seqlens → pooled, peak) and a backward (grad, peak, x, cu_seqlens → dx); differentiable once.

    x is kept for the columns whose maximum several rows hold; the backward reads it nowhere else.
    """

    class MaxMeanPool(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
            pooled, peak = forward(x, cu_seqlens)
            ctx.save_for_backward(peak, x, cu_seqlens)
            return pooled

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # torch gives one gradient per output
            return backward(grad, *ctx.saved_tensors), None

    return MaxMeanPool.apply
